"""Train_folder.py: what it chooses from the data, flags of its own, images of all kinds, and whether it finds wrong
labels. What it shares with the other scripts is in test_scripts.py, which images are what in
test_dataloader_folder.py."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import assert_same_run, last_state, read_records
from helpers.scripts import SMALL_NET, end_of, note_phases, torchrun
from helpers.trees import make_digits, make_folder
from PIL import ExifTags, Image

import dataloader_folder
import Train_folder
from dividemix import DivideMixWarning, blind, networks
from dividemix.report import report

EPOCHS = 3  # one of warm-up
MODES = ["device", "stream"]
ON_CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]

pytestmark = pytest.mark.usefixtures("no_figures")


def tiny(tree: Path, out: Path, *flags: str) -> list[str]:
    """Flags of a run of a second. Later flags win."""
    size = [*SMALL_NET, *ON_CPU, "--warm_up", "1", "--num_epochs", str(EPOCHS)]
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


# ---- A run with every default that can be afforded ----


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run on a folder without other parts."""
    root = tmp_path_factory.mktemp("done")
    tree = make_folder(root / "my images", 40, sides=(16, 40))
    flags = ["--width", "4", "--num_epochs", "2", "--warm_up", "1", "--device", "cpu", "--precision", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(report, "draw", lambda *_: [])
        patch.setattr("builtins.print", lambda *lines, **_: out.extend(map(str, lines)))
        out: list[str] = []
        Train_folder.main(["--data_path", "my images", *flags])
    folder = root / "checkpoint/folder_my images"
    return SimpleNamespace(folder=folder, tree=tree, records=read_records(folder), out=out)


def test_output_says_what_was_chosen_and_what_accuracy_means(done):
    """Else the user learns neither what was trained, nor that 81 % may be all that wrong labels allow."""
    side = dataloader_folder.survey(dataloader_folder.load(done.tree).train).side
    expected = [f"train: 40 images, {done.tree}", "36 images to train on, 4 classes: c0, c1, c2, c3"]
    expected += ["images of a class: 9 (c0) to 9 (c0), 1.0 times", "4 training images held out ", "no test split: "]
    expected += ["arch preresnet18 (", f"image_size 32 (the median short side is {side})", "warm_up 1 (given)"]
    expected += ["num_epochs 2 (given)", "batch_size 8 (for 36 images)", "lambda_u 0 (", "data_mode device (0 MB, "]
    expected += ["val_fraction 0.1 (", "flip on (", "mean ", "best epoch 1, "]
    expected += ["run folder checkpoint/folder_my images"]
    for beginning in expected:
        assert any(line.startswith(beginning) for line in done.out), f"{beginning!r} in {done.out}"
    about = json.loads((done.folder / "args.json").read_text())
    chosen = {"arch": "preresnet18", "num_class": 4, "image_size": 32, "batch_size": 8, "lr": 0.02}
    assert about["args"].items() >= (chosen | {"data_mode": "device"}).items()
    assert None not in [about["args"][name] for name in ("alpha", "lr_drop", "p_threshold", "eval_batch_size")]
    assert [about["data"][name] for name in ("train", "val", "resize", "crop")] == [36, 4, 32, 32]
    last = done.records[-1]  # without a truth there is no AUC; epoch 0 is of warm-up, and not the best
    stats = "".join(f"Numer of labeled samples:{last[f'labeled_net{k}']}   AUC:null\n" for k in (2, 1))
    assert (done.folder / "stats.txt").read_text() == stats and last["best_val_acc"] == last["val_acc"]


# ---- Its own flags and parts ----


@pytest.mark.parametrize("mode", MODES)
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
    assert status == 0, error
    assert (
        "weights imagenet (" in out and "lr 0.002 (" in out and "mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in out
    )
    for call in calls:
        assert torch.equal(call["state"]["features.0.weight"], state["features.0.weight"])
        assert call["data"].mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert call["weight_decay"] == 1e-3


def test_plain_cross_entropy(tree, tmp_path):
    """The comparison would divide after all, or end without the losses that its labels are ranked by."""
    flags = ["--method", "ce", "--save_scores", "--num_epochs", str(EPOCHS), "--out_dir", str(tmp_path)]
    Train_folder.main(["--data_path", str(tree), *SMALL_NET, *ON_CPU, *flags])
    folder = tmp_path / "folder_images_ce"
    records = read_records(folder)
    assert [record["phase"] for record in records] == ["ce"] * EPOCHS
    assert not any("seconds_gmm" in record or "seconds_loss" in record for record in records)
    assert not (folder / "scores").exists()
    scores = np.load(folder / "label_scores.npz")
    assert len(scores["loss_net1"]) == len(scores["loss_net2"]) == 22 and "p_clean_net1" not in scores


@pytest.mark.parametrize(
    ("parts", "flags", "sizes", "chosen"),
    [
        ((), [], (22, 2, None), "the validation images: validation"),
        (("train", "test"), [], (24, None, 24), "the test set: test"),
        (("train", "test"), ["--val_fraction", "0.25"], (18, 6, 24), "the validation images: validation"),
        (("train", "val", "test"), [], (24, 24, 24), "the validation images: validation"),
    ],
)
def test_what_the_best_epoch_is_chosen_on(tmp_path, start, monkeypatch, parts, flags, sizes, chosen):
    """Else the best epoch is chosen on what it is then tested with, or on images that were trained on."""
    note_phases(monkeypatch, Train_folder)
    named = [name for name, size in zip(("val", "test"), sizes[1:], strict=True) if size]
    values = {"val": iter([10.0, 30.0, 20.0]), "test": iter([50.0, 40.0, 60.0])}
    evaluated: list[dict[str, int]] = []

    def accuracy(nets, sets, phase):
        evaluated.append({name: len(data) for name, data in sets.items()})
        record = {f"{name}_acc": next(values[name]) for name in sets}
        return record | {f"{name}_acc_net{k}": 0.0 for name in sets for k in (1, 2)}

    monkeypatch.setattr(Train_folder, "test", accuracy)
    status, out, error = start(make_folder(tmp_path / "data", parts=parts), *flags)
    assert status == 0, error
    assert evaluated == [dict(zip(named, filter(None, sizes[1:]), strict=True))] * EPOCHS
    data = json.loads((tmp_path / "run/args.json").read_text())["data"]
    assert tuple(data.get(name) for name in ("train", "val", "test")) == sizes
    assert f"chosen on {chosen} " in out and ("no test split: " in out) == ("test" not in named)
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)["epochs"]
    assert best == ([1, 1] if "val" in named else [2, 2])
    record = read_records(tmp_path / "run")[-1]
    assert ("test_acc" in record, "val_acc" in record) == ("test" in named, "val" in named)
    assert record.get("best_acc") == {"test": 60.0, "val test": 40.0}.get(" ".join(named))


def test_an_imbalance_is_reported(tmp_path, start, monkeypatch):
    """A class of four among hundreds loses half of its right labels, and nobody knows why."""
    note_phases(monkeypatch, Train_folder)
    tree = make_folder(tmp_path / "data", 40, num_class=2, parts=("train", "test"))
    for image in sorted((tree / "train/c1").iterdir())[1:]:
        image.unlink()
    with pytest.warns(DivideMixWarning, match="20 times as many images"):
        status, out, _ = start(tree)
    assert status == 0 and "images of a class: 1 (c1) to 20 (c0), 20.0 times\n" in out


# ---- Stopped and continued ----


def test_a_network_with_dropout_continues_bit_for_bit(tree, tmp_path):
    """By a name of torchvision's: its dropout would draw otherwise after a restart."""
    flags = ["--arch", "squeezenet1_1", "--weights", "none", "--width", "64", "--image_size", "32", "--lr", "1e-05"]
    for name, stops in (("straight", ["2"]), ("stopped", ["1", "2"])):
        for epochs in stops:
            Train_folder.main(tiny(tree, tmp_path / name, *flags, "--num_epochs", epochs))
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert last_state(tmp_path / "stopped")["nets"][0]["classifier.1.weight"].shape == (4, 512, 1, 1)


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


# ---- Images of all kinds, and faults ----

CACHED = pytest.param(["stream", "--cache_dir", "cache"], marks=pytest.mark.slow)


@pytest.mark.parametrize("flags", [["device"], ["stream"], CACHED], ids=["device", "stream", "cached"])
def test_photos_on_their_side_and_drawings_on_nothing_are_trained_as_shown(tmp_path, start, monkeypatch, flags):
    """The networks would learn from photos that lie on their side and from drawings that are black all over; and the
    user would not hear how many images were changed, or would hear it in each pass."""
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for k, path in enumerate(sorted(make_folder(tmp_path / "data").rglob("*.jpg"))):
        shown, stored = (tmp_path / kind / path.relative_to(tmp_path / "data") for kind in ("shown", "stored"))
        shown.parent.mkdir(parents=True, exist_ok=True)
        stored.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        if k % 4 == 1:  # a black drawing on a transparent ground
            mask = image.convert("L")
            image = Image.new("RGB", image.size, "white")
            image.paste("black", mask=mask)
            drawing = Image.new("RGBA", image.size)
            drawing.putalpha(mask)
            drawing.save(stored, "PNG")
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

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Train_folder, "DeviceImages", full)
    status, _, error = start(tree)
    assert status == 1 and error.count("\n") == 1
    assert error.startswith("error: cpu: ") and " 22 images; try --data_mode stream" in error


def test_few_images_and_a_faulty_table(tmp_path, start, recwarn):
    """A first try on a few images of one's own would crash, and look like a fault of the data; or a mistake in one's
    own table would not be named."""
    tree = make_folder(tmp_path / "few", 5, num_class=2)
    status, _, error = start(tree)
    assert status == 0 and "error" not in error
    assert np.isfinite([read_records(tmp_path / "run")[-1][name] for name in ("loss_x", "penalty")]).all()
    one_of_each = make_folder(tmp_path / "two", 2, num_class=2)
    for refused in ((tree, "--val_fraction", "0"), (one_of_each,)):
        status, _, error = start(*refused, "--fresh")
        assert status == 1 and error.count("\n") == 1 and "--val_fraction" in error
    table = tmp_path / "mine.csv"
    table.write_text("path,label\nc0/0000.jpg,c0\n../x.jpg,c1\n")
    status, _, error = start(tree, "--labels", str(table), "--fresh")
    assert status == 1 and error.count("\n") == 1 and error.startswith(f"error: {table}, line 3: ")
    assert len(read_records(tmp_path / "run")) == EPOCHS  # the first run is as it was


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


# ---- Settings chosen while it trains ----


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
