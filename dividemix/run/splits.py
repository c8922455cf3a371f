"""Choose the images that a run trains on, and those it holds out; read the features of the images."""

from argparse import Namespace
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dividemix import networks
from dividemix.data import ImageList, Pipeline, features, usable
from dividemix.run.description import BACKBONE
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

    @property
    def sets(self) -> dict[str, tuple[str, NDArray[np.int64]]]:
        """The data sets, training first: name -> list, rows in it. Without "val" and "test" nothing is evaluated."""
        whole = {name: (name, np.arange(len(images))) for name, images in self.lists.items()}
        held_out = {"val": ("train", self.held_out)} if len(self.held_out) else {}
        return whole | {"train": ("train", self.train)} | held_out


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
    what = "the images or labels (also of --labels or --corrections)"
    run.pin("images_sha256", hashes, f"{what} in {train.root} are not those {run.folder} began with")
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


def read_features(
    args: Namespace, split: Split, run: Run, pipeline: Pipeline, order: Mapping[str, ImageList]
) -> dict[str, NDArray[np.floating]]:
    """The features (V, N, D) of each list of the split: of --feature_file, whose rows are the images of `order`, or of
    the frozen network. Raises DivideMixError for a file that does not fit, or is not that with which the run began."""
    place = args.feature_file or args.cache_dir or run.folder / "features"
    if args.feature_file:
        stored = features.read_file(place, split.lists, order)
    else:
        net = networks.frozen(args.arch, args.width, args.weights, run.folder / BACKBONE, run.runtime, run.begun)
        stored = features.of_network(net, pipeline, place, args.feature_views, run.say)
    run.pin("features", features.digest(stored), f"{place} does not hold the features with which {run.folder} began")
    return stored
