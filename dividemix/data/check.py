"""What is wrong with a data folder, in one list, before hours of training (`--check_data`), or left out of it
(`--skip_bad_images`).

By default the header and the end of every file are read: a file that starts as an image and ends as JPEG and PNG files
end is taken for sound, any other is decoded and this decides. `full` decodes all.
"""

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dividemix import DivideMixError, warn
from dividemix.data.images import MISSING, BadImage, load, opened
from dividemix.data.lists import Boundary, ImageList
from dividemix.files import read_file, write_atomically
from dividemix.runtime import Ranks, available_cores, from_environment

Bad = dict[int, str]  # row of an image in its list -> what is wrong with it, as `problem` says it; rows ascending
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xae\x42\x60\x82"}
_SHOWN = 10  # bad images named per list
_CHUNK = 256  # images a thread looks at in one go


def check(lists: Mapping[str, ImageList], full: bool = False) -> dict[str, Bad]:
    """The bad images of each list. Shows progress on a terminal."""
    bad: dict[str, Bad] = {name: {} for name in lists}
    threads = min(4 * available_cores(), 64)  # most of the time goes into waiting for the disk
    with ThreadPoolExecutor(threads) as pool:
        for name, images in lists.items():
            look = partial(_look, images, Boundary(images.root), full)
            rows = range(len(images))
            chunks = [rows[start : start + _CHUNK] for start in rows[::_CHUNK]]
            for part in tqdm(pool.map(look, chunks), name, len(chunks), leave=False, disable=None, unit_scale=_CHUNK):
                bad[name] |= part
    return bad


def _look(images: ImageList, boundary: Boundary, full: bool, rows: range) -> Bad:
    problems = ((i, problem(images.path(i), boundary, full, images.as_shown)) for i in rows)
    return {i: what for i, what in problems if what}


def run_check(
    found: tuple[Mapping[str, ImageList], list[str]], full: bool = False, skip: bool = False, about: Sequence[str] = ()
) -> None:
    """`--check_data`: prints the report on what a data loader's `find` found, after the lines `about`, and with `skip`
    what --skip_bad_images would leave. Raises DivideMixError where training could not run. Of several ranks the first
    looks."""
    if from_environment()[0] != 0:
        return
    lists, problems = found
    bad = check(lists, full)
    lines = [line for name, images in lists.items() for line in describe(name, images, bad[name])]
    is_complete = bool(lists) and not problems and not any(bad.values())
    verdict = "the data are complete" if is_complete else "training cannot run on these data as they are"
    depth = "every image decoded" if full else "header and end of every image read"
    print(*about, *problems, *lines, f"{verdict} ({depth})", sep="\n", flush=True)
    if is_complete:
        return
    can_skip = bool(lists) and not problems  # the bad images are all that is wrong
    if not (skip and can_skip):
        how = "mend the data folder" + ", or leave the bad images out by --skip_bad_images" * can_skip
        raise DivideMixError(f"training cannot run on these data, for what the report names: {how}")
    left = sound(lists, bad)
    leaves = ", ".join(f"{name}: {len(left[name])} of {len(lists[name])} images" for name in lists)
    print(f"with --skip_bad_images it can, on {leaves}", flush=True)


def describe(name: str, images: ImageList, bad: Bad) -> list[str]:
    """What the report says of one list."""
    missing = [*bad.values()].count(MISSING)
    exist = f"{len(images) - missing} of {len(images)} images exist"
    lines = [f"{name}: {exist}, {len(bad) - missing} of them unreadable"]  # or outside the data folder
    lines += [f"  {images.problem(i, what)}" for i, what in [*bad.items()][:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    counts = ", ".join(f"{c}: {count}" for c, count in enumerate(images.class_counts()))
    return lines + textwrap.wrap(f"images of each class: {counts}", 110, initial_indent="  ", subsequent_indent="    ")


# ---- Leaving bad images out ----


def usable(
    lists: Mapping[str, ImageList], how: str | None, file: Path, ranks: Ranks
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Which images of each list to use, ascending indices, and what to say of it.

    how: the `quick` or `full` of --skip_bad_images: looks at all images and writes to `file` which are left out; a
    later start finds it there and does not look again. None: all images, but for those that `file` names, if it is
    there. With several ranks the first one looks, and all leave out the same. Raises and warns as `sound`.
    """

    def find() -> tuple[dict[str, Bad], list[str]]:
        try:
            kept = json.loads(read_file(file))
            if how in (None, kept["how"]):
                bad = {name: _rows(images, **kept["lists"][name]) for name, images in lists.items()}
                return bad, [*left_out(lists, bad), f"as {file} says: without it, they are looked at again"]
        except FileNotFoundError:
            if how is None:
                return {name: {} for name in lists}, []
        except (OSError, ValueError, TypeError, LookupError) as error:
            again = "delete it, and give --skip_bad_images to look again"
            raise DivideMixError(
                f"{file} does not say which of these images were left out ({error!r}): {again}"
            ) from error
        bad = check(lists, how == "full")
        record = {}
        for name, images in lists.items():
            named = {images.name(i): what for i, what in bad[name].items()}
            record[name] = {"total": len(images), "bad": named}
        write_atomically(file, json.dumps({"how": how, "lists": record}, indent=1).encode())
        return bad, left_out(lists, bad)

    bad, lines = ranks.broadcast_from_rank0(find)
    return sound(lists, bad), lines


def _rows(images: ImageList, total: int, bad: dict[str, str]) -> Bad:
    """The rows of the images that a record names. Raises ValueError and KeyError for a record of other images."""
    if total != len(images):
        raise ValueError(f"it is of {total} images, {images.source} has {len(images)}")
    row_of = {images.name(i): i for i in range(total)} if bad else {}
    return {row_of[name]: what for name, what in bad.items()}


def sound(lists: Mapping[str, ImageList], bad: Mapping[str, Bad]) -> dict[str, NDArray[np.int64]]:
    """The rows of each list's other images, ascending. Raises DivideMixError where a list has none left; warns of
    classes of the list 'train' that have none left."""
    left = {}
    for name, images in lists.items():
        rows = left[name] = np.delete(np.arange(len(images)), [*bad[name]])
        if not len(rows):
            first = f"{images.path(0)}: {bad[name][0]}"
            raise DivideMixError(f"{name}: none of its {len(images)} images can be used (the first is {first})")
        lost = (images.class_counts() > 0) & (images.select(rows).class_counts() == 0)
        if name == "train" and lost.any():
            classes = ", ".join(map(str, np.flatnonzero(lost)))
            warn(f"no training image is left of class {classes}: it cannot be learned")
    return left


def left_out(lists: Mapping[str, ImageList], bad: Mapping[str, Bad]) -> list[str]:
    """One line per list: how many of its images are left out."""
    lines = []
    for name, images in lists.items():
        missing = [*bad[name].values()].count(MISSING)
        kinds = f" ({missing} missing, {len(bad[name]) - missing} unreadable)" if bad[name] else ""
        lines.append(f"{name}: {len(bad[name])} of {len(images)} images left out{kinds}")
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
    """Whether the file ends as those of its kind do."""
    file.seek(-min(file.seek(0, os.SEEK_END), 12), os.SEEK_END)
    return kind in _ENDS and file.read().endswith(_ENDS[kind])
