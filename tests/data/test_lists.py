"""Lists of images: which image a line stands for, and which lines never get as far as a file."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.errors import assert_refused

from dividemix import DivideMixError
from dividemix.data.lists import Boundary, ImageList, images_below, list_folders, read_lines


def written(folder: Path, content: bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(content)
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_paths_labels_and_lines_of_an_image_list():
    """An image would have another image's label, or an error point to the wrong line."""
    paths = [b"a.jpg", b"x/\xc3\xa9t\xc3\xa9 1.jpg", b"b\n\x1b[2J"]
    images = ImageList("/d/list.txt", "/d", "images", paths, [4, 0, 4], 5, numbers=[1, 3, 7])
    assert [images.path(i) for i in range(2)] == ["/d/images/a.jpg", "/d/images/x/été 1.jpg"]
    assert [images.name(i) for i in range(2)] == ["a.jpg", "x/été 1.jpg"]
    assert [f"/d/{os.fsdecode(name)}" for name in images.names()] == [images.path(i) for i in range(3)]
    assert images.labels.dtype == np.int64 and images.labels.tolist() == [4, 0, 4]
    assert images.where(1) == "/d/list.txt, line 3" and images.class_counts().tolist() == [1, 0, 0, 0, 2]
    assert images.problem(0, "empty") == "/d/images/a.jpg: empty (/d/list.txt, line 1)"
    assert images.problem(2, "empty").startswith(r"'/d/images/b\n\x1b[2J': ")
    selected = images.select(np.array([2, 1]), 6)
    assert [selected.path(i) for i in range(len(selected))] == [images.path(2), images.path(1)]
    assert selected.labels.tolist() == [4, 0] and selected.where(0).endswith("line 7") and selected.num_class == 6
    moved = replace(images, root="/moved", numbers=np.array([3, 9, 10]))
    assert images.digest() == moved.digest() != replace(images, labels=[0, 4, 4]).digest()


def test_labelled_lines(tmp_path):
    """Labels would go to other images, or a list from another system would not be read."""
    content = b"\xef\xbb\xbfimages/1/a.jpg 3\r\n\r\n  \n images/b c.jpg\t0 \nimages/\xc3\xa9.jpg 13\nd e \x0c 1\n7 7"
    lines = read_lines(written(tmp_path, content), num_class=14)
    assert lines.paths == [b"images/1/a.jpg", b"images/b c.jpg", b"images/\xc3\xa9.jpg", b"d e", b"7"]
    assert lines.labels == [3, 0, 13, 1, 7] and lines.numbers == [1, 4, 5, 6, 7]
    keys = b"images/0/a.jpg\nimages//1/./b.jpg\n./c.jpg\n.hidden.jpg\n1/images/d..jpg\n"
    lines = read_lines(written(tmp_path, keys), drop=b"images/")
    assert lines == ([b"0/a.jpg", b"1/b.jpg", b"c.jpg", b".hidden.jpg", b"1/images/d..jpg"], [0] * 5, [1, 2, 3, 4, 5])


BAD_PATHS = {  # what is refused -> a word of the reason
    b"/etc/passwd": "absolute",
    b"a/../../b.jpg": "'..'",
    b"images/": "folder",
    b".": "folder",
    b"caf\xe9.jpg": "UTF-8",
    b"b\0.jpg": "zero byte",
    b"b" * 5000 + b".jpg": "5004 bytes",
}
BAD_LABELS = [b"14", b"-1", b"1.0", b"+1", b"1_0", b"9" * 5000, b"\xd9\xa3"]
BAD_LINES = {path + b" 1": reason for path, reason in BAD_PATHS.items()} | {b"b.jpg": "'b.jpg'"}
BAD_LINES |= {b"b.jpg " + label: "0 to 13" for label in BAD_LABELS}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=lambda value: str(value)[:20])
def test_bad_lines_are_refused_with_their_number(tmp_path, line, reason):
    """A list from elsewhere could have any file read; a label that does not exist would crash on the GPU."""
    path = written(tmp_path, b"a.jpg 13\n\n" + line + b"\nz.jpg 0\n")
    assert_refused(lambda: read_lines(path, 14), f"{path}, line 3: ", reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "missing"), (b"\n  \n", "not one line"), ("a.jpg 1\n".encode("utf-16")[:-1], "line 1: ")],
)
def test_lists_that_cannot_be_read_are_refused(tmp_path, content, reason):
    """A missing, empty or unreadable list would end in a traceback, or in a training set without images."""
    path = tmp_path / "list.txt" if content is None else written(tmp_path, content)
    with pytest.raises(DivideMixError, match=rf"list\.txt.*{reason}"):
        read_lines(path, 14)


def test_class_folders(tmp_path):
    """Images would count for another class, be lost or counted twice; links in a circle would never end."""
    touch(tmp_path / "val", "b/2.JPEG", "b/.hidden.jpg", "b/c/1.pgm", "b/notes.txt", "b/c/x.jpg.part", "a/x.png")
    touch(tmp_path / "val", "a/.git/y.jpg", "empty/no.txt", "a/@eaDir/x.png/thumb.jpg", "b/.ipynb_checkpoints/1.jpg")
    (tmp_path / "val/b/circle").symlink_to(tmp_path / "val/b")
    (tmp_path / "val/b/again").symlink_to(tmp_path / "val/b/c")
    (tmp_path / "val/b/gone.jpg").symlink_to(tmp_path / "nowhere")  # the reader says that it is missing
    images = list_folders(tmp_path, "val", ["b", "a"])
    names = [images.name(i) for i in range(len(images))]
    assert names == ["b/2.JPEG", "b/again/1.pgm", "b/gone.jpg", "a/x.png"]
    assert images.path(0) == str(tmp_path / "val/b/2.JPEG") and images.where(0) == str(tmp_path / "val")
    assert images.labels.tolist() == [0, 0, 0, 1] and images.num_class == 2
    assert images_below(tmp_path / "val/b")[1] == {".txt": 1, ".part": 1}
    with pytest.raises(DivideMixError, match="missing: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more"):
        list_folders(tmp_path, "val", ["a", *(str(c) for c in range(1, 15))])
    with pytest.raises(DivideMixError, match=f"{tmp_path}/val: .*: empty$"):
        list_folders(tmp_path, "val", ["a", "empty"])
    with pytest.raises(DivideMixError, match=f"{tmp_path}/nothing"):
        images_below(tmp_path / "nothing")


def test_symbolic_links_out_of_the_data_folder(tmp_path):
    """A list or archive from elsewhere could have any file of the machine read through a link."""
    root, outside = tmp_path / "data", tmp_path / "data2"
    touch(tmp_path, "data/in/x.jpg", "data2/x.jpg", "secret.jpg")
    links = {"file_out": outside / "x.jpg", "folder_out": outside, "file_in": root / "in/x.jpg", "folder_in": "in"}
    links |= {"in/file_out": outside / "x.jpg", "in/folder_out": outside, "folder_out/away.jpg": "../secret.jpg"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (tmp_path / "link").symlink_to(root)
    for start in (root, tmp_path / "link"):  # the data folder itself may be a link
        boundary = Boundary(start)
        # "folder_out": a folder directly in the data folder may be a link to another disk
        for name in ("in/x.jpg", "file_in", "folder_in/x.jpg", "absent/x.jpg", "folder_out/x.jpg"):
            assert boundary.holds(str(start / name)), name
        for name in ("file_out", "in/file_out", "in/folder_out/x.jpg", "in/folder_out/no.jpg", "folder_out/away.jpg"):
            assert not boundary.holds(str(start / name)), name
        assert boundary.holds(str(outside / "x.jpg"))  # named as such, by the user's own table
