"""Finds what is wrong with a data folder before hours of training (`--check_data`), or leaves bad images out
(`--skip_bad_images`).

By default the header and the end of every file are read. A file that starts as an image and ends as JPEG and PNG files
end counts as sound; any other file is decoded. `full` decodes every file.
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
from dividemix.data.images import MISSING, BadImage, opened, read_image
from dividemix.data.lists import Boundary, ImageList
from dividemix.files import read_file, write_atomically
from dividemix.runtime import Ranks, available_cores, from_environment

Lists = Mapping[str, ImageList]
Bad = dict[int, str]  # row of an image in its list -> what is wrong with it, as `problem` says it; rows ascending
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xae\x42\x60\x82"}
_SHOWN = 10  # bad images named per list
_CHUNK = 256  # images that a thread checks at a time


def check(lists: Lists, full: bool = False) -> dict[str, Bad]:
    """The bad images of each list. Shows progress on a terminal."""
    bad: dict[str, Bad] = {name: {} for name in lists}
    threads = min(4 * available_cores(), 64)  # most of the time is waiting for the disk
    with ThreadPoolExecutor(threads) as pool:
        for name, images in lists.items():
            rows = range(len(images))
            chunks = [rows[start : start + _CHUNK] for start in rows[::_CHUNK]]
            results = pool.map(partial(_check_chunk, images, Boundary(images.root), full), chunks)
            for of_chunk in tqdm(results, name, len(chunks), leave=False, disable=None, unit_scale=_CHUNK):
                bad[name] |= of_chunk
    return bad


def _check_chunk(images: ImageList, boundary: Boundary, full: bool, rows: range) -> Bad:
    problems = ((i, problem(images.path(i), boundary, full, images.as_shown)) for i in rows)
    return {i: text for i, text in problems if text}


def run_check(
    lists: Lists, problems: list[str], first_lines: Sequence[str] = (), full: bool = False, skip: bool = False
) -> None:
    """`--check_data`: prints a report on the lists and problems that a data loader's `find` gives, after the
    `first_lines`; with `skip` also how many images --skip_bad_images would leave. Only rank 0 checks. Raises
    DivideMixError where training could not run."""
    if not from_environment().first:
        return
    if not lists:
        print(*problems, "no image was read", sep="\n", flush=True)
        raise DivideMixError(f"training cannot run on these data: {'; '.join(problems)}")
    bad = check(lists, full)
    lines = [line for name, images in lists.items() for line in describe(name, images, bad[name])]
    is_complete = not problems and not any(bad.values())
    verdict = "the data are complete" if is_complete else "training cannot run on these data as they are"
    number = f"{sum(map(len, lists.values()))} images" if problems else "every image"
    depth = f"{number} decoded" if full else f"header and end of {number} read"
    print(*first_lines, *problems, *lines, f"{verdict} ({depth})", sep="\n", flush=True)
    if is_complete:
        return
    if problems or not skip:  # --skip_bad_images helps only where bad images are all that is wrong
        advice = "correct the data folder" + ("" if problems else ", or leave the bad images out by --skip_bad_images")
        raise DivideMixError(f"training cannot run on these data, see the problems above: {advice}")
    rows = sound_rows(lists, bad)
    remaining = ", ".join(f"{name}: {len(rows[name])} of {len(lists[name])} images" for name in lists)
    print(f"with --skip_bad_images it can, on {remaining}", flush=True)


def describe(name: str, images: ImageList, bad: Bad) -> list[str]:
    """The report's lines on one list."""
    missing = [*bad.values()].count(MISSING)
    exist = f"{len(images) - missing} of {len(images)} images exist"
    lines = [f"{name}: {exist}, {len(bad) - missing} of them unreadable"]  # or outside the data folder
    lines += [f"  {images.problem(i, text)}" for i, text in [*bad.items()][:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    counts = ", ".join(f"{c}: {count}" for c, count in enumerate(images.class_counts()))
    return lines + textwrap.wrap(f"images of each class: {counts}", 110, initial_indent="  ", subsequent_indent="    ")


# ---- Leaving bad images out ----


def usable(lists: Lists, depth: str | None, file: Path, ranks: Ranks) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Which images of each list to use, ascending indices, and the lines to print about it.

    depth: the `quick` or `full` of --skip_bad_images: checks all images and records in `file` which are left out; a
    later start reads that record and does not check again. None: all images except those in the record, if there is
    one. With several ranks rank 0 checks, and all ranks leave out the same. Raises and warns as `sound_rows`.
    """

    def find() -> tuple[dict[str, Bad], list[str]]:
        try:
            record = json.loads(read_file(file))
            if depth in (None, record["depth"]):
                bad = {name: _recorded(images, **record["lists"][name]) for name, images in lists.items()}
                return bad, [*left_out(lists, bad), f"read from {file}: without this file they are checked again"]
        except FileNotFoundError:
            if depth is None:
                return {name: {} for name in lists}, []
        except (OSError, ValueError, TypeError, LookupError) as error:
            advice = "delete it, and give --skip_bad_images to check again"
            problem = f"{file} does not say which of these images were left out ({error!r})"
            raise DivideMixError(f"{problem}: {advice}") from error
        bad = check(lists, depth == "full")
        record = {}
        for name, images in lists.items():
            names = {images.name(i): text for i, text in bad[name].items()}
            record[name] = {"total": len(images), "bad": names}
        write_atomically(file, json.dumps({"depth": depth, "lists": record}, indent=1).encode())
        return bad, left_out(lists, bad)

    bad, lines = ranks.broadcast_from_rank0(find)
    return sound_rows(lists, bad), lines


def _recorded(images: ImageList, total: int, bad: dict[str, str]) -> Bad:
    """The bad images that a record names. Raises ValueError and KeyError for a record of other images."""
    if total != len(images):
        raise ValueError(f"it is of {total} images, {images.source} has {len(images)}")
    row_of = {images.name(i): i for i in range(total)} if bad else {}
    return {row_of[name]: text for name, text in bad.items()}


def sound_rows(lists: Lists, bad: Mapping[str, Bad]) -> dict[str, NDArray[np.int64]]:
    """The rows of each list's other images, ascending. Raises DivideMixError for a list that has no other images; warns
    of classes that lose all their images in the list 'train'."""
    sound = {}
    for name, images in lists.items():
        rows = sound[name] = np.delete(np.arange(len(images)), [*bad[name]])
        if not len(rows):
            first = f"{images.path(0)}: {bad[name][0]}"
            raise DivideMixError(f"{name}: none of its {len(images)} images can be used (the first is {first})")
        lost = (images.class_counts() > 0) & (images.select(rows).class_counts() == 0)
        if name == "train" and lost.any():
            classes = ", ".join(map(str, np.flatnonzero(lost)))
            warn(f"no training image is left of class {classes}: it cannot be learned")
    return sound


def left_out(lists: Lists, bad: Mapping[str, Bad]) -> list[str]:
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
            read_image(path, boundary, as_shown)
    except (BadImage, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""


def _ends_well(file: BinaryIO, image_format: str | None) -> bool:
    """Whether the file ends as those of its format do."""
    file.seek(-min(file.seek(0, os.SEEK_END), 12), os.SEEK_END)
    return image_format in _END_MARKS and file.read().endswith(_END_MARKS[image_format])
