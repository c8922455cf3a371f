"""Train_clothing1M.py: a sample for each network, the test of the best networks, the paper's network, and whether it
learns. What it shares with the other scripts is in test_scripts.py."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nets import reference_logits, same, snapshot
from helpers.runs import assert_equal, last_state
from helpers.scripts import CLOTHING1M, note_phases, small_run
from helpers.trees import make_clothing1M

import dataloader_clothing1M
import Train_clothing1M
from dividemix import engine
from dividemix.data import stream
from dividemix.data.store import KeptImages
from PreResNet import ResNet18

DRAWN = 4 * 8  # images of a sample that is divided, below: num_batches x batch_size

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def tree(tmp_path) -> Path:
    """112 noisy images of 14 classes, 28 to validate and 28 to test with."""
    return make_clothing1M(tmp_path / "data", n_train=112, sides=(16, 32))


@pytest.fixture
def train(tree, tmp_path):
    """-> a tiny run's final metrics and its folder."""

    def train(*flags: str) -> tuple[dict, Path]:
        final = Train_clothing1M.main(small_run(CLOTHING1M, tree, tmp_path, *flags))
        return final, Path(final["run_dir"])

    return train


# ---- Samples ----


def test_each_network_draws_a_balanced_sample_in_each_epoch(tree, train, monkeypatch):
    """Networks that share a sample, or see the same images in each epoch, train without any error and cost accuracy
    that nobody can explain. Also over a restart."""
    calls = note_phases(monkeypatch, Train_clothing1M)
    for epochs in ("2", "3"):
        train("--num_epochs", epochs)
    assert [call["kind"] for call in calls] == ["warmup"] * 2 + ["train"] * 4
    labels, samples = dataloader_clothing1M.load(tree).train.labels, [call["data"].index for call in calls]
    for sample, n in zip(samples, [2 * DRAWN] * 2 + [DRAWN] * 4, strict=True):
        quota = -(-n // 14)
        assert len({*sample}) == min(n, np.minimum(np.bincount(labels), quota).sum())
        assert np.bincount(labels[sample]).max() <= quota
    assert len({frozenset(sample) for sample in samples}) == 6, "a sample was drawn twice"


def logits_and_losses(state: dict, images, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """By other means, from the files."""
    net = ResNet18(14, 4)
    net.load_state_dict(state)
    x = reference_logits(net, [images.path(i) for i in rows], CLOTHING1M.resize, 16, *CLOTHING1M.mean_std)
    return x, torch.nn.functional.cross_entropy(x, torch.from_numpy(images.labels[rows]), reduction="none")


def test_scores_name_images_by_their_rows_in_the_list_that_has_the_bad_ones(tree, train, monkeypatch):
    """Counted without the bad ones, every row after the first of them would be another image's."""
    images, bad = dataloader_clothing1M.load(tree).train, {0, 5, 30}
    for i in bad:
        Path(images.path(i)).write_bytes(b"")
    calls = note_phases(monkeypatch, Train_clothing1M)
    _, folder = train("--skip_bad_images")
    scores = np.load(folder / "scores/epoch_001.npz")
    for k, call in enumerate(calls[2:], start=1):
        rows = scores[f"index_net{k}"]
        assert not bad & {*rows} and max(rows) > 30
        _, losses = logits_and_losses(call["state"], images, rows)
        np.testing.assert_allclose(scores[f"raw_loss_net{k}"], losses, rtol=1e-3)


def test_every_noisy_label_is_scored_by_the_networks_that_were_tested(tree, train):
    """Else the list is of one epoch's sample, or says what networks think that nobody tested. The clean training
    labels stay unused: no truth is claimed."""
    _, folder = train("--num_epochs", "3")
    images, scores = dataloader_clothing1M.load(tree).train, np.load(folder / "label_scores.npz")
    assert scores["index"].tolist() == [*range(112)] and "true" not in np.load(folder / "labels.npz")
    best = torch.load(folder / "best.pt", weights_only=True)["nets"]
    (x1, losses1), (x2, losses2) = (logits_and_losses(state, images, range(112)) for state in best)
    for k, losses in ((1, losses1), (2, losses2)):
        np.testing.assert_allclose(scores[f"loss_net{k}"], losses, rtol=1e-3, atol=1e-4)
    assert np.mean(scores["probabilities"].argmax(1) == (x1 + x2).argmax(1).numpy()) > 0.98


def test_no_more_than_two_samples_are_kept_in_memory(train, monkeypatch):
    """The sample of the epoch before is a third of the memory more than was found to be free: the run is killed."""
    made, kept, score = weakref.WeakSet(), [], engine.per_sample_loss

    class Noted(KeptImages):
        def __init__(self, *args):
            super().__init__(*args)
            made.add(self)

    def spy(*arguments, **settings):
        scores = score(*arguments, **settings)
        gc.collect()
        kept.append(len(made))
        return scores

    monkeypatch.setattr(stream, "KeptImages", Noted)
    monkeypatch.setattr(engine, "per_sample_loss", spy)
    train("--keep_images", "host", "--num_epochs", "3", "--no_label_scores")
    assert kept == [1, 2] * 2


def test_where_the_images_are_kept_changes_nothing(train, tmp_path):
    """Else a machine with less memory, or several ranks, train on other pixels, and nobody can compare the runs."""
    places = ("host", "no", "device")
    folders = [train("--keep_images", place, "--run_dir", str(tmp_path / place))[1] for place in places]
    host, none, device = map(last_state, folders)
    assert_equal(host, none)
    assert_equal(host, device)


# ---- Selection ----


def test_each_network_is_tested_as_of_its_own_best_epoch(train, monkeypatch, capsys):
    """The best epoch of both together, or weights of the last epoch, is another test accuracy than the paper's. Also
    over a restart between the two best epochs; of equal epochs the first."""
    validated = iter([[50, 10, 10], [60, 40, 20], [40, 40, 30], [70, 30, 25]])
    states, tested = [], []

    def accuracy(nets, sets, phase):
        [(name, data)] = sets.items()
        assert data.name == name and len(data) == 28
        (tested if name == "test" else states).append([snapshot(net) for net in nets])
        values = [33, 31, 32] if name == "test" else next(validated)
        return {f"{name}_acc{net}": float(value) for net, value in zip(("", "_net1", "_net2"), values, strict=True)}

    monkeypatch.setattr(Train_clothing1M, "test", accuracy)
    train("--num_epochs", "2")
    final, folder = train("--num_epochs", "4")
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["epochs"] == [1, 2]
    for nets in (best["nets"], tested[-1]):
        assert same(nets[0], states[1][0]) and same(nets[1], states[2][1])
    assert not same(states[1][1], states[2][1])  # else the test could not tell
    assert (final["test_acc"], final["test_acc_net1"], final["test_acc_net2"]) == (33.0, 31.0, 32.0)
    assert "test 33.00 (nets 31.00/32.00, of epochs 1 and 2, " in capsys.readouterr().out


# ---- In earnest ----


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Every step can be right and the whole still not learn: 40 % of the labels wrong, chance is 7 %."""
    tree = make_clothing1M(tmp_path / "data", 840, 140, 140, noise=0.4, sides=(16, 32))
    flags = ["--width", "8", "--batch_size", "32", "--num_batches", "26", "--lr", "0.05", "--warm_up", "4"]
    flags += ["--num_epochs", "8", "--workers", "1"]
    final = Train_clothing1M.main(small_run(CLOTHING1M, tree, tmp_path, *flags))
    assert final["phase"] == "train" and final["test_acc"] > 45
    scores = np.load(Path(final["run_dir"]) / "label_scores.npz")
    clean = dataloader_clothing1M.load(tree).train.labels == np.arange(840) % 14  # the tree draws its classes in turn
    for k in (1, 2):  # a wrong label's clean probability is lower
        p = scores[f"p_clean_net{k}"]
        assert p[clean].mean() > p[~clean].mean() + 0.15


@pytest.mark.slow
def test_resnet50_runs(tmp_path):
    """The tests' small network says nothing of the paper's: its input, its head, its memory format."""
    tree = make_clothing1M(tmp_path / "data", n_train=28, n_val=2, n_test=2, sides=(64, 80))
    flags = ["--weights", "none", "--image_size", "64", "--num_batches", "1", "--batch_size", "4", "--num_epochs", "2"]
    on_cpu = ["--device", "cpu", "--workers", "0", "--out_dir", str(tmp_path)]
    final = Train_clothing1M.main(["--data_path", str(tree), *flags, *on_cpu])
    assert final["phase"] == "train" and final["labeled_net1"] + final["unlabeled_net1"] == 4
    assert last_state(Path(final["run_dir"]))["nets"][0]["fc.weight"].shape == (14, 2048)
