"""Your own images: a folder of class folders, or a CSV table with the columns path and label. Training images come from
the first of these that is there: `--labels FILE.csv`, `--data_path FILE.csv`, D/train.csv, D/labels.csv (paths below
D), D/train/<class>/..., D/<class>/... (D is --data_path, or the folder of a CSV given as such); the other two parts
from D/val.csv or D/val/<class>/, D/test.csv or D/test/<class>/. Images are not read here, but for some headers.
"""

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.data import (
    BadImage,
    Boundary,
    ImageList,
    Lines,
    absolute,
    images_below,
    images_of_classes,
    is_image,
    opened,
    read_table,
    some,
)

PARTS = ("train", "val", "test")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixel values in [0, 1]
_GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I")  # Pillow's modes
_LOOKED_AT = 200  # images of which `survey` reads the header


@dataclass(frozen=True)
class Folder:
    name: str  # for the run folder
    lists: dict[str, ImageList]  # of 'train', 'val' and 'test' those that there are
    class_names: list[str]
    lines: list[str]  # where the images were found, and what was passed over

    @property
    def train(self) -> ImageList:
        return self.lists["train"]

    @property
    def num_class(self) -> int:
        return len(self.class_names)


def load(data_path: str | Path, labels: str | Path | None = None) -> Folder:
    """Reads the parts' lists. Raises DivideMixError, one line that names the file or folder and what to do."""
    root, sources = _sources(data_path, labels)
    parts = {name: _read(source, may_be_empty=name != "train") for name, source in sources.items()}
    classes = class_order(parts["train"][0].labels)
    if len(classes) < 2:
        raise DivideMixError(f"{sources['train']}: all images are of one class, {classes[0]!r:.100}: nothing to learn")
    lists = {name: _labelled(sources[name], root, lines, classes) for name, (lines, _) in parts.items()}
    _refuse_shared([*lists.values()])
    lines = [f"{name}: {len(images)} images, {images.source}" for name, images in lists.items()]
    if passed_over := sum(others for _, others in parts.values()):
        lines.append(f"{passed_over} files passed over: in no class folder, or without an image's ending")
    table = labels or (data_path if not absolute(data_path).is_dir() else "")
    return Folder("_".join(filter(None, [root.name, Path(table).stem])), lists, classes, lines)


def find(data_path: str | Path, labels: str | Path | None = None) -> tuple[dict[str, ImageList], list[str], list[str]]:
    """The lists of the parts, what keeps them from being read (for `check.run_check`), and lines on what they are:
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
    given = absolute(data_path)
    if not given.exists():
        raise DivideMixError(f"--data_path {given} does not exist: give a folder of class folders, or a CSV file")
    if given.is_dir():
        root, table = given, absolute(labels) if labels else None
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
    nested = [name for name in PARTS if name in folders and not _holds_images(root / name)]
    classes = [name for name in folders if name not in nested]
    if "train" in nested:
        # Classes of the training images; but beside other class folders it may be a class, of trains.
        if any(images_below(root / name)[0] for name in classes):
            mixed = f"{root} holds train/ and other folders with images ({some(classes)})"
            how = "move the others away, or, if train/ is a class itself, its images directly into it"
            raise DivideMixError(f"{mixed}: {how}")
        return root / "train"
    for name in nested:
        if same := sorted({*_folders(root / name)} & {*classes}):
            mixed = f"{root} holds class folders and {name}/ with folders of the same names ({some(same)})"
            raise DivideMixError(f"{mixed}: move those of the training images into {root / 'train'}")
    return root


def _holds_images(folder: Path) -> bool:
    return any(is_image(entry.name) for entry in _entries(folder))


def _entries(base: Path) -> list[os.DirEntry]:
    """What is in a folder, but for hidden files and folders."""
    with os.scandir(base) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _folders(base: Path) -> list[str]:
    """The names of the folders in a folder. Raises DivideMixError for one that cannot name a class."""
    names = [entry.name for entry in _entries(base) if entry.is_dir()]
    for name in names:
        if not name.isprintable() or name != name.strip():  # a table's labels are read without spaces around
            problem = "has a name that is no printable UTF-8 text, or begins or ends with a space"
            raise DivideMixError(f"{base}: the folder {os.fsencode(name)!r} {problem}: rename it")
    return names


# ---- Reading a part ----


def _read(source: Path, may_be_empty: bool) -> tuple[Lines, int]:
    """A part's images, with the names of their classes, and how many other files there are."""
    if not source.is_dir():
        return read_table(source), 0
    classes = class_order(_folders(source))
    paths, labels, others = images_of_classes(source, classes)
    if not paths:
        expected = f"{source.name}/<class>/<image>, or a CSV file with a line path,label"
        raise DivideMixError(f"{source}: no class folder with an image in it: expected {expected}")
    names = [classes[c] for c in labels]
    if not may_be_empty and (empty := sorted({*classes} - {*names})):
        raise DivideMixError(f"{source}: class folders without an image: {some(empty)}: remove them, or fill them")
    return Lines(paths, names, None), others + sum(entry.is_file() for entry in _entries(source))


def _labelled(source: Path, root: Path, lines: Lines, classes: Sequence[str]) -> ImageList:
    """With the classes' numbers. Raises DivideMixError for a class that the training images lack."""
    number = {name: c for c, name in enumerate(classes)}
    labels = [number.get(name, -1) for name in lines.labels]
    folder = source.relative_to(root).as_posix().removeprefix(".") if source.is_dir() else ""
    images = ImageList(source, root, folder, lines.paths, labels, len(classes), lines.numbers, as_shown=True)
    if -1 in labels:
        i = labels.index(-1)
        unknown = f"{lines.labels[i]!r:.100} is no class of the training images ({some(classes)})"
        raise DivideMixError(f"{images.where(i)}: {unknown}")
    return images


def _refuse_shared(parts: Sequence[ImageList]) -> None:
    """Raises DivideMixError for an image that is in two parts: accuracy would be measured on what was trained on."""
    for first, second in combinations(parts, 2):
        shared, i, k = np.intersect1d(first.names(), second.names(), return_indices=True)
        if len(shared):
            known = f"{shared[0].decode()!r:.100} is already in another part ({first.where(i[0])})"
            raise DivideMixError(f"{second.where(k[0])}: {known}: remove one")


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
    for i in np.unique(np.linspace(0, len(images) - 1, _LOOKED_AT).astype(int)).tolist():
        try:
            with opened(images.path(i), boundary) as (image, _):
                sizes.append(image.size)
                modes.add(image.mode)
        except BadImage as error:  # named when it is read; --skip_bad_images may leave it out
            problem = problem or images.problem(i, str(error))
    if not sizes:
        raise DivideMixError(f"{problem}: nor can any other image be read that was looked at; see --check_data")
    short, long = np.min(sizes, axis=1), np.max(sizes, axis=1)
    return Survey(len(sizes), int(np.median(short)), int(short.min()), int(long.max()), modes <= set(_GREY))


def mean_std(pixels: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of pixel values in [0, 1], for each of three channels: (N, H, W, 3) -> mean, std, of which none is 0."""
    values = np.arange(256) / 255
    shares = [np.bincount(pixels[..., c].reshape(-1), minlength=256) / pixels[..., c].size for c in range(3)]
    means = [float(share @ values) for share in shares]
    variances = [share @ (values - mean) ** 2 for share, mean in zip(shares, means, strict=True)]
    return tuple(means), tuple(max(float(np.sqrt(variance)), 1 / 255) for variance in variances)


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
