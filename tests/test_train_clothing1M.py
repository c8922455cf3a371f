"""Train_clothing1M.py end to end, tiny: the published data format, the files of a run, and the order of Algorithm 1
where each network draws samples of its own. What it shares with WebVision is in test_train_images.py."""

import csv
import gc
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.nets import reference_logits, same, snapshot
from helpers.runs import assert_equal, last_state, read_records, without_times
from helpers.scripts import SMALL_NET, assert_co_divided, note_phases, run_script
from helpers.trees import make_clothing1M

import dataloader_clothing1M
import PreResNet
import Train_clothing1M
from dividemix import engine
from dividemix.codivide import normalise
from dividemix.data import stream
from dividemix.data.images import Views
from dividemix.data.store import KeptImages
from dividemix.report import report

EPOCHS = 3  # one of warm-up
DRAWN = 4 * 8  # images of a sample that is divided, below: num_batches x batch_size


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """112 noisy images of 14 classes, 28 to validate and 28 to test with."""
    return make_clothing1M(tmp_path_factory.mktemp("clothing1M"), n_train=112, sides=(16, 32))


def tiny(tree: Path, out_dir: Path, *flags: str) -> list[str]:
    """Flags of a run of a second, which reads its images itself. Later flags win."""
    size = ["--num_batches", "4", "--num_epochs", str(EPOCHS), "--workers", "0"]
    return ["--data_path", str(tree), *SMALL_NET, *size, "--out_dir", str(out_dir), *flags]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """A figure takes a second, and has its own tests; `done` draws it."""
    monkeypatch.setattr(report, "draw", lambda *_: [])


# ---- A finished run and its files ----


@pytest.fixture(scope="module")
def done(tree, tmp_path_factory):
    """A finished run of a fresh process with a worker: its output, run folder and records."""
    root = tmp_path_factory.mktemp("run")
    flags = tiny(tree, root / "out", "--workers", "1", "--save_scores")
    process = run_script(*flags, cwd=root, script="Train_clothing1M.py")
    assert process.returncode == 0, process.stderr
    folder = root / "out" / "clothing1m"
    records = read_records(folder)
    about = {"flags": flags, "folder": folder, "records": records, "out": process.stdout, "err": process.stderr}
    return SimpleNamespace(**about)


def test_output_is_one_line_an_epoch_and_the_test_beside_the_papers(done):
    """Else a log file fills with progress bars, or a tiny run's number stands beside the paper's as if it were one."""
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("epoch ")] == ["0/2", "1/2", "2/2"]
    for text in (done.out, done.err):
        assert not re.search(r"[\r█▏]|it/s|\d%\|", text), text
    assert all(line.startswith("warning: ") for line in done.err.splitlines()), done.err
    last = next(line for line in done.out.splitlines() if line.startswith("test "))
    assert re.match(r"test \d+\.\d\d \(nets \d+\.\d\d/\d+\.\d\d, of epochs \d and \d, chosen on the clean valid", last)
    assert "; paper: 74.76 (but this run: --batch_size 8 (paper: 32), " in last and "--arch preresnet18" in last


def test_files_of_a_run(done):
    """Else TensorBoard shows an empty page, the figure is missing, or runs litter the disk with old checkpoints."""
    files = {path.name for path in done.folder.iterdir()} - {".lock"}
    logs = {"acc.txt", "stats.txt", "metrics.jsonl", "histograms.jsonl", "args.json", "tensorboard", "scores"}
    logs |= {"labels.npz", "label_scores.npz", "thumbnails.npz"}
    logs |= {"report.html", "figures", "label_issues.csv", "cleaned_labels.csv"}
    assert files == logs | {"last.json", "best.pt", "epoch-001.pt", "epoch-002.pt", "result.json"}
    assert (done.folder / "figures" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (done.folder / "scores").iterdir()) == ["epoch_001.npz", "epoch_002.npz"]
    about = json.loads((done.folder / "args.json").read_text())
    assert about["command"] == ["Train_clothing1M.py", *done.flags]
    assert (about["args"]["weights"], about["args"]["num_batches"], about["args"]["keep_images"]) == ("none", 4, "auto")
    assert (about["data"]["train"], about["data"]["val"], about["data"]["test"]) == (112, 28, 28)
    assert about["data"]["classes"] == dataloader_clothing1M.CLASS_NAMES


def test_log_files_have_the_authors_formats(done):
    """Else every script that people have to read the authors' logs finds nothing, or exchanges the two networks."""
    final = json.loads((done.folder / "result.json").read_text())
    lines = (done.folder / "acc.txt").read_text().splitlines()
    expected = [(r["epoch"], r["val_acc_net1"], r["val_acc_net2"]) for r in done.records]
    assert lines[:-1] == [f"Validation Epoch:{e}      Acc1:{a:.2f}  Acc2:{b:.2f}" for e, a, b in expected]
    assert lines[-1] == f"Test Accuracy:{final['test_acc']:.2f}"
    divided = [r for r in done.records if r["phase"] == "train"]
    expected = [f"Numer of labeled samples:{r[f'labeled_net{k}']} " for r in divided for k in (2, 1)]
    assert (done.folder / "stats.txt").read_text().splitlines() == expected


def test_metrics_are_one_flat_object_an_epoch(done):
    """Else notebooks that read metrics.jsonl break, or a test accuracy of each epoch invites to choose by it."""
    both = {f"{name}_net{k}" for name in ("val_acc", "best_val_acc", "labeled", "unlabeled") for k in (1, 2)}
    keys = both | {"epoch", "phase", "lr", "val_acc", "loss_x", "penalty"}
    seconds = {"warmup": {"warmup1", "warmup2"}, "train": {"loss", "gmm", "train1", "train2"}}
    assert [(r["epoch"], r["phase"]) for r in done.records] == [(0, "warmup"), (1, "train"), (2, "train")]
    for record in done.records:
        phases = seconds[record["phase"]] | {"val", "save"}
        assert record.keys() == keys | {f"seconds_{name}" for name in phases}
        assert all(value is None or isinstance(value, int | float | str) for value in record.values())
        for k in (1, 2):
            sizes = record[f"labeled_net{k}"], record[f"unlabeled_net{k}"]
            assert (sum(sizes) == DRAWN) if record["phase"] == "train" else (sizes == (None, None))
            so_far = [r[f"val_acc_net{k}"] for r in done.records[: record["epoch"] + 1]]
            assert record[f"best_val_acc_net{k}"] == max(so_far)
    assert done.records[0]["penalty"] < 0  # minus the mean entropy: the confidence penalty of warm-up


def test_a_finished_run_started_again_says_so_and_ends_the_same(done, capsys):
    """Else a second start loses the result, trains on past its end, or tests other networks than it named."""
    before = {name: (done.folder / name).read_bytes() for name in ("result.json", "acc.txt", "stats.txt", "best.pt")}
    final = Train_clothing1M.main(done.flags)
    assert {name: (done.folder / name).read_bytes() for name in before} == before
    assert final == json.loads(before["result.json"])
    last = {key: value for key, value in final.items() if key in done.records[-1]}
    assert last == done.records[-1] and final["run_dir"] == str(done.folder) and final["paper_test_acc"] == 74.76
    assert "is finished (3 epochs)" in capsys.readouterr().out
    starts = json.loads((done.folder / "args.json").read_text())["starts"]
    assert [start["epoch"] for start in starts][:2] == [0, 3]


def logits_of(state: dict, images, index) -> torch.Tensor:
    """By other means, from the files."""
    net = PreResNet.ResNet18(14, 4)
    net.load_state_dict(state)
    mean_std = (0.6959, 0.6537, 0.6371), (0.3113, 0.3192, 0.3214)
    return reference_logits(net, [images.path(i) for i in index], round(16 * 256 / 224), 16, *mean_std)


def assert_scored(scores, nets: list[dict], images, n: int) -> None:
    """The scores are these networks' losses of the images that their index names, n of them."""
    for k, state in enumerate(nets, start=1):
        index = scores[f"index_net{k}"]
        assert len(index) == n == len(np.unique(index))
        labels = torch.from_numpy(images.labels[index])
        loss = torch.nn.functional.cross_entropy(logits_of(state, images, index), labels, reduction="none")
        np.testing.assert_allclose(scores[f"raw_loss_net{k}"], loss, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(scores[f"loss_net{k}"], normalise(loss), rtol=1e-2, atol=1e-3)


def test_scores_and_test_are_what_torchvision_and_pillow_give(done, tree):
    """By other means, from the files: a wrong mean, crop, label or image, or a net in train mode, divides and tests
    something else, and shows in no number that one could doubt."""
    data = dataloader_clothing1M.load(tree)
    before = torch.load(done.folder / f"epoch-{EPOCHS - 2:03d}.pt", weights_only=True)["nets"]
    assert_scored(np.load(done.folder / "scores" / f"epoch_{EPOCHS - 1:03d}.npz"), before, data.train, DRAWN)

    best = torch.load(done.folder / "best.pt", weights_only=True)["nets"]
    both = [logits_of(state, data.test, range(28)) for state in best]
    labels = torch.from_numpy(data.test.labels)
    expected = [100 * (x.argmax(1) == labels).float().mean().item() for x in (sum(both), *both)]
    final = json.loads((done.folder / "result.json").read_text())
    found = [final[name] for name in ("test_acc", "test_acc_net1", "test_acc_net2")]
    assert found == pytest.approx(expected, abs=0.5 * 100 / 28)


def test_scores_name_images_by_their_rows_in_the_list_that_has_the_bad_ones(tmp_path, monkeypatch):
    """Counted without the bad ones, every row after the first of them would be another image's."""
    tree = make_clothing1M(tmp_path / "data", n_train=112, sides=(16, 32))
    data, bad = dataloader_clothing1M.load(tree), {0, 5, 30}
    for i in bad:
        Path(data.train.path(i)).write_bytes(b"")
    calls = note_phases(monkeypatch, Train_clothing1M)
    final = Train_clothing1M.main(tiny(tree, tmp_path, "--num_epochs", "2", "--skip_bad_images"))
    folder = Path(final["run_dir"])
    scores = np.load(folder / "scores/epoch_001.npz")
    assert_scored(scores, [call["state"] for call in calls[2:]], data.train, DRAWN)
    assert not bad & {*scores["index_net1"], *scores["index_net2"]}
    assert max(scores["index_net1"]) > 30
    assert sorted({*range(112)} - {*np.load(folder / "labels.npz")["index"]}) == sorted(bad)


def test_every_noisy_label_is_on_the_list_scored_by_the_networks_that_were_tested(done, tree):
    """Else the list is of one epoch's sample, names other images, or says what networks think that nobody tested. The
    clean training labels stay unused: no truth is claimed."""
    data = dataloader_clothing1M.load(tree)
    with open(done.folder / "label_issues.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(112))
    assert [int(row["given_label"]) for row in rows] == data.train.labels.tolist()
    assert [str(tree / row["path"]) for row in rows] == [data.train.path(i) for i in range(112)]
    assert {row["given_class"] for row in rows} <= set(dataloader_clothing1M.CLASS_NAMES)
    best, labels = torch.load(done.folder / "best.pt", weights_only=True)["nets"], torch.from_numpy(data.train.labels)
    both = [logits_of(state, data.train, range(112)) for state in best]
    losses = [torch.nn.functional.cross_entropy(logits, labels, reduction="none") for logits in both]
    np.testing.assert_allclose([float(row["loss"]) for row in rows], sum(losses) / 2, rtol=1e-3, atol=1e-4)
    suggested = [int(row["suggested_label"]) for row in rows]
    assert np.mean(suggested == sum(both).argmax(1).numpy()) > 0.98
    assert len(np.load(done.folder / "thumbnails.npz")["index"]) == 48
    assert "against the truth" not in done.out and "true" not in np.load(done.folder / "labels.npz")


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Every part can be right and the whole still not learn: 40 % of the labels wrong, chance is 7 %."""
    tree = make_clothing1M(tmp_path / "data", 840, 140, 140, noise=0.4, sides=(16, 32))
    flags = ["--width", "8", "--batch_size", "32", "--num_batches", "26", "--lr", "0.05", "--warm_up", "4"]
    final = Train_clothing1M.main(tiny(tree, tmp_path, *flags, "--num_epochs", "8", "--workers", "1"))
    assert final["phase"] == "train"
    assert final["test_acc"] > 45
    scores = np.load(Path(final["run_dir"]) / "label_scores.npz")
    clean = dataloader_clothing1M.load(tree).train.labels == np.arange(840) % 14  # the tree draws its classes in turn
    for k in (1, 2):  # a wrong label's clean probability is lower
        p = scores[f"p_clean_net{k}"]
        assert p[clean].mean() > p[~clean].mean() + 0.15


# ---- Interrupted and continued ----


def test_interrupted_equals_uninterrupted_bit_for_bit(tree, tmp_path):
    """Stopped after warm-up, in the middle and where the learning rate drops: weights, momentum, samples, each
    network's best epoch and all logs. A run that a stop changes cannot be reproduced."""
    for name, stops in (("straight", [4]), ("stopped", [1, 2, 4])):
        for epochs in stops:
            flags = ["--workers", "1", "--lr_drop", "3", "--num_epochs", str(epochs), "--run_dir", str(tmp_path / name)]
            final = Train_clothing1M.main(tiny(tree, tmp_path, *flags))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    state = last_state(straight)
    assert_equal(state, last_state(stopped))
    assert [record["lr"] for record in state["records"]] == [0.002] * 3 + [0.0002]
    kept = {"nets", "optimizers", "histories", "records", "histograms", "best_epochs"}
    assert state.keys() == kept | {"config", "pins", "versions", "script", "format"}
    for name in ("acc.txt", "stats.txt"):
        assert (straight / name).read_text() == (stopped / name).read_text()
    records = [[without_times(r) for r in read_records(folder)] for folder in (straight, stopped)]
    assert records[0] == records[1] and len(records[0]) == 4
    best = [torch.load(folder / "best.pt", weights_only=True) for folder in (straight, stopped)]
    assert_equal(*best)
    result = json.loads((straight / "result.json").read_text())
    assert {**without_times(result), "run_dir": ""} == {**without_times(final), "run_dir": ""}


@pytest.mark.parametrize("keep", ["no", "device"])
def test_where_the_images_are_kept_changes_nothing(tree, tmp_path, keep):
    """Else a machine with less memory, or several ranks, train on other pixels, and nobody can compare the runs."""
    for name in ("host", keep):
        Train_clothing1M.main(tiny(tree, tmp_path, "--keep_images", name, "--run_dir", str(tmp_path / name)))
    assert_equal(last_state(tmp_path / "host"), last_state(tmp_path / keep))


# ---- Samples, divisions, and who trains on whose ----


def of(labels: np.ndarray, n: int) -> int:
    """How many images a balanced sample of n has."""
    return min(n, int(np.minimum(np.bincount(labels, minlength=14), -(-n // 14)).sum()))


def test_each_network_draws_its_own_sample_and_learns_from_the_others(tree, tmp_path, monkeypatch):
    """Networks that share a sample, that learn from their own division, or from another sample than was divided, train
    without any error and cost accuracy that nobody can explain. Also over a restart."""
    events: list[dict] = []
    loss, train, warm = engine.per_sample_loss, Train_clothing1M.train_epoch, Train_clothing1M.warmup_epoch

    def spy_loss(net, data, phase):
        scored = loss(net, data, phase)
        values = normalise(scored.loss.numpy())
        events.append({"what": "score", "net": snapshot(net), "index": data.index, "loss": values})
        return scored

    def spy_train(net, peer, optimizer, data, division, *given):
        about = {"what": "train", "net": snapshot(net), "peer": snapshot(peer), "index": data.index}
        terms = train(net, peer, optimizer, data, division, *given)
        events.append({**about, "loss": division.loss, "after": snapshot(net)})
        return terms

    def spy_warm(net, optimizer, data, *given):
        events.append({"what": "warmup", "net": snapshot(net), "index": data.index})
        return warm(net, optimizer, data, *given)

    monkeypatch.setattr(engine, "per_sample_loss", spy_loss)
    monkeypatch.setattr(Train_clothing1M, "train_epoch", spy_train)
    monkeypatch.setattr(Train_clothing1M, "warmup_epoch", spy_warm)
    for epochs in ("2", "3"):
        Train_clothing1M.main(tiny(tree, tmp_path, "--num_epochs", epochs))

    labels = dataloader_clothing1M.load(tree).train.labels
    assert [e["what"] for e in events] == ["warmup"] * 2 + (["score"] * 2 + ["train"] * 2) * 2
    drawn = [e for e in events if e["what"] != "train"]
    for i, event in enumerate(drawn):
        n = 2 * DRAWN if event["what"] == "warmup" else DRAWN
        assert len(event["index"]) == len(np.unique(event["index"])) == of(labels, n)
        assert np.bincount(labels[event["index"]]).max() <= -(-n // 14)
        for other in drawn[:i]:
            assert set(event["index"]) != set(other["index"]), "a sample was drawn twice"
    for start in (2, 6):
        net2, net1, first, second = events[start : start + 4]
        assert_co_divided(net2, net1, first, second)
        for trained, divided in ((first, net2), (second, net1)):
            np.testing.assert_array_equal(trained["index"], divided["index"])


def test_no_more_than_two_samples_are_kept_in_memory(tree, tmp_path, monkeypatch):
    """A sample of the epoch before that is still there when the next ones are read is a third of the memory more than
    was found to be free: the run is killed in its second divided epoch."""
    made, kept, score = weakref.WeakSet(), [], engine.per_sample_loss

    class Noted(KeptImages):
        def __init__(self, *args):
            super().__init__(*args)
            made.add(self)

    def spy(net, data, phase):
        scores = score(net, data, phase)
        gc.collect()
        kept.append(len(made))
        return scores

    monkeypatch.setattr(stream, "KeptImages", Noted)
    monkeypatch.setattr(engine, "per_sample_loss", spy)
    Train_clothing1M.main(tiny(tree, tmp_path, "--keep_images", "host", "--num_epochs", "4", "--no_label_scores"))
    assert kept == [1, 2] * 3


def test_a_class_with_few_images_makes_the_sample_shorter(tmp_path):
    """The authors' script leaves zeros for the images that are lacking: losses that the mixture takes for clean."""
    tree = make_clothing1M(tmp_path / "data", n_train=112, noise=0, sides=(16, 32))
    file = tree / "noisy_label_kv.txt"
    lines = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
    lines = [(key, label if i == 0 or label != "0" else "1") for i, (key, label) in enumerate(lines)]
    file.write_text("".join(f"{key} {label}\n" for key, label in lines))  # one image of class 0, 15 of class 1
    final = Train_clothing1M.main(tiny(tree, tmp_path, "--num_batches", "7", "--num_epochs", "2"))
    [scores] = [np.load(file) for file in Path(final["run_dir"], "scores").iterdir()]
    counts = [1] + [4] * 13  # a quota of 56 / 14
    labels = dataloader_clothing1M.load(tree).train.labels
    for k in (1, 2):
        assert np.bincount(labels[scores[f"index_net{k}"]], minlength=14).tolist() == counts
        assert final[f"labeled_net{k}"] + final[f"unlabeled_net{k}"] == 53
        for name in ("raw_loss", "loss", "clean_probability", "prediction"):
            assert len(scores[f"{name}_net{k}"]) == 53
        assert (scores[f"raw_loss_net{k}"] > 0).all()


# ---- Selection ----


def test_each_network_is_tested_as_of_its_own_best_epoch(tree, tmp_path, monkeypatch, capsys):
    """The best epoch of both together, or weights of the last epoch, is another test accuracy than the paper's. Also
    over a restart between the two best epochs; of equal epochs the first."""
    validated = iter([[50, 10, 10], [60, 40, 20], [40, 40, 30], [70, 30, 25]])
    states, tested = [], []

    def chosen(nets, sets, phase):
        [(name, data)] = sets.items()
        assert data.name == name and len(data) == 28
        (tested if name == "test" else states).append([snapshot(net) for net in nets])
        values = [33, 31, 32] if name == "test" else next(validated)
        return {f"{name}_acc{net}": float(value) for net, value in zip(("", "_net1", "_net2"), values, strict=True)}

    monkeypatch.setattr(Train_clothing1M, "test", chosen)
    Train_clothing1M.main(tiny(tree, tmp_path, "--num_epochs", "2"))
    assert all(same(*pair) for pair in zip(tested[-1], states[1], strict=True))
    final = Train_clothing1M.main(tiny(tree, tmp_path, "--num_epochs", "4"))

    best = torch.load(Path(final["run_dir"]) / "best.pt", weights_only=True)
    assert best["epochs"] == [1, 2]
    expected = [states[1][0], states[2][1]]
    for nets in (best["nets"], tested[-1]):
        assert all(same(*pair) for pair in zip(nets, expected, strict=True))
    assert not same(states[1][1], states[2][1])  # else the test could not tell
    assert (final["test_acc"], final["test_acc_net1"], final["test_acc_net2"]) == (33.0, 31.0, 32.0)
    assert (final["val_acc"], final["best_val_acc_net1"], final["best_val_acc_net2"]) == (70.0, 40.0, 30.0)
    assert "test 33.00 (nets 31.00/32.00, of epochs 1 and 2, chosen on the" in capsys.readouterr().out


# ---- The paper's network ----


@pytest.mark.slow
def test_resnet50_runs(tmp_path):
    """The tests' small network says nothing of the paper's: its input, its head, its memory format."""
    tree = make_clothing1M(tmp_path / "data", n_train=28, n_val=2, n_test=2, sides=(64, 80))
    flags = ["--weights", "none", "--image_size", "64", "--num_batches", "1", "--batch_size", "4", "--num_epochs", "2"]
    machine = ["--device", "cpu", "--workers", "0", "--out_dir", str(tmp_path)]
    final = Train_clothing1M.main(["--data_path", str(tree), *flags, *machine])
    assert final["phase"] == "train" and final["labeled_net1"] + final["unlabeled_net1"] == 4
    assert last_state(Path(final["run_dir"]))["nets"][0]["fc.weight"].shape == (14, 2048)


def test_views_are_the_papers():
    """A crop of another share of the image is another augmentation: 224 of 256."""
    size = Train_clothing1M.PAPER.images["image_size"]
    assert Views(Train_clothing1M.PAPER.resize_for(size), size, "crop") == Views(256, 224, "crop")
