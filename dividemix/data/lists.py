"""Lists of images with labels: files of lines `path label` or `path`, and folders of classes.

Only the text of a list is read here. Whoever opens the image files finds out whether they exist and whether symbolic
links lead out of the data folder (`Boundary`).
"""

import codecs
import hashlib
import io
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError, warn
from dividemix.files import read_file

_LONGEST = 4096  # bytes of a path, as in Linux; a longer one would make the array of all paths huge
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
IMAGE_SUFFIXES += (".jfif",)  # as Windows names some JPEG files
# of macOS archives, Synology, QNAP, ext4 and Windows, in lower case
SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb")
SYSTEM_FOLDERS += ("lost+found", "$recycle.bin", "system volume information")


@dataclass(eq=False)
class ImageList:
    """N images below `root` with their labels, in arrays without a Python object per image, so that forked worker
    processes share them."""

    source: str  # the list file, or the folder that holds the classes
    root: str  # the data folder; nothing outside it is read
    folder: str  # where the paths start, below root; '' is root itself
    paths: NDArray[np.bytes_]  # (N,), in UTF-8
    labels: NDArray[np.int64]  # (N,)
    num_class: int
    numbers: NDArray[np.int64] | None = None  # (N,), the line of each image in source; None where source is a folder
    as_shown: bool = False  # whether to read them as a viewer shows them (`images.shown`), not the published pixels

    def __post_init__(self) -> None:
        self.source, self.root = str(self.source), str(self.root)
        self.paths, self.labels = np.asarray(self.paths, np.bytes_), np.asarray(self.labels, np.int64)
        self.numbers = None if self.numbers is None else np.asarray(self.numbers, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path i as in the list, below root/folder."""
        return self.paths[i].decode()

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.folder, self.name(i))

    def names(self) -> NDArray[np.bytes_]:
        """All paths below root, (N,)."""
        return np.char.add(f"{self.folder}/".encode(), self.paths) if self.folder else self.paths

    def where(self, i: int) -> str:
        """The list, and the line in it, that names image i; for messages."""
        return self.source if self.numbers is None else f"{self.source}, line {self.numbers[i]}"

    def problem(self, i: int, text: str) -> str:
        """The file of image i, the text of what is wrong with it, and where it is named, on one line."""
        path = self.path(i)
        return f"{printable(path)}: {text} ({self.where(i)})"

    def class_counts(self) -> NDArray[np.int64]:
        """How many images have each label, (num_class,)."""
        return np.bincount(self.labels, minlength=self.num_class)

    def digest(self) -> str:
        """A hash of the paths and labels, whatever the data folder's place."""
        hashes = [hashlib.sha256(array.tobytes()).digest() for array in (self.paths, self.labels)]
        return hashlib.sha256(b"".join(hashes)).hexdigest()

    def select(self, index: NDArray, num_class: int | None = None) -> "ImageList":
        """The images `index` (M,), in that order, as a list of its own."""
        numbers = None if self.numbers is None else self.numbers[index]
        rows = {"paths": self.paths[index], "labels": self.labels[index], "numbers": numbers}
        return replace(self, **rows, num_class=num_class or self.num_class)


# ---- List files and tables ----


class Lines(NamedTuple):
    """The n images that a list file or a table names."""

    paths: list[bytes]
    labels: list  # int from a list file, 0 where its lines are only paths; str from a table
    numbers: list[int] | None  # line numbers, counted from 1


def read_lines(path: Path, num_class: int | None = None, drop: bytes = b"") -> Lines:
    """Reads lines `path label`, or without `num_class` lines `path`, and removes a leading `drop` from each path. An
    image that is named again is taken once, with its last label, and a warning.

    A path may contain spaces. Raises DivideMixError with the file and the line number: not UTF-8; a missing label or
    one that is no whole number from 0 to num_class - 1; a path that is absolute, has a part `..`, or names a folder.
    Blank lines, Windows line ends and a byte-order mark are allowed; a list without any path is not.
    """
    label_of = {str(c).encode(): c for c in range(num_class or 0)}
    labels: dict[bytes, int] = {}
    numbers: dict[bytes, int] = {}
    repeated = 0
    for number, line in numbered_lines(path):
        name, label = line, 0
        if num_class is not None:
            name, *tail = line.rsplit(None, 1)
            if not tail:
                raise bad_line(path, number, f"{line.decode()!r:.100} has no label, expected `path label`")
            if tail[0] not in label_of:
                expected = f"expected a whole number from 0 to {num_class - 1}"
                raise bad_line(path, number, f"label {tail[0].decode()!r:.100}, {expected}")
            label = label_of[tail[0]]
        name = _inside(path, number, name).removeprefix(drop)
        repeated += name in labels
        labels[name], numbers[name] = label, number
    if not labels:
        raise DivideMixError(f"{path}: not one line with an image: use a good copy")
    if repeated:
        warn(f"{path}: lines that name an image again: {repeated}; each image is taken once, with its last label")
    return Lines([*labels], [*labels.values()], [*numbers.values()])


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file, without blank ones, with their numbers, counted from 1."""
    for number, line in enumerate(io.BytesIO(read_text(path)), start=1):
        if stripped := line.strip():
            yield number, stripped


def read_text(path: Path) -> bytes:
    """A file's text in UTF-8; it may also be UTF-16 with a byte-order mark. Raises DivideMixError for a file that is
    missing, cannot be read, or is no such text."""
    try:
        content = read_file(path).removeprefix(codecs.BOM_UTF8)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            content = content.decode("utf-16").encode()
        content.decode()
    except FileNotFoundError as error:
        raise DivideMixError(f"{path} is missing") from error
    except OSError as error:
        raise DivideMixError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DivideMixError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from error
    if content.startswith(b"PK\3\4"):
        raise DivideMixError(f"{path} is a spreadsheet or an archive, expected text: save it as a CSV file")
    if b"\0" in content:
        raise bad_line(path, content.count(b"\n", 0, content.index(b"\0")) + 1, "a zero byte, expected text")
    return content


def _inside(path: Path, number: int, name: bytes) -> bytes:
    """The shortest form of an image's path: `a/./b` and `a//b` become `a/b`. Raises DivideMixError for a path out of
    the data folder or to a folder."""
    shortest = posixpath.normpath(name)
    if name.startswith(b"/"):
        problem = "is an absolute path, expected one below the data folder"
    elif b".." in name.split(b"/"):
        problem = "has a part '..', expected a path that stays in the data folder"
    elif name.endswith((b"/", b"/.")) or shortest == b".":
        problem = "is a folder, expected an image"
    elif len(name) > _LONGEST:
        problem = f"... has {len(name)} bytes, expected at most {_LONGEST}"
    else:
        return shortest
    raise bad_line(path, number, f"{name.decode()!r:.100} {problem}")


def bad_line(path: Path, number: int, problem: str) -> DivideMixError:
    return DivideMixError(f"{path}, line {number}: {problem}: correct or remove the line")


# ---- Class folders ----


def list_folders(root: Path, folder: str, names: Sequence[str]) -> ImageList:
    """The images below root/folder/<name>/, each labelled by the position of <name> in `names`. Raises DivideMixError
    that names the class folders that are missing or hold no image, and as `images_below`."""
    base = root / folder
    if absent := [name for name in names if not os.path.isdir(base / name)]:  # Path.is_dir: OSError for a long name
        raise DivideMixError(f"{base}: class folders missing: {some(absent)}")
    paths, labels, _ = images_of_classes(base, names)
    if empty := [names[c] for c in sorted({*range(len(names))} - {*labels})]:
        raise DivideMixError(f"{base}: class folders without an image: {some(empty)}")
    return ImageList(base, root, folder, paths, labels, len(names))


def images_of_classes(base: Path, names: Sequence[str]) -> tuple[list[bytes], list[int], Counter[str]]:
    """The images below class folders: their paths below `base`, the positions of their classes in `names`, and the
    endings of other files."""
    paths, labels, others = [], [], Counter()
    for c, name in enumerate(names):
        images, other = images_below(base / name)
        paths += [name.encode() + b"/" + path for path in images]
        labels += [c] * len(images)
        others += other
    return paths, labels, others


def images_below(base: Path) -> tuple[list[bytes], Counter[str]]:
    """The images in a folder and all its subfolders: (paths below it, sorted; the endings of other files), without what
    `is_hidden`. Links to folders are followed, so that `Boundary` refuses those that lead out and nothing is silently
    skipped; each folder is taken once, however many links lead to it. Raises DivideMixError for a folder that cannot be
    read and for an image whose name is not UTF-8."""

    def refuse(error: OSError) -> None:
        raise DivideMixError(f"cannot read {error.filename}: {error.strerror or error}") from error

    images, others, visited = [], Counter(), set()
    for folder, folders, files in os.walk(base, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        real_path = os.path.realpath(folder)
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        visible = [name for name in files if not is_hidden(name)]
        start = "" if folder == str(base) else os.path.relpath(folder, base).replace(os.sep, "/") + "/"
        names = [start + name for name in visible if is_image(name)]
        others.update(ending(name) for name in visible if not is_image(name))
        try:
            images += [name.encode() for name in names]
        except UnicodeEncodeError as error:
            name = os.fsencode(os.path.join(base, error.object)).decode(errors="backslashreplace")
            raise DivideMixError(f"{name}: its name is not UTF-8 text: rename it") from error
    return sorted(images), others


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is one that systems and tools leave among images."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def ending(name: str) -> str:
    """'.txt'; '' without one."""
    return os.path.splitext(name)[1].lower()


def absolute(path: str | Path) -> Path:
    """Of a path on the command line; a leading `~` is the home folder."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def printable(name: str) -> str:
    """A name for one line of text."""
    return name if name.isprintable() else repr(name)


def some(names: Sequence[str]) -> str:
    """The first ten names and the number of the others, for messages."""
    end = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(printable, names[:10])) + end


# ---- Symbolic links ----


class Boundary:
    """Tells whether files are inside the data folder once symbolic links are followed.

    The data folder may be a link, and so may the folders directly in it: its owner may keep these on other disks. Each
    folder is resolved once, so a file costs one query.
    """

    def __init__(self, root: str | Path):
        self.root = os.path.abspath(root)
        self._inside: dict[str, bool] = {}

    def holds(self, path: str) -> bool:
        """Whether a path below the data folder, as `ImageList.path` gives it, still is when links are followed. True
        for one that is not below it as written: only the user's own table can name such a file."""
        folder = os.path.dirname(path)
        if folder not in self._inside:
            self._inside[folder] = self._below(folder)
        return self._inside[folder] and (not os.path.islink(path) or self._below(path))

    def _below(self, path: str) -> bool:
        if not os.path.join(os.path.abspath(path), "").startswith(os.path.join(self.root, "")):
            return True
        top = os.path.join(self.root, os.path.relpath(path, self.root).split(os.sep)[0])
        base = os.path.realpath(top if os.path.isdir(top) and os.path.islink(top) else self.root)
        return os.path.commonpath([base, os.path.realpath(path)]) == base
