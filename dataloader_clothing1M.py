"""Clothing1M: a million shop photos of 14 kinds of clothes, labelled from the text around them (about 61 % right). The
clean training labels are never used. The data folder holds five lists and the images, which are below `images/` or
directly in it: `noisy_train_key_list.txt`, `clean_val_key_list.txt`, `clean_test_key_list.txt` with lines like
`images/0/00/name.jpg`; `noisy_label_kv.txt` and `clean_label_kv.txt` with lines like `images/0/00/name.jpg 3`.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.data import ImageList, Lines, absolute, read_lines

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
        raise DivideMixError("; ".join([*problems, "give the folder that holds the key lists as --data_path"]))
    return Clothing1M(**lists, class_names=CLASS_NAMES[:])


def find(data_path: str | Path) -> tuple[dict[str, ImageList], list[str]]:
    """The lists that can be read, train, val and test, and what is wrong with the others (for `check.check`)."""
    root = absolute(data_path)
    folder = "images" if (root / "images").is_dir() else ""
    problems: list[str] = []

    @cache
    def read(name: str) -> Lines | None:
        try:
            return read_lines(root / name, NUM_CLASS if name.endswith("kv.txt") else None, drop=b"images/")
        except DivideMixError as error:
            problems.append(str(error))

    lists: dict[str, ImageList] = {}
    for name, (key_file, label_file) in _LISTS.items():
        keys, labeled = read(key_file), read(label_file)
        if keys and labeled:
            label_of = dict(zip(labeled.paths, labeled.labels, strict=True))
            labels = [label_of.get(path, -1) for path in keys.paths]
            images = ImageList(root / key_file, root, folder, keys.paths, labels, NUM_CLASS, keys.numbers)
            if -1 in labels:
                i = labels.index(-1)
                lacking = f"{images.name(i)!r:.100} has no label in {label_file} ({labels.count(-1)} such lines)"
                problems.append(f"{images.where(i)}: {lacking}")
            else:
                lists[name] = images
    return lists, problems


def balanced_sample(labels: NDArray, n: int, num_class: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """n indices into `labels` (N,), drawn at random but balanced over the classes 0 to num_class - 1.

    The images are gone through in random order, and each is taken while its class has fewer than n / num_class of
    them, until n are drawn. So no class has more than ceil(n / num_class); one that is shorter gives what it has, and
    then fewer than n are returned. The order is that of drawing.
    """
    import pandas

    order = rng.permutation(len(labels))
    before = pandas.Series(order).groupby(labels[order]).cumcount()  # images of the same class that come before
    return order[before.to_numpy() * num_class < n][:n]
