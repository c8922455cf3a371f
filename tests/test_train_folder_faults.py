"""Train_folder.py: data that have changed or have faults, and sets that hardly are any. Each fault is one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import read_records
from helpers.scripts import note_phases
from helpers.trees import make_folder
from PIL import Image
from test_train_folder import EPOCHS, MODES, starter

import Train_folder
from dividemix import networks

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """24 images of 4 classes; 2 of them are held out."""
    return make_folder(tmp_path_factory.mktemp("own") / "images")


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    return starter(tmp_path, monkeypatch, capsys)


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

    for owner, name in ((networks, "pair"), (Train_folder, "Run"), (Train_folder.options, "start_runtime")):
        monkeypatch.setattr(owner, name, refuse)
    tree = make_folder(tmp_path / "data", parts=("train", "test"))
    status, out, error = start(tree, "--check_data", *depth)
    assert status == 0 and error == "" and "train: 24 of 24 images exist, 0 of them unreadable\n" in out
    assert "\nclasses: 0 c0, 1 c1, 2 c2, 3 c3\n" in out  # or nobody knows which the numbers are
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
