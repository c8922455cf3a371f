"""Clothing1M: a million shop photos of 14 kinds of clothes, labelled from the text around them (about 61 % right).

    data = load("../../Clothing1M/data")
    data.train.path(0), data.train.labels[0]                      # noisy; the clean training labels are never used
    sample = balanced_sample(data.train.labels, 32_000, 14, rng)  # the images of one epoch

The data folder holds five key lists and the images, which are below `images/` or directly in the folder (the authors'
script expects the latter):

    noisy_train_key_list.txt  clean_val_key_list.txt  clean_test_key_list.txt    a line: images/0/00/name.jpg
    noisy_label_kv.txt        clean_label_kv.txt                                 a line: images/0/00/name.jpg 3
    images/0/00/name.jpg      or      0/00/name.jpg
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.filelist import ImageList, Lines, read_lines

# fmt: off
CLASS_NAMES = [
    "T-Shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker", "Jacket",
    "Downcoat", "Suit", "Shawl", "Dress", "Vest", "Underwear",
]
# fmt: on
NUM_CLASS = len(CLASS_NAMES)
MEAN, STD = (0.6959, 0.6537, 0.6371), (0.3113, 0.3192, 0.3214)  # of pixel values in [0, 1], the authors' figures

_LISTS = {  # name -> keys, labels
    "train": ("noisy_train_key_list.txt", "noisy_label_kv.txt"),
    "val": ("clean_val_key_list.txt", "clean_label_kv.txt"),
    "test": ("clean_test_key_list.txt", "clean_label_kv.txt"),
}


@dataclass(frozen=True)
class Clothing1M:
    train: ImageList  # noisy labels
    val: ImageList  # clean labels, as for test
    test: ImageList
    class_names: list[str]
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    @property
    def num_class(self) -> int:
        return len(self.class_names)


def load(data_path: str | Path) -> Clothing1M:
    """Reads the key lists, not the images. Raises DivideMixError, one line with all that is missing or wrong."""
    lists, problems = find(data_path)
    if problems:
        how = "give the folder that holds the key lists as --data_path"
        raise DivideMixError("; ".join([*problems, how]))
    return Clothing1M(**lists, class_names=CLASS_NAMES[:])


def find(data_path: str | Path) -> tuple[dict[str, ImageList], list[str]]:
    """The lists that can be read, train, val and test, and what is wrong with the others (for `check_data.check`)."""
    root = Path(os.path.abspath(os.path.expanduser(data_path)))
    folder = "images" if (root / "images").is_dir() else ""
    problems: list[str] = []
    files: dict[str, Lines | None] = {}  # None: could not be read, and `problems` says why
    for name in dict.fromkeys(name for pair in _LISTS.values() for name in pair):
        try:
            files[name] = read_lines(root / name, NUM_CLASS if name.endswith("kv.txt") else None, drop=b"images/")
        except DivideMixError as error:
            files[name] = None
            problems.append(str(error))

    lists: dict[str, ImageList] = {}
    for name, (key_file, label_file) in _LISTS.items():
        keys, labeled = files[key_file], files[label_file]
        if keys is None or labeled is None:
            continue
        label_of = dict(zip(labeled.paths, labeled.labels, strict=True))
        labels = np.array([label_of.get(key, -1) for key in keys.paths], np.int64)
        if len(lacking := np.flatnonzero(labels < 0)):
            where = f"{root / key_file}, line {keys.numbers[lacking[0]]}"
            more = f" ({len(lacking)} such lines)" if len(lacking) > 1 else ""
            problems.append(f"{where}: {keys.paths[lacking[0]].decode()!r:.100} has no label in {label_file}{more}")
        else:
            lists[name] = ImageList.build(root / key_file, root, folder, keys.paths, labels, NUM_CLASS, keys.numbers)
    return lists, problems


def balanced_sample(labels: NDArray, n: int, num_class: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """n indices into `labels` (N,), drawn at random but balanced over the classes 0 to num_class - 1.

    The images are gone through in random order, and each is taken while its class has fewer than n / num_class of
    them, until n are drawn. So no class has more than ceil(n / num_class); one that is shorter gives what it has, and
    then fewer than n are returned. The order is that of drawing.
    """
    order = rng.permutation(len(labels))
    drawn = labels[order].astype(np.min_scalar_type(num_class))  # numpy sorts one- and two-byte numbers fast
    by_class = np.argsort(drawn, kind="stable")
    counts = np.bincount(drawn, minlength=num_class)
    # How many of the same class come before, for each image in the random order
    before = np.empty(len(order), np.int64)
    before[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[before * num_class < n][:n]
