"""Train_folder.py end to end, tiny: own images in folders and tables, on the device and streamed, the files of a run,
restarts, faults, and the labels that it finds wrong. Which images are what is in test_dataloader_folder.py."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import end_of, note_phases, read_records, reference_logits, run_script, same, snapshot
from make_image_trees import make_digits, make_folder
from PIL import Image
from test_run import assert_equal, last_state, without_times
from test_torchrun import torchrun

import dataloader_folder
import PreResNet
import Train_folder
from dividemix import DivideMixWarning, networks, report
from dividemix.codivide import normalise

EPOCHS = 3  # one of warm-up
MODES = ["device", "stream"]
NET = ["--arch", "preresnet18", "--width", "4", "--image_size", "16", "--batch_size", "8"]
MACHINE = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]


def tiny(tree: Path, out: Path, *flags: str) -> list[str]:
    """Flags of a run of a second. Later flags win."""
    size = [*NET, "--warm_up", "1", "--num_epochs", str(EPOCHS), *MACHINE]
    return ["--data_path", str(tree), *size, "--run_dir", str(out), *flags]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """24 images of 4 classes; 2 of them are held out."""
    return make_folder(tmp_path_factory.mktemp("own") / "images")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: [])


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs the command line in-process, as a user would. -> (exit status, stdout, stderr)"""

    def run(tree: Path, *flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = end_of(Train_folder, tiny(tree, tmp_path / "run", *flags), monkeypatch)
        return status, *capsys.readouterr()

    return run


# ---- A finished run and its files ----


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of a fresh process, with every default that can be afforded, on a folder without other parts."""
    root = tmp_path_factory.mktemp("done")
    tree = make_folder(root / "my images", 40, sides=(16, 40))
    flags = ["--data_path", "my images", "--width", "4", "--num_epochs", "2", "--warm_up", "1", "--device", "cpu"]
    process = run_script(*flags, "--precision", "fp32", cwd=root, script="Train_folder.py")
    assert process.returncode == 0, process.stderr
    folder = root / "checkpoint/folder_my images"
    about = {"folder": folder, "tree": tree, "records": read_records(folder), "flags": flags}
    return SimpleNamespace(**about, out=process.stdout, err=process.stderr)


def test_output_says_what_was_chosen_and_what_accuracy_means(done):
    """Else the user learns neither what was trained, nor that 81 % may be all that wrong labels allow."""
    lines = done.out.splitlines()
    side = dataloader_folder.survey(dataloader_folder.load(done.tree).train).side
    expected = [f"train: 40 images, {done.tree}", "36 images to train on, 4 classes"]
    expected += ["images of a class: 9 (c0) to 9 (c0), 1.0 times"]
    expected += ["4 training images held out with their labels, drawn by seed 123, to select the best epoch"]
    expected += ["no test part: accuracies are against the validation images' own labels, which may be wrong too"]
    expected += ["arch preresnet18 (images of at most 64 px)", f"image_size 32 (the median short side is {side})"]
    expected += [
        "warm_up 1 (given)",
        "num_epochs 2 (given)",
        "batch_size 8 (for 36 images)",
        "lambda_u 0 (as for 20 % ",
    ]
    expected += ["data_mode device (0 MB, at most 64 px and 4 GB)", "val_fraction 0.1 (no validation or test part)"]
    expected += ["flip on (--no_flip leaves it out)", "mean ", "run folder checkpoint/folder_my images", "best epoch "]
    for start in expected:
        assert any(line.startswith(start) for line in lines), f"{start!r} in {done.out}"
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == ["0/1", "1/1"]
    assert any(
        line.startswith("best epoch ") and "chosen on the validation images: validation " in line for line in lines
    )
    assert not re.search(r"[\r█▏]|it/s|\d%\|", done.out + done.err)
    assert all(line.startswith("warning: ") for line in done.err.splitlines()), done.err


def test_files_of_a_run(done):
    """Else the report, a list of wrong labels or a prediction lacks what it is made from."""
    files = {path.name for path in done.folder.iterdir()} - {".lock"}
    logs = {"acc.txt", "stats.txt", "metrics.jsonl", "args.json", "tensorboard", "labels.npz", "scores"}
    logs |= {"label_scores.npz", "label_issues.csv", "cleaned_labels.csv", "thumbnails.npz", "report.html", "figures"}
    assert files >= logs | {"last.json", "best.pt", "epoch-000.pt", "epoch-001.pt", "result.json"}
    labels = np.load(done.folder / "labels.npz", allow_pickle=False)
    data = dataloader_folder.load(done.tree)
    assert len(labels["index"]) == 36
    assert labels["given"].tolist() == data.train.labels[labels["index"]].tolist()
    assert labels["list_given"].tolist() == data.train.labels.tolist()
    assert labels["list_path"].tolist() == data.train.names().tolist()
    scores = np.load(done.folder / "scores/epoch_001.npz", allow_pickle=False)
    names = ("raw_loss", "prediction", "loss", "clean_probability")
    assert all(scores[f"{name}_net{k}"].shape == (36,) for name in names for k in (1, 2))
    about = json.loads((done.folder / "args.json").read_text())
    assert about["command"][:2] == ["Train_folder.py", "--data_path"]
    chosen = {
        "arch": "preresnet18",
        "num_class": 4,
        "image_size": 32,
        "batch_size": 8,
        "lr": 0.02,
        "data_mode": "device",
    }
    assert about["args"].items() >= chosen.items() and None not in [
        about["args"][name] for name in ("alpha", "lr_drop")
    ]
    assert about["data"]["classes"] == ["c0", "c1", "c2", "c3"]
    assert [about["data"][name] for name in ("train", "val", "resize", "crop")] == [36, 4, 32, 32]


def test_log_files_and_metrics(done):
    """Else what people have to read CIFAR's logs fails, or the two networks are exchanged."""
    expected = "".join(f"Epoch:{r['epoch']}   Accuracy:{r['val_acc']:.2f}\n" for r in done.records)
    assert (done.folder / "acc.txt").read_text() == expected
    last = done.records[-1]
    expected = "".join(f"Numer of labeled samples:{last[f'labeled_net{k}']}   AUC:null\n" for k in (2, 1))
    assert (done.folder / "stats.txt").read_text() == expected
    keys = {f"{name}_net{k}" for name in ("val_acc", "labeled", "unlabeled") for k in (1, 2)}
    keys |= {"epoch", "phase", "lr", "val_acc", "best_val_acc", "loss_x", "penalty"}
    for record, phases in zip(done.records, ({"warmup1", "warmup2"}, {"train1", "train2"}), strict=True):
        assert record.keys() == keys | {f"seconds_{name}" for name in phases | {"val", "loss", "gmm", "save"}}
    assert last["best_val_acc"] == max(record["val_acc"] for record in done.records)
    assert last["labeled_net1"] + last["unlabeled_net1"] == 36


def test_the_same_command_says_that_it_is_finished(done, monkeypatch, capsys):
    """Else a second start trains on past the end, or refuses what it chose itself."""
    monkeypatch.chdir(done.tree.parent)
    before = (done.folder / "result.json").read_bytes()
    final = Train_folder.main([*done.flags, "--precision", "fp32"])
    assert "is finished (2 epochs)" in capsys.readouterr().out
    assert json.loads(before) == final and final.items() >= done.records[-1].items()


def test_labels_of_a_run_round_trip_through_a_table(done, tmp_path):
    """A corrected copy of the labels, given back as --labels, would be of other images or of other classes."""
    labels, about = np.load(done.folder / "labels.npz"), json.loads((done.folder / "args.json").read_text())
    with open(tmp_path / "cleaned.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for path, given in zip(labels["list_path"][labels["index"]], labels["given"], strict=True):
            rows.writerow([path.decode(), about["data"]["classes"][given]])
    data, again = (dataloader_folder.load(done.tree, table) for table in (None, tmp_path / "cleaned.csv"))
    assert again.class_names == data.class_names
    assert again.train.digest() == data.train.select(labels["index"]).digest()


# ---- On the device and streamed ----


@pytest.mark.parametrize("mode", MODES)
def test_scores_and_accuracies_are_what_torchvision_and_pillow_give(tmp_path, mode):
    """By other means, from the files: a wrong mean, size, crop, label or part divides and tests something else, and
    shows in no number that one could doubt."""
    tree = make_folder(tmp_path / "data", parts=("train", "val", "test"))
    final = Train_folder.main(tiny(tree, tmp_path / "run", "--data_mode", mode, "--num_epochs", "2", "--lr", "0.1"))
    data, folder = dataloader_folder.load(tree), tmp_path / "run"
    paths = {name: [images.path(i) for i in range(len(images))] for name, images in data.lists.items()}
    if mode == "device":
        resized = [Image.open(path).convert("RGB") for path in paths["train"]]
        pixels = []
        for image in resized:
            short = min(image.size)
            image = image.resize([int(16 * side / short) for side in image.size], Image.Resampling.BILINEAR)
            left, top = (round((side - 16) / 2) for side in image.size)
            pixels.append(np.asarray(image.crop((left, top, left + 16, top + 16))) / 255)
        mean_std = np.mean(pixels, axis=(0, 1, 2)), np.std(pixels, axis=(0, 1, 2))
    else:
        mean_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    about = json.loads((folder / "args.json").read_text())["data"]
    np.testing.assert_allclose([about["mean"], about["std"]], mean_std, rtol=1e-6)
    resize = {"device": 16, "stream": 18}[mode]
    assert (about["resize"], about["crop"]) == (resize, 16)

    nets = [PreResNet.ResNet18(4, 4) for _ in range(2)]
    for net, state in zip(nets, last_state(folder)["nets"], strict=True):
        net.load_state_dict(state)
    logits = {
        name: [reference_logits(net, of, resize, 16, *(tuple(map(float, each)) for each in mean_std)) for net in nets]
        for name, of in paths.items()
    }
    for name in ("val", "test"):
        labels = torch.from_numpy(getattr(data, name).labels)
        expected = [100 * (x.argmax(1) == labels).float().mean().item() for x in (sum(logits[name]), *logits[name])]
        found = [final[f"{name}_acc{suffix}"] for suffix in ("", "_net1", "_net2")]
        assert found == pytest.approx(expected, abs=0.01)
    scores = np.load(folder / "scores/epoch_001.npz")
    for k in range(2):
        labels = torch.from_numpy(data.train.labels)
        loss = torch.nn.functional.cross_entropy(logits["train"][k], labels, reduction="none")
        np.testing.assert_allclose(scores[f"raw_loss_net{k + 1}"], loss, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(scores[f"loss_net{k + 1}"], normalise(loss), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_equals_uninterrupted_bit_for_bit(tree, tmp_path, mode):
    """Stopped after warm-up, in the middle and where the learning rate drops: a run that a stop changes cannot be
    reproduced."""
    for name, stops in (("straight", [4]), ("stopped", [1, 2, 4])):
        for epochs in stops:
            flags = ["--data_mode", mode, "--lr_drop", "3", "--num_epochs", str(epochs), "--lambda_u", "5"]
            final = Train_folder.main(tiny(tree, tmp_path / name, *flags))
    assert_the_same(tmp_path / "straight", tmp_path / "stopped")
    assert [record["lr"] for record in read_records(tmp_path / "straight")] == pytest.approx([0.02] * 3 + [0.002])
    result = json.loads((tmp_path / "straight/result.json").read_text())
    assert {**without_times(result), "run_dir": ""} == {**without_times(final), "run_dir": ""}


def assert_the_same(straight: Path, stopped: Path) -> None:
    assert_equal(last_state(straight), last_state(stopped))
    for name in ("acc.txt", "stats.txt"):
        assert (straight / name).read_text() == (stopped / name).read_text()
    [one], [other] = ([*(folder / "scores").glob("*.npz")] for folder in (straight, stopped))
    np.testing.assert_equal(dict(np.load(one)), dict(np.load(other)))
    records = [[without_times(record) for record in read_records(folder)] for folder in (straight, stopped)]
    assert records[0] == records[1]


def test_a_network_with_dropout_continues_bit_for_bit(tree, tmp_path):
    """By a name of torchvision's: its dropout would draw otherwise after a restart."""
    flags = ["--arch", "squeezenet1_1", "--weights", "none", "--width", "64", "--image_size", "32", "--lr", "1e-05"]
    for name, stops in (("straight", [2]), ("stopped", [1, 2])):
        for epochs in stops:
            Train_folder.main(tiny(tree, tmp_path / name, *flags, "--num_epochs", str(epochs)))
    assert_the_same(tmp_path / "straight", tmp_path / "stopped")
    assert last_state(tmp_path / "stopped")["nets"][0]["classifier.1.weight"].shape == (4, 512, 1, 1)


KEPT = [["--keep_images", "no"], ["--workers", "1"], ["--cache_dir", "cache"]]


@pytest.mark.parametrize("keep", [KEPT[0], *(pytest.param(flags, marks=pytest.mark.slow) for flags in KEPT[1:])])
def test_where_streamed_images_are_kept_changes_nothing(tree, tmp_path, monkeypatch, keep):
    """Runs on machines of other memory would train on other pixels."""
    monkeypatch.chdir(tmp_path)
    for name, flags in (("one", []), ("other", keep)):
        Train_folder.main(tiny(tree, tmp_path / name, "--data_mode", "stream", "--num_epochs", "2", *flags))
    assert_the_same(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("mode", MODES)
def test_no_flip(tree, start, monkeypatch, mode):
    """Mirrored digits, or organs, are other ones."""
    calls = note_phases(monkeypatch, Train_folder)
    for flags, expected in (([], True), (["--no_flip", "--fresh"], False)):
        assert start(tree, "--data_mode", mode, "--num_epochs", "1", *flags)[0] == 0
        data = calls[-1]["data"]
        assert (data.flip if mode == "device" else data.pipeline.views.flip) == expected


def test_all_kinds_of_images(tmp_path, start):
    """One grey scan among the photos, or one with a transparent corner, would end the run."""
    tree = make_folder(tmp_path / "data")
    kinds = [
        ("L", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("CMYK", "JPEG"),
        ("I;16", "PNG"),
    ]
    for k, (mode, kind) in enumerate(kinds):
        path = tree / f"c{k % 4}/{k:04}.jpg"
        with Image.open(path) as image:
            image = image.convert("L") if mode == "I;16" else image.convert(mode)
        deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image
        deep.save(path, kind)
    for mode in MODES:
        status, out, error = start(tree, "--data_mode", mode, "--fresh")
        assert status == 0 and "colour images, " in out and "16-bit ones are read as value / 256" in out, error
        assert np.isfinite(read_records(tmp_path / "run")[-1]["loss_x"])


# ---- What is trained ----


@pytest.mark.parametrize("mode", MODES)
def test_what_a_phase_is_given(tree, start, monkeypatch, mode):
    """The flags of a run, and what follows from its images, would not be those that were printed."""
    calls = note_phases(monkeypatch, Train_folder)
    status, _, error = start(tree, "--data_mode", mode, "--num_epochs", "4", "--warm_up", "2", "--lr_drop", "3")
    assert status == 0 and "error" not in error
    assert [call["kind"] for call in calls] == ["warmup"] * 4 + ["train"] * 4
    for i, call in enumerate(calls):
        assert call["lr"] == pytest.approx(0.02 if i < 6 else 0.002)
        assert (call["momentum"], call["nesterov"], call["weight_decay"]) == (0.9, False, 5e-4)
        assert len(call["data"]) == 22
        if call["kind"] == "warmup":
            assert (call["batch_size"], call["conf_penalty"]) == (16, False)
        else:
            expected = {"batch_size": 8, "warm_up": 2, "alpha": 4, "T": 0.5, "num_class": 4, "epoch": i // 2}
            assert call.items() >= expected.items()
            assert (call["unlabeled_loss"], call["lambda_u"]) == (True, 0)
    assert not same(calls[0]["state"], calls[1]["state"])  # two networks that start differently


def test_flags_reach_the_phases(tree, start, monkeypatch):
    """Else somebody tunes for a week what nothing depends on."""
    calls = note_phases(monkeypatch, Train_folder)
    assert start(tree, "--conf_penalty", "on", "--T", "0.7", "--alpha", "2", "--p_threshold", "0.6")[0] == 0
    assert calls[0]["conf_penalty"] and (calls[-1]["T"], calls[-1]["alpha"]) == (0.7, 2)
    assert calls[-1]["division"].threshold == 0.6
    large = ["--image_size", "72", "--batch_size", "4"]  # large images: as WebVision's, unless lambda_u says otherwise
    for flags, expected in (([], (False, 0)), (["--lambda_u", "3"], (True, 3))):
        assert start(tree, *large, *flags, "--fresh", "--num_epochs", "2")[0] == 0
        assert (calls[-1]["unlabeled_loss"], calls[-1]["lambda_u"]) == expected


def test_imagenets_weights_come_with_their_normalisation(tree, start, tmp_path, monkeypatch):
    """Weights of one normalisation, images of another: a network that starts with nonsense."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = tmp_path / "torch/hub/checkpoints" / networks.architecture("squeezenet1_1").imagenet.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    state = networks.build("squeezenet1_1", 1000).state_dict()
    torch.save(state, file)
    calls = note_phases(monkeypatch, Train_folder)
    flags = ["--arch", "squeezenet1_1", "--width", "64", "--image_size", "32", "--num_epochs", "1"]
    status, out, error = start(tree, *flags)
    assert status == 0, error
    assert "weights imagenet (torchvision's)\n" in out and "lr 0.002 (as Clothing1M)\n" in out
    assert "mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (ImageNet's)\n" in out
    for call in calls:
        assert torch.equal(call["state"]["features.0.weight"], state["features.0.weight"])
        assert call["data"].mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert call["weight_decay"] == 1e-3


def test_networks_swap_divisions_and_the_peer_is_fresh(tree, tmp_path, monkeypatch):
    """Exchanged divisions make each net confirm its own errors; a stale peer is another method. Also over a restart."""
    events: list[dict] = []
    loss, train = Train_folder.per_sample_loss, Train_folder.train_epoch

    def spy_loss(net, data, **flags):
        scored = loss(net, data, **flags)
        events.append({"what": "score", "net": snapshot(net), "loss": normalise(scored.loss.numpy())})
        return scored

    def spy_train(net, peer, optimizer, data, division, **flags):
        about = {"what": "train", "net": snapshot(net), "peer": snapshot(peer), "loss": division.loss}
        terms = train(net, peer, optimizer, data, division, **flags)
        events.append({**about, "after": snapshot(net)})
        return terms

    monkeypatch.setattr(Train_folder, "per_sample_loss", spy_loss)
    monkeypatch.setattr(Train_folder, "train_epoch", spy_train)
    for epochs in ("2", "3"):
        Train_folder.main(tiny(tree, tmp_path / "run", "--num_epochs", epochs))
    assert [e["what"] for e in events] == (["score"] * 2 + ["train"] * 2) * 2 + ["score"] * 2
    for begin in (0, 4):
        net2, net1, first, second = events[begin : begin + 4]
        assert same(first["net"], net1["net"]) and same(second["net"], net2["net"])
        assert same(first["peer"], net2["net"]), "net 1's peer is not net 2"
        assert same(second["peer"], first["after"]) and not same(first["after"], first["net"]), "a stale peer"
        assert np.abs(net1["loss"] - net2["loss"]).max() > 1e-3  # the two divisions can be told apart
        for trained, divided in ((first, net2), (second, net1)):
            np.testing.assert_allclose(trained["loss"], divided["loss"], rtol=1e-5, atol=1e-6)


def test_plain_cross_entropy(tree, start, tmp_path):
    """The comparison would divide after all, or end without the losses that its labels are ranked by."""
    status, _, error = start(tree, "--method", "ce")
    assert status == 0, error
    records = read_records(tmp_path / "run")
    assert [record["phase"] for record in records] == ["ce"] * EPOCHS
    assert not any("seconds_gmm" in record for record in records)
    [scores] = (tmp_path / "run/scores").glob("*.npz")
    assert scores.name == f"epoch_{EPOCHS - 1:03d}.npz"
    assert set(np.load(scores)) == {f"{name}_net{k}" for name in ("raw_loss", "prediction") for k in (1, 2)}
    assert Train_folder.folder_for("out", None, "folder", "x", "ce", "", "").name == "folder_x_ce"


@pytest.mark.parametrize(
    ("parts", "flags", "sizes", "chosen"),
    [
        ((), [], (22, 2, None), "the validation images: validation"),
        (("train", "test"), [], (24, None, 24), "the test set: test"),
        (("train", "test"), ["--val_fraction", "0.25"], (18, 6, 24), "the validation images: validation"),
        (("train", "val"), [], (24, 24, None), "the validation images: validation"),
        (("train", "val", "test"), [], (24, 24, 24), "the validation images: validation"),
    ],
)
def test_what_the_best_epoch_is_chosen_on(tmp_path, start, monkeypatch, parts, flags, sizes, chosen):
    """Else the best epoch is chosen on what it is then tested with, or on images that were trained on."""
    note_phases(monkeypatch, Train_folder)
    named = [name for name, size in zip(("val", "test"), sizes[1:], strict=True) if size]
    values = {"val": iter([10.0, 30.0, 20.0]), "test": iter([50.0, 40.0, 60.0])}
    evaluated: list[int] = []

    def accuracy(nets, data, **_):
        name = named[len(evaluated) % len(named)]
        evaluated.append(len(data))
        return [next(values[name]), 0.0, 0.0]

    monkeypatch.setattr(Train_folder, "ensemble_accuracy", accuracy)
    status, out, error = start(make_folder(tmp_path / "data", parts=parts), *flags)
    assert status == 0, error
    assert evaluated == [size for size in sizes[1:] if size] * EPOCHS
    data = json.loads((tmp_path / "run/args.json").read_text())["data"]
    assert tuple(data.get(name) for name in ("train", "val", "test")) == sizes
    assert f"chosen on {chosen} " in out and ("no test part: " in out) == ("test" not in named)
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)["epochs"]
    assert best == ([1, 1] if "val" in named else [2, 2])
    record = read_records(tmp_path / "run")[-1]
    assert ("test_acc" in record, "val_acc" in record) == ("test" in named, "val" in named)
    assert record.get("best_acc") == {"test": 60.0, "val test": 40.0}.get(" ".join(named))


def test_an_imbalance_is_reported(tmp_path, start, monkeypatch):
    """A class of four among hundreds loses half of its right labels, and nobody knows why."""
    note_phases(monkeypatch, Train_folder)
    tree = make_folder(tmp_path / "data", 40, num_class=2, parts=("train", "test"))
    for image in sorted((tree / "train/c1").iterdir())[2:]:
        image.unlink()
    status, out, error = start(tree)
    assert status == 0
    assert "images of a class: 2 (c1) to 20 (c0), 10.0 times\n" in out and error == ""
    next((tree / "train/c1").iterdir()).unlink()
    with pytest.warns(DivideMixWarning, match="the largest class has 20 times as many images as the smallest: "):
        status, out, _ = start(tree, "--fresh")
    assert status == 0 and "images of a class: 1 (c1) to 20 (c0), 20.0 times\n" in out


# ---- The run folder ----


def test_other_images_or_labels_than_the_run_began_with_are_refused(tmp_path, start, monkeypatch):
    """Its rows and divisions would be those of other images. In another place, they are the same."""
    note_phases(monkeypatch, Train_folder)
    tree = make_folder(tmp_path / "data")
    rows = [f"{path.relative_to(tree)},{path.parent.name}\n" for path in sorted(tree.rglob("*.jpg"))]
    (tree / "labels.csv").write_text("path,label\n" + "".join(rows))
    assert start(tree, "--num_epochs", "1")[0] == 0
    moved = tmp_path / "moved"
    tree.rename(moved)
    status, out, _ = start(moved, "--num_epochs", "2")
    assert status == 0 and "with epoch 1 (of 0..1)" in out
    text = (moved / "labels.csv").read_text()
    for changed in (text.replace(",c0", ",c1", 1), text.replace(",c0", ",cat"), text.replace(rows[5], "")):
        (moved / "labels.csv").write_text(changed)
        status, _, error = start(moved)
        assert status == 1 and error.count("\n") == 1
        assert f"the images or labels in {moved} are not those " in error and "--fresh" in error


def test_other_settings_are_refused(tree, start, monkeypatch):
    """A run that goes on with another network, crop or rate half way is a result of no setting."""
    note_phases(monkeypatch, Train_folder)
    assert start(tree, "--num_epochs", "1")[0] == 0
    for flags, said in (
        (["--data_mode", "stream"], "--data_mode was device, now stream"),
        (["--no_flip"], "--no_flip was False, now True"),
        (["--image_size", "24"], "--image_size was 16, now 24"),
        (["--val_fraction", "0.2"], "--val_fraction was 0.1, now 0.2"),
    ):
        status, _, error = start(tree, *flags)
        assert status == 1 and said in error
    assert start(tree, "--keep_images", "no", "--eval_batch_size", "3")[0] == 0


def test_the_mean_of_a_begun_run_stays(tmp_path, start, monkeypatch):
    """Images that are left out, or changed, later would shift what the networks see from one epoch to the next."""
    calls = note_phases(monkeypatch, Train_folder)
    tree = make_folder(tmp_path / "data")
    assert start(tree, "--num_epochs", "1")[0] == 0
    for image in (tree / "c0").iterdir():
        Image.new("RGB", (20, 20)).save(image)
    assert start(tree)[0] == 0
    assert torch.equal(calls[0]["data"].mean, calls[-1]["data"].mean)
    assert not torch.equal(calls[0]["data"].padded, calls[-1]["data"].padded)


# ---- A data folder with faults ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "html", "link"])
def test_a_bad_image_is_refused_with_file_and_line(tmp_path, start, how, mode):
    """A grey square in its place would train and be scored without anyone knowing."""
    tree = make_folder(tmp_path / "data")
    rows = [f"{path.relative_to(tree)},{path.parent.name}\n" for path in sorted(tree.rglob("*.jpg"))]
    (tree / "labels.csv").write_text("path,label\n" + "".join(rows))
    image = tree / "c1/0005.jpg"
    content, line = image.read_bytes(), 2 + rows.index("c1/0005.jpg,c1\n")
    image.unlink()
    if how == "link":
        (tmp_path / "outside.jpg").write_bytes(content)
        image.symlink_to(tmp_path / "outside.jpg")
    elif how != "missing":
        image.write_bytes({"truncated": content[:-60], "empty": b"", "html": b"<html>404</html>"}[how])
    status, _, error = start(tree, "--data_mode", mode)
    said = {"html": "not an image", "link": "a symbolic link that leads out of the data folder"}.get(how, how)
    assert status == 1 and error.count("\n") == 1 and error.startswith(f"error: {image}: ")
    assert said in error and f"({tree / 'labels.csv'}, line {line})" in error and "--skip_bad_images" in error
    assert mode == "stream" or not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", MODES)
def test_skip_bad_images_leaves_them_out_and_stays_with_it(tmp_path, start, mode):
    """One bad file would end a run of days; or the rows of a continued run be those of other images."""
    tree = make_folder(tmp_path / "data", parts=("train", "test"))
    flags = ["--data_mode", mode, "--cache_dir", str(tmp_path / "cache")][: None if mode == "stream" else 2]
    assert start(tree, *flags, "--num_epochs", "2")[0] == 0
    for name in ("train/c0/0000.jpg", "train/c3/0007.jpg", "test/c1/0001.jpg"):
        (tree / name).write_bytes(b"")
    status, out, error = start(tree, *flags, "--skip_bad_images")
    assert status == 0, error
    assert "train: 2 of 24 images left out (0 missing, 2 unreadable)\n" in out and "test: 1 of 24 images" in out
    labels = np.load(tmp_path / "run/labels.npz")
    used = {*labels["list_path"][labels["index"]].tolist()}
    assert len(used) == 22 and not {b"train/c0/0000.jpg", b"train/c3/0007.jpg"} & used
    record = read_records(tmp_path / "run")[-1]
    assert record["labeled_net1"] + record["unlabeled_net1"] == 22
    status, out, _ = start(tree, *flags, "--num_epochs", "4")  # asked for once is enough
    assert status == 0 and "train: 2 of 24 images left out" in out and len(read_records(tmp_path / "run")) == 4


@pytest.mark.parametrize("depth", [[], ["full"]])
def test_check_data(tmp_path, start, monkeypatch, depth):
    """Hours of training pass before it shows that an image is missing; without networks, weights or a device."""

    def refuse(*_, **__):
        raise AssertionError("--check_data asked for more than the data folder")

    for owner, name in ((networks, "pair"), (Train_folder, "Run"), (Train_folder.options, "machine")):
        monkeypatch.setattr(owner, name, refuse)
    tree = make_folder(tmp_path / "data", parts=("train", "test"))
    status, out, error = start(tree, "--check_data", *depth)
    assert status == 0 and error == "" and "train: 24 of 24 images exist, 0 of them unreadable\n" in out
    assert "images of each class: 0: 6, 1: 6, 2: 6, 3: 6" in out and "the data are complete" in out
    (tree / "train/c0/0000.jpg").write_bytes(b"")
    status, out, error = start(tree, "--check_data", *depth)
    assert status == 1 and error.startswith("error: training cannot run on these data") and "1 of them unread" in out
    assert start(tree, "--check_data", "--skip_bad_images")[0] == 0
    shutil.rmtree(tree / "train")
    status, out, error = start(tree, "--check_data")
    assert status == 1 and error.count("\n") == 1 and f"{tree}: all images are of one class, 'test'" in out


def test_images_that_do_not_fit_in_memory_name_the_flag(tree, start, monkeypatch):
    """A card that another job fills: else the run ends in a traceback of the allocator's."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Train_folder, "DeviceImages", full)
    status, _, error = start(tree)
    assert (status, error) == (1, "error: cpu: no memory for 22 images; try --data_mode stream\n")


@pytest.mark.parametrize("flag", ["--data_path", "--labels"])
def test_faults_of_a_table_are_refused_with_file_and_line(tree, start, tmp_path, flag):
    """In a process, as a user meets them; all of them are in test_filelist.py."""
    path = tmp_path / "mine.csv"
    path.write_text("path,label\nc0/0000.jpg,c0\n../x.jpg,c1\n")
    status, _, error = start(*([path] if flag == "--data_path" else [tree, "--labels", str(path)]))
    assert status == 1 and error.startswith(f"error: {path}, line 3: '../x.jpg' has a part '..'")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_odd_data_sets(tmp_path, start, recwarn):
    """A first try on a few images of one's own would crash, and look like a fault of the data."""
    tree = make_folder(tmp_path / "few", 5, num_class=2)
    status, _, error = start(tree)
    assert status == 0 and "error" not in error
    assert np.isfinite([read_records(tmp_path / "run")[-1][name] for name in ("loss_x", "penalty")]).all()
    status, _, error = start(tree, "--val_fraction", "0", "--fresh")
    assert status == 1 and error.startswith("error: no image is left to select the best epoch by")
    status, _, error = start(make_folder(tmp_path / "two", 2, num_class=2), "--fresh")
    assert status == 1 and "error: no image is left to select the best epoch by" in error  # one of each class
    assert len(read_records(tmp_path / "run")) == EPOCHS  # the first run is as it was


def test_an_empty_labeled_set_keeps_the_division_before(tree, tmp_path, monkeypatch):
    """An epoch on no labeled sample would be no epoch."""
    seen = []
    train = Train_folder.train_epoch

    def spy_train(net, peer, optimizer, data, division, **flags):
        seen.append(division)
        return train(net, peer, optimizer, data, division, **flags)

    class Choosy(Train_folder.CoDivide):
        calls = 0

        def __call__(self, losses, truly_clean, random_state, name):
            self.calls += 1
            self.threshold = 1.0 if (name, self.calls) == ("net 2", 2) else 0.5
            return super().__call__(losses, truly_clean, random_state, name)

    monkeypatch.setattr(Train_folder, "train_epoch", spy_train)
    monkeypatch.setattr(Train_folder, "CoDivide", Choosy)
    with pytest.warns(DivideMixWarning, match="net 2 finds no sample clean with p > 1: its division before is kept"):
        Train_folder.main(tiny(tree, tmp_path / "run"))
    assert seen[2] is seen[0] and seen[3] is not seen[1]


# ---- Several ranks ----


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks(tmp_path, mode):
    """Ranks that read, hold out or draw otherwise than each other would train apart, or wait for ever."""
    tree = make_folder(tmp_path / "data")
    flags = {name: tiny(tree, tmp_path / name, "--data_mode", mode) for name in ("one", "whole", "parts")}
    Train_folder.main([*flags["one"], "--num_epochs", "1"])
    for name, epochs in (("whole", "3"), ("parts", "1"), ("parts", "3")):
        result = torchrun("Train_folder.py", *flags[name], "--num_epochs", epochs)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("run folder ") == 1
    assert_the_same(tmp_path / "whole", tmp_path / "parts")
    assert same_arrays(np.load(tmp_path / "one/labels.npz"), np.load(tmp_path / "whole/labels.npz"))


def same_arrays(one, other) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


# ---- What it is for ----


@pytest.mark.slow
def test_wrong_labels_are_found(tmp_path):
    """A real folder: scikit-learn's digits, of which 20 % lie in another digit's folder. The one test that says whether
    the whole of it does what it is for: 90 % of the wrong labels are found, and 90 % of those called wrong are."""
    tree, truth = make_digits(tmp_path / "digits", 0.2)
    flags = ["--width", "16", "--no_flip", "--device", "cpu", "--run_dir", str(tmp_path / "run")]
    Train_folder.main(["--data_path", str(tree), *flags])
    with open(tmp_path / "run/label_issues.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = np.array([truth[int(Path(row["path"]).stem)] != int(row["given_label"]) for row in rows])
    flagged = np.array([row["is_label_issue"] == "True" for row in rows])
    assert 250 < wrong.sum() < 400
    assert (flagged & wrong).sum() >= 0.9 * wrong.sum()
    assert (flagged & wrong).sum() >= 0.9 * flagged.sum()
