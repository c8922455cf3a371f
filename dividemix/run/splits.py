"""Choose the images that a run trains on, and those it holds out."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dividemix.data import ImageList, usable
from dividemix.run.run import Run
from dividemix.seeds import hold_out


class Split(NamedTuple):
    """lists: the usable images of each list. index (N,): the images to train on, as rows of the whole training list,
    ascending. train, held_out: rows of lists["train"], which lacks bad images. lines: to print."""

    lists: dict[str, ImageList]
    index: NDArray[np.int64]
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    lines: list[str]


def split(
    lists: Mapping[str, ImageList],
    run: Run,
    skip: str | None,
    *,
    val_fraction: float = 0.0,
    by_class: bool = False,
    digests: Mapping[str, str] | None = None,
) -> Split:
    """Leave bad images out (`usable`), and hold out val_fraction of the training images to select the best epoch, with
    `by_class` the same fraction of each class. digests: hashes of other data that must not change during a run. Saves
    the training labels. Raises DivideMixError for other lists than at the run's first start, and too few images."""
    hashes = {name: images.digest() for name, images in lists.items()} | dict(digests or {})
    train = lists["train"]
    run.pin("images_sha256", hashes, f"the images or labels in {train.root} are not those {run.folder} began with")
    rows, lines = usable(lists, skip, run.folder / "skipped.json", run.ranks)
    labels = train.labels if by_class else None
    index, held_out = hold_out(np.arange(len(train)), val_fraction, run.args.seed, labels)
    index, held_out = (numbers[np.isin(numbers, rows["train"])] for numbers in (index, held_out))
    hold_out(index, 0, run.args.seed)  # raises for too few
    if len(held_out):
        drawn = f"drawn by seed {run.args.seed}, to select the best epoch"
        lines.append(f"{len(held_out)} training images held out with their labels, {drawn}")
    every_label = {"list_given": train.labels, "list_path": train.names()}
    run.save_labels(index=index, held_out=held_out, given=train.labels[index], **every_label)
    usable_rows = (np.searchsorted(rows["train"], numbers) for numbers in (index, held_out))
    return Split({name: images.select(rows[name]) for name, images in lists.items()}, index, *usable_rows, lines)
