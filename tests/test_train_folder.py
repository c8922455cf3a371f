"""Train_folder.py end to end, tiny: own images in folders and tables, on the device and streamed, the files of a run,
restarts, and the labels that it finds wrong. Which images are what is in test_dataloader_folder.py."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.nets import reference_logits
from helpers.runs import assert_equal, last_state, read_records, without_times
from helpers.scripts import end_of, run_script, torchrun
from helpers.trees import make_digits, make_folder
from PIL import ExifTags, Image

import dataloader_folder
import PreResNet
import Train_folder
from dividemix.codivide import normalise
from dividemix.report import report

EPOCHS = 3  # one of warm-up
MODES = ["device", "stream"]
NET = ["--arch", "preresnet18", "--width", "4", "--image_size", "16", "--batch_size", "8"]
MACHINE = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]


def tiny(tree: Path, out: Path, *flags: str) -> list[str]:
    """Flags of a run of a second. Later flags win."""
    size = [*NET, "--warm_up", "1", "--num_epochs", str(EPOCHS), *MACHINE]
    return ["--data_path", str(tree), *size, "--run_dir", str(out), *flags]


def starter(tmp_path: Path, monkeypatch, capsys):
    """Runs the command line in-process, as a user would. -> (exit status, stdout, stderr)"""

    def run(tree: Path, *flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = end_of(Train_folder, tiny(tree, tmp_path / "run", *flags), monkeypatch)
        return status, *capsys.readouterr()

    return run


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """24 images of 4 classes; 2 of them are held out."""
    return make_folder(tmp_path_factory.mktemp("own") / "images")


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    return starter(tmp_path, monkeypatch, capsys)


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
    expected = [f"train: 40 images, {done.tree}", "36 images to train on, 4 classes: c0, c1, c2, c3"]
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
    assert torch.load(done.folder / "best.pt", weights_only=True)["epochs"] == [1, 1]  # epoch 0 is of warm-up
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
    keys |= {"epoch", "phase", "lr", "val_acc", "best_val_acc", "loss_x", "penalty", "loss_u"}
    seconds = {"warmup1", "warmup2"}, {"loss", "gmm", "train1", "train2"}
    for record, phases in zip(done.records, seconds, strict=True):
        assert record.keys() == keys | {f"seconds_{name}" for name in phases | {"val", "save"}}
    assert last["best_val_acc"] == max(record["val_acc"] for record in done.records)
    assert last["labeled_net1"] + last["unlabeled_net1"] == 36


def test_the_same_command_says_that_it_is_finished(done, monkeypatch, capsys):
    """Else a second start trains on past the end, or refuses what it chose itself."""
    monkeypatch.chdir(done.tree.parent)
    before = (done.folder / "result.json").read_bytes()
    final = Train_folder.main([*done.flags, "--precision", "fp32"])
    assert "is finished (2 epochs)" in capsys.readouterr().out
    assert json.loads(before) == final and final.items() >= done.records[-1].items()


def test_corrected_labels_are_taken_by_the_next_training(done, tmp_path, monkeypatch):
    """A corrected copy of the labels, given back as --labels, would be of other images or of other classes."""
    monkeypatch.chdir(done.tree.parent)
    report.main([str(done.folder), "--export_clean", str(tmp_path / "clean")])
    before, after = (classes_of(done.tree, table) for table in (None, tmp_path / "clean/labels.csv"))
    with open(done.folder / "label_issues.csv", newline="") as file:
        issues = [row for row in csv.DictReader(file) if row["is_label_issue"] == "True"]
    assert after == before | {row["path"]: row["suggested_class"] for row in issues}
    assert len(before) == 40


def classes_of(tree: Path, table: Path | None) -> dict[str, str]:
    """Path -> class of the training images."""
    data = dataloader_folder.load(tree, table)
    names = [name.decode() for name in data.train.names()]
    return dict(zip(names, (data.class_names[label] for label in data.train.labels), strict=True))


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

    def logits_of(name, states):
        for state in states:
            net = PreResNet.ResNet18(4, 4)
            net.load_state_dict(state)
            yield reference_logits(net, paths[name], resize, 16, *(tuple(map(float, each)) for each in mean_std))

    last = last_state(folder)["nets"]
    before = torch.load(folder / "epoch-000.pt", weights_only=True)["nets"]  # which epoch 1 was divided by
    for name in ("val", "test"):
        labels = torch.from_numpy(data.lists[name].labels)
        both = [*logits_of(name, last)]
        expected = [100 * (x.argmax(1) == labels).float().mean().item() for x in (sum(both), *both)]
        found = [final[f"{name}_acc{suffix}"] for suffix in ("", "_net1", "_net2")]
        assert found == pytest.approx(expected, abs=0.01)
    scores = np.load(folder / "scores/epoch_001.npz")
    for k, logits in enumerate(logits_of("train", before), start=1):
        labels = torch.from_numpy(data.train.labels)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        np.testing.assert_allclose(scores[f"raw_loss_net{k}"], loss, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(scores[f"loss_net{k}"], normalise(loss), rtol=1e-2, atol=2e-3)


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
        assert status == 0 and "colour images, " in out, error
        [line] = re.findall(r"images read: .*", out)  # once, not in each pass
        assert line.startswith("images read: 24, of which 1 of 16-bit grey"), line
        assert np.isfinite(read_records(tmp_path / "run")[-1]["loss_x"])


@pytest.mark.parametrize("flags", [["device"], ["stream"], ["stream", "--cache_dir", "cache"]], ids=" ".join)
def test_photos_on_their_side_and_drawings_on_nothing_are_trained_as_shown(tmp_path, start, monkeypatch, flags):
    """The networks would learn from photos that lie on their side and from drawings that are black all over; and the
    user would not hear how many images were changed, or would hear it in each pass."""
    monkeypatch.chdir(tmp_path)
    shown, stored = tmp_path / "shown", tmp_path / "stored"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for k, path in enumerate(sorted(make_folder(tmp_path / "data").rglob("*.jpg"))):
        name = path.relative_to(tmp_path / "data").with_suffix(".png")
        (shown / name).parent.mkdir(parents=True, exist_ok=True)
        (stored / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        if k % 4 == 1:  # a black drawing on a transparent ground
            mask = image.convert("L")
            image = Image.new("RGB", image.size, "white")
            image.paste("black", mask=mask)
            drawing = Image.new("RGBA", image.size)
            drawing.putalpha(mask)
            drawing.save(stored / name)
        else:
            turned = image.transpose(Image.Transpose.ROTATE_90) if k % 4 == 0 else image
            turned.save(stored / name, exif=exif if k % 4 == 0 else None)
        image.save(shown / name)
    for tree, line in ((shown, []), (stored, ["images read: 24, of which 6 turned", "6 with transparency"])):
        for _ in range(1 + ("cache" in flags)):  # from a cache that is there already, too
            status, out, error = start(tree, "--data_mode", *flags, "--fresh", "--run_dir", f"run_{tree.name}")
            assert status == 0, error
            assert out.count("images read: ") == bool(line) and all(part in out for part in line), out
    assert_the_same(tmp_path / "run_shown", tmp_path / "run_stored")


# ---- Several ranks ----


@pytest.mark.slow
def test_two_ranks_read_small_images_in_each_pass(tmp_path):
    """Without a flag for it they would train on all rows each; ranks that hold out other images would train apart."""
    tree = make_folder(tmp_path / "data")
    flags = {name: [*tiny(tree, tmp_path / name), "--num_epochs", "2"] for name in ("one", "two")}
    Train_folder.main(flags["one"])
    result = torchrun("Train_folder.py", *flags["two"])
    assert result.returncode == 0, result.stderr
    modes = [json.loads((tmp_path / name / "args.json").read_text())["args"]["data_mode"] for name in ("one", "two")]
    assert modes == ["device", "stream"] and result.stdout.count("run folder ") == 1
    assert [record["phase"] for record in read_records(tmp_path / "two")] == ["warmup", "train"]
    np.testing.assert_equal(*(dict(np.load(tmp_path / name / "labels.npz")) for name in flags))


# ---- What it is for ----


@pytest.mark.slow
def test_wrong_labels_are_found(tmp_path, monkeypatch):
    """A real folder: scikit-learn's digits, of which 20 % lie in another digit's folder. The one test that says whether
    the whole of it does what it is for: 90 % of the wrong labels are found, and 90 % of those called wrong are."""
    monkeypatch.undo()  # the report, which writes the list
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
