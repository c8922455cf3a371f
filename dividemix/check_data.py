"""What is wrong with a data folder, in one list, before hours of training (`--check_data`), or left out of it
(`--skip_bad_images`).

    run_check(dataloader_clothing1M.find(data_path))      # prints the report; an error where training could not run

    index, lines = usable(lists, "quick", run.folder / "skipped.json", ranks)   # all but the bad ones

By default the header and the end of every file are read: a file that starts as an image and ends as JPEG and PNG files
end is taken for sound, any other is decoded and this decides. `full` decodes all. Symbolic links that lead out of the
data folder count as unreadable.
"""

import json
import os
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dividemix import DivideMixError, warn
from dividemix.checkpoint import read_file, write_atomically
from dividemix.filelist import Boundary, ImageList
from dividemix.images import MISSING, BadImage, load, opened
from dividemix.ranks import Ranks, from_environment
from dividemix.runtime import available_cores
from dividemix.seeds import hold_out

if TYPE_CHECKING:
    from dividemix.run import Run

Record = dict[str, dict[str, Any]]  # list name -> {"total": images in the list, "bad": {name in the list: reason}}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xae\x42\x60\x82"}
_SHOWN = 10  # bad images named per list
_CHUNK = 256  # images a thread looks at in one go


@dataclass(frozen=True, eq=False)
class ListReport:
    """One list: how many of its images are there and can be read."""

    name: str  # 'train', 'val', ...
    images: ImageList
    bad: NDArray[np.int64]  # (M,), which images are missing or unreadable, ascending
    reasons: list[str]  # M, as `problem` says it

    @property
    def total(self) -> int:
        return len(self.images)

    @property
    def missing(self) -> int:
        return self.reasons.count(MISSING)

    @property
    def unreadable(self) -> int:
        """There, but damaged, not an image, or outside the data folder."""
        return len(self.bad) - self.missing

    @property
    def exist(self) -> int:
        return self.total - self.missing

    @property
    def first_bad(self) -> list[str]:
        """The first ten missing or unreadable images, one line each."""
        first = zip(self.bad[:_SHOWN].tolist(), self.reasons, strict=False)
        return [f"{_printable(self.images.path(i))}: {what} ({self.images.where(i)})" for i, what in first]

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """(num_class,), by the labels in the list, of all its images."""
        return self.images.class_counts()

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.exist} of {self.total} images exist, {self.unreadable} of them unreadable"]
        lines += [f"  {line}" for line in self.first_bad]
        if (more := len(self.bad) - _SHOWN) > 0:
            lines.append(f"  and {more} more")
        counts = ", ".join(f"{c}: {count}" for c, count in enumerate(self.class_counts))
        lines += textwrap.wrap(f"images of each class: {counts}", 110, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The whole data folder; `str()` is what the user reads."""

    lists: list[ListReport]
    problems: list[str]  # what kept lists from being read: missing files, bad lines
    full: bool

    @property
    def ok(self) -> bool:
        """Whether training could run as it is, without --skip_bad_images."""
        return bool(self.lists) and not self.problems and not any(len(r.bad) for r in self.lists)

    def record(self) -> Record:
        """Which images of which list are bad, by their names in it, and why: fit for JSON."""
        return {
            r.name: {
                "total": r.total,
                "bad": {r.images.name(i): what for i, what in zip(r.bad.tolist(), r.reasons, strict=True)},
            }
            for r in self.lists
        }

    def __str__(self) -> str:
        how = "every image decoded" if self.full else "header and end of every image read"
        verdict = "the data are complete" if self.ok else "training cannot run on these data as they are"
        return "\n".join([*self.problems, *map(str, self.lists), f"{verdict} ({how})"])


def check(
    lists: Mapping[str, ImageList], problems: Iterable[str] = (), full: bool = False, threads: int | None = None
) -> Report:
    """Looks at every image of `lists`. `problems`: what was found while the lists were read, to stand in the report.

    threads: default 4 per core, as most of the time goes into waiting for the disk. Shows progress on a terminal.
    """
    threads = threads or min(4 * available_cores(), 64)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata; what it cannot read is an exception
        reports = [_check_list(name, images, full, pool) for name, images in lists.items()]
    return Report(reports, list(problems), full)


def _check_list(name: str, images: ImageList, full: bool, pool: ThreadPoolExecutor) -> ListReport:
    boundary = Boundary(images.root)

    def look(start: int) -> list[tuple[int, str]]:
        part = range(start, min(start + _CHUNK, len(images)))
        return [(i, what) for i in part if (what := problem(images.path(i), boundary, full, images.as_shown))]

    bad: list[tuple[int, str]] = []
    starts = range(0, len(images), _CHUNK)
    for found in tqdm(pool.map(look, starts), name, len(starts), leave=False, disable=None, unit_scale=_CHUNK):
        bad += found
    return ListReport(name, images, np.array([i for i, _ in bad], np.int64), [what for _, what in bad])


def run_check(
    found: tuple[Mapping[str, ImageList], list[str]], full: bool = False, skip: bool = False, about: Sequence[str] = ()
) -> None:
    """`--check_data`: prints the report on what a data loader's `find` found, after the lines `about`, and with `skip`
    what --skip_bad_images would leave. Raises DivideMixError where training could not run. Of several ranks the first
    looks."""
    if from_environment()[0] != 0:
        return
    lists, problems = found
    report = check(lists, problems, full)
    print(*about, report, sep="\n", flush=True)
    if report.ok:
        return
    can_skip = bool(lists) and not problems  # the bad images are all that is wrong
    if not (skip and can_skip):
        how = "mend the data folder" + ", or leave the bad images out by --skip_bad_images" * can_skip
        raise DivideMixError(f"training cannot run on these data, for what the report names: {how}")
    left = sound(lists, report.record())
    leaves = ", ".join(f"{name}: {len(left[name])} of {len(lists[name])} images" for name in lists)
    print(f"with --skip_bad_images it can, on {leaves}", flush=True)


# ---- Leaving bad images out ----


class Split(NamedTuple):
    """Which images are for what. lists: the usable images of each list. index (N,): the images to train on, as rows of
    the training list with its bad images, ascending. train, held_out: rows of lists["train"]. lines: what to say."""

    lists: dict[str, ImageList]
    index: NDArray[np.int64]
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    lines: list[str]


def split(
    lists: Mapping[str, ImageList],
    run: "Run",
    skip: str | None,
    *,
    val_fraction: float = 0.0,
    by_class: bool = False,
    digests: Mapping[str, str] | None = None,
) -> Split:
    """Leave bad images out (`usable`) and hold some training images out to select the best epoch, by_class the same
    share of each class. digests: of what else, beside the lists, must stay what it was when the run began. Raises
    DivideMixError for other lists than the run began with, and for too few images."""
    hashes = {name: images.digest() for name, images in lists.items()} | dict(digests or {})
    train = lists["train"]
    run.pin("images_sha256", hashes, f"the images or labels in {train.root} are not those {run.folder} began with")
    rows, lines = usable(lists, skip, run.folder / "skipped.json", run.ranks)
    labels = train.labels if by_class else None
    index, held_out = hold_out(np.arange(len(train)), val_fraction, run.args.seed, labels)
    index, held_out = (part[np.isin(part, rows["train"])] for part in (index, held_out))
    hold_out(index, 0, run.args.seed)  # refuses too few
    if len(held_out):
        drawn = f"drawn by seed {run.args.seed}, to select the best epoch"
        lines.append(f"{len(held_out)} training images held out with their labels, {drawn}")
    places = (np.searchsorted(rows["train"], part) for part in (index, held_out))
    return Split({name: images.select(rows[name]) for name, images in lists.items()}, index, *places, lines)


def usable(
    lists: Mapping[str, ImageList], how: str | None, file: Path, ranks: Ranks
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Which images of each list to use, ascending indices, and what to say of it.

    how: the `quick` or `full` of --skip_bad_images: looks at all images and writes to `file` which are left out; a
    later start finds it there and does not look again. None: all images, but for those that `file` names, if it is
    there. With several ranks the first one looks, and all leave out the same. Raises and warns as `sound`.
    """

    def find() -> dict[str, Any]:
        try:
            found = json.loads(read_file(file))
            if how in (None, found["how"]):
                return {"lists": found["lists"], "old": True}
        except FileNotFoundError:
            if how is None:
                return {"lists": None}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DivideMixError(
                f"{file} cannot be read ({error}), and it says which images this run leaves out: delete it, and give "
                "--skip_bad_images to look again"
            ) from error
        record = check(lists, full=how == "full").record()
        write_atomically(file, json.dumps({"how": how, "lists": record}, indent=1).encode())
        return {"lists": record}

    found = ranks.from_first(find)
    if found["lists"] is None:
        return {name: np.arange(len(images)) for name, images in lists.items()}, []
    lines = left_out(found["lists"]) + [f"as {file} says: without it, they are looked at again"] * ("old" in found)
    return sound(lists, found["lists"], file), lines


def sound(
    lists: Mapping[str, ImageList], record: Record, source: str | Path = "skipped.json"
) -> dict[str, NDArray[np.int64]]:
    """The indices, ascending, of each list's images that are not in a record, which stands in the file `source`.

    Raises DivideMixError where the record is not of these lists, and where a list has no image left; warns of classes
    of the list 'train' that have none left.
    """
    how = f"use the data folder that the run began with, or delete {source} and give --skip_bad_images to look again"
    try:
        entries = {name: (entry["total"], dict(entry["bad"])) for name, entry in record.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DivideMixError(f"{source} does not say which images were skipped: {how}") from error
    if entries.keys() != lists.keys():
        raise DivideMixError(f"{source} is of the lists {', '.join(entries)}, not of {', '.join(lists)}: {how}")
    left = {}
    for name, images in lists.items():
        total, bad = entries[name]
        if total != len(images):
            raise DivideMixError(
                f"{source} is of {total} images of {name}, but {images.source} has {len(images)}: {how}"
            )
        left[name] = _without(name, images, bad, f"{source}: {how}")
    return left


def _without(name: str, images: ImageList, bad: dict[str, str], how: str) -> NDArray[np.int64]:
    if not bad:
        return np.arange(len(images))
    is_bad = np.array([images.name(i) in bad for i in range(len(images))])
    if is_bad.sum() != len(bad):
        known = {images.name(i) for i in np.flatnonzero(is_bad)}
        strange = next(key for key in bad if key not in known)
        raise DivideMixError(f"{images.source} has no image {strange!r:.100}, which is in {how}")
    if is_bad.all():
        first = f"{_printable(images.path(0))}: {bad[images.name(0)]}"
        raise DivideMixError(f"{name}: none of its {len(images)} images can be used (the first is {first})")
    left = np.flatnonzero(~is_bad)
    vanished = np.flatnonzero(
        (images.class_counts() > 0) & (np.bincount(images.labels[left], minlength=images.num_class) == 0)
    )
    if name == "train" and len(vanished):
        warn(f"no training image is left of class {', '.join(map(str, vanished))}: it cannot be learned")
    return left


def left_out(record: Record) -> list[str]:
    """One line per list: how many of its images a record leaves out."""
    lines = []
    for name, entry in record.items():
        missing = list(entry["bad"].values()).count(MISSING)
        unreadable = len(entry["bad"]) - missing
        kinds = f" ({missing} missing, {unreadable} unreadable)" if entry["bad"] else ""
        lines.append(f"{name}: {len(entry['bad'])} of {entry['total']} images left out{kinds}")
    return lines


# ---- One file ----


def problem(path: str, boundary: Boundary, full: bool = False, as_shown: bool = False) -> str:
    """What is wrong with an image file; '' for a sound one. as_shown: how training reads it."""
    try:
        with opened(path, boundary) as (image, file):
            is_sound = not full and _ends_well(file, image.format)
        if not is_sound:
            load(path, boundary, as_shown)
    except (BadImage, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""


def _ends_well(file: BinaryIO, kind: str | None) -> bool:
    """Whether the file ends as those of its kind do. Where it is read next stays."""
    at, size = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(-min(size, 12), os.SEEK_END)
    end = file.read()
    file.seek(at)
    return kind in _ENDS and end.endswith(_ENDS[kind])


def _printable(path: str) -> str:
    """A path whose bytes are no UTF-8 would crash a print."""
    return path.encode(errors="backslashreplace").decode()
