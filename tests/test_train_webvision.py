"""Train_webvision.py: its cache, held-out images, the paper's network, and whether it learns. What it shares with the
other scripts is in test_scripts.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import assert_equal, last_state, read_records
from helpers.scripts import WEBVISION, note_phases, small_run
from helpers.trees import make_webvision

import dataloader_webvision
import Train_webvision

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def tree(tmp_path) -> Path:
    """40 noisy images of 10 classes, and 20 of each validation set, ILSVRC12's in folders named by WNID."""
    return make_webvision(tmp_path / "data", wnid_folders=True, sides=(16, 32))


def test_a_cache_changes_nothing(tree, tmp_path):
    """Else runs with and without a fast disk train on other pixels. Whether it is used again: data/test_store.py."""
    names = ("plain", "filled", "again")
    for name in names:
        cache = [] if name == "plain" else ["--cache_dir", str(tmp_path / "cache")]
        Train_webvision.main(small_run(WEBVISION, tree, tmp_path, *cache, "--run_dir", str(tmp_path / name)))
    plain, filled, again = (last_state(tmp_path / name) for name in names)
    assert_equal(plain, filled)
    assert_equal(plain, again)


def test_val_fraction_selects_off_the_test_set(tree, tmp_path, monkeypatch):
    """Else the best epoch is chosen on what it is then tested with, or the held-out images are trained on."""
    accuracy, test, held_out = iter([10.0, 30.0, 20.0]), Train_webvision.test, []
    calls = note_phases(monkeypatch, Train_webvision)

    def spy_test(nets, sets, *arguments, **settings):
        if "val" not in sets:
            return test(nets, sets, *arguments, **settings)
        [data] = sets.values()
        held_out.append(data)
        return {"val_acc": next(accuracy), "val_acc_net1": 0.0, "val_acc_net2": 0.0}

    monkeypatch.setattr(Train_webvision, "test", spy_test)
    final = Train_webvision.main(small_run(WEBVISION, tree, tmp_path, "--val_fraction", "0.2", "--num_epochs", "3"))
    folder = Path(final["run_dir"])
    assert torch.load(folder / "best.pt", weights_only=True)["epochs"] == [1, 1]
    assert final["best_acc"] == read_records(folder)[1]["test_acc"] and final["val_acc"] == 20.0
    index = np.load(folder / "labels.npz")["index"]
    assert len(held_out) == 3 and len(held_out[0]) == 8 and [call["kind"] for call in calls[-2:]] == ["train"] * 2
    for data in held_out:
        assert data.name == "train" and sorted([*data.index, *index]) == [*range(40)]
    for call in calls:
        np.testing.assert_array_equal(call["data"].index, index)


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Every step can be right and the whole still not learn: 20 % of the labels wrong; chance is 5 %, top-5 25 %."""
    tree = make_webvision(tmp_path / "data", 800, 100, 100, noise=0.2, num_class=20, sides=(16, 32))
    flags = ["--num_class", "20", "--width", "8", "--batch_size", "16", "--lr", "0.05", "--warm_up", "4"]
    flags += ["--num_epochs", "6", "--workers", "1"]
    final = Train_webvision.main(small_run(WEBVISION, tree, tmp_path, *flags))
    assert final["phase"] == "train"
    assert min(final["test_acc"], final["imagenet_acc"]) > 25
    assert min(final["test_acc_top5"], final["imagenet_acc_top5"]) > 60
    scores = np.load(Path(final["run_dir"]) / "scores" / "epoch_005.npz")
    clean = dataloader_webvision.load(tree, 20).train.labels == np.arange(800) % 20  # it draws its classes in turn
    for k in (1, 2):  # a wrong label's clean probability is lower
        p = scores[f"clean_probability_net{k}"]
        assert p[clean].mean() > p[~clean].mean() + 0.15


@pytest.mark.slow
def test_inceptionresnetv2_runs(tmp_path):
    """The tests' small network says nothing of the paper's: its input, its head, its memory."""
    tree = make_webvision(tmp_path / "data", n_train=4, n_val=2, n_imagenet=2, noise=0, num_class=2, sides=(80, 96))
    flags = ["--num_class", "2", "--image_size", "112", "--batch_size", "2", "--num_epochs", "2", "--lr", "0.001"]
    on_cpu = ["--device", "cpu", "--workers", "0", "--out_dir", str(tmp_path)]
    final = Train_webvision.main(["--data_path", str(tree), *flags, *on_cpu])
    assert final["phase"] == "train" and final["labeled_net1"] + final["unlabeled_net1"] == 4
    assert last_state(Path(final["run_dir"]))["nets"][0]["last_linear.weight"].shape == (2, 1536)
