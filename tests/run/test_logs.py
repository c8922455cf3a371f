"""The lines that the logs hold of an epoch: the authors' formats, typed from FIDELITY.md section 6."""

import numpy as np
import pytest
from helpers.nets import half

from dividemix.engine import PhaseTerms
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
UNDIVIDED = dict.fromkeys(DIVIDED) | {"phase": "warmup"}


def test_lines_of_webvision_are_the_authors():
    """Else every script that people have to plot the authors' logs reads nothing, or exchanges the two networks."""
    line = "Epoch:7 \t WebVision Acc: 77.32% (91.64%) \t ImageNet Acc: 75.20% (90.84%)\n"
    assert logs.WEBVISION.acc(WEBVISION) == line
    assert logs.WEBVISION.stats(WEBVISION) == "Numer of labeled samples:22 \nNumer of labeled samples:11 \n"
    assert logs.WEBVISION.stats(WEBVISION | UNDIVIDED) == ""
    assert logs.WEBVISION.stats(WEBVISION | {"labeled_net2": None}) == "Numer of labeled samples:11 \n"
    assert logs.WEBVISION.final(WEBVISION) == ""


def test_lines_of_clothing1m_are_the_authors():
    """The same; the last line is where the authors' users look for the result."""
    assert logs.CLOTHING1M.acc(CLOTHING1M) == "Validation Epoch:7      Acc1:73.46  Acc2:72.00\n"
    assert logs.CLOTHING1M.final({"test_acc": 74.758}) == "Test Accuracy:74.76\n"


def test_undefined_auc_is_null_in_the_logs():
    """NaN is no JSON: one epoch of r = 0 would make metrics.jsonl unreadable."""
    record = {"labeled_net1": 1, "labeled_net2": 2, "auc_net1": None, "auc_net2": 0.5}
    assert logs.CIFAR.stats(record) == (
        "Numer of labeled samples:2   AUC:0.500\nNumer of labeled samples:1   AUC:null\n"
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        logs.metric_line({"loss_x": float("nan")})


def test_the_line_for_people_says_what_the_script_measures():
    """Else a user who watches the run sees a number under another's name, or the run ends at its first line."""
    assert logs.epoch_line(WEBVISION, 80) == (
        "epoch 7/79 train | labeled 11/22 unlabeled 3/4 | Lx 1.2500 penalty 0.5000 | "
        "webvision 77.32 (91.64) imagenet 75.20 (90.84) nets 76.00/75.50 | best 77.32 last-10 76.10 | test 2.0s"
    )
    assert logs.epoch_line(CLOTHING1M | UNDIVIDED, 80) == (
        "epoch 7/79 warmup | Lx 1.2500 penalty 0.5000 | "
        "validation 74.50 (nets 73.46/72.00) | best nets 73.50/72.90 | test 2.0s"
    )
    cifar = COMMON | DIVIDED | {"auc_net1": 0.9, "auc_net2": None, "loss_u": 0.1, "val_acc": 50.0}
    cifar |= {"test_acc": 90.0, "test_acc_net1": 89.0, "test_acc_net2": 88.0, "best_acc": 91.0, "last10_acc": 87.0}
    assert logs.epoch_line(cifar, 10) == (
        "epoch 7/9 train | labeled 11/22 unlabeled 3/4 | AUC 0.900/- | Lx 1.2500 Lu 0.1000 penalty 0.5000 | "
        "val 50.00 test 90.00 (nets 89.00/88.00) | best 91.00 last-10 87.00 | test 2.0s"
    )
    assert "val 50.00 webvision" in logs.epoch_line(WEBVISION | {"val_acc": 50.0}, 80)


def test_how_good_the_labeled_sets_are_where_the_truth_is_known():
    """Else a run on doubtful labels claims to know, a warm-up epoch has a precision, or net 1 has net 2's."""
    terms = [PhaseTerms(1.0, 1.0, 0.0, 0.0)] * 2
    clean = np.array([True, True, False, True])
    known = logs.training([half(4, 1), half(4, 3)], terms, clean)
    names = [f"clean_{name}_net{k}" for k in (1, 2) for name in ("precision", "recall")]
    assert [known[name] for name in names] == [1.0, 1 / 3, 2 / 3, 2 / 3]
    warm_up = logs.training([None, half(4, 1)], terms, clean)
    assert [warm_up[name] for name in names] == [None, None, 1.0, 1 / 3]
    assert not set(names) & logs.training([half(4, 1), None], terms).keys()


def test_last10_is_the_mean_of_the_last_ten():
    """The paper's second number, over other epochs, is another number."""
    records = [{"test_acc": float(k)} for k in range(13)]
    assert logs.last10(records) == np.mean(range(3, 13))
    assert logs.last10(records[:2]) == 0.5


def test_what_the_best_epoch_is_chosen_by():
    """Else --val_fraction selects on the test set after all, or Clothing1M's final test is of the wrong epochs."""
    assert [logs.by_ensemble({"test_acc": 3.0, "val_acc": 5.0}, k) for k in (0, 1)] == [5.0, 5.0]
    assert logs.by_ensemble({"test_acc": 3.0}, 0) == 3.0
    assert [logs.by_network(CLOTHING1M, k) for k in (0, 1)] == [73.456, 72.0]


def test_the_best_epoch_of_own_images_is_no_warm_up_epoch():
    """The model that is shipped would be one that DivideMix has not trained yet: few held-out labels tie often, and
    some of them are wrong."""
    accuracies = [
        ("warmup", 99.0),
        ("train", 80.0),
        ("train", 90.0),
        ("train", 90.0),
        ("warmup", 95.0),
        ("train", 85.0),
    ]
    records = [{"epoch": e, "phase": phase, "val_acc": value} for e, (phase, value) in enumerate(accuracies)]

    def best(count):
        return max(records[:count], key=lambda record: logs.by_own_images(record, 0))["epoch"]

    assert [best(count) for count in range(1, 7)] == [0, 1, 2, 3, 3, 3]
    records = [{"epoch": e, "phase": phase, "val_acc": 9.0 - e} for e, phase in enumerate(["warmup"] * 3)]
    assert best(3) == 2
    records = [{"epoch": e, "phase": "ce", "test_acc": value} for e, value in enumerate([9.0, 9.0, 8.0])]
    assert best(3) == 1


def test_own_images_without_a_test_part():
    """Their accuracies would be called a test's, or the run end at the first epoch for want of one."""
    record = {"epoch": 3, "phase": "train", "val_acc": 81.5, "val_acc_net1": 80.0, "val_acc_net2": 79.0}
    record |= {"labeled_net1": 5, "labeled_net2": 7, "unlabeled_net1": 2, "unlabeled_net2": 0}
    assert logs.FOLDER.acc(record) == "Epoch:3   Accuracy:81.50\n"
    assert logs.FOLDER.stats(record) == "".join(f"Numer of labeled samples:{n}   AUC:null\n" for n in (7, 5))
    assert [logs.by_ensemble(record, k) for k in (0, 1)] == [81.5, 81.5]
    running = logs.FOLDER.running([{"val_acc": 90.0}, record], [0, 0])
    assert running == {"best_val_acc": 90.0}
    said = "epoch 3/9 train | labeled 5/7 unlabeled 2/0 | validation 81.50 (nets 80.00/79.00) | best 90.00"
    assert logs.epoch_line(record | running, 10).replace(" |  | ", " | ") == said
    tested = record | {"test_acc": 70.0, "test_acc_net1": 69.0, "test_acc_net2": 68.0}
    assert logs.FOLDER.acc(tested) == "Epoch:3   Accuracy:70.00\n"
    running = logs.FOLDER.running([tested], [0])
    assert running == {"best_acc": 70.0, "last10_acc": 70.0}
    line = logs.epoch_line(tested | running, 10)
    assert "val 81.50 test 70.00 (nets 69.00/68.00) | best 70.00 last-10 70.00" in line


def test_running_numbers_are_of_what_is_measured():
    """Else Clothing1M's epochs carry a best test accuracy although none is tested."""
    tested = [{"test_acc": 4.0}, {"test_acc": 2.0}]
    assert logs.CIFAR.running(tested, [0, 0]) == {"best_acc": 4.0, "last10_acc": 3.0}
    validated = [{"val_acc_net1": 1.0, "val_acc_net2": 5.0}, {"val_acc_net1": 2.0, "val_acc_net2": 3.0}]
    assert logs.CLOTHING1M.running(validated, [1, 0]) == {"best_val_acc_net1": 2.0, "best_val_acc_net2": 5.0}
