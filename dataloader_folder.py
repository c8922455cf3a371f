"""Your own images: a folder of class folders, or a CSV table with the columns path and label.

    data = load("./flowers")
    data.train.path(0), data.train.labels[0]     # as given; some of these labels may be wrong
    data.val, data.test                          # None where there is no such part

Training images come from the first of these that is there (D is --data_path, or the folder of a CSV given as such):

    --labels FILE.csv  --data_path FILE.csv  D/train.csv  D/labels.csv      rows path,label; paths below D
    D/train/<class>/...                                                     any depth of folders below a class
    D/<class>/...

and the other two parts from D/val.csv or D/val/<class>/, D/test.csv or D/test/<class>/. Classes are sorted by name, and
by value where all are whole numbers. Lists are read here; images are not, but for the headers that `survey` looks at.
"""

import os
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.filelist import Boundary, ImageList, images_below, is_image, read_table, some
from dividemix.images import BadImage, opened

PARTS = ("train", "val", "test")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixel values in [0, 1]
_GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I")  # Pillow's modes
_LOOKED_AT = 200  # images of which `survey` reads the header


@dataclass(frozen=True)
class Folder:
    name: str  # for the run folder
    train: ImageList
    val: ImageList | None
    test: ImageList | None
    class_names: list[str]
    lines: list[str]  # where the images were found, and what was passed over

    @property
    def num_class(self) -> int:
        return len(self.class_names)

    @property
    def lists(self) -> dict[str, ImageList]:
        """The parts that there are."""
        return {name: images for name in PARTS if (images := getattr(self, name)) is not None}


class Found(NamedTuple):
    """One part as it was read: n images."""

    source: Path  # the CSV file, or the folder that holds the class folders
    folder: str  # where the paths start, below the data folder
    paths: list[bytes]
    labels: list[str]  # (n,), names of classes
    numbers: NDArray[np.int64] | None  # (n,), lines of the CSV file
    passed_over: int  # files that are no images by their names, or in no class folder

    def where(self, i: int) -> str:
        """Where image i is named, for messages."""
        return str(self.source) if self.numbers is None else f"{self.source}, line {self.numbers[i]}"


def load(data_path: str | Path, labels: str | Path | None = None) -> Folder:
    """Reads the parts' lists. Raises DivideMixError, one line that names the file or folder and what to do."""
    root, sources = _sources(data_path, labels)
    parts = {name: _read(name, source, root) for name, source in sources.items()}
    _refuse_shared([*parts.values()])
    classes = class_order(parts["train"].labels)
    if len(classes) < 2:
        raise DivideMixError(f"{sources['train']}: all images are of one class, {classes[0]!r:.100}: nothing to learn")
    lists = {name: _labelled(part, root, classes) for name, part in parts.items()}
    table = labels or (data_path if not _absolute(data_path).is_dir() else "")
    name = "_".join(filter(None, [root.name, Path(table).stem]))
    return Folder(name, lists["train"], lists.get("val"), lists.get("test"), classes, _describe(parts))


def find(data_path: str | Path, labels: str | Path | None = None) -> tuple[dict[str, ImageList], list[str], list[str]]:
    """The lists of the parts, what keeps them from being read (for `check_data.run_check`), and lines on what they are:
    where they were found, and their classes by number."""
    try:
        data = load(data_path, labels)
    except DivideMixError as error:
        return {}, [str(error)], []
    classes = ", ".join(f"{c} {name}" for c, name in enumerate(data.class_names))
    return data.lists, [], [*data.lines, *textwrap.wrap(f"classes: {classes}", 110, subsequent_indent="    ")]


def class_order(names: Iterable[str]) -> list[str]:
    """The distinct names in the order of their labels: by value where all are whole numbers, else by name."""
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in distinct):
        return sorted(distinct, key=int)
    return distinct


# ---- Where the parts are ----


def _sources(data_path: str | Path, labels: str | Path | None) -> tuple[Path, dict[str, Path]]:
    """The data folder, and for each part that there is its CSV file or folder of class folders."""
    given = _absolute(data_path)
    if not given.exists():
        raise DivideMixError(f"--data_path {given} does not exist: give a folder of class folders, or a CSV file")
    if given.is_dir():
        root, table = given, _absolute(labels) if labels else None
    elif labels:
        raise DivideMixError(f"--labels {labels}: --data_path must be the folder of the images, and {given} is a file")
    elif given.suffix.lower() == ".csv":
        root, table = given.parent, given
    else:
        raise DivideMixError(f"--data_path {given}: expected a folder, or a file whose name ends in .csv")
    sources = {"train": table or _training_source(root)}
    for part in PARTS[1:]:
        if (root / f"{part}.csv").is_file():
            sources[part] = root / f"{part}.csv"
        elif (root / part).is_dir() and sources["train"] != root:  # else it is a class of that name
            sources[part] = root / part
    if len(set(sources.values())) < len(sources):
        raise DivideMixError(f"{given} is the table of another part by its name: give one of the training images")
    return root, sources


def _training_source(root: Path) -> Path:
    tables = [root / name for name in ("train.csv", "labels.csv") if (root / name).is_file()]
    if len(tables) > 1:
        raise DivideMixError(f"{root} holds train.csv and labels.csv: give the one that is meant as --data_path")
    if tables:
        return tables[0]
    folders = _folders(root)
    nested = {name for name in PARTS if name in folders and not _holds_images(root / name)}
    classes = [name for name in folders if name not in nested]
    if "train" in nested:
        # Classes of the training images; but beside other class folders it may be a class, of trains.
        if any(images_below(root / name)[0] for name in classes):
            raise DivideMixError(
                f"{root} holds train/ and other folders with images ({some(classes)}): if train/ holds the classes, "
                "move the others away; if it is a class, its images must lie directly in it"
            )
        return root / "train"
    for name in sorted(nested):
        if same := sorted({*_folders(root / name)} & {*classes}):
            raise DivideMixError(
                f"{root} holds class folders and {name}/ with folders of the same names ({some(same)}): move those of "
                f"the training images into {root / 'train'}"
            )
    return root


def _holds_images(folder: Path) -> bool:
    return any(is_image(entry.name) and entry.is_file() for entry in _entries(folder))


def _entries(base: Path) -> list[os.DirEntry]:
    """What is in a folder, but for hidden files and folders. Raises DivideMixError where it cannot be read."""
    try:
        with os.scandir(base) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DivideMixError(f"cannot read {base}: {error.strerror or error}") from error


def _folders(base: Path) -> list[str]:
    """The names of the folders in a folder. Raises DivideMixError for one that cannot name a class."""
    names = [entry.name for entry in _entries(base) if entry.is_dir()]
    for name in names:
        if not name.isprintable():
            shown = repr(os.fsencode(name))
            raise DivideMixError(f"{base}: the folder {shown} has a name that is no printable UTF-8 text: rename it")
        if name != name.strip():  # a table's labels are read without, and would be of another class
            raise DivideMixError(f"{base}: the folder {name!r} has a name that begins or ends with a space: rename it")
    return names


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


# ---- Reading a part ----


def _read(name: str, source: Path, root: Path) -> Found:
    if not source.is_dir():
        table = read_table(source)
        return Found(source, "", table.paths, table.labels, table.numbers, 0)
    names = class_order(_folders(source))
    passed_over = sum(entry.is_file() for entry in _entries(source))
    paths, labels, empty = [], [], []
    for folder in names:
        found, others = images_below(source / folder)
        passed_over += others
        empty += [] if found else [folder]
        paths += [folder.encode() + b"/" + path for path in found]
        labels += [folder] * len(found)
    if not paths:
        raise DivideMixError(
            f"{source}: no class folder with an image in it: expected {source.name}/<class>/<image>, or a CSV file "
            "with a line path,label"
        )
    if empty and name == "train":
        raise DivideMixError(f"{source}: class folders without an image: {some(empty)}: remove them, or fill them")
    return Found(source, source.relative_to(root).as_posix().removeprefix("."), paths, labels, None, passed_over)


def _labelled(part: Found, root: Path, classes: Sequence[str]) -> ImageList:
    """With the classes' numbers. Raises DivideMixError for a class that the training images lack."""
    number = {name: c for c, name in enumerate(classes)}
    labels = [number.get(name, -1) for name in part.labels]
    if -1 in labels:
        i = labels.index(-1)
        raise DivideMixError(
            f"{part.where(i)}: {part.labels[i]!r:.100} is no class of the training images ({some(classes)})"
        )
    return ImageList.build(
        part.source, root, part.folder, part.paths, labels, len(classes), part.numbers, as_shown=True
    )


def _refuse_shared(parts: Sequence[Found]) -> None:
    """Raises DivideMixError for an image that is in two parts: accuracy would be measured on what was trained on."""
    full = [(f"{part.folder}/".encode() if part.folder else b"", part) for part in parts]
    hashes = np.sort([hash(start + path) for start, part in full for path in part.paths])  # smaller than a set of them
    if (hashes[1:] == hashes[:-1]).any():
        first: dict[bytes, tuple[Found, int]] = {}
        for start, part in full:
            for i, path in enumerate(part.paths):
                other, k = first.setdefault(start + path, (part, i))
                if other is not part:
                    shown = (start + path).decode()
                    raise DivideMixError(
                        f"{part.where(i)}: {shown!r:.100} is already in another part ({other.where(k)}): remove one"
                    )


def _describe(parts: dict[str, Found]) -> list[str]:
    lines = [f"{name}: {len(part.paths)} images, {part.source}" for name, part in parts.items()]
    if passed := sum(part.passed_over for part in parts.values()):
        lines.append(f"{passed} files passed over: in no class folder, or without an image's ending")
    return lines


# ---- What kind of images they are ----


class Survey(NamedTuple):
    """Of some of the images, by their headers."""

    looked_at: int
    side: int  # the median short side, px
    smallest: int  # short side
    largest: int  # long side
    grey: bool  # all of them

    def __str__(self) -> str:
        size = f"{self.smallest} px" if self.smallest == self.largest else f"{self.smallest} to {self.largest} px"
        kind = "grey" if self.grey else "colour"
        return f"{kind} images, {size}, short sides' median {self.side} (of {self.looked_at} looked at)"


def survey(images: ImageList) -> Survey:
    """Looks at a part of the images, spread over the list. Raises DivideMixError where none can be read."""
    boundary, sizes, modes, problem = Boundary(images.root), [], set(), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata
        for i in np.unique(np.linspace(0, len(images) - 1, _LOOKED_AT).astype(int)).tolist():
            try:
                with opened(images.path(i), boundary) as (image, _):
                    sizes.append(image.size)
                    modes.add(image.mode)
            except BadImage as error:  # named when it is read; --skip_bad_images may leave it out
                problem = problem or f"{images.path(i)}: {error} ({images.where(i)})"
    if not sizes:
        raise DivideMixError(f"{problem}: nor can any other image be read that was looked at; see --check_data")
    short, long = np.min(sizes, axis=1), np.max(sizes, axis=1)
    return Survey(len(sizes), int(np.median(short)), int(short.min()), int(long.max()), modes <= set(_GREY))


def mean_std(pixels: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of pixel values in [0, 1], for each of three channels: (N, H, W, 3) -> mean, std, of which none is 0."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(3):
        share = np.bincount(pixels[..., channel].reshape(-1), minlength=256) / pixels[..., channel].size
        mean = float(share @ values)
        means.append(mean)
        stds.append(max(float(np.sqrt(share @ (values - mean) ** 2)), 1 / 255))
    return tuple(means), tuple(stds)


def balance(labels: NDArray, names: Sequence[str], limit: float) -> tuple[str, str]:
    """What to say of how many images each class has, and a warning where the largest has over `limit` times as many as
    the smallest ('' where not). labels (N,)."""
    counts = np.bincount(labels, minlength=len(names))
    least, most = int(counts.argmin()), int(counts.argmax())
    ratio = counts[most] / max(counts[least], 1)
    line = f"images of a class: {counts[least]} ({names[least]}) to {counts[most]} ({names[most]}), {ratio:.1f} times"
    warning = (
        f"the largest class has {ratio:.0f} times as many images as the smallest: rare classes have larger losses, so "
        "more of their right labels are taken for wrong, and the penalty pulls predictions towards equal shares"
    )
    return line, warning if ratio > limit else ""
