"""Whether it learns: real images with wrong labels, at a size that two cores can train (`make test-slow`)."""

import pytest

import Train_cifar
from dividemix.report.issues import against_truth, find
from dividemix.run.folder import read_run

pytestmark = pytest.mark.slow


def train(folder, flags: str) -> dict:
    command = f"--dataset digits --width 16 --device cpu {flags}"
    return Train_cifar.main([*command.split(), "--run_dir", str(folder)])


def test_the_method_finds_the_wrong_labels_of_the_digits(tmp_path):
    """Every equation can be right and the whole still not learn: this is the demo's run, held to what it must reach."""
    final = train(tmp_path, "--r 0.5 --warm_up 8 --num_epochs 12")
    assert final["best_acc"] > 90
    assert min(final["auc_net1"], final["auc_net2"]) > 0.93
    result = against_truth(find(read_run(tmp_path)))
    assert result.wrong == 649
    assert result.recall > 0.9 and result.precision > 0.7
    assert result.wrong_after < result.wrong / 2


@pytest.mark.parametrize(
    ("noise", "schedule"),
    [
        ("--noise_mode asym --r 0.4", "--warm_up 8 --num_epochs 20"),
        ("--noise_mode idn --r 0.3", "--warm_up 8 --num_epochs 11"),
        ("--noise_mode sym --r 0", "--warm_up 4 --num_epochs 6"),
    ],
)
def test_other_noise_is_learned_too(tmp_path, noise, schedule):
    """Other recipes (lambda_u 0, confidence penalty) and no noise at all, where the AUC is undefined. Held to what an
    epoch after warm-up reaches: a warm-up epoch would say nothing of the method."""
    final = train(tmp_path, f"{noise} {schedule}")
    assert final["phase"] == "train"
    assert final["test_acc"] > 75
    assert (final["auc_net1"] is None) == noise.endswith("--r 0")
