"""check_data: what the user is told about a data folder before hours of training."""

import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from make_image_trees import Artist, make_clothing1M
from PIL import Image

import dataloader_clothing1M
from dividemix.check_data import check, problem
from dividemix.filelist import Boundary, list_folders


def save(path: Path, kind: str = "JPEG", mode: str = "RGB", side: int = 40, **options: object) -> bytes:
    Artist(0, (side, side)).image(3).convert(mode).save(path, kind, **options)
    return path.read_bytes()


def verdict(path: Path, full: bool = False) -> str:
    return problem(str(path), Boundary(path.parent), full)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data folder with a file `photo.jpg`."""
    (tmp_path / "data").mkdir()
    save(tmp_path / "data" / "photo.jpg")
    return tmp_path / "data"


# ---- One file ----

SOUND = {
    "grey JPEG": ("JPEG", "L", {}),
    "CMYK JPEG": ("JPEG", "CMYK", {}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
    "PNG": ("PNG", "RGB", {}),
    "palette PNG": ("PNG", "P", {}),
    "GIF": ("GIF", "P", {}),
    "WebP": ("WEBP", "RGB", {}),
    "BMP": ("BMP", "RGB", {}),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("kind", "mode", "options"), SOUND.values(), ids=SOUND)
def test_sound_images(folder, kind, mode, options, full):
    """A data set would be refused for images that can be read, whatever format the name claims."""
    save(folder / "photo.jpg", kind, mode, **options)
    assert verdict(folder / "photo.jpg", full) == ""


def test_bytes_after_the_end_are_no_damage(folder):
    """Many photos of the web have a few bytes after the end mark: a whole data set would be refused for them."""
    path = folder / "photo.jpg"
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert verdict(path) == ""


BROKEN = {
    "empty": (lambda data: b"", "empty"),
    "one byte": (lambda data: data[:1], "not an image"),
    "web page": (lambda data: b"<html><body>404 Not Found</body></html>", "not an image"),
    "half": (lambda data: data[: len(data) // 2], "truncated"),
    "end missing": (lambda data: data[:-40], "truncated"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("damage", "expected"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_found_by_a_look_at_their_ends(folder, kind, damage, expected):
    """A download that broke off would be found hours into training."""
    path = folder / "photo.jpg"
    path.write_bytes(damage(save(path, kind)))
    assert expected in verdict(path).lower() and expected in verdict(path, full=True).lower()


def test_only_full_sees_damage_in_the_middle(folder):
    """`full` would cost a decoding of every image and find no more than the quick look."""
    path = folder / "photo.jpg"
    data = bytearray(save(path, "PNG"))
    start = data.index(b"IDAT") + 4
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    assert verdict(path) == "" and verdict(path, full=True) != ""


def test_decompression_bombs(folder):
    """A file of a few kilobytes could fill the memory of every worker."""
    side = 20_000
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    picture = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (folder / "bomb.jpg").write_bytes(b"\x89PNG\r\n\x1a\n" + picture)
    assert "pixels" in verdict(folder / "bomb.jpg")


def test_what_is_not_a_file(folder, tmp_path):
    """The check would hang on a pipe, crash on a folder, or read a file outside the data folder through a link."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    assert verdict(folder / "pipe.jpg") == verdict(folder / "folder.jpg") == "not a file"
    assert verdict(folder / "absent.jpg") == verdict(folder / "photo.jpg" / "below.jpg") == "missing"
    save(tmp_path / "outside.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    assert "symbolic link" in verdict(folder / "link.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    assert verdict(folder / "loop.jpg")
    (folder / "inner.jpg").symlink_to("photo.jpg")
    assert verdict(folder / "inner.jpg") == ""


# ---- A data folder ----


def test_a_complete_folder(tmp_path):
    """A good data set would be called bad, or the user could not see how its classes are filled."""
    report = check(*dataloader_clothing1M.find(make_clothing1M(tmp_path, 30, 14, 15)))
    assert report.ok and [(r.name, r.total, r.exist) for r in report.lists] == [
        ("train", 30, 30),
        ("val", 14, 14),
        ("test", 15, 15),
    ]
    assert sum(report.lists[0].class_counts) == 30
    assert report.lists[2].class_counts.tolist() == [2] + [1] * 13
    text = str(report)
    assert "train: 30 of 30 images exist, 0 of them unreadable" in text and "images of each class: 0: 2, 1: 1" in text
    assert text.endswith("the data are complete (header and end of every image read)")


@pytest.mark.parametrize("full", [False, True])
def test_everything_wrong_is_in_one_report(tmp_path, full):
    """The user would mend one thing, start again, and be told of the next; or be told that training can run."""
    root = make_clothing1M(tmp_path, 600, 14, 14, sides=(8, 8))
    (root / "clean_test_key_list.txt").unlink()
    lists, problems = dataloader_clothing1M.find(root)
    for i in range(250, 259):  # threads take the images in parts of 256
        os.remove(lists["train"].path(i))
    for i in range(590, 594):
        Path(lists["train"].path(i)).write_bytes(b"<html>")
    report = check(lists, problems, full)
    train, val = report.lists
    assert not report.ok and (train.total, train.missing, train.unreadable) == (600, 9, 4)
    assert val.missing == val.unreadable == 0
    assert train.first_bad[0] == f"{lists['train'].path(250)}: missing ({root}/noisy_train_key_list.txt, line 251)"
    assert len(train.first_bad) == 10 and "line 591" in train.first_bad[9]
    text = str(report)
    assert "clean_test_key_list.txt is missing" in text and "train: 591 of 600 images exist, 4 of them" in text
    assert "  and 3 more\n" in text and "training cannot run" in text
    assert check({"val": lists["val"]}).ok and not check({"val": lists["val"]}, problems).ok


def test_nothing_to_check_is_not_ok(tmp_path):
    """A wrong --data_path would pass the check."""
    report = check(*dataloader_clothing1M.find(tmp_path))
    assert not report.ok and len(report.problems) == 5 and report.lists == []


def test_class_folders_need_no_line_numbers(folder):
    """The report on ImageNet's class folders would crash on the first bad image."""
    (folder / "0").mkdir()
    (folder / "0" / "x.jpg").write_bytes(b"")
    report = check({"imagenet": list_folders(folder, "", ["0"])})
    assert report.lists[0].first_bad == [f"{folder}/0/x.jpg: empty ({folder})"]
    assert np.array_equal(report.lists[0].class_counts, [1])


def test_pillow_still_warns_after_a_check(folder):
    """The check would silence the warnings of the whole training run."""
    before = list(warnings.filters)
    check({"imagenet": list_folders(folder.parent, "", ["data"])})
    assert warnings.filters == before
    with Image.open(folder / "photo.jpg") as image:
        assert image.size == (40, 40)
