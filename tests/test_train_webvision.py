"""Train_webvision.py end to end, tiny: the published data format, the files of a run, and both validation sets. What
it shares with Clothing1M, and the order of Algorithm 1, is in test_train_images.py."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.nets import reference_logits, same, snapshot
from helpers.runs import assert_equal, last_state, read_records, without_times
from helpers.scripts import SMALL_NET, run_script
from helpers.trees import WNIDS, make_webvision

import dataloader_webvision
import PreResNet
import Train_webvision
from dividemix import engine
from dividemix.codivide import normalise
from dividemix.data.images import Views
from dividemix.report import report

EPOCHS, CLASSES = 3, 10  # one epoch of warm-up


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """60 noisy images of 10 classes, and 20 of each validation set."""
    return make_webvision(tmp_path_factory.mktemp("webvision"), n_train=60, sides=(16, 32))


def tiny(tree: Path, out_dir: Path, *flags: str) -> list[str]:
    """Flags of a run of a second, which reads its images itself. Later flags win."""
    size = ["--num_class", str(CLASSES), "--num_epochs", str(EPOCHS), "--workers", "0"]
    return ["--data_path", str(tree), *SMALL_NET, *size, "--out_dir", str(out_dir), *flags]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """A figure takes a second, and has its own tests; `done` draws it."""
    monkeypatch.setattr(report, "draw", lambda *_: [])


# ---- A finished run and its files ----


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of a fresh process with a worker, on a data folder with WNID class folders."""
    root = tmp_path_factory.mktemp("run")
    tree = make_webvision(root / "dataset", n_train=60, sides=(16, 32), wnid_folders=True)
    flags = tiny(tree, root / "out", "--workers", "1")
    process = run_script(*flags, cwd=root, script="Train_webvision.py")
    assert process.returncode == 0, process.stderr
    folder = root / "out" / "webvision"
    records = read_records(folder)
    about = {"flags": flags, "folder": folder, "records": records, "tree": tree}
    return SimpleNamespace(**about, out=process.stdout, err=process.stderr)


def test_output_is_one_line_an_epoch_and_the_best_beside_the_papers(done):
    """Else a log file fills with progress bars, or a tiny run's number stands beside the paper's as if it were one."""
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("epoch ")] == ["0/2", "1/2", "2/2"]
    for text in (done.out, done.err):
        assert not re.search(r"[\r█▏]|it/s|\d%\|", text), text
    assert all(line.startswith("warning: ") for line in done.err.splitlines()), done.err
    last = next(line for line in done.out.splitlines() if line.startswith("best epoch "))
    assert re.match(
        r"best epoch \d: WebVision [\d.]+ \([\d.]+\), ILSVRC12 [\d.]+ \([\d.]+\); mean of the last 10", last
    )
    assert (
        "; paper: WebVision 77.32 (91.64), ILSVRC12 75.20 (90.84) (but this run: --batch_size 8 (paper: 32), " in last
    )


def test_files_of_a_run(done):
    """Else TensorBoard shows an empty page, or an analysis of the losses over the epochs, which this script always
    saves, has gaps."""
    files = {path.name for path in done.folder.iterdir()} - {".lock"}
    logs = {"acc.txt", "stats.txt", "metrics.jsonl", "histograms.jsonl", "args.json", "tensorboard", "scores"}
    logs |= {"labels.npz", "label_scores.npz", "thumbnails.npz"}
    logs |= {"report.html", "figures", "label_issues.csv", "cleaned_labels.csv"}
    assert files == logs | {"last.json", "best.pt", "epoch-001.pt", "epoch-002.pt", "result.json"}
    assert (done.folder / "figures" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (done.folder / "scores").iterdir()) == ["epoch_001.npz", "epoch_002.npz"]
    for epoch in range(1, EPOCHS):
        scores = np.load(done.folder / "scores" / f"epoch_{epoch:03d}.npz", allow_pickle=False)
        names = ("raw_loss", "prediction", "loss", "clean_probability")
        assert all(scores[f"{name}_net{k}"].shape == (60,) for name in names for k in (1, 2))
    about = json.loads((done.folder / "args.json").read_text())
    assert about["command"] == ["Train_webvision.py", *done.flags]
    assert (about["args"]["arch"], about["args"]["weights"], about["args"]["num_class"]) == ("preresnet18", "none", 10)
    assert (about["data"]["train"], about["data"]["val"], about["data"]["imagenet"]) == (60, 20, 20)
    assert about["data"]["classes"] == [f"{wnid} thing {c}, other name" for c, wnid in enumerate(WNIDS[:CLASSES])]


def test_log_files_have_the_authors_formats(done):
    """Else every script that people have to read the authors' logs finds nothing, or exchanges the two networks or the
    two validation sets."""
    expected = ""
    for r in done.records:
        webvision = f"WebVision Acc: {r['test_acc']:.2f}% ({r['test_acc_top5']:.2f}%)"
        imagenet = f"ImageNet Acc: {r['imagenet_acc']:.2f}% ({r['imagenet_acc_top5']:.2f}%)"
        expected += f"Epoch:{r['epoch']} \t {webvision} \t {imagenet}\n"
    assert (done.folder / "acc.txt").read_text() == expected
    divided = [r for r in done.records if r["phase"] == "train"]
    expected = "".join(f"Numer of labeled samples:{r[f'labeled_net{k}']} \n" for r in divided for k in (2, 1))
    assert (done.folder / "stats.txt").read_text() == expected


def test_metrics_are_one_flat_object_an_epoch(done):
    """Else notebooks that read metrics.jsonl break."""
    both = {f"{name}_net{k}" for name in ("test_acc", "imagenet_acc", "labeled", "unlabeled") for k in (1, 2)}
    keys = both | {"epoch", "phase", "lr", "test_acc", "test_acc_top5", "imagenet_acc", "imagenet_acc_top5"}
    keys |= {"best_acc", "last10_acc", "loss_x", "penalty"}
    seconds = {"warmup": {"warmup1", "warmup2"}, "train": {"loss", "gmm", "train1", "train2"}}
    assert [(r["epoch"], r["phase"]) for r in done.records] == [(0, "warmup"), (1, "train"), (2, "train")]
    for record in done.records:
        phases = seconds[record["phase"]] | {"test", "imagenet", "save"}
        assert record.keys() == keys | {f"seconds_{name}" for name in phases}
        assert all(value is None or isinstance(value, int | float | str) for value in record.values())
        for k in (1, 2):
            sizes = record[f"labeled_net{k}"], record[f"unlabeled_net{k}"]
            assert (sum(sizes) == 60) if record["phase"] == "train" else (sizes == (None, None))
    accuracy = [r["test_acc"] for r in done.records]
    assert [r["best_acc"] for r in done.records] == [max(accuracy[: n + 1]) for n in range(EPOCHS)]
    assert done.records[-1]["last10_acc"] == pytest.approx(np.mean(accuracy))
    assert done.records[0]["penalty"] == 0  # no confidence penalty in WebVision's warm-up


def test_the_list_of_labels_is_by_what_a_further_epoch_would_divide_by(done, tmp_path):
    """Else the list is of other images, or of other networks than the run's."""
    found = np.load(done.folder / "label_scores.npz")
    lines = (done.folder / "label_issues.csv").read_text().splitlines()
    assert len(lines) == 61 and lines[0].startswith("index,path,given_label,")
    assert lines[1].startswith("0,google/q0001/")
    shutil.copytree(done.folder, tmp_path / "longer")
    Train_webvision.main([*done.flags, "--workers", "0", "--run_dir", str(tmp_path / "longer"), "--num_epochs", "4"])
    scores = np.load(tmp_path / "longer" / "scores" / f"epoch_{EPOCHS:03d}.npz")
    for k in (1, 2):
        np.testing.assert_allclose(found[f"loss_net{k}"], scores[f"raw_loss_net{k}"], rtol=1e-5)
        np.testing.assert_allclose(found[f"p_clean_net{k}"], scores[f"clean_probability_net{k}"], atol=1e-4)


def test_a_finished_run_started_again_says_so_and_ends_the_same(done, capsys):
    """Else a second start loses the result, or trains on past its end."""
    before = {name: (done.folder / name).read_bytes() for name in ("result.json", "acc.txt", "stats.txt", "best.pt")}
    final = Train_webvision.main(done.flags)
    assert {name: (done.folder / name).read_bytes() for name in before} == before
    assert final == json.loads(before["result.json"])
    assert final.items() >= done.records[-1].items() and final["run_dir"] == str(done.folder)
    paper = {"test_acc": 77.32, "test_acc_top5": 91.64, "imagenet_acc": 75.20, "imagenet_acc_top5": 90.84}
    assert {name: final[f"paper_{name}"] for name in paper} == paper
    assert "is finished (3 epochs)" in capsys.readouterr().out


def test_scores_and_accuracies_are_what_torchvision_and_pillow_give(done):
    """By other means, from the files: a wrong mean, crop, label, set or k, or a net in train mode, divides and tests
    something else, and shows in no number that one could doubt."""
    data = dataloader_webvision.load(done.tree, CLASSES)
    before = torch.load(done.folder / f"epoch-{EPOCHS - 2:03d}.pt", weights_only=True)["nets"]

    def logits(state, images):
        net = PreResNet.ResNet18(CLASSES, 4)
        net.load_state_dict(state)
        mean_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        paths = [images.path(i) for i in range(len(images))]
        return reference_logits(net, paths, round(16 * 320 / 299), 16, *mean_std)

    record = done.records[-1]
    for name, images in (("test", data.val), ("imagenet", data.imagenet)):
        labels = torch.from_numpy(images.labels)
        both = [logits(state, images) for state in last_state(done.folder)["nets"]]
        top1 = [100 * (x.argmax(1) == labels).float().mean().item() for x in (sum(both), *both)]
        top5 = 100 * (sum(both).topk(5)[1] == labels[:, None]).any(1).float().mean().item()
        found = [record[f"{name}_acc{suffix}"] for suffix in ("", "_net1", "_net2")]
        assert found == pytest.approx(top1, abs=0.5 * 100 / 20)
        assert record[f"{name}_acc_top5"] == pytest.approx(top5, abs=0.5 * 100 / 20)
    scores = np.load(done.folder / "scores" / f"epoch_{EPOCHS - 1:03d}.npz")
    for k, state in enumerate(before, start=1):
        labels = torch.from_numpy(data.train.labels)
        loss = torch.nn.functional.cross_entropy(logits(state, data.train), labels, reduction="none")
        np.testing.assert_allclose(scores[f"raw_loss_net{k}"], loss, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(scores[f"loss_net{k}"], normalise(loss), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Every part can be right and the whole still not learn: 20 % of the labels wrong; chance is 5 %, top-5 25 %."""
    tree = make_webvision(tmp_path / "data", 800, 100, 100, noise=0.2, num_class=20, sides=(16, 32))
    flags = ["--num_class", "20", "--width", "8", "--batch_size", "16", "--lr", "0.05", "--warm_up", "4"]
    final = Train_webvision.main(tiny(tree, tmp_path, *flags, "--num_epochs", "6", "--workers", "1"))
    assert final["phase"] == "train"
    assert min(final["test_acc"], final["imagenet_acc"]) > 25
    assert min(final["test_acc_top5"], final["imagenet_acc_top5"]) > 60
    scores = np.load(Path(final["run_dir"]) / "scores" / "epoch_005.npz")
    clean = dataloader_webvision.load(tree, 20).train.labels == np.arange(800) % 20  # it draws its classes in turn
    for k in (1, 2):  # a wrong label's clean probability is lower
        p = scores[f"clean_probability_net{k}"]
        assert p[clean].mean() > p[~clean].mean() + 0.15


# ---- Interrupted and continued, with a cache ----


def test_interrupted_equals_uninterrupted_bit_for_bit(tree, tmp_path):
    """Stopped after warm-up, in the middle and where the learning rate drops: weights, momentum, scores and all
    logs. A run that a stop changes cannot be reproduced."""
    for name, stops in (("straight", [4]), ("stopped", [1, 2, 4])):
        for epochs in stops:
            flags = ["--workers", "1", "--lr_drop", "3", "--num_epochs", str(epochs), "--run_dir", str(tmp_path / name)]
            final = Train_webvision.main(tiny(tree, tmp_path, *flags))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    state = last_state(straight)
    assert_equal(state, last_state(stopped))
    assert [record["lr"] for record in state["records"]] == [0.01] * 3 + [0.001]
    for name in ("acc.txt", "stats.txt"):
        assert (straight / name).read_text() == (stopped / name).read_text()
    for epoch in range(1, 4):
        scores = [dict(np.load(f / "scores" / f"epoch_{epoch:03d}.npz")) for f in (straight, stopped)]
        np.testing.assert_equal(*scores)
    records = [[without_times(r) for r in read_records(folder)] for folder in (straight, stopped)]
    assert records[0] == records[1] and len(records[0]) == 4
    best = [torch.load(folder / "best.pt", weights_only=True) for folder in (straight, stopped)]
    assert_equal(*best)
    result = json.loads((straight / "result.json").read_text())
    assert {**without_times(result), "run_dir": ""} == {**without_times(final), "run_dir": ""}


def test_a_cache_changes_nothing_and_is_used_again(tmp_path):
    """Else runs with and without a fast disk train on other pixels; or each run decodes the 66,000 images anew."""
    tree = make_webvision(tmp_path / "data", n_train=60, sides=(16, 32))
    Train_webvision.main(tiny(tree, tmp_path, "--run_dir", str(tmp_path / "plain")))
    cache = ["--cache_dir", str(tmp_path / "cache")]
    Train_webvision.main(tiny(tree, tmp_path, *cache, "--run_dir", str(tmp_path / "cached")))
    assert_equal(last_state(tmp_path / "plain"), last_state(tmp_path / "cached"))
    for image in (path for path in tree.rglob("*.*") if path.suffix in (".jpg", ".JPEG")):
        status = image.stat()  # of the same size and time: for the cache still the images that it holds
        image.write_bytes(bytes(status.st_size))
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    Train_webvision.main(tiny(tree, tmp_path, *cache, "--run_dir", str(tmp_path / "again"), "--num_epochs", "2"))
    Train_webvision.main(tiny(tree, tmp_path, *cache, "--run_dir", str(tmp_path / "again")))
    assert_equal(last_state(tmp_path / "plain"), last_state(tmp_path / "again"))


# ---- Selection ----


def test_val_fraction_selects_off_the_test_set(tree, tmp_path, monkeypatch):
    """Else the best epoch is chosen on what it is then tested with, or the held-out images are trained on."""
    chosen = iter([10.0, 30.0, 20.0])
    states, held_out, scored = [], [], []
    loss, test = engine.per_sample_loss, Train_webvision.test

    def spy_test(nets, sets, *given, **more):
        if "val" not in sets:
            return test(nets, sets, *given, **more)
        [data] = sets.values()
        states.append([snapshot(net) for net in nets])
        held_out.append((data.name, data.index))
        return {"val_acc": next(chosen), "val_acc_net1": 0.0, "val_acc_net2": 0.0}

    def spy_loss(net, data, phase):
        scored.append((data.name, data.index))
        return loss(net, data, phase)

    monkeypatch.setattr(Train_webvision, "test", spy_test)
    monkeypatch.setattr(engine, "per_sample_loss", spy_loss)
    final = Train_webvision.main(tiny(tree, tmp_path, "--val_fraction", "0.2"))
    best = torch.load(Path(final["run_dir"]) / "best.pt", weights_only=True)
    assert best["epochs"] == [1, 1]
    assert all(same(*pair) for pair in zip(best["nets"], states[1], strict=True))
    assert final["best_acc"] == read_records(final["run_dir"])[1]["test_acc"] and final["val_acc"] == 20.0
    parts = {name for name, _ in held_out + scored}
    index = np.load(Path(final["run_dir"]) / "labels.npz")["index"]
    assert parts == {"train"} and len(held_out[0][1]) == 12 and len(scored) == 4
    for _, rows in held_out:
        assert sorted([*rows, *index]) == list(range(60))
    for _, rows in scored:
        np.testing.assert_array_equal(rows, index)


# ---- The paper's network ----


@pytest.mark.slow
def test_inceptionresnetv2_runs(tmp_path):
    """The tests' small network says nothing of the paper's: its input, its head, its memory."""
    tree = make_webvision(tmp_path / "data", n_train=4, n_val=2, n_imagenet=2, noise=0, num_class=2, sides=(80, 96))
    flags = ["--num_class", "2", "--image_size", "112", "--batch_size", "2", "--num_epochs", "2", "--lr", "0.001"]
    machine = ["--device", "cpu", "--workers", "0", "--out_dir", str(tmp_path)]
    final = Train_webvision.main(["--data_path", str(tree), *flags, *machine])
    assert final["phase"] == "train" and final["labeled_net1"] + final["unlabeled_net1"] == 4
    assert last_state(Path(final["run_dir"]))["nets"][0]["last_linear.weight"].shape == (2, 1536)


def test_views_are_the_papers():
    """A crop of another share of the image is another augmentation: 299 of 320, at random sizes."""
    size = Train_webvision.PAPER.images["image_size"]
    assert Views(Train_webvision.PAPER.resize_for(size), size, "resized_crop") == Views(320, 299, "resized_crop")
