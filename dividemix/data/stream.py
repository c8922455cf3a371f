"""Image sets that are too large for the device: read by worker processes, kept in memory, or cached on disk.

Each image of a batch is decoded and resized once, for all of its views. Every view has its own seed, drawn from the
phase's generator before the first batch. So the pixels depend neither on the number of workers nor on what is kept,
except that strong views of images kept on a card may differ by rounding (see `autoaugment`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dividemix import DivideMixError, warn
from dividemix.codivide import Division
from dividemix.data import duplicates, store
from dividemix.data.device import Batch, in_batches, plan_mixmatch, plan_warmup, to_device, to_float
from dividemix.data.images import Views, describe_changes
from dividemix.data.lists import ImageList
from dividemix.data.store import KeptImages, TaskResult
from dividemix.data.workers import TASK_SIZE, Reader, Task, Workers, explain_worker_death
from dividemix.runtime import Batches, Runtime

_KEPT_SETS = 2  # data sets that are kept at the same time: one for each network
_MEMORY_SHARE = 0.6  # of the free memory, for them
_READ = 128  # added to the changes of `images.Shown` for an image that has been read
_AHEAD, _THREADS = 4, 3  # batches that are cut from memory in advance, and by how many threads

Job = tuple[NDArray[np.int64], NDArray[np.int64] | None]  # rows (n,) of a batch, and seeds (n, V) of their views


class Pipeline:
    """Lists of images and the workers that read them, for a whole run. Use it in `with`: torch can report a worker's
    death anywhere in the main process, and leaving the block explains it.

    lists: name -> images. mean and std (3,) of pixel values in [0, 1]. workers: processes, 0 for none. cache_dir: the
    folder for `build_cache`. keep: where data sets with keep=True keep their images: in the memory of the 'host' or of
    the 'device' (for views of the kind 'crop'), or 'no': nowhere. 'auto': on the host if two such sets fit in 60 % of
    its free memory, else on a card if they fit there, else nowhere, with a warning. Several ranks keep nothing: each
    of them would need all images.
    """

    def __init__(
        self,
        lists: Mapping[str, ImageList],
        views: Views,
        mean: tuple,
        std: tuple,
        runtime: Runtime,
        *,
        workers: int = 4,
        cache_dir: str | Path | None = None,
        keep: str = "auto",
    ):
        self.lists, self.views, self.runtime, self.keep = dict(lists), views, runtime, keep
        self.device, self.ranks = runtime.device, runtime.ranks
        if keep in ("host", "device") and self.ranks.world > 1:
            warn(f"--keep_images {keep}: with several ranks no images are kept, each pass decodes them")
        self.on_card = self.device.type == "cuda"
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.caches: dict[str, str] = {}  # list -> its cache, after `build_cache`
        self.workers = Workers(Reader(lists, views), workers, self.on_card)
        self.normalise = Normalise(mean, std, self.device)
        self._changes = {name: np.zeros(len(images), np.uint8) for name, images in self.lists.items()}
        self.checksums = {name: np.zeros(len(images), np.uint32) for name, images in self.lists.items()}  # 0: not read
        self._are_described = False
        self._memory_for: tuple[int, torch.device | None] = -1, None  # how many images, and where they are kept

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        with explain_worker_death():
            self.close()
            if isinstance(error, RuntimeError):
                raise error

    def close(self) -> None:
        """Ends the workers."""
        self.workers.close()

    def images(self, name: str, index: NDArray | None = None, keep: bool = False) -> "StreamedImages":
        """The images `index` (M,) of a list, in that order, or all of them. keep: whether to keep them in memory."""
        index = np.arange(len(self.lists[name])) if index is None else np.asarray(index, np.int64)
        return StreamedImages(self, name, index, self._memory(len(index)) if keep else None)

    def pixels(self, name: str, index: NDArray, bar: Callable[[Iterable], Iterable] = iter) -> NDArray[np.uint8]:
        """The centres (M, S, S, 3) of the images `index` (M,) of a list, for sets that live on the device. Raises
        DivideMixError for a bad image."""
        tasks = Task(name, self.caches.get(name), np.asarray(index, np.int64)).split()
        pixels = np.empty((len(index), self.views.crop, self.views.crop, 3), np.uint8)
        for rows, result in zip(bar(in_batches(pixels, TASK_SIZE)), self.read(tasks), strict=True):
            rows[:] = result.pixels[0].numpy()
        return pixels

    def build_cache(self, bar: Callable[[Iterable], Iterable] = iter) -> None:
        """Writes the resized images of all lists to `cache_dir`, unless they are there, and reads them from there from
        now on. `bar` goes around the tasks of each list. One process per machine writes, also where several runs share
        the folder. Raises DivideMixError for a bad image, and where the disk has not enough room."""
        self.ranks.local_rank0_first(lambda: self._build_cache(bar))

    def _build_cache(self, bar: Callable[[Iterable], Iterable]) -> None:
        folder, lists, side = self.cache_dir, self.lists, self.views.resize
        paths = {name: store.cache_path(folder, name, images, side) for name, images in lists.items()}
        absent = {name: len(lists[name]) for name in lists if not store.is_whole(paths[name], len(lists[name]))}
        store.check_space(folder, store.estimate(sum(absent.values()), side))
        for name, n in absent.items():
            with store.locked(paths[name]):
                if not store.is_whole(paths[name], n):  # else another run has built it meanwhile
                    tasks = Task(name, None, np.arange(n), uncut=True).split()
                    results = (result for _, result in zip(bar(tasks), self.read(tasks), strict=True))
                    store.write_cache(paths[name], results)
        self.caches = paths

    def read(self, tasks: Iterable[Task]) -> Iterator[TaskResult]:
        """The results in the order of the tasks. Raises DivideMixError for a bad image and for a worker that died."""
        for result in self.workers.run(tasks):
            self._changes[result.name][result.index] = result.changes | _READ
            self.checksums[result.name][result.index] = result.checksums
            yield result

    def describe_images(self, held_out: NDArray) -> list[str]:
        """How many images were turned, got a white background, or were scaled to eight bits, and `duplicates.describe`:
        given once, after the first images are read. All ranks must call it together."""
        if self._are_described or not self._of_all_ranks(self.checksums).any():
            return []
        self._are_described = True
        changes = self._of_all_ranks(self._changes)
        equal = duplicates.describe(self.lists, self.equal_images(), held_out)
        return describe_changes(changes[changes > 0]) + equal

    def equal_images(self) -> dict[str, NDArray[np.int64]]:
        """`duplicates.equal_images` of the images that were read. All ranks must call it together."""
        checksums = self._of_all_ranks(self.checksums)
        return self.ranks.broadcast_from_rank0(duplicates.equal_images, self.lists, checksums)

    def _of_all_ranks(self, numbers: Mapping[str, NDArray[np.integer]]) -> NDArray[np.int64]:
        """The numbers (M,) of the images of all lists, one list after the other: each rank has read its share."""
        tensor = torch.from_numpy(np.concatenate([*numbers.values()]).astype(np.int64))
        return self.ranks.maximum(tensor.to(self.device)).cpu().numpy()

    def _memory(self, n: int) -> torch.device | None:
        """Where n images are kept. Decided once: later the free memory depends on what is kept already."""
        if self.ranks.world > 1 or self.keep == "no":
            return None
        if self.keep != "auto":
            return torch.device("cpu") if self.keep == "host" else self.device
        if n > self._memory_for[0]:
            need = _KEPT_SETS * store.estimate(n, self.views.resize)
            free = store.host_memory()
            room = torch.cuda.mem_get_info(self.device)[0] if self.on_card and self.views.kind == "crop" else 0
            fits_host, fits_card = (need <= _MEMORY_SHARE * size for size in (free, room))
            memory = torch.device("cpu") if fits_host else self.device if fits_card else None
            if memory is None:
                limit = f"more than {_MEMORY_SHARE:.0%} of the {free / 1e9:.1f} GB of free memory"
                unknown = "and this system does not tell its free memory; --keep_images host keeps them all the same"
                sizes = f"{need / 1e9:.1f} GB, {limit if free else unknown}"
                warn(f"images are decoded again in each pass: keeping 2 x {n} images needs {sizes}")
            self._memory_for = n, memory
        return self._memory_for[1]


class Normalise:
    """Normalises views on the device. All data sets of a pipeline share one, which a captured step may keep."""

    def __init__(self, mean: tuple, std: tuple, device: torch.device):
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S)."""
        return to_float(images, self.mean, self.std)

    def warmup_views(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), labels

    def mixmatch_views(
        self, x1: Tensor, x2: Tensor, labels: Tensor, w: Tensor, u1: Tensor, u2: Tensor, *strong: Tensor
    ) -> Batch:
        return self(x1), self(x2), labels, w, self(u1), self(u2), *map(self, strong)


class StreamedImages:
    """Images `index` (M,) of a pipeline's list, an `engine.DataSet`. labels int64 (M,). Batches are uint8 images on the
    device, of this rank's rows; `warmup_views` and `mixmatch_views` only normalise them.

    memory: where the images are kept, or None. Kept images are decoded once, by the first pass of any kind; later
    passes cut their views from memory. They are freed with the data set and its batches.
    """

    def __init__(self, pipeline: Pipeline, name: str, index: NDArray[np.int64], memory: torch.device | None):
        self.pipeline, self.name, self.index, self.memory = pipeline, name, index, memory
        self.labels = self.given_labels = pipeline.lists[name].labels[index]
        self.runtime, self.device, self.ranks = pipeline.runtime, pipeline.device, pipeline.ranks
        self.truly_clean = None
        self.warmup_views = pipeline.normalise.warmup_views
        self.mixmatch_views = pipeline.normalise.mixmatch_views
        self._kept: KeptImages | None = None

    def __len__(self) -> int:
        return len(self.index)

    def warmup_batches(self, batch_size: int, rng: np.random.Generator) -> Batches:
        """One pass over all samples in a new order, with the partial last batch: (x, labels) a batch."""
        shard = self.ranks.shard_rows
        rows = plan_warmup(len(self), batch_size, rng, self.ranks)
        jobs = [(shard(x), shard(rng.integers(0, 2**63 - 1, (len(x), 1)))) for x in rows]
        labels = to_device([self.labels[x] for x, _ in jobs], self.device)
        batches = ((views[0], y) for views, y in zip(self._train_views(jobs), labels, strict=True))
        return Batches([(len(x),) for x, _ in jobs], batches)

    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> Batches:
        """One pass over the labeled set: (x1, x2, labels, w, u1, u2) a batch, then x3, x4, u3, u4, if there are strong
        views, drawn apart as in `DeviceImages`; see `device.plan_mixmatch`."""
        shard, jobs = self.ranks.shard_rows, []
        [strong_rng] = rng.spawn(1)
        labeled, unlabeled = plan_mixmatch(division, batch_size, rng, self.ranks)
        for x, u in zip(labeled, unlabeled, strict=True):
            seeds = rng.integers(0, 2**63 - 1, (len(x) + len(u), 2))
            if self.pipeline.views.strong:
                seeds = np.hstack([seeds, strong_rng.integers(0, 2**63 - 1, seeds.shape)])
            seeds = np.concatenate([shard(seeds[: len(x)]), shard(seeds[len(x) :])])
            jobs.append((np.concatenate([shard(x), shard(u)]), seeds))
        labeled = [shard(x) for x in labeled]
        labels = to_device([self.labels[x] for x in labeled], self.device)
        w = to_device([division.clean_probability[x].astype(np.float32) for x in labeled], self.device)
        all_views = self._train_views(jobs)

        def batches() -> Iterator[Batch]:
            for views, y, p in zip(all_views, labels, w, strict=True):
                (x1, u1), (x2, u2), *strong = (view.tensor_split([len(y)]) for view in views)
                yield x1, x2, y, p, u1, u2, *(x for x, _ in strong), *(u for _, u in strong)

        return Batches([(len(x), len(job[0]) - len(x)) for x, job in zip(labeled, jobs, strict=True)], batches())

    def eval_batches(self, batch_size: int) -> Batches:
        """This rank's batches (x, labels) of all images in order, without augmentation; x float32 (B, 3, S, S)."""
        rows = in_batches(np.arange(len(self)), batch_size)
        rows = [rows[k] for k in self.ranks.shard_batches(len(rows))]
        labels = to_device([self.labels[x] for x in rows], self.device)
        views = (self.pipeline.normalise(views[0]) for views in self._eval_views([(x, None) for x in rows]))
        return Batches([(len(x),) for x in rows], zip(views, labels, strict=True))

    def views(self, seeds: NDArray[np.int64], batch_size: int) -> Iterator[Tensor]:
        """The views of all images in order, for seeds (M, V); a seed below 0 is the centre. -> uint8 (V, B, S, S, 3) on
        the device, a batch each."""
        return self._train_views([(rows, seeds[rows]) for rows in in_batches(np.arange(len(self)), batch_size)])

    def originals(self, rows: NDArray) -> Iterator[NDArray[np.uint8]]:
        """The images `rows` (M,), (H, W, 3) each: resized if they come from a cache, else as in their files. Raises
        DivideMixError for a bad image."""
        for i in self.index[rows].tolist():
            image, _ = self.pipeline.workers.reader.original(self.name, self.pipeline.caches.get(self.name), i)
            yield np.asarray(image)

    # -- Pixels of batches: uint8 (V, n, S, S, 3) on the device for each job, from memory or from the workers

    def _train_views(self, jobs: list[Job]) -> Iterator[Tensor]:
        if self.memory is not None and self._kept is None:
            deque(self._first_pass([]), maxlen=0)
        return self._from_workers(jobs) if self._kept is None else self._from_memory(self._kept, jobs)

    def _eval_views(self, jobs: list[Job]) -> Iterator[Tensor]:
        is_first = self.memory is not None and self._kept is None
        yield from self._first_pass(jobs) if is_first else self._train_views(jobs)

    def _first_pass(self, jobs: list[Job]) -> Iterator[Tensor]:
        """Reads all images, and keeps them once all are read; meanwhile gives the jobs, whose rows are in order."""
        kept_images, waiting = KeptImages(self.memory), deque(jobs)
        for result in self.pipeline.read(self._tasks(np.arange(len(self)), uncut=True)):
            try:
                kept_images.add(result)
            except torch.OutOfMemoryError as error:
                advice = "give --keep_images host or no"
                raise DivideMixError(f"{self.memory}: no memory to keep {len(self)} images; {advice}") from error
            if len(kept_images.images) == len(self):
                self._kept = kept_images
            while waiting and waiting[0][0][-1] < len(kept_images.images):
                yield self._to_device(kept_images.batch(self.pipeline.views, *waiting.popleft()))

    def _from_workers(self, jobs: list[Job]) -> Iterator[Tensor]:
        batches = [self._tasks(*job) for job in jobs]
        results = self.pipeline.read(task for tasks in batches for task in tasks)
        for tasks in batches:
            yield torch.cat([self._to_device(next(results).pixels) for _ in tasks], dim=1)

    def _from_memory(self, kept_images: KeptImages, jobs: list[Job]) -> Iterator[Tensor]:
        """From host memory threads cut the views, some jobs ahead of the training."""
        if self.memory.type != "cpu":
            return (kept_images.batch(self.pipeline.views, *job) for job in jobs)

        def work(job: Job) -> Tensor:
            pixels = kept_images.batch(self.pipeline.views, *job)
            return pixels.pin_memory() if self.pipeline.on_card else pixels

        return map(self._to_device, _ahead(work, jobs))

    def _tasks(self, rows: NDArray, seeds: NDArray | None = None, uncut: bool = False) -> list[Task]:
        """The workers keep the tasks until their next pass, so tasks must not refer to this data set."""
        return Task(self.name, self.pipeline.caches.get(self.name), self.index[rows], seeds, uncut).split()

    def _to_device(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, non_blocking=self.pipeline.on_card)  # only there they are pinned


def _ahead(function: Callable[[Any], Tensor], jobs: Iterable[Any]) -> Iterator[Tensor]:
    """function(job) of each job, in order, by threads some jobs ahead. If abandoned, it finishes only begun jobs."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque = deque()
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
