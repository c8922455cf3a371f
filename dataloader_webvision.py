"""WebVision 1.0, its first 50 classes: photos that a search engine found for the names of ImageNet's classes.

    data = load("./dataset/", num_class=50)
    data.train.path(0), data.train.labels[0]     # noisy: 66,000 images of 50 classes
    data.val, data.imagenet                      # WebVision's and ILSVRC12's validation images of the same classes

The data folder:

    info/train_filelist_google.txt               a line: google/q0001/images000001/name.jpg 0
    info/val_filelist.txt                        a line: val000001.jpg 0
    google/q0001/images000001/name.jpg
    val_images_256/val000001.jpg
    imagenet/val/0/name.JPEG                     one folder per class, named 0 to 49, or by WNID (n01440764 ...) in
                                                 the order of the lines of info/synsets.txt
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dividemix import DivideMixError
from dividemix.filelist import ImageList, list_folders, read_lines

ALL_CLASSES = 1000  # of WebVision 1.0 and ILSVRC12, in the same order
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixel values in [0, 1], ImageNet's


@dataclass(frozen=True)
class WebVision:
    train: ImageList  # noisy labels
    val: ImageList
    imagenet: ImageList
    class_names: list[str]  # from info/synsets.txt; without that file the numbers
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    @property
    def num_class(self) -> int:
        return len(self.class_names)


def load(data_path: str | Path, num_class: int = 50) -> WebVision:
    """Reads the lists of the classes 0 to num_class - 1, not the images. Raises DivideMixError, one line with all that
    is missing or wrong."""
    lists, problems = find(data_path, num_class)
    if problems:
        how = "give the folder that holds info/, google/, val_images_256/ and imagenet/ as --data_path"
        raise DivideMixError("; ".join([*problems, how]))
    synsets = _synsets(_root(data_path))[:num_class]
    names = [f"{wnid} {name}".strip() for wnid, name in synsets] if len(synsets) == num_class else []
    return WebVision(**lists, class_names=names or [str(c) for c in range(num_class)])


def find(data_path: str | Path, num_class: int = 50) -> tuple[dict[str, ImageList], list[str]]:
    """The lists that can be read, train, val and imagenet, and what is wrong with the others (for
    `check_data.check`)."""
    if not 2 <= num_class <= ALL_CLASSES:  # of one class alone all losses are 0
        raise DivideMixError(f"--num_class {num_class}: WebVision has {ALL_CLASSES} classes, expected 2 to that number")
    root = _root(data_path)
    readers: dict[str, Callable[[], ImageList]] = {
        "train": lambda: _read_list(root, "info/train_filelist_google.txt", "", num_class),
        "val": lambda: _read_list(root, "info/val_filelist.txt", "val_images_256", num_class),
        "imagenet": lambda: _imagenet(root, num_class),
    }
    lists, problems = {}, []
    for name, reader in readers.items():
        try:
            lists[name] = reader()
        except DivideMixError as error:
            problems.append(str(error))
    return lists, problems


def _root(data_path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(data_path)))


def _read_list(root: Path, name: str, folder: str, num_class: int) -> ImageList:
    lines = read_lines(root / name, ALL_CLASSES)
    images = ImageList.build(root / name, root, folder, lines.paths, lines.labels, ALL_CLASSES, lines.numbers)
    first_classes = np.flatnonzero(images.labels < num_class)
    if not len(first_classes):
        raise DivideMixError(f"{root / name}: no image of the classes 0 to {num_class - 1}")
    return images.select(first_classes, num_class)


def _imagenet(root: Path, num_class: int) -> ImageList:
    folder, base = "imagenet/val", root / "imagenet" / "val"
    if not base.is_dir():
        raise DivideMixError(f"{base} is missing: it holds a folder of validation images for each class")
    numbered = [str(c) for c in range(num_class)]
    if any((base / name).is_dir() for name in numbered):
        return list_folders(root, folder, numbered)
    wnids = [wnid for wnid, _ in _synsets(root)]
    if len(wnids) < num_class:
        ask = f"info/synsets.txt with the order of the classes (it has {len(wnids)} lines, {num_class} are needed)"
        raise DivideMixError(f"{base} has no folders named 0 to {num_class - 1}; folders named by WNID need {ask}")
    return list_folders(root, folder, wnids[:num_class])


def _synsets(root: Path) -> list[tuple[str, str]]:
    """(WNID, name) in the order of the classes from lines like `n01440764 tench, Tinca tinca`; [] without the file."""
    path = root / "info" / "synsets.txt"
    if not path.is_file():
        return []
    lines = read_lines(path)
    # Split as bytes: text also ends at white space that a line may consist of, such as a wide or a fixed one.
    parts = [[part.decode() for part in line.split(None, 1)] for line in lines.paths]
    first: dict[str, int] = {}
    for (wnid, *_), number in zip(parts, lines.numbers, strict=True):
        if "/" in wnid or wnid.startswith("."):
            raise DivideMixError(f"{path}, line {number}: {wnid!r:.100} cannot be the name of a class folder")
        if first.setdefault(wnid, number) != number:
            raise DivideMixError(f"{path}, line {number}: {wnid!r:.100} is already in line {first[wnid]}")
    return [(wnid, *name, "")[:2] for wnid, *name in parts]
