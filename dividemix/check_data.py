"""What is wrong with a data folder, in one list, before hours of training (`--check_data`).

    lists, problems = dataloader_clothing1M.find(data_path)
    report = check(lists, problems)
    print(report)
    sys.exit(not report.ok)

By default the header and the end of every file are read: a file that starts as an image and ends as JPEG and PNG files
end is taken for sound, any other is decoded and this decides. `full` decodes all. Symbolic links that lead out of the
data folder count as unreadable.
"""

import os
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dividemix.filelist import Boundary, ImageList
from dividemix.images import MISSING, BadImage, opened

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xae\x42\x60\x82"}
_SHOWN = 10  # bad images named per list
_CHUNK = 256  # images a thread looks at in one go


@dataclass(frozen=True)
class ListReport:
    """One list: how many of its images are there and can be read."""

    name: str  # 'train', 'val', ...
    source: str
    total: int
    missing: int
    unreadable: int  # there, but damaged, not an image, or outside the data folder
    first_bad: list[str]  # the first ten of both kinds, one line each
    class_counts: NDArray[np.int64]  # (num_class,), by the labels in the list

    @property
    def exist(self) -> int:
        return self.total - self.missing

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.exist} of {self.total} images exist, {self.unreadable} of them unreadable"]
        lines += [f"  {line}" for line in self.first_bad]
        if (more := self.missing + self.unreadable - len(self.first_bad)) > 0:
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
        return bool(self.lists) and not self.problems and not any(r.missing + r.unreadable for r in self.lists)

    def __str__(self) -> str:
        how = "every image decoded" if self.full else "header and end of every image read"
        verdict = "the data are complete" if self.ok else "training cannot run on these data"
        return "\n".join([*self.problems, *map(str, self.lists), f"{verdict} ({how})"])


def check(
    lists: Mapping[str, ImageList], problems: Iterable[str] = (), full: bool = False, threads: int | None = None
) -> Report:
    """Looks at every image of `lists`. `problems`: what was found while the lists were read, to stand in the report.

    threads: default 4 per core, as most of the time goes into waiting for the disk. Shows progress on a terminal.
    """
    threads = threads or 4 * (os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata; what it cannot read is an exception
        reports = [_check_list(name, images, full, pool) for name, images in lists.items()]
    return Report(reports, list(problems), full)


def _check_list(name: str, images: ImageList, full: bool, pool: ThreadPoolExecutor) -> ListReport:
    boundary = Boundary(images.root)

    def look(start: int) -> list[tuple[int, str]]:
        part = range(start, min(start + _CHUNK, len(images)))
        return [(i, what) for i in part if (what := problem(images.path(i), boundary, full))]

    missing = unreadable = 0
    first_bad: list[str] = []
    starts = range(0, len(images), _CHUNK)
    for found in tqdm(pool.map(look, starts), name, len(starts), leave=False, disable=None, unit_scale=_CHUNK):
        for i, what in found:
            missing += what == MISSING
            unreadable += what != MISSING
            if len(first_bad) < _SHOWN:
                first_bad.append(f"{images.path(i)}: {what} ({images.where(i)})")
    return ListReport(name, images.source, len(images), missing, unreadable, first_bad, images.class_counts())


def problem(path: str, boundary: Boundary, full: bool = False) -> str:
    """What is wrong with an image file; '' for a sound one."""
    try:
        with opened(path, boundary) as (image, file):
            if full or not _ends_well(file, image.format):
                image.load()
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
