"""After the last epoch: the scores of every training label, and what happens to them when runs stop and go on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nets import golden_weights
from helpers.runs import last_state, read_records, without_times
from helpers.scripts import tiny
from PIL import Image

import dataloader_cifar
import PreResNet
import Train_cifar
from dividemix import engine
from dividemix.codivide import Mixture
from dividemix.engine import Phase, per_sample_loss
from dividemix.report import figures
from dividemix.run import histograms, scoring
from dividemix.run.run import Run
from dividemix.runtime.device import Runtime
from dividemix.seeds import draws


@torch.no_grad()
def two_nets(images) -> list[torch.nn.Module]:
    """Networks that do not give all these images the same class."""
    nets = [golden_weights(PreResNet.ResNet18(3, 4), seed) for seed in (1, 2)]
    x, _ = next(iter(images.eval_batches(len(images))))
    for net in nets:
        net.linear.bias -= net.eval()(x).mean(0)
    return nets


def scores_of(folder) -> dict[str, np.ndarray]:
    return dict(np.load(Path(folder) / "label_scores.npz", allow_pickle=False))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


# ---- The pass ----


def test_losses_are_those_of_the_loss_pass(tiny_images):
    """Else the list is ranked by other losses than the method divides by."""
    tiny_images.runtime = Runtime(torch.device("cpu"), eval_batch_size=7)
    nets = two_nets(tiny_images)
    found = scoring.ensemble_scores(nets, tiny_images, Phase())
    for k, net in enumerate(nets, start=1):
        np.testing.assert_array_equal(found[f"loss_net{k}"], per_sample_loss(net, tiny_images).loss)


def test_prediction_and_confidence_are_of_the_summed_logits(tiny_images):
    """Else the suggestion is one network's, or its confidence another class's."""
    tiny_images.runtime = Runtime(torch.device("cpu"), eval_batch_size=7)
    nets = two_nets(tiny_images)
    found = scoring.ensemble_scores(nets, tiny_images, Phase())
    x, labels = next(iter(tiny_images.eval_batches(24)))
    with torch.no_grad():
        p = sum(net.eval()(x) for net in nets).softmax(1)
    np.testing.assert_array_equal(found["prediction"], p.argmax(1))
    np.testing.assert_allclose(found["confidence"], p.max(1).values, rtol=1e-4)
    np.testing.assert_allclose(found["p_given"], p[torch.arange(24), labels], rtol=1e-4)
    assert found["prediction"].dtype == np.int32 and len(set(found["prediction"].tolist())) > 1


def test_clean_probabilities_are_those_of_the_next_epoch_and_nothing_is_kept():
    """The run may go on afterwards: a loss history with one epoch twice would divide otherwise."""
    rng = np.random.default_rng(0)
    losses = [rng.gamma(1 + 3 * (rng.random(60) < 0.4), 1).astype(np.float32) for _ in range(3)]
    mixture, other = Mixture(0.5, window=5), Mixture(0.5, window=5)
    for each in losses[:2]:
        mixture.divide(each)
        other.divide(each)
    seen = scoring.clean_probabilities({"loss_net1": losses[2]}, [mixture], seed=3, epochs=2)
    assert len(mixture.history) == 2
    expected = other.divide(losses[2], random_state=int(draws(3, "divide", 2).integers(2**32)))
    np.testing.assert_array_equal(seen["p_clean_net1"], expected.clean_probability)


# ---- In a run ----


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of two epochs, to be copied."""
    folder = tmp_path_factory.mktemp("done") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_the_rest(patch)
        again(folder)
    return folder


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


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


@pytest.mark.parametrize("r", ["0.5", pytest.param("0.9", marks=pytest.mark.slow)])
def test_clean_probabilities_are_those_of_the_next_division(copy, monkeypatch, r):
    """By other means: a run that goes on divides first of all, by the same losses. At 90 % five epochs are averaged."""
    folder = copy if r == "0.5" else copy.with_name("other")
    if r != "0.5":
        again(folder, "--r", r, "--num_epochs", "3")
    ours, epochs = scores_of(folder), len(read_records(folder))
    flags = ["--r", r, "--num_epochs", str(epochs + 1), "--save_scores"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda self, *_, **__: {})
        again(folder, *flags)
    assert_same(scores_of(folder), ours)  # of the epoch before, until the run has ended anew
    again(folder, *flags)
    next_epoch = np.load(folder / "scores" / f"epoch_{epochs:03d}.npz")
    for k in (1, 2):
        np.testing.assert_array_equal(ours[f"p_clean_net{k}"], next_epoch[f"clean_probability_net{k}"])
        np.testing.assert_array_equal(ours[f"loss_net{k}"], next_epoch[f"raw_loss_net{k}"])
    assert ours["epochs"] == epochs and ours["threshold"] == next_epoch["threshold_net1"]
    assert scores_of(folder)["epochs"] == epochs + 1


def epoch_scores(folder, epoch: int) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "scores" / f"epoch_{epoch:03d}.npz"))


def histogram_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "histograms.jsonl").read_text().splitlines()]


def test_what_is_kept_of_an_epoch_is_what_it_was_divided_by(tmp_path, monkeypatch):
    """Else a figure of epoch N shows losses of after its training, or one network's under the other's name. Warm-up
    divides nothing, and after the last epoch nothing is divided."""
    scored, divided, train, loss = [], [], Train_cifar.train_epoch, engine.per_sample_loss

    def note_scores(*args):
        scored.append(loss(*args))
        return scored[-1]

    def note_division(*args):
        divided.append(args[4])
        return train(*args)

    monkeypatch.setattr(engine, "per_sample_loss", note_scores)
    monkeypatch.setattr(Train_cifar, "train_epoch", note_division)
    folder = tmp_path / "run"
    again(folder, "--warm_up", "2", "--num_epochs", "4", "--loss_window", "2", "--save_scores", "--no_label_scores")
    assert sorted(path.name for path in (folder / "scores").iterdir()) == ["epoch_002.npz", "epoch_003.npz"]
    lines, labels = histogram_lines(folder), np.load(folder / "labels.npz")
    assert [line["epoch"] for line in lines] == [2, 3] and len(scored) == len(divided) == 4  # two networks
    for epoch, line in zip((2, 3), lines, strict=True):
        found = epoch_scores(folder, epoch)
        for k in (2, 1):  # net 2 is scored first, and divides for net 1, which is trained first
            scores, division = scored.pop(0), divided.pop(0)
            np.testing.assert_array_equal(found[f"raw_loss_net{k}"], scores.loss)
            np.testing.assert_array_equal(found[f"prediction_net{k}"], scores.prediction)
            np.testing.assert_array_equal(found[f"loss_net{k}"], division.loss)
            np.testing.assert_array_equal(found[f"clean_probability_net{k}"], division.clean_probability)
            assert line[f"net{k}"] == histograms.count(division, labels["given"] == labels["true"])
        assert line.keys() == {"epoch", "net1", "net2"} and line["epoch"] == epoch


@pytest.mark.parametrize("none", [{1}, {0, 1}], ids=["one network", "both"])
def test_a_network_that_finds_nothing_clean_leaves_no_division(tmp_path, monkeypatch, none):
    """Else the division of an epoch before stands in figures and scores as this one's."""
    divide = Mixture.divide

    def nothing(self, *args, **rest):
        mixtures.append(self) if self not in mixtures else None
        epochs.append(self)
        # Net 2 is divided first.
        late, k = epochs.count(self) == 2, 1 - mixtures.index(self)
        self.threshold = 1.0 if late and k in none else 0.5
        return divide(self, *args, **rest)

    mixtures, epochs, folder = [], [], tmp_path / "run"
    monkeypatch.setattr(Mixture, "divide", nothing)
    with pytest.warns(UserWarning, match="finds no sample clean"):
        again(folder, "--num_epochs", "4", "--save_scores", "--no_label_scores")
    names = {name for path in (folder / "scores").glob("epoch_002.npz") for name in np.load(path)}
    assert {int(name[-1]) - 1 for name in names} == {0, 1} - none
    lines = {line.pop("epoch"): line.keys() for line in histogram_lines(folder)}
    both = {"net1", "net2"}
    assert lines == {1: both, 3: both} | ({} if len(none) == 2 else {2: {"net1"}})
    record = read_records(folder)[2]
    assert {k for k in (0, 1) if record[f"labeled_net{k + 1}"] is None} == none
    assert record["phase"] == ("warmup" if len(none) == 2 else "train")


def test_interrupted_equals_uninterrupted(copy):
    """Else a list of wrong labels depends on how often the run was stopped: scores, histograms, and how good the
    labeled sets were."""
    straight = copy.with_name("straight")
    again(straight, "--num_epochs", "3")
    again(copy, "--num_epochs", "3")
    assert_same(scores_of(straight), scores_of(copy))
    assert_same(*(dict(np.load(folder / "thumbnails.npz")) for folder in (straight, copy)))
    for name in ("label_issues.csv", "cleaned_labels.csv", "histograms.jsonl"):
        assert (straight / name).read_bytes() == (copy / name).read_bytes()
    assert last_state(straight)["histograms"] == last_state(copy)["histograms"]
    assert [entry["epoch"] for entry in last_state(copy)["histograms"]] == [1, 2]
    records = [[without_times(record) for record in read_records(folder)] for folder in (straight, copy)]
    assert records[0] == records[1] and records[0][-1]["clean_precision_net1"] is not None


def test_histograms_are_made_anew_from_the_checkpoint(copy):
    """A kill in the middle of a line, or between the checkpoint and the logs, must not leave an epoch twice or half."""
    file = copy / "histograms.jsonl"
    whole = file.read_text()
    assert [json.loads(line)["epoch"] for line in whole.splitlines()] == [1]
    file.write_text(whole + whole[:100])
    again(copy)
    assert file.read_text() == whole


def test_a_finished_run_is_not_scored_again(copy, monkeypatch, capsys):
    """Of a million images the pass takes hours."""
    monkeypatch.setattr(scoring, "ensemble_scores", lambda *_, **__: pytest.fail("scored again"))
    again(copy)
    assert "scoring" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["gone", "cut", "other samples"])
def test_scores_that_are_lost_are_made_again(copy, damage):
    """The same command repeats what is missing, and ends with the same."""
    before, file = scores_of(copy), copy / "label_scores.npz"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        np.savez(file, **before | {"index": before["index"] + 1})
    again(copy)
    assert_same(scores_of(copy), before)


@pytest.mark.parametrize("where", ["pass", "mixture", "writing"])
def test_a_failure_does_not_lose_the_run(copy, monkeypatch, where):
    """Losses that are all equal, a bad image, a full disk: hours of training must not end with an error for it, and the
    same command tries again."""
    for name in ("label_scores.npz", "label_issues.csv", "result.json"):
        (copy / name).unlink()

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    name = {"pass": "ensemble_scores", "mixture": "clean_probabilities", "writing": "write"}[where]
    with monkeypatch.context() as patch:
        patch.setattr(scoring, name, fails)
        with pytest.warns(UserWarning, match="no list of doubtful labels, but the run is saved, and the same command"):
            final = again(copy)
    assert json.loads((copy / "result.json").read_text()) == final
    assert (copy / "report.html").is_file() and not (copy / "label_issues.csv").exists()
    again(copy)
    assert (copy / "label_issues.csv").is_file()


def test_images_that_cannot_be_read_again_cost_no_scores(copy, monkeypatch):
    """They are pictures for people: a list of wrong labels does not need them."""
    for name in ("label_scores.npz", "thumbnails.npz"):
        (copy / name).unlink()
    monkeypatch.setattr(scoring, "thumbnails", lambda *_: (_ for _ in ()).throw(ValueError("gone")))
    with pytest.warns(UserWarning, match="the report shows no images: gone"):
        again(copy)
    assert (copy / "label_scores.npz").is_file() and not (copy / "thumbnails.npz").exists()


def test_thumbnails_are_the_images_of_the_worst_labels(copy):
    """Else the report shows another image beside a label."""
    thumbs, issues = np.load(copy / "thumbnails.npz"), (copy / "label_issues.csv").read_text().splitlines()[1:]
    images = dataloader_cifar.load("digits", "").train_images
    assert len(thumbs["index"]) == 48 and thumbs["pixels"].shape == (48, 32, 32, 3)
    np.testing.assert_array_equal(thumbs["pixels"], images[thumbs["index"]])
    listed = {int(line.split(",")[0]) for line in issues if line.split(",")[4] == "True"}
    assert set(thumbs["index"][: len(listed)].tolist()) == listed


def test_small_copies_keep_their_shape():
    """A photo of three thousand pixels in the report of each run, or one drawn out of shape, helps nobody."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((192, 96, 3), (40, 90, 3), (1, 300, 3))]
    pixels, sizes = scoring.thumbnails(images)
    assert sizes.tolist() == [[96, 48], [40, 90], [1, 96]] and pixels.shape == (3, 96, 96, 3)
    np.testing.assert_array_equal(pixels[1, :40, :90], images[1])  # no smaller than it need be
    assert not pixels[1, 40:].any() and not pixels[0, :, 48:].any()
    expected = Image.fromarray(images[0])
    expected.thumbnail((96, 96))
    np.testing.assert_array_equal(pixels[0, :, :48], expected)
    nothing = scoring.thumbnails([])
    assert len(nothing[0]) == 0 and nothing[1].shape == (0, 2)


def test_cross_entropy_is_scored_without_a_division(tmp_path):
    """The baseline has a ranking of its own: else there is nothing to compare the list with."""
    again(tmp_path / "run", "--method", "ce")
    found = scores_of(tmp_path / "run")
    assert "p_clean_net1" not in found and {"loss_net1", "loss_net2", "p_given", "prediction"} <= found.keys()
    head = (tmp_path / "run" / "label_issues.csv").read_text().splitlines()[0]
    assert "label_quality" in head and not (tmp_path / "run" / "histograms.jsonl").read_text()


def test_the_pass_can_be_left_out(tmp_path, capsys):
    """On a million images it takes as long as some epochs. The same run can be scored later. Samples that are held out
    are on no list: their labels were not learned from."""
    flags = ["--val_fraction", "0.25"]
    again(tmp_path / "run", *flags, "--no_label_scores")
    assert not {"label_scores.npz", "label_issues.csv"} & {path.name for path in (tmp_path / "run").iterdir()}
    assert (tmp_path / "run" / "report.html").is_file() and "scoring" not in capsys.readouterr().out
    again(tmp_path / "run", *flags)
    labels, found = np.load(tmp_path / "run" / "labels.npz"), scores_of(tmp_path / "run")
    np.testing.assert_array_equal(found["index"], labels["index"])
    assert len(found["index"]) == 36 and len(labels["list_given"]) == 1450
    assert (tmp_path / "run" / "label_issues.csv").read_text().count("\n") == 37
