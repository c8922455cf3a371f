"""Processes that read images: tasks in, uint8 pixels out, in order. They live as long as the run.

A worker decides and draws nothing: a task names the images and carries the seeds of their views. So the pixels do not
depend on the number of workers; without workers the main process does their work.
"""

import contextlib
import signal
import sys
import time
import zlib
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
from dividemix.data.store import Cache, TaskResult

# Images of a task. Few: the results on their way share 64 MB of memory in many containers, and a step need not wait
# until one worker has read a whole batch.
TASK_SIZE = 8
# Forked workers share the lists. Windows has no fork; on macOS it may crash a process that has threads.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class Task(NamedTuple):
    """What a worker makes of the images `index` (n,) of the list `name`: the training views for `seeds` (n, V), without
    seeds the evaluation views, or the `uncut` resized images."""

    name: str
    cache: str | None  # the list's cache, read instead of the image files
    index: NDArray[np.int64]
    seeds: NDArray[np.int64] | None = None
    uncut: bool = False

    def split(self) -> list["Task"]:
        """Tasks of TASK_SIZE images each."""
        rows = [slice(start, start + TASK_SIZE) for start in range(0, len(self.index), TASK_SIZE)]
        seeds = [None if self.seeds is None else self.seeds[x] for x in rows]
        return [self._replace(index=self.index[x], seeds=y) for x, y in zip(rows, seeds, strict=True)]


class Reader:
    """The DataLoader's data set, one in each worker; it takes tasks instead of indices."""

    def __init__(self, lists: Mapping[str, ImageList], views: images.Views):
        self.lists, self.views = dict(lists), views
        self._boundaries = {image_list.root: Boundary(image_list.root) for image_list in lists.values()}
        self._caches: dict[str, Cache] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: without the caches, which it maps itself."""
        return self.__dict__ | {"_caches": {}}

    def original(self, name: str, cache: str | None, i: int) -> tuple[Image.Image | NDArray[np.uint8], int]:
        """An image as it is in its file, or resized (H, W, 3) from the cache, and its changes (`images.Shown`). Raises
        DivideMixError for a bad image or cache."""
        image_list = self.lists[name]
        if cache is not None:
            if cache not in self._caches:
                self._caches[cache] = Cache(cache, len(image_list))
            return self._caches[cache].image(i), self._caches[cache].changes[i]
        try:
            return images.load(image_list.path(i), self._boundaries[image_list.root], image_list.as_shown)
        except images.BadImage as error:
            raise DivideMixError(
                f"{image_list.problem(i, str(error))}: `--check_data full` lists all such images, `--skip_bad_images "
                "full` leaves them out"
            ) from error

    def image(self, name: str, cache: str | None, i: int) -> tuple[NDArray[np.uint8], int, int]:
        """A resized image (H, W, 3), its changes, and the checksum of its pixels, 0 for published sets. Raises
        DivideMixError for a bad image or cache."""
        image, changes = self.original(name, cache, i)
        if cache is not None:
            return image, changes, self._caches[cache].checksums[i]
        resized = self.views.resized(image)
        return resized, changes, zlib.crc32(resized) if self.lists[name].as_shown else 0

    def __getitem__(self, task: Task) -> TaskResult | DivideMixError:
        try:
            read = (self.image(task.name, task.cache, i) for i in task.index.tolist())
            resized, changes, checksums = zip(*read, strict=True)
        except DivideMixError as error:
            return error  # raised here, it would arrive as a traceback
        if task.uncut:
            pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in resized]))
        else:
            pixels = self.views.batch(resized, task.seeds)
        if get_worker_info() is not None:
            # The queue would do this too, but lose the result where shared memory is short: a wait without end.
            pixels.share_memory_()
        sizes = np.array([image.shape[:2] for image in resized], np.int32)
        arrays = np.array(changes, np.uint8), np.array(checksums, np.uint32)
        return TaskResult(task.name, task.index, pixels, sizes, *arrays)


class Workers:
    """`number` processes with a Reader each, started at the first task. pin: whether results are in pinned memory."""

    def __init__(self, reader: Reader, number: int, pin: bool):
        self.reader, self.number, self.pin = reader, number, pin
        self._tasks: list[Task] = []  # of the current iteration; the DataLoader's sampler
        self._loader, self._turn = None, 0

    def run(self, tasks: Iterable[Task]) -> Iterator[TaskResult]:
        """The results, in the order of the tasks, read some tasks ahead. One iteration at a time: a new one ends the
        previous one, even in its middle. Raises DivideMixError for a bad image and for a worker that died."""
        self._turn += 1
        turn, self._tasks[:] = self._turn, tasks
        with explain_worker_death():
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
                batch_size=None,  # the reader gets what the sampler gives
                sampler=self._tasks,
                num_workers=self.number,
                collate_fn=_identity,
                pin_memory=self.pin,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # else the workers' seed, unused here, is drawn from the global generator
                persistent_workers=self.number > 0,
                multiprocessing_context=START_METHOD if self.number else None,
            )
        return self._loader

    def close(self) -> None:
        """Ends the processes. A later `run` starts new ones."""
        self._turn += 1
        loader, self._loader = self._loader, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:  # now, not when the last abandoned iteration that refers to it is collected
            try:
                iterator._shutdown_workers()
            except RuntimeError as error:
                # torch reports a killed worker wherever the main process is at that moment, also here.
                if not _is_worker_death(error):
                    raise


def _identity(result: Any) -> Any:
    return result


def _start_worker(worker: int) -> None:
    """Runs first in a worker: Ctrl-C reaches it too, but the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _is_worker_death(error: RuntimeError) -> bool:
    """Whether it is torch's report of a worker that was killed or ended."""
    return "DataLoader worker" in str(error) and any(word in str(error) for word in ("killed", "exited"))


@contextlib.contextmanager
def explain_worker_death() -> Iterator[None]:
    """Raises DivideMixError for a worker's death in the block. torch reports it as a RuntimeError wherever the main
    process is at that moment; before that report a result may break off."""
    next_step = "the same command then continues after the last finished epoch"
    try:
        yield
    except (EOFError, ConnectionError, RuntimeError) as error:
        text, is_report = " ".join(str(error).split()), isinstance(error, RuntimeError)
        if is_report and any(sign in text for sign in ("Bus error", "shared memory", "(shm)")):
            raise DivideMixError(
                "the workers that read images have not enough shared memory (/dev/shm): give --workers 0, or make it "
                f"larger (docker run --shm-size 2g); {next_step}"
            ) from error
        if is_report and not _is_worker_death(error):
            raise
        if not is_report:  # torch's report is about to come, and would interrupt whatever follows
            with contextlib.suppress(RuntimeError):
                time.sleep(0.5)
        cause = text[:200].rstrip(". ") if is_report else f"killed or exited: {text or 'its result breaks off'}"
        raise DivideMixError(
            f"a worker that reads images died ({cause}), probably because the memory is full: give fewer --workers, or "
            f"0; {next_step}"
        ) from error
