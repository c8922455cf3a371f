"""Whether it learns: real images with wrong labels, at a size that two cores can train (`make test-slow`)."""

import pytest

import Train_cifar
from dividemix.report.issues import against_truth, find
from dividemix.run.folder import read_run


@pytest.mark.slow
def test_the_method_finds_the_wrong_labels_of_the_digits(tmp_path):
    """Every equation can be right and the whole still not learn: this is the demo's run, held to what it must reach."""
    command = "--dataset digits --r 0.5 --width 16 --warm_up 8 --num_epochs 12 --device cpu --run_dir"
    final = Train_cifar.main([*command.split(), str(tmp_path / "run")])
    assert final["best_acc"] > 90
    assert min(final["auc_net1"], final["auc_net2"]) > 0.93
    found = against_truth(find(read_run(tmp_path / "run")))
    assert found.wrong == 649
    assert found.recall > 0.9
    assert found.precision > 0.7
    assert found.wrong_after < found.wrong / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "noise", [("sym", "0.2", 4, 6), ("asym", "0.4", 8, 11), ("idn", "0.3", 8, 11), ("sym", "0", 4, 6)]
)
def test_other_noise_is_learned_too(tmp_path, noise):
    """Other recipes (lambda_u 0, confidence penalty) and no noise at all, where the AUC is undefined. Held to what an
    epoch after warm-up reaches: a warm-up epoch would say nothing of the method."""
    mode, r, warm_up, epochs = noise
    command = f"--dataset digits --noise_mode {mode} --r {r} --width 16 --device cpu --run_dir"
    schedule = ["--warm_up", str(warm_up), "--num_epochs", str(epochs)]
    final = Train_cifar.main([*command.split(), str(tmp_path / "run"), *schedule])
    assert final["phase"] == "train"
    assert final["test_acc"] > 75
    assert (final["auc_net1"] is None) == (r == "0")
