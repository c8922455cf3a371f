"""Train_folder.py: what it chooses from the data, its flags, images of all kinds, and whether it finds wrong labels.
What it shares with the other scripts is in test_scripts.py, which images are what in test_dataloader_folder.py."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import assert_same_run, last_state, read_records
from helpers.scripts import SMALL_NET, end_of, note_phases
from helpers.trees import make_digits, make_folder
from PIL import ExifTags, Image

import dataloader_folder
import Train_folder
from dividemix import DivideMixWarning, blind, networks

EPOCHS = 3  # one of warm-up

pytestmark = pytest.mark.usefixtures("no_figures")


def tiny(tree: Path, out: Path, *flags: str) -> list[str]:
    """Flags of a run of a second. Later flags win."""
    size = [*SMALL_NET, "--workers", "0", "--warm_up", "1", "--num_epochs", str(EPOCHS)]
    return ["--data_path", str(tree), *size, "--run_dir", str(out), *flags]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """24 images of 4 classes; 2 of them are held out."""
    return make_folder(tmp_path_factory.mktemp("own") / "images")


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process, as a user would. -> (exit status, stdout, stderr)"""

    def run(tree: Path, *flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = end_of(Train_folder, tiny(tree, tmp_path / "run", *flags), monkeypatch)
        return status, *capsys.readouterr()

    return run


# ---- What it chooses, and its flags ----


def test_with_every_default_it_says_what_was_chosen_and_what_accuracy_means(tmp_path, monkeypatch, capsys):
    """Else the user learns neither what was trained, nor that 81 % may be all that wrong labels allow."""
    make_folder(tmp_path / "my images", 40, sides=(16, 40))
    monkeypatch.chdir(tmp_path)
    small = ["--width", "4", "--num_epochs", "2", "--warm_up", "1", "--device", "cpu", "--precision", "fp32"]
    Train_folder.main(["--data_path", "my images", *small])
    out = capsys.readouterr().out
    side = dataloader_folder.survey(dataloader_folder.load("my images").train).side
    lines = [
        f"train: 40 images, {tmp_path / 'my images'}",
        "36 images to train on, 4 classes: c0, c1, c2, c3",
        "no test split: ",
    ]
    lines += ["images of a class: 9 (c0) to 9 (c0), 1.0 times", "4 training images held out ", "warm_up 1 (given)"]
    lines += ["arch preresnet18 (", f"image_size 32 (the median short side is {side})", "batch_size 8 (for 36 images)"]
    lines += [
        "data_mode device (0 MB, ",
        "flip on (",
        "mean ",
        "best epoch 1, ",
        "run folder checkpoint/folder_my images",
    ]
    for beginning in lines:
        assert f"\n{beginning}" in f"\n{out}", f"{beginning!r} in {out}"
    about = json.loads(Path("checkpoint/folder_my images/args.json").read_text())
    chosen = {"arch": "preresnet18", "num_class": 4, "image_size": 32, "batch_size": 8, "lr": 0.02}
    assert about["args"].items() >= (chosen | {"data_mode": "device"}).items()
    assert None not in [about["args"][name] for name in ("alpha", "lr_drop", "p_threshold", "eval_batch_size")]
    assert [about["data"][name] for name in ("train", "val", "resize", "crop")] == [36, 4, 32, 32]


@pytest.mark.parametrize("mode", ["device", "stream"])
def test_no_flip(tree, start, monkeypatch, mode):
    """Mirrored digits, or organs, are other ones."""
    calls = note_phases(monkeypatch, Train_folder)
    for flags, expected in (([], True), (["--no_flip", "--fresh"], False)):
        assert start(tree, "--data_mode", mode, "--num_epochs", "1", *flags)[0] == 0
        data = calls[-1]["data"]
        assert (data.flip if mode == "device" else data.pipeline.views.flip) == expected


def test_the_unlabeled_loss_and_the_penalty(tree, tmp_path, start, monkeypatch):
    """Large images have no unlabeled loss, as WebVision's, unless --lambda_u asks for one: else somebody tunes for a
    week what nothing depends on; or a loss is trained by and never seen."""
    calls = note_phases(monkeypatch, Train_folder)
    for flags, expected in (
        (["--lambda_u", "5", "--conf_penalty", "on"], (True, 5, True)),
        (["--image_size", "72", "--batch_size", "4"], (False, 0, False)),
        (["--image_size", "72", "--batch_size", "4", "--lambda_u", "3"], (True, 3, False)),
    ):
        assert start(tree, *flags, "--fresh", "--num_epochs", "2")[0] == 0
        mixmatch, (warmup, train) = calls[-1]["mixmatch"], read_records(tmp_path / "run")
        assert (mixmatch.unlabeled_loss, mixmatch.lambda_u, mixmatch.conf_penalty) == expected
        assert ("loss_u" in warmup, "loss_u" in train) == (mixmatch.unlabeled_loss,) * 2


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
    assert status == 0 and "weights imagenet (" in out and "mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in out, error
    for call in calls:
        assert torch.equal(call["state"]["features.0.weight"], state["features.0.weight"])
        assert call["data"].mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert call["weight_decay"] == 1e-3


def test_plain_cross_entropy(tree, start, tmp_path):
    """The comparison would divide after all, or end without the losses that its labels are ranked by."""
    status, _, error = start(tree, "--method", "ce", "--save_scores")
    assert status == 0, error
    assert [record["phase"] for record in read_records(tmp_path / "run")] == ["ce"] * EPOCHS
    assert not (tmp_path / "run" / "scores").exists()
    scores = np.load(tmp_path / "run" / "label_scores.npz")
    assert len(scores["loss_net1"]) == len(scores["loss_net2"]) == 24 and "p_clean_net1" not in scores


@pytest.mark.parametrize(
    ("splits", "flags", "sizes"),
    [
        ((), [], (22, 2, None)),
        (("train", "test"), [], (24, None, 24)),
        (("train", "test"), ["--val_fraction", "0.25"], (18, 6, 24)),
        (("train", "val", "test"), [], (24, 24, 24)),
    ],
)
def test_what_the_best_epoch_is_chosen_on(tmp_path, start, monkeypatch, splits, flags, sizes):
    """Else the best epoch is chosen on what it is then tested with, or on images that were trained on."""
    note_phases(monkeypatch, Train_folder)
    names = [name for name, size in zip(("val", "test"), sizes[1:], strict=True) if size]
    values = {"val": iter([10.0, 30.0, 20.0]), "test": iter([50.0, 40.0, 60.0])}
    evaluated: list[dict[str, int]] = []

    def accuracy(nets, sets, phase):
        evaluated.append({name: len(data) for name, data in sets.items()})
        record = {f"{name}_acc": next(values[name]) for name in sets}
        return record | {f"{name}_acc_net{k}": 0.0 for name in sets for k in (1, 2)}

    monkeypatch.setattr(Train_folder, "test", accuracy)
    status, out, error = start(make_folder(tmp_path / "data", splits=splits), *flags)
    assert status == 0, error
    assert evaluated == [dict(zip(names, filter(None, sizes[1:]), strict=True))] * EPOCHS
    data = json.loads((tmp_path / "run/args.json").read_text())["data"]
    assert tuple(data.get(name) for name in ("train", "val", "test")) == sizes
    chosen_on = "the validation images: validation" if "val" in names else "the test set: test"
    assert f"chosen on {chosen_on} " in out and ("no test split: " in out) == ("test" not in names)
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)["epochs"]
    assert best == ([1, 1] if "val" in names else [2, 2])
    assert read_records(tmp_path / "run")[-1].get("best_acc") == {"test": 60.0, "val test": 40.0}.get(" ".join(names))


def test_nothing_held_out(tree, tmp_path, start):
    """A tenth of the labels would never be checked; or a best epoch be claimed that nothing was measured for. A set
    with one image of each class, too, has nothing to hold out."""
    status, out, error = start(tree, "--val_fraction", "0")
    assert status == 0 and "nothing is held out" in out and f"epoch {EPOCHS - 1}, the last" in out, error
    assert torch.load(tmp_path / "run/best.pt", weights_only=True)["epochs"] == [EPOCHS - 1] * 2
    assert not [name for record in read_records(tmp_path / "run") for name in record if "acc" in name]
    assert len(np.load(tmp_path / "run/label_scores.npz")["index"]) == 24
    assert (tmp_path / "run/acc.txt").read_text() == ""
    status, out, error = start(make_folder(tmp_path / "two", 2, num_class=2), "--fresh", "--num_epochs", "1")
    assert status == 0 and "nothing is held out" in out, error


def test_two_tables_of_one_folder_get_two_runs(tree, tmp_path):
    """Else the second table is refused, or continues the run of the first."""
    lists = dataloader_folder.load(tree).train
    rows = [f"{lists.name(i)},c{lists.labels[i]}\n" for i in range(len(lists))]
    (tmp_path / "images").symlink_to(tree)
    for name in ("first", "second"):
        (tmp_path / f"{name}.csv").write_text("path,label\n" + "".join(rows))
    names = {dataloader_folder.load(tree, tmp_path / f"{name}.csv").name for name in ("first", "second")}
    assert names == {f"{tree.name}_first", f"{tree.name}_second"}


# ---- Stopped and continued ----


def test_the_mean_and_the_classes_of_a_begun_run_stay(tmp_path, start, monkeypatch):
    """Images that change later would shift what the networks see; a class of another name is another experiment."""
    calls = note_phases(monkeypatch, Train_folder)
    tree = make_folder(tmp_path / "data")
    assert start(tree, "--num_epochs", "1")[0] == 0
    for image in (tree / "c0").iterdir():
        Image.new("RGB", (20, 20)).save(image)
    assert start(tree)[0] == 0
    assert torch.equal(calls[0]["data"].mean, calls[-1]["data"].mean)
    assert not torch.equal(calls[0]["data"].padded, calls[-1]["data"].padded)
    rows = [f"{image.relative_to(tree)},{image.parent.name}\n" for image in sorted(tree.rglob("*.jpg"))]
    (tree / "labels.csv").write_text("path,label\n" + "".join(rows).replace(",c0", ",b0"))
    status, _, error = start(tree, "--num_epochs", "9")
    assert status == 1 and error.count("\n") == 1 and str(tree) in error and "--fresh" in error


# ---- Images of all kinds, and faults ----

CACHED = pytest.param(["stream", "--cache_dir", "cache"], marks=pytest.mark.slow)


@pytest.mark.parametrize("flags", [["device"], ["stream"], CACHED], ids=["device", "stream", "cached"])
def test_photos_on_their_side_and_drawings_on_nothing_are_trained_as_shown(tmp_path, start, monkeypatch, flags):
    """The networks would learn from photos on their side and from drawings that are black all over, unsaid."""
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for k, path in enumerate(sorted(make_folder(tmp_path / "data").rglob("*.jpg"))):
        shown, stored = (tmp_path / kind / path.relative_to(tmp_path / "data") for kind in ("shown", "stored"))
        shown.parent.mkdir(parents=True, exist_ok=True)
        stored.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        if k % 4 == 1:  # a black drawing on a transparent ground
            drawing, mask = Image.new("RGBA", image.size), image.convert("L")
            drawing.putalpha(mask)
            drawing.save(stored, "PNG")
            image = Image.new("RGB", image.size, "white")
            image.paste("black", mask=mask)
        elif k % 4 == 0:
            image.transpose(Image.Transpose.ROTATE_90).save(stored, "PNG", exif=exif)
        else:
            image.save(stored, "PNG")
        image.save(shown, "PNG")
    for tree, changes in (("shown", []), ("stored", ["images read: 24, of which 6 turned", "6 with transparency"])):
        for _ in range(1 + ("cache" in flags)):  # from a cache that is there already, too
            two_epochs = ["--num_epochs", "2", "--fresh", "--run_dir", f"run_{tree}"]
            status, out, error = start(tmp_path / tree, "--data_mode", *flags, *two_epochs)
            assert status == 0, error
            assert out.count("images read: ") == bool(changes) and all(text in out for text in changes), out
    assert_same_run(tmp_path / "run_shown", tmp_path / "run_stored")


def test_images_that_do_not_fit_in_memory_name_the_flag(tree, start, monkeypatch):
    """A card that another job fills: else the run ends in a traceback of the allocator's."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Train_folder, "DeviceImages", full)
    status, _, error = start(tree)
    assert status == 1 and error.count("\n") == 1
    assert error.startswith("error: cpu: ") and " 22 images; try --data_mode stream" in error


def test_few_and_uneven_images_and_a_faulty_table(tmp_path, start):
    """A first try on a few images would crash and look like a fault of the data, or a real fault not be named."""
    tree = make_folder(tmp_path / "few", 40, num_class=2)
    for image in sorted((tree / "c0").iterdir())[1:]:
        image.unlink()
    with pytest.warns(DivideMixWarning, match="18 times as many images"):  # a rare class loses its right labels
        status, out, error = start(tree, "--batch_size", "64")  # less than a batch
    assert status == 0 and "error" not in error and "images of a class: 1 (c0) to 18 (c1), 18.0 times\n" in out
    assert np.isfinite([read_records(tmp_path / "run")[-1][name] for name in ("loss_x", "penalty")]).all()
    table = tmp_path / "mine.csv"
    table.write_text("path,label\nc0/0000.jpg,c0\n../x.jpg,c1\n")
    for flags, expected in (
        ((tree, "--labels", str(table)), f"error: {tree.parent}/x.jpg: missing ({table}, line 3)"),
    ):
        status, _, error = start(*flags, "--fresh")
        assert status == 1 and error.count("\n") == 1 and expected in error
    assert len(read_records(tmp_path / "run")) == EPOCHS  # the first run is as it was


# ---- What it is for ----


@pytest.mark.slow
def test_wrong_labels_are_found(tmp_path, monkeypatch):
    """Whether the whole of it does what it is for: scikit-learn's digits, of which 20 % lie in another digit's folder.
    90 % of the wrong labels are found, and 90 % of those called wrong are."""
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


# ---- Settings chosen while it trains ----


@pytest.mark.parametrize("flags", [["--data_mode", "device"], ["--data_mode", "stream", "--keep_images", "no"]])
def test_an_image_under_two_labels_comes_first(tmp_path, start, monkeypatch, flags):
    """It is the one label error that is certain, and the networks may well have memorised both labels."""
    monkeypatch.undo()  # the report, which writes the list
    monkeypatch.setattr("dividemix.report.figures.draw_all", lambda *_: {})
    tree = make_folder(tmp_path / "images", 40)
    first = sorted((tree / "c0").iterdir())[0]
    for name in ("c1/copy.bmp", "c0/copy.bmp"):
        with Image.open(first) as image:
            image.save(tree / name)
    status, out, error = start(tree, *flags)
    assert status == 0 and "under different labels: 1;" in out and "under different labels: 1 (" in out, error
    with open(tmp_path / "run" / "label_issues.csv") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    paths = f"c0/{first.name}", "c0/copy.bmp", "c1/copy.bmp"
    assert {path for path, row in rows.items() if row["duplicate_of"]} == {*paths}
    assert {rows[path]["duplicate_of"] for path in paths} == {min(paths)}
    wrong = rows["c1/copy.bmp"]
    assert (wrong["is_label_issue"], wrong["rank"], wrong["suggested_class"]) == ("True", "1", "c0")
    assert float(wrong["label_quality"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"the same image as {min(paths)}" in page and "are there under different labels: 1" in page
    (tmp_path / "run" / "label_issues.csv").unlink()
    assert start(tree, *flags)[0] == 0  # nothing is read again
    assert f",{min(paths)}," in (tmp_path / "run" / "label_issues.csv").read_text()


@pytest.mark.parametrize(("flags", "lambda_u"), [((), 50), (("--image_size", "72", "--lambda_u", "3"), 3)])
def test_the_blind_recipe_is_trained_by(tree, start, tmp_path, monkeypatch, flags, lambda_u):
    """Else the log tells of a choice that nothing was trained with: large images have no unlabeled loss unless the
    weight may become one, and a window that comes later has no losses to average."""
    monkeypatch.setattr(blind, "estimate", lambda *_: blind.Estimate(0.85, 0.12))
    calls = note_phases(monkeypatch, Train_folder)
    status, out, _ = start(tree, "--recipe", "blind", "--batch_size", "4", *flags)
    assert status == 0 and sum(line.startswith("blind: ") for line in out.splitlines()) == 1
    trained = [call for call in calls if call["kind"] == "train"]
    assert {(call["mixmatch"].lambda_u, call["mixmatch"].unlabeled_loss) for call in trained} == {(lambda_u, True)}
    assert [call["division"].threshold for call in trained] == [0.5] * 2 + [0.6] * 2
    _, first, second = read_records(tmp_path / "run")
    assert first["loss_window"] == 1 and second["loss_window"] == 5 and second["noise_rate_estimate"] == 0.85
    assert [len(history) for history in last_state(tmp_path / "run")["histories"]] == [2, 2]
    config = last_state(tmp_path / "run")["config"]
    assert (config["recipe"], config["division"]) == ("blind", "per_class")
