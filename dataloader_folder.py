"""Your own images: a folder of class folders, or a table with columns of paths and labels. D is --data_path, or the
folder of a table given as --data_path. Training images come from the first of these that exists: `--labels FILE.csv`,
`--data_path FILE.csv`, D/train.csv, D/labels.csv, D/train/<class>/..., D/<class>/...; the other splits from the column
split of these tables, D/val.csv or D/val/<class>/..., D/test.csv or D/test/<class>/... Paths in tables are absolute, or
start at D or at the table's folder.
"""

import os
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from numpy.typing import NDArray

from dividemix import DivideMixError, warn
from dividemix.data import (
    TABLE_SUFFIXES,
    BadImage,
    Boundary,
    ImageList,
    Lines,
    Table,
    absolute,
    bad_line,
    correct,
    ending,
    find_files,
    has_splits,
    images_below,
    images_of_classes,
    is_hidden,
    is_image,
    opened,
    printable,
    read_table,
    some,
)

SPLITS = ("train", "val", "test")
_SPLIT_OF = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
_SPLIT_OF |= {"test": "test", "testing": "test"}  # in a table's column split
_UNREAD = (".heic", ".heif", ".avif")  # photos that Pillow does not read
_LONGEST = 4096  # bytes of a path, and letters of a label
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixel values in [0, 1]
_GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I")  # Pillow's modes
_IMBALANCE = 10  # size of the largest class / smallest class from which there is a warning
_SURVEY_SIZE = 200  # images whose headers `survey` reads


@dataclass(frozen=True)
class Folder:
    name: str  # for the name of the run folder
    lists: dict[str, ImageList]  # 'train', and 'val' and 'test' if they exist
    class_names: list[str]
    lines: list[str]  # to print: where the images were found, and how many files were ignored

    @property
    def train(self) -> ImageList:
        return self.lists["train"]

    @property
    def num_class(self) -> int:
        return len(self.class_names)


def load(
    data_path: str | Path,
    labels: str | Path | None = None,
    *,
    path_column: str | None = None,
    label_column: str | None = None,
    corrections: Sequence[str | Path] | None = None,
    skip_bad: bool = False,
    allow_missing: bool = False,
) -> Folder:
    """Reads the lists of the splits. path_column, label_column: names in the first line of every table, where they are
    not found by themselves. corrections: files of decisions on training labels, see `correct`. skip_bad: leaves out the
    rows of tables without a path or a label, and keeps missing images for `usable` to leave out; allow_missing: keeps
    missing images alone. Raises DivideMixError, one line that names the file or folder and what to do."""
    root, sources = _sources(data_path, labels)
    skips = {"skip_empty": skip_bad, "allow_missing": allow_missing or skip_bad}
    splits: dict[str, _Split] = {}
    if labels and (source := _replaced_table(absolute(data_path), root, sources["train"])):
        table = read_table(source, path_column, label_column)
        splits = _read_rows("train", source, root, table, **skips, others_only=True)
    for name, source in sources.items():  # train first: its table may hold the other splits
        if name not in splits and source.is_dir():
            splits[name] = _read_folder(source)
        elif name not in splits:
            table = read_table(source, path_column, label_column)
            splits |= _read_rows(name, source, root, table, **skips)
    splits = {name: splits[name] for name in SPLITS if name in splits}
    classes = class_order(splits["train"].lines.labels)
    if len(classes) < 2:
        raise DivideMixError(f"{sources['train']}: all images are of one class, {classes[0]!r:.100}: nothing to learn")
    lists = {name: _image_list(split, root, classes) for name, split in splits.items()}
    _refuse_shared([*lists.values()])
    lines = []
    if corrections:
        lists["train"], *lines = correct(lists["train"], classes, corrections)
    sizes = [f"{name}: {len(images)} images, {images.source}{splits[name].about}" for name, images in lists.items()]
    lines = [*sizes, *lines]
    if ignored := sum((split.others for split in splits.values()), Counter()):
        kinds = ", ".join(f"{kind or 'no ending'} {n}" for kind, n in ignored.most_common(5))
        place = "not in a class folder, or not named like an image"
        lines.append(f"{ignored.total()} files ignored: {place} (the most frequent: {kinds})")
        if unread := sum(ignored[kind] for kind in _UNREAD):
            warn(f"{unread} photos are left out, since {', '.join(_UNREAD)} cannot be read: save them as JPEG")
    tables = [labels or (data_path if not absolute(data_path).is_dir() else ""), *(corrections or [])]
    return Folder("_".join(filter(None, [root.name, *(Path(table).stem for table in tables)])), lists, classes, lines)


def feature_order(
    data_path: str | Path, labels: str | Path | None, lists: Mapping[str, ImageList], **tables: Any
) -> Mapping[str, ImageList]:
    """The lists in whose order --feature_file has its rows. A table given as `labels` may be sorted or shortened, and
    corrections leave images out: the order is that of --data_path alone, and of `lists` where that has no labels of its
    own. tables: as for `load`."""
    try:
        changed = labels or tables["corrections"]
        return load(data_path, **tables | {"corrections": None}).lists if changed else lists
    except DivideMixError:
        return lists


def find(
    data_path: str | Path, labels: str | Path | None = None, **tables: Any
) -> tuple[dict[str, ImageList], list[str], list[str]]:
    """For `check.run_check`: the lists of the splits, also with missing images, the problems that prevent reading them,
    and lines to print. tables: as for `load`."""
    try:
        data = load(data_path, labels, **tables, allow_missing=True)
    except DivideMixError as error:
        return {}, [str(error)], []
    classes = ", ".join(f"{c} {name}" for c, name in enumerate(data.class_names))
    return data.lists, [], [*data.lines, *textwrap.wrap(f"classes: {classes}", 110, subsequent_indent="    ")]


def class_order(names: Iterable[str]) -> list[str]:
    """The distinct names in the order of their labels: by value if all are whole numbers, else by name."""
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in distinct):
        return sorted(distinct, key=int)
    return distinct


# ---- Where the splits are ----

_TRAINING_TABLES = "train", "labels"  # .csv or .tsv


def _sources(data_path: str | Path, labels: str | Path | None) -> tuple[Path, dict[str, Path]]:
    """The data folder, and the CSV file or folder of class folders of each split that exists."""
    path = absolute(data_path)
    if labels and absolute(labels).is_dir():
        raise DivideMixError(f"--labels {labels} is a folder, expected a table: give class folders as --data_path")
    if not path.exists():
        raise DivideMixError(f"--data_path {path} does not exist: give a folder of class folders, or a CSV file")
    if path.is_dir():
        root, table = path, absolute(labels) if labels else None
    elif path.suffix.lower() in TABLE_SUFFIXES:
        root, table = path.parent, absolute(labels or path)
    else:
        expected = " or ".join(TABLE_SUFFIXES)
        raise DivideMixError(f"--data_path {path}: expected a folder, or a file whose name ends in {expected}")
    sources = {"train": table or _training_source(root)}
    for split in SPLITS[1:]:
        tables = _tables(root, split)
        if len(tables) > 1:
            raise DivideMixError(f"{root} holds {tables[0].name} and {tables[1].name}: remove one of them")
        if tables:
            [sources[split]] = tables
        elif (root / split).is_dir() and sources["train"] != root:  # else it is a class of that name
            if sources["train"].is_file() and _holds_images(root / split):  # those that the table names
                continue
            sources[split] = root / split
    if len(set(sources.values())) < len(sources):
        raise DivideMixError(f"{path} is by its name the table of another split: give one of the training images")
    return root, sources


def _tables(root: Path, *names: str) -> list[Path]:
    """The tables in a data folder that have one of these names, without their ending."""
    files = [root / f"{name}{ending}" for name in names for ending in TABLE_SUFFIXES]
    return [file for file in files if file.is_file()]


def _replaced_table(data_path: Path, root: Path, labels: Path) -> Path | None:
    """The table of a whole data set whose training rows `labels` replace, if there is one."""
    tables = [data_path] if data_path.is_file() else _tables(root, *_TRAINING_TABLES)
    tables = [table for table in tables if table != labels]
    return tables[0] if len(tables) == 1 and has_splits(tables[0]) else None


def _training_source(root: Path) -> Path:
    tables = _tables(root, *_TRAINING_TABLES)
    if len(tables) > 1:
        names = " and ".join(table.name for table in tables)
        raise DivideMixError(f"{root} holds {names}: give one of them as --data_path")
    if tables:
        return tables[0]
    folders = _folders(root)
    for name in folders:
        usual = _SPLIT_OF.get(name.lower(), name)
        if usual != name and _folders(root / name) and not _holds_images(root / name):
            raise DivideMixError(f"{root / name}: a folder of class folders: rename it to {usual}")
    nested = [name for name in SPLITS if name in folders and not _holds_images(root / name)]
    classes = [name for name in folders if name not in nested]
    if "train" in nested:
        # It holds the classes of the training images. But beside class folders it may be a class, of trains.
        if any(images_below(root / name)[0] for name in classes):
            problem = f"{root} holds train/ and other folders with images ({some(classes)})"
            advice = "move the others away, or, if train/ is a class itself, move its images directly into it"
            raise DivideMixError(f"{problem}: {advice}")
        return root / "train"
    for name in nested:
        if same := sorted({*_folders(root / name)} & {*classes}):
            problem = f"{root} holds class folders and {name}/ with folders of the same names ({some(same)})"
            raise DivideMixError(f"{problem}: move those of the training images into {root / 'train'}")
    return root


def _holds_images(folder: Path) -> bool:
    return any(is_image(entry.name) for entry in _entries(folder))


def _entries(base: Path) -> list[os.DirEntry]:
    """The files and folders in a folder, without hidden ones and those of systems."""
    with os.scandir(base) as entries:
        return [entry for entry in entries if not is_hidden(entry.name)]


def _folders(base: Path) -> list[str]:
    """The names of the folders in a folder. Raises DivideMixError for a name that no class can have."""
    names = [entry.name for entry in _entries(base) if entry.is_dir()]
    for name in names:
        if not name.isprintable() or name != name.strip():  # labels in a table are read without outer spaces
            problem = "has a name that is no printable UTF-8 text, or begins or ends with a space"
            raise DivideMixError(f"{base}: the folder {os.fsencode(name)!r} {problem}: rename it")
    return names


# ---- Reading a split ----


class _Split(NamedTuple):
    source: Path  # the table, or the folder of class folders
    lines: Lines  # labelled with the names of the classes
    others: Counter[str]  # the endings of files that are no images
    about: str = ""  # to print behind the source


def _read_folder(source: Path) -> _Split:
    classes = class_order(_folders(source))
    paths, labels, others = images_of_classes(source, classes)
    if not paths:
        expected = f"{source.name}/<class>/<image>, or a CSV file with a line path,label"
        raise DivideMixError(f"{source}: no class folder with an image in it: expected {expected}")
    names = [classes[c] for c in labels]
    if empty := sorted({*classes} - {*names}):
        warn(f"{source}: folders without an image are left out: {some(empty)}")
    others.update(ending(entry.name) for entry in _entries(source) if entry.is_file())
    return _Split(source, Lines(paths, names, None), others)


def _read_rows(
    name: str,
    source: Path,
    root: Path,
    table: Table,
    skip_empty: bool,
    allow_missing: bool,
    others_only: bool = False,
) -> dict[str, _Split]:
    """The rows of a table as the split `name`, or as the splits that the column split of the training table names; with
    `others_only` not those of train."""
    rows, about = table.rows.apply(lambda column: column.str.strip()), table.columns
    split_of = pandas.Series(name, rows.index)
    if name == "train" and "split" in rows:
        split_of = rows["split"].str.lower().map(_SPLIT_OF)
        if split_of.isna().any():
            number = rows.index[split_of.isna()][0]
            expected = f"expected {', '.join(SPLITS)}; a column split of another meaning needs another name"
            raise bad_line(source, number, f"split {rows['split'][number]!r:.100}, {expected}")
    rows = rows.loc[split_of != "train" if others_only else slice(None), ["path", "label"]]
    advice = "correct the table, or leave them out by --skip_bad_images"
    if count := (is_empty := rows.eq("").any(axis=1)).sum():
        first = rows.index[is_empty][:3].tolist()
        problem = f"rows without a path or a label: {count}, first in line {some([*map(str, first)])}"
        if count == len(rows):
            raise DivideMixError(f"{source}, line {first[0]}: no row has a path and a label: use a good copy")
        if not skip_empty:
            raise DivideMixError(f"{source}, line {first[0]}: {problem}: {advice}")
        rows, about = rows[~is_empty], f"{about}; left out: {problem}"
    for label in rows["label"].unique():
        if not label.isprintable() or len(label) > _LONGEST:
            expected = f"expected printable text of at most {_LONGEST} letters"
            raise bad_line(source, rows.index[rows["label"] == label][0], f"label {label!r:.100}, {expected}")
    lines: dict[str, int] = {}
    missing: list[tuple[int, str]] = []
    inside = os.path.join(root, "")
    for number, (file, exists) in zip(
        rows.index.tolist(), find_files(source, rows["path"], [root, source.parent]), strict=True
    ):
        key = file.removeprefix(inside).replace(os.sep, "/")
        if len(key) > _LONGEST:
            raise bad_line(source, number, f"{key!r:.100} ... has {len(key)} letters, expected at most {_LONGEST}")
        if key in lines:
            raise bad_line(source, number, f"{key!r:.100} is already in line {lines[key]}")
        lines[key] = number
        if not exists:
            missing.append((number, file))
    if missing and not allow_missing:
        (number, _), *_ = missing
        first, *others = (printable(place) for _, place in missing[:3])
        problem = f"{len(missing)} of {len(rows)} images are missing" + "".join(f", {place}" for place in others)
        if len(missing) == len(rows):
            advice = "if they are elsewhere, give their folder as the data, and this table as --labels"
        raise DivideMixError(f"{first}: missing ({source}, line {number}); {problem}: {advice}")
    rows = rows.assign(path=[key.encode() for key in lines], split=split_of)  # by line
    parts = {split: rows[rows["split"] == split] for split in rows["split"].unique()}
    if name not in parts and not others_only:
        raise DivideMixError(f"{source}: no row whose split is {name}: nothing to train on")
    return {
        split: _Split(source, Lines([*part["path"]], [*part["label"]], [*part.index]), Counter(), f" ({about})")
        for split, part in parts.items()
    }


def _image_list(split: _Split, root: Path, classes: Sequence[str]) -> ImageList:
    """A split with class numbers as labels. Raises DivideMixError for a class that no training image has."""
    source, lines = split.source, split.lines
    number_of = {name: c for c, name in enumerate(classes)}
    labels = [number_of.get(name, -1) for name in lines.labels]
    folder = source.relative_to(root).as_posix().removeprefix(".") if source.is_dir() else ""
    images = ImageList(source, root, folder, lines.paths, labels, len(classes), lines.numbers, as_shown=True)
    if -1 in labels:
        i = labels.index(-1)
        problem = f"{lines.labels[i]!r:.100} is no class of the training images ({some(classes)})"
        raise DivideMixError(f"{images.where(i)}: {problem}")
    return images


def _refuse_shared(splits: Sequence[ImageList]) -> None:
    """Raises DivideMixError for an image that is in two splits: it would be trained on and then tested."""
    for first, second in combinations(splits, 2):
        shared, i, k = np.intersect1d(first.names(), second.names(), return_indices=True)
        if len(shared):
            problem = f"{shared[0].decode()!r:.100} is in another split, too ({first.where(i[0])})"
            raise DivideMixError(f"{second.where(k[0])}: {problem}: remove one")


# ---- Size, colour and balance of the images ----


class Survey(NamedTuple):
    """Sizes in pixels and colours of some of the images, from their headers."""

    checked: int  # number of images
    side: int  # median of the short sides
    smallest: int  # short side
    largest: int  # long side
    grey: bool  # whether all are grey

    def __str__(self) -> str:
        size = f"{self.smallest} px" if self.smallest == self.largest else f"{self.smallest} to {self.largest} px"
        kind = "grey" if self.grey else "colour"
        return f"{kind} images, {size}, median of the short sides {self.side} px ({self.checked} images checked)"


def survey(images: ImageList) -> Survey:
    """Reads the headers of up to 200 images, spread over the list. Raises DivideMixError if none can be read."""
    boundary, sizes, modes, problem = Boundary(images.root), [], set(), ""
    for i in np.unique(np.linspace(0, len(images) - 1, _SURVEY_SIZE).astype(int)).tolist():
        try:
            with opened(images.path(i), boundary) as (image, _):
                sizes.append(image.size)
                modes.add(image.mode)
        except BadImage as error:  # reported when it is read for training, or left out by --skip_bad_images
            problem = problem or images.problem(i, str(error))
    if not sizes:
        raise DivideMixError(f"{problem}: no other image that was checked can be read; see --check_data")
    short_sides, long_sides = np.min(sizes, axis=1), np.max(sizes, axis=1)
    side, smallest, largest = int(np.median(short_sides)), int(short_sides.min()), int(long_sides.max())
    return Survey(len(sizes), side, smallest, largest, grey=modes <= set(_GREY))


def mean_std(pixels: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, at least 1/255, of each channel of pixels (N, H, W, 3), as values in [0, 1]."""
    values = np.arange(256) / 255
    histograms = [np.bincount(pixels[..., c].reshape(-1), minlength=256) / pixels[..., c].size for c in range(3)]
    means = [float(histogram @ values) for histogram in histograms]
    variances = [histogram @ (values - mean) ** 2 for histogram, mean in zip(histograms, means, strict=True)]
    return tuple(means), tuple(max(float(np.sqrt(variance)), 1 / 255) for variance in variances)


def describe(
    data: Folder, labels: NDArray, tests: Collection[str], mean: Sequence[float], std: Sequence[float], flip: bool
) -> list[str]:
    """The lines that a run prints about its training images, with the labels (N,), and about accuracies and views.
    tests: the names of the sets that are evaluated. Warns of classes with very few images."""
    line, warning = balance(labels, data.class_names, _IMBALANCE)
    if warning:
        warn(warning)
    lines = [f"{len(labels)} images to train on, {data.num_class} classes: {some(data.class_names)}", line]
    if not tests:
        lines.append(
            "nothing is held out: every label is trained on, there is no accuracy, and the last epoch is taken"
        )
    elif "test" not in tests:
        lines.append("no test split: accuracies are measured on the validation images' labels, which may be wrong too")
    lines.append(f"flip {'on (--no_flip turns it off)' if flip else 'off (given)'}")
    source = "ImageNet's" if mean is IMAGENET_MEAN else "of the training images"
    return [*lines, "mean {:.3f} {:.3f} {:.3f}, std {:.3f} {:.3f} {:.3f} ".format(*mean, *std) + f"({source})"]


def balance(labels: NDArray, names: Sequence[str], limit: float) -> tuple[str, str]:
    """A line on the sizes of the classes of `labels` (N,), and a warning if the largest class has more than `limit`
    times as many images as the smallest (else '')."""
    counts = np.bincount(labels, minlength=len(names))
    least, most = int(counts.argmin()), int(counts.argmax())
    ratio = counts[most] / max(counts[least], 1)
    line = f"images of a class: {counts[least]} ({names[least]}) to {counts[most]} ({names[most]}), {ratio:.1f} times"
    warning = (
        f"the largest class has {ratio:.0f} times as many images as the smallest: rare classes have larger losses, so "
        "more of their correct labels look wrong, and the penalty pulls predictions towards classes of equal size"
    )
    return line, warning if ratio > limit else ""
