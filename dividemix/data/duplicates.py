"""Own images that are there more than once: the same pixels, decoded, upright, at their original size."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from dividemix import warn
from dividemix.data.images import BadImage, read_image
from dividemix.data.lists import ImageList
from dividemix.runtime import available_cores


def equal_images(lists: Mapping[str, ImageList], checksums: NDArray[np.integer]) -> dict[str, NDArray[np.int64]]:
    """For each list the group of each image (n,), numbered across all lists; -1 for an image without an equal.

    checksums (M,): of the resized pixels of all lists, one after the other, 0 for an image that was not read. Only
    images that share a checksum are opened again, to compare all their pixels.
    """
    _, inverse, counts = np.unique(checksums, return_inverse=True, return_counts=True)
    rows = np.flatnonzero((counts[inverse] > 1) & (checksums != 0))
    ends = np.cumsum([len(images) for images in lists.values()])

    def digest(row: int) -> str:
        k = np.searchsorted(ends, row, "right")
        images = [*lists.values()][k]
        try:
            pixels = read_image(images.path(row - ends[k] + len(images)), None, images.as_shown)
        except BadImage:  # since it was read; it equals no other
            return f"row {row}"
        return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()

    with ThreadPoolExecutor(available_cores()) as pool:
        digests = np.array([*pool.map(digest, rows.tolist())], np.str_)
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    groups = np.full(len(checksums), -1)
    groups[rows] = np.where(counts[inverse] > 1, inverse, -1)
    return dict(zip(lists, np.split(groups, ends[:-1]), strict=True))


def first_equal(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of the first image of each image's group within one list (n,), its own for the first; -1 for an image
    that is there once."""
    _, first, inverse, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    return np.where((groups >= 0) & (counts[inverse] > 1), first[inverse], -1)


def describe(lists: Mapping[str, ImageList], groups: Mapping[str, NDArray], held_out: NDArray) -> list[str]:
    """Lines on equal images of the list 'train'. Warns of images in other splits, also among the rows `held_out` of the
    training list, that are training images too."""
    train = lists["train"]
    is_held_out = np.isin(np.arange(len(train)), held_out)
    others = {name: (lists[name], groups[name]) for name in lists if name != "train"}
    others |= {"held out": (train, np.where(is_held_out, groups["train"], -1))} if len(held_out) else {}
    trained_on = np.where(is_held_out, -1, groups["train"])
    for name, (images, group) in others.items():
        if len(rows := np.flatnonzero((group >= 0) & np.isin(group, trained_on))):
            same = train.name(np.flatnonzero(trained_on == group[rows[0]])[0])
            example = f"{images.name(rows[0])} is {same}"
            advice = "accuracies on them say nothing about new images; remove them from one of the two"
            n = len(held_out) if images is train else len(images)
            warn(f"{name}: {len(rows)} of {n} images are training images, too ({example}): {advice}")

    first = first_equal(groups["train"])
    copies = np.flatnonzero((first >= 0) & (first != np.arange(len(first))))
    conflicts = np.unique(first[copies][train.labels[copies] != train.labels[first[copies]]])
    n_agreeing = int((~np.isin(first[copies], conflicts)).sum())
    lines = [f"training images that equal another one with the same label: {n_agreeing}"] if n_agreeing else []
    if len(conflicts):
        listed = "some of these labels are wrong: they come first in label_issues.csv (column duplicate_of)"
        lines.append(f"training images that are there under different labels: {len(conflicts)}; {listed}")
    return lines
