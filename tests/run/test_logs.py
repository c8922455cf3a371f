"""The lines that the logs hold of an epoch: the authors' formats."""

import numpy as np
import pytest
from helpers.nets import half

from dividemix.engine import Terms
from dividemix.run import logs

DIVIDED = {"labeled_net1": 11, "labeled_net2": 22, "unlabeled_net1": 3, "unlabeled_net2": 4}
COMMON = {"epoch": 7, "phase": "train", "lr": 0.01, "loss_x": 1.25, "penalty": 0.5, "seconds_test": 2.0}
WEBVISION = {
    **COMMON | DIVIDED,
    **{"test_acc": 77.324, "test_acc_top5": 91.638, "imagenet_acc": 75.2, "imagenet_acc_top5": 90.84},
    **{"test_acc_net1": 76.0, "test_acc_net2": 75.5, "best_acc": 77.324, "last10_acc": 76.1},
}
CLOTHING1M = {
    **COMMON | DIVIDED,
    **{"val_acc": 74.5, "val_acc_net1": 73.456, "val_acc_net2": 72.0},
    **{"best_val_acc_net1": 73.5, "best_val_acc_net2": 72.9},
}
OWN = {**COMMON | DIVIDED, "val_acc": 81.5, "val_acc_net1": 80.0, "val_acc_net2": 79.0}
UNDIVIDED = dict.fromkeys(DIVIDED) | {"phase": "warmup"}


def test_lines_of_the_log_files_are_the_authors():
    """Else every script that people have to plot the authors' logs reads nothing, or exchanges the two networks."""
    line = "Epoch:7 \t WebVision Acc: 77.32% (91.64%) \t ImageNet Acc: 75.20% (90.84%)\n"
    assert logs.WEBVISION.acc(WEBVISION) == line
    assert logs.WEBVISION.stats(WEBVISION) == "Numer of labeled samples:22 \nNumer of labeled samples:11 \n"
    assert logs.WEBVISION.stats(WEBVISION | UNDIVIDED) == ""
    assert logs.WEBVISION.stats(WEBVISION | {"labeled_net2": None}) == "Numer of labeled samples:11 \n"
    assert logs.WEBVISION.final(WEBVISION) == ""
    assert logs.CLOTHING1M.acc(CLOTHING1M) == "Validation Epoch:7      Acc1:73.46  Acc2:72.00\n"
    assert logs.CLOTHING1M.final({"test_acc": 74.758}) == "Test Accuracy:74.76\n"
    assert logs.FOLDER.acc(OWN) == "Epoch:7   Accuracy:81.50\n"
    assert logs.FOLDER.acc(OWN | {"test_acc": 70.0}) == "Epoch:7   Accuracy:70.00\n"
    stats = "Numer of labeled samples:22   AUC:0.500\nNumer of labeled samples:11   AUC:null\n"
    assert logs.CIFAR.stats(DIVIDED | {"auc_net1": None, "auc_net2": 0.5}) == stats
    with pytest.raises(ValueError, match="not JSON compliant"):
        logs.metric_line({"loss_x": float("nan")})


def test_the_line_for_people_says_what_the_script_measures():
    """Else a user who watches the run sees a number under another's name, or the run ends at its first line."""
    webvision = WEBVISION | {"val_acc": 50.0}
    assert logs.epoch_line(webvision, 80) == (
        "epoch 7/79 train  labeled 11/22  Lx 1.250  val 50.00 test 77.32 ImageNet 75.20 best 77.32"
    )
    assert logs.epoch_line(webvision, 80, verbose=True) == (
        "epoch 7/79 train  labeled 11/22 unlabeled 3/4  Lx 1.250 penalty 0.500  val 50.00 test 77.32 (91.64) "
        "ImageNet 75.20 (90.84) (nets 76.00/75.50) best 77.32 last-10 76.10  test 2.0s"
    )
    clothing = CLOTHING1M | UNDIVIDED
    assert logs.epoch_line(clothing, 80) == "epoch 7/79 warmup  Lx 1.250 penalty 0.500  val 74.50 best 73.50/72.90"
    assert "val 74.50 (nets 73.46/72.00) best" in logs.epoch_line(clothing, 80, verbose=True)
    assert "penalty" not in logs.epoch_line(clothing | {"penalty": 0.0}, 80, verbose=True)
    assert "val 81.50 best 90.00" in logs.epoch_line(OWN | {"best_val_acc": 90.0}, 10)
    averaged = OWN | {"best_val_acc": 90.0, "val_acc_ema": 85.0, "best_val_acc_ema": 86.0}
    assert "val 81.50 ema 85.00 best 86.00" in logs.epoch_line(averaged, 10)  # what best.pt has


@pytest.mark.parametrize("has_val", [False, True])
@pytest.mark.parametrize("has_ema", [False, True])
def test_the_line_for_people_fits_a_terminal(has_val, has_ema):
    """Else it wraps, and the numbers of two epochs cannot be compared."""
    cifar = COMMON | {"epoch": 299, "auc_net1": 0.9, "auc_net2": 0.91, "loss_u": 0.1, "test_acc": 90.0}
    cifar |= {f"{name}_net{k}": 25012 for name in ("labeled", "unlabeled") for k in (1, 2)}
    cifar |= {"test_acc_net1": 89.0, "test_acc_net2": 88.0, "best_acc": 91.0, "last10_acc": 87.0}
    cifar |= {"val_acc": 80.0} if has_val else {}
    cifar |= {"test_acc_ema": 92.0, "best_acc_ema": 93.0} if has_ema else {}
    line = logs.epoch_line(cifar, 300)
    assert len(line) <= 100 and line.startswith("epoch 299/299 train  labeled 25012/25012  AUC 0.900/0.910  ")
    assert line.endswith(" best 93.00" if has_ema else "test 90.00 best 91.00")
    assert ("Lx 1.250 Lu 0.100" in line) == (not (has_val or has_ema))
    assert all(len(text) <= 100 for text in logs.LEGEND)


def test_how_good_the_labeled_sets_are_where_the_truth_is_known():
    """Else a run on doubtful labels claims to know, a warm-up epoch has a precision, or net 1 has net 2's loss."""
    terms = [Terms(1.0, 1.0, 0.0, 0.0)] * 2
    clean = np.array([True, True, False, True])
    names = [f"clean_{name}_net{k}" for k in (1, 2) for name in ("precision", "recall")]
    known = logs.training([half(4, 1), half(4, 3)], terms, clean)
    assert [known[name] for name in names] == [1.0, 1 / 3, 2 / 3, 2 / 3]
    warm_up = logs.training([None, half(4, 1)], terms, clean)
    assert [warm_up[name] for name in names] == [None, None, 1.0, 1 / 3]
    terms = [Terms(0.0, 1.0, float("nan"), 2.0), Terms(0.0, 3.0, 7.0, 4.0)]
    doubtful = logs.training([half(4, 1), None], terms, unlabeled_loss=True)  # net 2 has learned from net 1's
    assert [doubtful[name] for name in ("loss_x", "loss_u", "penalty")] == [2.0, 7.0, 3.0]
    assert not set(names) & doubtful.keys()
    assert logs.training([None, None], terms, unlabeled_loss=True)["loss_u"] is None


def test_the_best_epoch_and_the_numbers_so_far():
    """Else --val_fraction selects on the test set, or Clothing1M's test and the mean of the last 10 are of other
    epochs."""
    assert [logs.CIFAR.best_by({"test_acc": 3.0, "val_acc": 5.0}, k) for k in (0, 1)] == [5.0, 5.0]
    assert logs.WEBVISION.best_by({"test_acc": 3.0}, 0) == 3.0
    assert [logs.CLOTHING1M.best_by(CLOTHING1M, k) for k in (0, 1)] == [73.456, 72.0]
    tested = [{"test_acc": float(k)} for k in range(13)]
    assert logs.CIFAR.running(tested, [12, 12]) == {"best_acc": 12.0, "last10_acc": np.mean(range(3, 13))}
    assert logs.CIFAR.running(tested[:2], [0, 0]) == {"best_acc": 0.0, "last10_acc": 0.5}
    assert logs.FOLDER.running([{"val_acc": 90.0}, OWN], [0, 0]) == {"best_val_acc": 90.0}
    averaged = [{"test_acc": 9.0, "test_acc_ema": 1.0}, {"test_acc": 5.0, "test_acc_ema": 7.0}]
    assert logs.CIFAR.is_better(averaged[1], averaged[0], 0) and not logs.CIFAR.is_better(*tested[:2], 0)
    of_averages = {"best_acc_ema": 7.0, "last10_acc_ema": 4.0}
    assert logs.CIFAR.running(averaged, [1, 1]) == {"best_acc": 9.0, "last10_acc": 7.0} | of_averages
    validated = [{"val_acc_net1": 1.0, "val_acc_net2": 5.0}, {"val_acc_net1": 2.0, "val_acc_net2": 3.0}]
    assert logs.CLOTHING1M.running(validated, [1, 0]) == {"best_val_acc_net1": 2.0, "best_val_acc_net2": 5.0}


@pytest.mark.parametrize(
    ("phases", "accuracies", "best"),
    [
        ("wttttw", [99, 80, 90, 90, 85, 95], [0, 1, 2, 3, 3, 3]),
        ("www", [9, 8, 7], [0, 1, 2]),
        ("ccc", [9, 9, 8], [0, 1, 1]),
    ],
)
def test_the_best_epoch_of_own_images_is_no_warm_up_epoch(phases, accuracies, best):
    """The model that is shipped would be one that DivideMix has not trained yet: few held-out labels tie often."""
    names = {"w": "warmup", "t": "train", "c": "ce"}
    epochs = enumerate(zip(phases, accuracies, strict=True))
    records = [{"epoch": e, "phase": names[phase], "val_acc": float(value)} for e, (phase, value) in epochs]
    chosen = [max(records[:n], key=lambda record: logs.FOLDER.best_by(record, 0)) for n in range(1, len(records) + 1)]
    assert [record["epoch"] for record in chosen] == best
    assert logs.FOLDER.best_epochs(records, 2) == [best[-1]] * 2  # the figure marks the epoch that is said


def test_without_any_accuracy_the_last_epoch_is_taken():
    """Else `dividemix issues`, which holds nothing out, ends in a KeyError or takes the warm-up's networks."""
    records = [{"epoch": e, "phase": phase, "loss_x": 1.0} for e, phase in enumerate(("warmup", "train", "warmup"))]
    assert logs.FOLDER.best_epochs(records, 2) == [2, 2]
    assert logs.FOLDER.running(records, [2, 2]) == {} and logs.FOLDER.acc(records[0]) == ""
    assert logs.epoch_line(records[0], 3) == "epoch 0/2 warmup  Lx 1.000"
