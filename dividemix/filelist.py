"""Lists of images with labels: files with a line `path label` or `path` each, CSV tables, and folders of classes.

    lines = read_lines(Path("info/train_filelist_google.txt"), num_class=1000)
    images = ImageList.build(source, root, "", lines.paths, lines.labels, 1000, lines.numbers)
    images.path(7), images.labels[7], images.where(7)      # the file, its label, "<list file>, line 8"

A list that is kept for a run holds its paths in one run of bytes, with no Python object per image: a million images
take about 60 MB, which forked worker processes share. Reading a list looks at its text alone and refuses what cannot be
right (`read_lines`). Whether the files exist, and whether symbolic links lead out of the data folder (`Boundary`), is
for those who touch the files: `dividemix.check_data`, and whatever opens the images.
"""

import codecs
import csv
import hashlib
import io
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError

# In class folders
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True, eq=False)
class ImageList:
    """N images below `root`, each with a label."""

    source: str  # the list file, or the folder that holds the classes
    root: str  # the data folder: nothing outside it is read
    folder: str  # where the paths start, below root; '' is root itself
    num_class: int
    labels: NDArray[np.int64]  # (N,)
    numbers: NDArray[np.int64] | None  # (N,), the line of each image in source; None where source is a folder
    text: bytes  # all paths, one after the other
    ends: NDArray[np.int64]  # (N + 1,): path i is text[ends[i]:ends[i + 1]]
    as_shown: bool = False  # read as a viewer shows them (`images.shown`); else with the published pixels

    @classmethod
    def build(
        cls,
        source: str | Path,
        root: str | Path,
        folder: str,
        paths: Sequence[bytes],
        labels: Sequence[int] | NDArray,
        num_class: int,
        numbers: Sequence[int] | NDArray | None = None,
        as_shown: bool = False,
    ) -> "ImageList":
        ends = np.zeros(len(paths) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths)), out=ends[1:])
        numbers = None if numbers is None else np.asarray(numbers, np.int64)
        labels = np.asarray(labels, np.int64)
        text = io.BytesIO()
        text.writelines(paths)  # b"".join would take 80 bytes a path beside them
        return cls(str(source), str(root), folder, num_class, labels, numbers, text.getvalue(), ends, as_shown)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path i as in the list, below root/folder."""
        return os.fsdecode(self.text[self.ends[i] : self.ends[i + 1]])

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.folder, self.name(i))

    def names(self) -> NDArray[np.bytes_]:
        """All paths below root, (N,) bytes of one width."""
        folder = os.fsencode(self.folder) + b"/" if self.folder else b""
        ends = self.ends.tolist()
        return np.array([folder + self.text[a:b] for a, b in pairwise(ends)], np.bytes_)

    def where(self, i: int) -> str:
        """Where image i is named, for messages."""
        return self.source if self.numbers is None else f"{self.source}, line {self.numbers[i]}"

    def class_counts(self) -> NDArray[np.int64]:
        """How many images have each label, (num_class,)."""
        return np.bincount(self.labels, minlength=self.num_class)

    def digest(self) -> str:
        """A hash of the names and labels; the same wherever the data folder is."""
        parts = (self.text, self.ends.tobytes(), self.labels.tobytes())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def select(self, index: NDArray, num_class: int | None = None) -> "ImageList":
        """The images `index` (M,), in that order, as a list of its own."""
        paths = [self.text[a:b] for a, b in zip(self.ends[index], self.ends[index + 1], strict=True)]
        numbers = None if self.numbers is None else self.numbers[index]
        labels, num_class = self.labels[index], num_class or self.num_class
        return ImageList.build(self.source, self.root, self.folder, paths, labels, num_class, numbers, self.as_shown)


# ---- List files ----


class Lines(NamedTuple):
    """The n lines of one list file, blank ones left out. An object for each, for the time of reading."""

    paths: list[bytes]
    labels: list[int]  # empty where the lines are paths alone
    numbers: NDArray[np.int64]  # (n,), counted from 1, blank lines included


def read_lines(path: Path, num_class: int | None = None, drop: bytes = b"") -> Lines:
    """Reads lines `path label`, or without `num_class` lines `path`; a leading `drop` is taken off each path.

    A path may contain spaces. Raises DivideMixError with the file and the line number: not UTF-8; a missing label or
    one that is no whole number from 0 to num_class - 1; a path that is absolute, has a part `..`, names a folder, or
    stood there before. Blank lines, Windows line ends and a byte-order mark are no errors. A list without any path is.
    """
    classes = {str(c).encode(): c for c in range(num_class or 0)}
    paths: list[bytes] = []
    labels: list[int] = []
    blank: list[int] = []
    number = 0
    text = _read_text(path)
    odd = b"/." in text or b"//" in text  # to look for these in each line would take as long as all the rest
    for number, line in enumerate(io.BytesIO(text), start=1):  # one by one: a list of the lines is as large as `paths`
        key = line.strip()
        if not key:
            blank.append(number)
            continue
        if num_class is not None:
            key, space, tail = key.rpartition(b" ")
            label = classes.get(tail)
            if label is None or not key or key[-1] in b" \t\v\f\r":  # rare, so worth a closer look, as below
                key, label = _split(path, number, key + space + tail, classes)
            labels.append(label)
        if key[0] in b"./" or key[-1] in b"/" or (odd and (b"/." in key or b"//" in key)):
            key = _tidy(path, number, key)
        paths.append(key.removeprefix(drop))
    numbers = np.delete(np.arange(1, number + 1), np.array(blank, np.int64) - 1)
    if not paths:
        raise DivideMixError(f"{path}: not one line with an image: use a good copy")
    _refuse_repeated(path, paths, numbers)
    return Lines(paths, labels, numbers)


class Table(NamedTuple):
    """The n rows of a CSV file, as `Lines`, but labels as they stand there."""

    paths: list[bytes]
    labels: list[str]
    numbers: NDArray[np.int64]  # (n,), the line that each row begins in


def read_table(path: Path) -> Table:
    """Reads a CSV file whose first line names its columns, `path` and `label` among them; others are passed over.

    Raises DivideMixError with the file and the line number for what `read_lines` refuses of paths and text, for columns
    that are not there, quotation marks that do not close, and rows without a path or a label.
    """
    rows = csv.reader(io.StringIO(_read_text(path).decode(), newline=""), strict=True)
    columns: dict[str, int] | None = None
    paths, labels, numbers = [], [], []
    number = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise _bad(path, number, f"not a row of a CSV file ({error})") from error
        if row is None:
            break
        if not any(map(str.strip, row)):
            pass
        elif columns is None:
            columns = {name.strip().lower(): k for k, name in reversed([*enumerate(row)])}
            if not {"path", "label"} <= columns.keys():
                shown = _show(",".join(row).encode())
                raise DivideMixError(
                    f"{path}, line {number}: columns {shown}, expected `path,label`, with commas: name the columns "
                    "so, or add such a line before the first"
                )
        else:
            key, label = (row[columns[name]].strip() if columns[name] < len(row) else "" for name in ("path", "label"))
            if not key or not label:
                raise _bad(path, number, f"no {'label' if key else 'path'}, expected `path,label`")
            if not label.isprintable():
                raise _bad(path, number, f"label {_show(label.encode())}, expected printable text")
            paths.append(_tidy(path, number, key.encode()))
            labels.append(label)
            numbers.append(number)
        number = rows.line_num + 1
    if not paths:
        raise DivideMixError(f"{path}: not one row with an image below a line `path,label`: use a good copy")
    lines = np.array(numbers, np.int64)
    _refuse_repeated(path, paths, lines)
    return Table(paths, labels, lines)


def _refuse_repeated(path: Path, paths: list[bytes], numbers: NDArray[np.int64]) -> None:
    hashes = np.fromiter(map(hash, paths), np.int64, len(paths))  # smaller than a set of the paths
    hashes.sort()
    if (hashes[1:] == hashes[:-1]).any():
        first: dict[bytes, int] = {}
        for key, number in zip(paths, numbers.tolist(), strict=True):
            if first.setdefault(key, number) != number:
                raise _bad(path, number, f"{_show(key)} is already in line {first[key]}")


def _read_text(path: Path) -> bytes:
    if not path.is_file():
        raise DivideMixError(f"{path} is missing")
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DivideMixError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise _bad(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8 text") from error
    if (zero := data.find(b"\0")) >= 0:
        raise _bad(path, data.count(b"\n", 0, zero) + 1, "a zero byte, expected text")
    return data


def _split(path: Path, number: int, line: bytes, classes: dict[bytes, int]) -> tuple[bytes, int]:
    """A line `path label` with any white space between, or its refusal."""
    key, *rest = line.rsplit(None, 1)
    if not rest:
        raise _bad(path, number, f"{_show(key)} has no label, expected `path label`")
    if rest[0] not in classes:
        expected = f"expected a whole number from 0 to {len(classes) - 1}"
        raise _bad(path, number, f"label {_show(rest[0])}, {expected}")
    return key, classes[rest[0]]


def _tidy(path: Path, number: int, key: bytes) -> bytes:
    """The shortest form of a path (`a/./b` and `a//b` are `a/b`, so that repetitions are seen), or its refusal."""
    if key.startswith(b"/"):
        raise _bad(path, number, f"{_show(key)} is an absolute path, expected one below the data folder")
    if b".." in key.split(b"/"):
        raise _bad(path, number, f"{_show(key)} has a part '..', expected a path that stays in the data folder")
    tidy = posixpath.normpath(key)
    if key.endswith((b"/", b"/.")) or tidy == b".":
        raise _bad(path, number, f"{_show(key)} is a folder, expected an image")
    return tidy


def _bad(path: Path, number: int, what: str) -> DivideMixError:
    return DivideMixError(f"{path}, line {number}: {what}: correct or remove the line")


def _show(key: bytes) -> str:
    text = key.decode()
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


# ---- Class folders ----


def list_folders(root: Path, folder: str, names: Sequence[str]) -> ImageList:
    """The images in root/folder/<name>/, labelled by the position of <name> in `names`, in the order of their names.

    Hidden files, and files whose ending is not that of an image, are passed over. Raises DivideMixError that names
    the class folders that are missing or hold no image.
    """
    base = root / folder
    if absent := [name for name in names if not os.path.isdir(base / name)]:  # Path.is_dir: OSError for a long name
        raise DivideMixError(f"{base}: class folders missing: {some(absent)}")
    paths, labels, empty = [], [], []
    for label, name in enumerate(names):
        try:
            found = sorted(os.fsencode(file) for file in os.listdir(base / name) if is_image(file))
        except OSError as error:
            raise DivideMixError(f"cannot read {base / name}: {error.strerror or error}") from error
        if not found:
            empty.append(name)
        paths += [os.fsencode(name) + b"/" + file for file in found]
        labels += [label] * len(found)
    if empty:
        raise DivideMixError(f"{base}: class folders without an image: {some(empty)}")
    return ImageList.build(base, root, folder, paths, labels, len(names))


def images_below(base: Path) -> tuple[list[bytes], int]:
    """The images in a folder and in all folders in it: (paths below it in the order of their names, how many other
    files were passed over).

    Hidden files and folders do not count. Links to folders are followed, so that those that lead out are refused by
    `Boundary` and not passed over, but for one that leads back to a folder that it is in. Raises DivideMixError for a
    folder that cannot be read and for a name that is not UTF-8.
    """
    found, others = [], 0
    waiting = [("", (os.path.realpath(base),))]  # folders below base, each with the true places that it is in
    while waiting:
        folder, inside = waiting.pop()
        try:
            with os.scandir(os.path.join(base, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = os.path.join(folder, entry.name)
                    try:
                        name.encode()
                    except UnicodeEncodeError as error:
                        shown = os.fsencode(os.path.join(base, name)).decode(errors="backslashreplace")
                        raise DivideMixError(f"{shown}: its name is not UTF-8 text: rename it") from error
                    if entry.is_dir():
                        place = os.path.realpath(entry.path)
                        if place not in inside:
                            waiting.append((name, (*inside, place)))
                    elif is_image(entry.name):
                        found.append(name.encode())
                    else:
                        others += 1
        except OSError as error:
            where = error.filename or os.path.join(base, folder)
            raise DivideMixError(f"cannot read {where}: {error.strerror or error}") from error
    return sorted(found), others


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def some(names: Sequence[str]) -> str:
    """The first ten of them, for messages."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in names[:10]) + more


# ---- Symbolic links ----


class Boundary:
    """Tells whether files are inside the data folder once symbolic links are followed.

    The data folder may be a link, and so may the folders directly in it: whoever put it together said by this where the
    parts are, on other disks perhaps. Each folder on the way is resolved once, so a file costs a single look at its own
    entry.
    """

    def __init__(self, root: str | Path):
        self.root = os.path.abspath(root)
        self._inside: dict[str, bool] = {}

    def holds(self, path: str) -> bool:
        """Whether a path below the data folder, as `ImageList.path` gives it, is so in the end."""
        folder = os.path.dirname(path)
        if folder not in self._inside:
            self._inside[folder] = self._below(folder)
        return self._inside[folder] and (not os.path.islink(path) or self._below(path))

    def _below(self, path: str) -> bool:
        part = os.path.join(self.root, os.path.relpath(path, self.root).split(os.sep)[0])
        base = os.path.realpath(part if os.path.isdir(part) and os.path.islink(part) else self.root)
        return os.path.commonpath([base, os.path.realpath(path)]) == base
