"""After the last epoch: the scores of every training label, and what happens to them when runs stop and go on."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nets import golden_weights
from helpers.runs import full, last_state
from helpers.scripts import tiny
from PIL import Image

import dataloader_cifar
import PreResNet
import Train_cifar
from dividemix.codivide import Mixture
from dividemix.engine import Phase, per_sample_loss
from dividemix.report import figures
from dividemix.report import issues as label_issues
from dividemix.run import read_run, scoring
from dividemix.run.run import Run
from dividemix.runtime.device import Runtime
from dividemix.seeds import draws


def scores_of(folder) -> dict[str, np.ndarray]:
    return dict(np.load(Path(folder) / "label_scores.npz", allow_pickle=False))


# ---- The pass ----


@torch.no_grad()
def test_scores_are_of_the_loss_pass_and_of_the_summed_logits(tiny_images):
    """Else the list is ranked by other losses than the method divides by, or suggests one network's class."""
    tiny_images.runtime = Runtime(torch.device("cpu"), eval_batch_size=7)
    nets = [golden_weights(PreResNet.ResNet18(3, 4), seed) for seed in (1, 2)]
    x, _ = next(iter(tiny_images.eval_batches(24)))
    for net in nets:
        net.linear.bias -= net.eval()(x).mean(0)  # else all images get the same class
    scores = scoring.ensemble_scores(nets, tiny_images, Phase())
    for k, net in enumerate(nets, start=1):
        np.testing.assert_array_equal(scores[f"loss_net{k}"], per_sample_loss(net, tiny_images).loss)
    p = sum(net.eval()(x) for net in nets).softmax(1)
    np.testing.assert_allclose(scores["probabilities"], p, rtol=1e-4)
    assert len(set(p.argmax(1).tolist())) > 1


def test_clean_probabilities_are_those_of_the_next_epoch_and_nothing_is_kept(monkeypatch):
    """The run may go on afterwards: a loss history with one epoch twice would divide otherwise."""
    rng = np.random.default_rng(0)
    losses = [rng.gamma(1 + 3 * (rng.random(60) < 0.4), 1).astype(np.float32) for _ in range(3)]
    mixture, reference = Mixture(0.5, window=5), Mixture(0.5, window=5)
    for loss in losses[:2]:
        mixture.divide(loss)
        reference.divide(loss)
    given = np.arange(60) % 2
    scores = scoring.clean_probabilities({"loss_net1": losses[2]}, [mixture], 3, 2, given)
    assert len(mixture.history) == 2
    expected = reference.divide(losses[2], random_state=int(draws(3, "divide", 2).integers(2**32)))
    np.testing.assert_array_equal(scores["p_clean_net1"], expected.clean_probability)
    mixture.division = reference.division = "per_class"
    scores = scoring.clean_probabilities({"loss_net1": losses[2]}, [mixture], 3, 2, given)
    reference.history = mixture.history
    by_class = reference.divide(losses[2], random_state=int(draws(3, "divide", 2).integers(2**32)), labels=given)
    np.testing.assert_array_equal(scores["p_clean_net1"], by_class.clean_probability)
    assert (by_class.clean_probability != expected.clean_probability).any()
    scores = scoring.clean_probabilities({"loss_net1": losses[2]}, [mixture], 3, 2, given, averaged=True)
    reference.history = []  # the losses of earlier epochs are of other weights than averaged ones
    of_averages = reference.divide(losses[2], random_state=int(draws(3, "divide", 2).integers(2**32)), labels=given)
    np.testing.assert_array_equal(scores["p_clean_net1"], of_averages.clean_probability)
    monkeypatch.setattr(scoring, "clean_probability", lambda losses, window, random_state, labels: random_state)
    losses = dict.fromkeys(("loss_net1", "loss_net2"), losses[2])
    states = scoring.clean_probabilities(losses, [mixture] * 2, 3, 2, given)
    assert [*states.values()] == [int(draws(3, "divide", 2, k).integers(2**32)) for k in (0, 1)]


def test_small_copies_keep_their_shape():
    """A photo of three thousand pixels in the report of each run, or one drawn out of shape, helps nobody."""
    rng = np.random.default_rng(0)
    shapes = (192, 96, 3), (40, 90, 3), (1, 300, 3), (40, 48, 3)
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    small = [Image.open(io.BytesIO(scoring.thumbnail(image))) for image in images]
    assert [image.size for image in small] == [(48, 96), (90, 40), (96, 1), (48, 40)]  # no smaller than they need be
    assert [image.format for image in small] == ["JPEG", "JPEG", "JPEG", "PNG"]
    np.testing.assert_array_equal(small[3], images[3])
    smooth = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None, None], (96, 64, 3))
    read = np.asarray(Image.open(io.BytesIO(scoring.thumbnail(smooth)))).astype(int)
    assert np.abs(read - smooth).mean() < 2


def test_equal_images_with_different_labels_come_first_also_beside_held_out_ones():
    """The only labels that are wrong for certain would stand behind the first tenth of the held-out ones."""
    quality = np.array([0.0, 0.3, 0.0, 0.2, 0.9, 0.8, 0.0])
    is_issue = np.array([True, True, True, True, False, False, True])
    held_out = np.isin(np.arange(7), [3, 5])
    assert scoring.worst_first(quality, is_issue, held_out).tolist() == [0, 2, 6, 3, 1, 4, 5]


def test_doubtful_and_borderline_rows():
    """Else labels just beyond the end of the list are never looked at, or a long list has no images at its end."""
    order = np.arange(1000)[::-1]
    for n_issues, n_doubtful, *ends in (0, 50, 0, 12), (4, 54, 0, 16), (400, 500, 388, 412), (995, 1000, 983, 1000):
        is_issue = np.arange(1000) >= 1000 - n_issues
        np.testing.assert_array_equal(scoring.doubtful(order, is_issue), order[:n_doubtful])
        np.testing.assert_array_equal(scoring.borderline(order, is_issue), order[slice(*ends)])


# ---- In a run ----


def without_the_rest(patch) -> None:
    """No figures and no tests of the networks: they take most of a tiny run's time."""
    patch.setattr(figures, "draw_all", lambda *_: {})
    accuracy = {"test_acc": 50.0, "test_acc_net1": 49.0, "test_acc_net2": 48.0}
    patch.setattr(Train_cifar, "test", lambda *_, **__: dict(accuracy))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_the_rest(monkeypatch)


def again(folder, *flags) -> dict:
    return Train_cifar.main(tiny(folder.parent, "--run_dir", str(folder), *flags))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of two epochs, to be copied."""
    folder = tmp_path_factory.mktemp("done") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_the_rest(patch)
        again(folder, "--r", "0.9")  # at 90 % losses are averaged over epochs
    return folder


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


def test_clean_probabilities_are_those_of_the_next_division(copy, monkeypatch):
    """Else the list is another division's; and what it adds to the history of losses changes a run that goes on."""
    before = scores_of(copy)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda self, *_, **__: {})
        again(copy, "--r", "0.9", "--num_epochs", "3")  # divides first of all, by the same losses
    np.testing.assert_equal(scores_of(copy), before)  # of the epoch before, until the run has ended anew
    again(copy, "--r", "0.9", "--num_epochs", "3")
    divided = np.load(copy / "scores" / "epoch_002.npz")
    for k in (1, 2):
        np.testing.assert_array_equal(before[f"p_clean_net{k}"], divided[f"clean_probability_net{k}"])
        np.testing.assert_array_equal(before[f"loss_net{k}"], divided[f"raw_loss_net{k}"])
    assert (before["epochs"], scores_of(copy)["epochs"]) == (2, 3)


@pytest.mark.parametrize("damage", ["none", "cut", "other samples"])
def test_scores_are_made_once_and_again_where_they_are_lost(copy, damage, capsys):
    """Of a million images the pass takes hours; the same command repeats what is missing, and ends with the same."""
    before, file = scores_of(copy), copy / "label_scores.npz"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "other samples":
        np.savez(file, **before | {"index": before["index"] + 1})
    again(copy, "--r", "0.9")
    assert ("scoring" in capsys.readouterr().out) == (damage != "none")
    np.testing.assert_equal(scores_of(copy), before)


@pytest.mark.parametrize("name", ["ensemble_scores", "write"])
def test_a_failure_does_not_lose_the_run(copy, monkeypatch, name):
    """A bad image or a full disk: hours of training must not end with an error, and the same command tries again."""
    for file in ("label_scores.npz", "label_issues.csv", "result.json"):
        (copy / file).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(scoring, name, full)
        with pytest.warns(UserWarning, match="no list of doubtful labels"):
            final = again(copy, "--r", "0.9")
    assert json.loads((copy / "result.json").read_text()) == final
    assert (copy / "report.html").is_file() and not (copy / "label_issues.csv").exists()
    again(copy, "--r", "0.9")
    assert (copy / "label_issues.csv").is_file()


def test_thumbnails_are_the_images_of_the_worst_labels(copy, monkeypatch):
    """Else the report shows another image beside a label; images that cannot be read again must not cost the list."""
    thumbs, issues = read_run(copy).pictures, label_issues.find(read_run(copy))
    images = dataloader_cifar.load("digits", "").train_images
    for index, file in thumbs.items():
        np.testing.assert_array_equal(Image.open(io.BytesIO(file)), images[index])
    assert thumbs.keys() == {*issues.index[issues.doubtful].tolist()} and (copy / "review.html").is_file()
    for name in ("label_scores.npz", "thumbnails.npz"):
        (copy / name).unlink()
    monkeypatch.setattr(scoring, "thumbnail", full)
    with pytest.warns(UserWarning, match="no images"):
        again(copy, "--r", "0.9")
    assert (copy / "label_scores.npz").is_file() and not (copy / "thumbnails.npz").exists()


def test_the_pass_can_be_left_out_and_held_out_samples_are_scored(tmp_path):
    """It takes as long as some epochs, and can come later. A tenth of the labels, held out, was never checked; they are
    no part of the mean over the divided epochs."""
    folder, flags = tmp_path / "run", ["--val_fraction", "0.25"]
    again(folder, *flags, "--no_label_scores")
    assert not {"label_scores.npz", "label_issues.csv"} & {path.name for path in folder.iterdir()}
    again(folder, *flags)
    labels, scores = np.load(folder / "labels.npz"), scores_of(folder)
    held_out, (mean, count) = scores["held_out"], last_state(folder)["probabilities"]
    assert scores["index"].tolist() == sorted([*labels["index"], *labels["held_out"]]) and held_out.sum() == 12
    assert set(scores["index"][held_out]) == {*labels["held_out"]} and len(labels["list_given"]) == 1450
    np.testing.assert_array_equal(scores["probabilities"][~held_out], mean)
    np.testing.assert_allclose(scores["probabilities"].sum(axis=1), 1, rtol=1e-5)
    assert count == 2 and np.isfinite(scores["loss_net1"]).all()
    np.testing.assert_array_equal(np.isnan(scores["p_clean_net1"]), held_out)
    rows = [line.split(",")[:2] for line in (folder / "label_issues.csv").read_text().splitlines()[1:]]
    assert rows == [[str(i), "val" if i in labels["held_out"] else "train"] for i in scores["index"]]
