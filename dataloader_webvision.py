"""WebVision 1.0, its first 50 classes: photos that a search engine found for the names of ImageNet's classes. The data
folder holds `info/train_filelist_google.txt` with lines like `google/q0001/images000001/name.jpg 0` (noisy labels),
`info/val_filelist.txt` with lines like `val000001.jpg 0` (in `val_images_256/`), these images, and `imagenet/val/` with
a folder for each class of ILSVRC12, named 0 to 49, or by WNID (n01440764 ...) in the order of `info/synsets.txt`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dividemix import DivideMixError
from dividemix.data import ImageList, absolute, bad_line, list_folders, numbered_lines, read_lines

ALL_CLASSES = 1000  # of WebVision 1.0 and ILSVRC12, in the same order
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixel values in [0, 1]


@dataclass(frozen=True)
class WebVision:
    train: ImageList  # noisy labels
    val: ImageList
    imagenet: ImageList
    class_names: list[str]  # from info/synsets.txt; without that file, the numbers
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD


def load(data_path: str | Path, num_class: int = 50) -> WebVision:
    """Reads the lists of the classes 0 to num_class - 1, not the images. Raises DivideMixError, one line with
    everything that is missing or wrong."""
    lists, problems = find(data_path, num_class)
    if problems:
        advice = "give the folder that holds info/, google/, val_images_256/ and imagenet/ as --data_path"
        raise DivideMixError("; ".join([*problems, advice]))
    synsets = _synsets(absolute(data_path))[:num_class]
    names = [f"{wnid} {name}".strip() for wnid, name in synsets] if len(synsets) == num_class else []
    return WebVision(**lists, class_names=names or [str(c) for c in range(num_class)])


def find(data_path: str | Path, num_class: int = 50) -> tuple[dict[str, ImageList], list[str]]:
    """The lists that can be read, of 'train', 'val' and 'imagenet', and what is wrong with the others."""
    if not 2 <= num_class <= ALL_CLASSES:  # with one class, all losses are 0
        raise DivideMixError(f"--num_class {num_class}: expected 2 to {ALL_CLASSES}, the number of WebVision's classes")
    root = absolute(data_path)
    readers = {
        "train": partial(_read_list, root, "info/train_filelist_google.txt", "google"),
        "val": partial(_read_list, root, "info/val_filelist.txt", "val_images_256"),
        "imagenet": partial(_imagenet, root),
    }
    lists, problems = {}, []
    for name, reader in readers.items():
        try:
            lists[name] = reader(num_class)
        except DivideMixError as error:
            problems.append(str(error))
    return lists, problems


def _read_list(root: Path, name: str, folder: str, num_class: int) -> ImageList:
    lines = read_lines(root / name, ALL_CLASSES, drop=f"{folder}/".encode())  # some lists have it, some do not
    images = ImageList(root / name, root, folder, lines.paths, lines.labels, ALL_CLASSES, lines.numbers)
    first_classes = np.flatnonzero(images.labels < num_class)
    if not len(first_classes):
        raise DivideMixError(f"{root / name}: no image of the classes 0 to {num_class - 1}")
    return images.select(first_classes, num_class)


def _imagenet(root: Path, num_class: int) -> ImageList:
    folder, base = "imagenet/val", root / "imagenet" / "val"
    if not base.is_dir():
        raise DivideMixError(f"{base} is missing: expected a folder of validation images for each class in it")
    numbered = [str(c) for c in range(num_class)]
    if any((base / name).is_dir() for name in numbered):
        return list_folders(root, folder, numbered)
    wnids = [wnid for wnid, _ in _synsets(root)]
    if len(wnids) < num_class:
        needed = f"info/synsets.txt with the order of the classes (it has {len(wnids)} lines, {num_class} are needed)"
        raise DivideMixError(f"{base} has no folders named 0 to {num_class - 1}; folders named by WNID need {needed}")
    return list_folders(root, folder, wnids[:num_class])


def _synsets(root: Path) -> list[tuple[str, str]]:
    """(WNID, name) of each class in order, from lines like `n01440764 tench, Tinca tinca`; [] without the file."""
    path = root / "info" / "synsets.txt"
    if not path.is_file():
        return []
    names: dict[str, str] = {}
    for number, line in numbered_lines(path):
        wnid, *name = (text.decode() for text in line.split(None, 1))
        if "/" in wnid or wnid.startswith(".") or wnid in names:
            raise bad_line(path, number, f"{wnid!r:.100} is no name of a class folder, or is in two lines")
        names[wnid] = "".join(name)
    return [*names.items()]
