"""filelist: which image a line stands for, and which lines never get as far as a file."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dividemix import DivideMixError, DivideMixWarning
from dividemix.data.lists import Boundary, ImageList, images_below, list_folders, read_lines, read_table


def written(folder: Path, content: bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(content)
    return path


def image_list(paths: list[bytes], labels: list[int], num_class: int = 5, numbers: list[int] | None = None):
    return ImageList("/d/list.txt", "/d", "images", paths, labels, num_class, numbers)


# ---- The list in memory ----


def test_paths_labels_and_lines_of_an_image_list():
    """An image would be trained on with another image's label, or an error would point to the wrong line."""
    images = image_list([b"a.jpg", b"x/\xc3\xa9t\xc3\xa9 1.jpg", b"b"], [4, 0, 4], numbers=[1, 3, 7])
    assert len(images) == 3
    assert [images.path(i) for i in range(3)] == ["/d/images/a.jpg", "/d/images/x/été 1.jpg", "/d/images/b"]
    assert [images.name(i) for i in range(3)] == ["a.jpg", "x/été 1.jpg", "b"]
    assert [f"/d/{os.fsdecode(name)}" for name in images.names()] == [images.path(i) for i in range(3)]
    assert images.labels.dtype == np.int64 and images.labels.tolist() == [4, 0, 4]
    assert images.where(1) == "/d/list.txt, line 3"
    assert images.class_counts().tolist() == [1, 0, 0, 0, 2]


def test_selected_images_keep_their_labels_and_lines():
    """The first classes of WebVision, or a part of a set, would get the labels of other images."""
    images = image_list([b"a", b"bb", b"", b"dddd"], [0, 1, 2, 3], numbers=[1, 2, 3, 9]).select(np.array([3, 0]), 4)
    assert [images.path(i) for i in range(len(images))] == ["/d/images/dddd", "/d/images/a"]
    assert images.labels.tolist() == [3, 0] and images.where(0).endswith("line 9") and images.num_class == 4
    assert len(images.select(np.array([], int))) == 0


def test_names_are_paths_below_the_data_folder():
    """A list of suspect labels would name images that are not there."""
    images = image_list([b"a.jpg", b"x/\xc3\xa9.jpg"], [0, 1])
    assert images.names().tolist() == [b"images/a.jpg", b"images/x/\xc3\xa9.jpg"]


def test_a_list_is_compact_and_travels_to_worker_processes():
    """A million paths as Python objects would cost every worker process 100 MB and a copy at each look."""
    n = 1000
    images = image_list([b"0/00/%010d.jpg" % i for i in range(n)], [0] * n, numbers=list(range(n)))
    assert len(pickle.dumps(images)) < n * (19 + 2 * 8) + 2000
    again = pickle.loads(pickle.dumps(images))
    assert again.path(n - 1) == images.path(n - 1) == "/d/images/0/00/0000000999.jpg"


# ---- List files ----


def test_labelled_lines(tmp_path):
    """Labels would go to other images, or a list from another system (blank lines, Windows ends) would not be read."""
    content = b"\xef\xbb\xbfimages/1/a.jpg 3\r\n\r\n  \n images/b c.jpg\t0 \nimages/\xc3\xa9.jpg 13"
    lines = read_lines(written(tmp_path, content), num_class=14)
    assert lines.paths == [b"images/1/a.jpg", b"images/b c.jpg", b"images/\xc3\xa9.jpg"]
    assert lines.labels == [3, 0, 13] and lines.numbers == [1, 4, 5]


def test_any_white_space_before_the_label(tmp_path):
    """Lists that were made by hand or by another program would be refused, or a space would end up in a path."""
    lines = read_lines(written(tmp_path, b"a  3\nb \t0\nc\x0b7\nd e \x0c 1\n7 7\n"), num_class=14)
    assert lines.paths == [b"a", b"b", b"c", b"d e", b"7"] and lines.labels == [3, 0, 7, 1, 7]


def test_key_lines(tmp_path):
    """A key list is paths alone; its keys must be found in the label file however each writes the path."""
    path = written(tmp_path, b"images/0/a.jpg\nimages//1/./b.jpg\n./c.jpg\n.hidden.jpg\n1/images/d..jpg\n")
    lines = read_lines(path, drop=b"images/")
    assert lines.paths == [b"0/a.jpg", b"1/b.jpg", b"c.jpg", b".hidden.jpg", b"1/images/d..jpg"]
    assert lines.labels == [0] * 5 and lines.numbers == [1, 2, 3, 4, 5]


BAD_LABELS = [b"14", b"-1", b"x", b"1.0", b"1e1", b"+1", b"01", b"0x1", b"1_0", b"nan", b"9" * 5000, b"\xd9\xa3"]


@pytest.mark.parametrize("label", BAD_LABELS)
def test_bad_labels_are_refused_with_their_line(tmp_path, label):
    """A label that does not exist would end in a crash on the GPU, or in a class that nobody asked for."""
    path = written(tmp_path, b"a.jpg 13\n\nb.jpg " + label + b"\n")
    with pytest.raises(DivideMixError, match=r"list\.txt, line 3: label .*, expected a whole number from 0 to 13: "):
        read_lines(path, num_class=14)


BAD_LINES = {
    "no label": (b"b.jpg", "'b.jpg' has no label"),
    "absolute": (b"/etc/passwd 1", "'/etc/passwd' is an absolute path"),
    "absolute, two slashes": (b"//etc/passwd 1", "is an absolute path"),
    "leaves": (b"../b.jpg 1", "'../b.jpg' has a part '..'"),
    "leaves on its way": (b"a/../../b.jpg 1", "has a part '..'"),
    "leaves at its end": (b"a/.. 1", "has a part '..'"),
    "folder": (b"images/ 1", "'images/' is a folder"),
    "this folder": (b". 1", "'.' is a folder"),
    "latin-1": (b"caf\xe9.jpg 1", "not UTF-8"),
    "zero byte": (b"b\0.jpg 1", "a zero byte"),
    "no path is so long": (b"b" * 5000 + b".jpg 1", "has 5004 bytes"),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_refused_with_their_number(tmp_path, line, expected):
    """A list from elsewhere could have any file of the machine read."""
    path = written(tmp_path, b"a.jpg 1\n\n" + line + b"\nz.jpg 0\n")
    with pytest.raises(DivideMixError) as caught:
        read_lines(path, num_class=14)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ") and expected in message and "\n" not in message


def test_the_last_label_of_an_image_that_is_named_again(tmp_path):
    """The published lists could not be read for their repetitions, or an image would be counted twice, or with another
    label than the published scripts give it."""
    path = written(tmp_path, b"a.jpg 1\nb.jpg 2\n\n./a.jpg 3\na.jpg 4\nb.jpg 2\n")
    with pytest.warns(DivideMixWarning) as said:
        lines = read_lines(path, num_class=14)
    assert lines == ([b"a.jpg", b"b.jpg"], [4, 2], [5, 6])
    assert len(said) == 1 and str(path) in str(said[0].message) and ": 3; " in str(said[0].message)


def test_lists_that_cannot_be_read_are_refused(tmp_path):
    """A missing, empty or unreadable list would end in a traceback, or in a training set without images."""
    with pytest.raises(DivideMixError, match=r"none\.txt is missing"):
        read_lines(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DivideMixError, match=r"cannot read .*folder\.txt: not a file"):
        read_lines(tmp_path / "folder.txt")
    with pytest.raises(DivideMixError, match="not one line with an image"):
        read_lines(written(tmp_path, b"\n  \n"), 14)
    with pytest.raises(DivideMixError, match="line 1: not UTF-8"):
        read_lines(written(tmp_path, "a.jpg 1\n".encode("utf-16")), 14)


# ---- Tables ----


def test_a_table(tmp_path):
    """Rows would go to other labels, or a line number point to another row."""
    content = '\ufeffid,Label , PATH,path\r\n7,"two\r\nlines? no",a.jpg,x\r\n'.replace("\r\nlines? no", " words")
    content += '\n , ,\n8, 3 ,"b ""c"", d.jpg",y\n9,"x",./e//f.jpg\n'
    found = read_table(written(tmp_path, content.encode()))
    assert found.paths == [b"a.jpg", b'b "c", d.jpg', b"e/f.jpg"] and found.labels == ["two words", "3", "x"]
    assert found.numbers == [2, 5, 6]
    found = read_table(written(tmp_path, b'label,note,path\na,"one\n\ntwo",1.jpg\nb,,2.jpg'))
    assert found.numbers == [2, 5]  # of the line that a row begins in


BAD_ROWS = {
    "no label": (b"b.jpg", "no label, expected `path,label`"),
    "empty label": (b"b.jpg,  ,x", "no label"),
    "no path": (b",cat", "no path"),
    "absolute": (b"/etc/passwd,cat", "'/etc/passwd' is an absolute path"),
    "leaves": (b"a/../../b.jpg,cat", "has a part '..'"),
    "folder": (b"images/,cat", "'images/' is a folder"),
    "duplicate": (b"./a.jpg,dog", "'a.jpg' is already in line 2"),
    "latin-1": (b"caf\xe9.jpg,cat", "not UTF-8"),
    "zero byte": (b"b\0.jpg,cat", "a zero byte"),
    "no path is so long": (b"b" * 5000 + b".jpg,cat", "has 5004 bytes"),
    "a quotation mark that does not close": (b'"b.jpg,cat', "not a row of a CSV file"),
    "text after one": (b'"b".jpg,cat', "not a row of a CSV file"),
    "label of two lines": (b'b.jpg,"a\nb"', "expected printable text"),
    "a field without end": (b"b.jpg," + b"x" * 140_000, "not a row of a CSV file"),
}


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_with_their_line(tmp_path, row, expected):
    """A table from elsewhere could have any file read, count an image twice, or move labels by a row."""
    path = written(tmp_path, b"path,label\na.jpg,cat\n\n" + row + b"\nz.jpg,dog\n")
    with pytest.raises(DivideMixError) as caught:
        read_table(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 4: ") and expected in message and "\n" not in message


def test_tables_without_rows_or_columns_are_refused(tmp_path):
    """A file of another kind beside the images would end in a traceback."""
    for content in (b"", b"\n\n", b"path,label\n", b"\npath,label\n\n"):
        with pytest.raises(DivideMixError, match=r"list\.txt: not one row with an image below a line `path,label`"):
            read_table(written(tmp_path, content))
    for content in (b"path;label\na.jpg;3\n", b"a.jpg,3\nb.jpg,4\n", b"path,labels\na.jpg,3\n"):
        with pytest.raises(
            DivideMixError, match=r"line 1: columns '.*', expected `path,label`, with commas: .* add such a line before"
        ):
            read_table(written(tmp_path, content))
    with pytest.raises(DivideMixError, match=r"none\.csv is missing"):
        read_table(tmp_path / "none.csv")


NASTY_ROWS = [b"path,label\n", b"a.jpg", b",", b"\n", b"/", b"..", b'"', b"\xff", b"\0", b"\r", b"images/", b" "]


@given(st.lists(st.sampled_from(NASTY_ROWS), max_size=14).map(b"".join), st.booleans())
def test_any_bytes_end_in_a_table_or_in_one_line(tmp_path_factory, content, headed):
    """The same for tables as for lists: a traceback, or a file outside the data folder."""
    path = written(tmp_path_factory.getbasetemp(), b"path,label\n" * headed + content)
    try:
        found = read_table(path)
    except DivideMixError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    resolved = [os.path.normpath(b"/d/" + name) for name in found.paths]
    assert all(name.startswith(b"/d/") for name in resolved) and len(set(resolved)) == len(resolved) > 0
    assert all(found.labels) and found.numbers == sorted(found.numbers)


# ---- Any list ----

NASTY = [b"a.jpg", b" ", b"\n", b"/", b"..", b"7", b"\xff", b"\0", b"\r", b"images/", b"1" * 50]


@given(st.one_of(st.binary(max_size=80), st.lists(st.sampled_from(NASTY), max_size=12).map(b"".join)), st.booleans())
@example(b"\xef\xbb\xbf", True)
@pytest.mark.filterwarnings("ignore::dividemix.DivideMixWarning")
def test_any_bytes_end_in_a_list_or_in_one_line(tmp_path_factory, content, labelled):
    """A damaged or hostile list would end in a traceback, or lead to a file outside the data folder."""
    path = written(tmp_path_factory.getbasetemp(), content)
    try:
        lines = read_lines(path, num_class=14 if labelled else None, drop=b"images/")
    except DivideMixError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    images = ImageList(path, "/d", "", lines.paths, lines.labels, 14, lines.numbers)
    resolved = [os.path.normpath(images.path(i)) for i in range(len(images))]
    assert all(name.startswith("/d/") for name in resolved) and len(set(resolved)) == len(resolved) > 0
    assert all(0 <= label < 14 for label in lines.labels)


# ---- Class folders and symbolic links ----


def test_class_folders(tmp_path):
    """A validation image would count for another class, or a stray file would stop the run."""
    for name in ("b/2.JPEG", "b/1.jpg", "b/.hidden.jpg", "b/notes.txt", "a/x.png", "c/unused.jpg", ".git/y.jpg"):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).touch()
    images = list_folders(tmp_path, "val", ["b", "a"])
    assert [images.name(i) for i in range(len(images))] == ["b/1.jpg", "b/2.JPEG", "a/x.png"]
    assert images.path(0) == str(tmp_path / "val/b/1.jpg") and images.where(0) == str(tmp_path / "val")
    assert images.labels.tolist() == [0, 0, 1] and images.num_class == 2


def test_class_folders_missing_or_empty_are_named(tmp_path):
    """Accuracy would be measured on fewer classes than the user believes."""
    (tmp_path / "0").mkdir()
    with pytest.raises(DivideMixError, match="missing: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more"):
        list_folders(tmp_path, "", [str(c) for c in range(15)])
    with pytest.raises(DivideMixError, match="without an image: 0"):
        list_folders(tmp_path, "", ["0"])


def test_images_below_a_folder(tmp_path):
    """Images in deeper folders would be lost, those of a folder with a second name be counted twice; links in a circle
    would never end."""
    for name in ("b/2.JPEG", "b/.hidden.jpg", "b/c/1.pgm", "b-1.png", "notes.txt", ".git/y.jpg", "b/c/x.jpg.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/round").symlink_to(tmp_path)
    (tmp_path / "b/again").symlink_to(tmp_path / "b/c")
    (tmp_path / "b/gone.jpg").symlink_to(tmp_path / "nowhere")  # the reader says that it is missing
    found, others = images_below(tmp_path)
    assert found == [b"b-1.png", b"b/2.JPEG", b"b/again/1.pgm", b"b/gone.jpg"] and others == 2
    with pytest.raises(DivideMixError, match=r"cannot read .*nothing/?: No such file"):
        images_below(tmp_path / "nothing")


def test_symbolic_links_out_of_the_data_folder(tmp_path):
    """A list or archive from elsewhere could have any file of the machine read through a link."""
    root, outside = tmp_path / "data", tmp_path / "data2"
    for folder in (root / "in", outside):
        folder.mkdir(parents=True)
        (folder / "x.jpg").touch()
    links = {"file_out": outside / "x.jpg", "folder_out": outside, "file_in": root / "in/x.jpg", "folder_in": "in"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "in/file_out").symlink_to(outside / "x.jpg")
    (root / "in/folder_out").symlink_to(outside)
    (tmp_path / "secret.jpg").touch()
    (outside / "away.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "link").symlink_to(root)
    for start in (root, tmp_path / "link"):  # the data folder itself may be a link
        boundary = Boundary(start)
        # "folder_out": a folder directly in the data folder may be a link, as for a part of the data on another disk
        for name in ("in/x.jpg", "file_in", "folder_in/x.jpg", "absent/x.jpg", "folder_out/x.jpg"):
            assert boundary.holds(str(start / name)), name
        for name in (
            "file_out",
            "in/file_out",
            "in/folder_out/x.jpg",
            "in/folder_out/absent.jpg",
            "folder_out/away.jpg",
        ):
            assert not boundary.holds(str(start / name)), name
