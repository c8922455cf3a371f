"""dataloader_webvision: which images and labels the run gets, from WebVision's lists and ImageNet's folders."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.trees import WNIDS, make_webvision
from PIL import Image

from dataloader_webvision import find, load
from dividemix import DivideMixError


def refused(root: Path, *expected: str, num_class: int = 10) -> str:
    with pytest.raises(DivideMixError) as caught:
        load(root, num_class)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in expected), message
    return message


@pytest.mark.parametrize("wnid_folders", [False, True])
def test_images_and_labels(tmp_path, wnid_folders):
    """One of the two namings of ImageNet's folders could not be read, or images would get wrong labels."""
    data = load(make_webvision(tmp_path, 40, 20, 30, noise=0.0, wnid_folders=wnid_folders), num_class=10)
    assert [len(part) for part in (data.train, data.val, data.imagenet)] == [40, 20, 30] and data.num_class == 10
    assert data.train.labels.tolist() == list(range(10)) * 4 and data.val.labels.tolist() == list(range(10)) * 2
    assert data.imagenet.labels.tolist() == np.repeat(np.arange(10), 3).tolist()
    assert Path(data.train.path(11)) == tmp_path / "google/q0002/images000003/Zx_11-9Q.jpg"
    assert Path(data.val.path(7)) == tmp_path / "val_images_256/val000007.jpg"
    name = WNIDS[1] if wnid_folders else "1"
    assert Path(data.imagenet.path(4)) == tmp_path / f"imagenet/val/{name}/ILSVRC2012_val_00000011.JPEG"
    for part in (data.train, data.val, data.imagenet):
        for i in range(len(part)):
            with Image.open(part.path(i)) as image:
                assert image.format == "JPEG"


def test_class_names(tmp_path):
    """Reports would call a class by another one's name."""
    root = make_webvision(tmp_path, 20, 10, 10)
    assert load(root, 10).class_names[1] == f"{WNIDS[1]} thing 1, other name"
    (root / "info/synsets.txt").unlink()
    assert load(root, 10).class_names == [str(c) for c in range(10)]


def test_only_the_first_classes(tmp_path):
    """The 950 later classes would be trained on, or a test image of theirs counted as an error."""
    root = make_webvision(tmp_path, 60, 60, 60, num_class=20)
    data = load(root, 7)
    for part in (data.train, data.val, data.imagenet):
        assert part.num_class == 7 and part.class_counts().shape == (7,) and set(part.labels) == set(range(7))
    assert len(data.val) == len(data.imagenet) == 7 * 3
    assert data.val.where(20) == f"{root}/info/val_filelist.txt, line 51"  # image 46, after four lines of later classes


def test_folder_order_is_that_of_the_synsets(tmp_path):
    """ImageNet accuracy would be measured with shuffled classes, and be near chance."""
    root = make_webvision(tmp_path, 20, 10, 10, wnid_folders=True)
    lines = (root / "info/synsets.txt").read_text().splitlines()
    (root / "info/synsets.txt").write_text("\n".join(reversed(lines[:10])))
    images = load(root, 10).imagenet
    assert images.name(0).startswith(WNIDS[9]) and images.labels[0] == 0


def test_path_with_and_without_a_trailing_slash(tmp_path):
    """The authors' script wants the slash; without it, it reads `datasetinfo/...`."""
    make_webvision(tmp_path / "dataset", 20, 10, 10)
    for path in (f"{tmp_path}/dataset", f"{tmp_path}/dataset/"):
        assert load(path, 10).train.path(0).startswith(f"{tmp_path}/dataset/google/")


def test_all_that_is_missing_is_named_at_once(tmp_path):
    """The user would fetch one part, start again, and be told of the next."""
    refused(tmp_path, "train_filelist_google.txt is missing", "val_filelist.txt is missing", "imagenet/val is missing")
    root = make_webvision(tmp_path, 20, 10, 10)
    shutil.rmtree(root / "imagenet/val/3")
    (root / "info/val_filelist.txt").unlink()
    refused(root, "val_filelist.txt is missing", "imagenet/val: class folders missing: 3", "--data_path")
    lists, problems = find(root, 10)
    assert list(lists) == ["train"] and len(problems) == 2


def test_wnid_folders_need_the_order(tmp_path):
    """Classes would be numbered by the names of the folders, which happen to be sorted otherwise in other subsets."""
    root = make_webvision(tmp_path, 20, 10, 10, wnid_folders=True)
    (root / "info/synsets.txt").write_text("n01440764 tench\n")
    refused(root, "info/synsets.txt with the order", "1 lines, 10 are needed")
    (root / "info/synsets.txt").unlink()
    refused(root, "info/synsets.txt with the order")


@pytest.mark.parametrize("line", ["../.. x", "/etc x", ".. x", "a/b x", f"{WNIDS[0]} again"])
def test_bad_synsets_are_refused(tmp_path, line):
    """A class folder could lie outside the data folder, or stand for two classes."""
    root = make_webvision(tmp_path, 20, 10, 10, wnid_folders=True)
    lines = (root / "info/synsets.txt").read_text().splitlines()
    (root / "info/synsets.txt").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    refused(root, "info/synsets.txt, line 3: ")


@pytest.mark.parametrize("line", ["\u3000", "\x1c", "n" * 300])
def test_odd_synsets_are_class_folders_that_are_missing(tmp_path, line):
    """A line of white space that only some programs take for such, or a name that no disk holds, would end in a
    traceback."""
    root = make_webvision(tmp_path, 20, 10, 10, wnid_folders=True)
    lines = (root / "info/synsets.txt").read_text().splitlines()
    (root / "info/synsets.txt").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    refused(root, "imagenet/val: class folders missing: ")


def test_labels_out_of_range_and_empty_selections_are_refused(tmp_path):
    """A damaged list would pass as one without images of the wanted classes."""
    root = make_webvision(tmp_path, 20, 10, 10)
    path = root / "info/train_filelist_google.txt"
    text = path.read_text()
    path.write_text(text + "google/q0001/x.jpg 1000\n")
    refused(root, f"{path}, line 23: label '1000', expected a whole number from 0 to 999")
    path.write_text("google/q0001/x.jpg 10\n")
    refused(root, f"{path}: no image of the classes 0 to 9")


@pytest.mark.parametrize("num_class", [0, 1, 1001])
def test_impossible_numbers_of_classes_are_refused(tmp_path, num_class):
    """A network would be built whose last classes no image has, or one that has nothing to tell apart."""
    refused(tmp_path, "--num_class", num_class=num_class)
