"""dataloader_webvision: which images and labels the run gets, from WebVision's lists and ImageNet's folders."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.errors import assert_refused
from helpers.trees import WNIDS, make_webvision

from dataloader_webvision import find, load


def refused(root: Path, *expected: str, num_class: int = 10) -> None:
    assert_refused(lambda: load(root, num_class), *expected)


@pytest.mark.parametrize("wnid_folders", [False, True])
def test_images_and_labels(tmp_path, wnid_folders):
    """One of the two namings of ImageNet's folders could not be read, or images would get wrong labels."""
    root = make_webvision(tmp_path / "data", 40, 20, 30, noise=0.0, wnid_folders=wnid_folders)
    data = load(f"{root}/", num_class=10)
    assert [len(images) for images in (data.train, data.val, data.imagenet)] == [40, 20, 30]
    assert data.train.labels.tolist() == list(range(10)) * 4 and data.val.labels.tolist() == list(range(10)) * 2
    assert data.imagenet.labels.tolist() == np.repeat(np.arange(10), 3).tolist()
    assert Path(data.train.path(11)) == root / "google/q0002/images000003/Zx_11-9Q.jpg"
    assert Path(data.val.path(7)) == root / "val_images_256/val000007.jpg"
    name = WNIDS[1] if wnid_folders else "1"
    assert Path(data.imagenet.path(4)) == root / f"imagenet/val/{name}/ILSVRC2012_val_00000011.JPEG"
    assert all(Path(images.path(i)).is_file() for images in (data.train, data.val, data.imagenet) for i in range(20))


def test_only_the_first_classes(tmp_path):
    """The 950 later classes would be trained on, or a test image of theirs counted as an error."""
    root = make_webvision(tmp_path, 60, 60, 60, num_class=20)
    data = load(root, 7)
    for images in (data.train, data.val, data.imagenet):
        assert images.num_class == 7 and set(images.labels) == set(range(7))
    assert len(data.val) == len(data.imagenet) == 7 * 3
    assert data.val.where(20) == f"{root}/info/val_filelist.txt, line 51"  # image 46, after four lines of later classes


@pytest.mark.parametrize("has_folder", [False, True])
def test_lists_with_and_without_the_leading_folder(tmp_path, has_folder):
    """A copy of the lists that begins one folder above or below would name no image."""
    root = make_webvision(tmp_path, 20, 10, 10)
    expected = load(root, 10)
    for name, folder in (("train_filelist_google", "google/"), ("val_filelist", "val_images_256/")):
        path = root / f"info/{name}.txt"
        lines = [line.removeprefix(folder) for line in path.read_text().splitlines()]
        path.write_text("\n".join(folder * has_folder + line for line in lines))
    data = load(root, 10)
    for images, others in ((data.train, expected.train), (data.val, expected.val)):
        assert images.digest() == others.digest() and Path(images.path(3)).is_file()
    assert data.train.names()[0].startswith(b"google/q0001/") and data.val.name(3) == "val000003.jpg"


def test_the_order_of_the_classes_is_that_of_the_synsets(tmp_path):
    """ImageNet accuracy would be measured with shuffled classes, and be near chance."""
    root = make_webvision(tmp_path, 20, 10, 10, wnid_folders=True)
    lines = (root / "info/synsets.txt").read_text().splitlines()
    (root / "info/synsets.txt").write_text("\n".join(reversed(lines[:10])))
    data = load(root, 10)
    assert data.imagenet.name(0).startswith(WNIDS[9]) and data.imagenet.labels[0] == 0
    assert data.class_names[1] == f"{WNIDS[8]} thing 8, other name"
    (root / "info/synsets.txt").write_text("\n".join(lines[:9]))
    refused(root, "info/synsets.txt", "9 lines, 10 are needed")
    for wnid in WNIDS[:10]:
        (root / "imagenet/val" / wnid).rename(root / "imagenet/val" / str(WNIDS.index(wnid)))
    (root / "info/synsets.txt").unlink()
    assert load(root, 10).class_names == [str(c) for c in range(10)]


def test_all_that_is_missing_is_named_at_once(tmp_path):
    """The user would fetch one file, start again, and be told of the next."""
    refused(tmp_path, "train_filelist_google.txt is missing", "val_filelist.txt is missing", "imagenet/val is missing")
    root = make_webvision(tmp_path, 20, 10, 10)
    shutil.rmtree(root / "imagenet/val/3")
    (root / "info/val_filelist.txt").unlink()
    refused(root, "val_filelist.txt is missing", "imagenet/val: class folders missing: 3", "--data_path")
    lists, problems = find(root, 10)
    assert list(lists) == ["train"] and len(problems) == 2


@pytest.mark.parametrize("line", ["../.. x", "/etc x", f"{WNIDS[0]} again", "\u3000", "\x1c", "n" * 300])
def test_bad_synsets_are_refused(tmp_path, line):
    """A class folder could lie outside the data folder, stand for two classes, or end in a traceback."""
    root = make_webvision(tmp_path, 10, 10, 10, wnid_folders=True)
    lines = (root / "info/synsets.txt").read_text().splitlines()
    (root / "info/synsets.txt").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    refused(root, "info/synsets.txt, line 3: " if " " in line else "class folders missing: ")


def test_labels_out_of_range_and_empty_selections_are_refused(tmp_path):
    """A damaged list would pass as one without the wanted classes, or a class have no image."""
    root = make_webvision(tmp_path, 20, 10, 10)
    path = root / "info/train_filelist_google.txt"
    for label, expected in (("1000", f"{path}, line 1: "), ("10", f"{path}: ")):
        path.write_text(f"google/q0001/x.jpg {label}\n")
        refused(root, expected)
    for num_class in (0, 1, 1001):
        refused(root, "--num_class", num_class=num_class)
