"""Image sets that are too large for the device: read by worker processes, or kept in memory, or cached on disk.

    with Pipeline({"train": data.train, "test": data.test}, Views(256, 224), data.mean, data.std, runtime) as pipeline:
        test = pipeline.images("test")
        sample = pipeline.images("train", index, keep=True)     # some images, decoded once for all passes over them
        per_sample_loss(net, sample), train_epoch(..., sample, division, ...)

A data set is an `engine.DataSet`. Its batches are uint8 images on the device, of this rank's rows;
`warmup_views` and `mixmatch_views` only normalise them. Each image of a batch is decoded and resized once, for both of
its views. Every view has a seed of its own, drawn from the phase's generator before the first batch, so the pixels do
not depend on the number of workers, on what is kept, or on a cache.

Use a pipeline in `with`: a worker's death can reach the main process anywhere, and leaving the block explains it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dividemix import DivideMixError, augment, imagestore, warn
from dividemix.codivide import Division
from dividemix.data import Batch, Batches, plan_mixmatch, plan_warmup
from dividemix.filelist import Boundary, ImageList
from dividemix.images import BadImage, Views, load, said
from dividemix.imagestore import Cache, Kept
from dividemix.runtime import Runtime
from dividemix.workers import PART, Failure, Part, Reader, Task, Workers, explained

KEEP = ("auto", "host", "device", "no")  # where images with keep=True are kept
_ALIVE = 2  # data sets kept at the same time: one of each network
_SHARE = 0.6  # of the memory that is there, for them
_READ = 128  # beside the changes of `images.Shown`, for an image that has been read
_AHEAD, _THREADS = 4, 3  # batches cut from memory before they are asked for, and by how many threads


class Pipeline:
    """Lists of images and the workers that read them, for a whole run.

    lists: name -> images; mean and std of pixel values in [0, 1] (3,). workers: processes, 0 for none. cache_dir: the
    folder for `build_cache`. keep: where data sets with keep=True have their images: in the memory of the 'host' or of
    the 'device', or 'no'where; 'auto' takes the host where two such sets fit in 60 % of what is free, else a card where
    they do, else nowhere, with a warning. With several ranks nothing is kept: each of them would need all of it.
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
        context: str | None = None,
    ):
        if keep not in KEEP:
            raise ValueError(f"keep {keep!r}, expected one of {KEEP}")
        self.lists, self.views, self.runtime, self.keep = dict(lists), views, runtime, keep
        self.device, self.ranks = runtime.device, runtime.ranks
        if keep in ("host", "device") and self.ranks.world > 1:
            warn(f"--keep_images {keep}: with several ranks no images are kept, each pass decodes them")
        if keep == "device" and views.kind != "crop" and self.device.type != "cpu":
            raise DivideMixError("these views are resized by Pillow, so images are kept in host memory, not on a card")
        self.on_card = self.device.type == "cuda"
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.caches: dict[str, str] = {}  # list -> its cache, once it is there
        self._seen = {name: np.zeros(len(images), np.uint8) for name, images in self.lists.items()}
        self._is_said = False
        self.workers = Workers(Reader(lists, views), workers, self.on_card, self._refusal, context)
        self.normalise = Normalise(mean, std, self.device)
        self._kept_for: tuple[int, torch.device | None] | None = None  # how many images, and where

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        with explained():
            self.close()
            if isinstance(error, RuntimeError):
                raise error

    def close(self) -> None:
        """End the workers."""
        self.workers.close()

    def images(self, name: str, index: NDArray | None = None, keep: bool = False) -> "StreamedImages":
        """The images `index` (M,) of a list, in that order, or all of them. keep: see `StreamedImages`."""
        index = np.arange(len(self.lists[name])) if index is None else np.asarray(index, np.int64)
        return StreamedImages(self, name, index, self._place(len(index)) if keep else None)

    def pixels(self, name: str, index: NDArray, bar: Callable[[Iterable], Iterable] = iter) -> NDArray[np.uint8]:
        """(M, S, S, 3): the centres of the images `index` (M,) of a list, for sets that live on the device. Raises
        DivideMixError for a bad image."""
        parts = _split(np.asarray(index, np.int64))
        read = self.read(Task(name, self.caches.get(name), part) for part in parts)
        whole = np.empty((len(index), self.views.crop, self.views.crop, 3), np.uint8)
        for k, part in enumerate(bar(Batches([(len(rows),) for rows in parts], read))):
            whole[k * PART : k * PART + len(part.pixels)] = part.pixels.numpy()
        return whole

    def build_cache(self, bar: Callable[[Iterable], Iterable] = iter) -> None:
        """Write the resized images of all lists to `cache_dir`, but for those that are there, and read them from there
        from now on; `bar` goes around the parts of each list. One process per machine writes, also where several runs
        share the folder. Raises DivideMixError for a bad image, and where the disk has not enough room."""
        if self.cache_dir is not None:
            self.ranks.local_first(lambda: self._build_cache(self.cache_dir, bar))

    def _build_cache(self, folder: Path, bar: Callable[[Iterable], Iterable]) -> None:
        paths = {
            name: imagestore.cache_path(folder, name, each, self.views.resize) for name, each in self.lists.items()
        }
        absent = [name for name in paths if not imagestore.is_whole(paths[name], len(self.lists[name]))]
        need = sum(imagestore.estimate(len(self.lists[name]), self.views.resize) for name in absent)
        if absent:
            imagestore.check_space(folder, need)
        for name in absent:
            with imagestore.locked(paths[name]):
                n = len(self.lists[name])
                if not imagestore.is_whole(paths[name], n):  # else another run has built it meanwhile
                    parts = self.read(Task(name, None, part, whole=True) for part in _split(np.arange(n)))
                    imagestore.write_cache(paths[name], bar(Batches([(PART,)] * -(-n // PART), parts)))
        self.caches = paths

    def read(self, tasks: Iterable[Task]) -> Iterator[Part]:
        """The parts in the order of the tasks. Raises DivideMixError for a bad image and for a worker that died."""
        for part in self.workers.run(tasks):
            self._seen[part.name][part.index] = part.changes | _READ
            yield part

    def said(self) -> list[str]:
        """How many of the images that have been read were turned, put on white, or scaled to eight bits: a line, once,
        as soon as there are such images. Every rank must come to it: with several, each has read its share."""
        seen = torch.from_numpy(np.concatenate([*self._seen.values()])).to(self.device)
        seen = self.ranks.maximum(seen).cpu().numpy()
        if self._is_said or not seen.any():
            return []
        self._is_said = True
        return said(seen[seen > 0])

    def _refusal(self, failure: Failure) -> DivideMixError:
        if failure.i < 0:
            return DivideMixError(failure.what)
        images = self.lists[failure.name]
        return DivideMixError(
            f"{images.path(failure.i)}: {failure.what} ({images.where(failure.i)}): `--check_data full` lists all such "
            "images, `--skip_bad_images full` leaves them out"
        )

    def _place(self, n: int) -> torch.device | None:
        """Where n images are kept. Decided once: later the memory that is free depends on what is kept already."""
        host = torch.device("cpu")
        if self.ranks.world > 1 or self.keep == "no":
            return None
        if self.keep != "auto":
            return host if self.keep == "host" else self.device
        if self._kept_for is None or n > self._kept_for[0]:
            need = _ALIVE * imagestore.estimate(n, self.views.resize)
            free = imagestore.host_memory()
            room = torch.cuda.mem_get_info(self.device)[0] if self.on_card and self.views.kind == "crop" else 0
            place = host if need <= _SHARE * free else self.device if need <= _SHARE * room else None
            if place is None:
                warn(
                    f"images are decoded again in each pass: keeping twice {n} needs {need / 1e9:.1f} GB, "
                    f"and {free / 1e9:.1f} GB of memory are free, of which {_SHARE:.0%} are used for it"
                )
            self._kept_for = n, place
        return self._kept_for[1]


class Normalise:
    """The device's part of all views of a pipeline: one for all its data sets, which a captured step may keep."""

    def __init__(self, mean: tuple, std: tuple, device: torch.device):
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)
        self.warmup_views, self.mixmatch_views = self._warmup, self._mixmatch  # each one object, not a new one per use

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S)."""
        return augment.to_float(images, self.mean, self.std)

    def _warmup(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), labels

    def _mixmatch(
        self, x1: Tensor, x2: Tensor, labels: Tensor, w: Tensor, u1: Tensor, u2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self(x1), self(x2), labels, w, self(u1), self(u2)


class StreamedImages:
    """Images `index` (M,) of a pipeline's list, as `engine.DataSet` asks for them. labels int64 (M,).

    place: the memory where they are kept, or None. Kept images are decoded once, by the first evaluation of all of
    them or by `fetch`, whichever comes first; later passes cut their views from memory. They are freed with the data
    set and its batches.
    """

    def __init__(self, pipeline: Pipeline, name: str, index: NDArray[np.int64], place: torch.device | None):
        self.pipeline, self.name, self.index, self.place = pipeline, name, index, place
        self.labels = pipeline.lists[name].labels[index]
        self.runtime, self.device, self.ranks = pipeline.runtime, pipeline.device, pipeline.ranks
        self.truly_clean = None
        self.warmup_views = pipeline.normalise.warmup_views
        self.mixmatch_views = pipeline.normalise.mixmatch_views
        self._kept: Kept | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def unread(self) -> bool:
        """Whether `fetch` has something to do."""
        return self.place is not None and self._kept is None

    def fetch(self, bar: Callable[[Iterable], Iterable] = iter) -> None:
        """Read the images that are to be kept, if that has not been done; `bar` goes around the parts."""
        if self.unread:
            for _ in bar(Batches([(PART,)] * -(-len(self) // PART), self._filling())):
                pass

    def warmup_batches(self, batch_size: int, rng: np.random.Generator) -> Batches:
        """One pass over all samples in a new order: (x, labels) a batch, the partial last one kept."""
        self.fetch()
        mine = self.ranks.mine
        rows = plan_warmup(len(self), batch_size, rng, self.ranks)
        seeds = [mine(_draw_seeds(rng, len(x), 1)) for x in rows]
        rows = [mine(x) for x in rows]
        views = self._train_views(list(zip(rows, seeds, strict=True)))
        labels = self._column([self.labels[x] for x in rows])
        return Batches([(len(x),) for x in rows], ((x[0], y) for x, y in zip(views, labels, strict=True)))

    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> Batches:
        """One pass over the labeled set: (x1, x2, labels, w, u1, u2) a batch; see `data.plan_mixmatch`."""
        self.fetch()
        mine, jobs = self.ranks.mine, []
        labeled, unlabeled = plan_mixmatch(division, batch_size, rng, self.ranks)
        for x, u in zip(labeled, unlabeled, strict=True):
            seeds = np.split(_draw_seeds(rng, len(x) + len(u), 2), [len(x)])
            jobs.append((np.concatenate([mine(x), mine(u)]), np.concatenate([mine(part) for part in seeds])))
        labeled = [mine(x) for x in labeled]
        labels = self._column([self.labels[x] for x in labeled])
        w = self._column([division.clean_probability[x].astype(np.float32) for x in labeled])

        def batches() -> Iterator[Batch]:
            for views, y, p in zip(self._train_views(jobs), labels, w, strict=True):
                (x1, u1), (x2, u2) = (view.tensor_split([len(y)]) for view in views)
                yield x1, x2, y, p, u1, u2

        sizes = [(len(x), len(job[0]) - len(x)) for x, job in zip(labeled, jobs, strict=True)]
        return Batches(sizes, batches())

    def eval_batches(self, batch_size: int) -> Batches:
        """This rank's batches (x, labels) of all images in order, without augmentation; x float32 (B, 3, S, S)."""
        starts = [k * batch_size for k in self.ranks.deal(-(-len(self) // batch_size))]
        rows = [np.arange(start, min(start + batch_size, len(self))) for start in starts]
        labels = self._column([self.labels[x] for x in rows])
        views = map(self.pipeline.normalise, self._eval_views(rows))
        return Batches([(len(x),) for x in rows], zip(views, labels, strict=True))

    def originals(self, rows: NDArray) -> Iterator[NDArray[np.uint8]]:
        """The images `rows` (M,), (H, W, 3) each: resized, from the cache where there is one, else as in their files.
        Raises DivideMixError for a bad one."""
        images, path = self.pipeline.lists[self.name], self.pipeline.caches.get(self.name)
        cache, boundary = path and Cache.open(path, len(images)), Boundary(images.root)
        for i in self.index[rows].tolist():
            try:
                yield cache.image(i) if cache else np.asarray(load(images.path(i), boundary, images.as_shown).image)
            except BadImage as error:
                raise DivideMixError(f"{images.path(i)}: {error}") from error

    # -- Pixels of batches, uint8 on the device, from memory or from the workers

    def _train_views(self, jobs: list[tuple[NDArray, NDArray]]) -> Iterator[Tensor]:
        """(V, n, S, S, 3) for each job: rows (n,) and seeds (n, V)."""
        if self._kept is not None:
            return self._from_memory(self._kept.train_batch, jobs)
        parts = [list(zip(_split(rows), _split(seeds), strict=True)) for rows, seeds in jobs]
        return self._joined(parts, dim=1)

    def _eval_views(self, batches: list[NDArray]) -> Iterator[Tensor]:
        """(n, S, S, 3) for each of the batches of rows, which are in order."""
        if self._kept is not None:
            yield from self._from_memory(self._kept.eval_batch, [(rows,) for rows in batches])
        elif self.place is None:
            yield from self._joined([[(part, None) for part in _split(rows)] for rows in batches], dim=0)
        else:
            filling = self._filling()
            kept = next(filling)
            for rows in batches:
                while kept.count <= rows[-1]:
                    next(filling)
                yield self._to_device(kept.eval_batch(self.pipeline.views, rows))

    def _joined(self, batches: list[list[tuple[NDArray, NDArray | None]]], dim: int) -> Iterator[Tensor]:
        """The views of each batch on the device, from the parts (rows, seeds) that it consists of."""
        parts = self.pipeline.read(self._tasks(chain.from_iterable(batches)))
        for batch in batches:
            moved = [self._to_device(next(parts).pixels) for _ in batch]
            yield moved[0] if len(moved) == 1 else torch.cat(moved, dim)

    def _filling(self) -> Iterator[Kept]:
        """Reads all images; after each part what there is so far, which is kept only when it is all."""
        kept = Kept(len(self), self.place)
        tasks = self._tasks(((rows, None) for rows in _split(np.arange(len(self)))), whole=True)
        for part in self.pipeline.read(tasks):
            try:
                kept.add(part.pixels, part.sizes)
            except torch.OutOfMemoryError as error:
                raise DivideMixError(
                    f"{self.place}: no memory to keep {len(self)} images; keep them elsewhere"
                ) from error
            if kept.full:
                self._kept = kept
            yield kept

    def _from_memory(self, cut: Callable[..., Tensor], jobs: list[tuple]) -> Iterator[Tensor]:
        """cut(views, *job) of each job. From host memory by threads, some jobs ahead of the training."""
        views = self.pipeline.views
        if self.place.type != "cpu":
            return (cut(views, *job) for job in jobs)

        def work(job: tuple) -> Tensor:
            pixels = cut(views, *job)
            return pixels.pin_memory() if self.pipeline.on_card else pixels

        return map(self._to_device, _ahead(work, jobs))

    # -- Small helpers

    def _tasks(self, parts: Iterable[tuple[NDArray, NDArray | None]], whole: bool = False) -> Iterator[Task]:
        """For parts (rows, seeds). The workers hold on to it until their next pass, so it does not refer to the set."""
        name, cache, index = self.name, self.pipeline.caches.get(self.name), self.index
        return (Task(name, cache, index[rows], seeds, whole) for rows, seeds in parts)

    def _column(self, parts: list[NDArray]) -> tuple[Tensor, ...]:
        """An array per batch -> a tensor per batch on the device, by one transfer."""
        whole = torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0)
        return whole.to(self.device).split([len(part) for part in parts])

    def _to_device(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, non_blocking=self.pipeline.on_card)  # pinned there, and there alone


def _draw_seeds(rng: np.random.Generator, n: int, views: int) -> NDArray[np.int64]:
    return rng.integers(0, 2**63 - 1, (n, views))


def _split(rows: NDArray) -> list[NDArray]:
    """The rows of one task after the other."""
    return [rows[start : start + PART] for start in range(0, len(rows), PART)]


def _ahead(function: Callable[[Any], Tensor], jobs: Iterable[Any]) -> Iterator[Tensor]:
    """function(job) of each job, in order, by threads some jobs ahead. Abandoned, it ends with the jobs begun."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque = deque()
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
