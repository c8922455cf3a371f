"""Train_folder.py --features and --feature_file: heads on a frozen network, from the images to the exported program."""

import csv
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.runs import assert_same_run, read_records
from helpers.scripts import end_of
from helpers.trained import command, lively
from helpers.trees import make_folder
from PIL import Image

import Train_folder
from dividemix import DivideMixError
from dividemix.deploy import export, predict

ARCH, SIDE = "shufflenet_v2_x0_5", 64
ON_CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0", "--num_epochs", "5", "--batch_size", "8"]

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """40 images of 4 classes in each of train and test; weights.pth as torchvision's files are."""
    root = tmp_path_factory.mktemp("features")
    make_folder(root / "tree", 40, splits=("train", "test"), sides=(30, 60))
    torch.save(lively(ARCH, 1000, 64, 0).state_dict(), root / "weights.pth")
    return root


def flags(root: Path, run: Path, *more: str) -> list[str]:
    network = ["--features", "--arch", ARCH, "--weights", str(root / "weights.pth"), "--image_size", str(SIDE)]
    return ["--data_path", str(root / "tree"), "--run_dir", str(run), *network, *ON_CPU, *more]


@pytest.fixture(scope="module")
def done(root) -> Path:
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dividemix.report.report.draw", lambda *_: [])
        Train_folder.main(flags(root, root / "run"))
    return root / "run"


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs the command line in this process. -> (exit status, stdout, stderr)"""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return end_of(Train_folder, [*map(str, arguments)], monkeypatch), *capsys.readouterr()

    return run


def test_a_run_on_features_continues_bit_for_bit(root, done, tmp_path):
    """Features or crops that are drawn anew would make another run of it; in another --cache_dir they are the same."""
    for epochs in ("2", "5"):
        more = ["--cache_dir", str(tmp_path / "cache"), "--num_epochs", epochs]
        Train_folder.main(flags(root, tmp_path / "run", *more))
    assert_same_run(done, tmp_path / "run")
    assert len([*(done / "features").iterdir()]) == len([*(tmp_path / "cache").iterdir()]) == 2
    assert np.load(done / "label_scores.npz")["probabilities"].shape == (40, 4)
    assert len(np.load(done / "thumbnails.npz")["index"]) == 40


def test_features_outlive_a_start_that_fails(root, tmp_path, start, monkeypatch):
    """An hour of work would be deleted because, say, the card has no memory left for the heads."""
    with monkeypatch.context() as patch:
        patch.setattr("dividemix.networks.pair", mock.Mock(side_effect=DivideMixError("no memory")))
        assert start(*flags(root, tmp_path / "run"))[0] == 1
    monkeypatch.setattr("dividemix.data.features.make", mock.Mock(side_effect=AssertionError("made again")))
    assert start(*flags(root, tmp_path / "run", "--num_epochs", "1"))[0] == 0


def test_features_that_were_made_anew_must_be_the_same(root, tmp_path, start):
    """Another card or version computes others: the heads would go on with numbers that they were not trained on."""
    assert start(*flags(root, tmp_path / "run", "--num_epochs", "1"))[0] == 0
    for path in (tmp_path / "run" / "features").iterdir():
        with open(path, "rb") as file:
            made, checksums = np.load(file), np.load(file)
        with open(path, "wb") as file:
            np.save(file, made + np.float32(1e-3))
            np.save(file, checksums)
    status, _, error = start(*flags(root, tmp_path / "run", "--num_epochs", "2"))
    assert status == 1 and error.count("\n") == 1 and "does not hold the features with which" in error


@pytest.mark.parametrize("views", ["0", "256"])
def test_more_views_than_are_drawn_are_refused_at_once(root, tmp_path, start, views):
    """The features would be made, for hours, and then refused."""
    status, _, error = start(*flags(root, tmp_path / "run", "--feature_views", views))
    assert status == 2 and "--feature_views" in error and not (tmp_path / "run").exists()


def test_predict_and_export_are_the_tested_classifier(root, done, tmp_path, monkeypatch, capsys):
    """Heads on another network, or on another view, answer nonsense; and whoever gets the run folder has not the
    weights' file."""
    weights = root / "weights.pth"
    weights.rename(tmp_path / "gone.pth")
    try:
        predicted = command(predict, tmp_path, monkeypatch, capsys, "--device", "cpu")(done, root / "tree/test")
        exported = command(export, tmp_path, monkeypatch, capsys)(done, "model.pt2")
    finally:
        (tmp_path / "gone.pth").rename(weights)
    assert predicted[0] == exported[0] == 0 and f"heads on a frozen {ARCH}" in predicted[1]
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    best = max(record["test_acc"] for record in read_records(done))
    assert 100 * np.mean([Path(row["path"]).parent.name == row["class"] for row in rows]) == pytest.approx(best)
    assert len({row["class"] for row in rows}) > 1 and best > 40  # or any other network would do as well
    program = torch.export.load(tmp_path / "model.pt2").module()
    square = next(root.glob("tree/test/c0/*"))
    image = Image.open(square).convert("RGB").resize((SIDE, SIDE))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    assert program(x).shape == (1, 4)


def test_a_feature_file(root, tmp_path, start, monkeypatch, capsys):
    """Features of CLIP, of training and test images: they must train, be the same ones at the next start, and the run
    must say what it lacks."""
    rng, numbers = np.random.default_rng(0), np.tile(np.repeat(np.arange(4), 10), 2)
    features = rng.normal(size=(80, 16)) + 4 * np.eye(16)[numbers]
    path, run = tmp_path / "F.npy", tmp_path / "run"
    np.save(path, features)
    given = ["--data_path", root / "tree", "--feature_file", path, "--run_dir", run, *ON_CPU]
    status, out, error = start(*given, "--num_epochs", "12")
    assert status == 0 and "warm_up 3 (" in out, error
    assert read_records(run)[-1]["test_acc"] > 60
    about = json.loads((run / "args.json").read_text())
    assert about["model"]["num_features"] == 16 and about["data"]["train"] == 40
    status, _, error = command(predict, tmp_path, monkeypatch, capsys)(run, root / "tree/test")
    assert status == 1 and "--feature_file" in error
    path.rename(tmp_path / "moved.npy")
    assert start(*given, "--features", "--feature_file", tmp_path / "moved.npy", "--num_epochs", "12")[0] == 0
    np.save(path, features[::-1])
    status, _, error = start(*given, "--num_epochs", "13")
    assert status == 1 and error.count("\n") == 1 and str(path) in error
    np.save(path, features[:40])
    status, _, error = start(*given, "--fresh")
    assert status == 1 and error.count("\n") == 1 and str(path) in error


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        (["--features", "--weights", "none"], "--features"),
        (["--features", "--arch", "preresnet18"], "--features"),
        (["--features", "--data_mode", "device"], "--data_mode"),
        (["--feature_file", "F.npy", "--arch", "resnet18"], "--arch"),
        (["--feature_file", "F.npy", "--skip_bad_images"], "--skip_bad_images"),
    ],
)
def test_flags_that_do_not_go_together(root, tmp_path, start, more, flag):
    """Features of a network that has learned nothing; or a flag that is given and not used."""
    status, _, error = start("--data_path", root / "tree", "--run_dir", tmp_path / "run", *ON_CPU, *more)
    assert status == 1 and error.count("\n") == 1 and flag in error
    assert not (tmp_path / "run").exists()


def test_photos_on_a_cpu_are_told_of_features(root, tmp_path, start):
    """A newcomer would wait for hours."""
    whole = ["--arch", ARCH, "--weights", root / "weights.pth", "--image_size", "72", "--warm_up", "1"]
    status, out, error = start(
        "--data_path", root / "tree", "--run_dir", tmp_path / "run", *ON_CPU, *whole, "--num_epochs", 1
    )
    assert status == 0 and "--features" in out, error
