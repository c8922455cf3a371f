"""Processes that read images: tasks in, uint8 pixels out, in order. The same ones from the start of a run to its end.

    workers = Workers(Reader(lists, views), number=4, pin=False)
    for part in workers.run(tasks): ...                         # a Part of each task
    workers.close()

A worker decides and draws nothing: a task says which images and carries the seeds of their views. So what comes out
does not depend on how many workers there are; with none, the main process does their work. What is wrong with an image
comes back as a message, and what kills a worker as one line that says what to do.
"""

import contextlib
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info

from dividemix import DivideMixError, images
from dividemix.filelist import Boundary, ImageList
from dividemix.images import BadImage, Views
from dividemix.imagestore import Cache

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


class Part(NamedTuple):
    """A task's result. pixels uint8: training views (V, n, S, S, 3), or evaluation views (n, S, S, 3), or whole images,
    one after the other in one dimension. Of the images `index` (n,) of the list `name`: their resized `sizes` int32
    (n, 2), height and width, and the `changes` uint8 (n,) of `images.Shown`."""

    name: str
    index: NDArray[np.int64]
    pixels: Tensor
    sizes: NDArray[np.int32]
    changes: NDArray[np.uint8]


class Failure(NamedTuple):
    """Instead of a Part: image `i` of the list `name` could not be read; -1 for no image in particular."""

    name: str
    i: int
    what: str


class _CacheGone(Exception):
    pass


class Reader:
    """The loader's data set, of which each worker has one; it is given tasks instead of indices."""

    def __init__(self, lists: Mapping[str, ImageList], views: Views):
        self.lists, self.views = dict(lists), views
        self._boundaries: dict[str, Boundary] = {}
        self._caches: dict[str, Cache] = {}

    def image(self, name: str, cache: str | None, i: int) -> tuple[NDArray[np.uint8], int]:
        """A resized image (H, W, 3) and what was done to it (`images.Shown`). Raises BadImage."""
        if cache is not None:
            if cache not in self._caches:
                try:
                    self._caches[cache] = Cache.open(cache, len(self.lists[name]))
                except (OSError, ValueError, EOFError) as error:
                    raise _CacheGone(f"the cache of resized images cannot be read: {error}") from error
            return self._caches[cache].image(i), self._caches[cache].changes[i]
        path, root = self.lists[name].path(i), self.lists[name].root
        boundary = self._boundaries.setdefault(root, Boundary(root))
        image, changes = images.load(path, boundary, self.lists[name].as_shown)
        return self.views.resized(image), changes

    def __getitem__(self, task: Task) -> Part | Failure:
        at, sizes, changes = -1, np.zeros((len(task.index), 2), np.int32), np.zeros(len(task.index), np.uint8)

        def resized() -> Iterator[NDArray[np.uint8]]:
            nonlocal at
            for k, i in enumerate(task.index.tolist()):
                at = i
                image, changes[k] = self.image(task.name, task.cache, i)
                sizes[k] = image.shape[:2]
                yield image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on metadata; what it cannot read is an exception
                pixels = torch.from_numpy(self._pixels(task, resized()))
        except BadImage as error:
            return Failure(task.name, at, str(error))
        except _CacheGone as error:
            return Failure(task.name, -1, str(error))
        if get_worker_info() is not None:
            # Not left to the queue that sends it: where shared memory is short, that would lose the result, and the
            # main process would wait for it forever.
            pixels.share_memory_()
        return Part(task.name, task.index, pixels, sizes, changes)

    def _pixels(self, task: Task, resized: Iterator[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        if task.whole:
            return np.concatenate([image.reshape(-1) for image in resized])
        if task.seeds is None:
            return self.views.eval_batch(resized, len(task.index))
        return self.views.train_batch(resized, task.seeds)


class _Tasks(Sampler):
    """The tasks of the present iteration, in the place where a DataLoader expects indices."""

    def __init__(self) -> None:
        self.now: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.now)


class Workers:
    """`number` processes that a Reader is given to, started at the first task. pin: the results come in pinned memory.

    `refuse` makes a Failure an exception. context: how processes are started, Python's default if None.
    """

    def __init__(
        self,
        reader: Reader,
        number: int,
        pin: bool,
        refuse: Callable[[Failure], Exception],
        context: str | None = None,
    ):
        self.reader, self.number, self.pin, self.refuse, self.context = reader, number, pin, refuse, context
        self._tasks, self._loader, self._turn = _Tasks(), None, 0

    def run(self, tasks: Iterable[Task]) -> Iterator[Part]:
        """The parts, in the order of the tasks, read some tasks ahead. One iteration at a time: a new one ends the one
        before, wherever that was. Raises DivideMixError for a bad image and for a worker that died."""
        self._turn += 1
        turn, self._tasks.now = self._turn, tasks
        with explained():
            for result in self._start():
                if isinstance(result, Failure):
                    raise self.refuse(result)
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
                multiprocessing_context=self.context if self.number else None,
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
    except (EOFError, ConnectionError) as error:
        raise DivideMixError(
            f"a worker that reads images died while it handed over a result (killed or exited: {error or 'no more'}), "
            f"most likely for want of memory: give fewer --workers, or 0; {again}"
        ) from error
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in ("Bus error", "shared memory", "(shm)")):
            raise DivideMixError(
                "the workers that read images have not enough shared memory (/dev/shm): give --workers 0, or make it "
                f"larger (docker run --shm-size 2g); {again}"
            ) from error
        if _is_death(error):
            cause = " ".join(text.split())[:200].rstrip(". ")
            raise DivideMixError(
                f"a worker that reads images died ({cause}), most likely for want of memory: give fewer --workers, or "
                f"0; {again}"
            ) from error
        raise
