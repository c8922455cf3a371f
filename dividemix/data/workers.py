"""Processes that read images: tasks in, uint8 pixels out, in order. The same ones from the start of a run to its end.

A worker decides and draws nothing: a task says which images and carries the seeds of their views. So what comes out
does not depend on how many workers there are; with none, the main process does their work.
"""

import contextlib
import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from dividemix import DivideMixError
from dividemix.data import images
from dividemix.data.lists import Boundary, ImageList
from dividemix.data.store import Cache, Part

# Images of a task. Small, so that the results on their way are few megabytes: containers often have 64 MB of shared
# memory for them, and a step need not wait until one worker has read a whole batch.
PART = 8


class Task(NamedTuple):
    """What a worker is asked for: of images `index` (n,) of the list `name` the training views for `seeds` (n, V); or
    without seeds the evaluation views; or the `whole` resized images."""

    name: str
    cache: str | None  # file of the list's resized images, to be read from instead of decoding
    index: NDArray[np.int64]
    seeds: NDArray[np.int64] | None = None
    whole: bool = False

    def split(self) -> list["Task"]:
        """Tasks of PART images each."""
        rows = [slice(start, start + PART) for start in range(0, len(self.index), PART)]
        seeds = [None if self.seeds is None else self.seeds[x] for x in rows]
        return [self._replace(index=self.index[x], seeds=y) for x, y in zip(rows, seeds, strict=True)]


class Reader:
    """The loader's data set, of which each worker has one; it is given tasks instead of indices."""

    def __init__(self, lists: Mapping[str, ImageList], views: images.Views):
        self.lists, self.views = dict(lists), views
        self._boundaries = {listed.root: Boundary(listed.root) for listed in lists.values()}
        self._caches: dict[str, Cache] = {}

    def original(self, name: str, cache: str | None, i: int) -> tuple[Image.Image | NDArray[np.uint8], int]:
        """An image as it is in its file, or resized (H, W, 3) in the cache, and what was done to it (`images.Shown`).
        Raises DivideMixError for a bad image or cache."""
        listed = self.lists[name]
        if cache is not None:
            if cache not in self._caches:
                self._caches[cache] = Cache(cache, len(listed))
            return self._caches[cache].image(i), self._caches[cache].changes[i]
        try:
            return images.load(listed.path(i), self._boundaries[listed.root], listed.as_shown)
        except images.BadImage as error:
            raise DivideMixError(
                f"{listed.problem(i, str(error))}: `--check_data full` lists all such images, `--skip_bad_images full` "
                "leaves them out"
            ) from error

    def image(self, name: str, cache: str | None, i: int) -> tuple[NDArray[np.uint8], int]:
        """A resized image (H, W, 3) and what was done to it. Raises DivideMixError for a bad image or cache."""
        image, changes = self.original(name, cache, i)
        return self.views.resized(image) if cache is None else image, changes

    def __getitem__(self, task: Task) -> Part | DivideMixError:
        try:
            resized, changes = zip(*(self.image(task.name, task.cache, i) for i in task.index.tolist()), strict=True)
        except DivideMixError as error:
            return error  # raised here, it would come out as a traceback
        if task.whole:
            pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in resized]))
        else:
            pixels = self.views.batch(resized, task.seeds)
        if get_worker_info() is not None:
            # Not left to the queue that sends it: where shared memory is short, that would lose the result, and the
            # main process would wait for it forever.
            pixels.share_memory_()
        sizes = np.array([image.shape[:2] for image in resized], np.int32)
        return Part(task.name, task.index, pixels, sizes, np.array(changes, np.uint8))


class Workers:
    """`number` processes with a Reader each, started at the first task. pin: the results come in pinned memory."""

    def __init__(self, reader: Reader, number: int, pin: bool):
        self.reader, self.number, self.pin = reader, number, pin
        self._tasks: list[Task] = []  # of the present iteration; the DataLoader's sampler
        self._loader, self._turn = None, 0

    def run(self, tasks: Iterable[Task]) -> Iterator[Part]:
        """The parts, in the order of the tasks, read some tasks ahead. One iteration at a time: a new one ends the one
        before, wherever that was. Raises DivideMixError for a bad image and for a worker that died."""
        self._turn += 1
        turn, self._tasks[:] = self._turn, tasks
        with explained():
            for result in self._start():
                if isinstance(result, DivideMixError):
                    raise result
                yield result
                if turn != self._turn:
                    raise RuntimeError("a pass over images was continued after another one had begun")

    def _start(self) -> DataLoader:
        if self._loader is None:
            self._loader = DataLoader(
                self.reader,
                batch_size=None,  # what the sampler gives is what the reader gets
                sampler=self._tasks,
                num_workers=self.number,
                collate_fn=_as_it_is,
                pin_memory=self.pin,
                worker_init_fn=_begin,
                generator=torch.Generator(),  # else it draws its workers' seed, unused here, from the global stream
                persistent_workers=self.number > 0,
            )
        return self._loader

    def close(self) -> None:
        """End the processes. A later `run` starts new ones."""
        self._turn += 1
        loader, self._loader = self._loader, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:  # now, not when the last abandoned pass that refers to it is collected
            try:
                iterator._shutdown_workers()
            except RuntimeError as error:
                # torch reports a killed worker wherever the main process is then, also here, where all of them end.
                if not _is_death(error):
                    raise


def _as_it_is(result: Any) -> Any:
    return result


def _begin(worker: int) -> None:
    """In a worker, first of all: Ctrl-C reaches it too, but it is the main process that ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _is_death(error: RuntimeError) -> bool:
    """Whether torch reports by it that a worker was killed or ended."""
    return "DataLoader worker" in str(error) and any(word in str(error) for word in ("killed", "exited"))


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """A worker's death in the block, which torch reports as a RuntimeError wherever the main process is just then,
    becomes a DivideMixError. So does what comes of it before the report: a result that breaks off."""
    again = "the same command then continues after the last finished epoch"
    try:
        yield
    except (EOFError, ConnectionError, RuntimeError) as error:
        text, is_plain = " ".join(str(error).split()), isinstance(error, RuntimeError)
        if is_plain and any(sign in text for sign in ("Bus error", "shared memory", "(shm)")):
            raise DivideMixError(
                "the workers that read images have not enough shared memory (/dev/shm): give --workers 0, or make it "
                f"larger (docker run --shm-size 2g); {again}"
            ) from error
        if is_plain and not _is_death(error):
            raise
        cause = text[:200].rstrip(". ") if is_plain else f"killed or exited: {text or 'its result breaks off'}"
        raise DivideMixError(
            f"a worker that reads images died ({cause}), most likely for want of memory: give fewer --workers, or 0; "
            f"{again}"
        ) from error
