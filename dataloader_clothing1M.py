"""Clothing1M: a million shop photos in 14 classes, labelled from the text around them (about 61 % correct). The clean
training labels are never used. The data folder holds five lists: `noisy_train_key_list.txt`, `clean_val_key_list.txt`
and `clean_test_key_list.txt` with lines like `images/0/00/name.jpg`; `noisy_label_kv.txt` and `clean_label_kv.txt` with
lines like `images/0/00/name.jpg 3`. The images are in the folder `images` in it, or directly in it (`0/00/name.jpg`).
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
MEAN, STD = (0.6959, 0.6537, 0.6371), (0.3113, 0.3192, 0.3214)  # of pixel values in [0, 1], the authors' numbers

_LISTS = {  # split -> (file of the keys, which are paths; file of the labels)
    "train": ("noisy_train_key_list.txt", "noisy_label_kv.txt"),
    "val": ("clean_val_key_list.txt", "clean_label_kv.txt"),
    "test": ("clean_test_key_list.txt", "clean_label_kv.txt"),
}


@dataclass(frozen=True)
class Clothing1M:
    train: ImageList  # noisy labels
    val: ImageList  # clean labels
    test: ImageList  # clean labels
    class_names: list[str]
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD


def load(data_path: str | Path) -> Clothing1M:
    """Reads the lists, not the images. Raises DivideMixError, one line with everything that is missing or wrong."""
    lists, problems = find(data_path)
    if problems:
        raise DivideMixError("; ".join([*problems, "give the folder that holds the key lists as --data_path"]))
    return Clothing1M(**lists, class_names=CLASS_NAMES[:])


def find(data_path: str | Path) -> tuple[dict[str, ImageList], list[str]]:
    """The lists that can be read, of 'train', 'val' and 'test', and what is wrong with the others."""
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
        keys, labelled = read(key_file), read(label_file)
        if keys and labelled:
            label_of = dict(zip(labelled.paths, labelled.labels, strict=True))
            labels = [label_of.get(path, -1) for path in keys.paths]
            images = ImageList(root / key_file, root, folder, keys.paths, labels, NUM_CLASS, keys.numbers)
            if -1 in labels:
                i = labels.index(-1)
                problem = f"{images.name(i)!r:.100} has no label in {label_file} ({labels.count(-1)} such lines)"
                problems.append(f"{images.where(i)}: {problem}")
            else:
                lists[name] = images
    return lists, problems


def balanced_sample(labels: NDArray, n: int, num_class: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """n indices into `labels` (N,), drawn at random and balanced over the classes 0 to num_class - 1, in random order.

    In a random order of all images, an image is taken if its class has fewer than n / num_class so far, until n are
    taken. So no class has more than ceil(n / num_class). A class with fewer images gives all of them; the result can
    then be shorter than n.
    """
    import pandas

    order = rng.permutation(len(labels))
    earlier = pandas.Series(order).groupby(labels[order]).cumcount()  # images of the same class earlier in this order
    return order[earlier.to_numpy() * num_class < n][:n]
