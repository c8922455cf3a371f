"""The images that a run trains on, and those it holds out."""

from pathlib import Path

import numpy as np
import pytest
from helpers.runs import begin, end_epoch, opened, validated
from helpers.trees import make_clothing1M

import dataloader_clothing1M
from dividemix import DivideMixError
from dividemix.run import splits


@pytest.fixture
def tree(tmp_path) -> Path:
    """56 images to train on, 4 of each class."""
    return make_clothing1M(tmp_path / "data", noise=0, sides=(8, 12))


def read(tree: Path) -> dict:
    data = dataloader_clothing1M.load(tree)
    return {"train": data.train, "val": data.val, "test": data.test}


def split_of(tree: Path, folder: Path, skip: str | None = None, **settings) -> splits.Split:
    """That of a run with an epoch more than before."""
    with opened(folder) as run:
        split = splits.split(read(tree), run, skip, **settings)
        begin(run)
        for _ in run.epochs(len(run.records) + 1):
            end_epoch(run, validated())
    return split


def test_rows_are_those_of_the_whole_list_without_bad_and_held_out_images(tree, tmp_path):
    """Else scores name other images, bad ones are trained on, or held-out ones are."""
    lists, bad = read(tree), {0, 5, 30}
    for i in bad:
        Path(lists["train"].path(i)).write_bytes(b"")
    Path(lists["val"].path(1)).unlink()
    split = split_of(tree, tmp_path / "run", "quick", val_fraction=0.25, by_class=True)
    usable = split.lists["train"]
    assert [len(images) for images in split.lists.values()] == [53, 27, 28]
    assert [usable.path(i) for i in split.train] == [lists["train"].path(i) for i in split.index]
    assert sorted([*split.train, *split.held_out]) == [*range(53)] and not bad & {*split.index.tolist()}
    assert len(split.held_out) >= 11 and np.bincount(usable.labels[split.held_out]).max() == 1  # of each class one
    assert any(line.startswith(f"{len(split.held_out)} training images held out ") for line in split.lines)
    labels = np.load(tmp_path / "run" / "labels.npz")
    assert labels["index"].tolist() == split.index.tolist()
    assert labels["given"].tolist() == lists["train"].labels[split.index].tolist()
    assert labels["list_given"].tolist() == lists["train"].labels.tolist()
    assert labels["list_path"].tolist() == lists["train"].names().tolist()


def test_a_continued_run_keeps_to_the_images_that_it_began_with(tree, tmp_path):
    """Rows of samples and divisions would be those of other images: silently another experiment."""
    image = Path(read(tree)["train"].path(3))
    content = image.read_bytes()
    image.write_bytes(b"")
    index = split_of(tree, tmp_path / "run", "quick").index.tolist()
    moved, image = tree.rename(tmp_path / "moved"), tmp_path / "moved" / image.relative_to(tree)  # the same data
    image.write_bytes(content)  # mended: the run goes on without it all the same
    assert split_of(moved, tmp_path / "run").index.tolist() == index and 3 not in index
    with pytest.raises(DivideMixError, match=rf"{moved} .*--fresh"):
        split_of(moved, tmp_path / "run", digests={"classes": "others"})
    file = moved / "noisy_label_kv.txt"
    key, label = file.read_text().splitlines()[0].split()
    with file.open("a") as lines:
        lines.write(f"{key} {(int(label) + 1) % 14}\n")  # the last one counts
    with pytest.raises(DivideMixError, match=rf"{moved} .*--fresh"):
        split_of(moved, tmp_path / "run")


def test_too_few_images(tree, tmp_path):
    """A mixture of two components is not fitted to one loss."""
    images = read(tree)["train"]
    for i in range(1, len(images)):
        Path(images.path(i)).unlink()
    with pytest.raises(DivideMixError, match="at least 2"), pytest.warns(UserWarning):
        split_of(tree, tmp_path / "run", "quick")
