"""Resized images that are kept, so that they are decoded once: in memory for an epoch, or in a file for all runs.

`Kept` holds a data set's images in the order in which they came. `Cache` is a list's images in one flat file, mapped
into memory by all processes that read it. Images have one short side but vary in the other, so both hold bytes, one
image after the other, and where each begins: no Python object per image.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from dividemix import DivideMixError, warn
from dividemix.checkpoint import lock_file
from dividemix.filelist import ImageList
from dividemix.images import Views

if TYPE_CHECKING:  # which reads from here
    from dividemix.workers import Part

CHUNK = 64 << 20  # bytes in one piece of memory
_FORMAT = 2  # of the cache: another number, another file


def estimate(n: int, resize: int) -> int:
    """Bytes of n resized images; photos are on average 1.4 times as long as wide."""
    return int(n * resize * resize * 1.4 * 3)


# ---- In memory ----


class Kept:
    """n resized images in the memory of `device`; on the host they are given as numpy arrays, without a copy."""

    def __init__(self, n: int, device: torch.device):
        self.device, self.count = device, 0
        self.sizes = np.zeros((n, 2), np.int32)
        self._chunk, self._start = np.zeros(n, np.int32), np.zeros(n, np.int64)
        self._chunks: list[Tensor] = []
        self._used = 0  # bytes of the last chunk

    @property
    def full(self) -> bool:
        return self.count == len(self.sizes)

    def add(self, pixels: Tensor, sizes: NDArray[np.int32]) -> None:
        """The next images, as in `workers.Part`."""
        if not self._chunks or self._used + len(pixels) > len(self._chunks[-1]):
            self._chunks.append(torch.empty(max(CHUNK, len(pixels)), dtype=torch.uint8, device=self.device))
            self._used = 0
        self._chunks[-1][self._used : self._used + len(pixels)].copy_(pixels, non_blocking=True)
        rows = slice(self.count, self.count + len(sizes))
        ends = _ends(sizes)
        self.sizes[rows], self._chunk[rows] = sizes, len(self._chunks) - 1
        self._start[rows] = self._used + ends[:-1]
        self._used, self.count = self._used + len(pixels), rows.stop

    def image(self, i: int) -> Tensor:
        """(H, W, 3), a view."""
        height, width = self.sizes[i].tolist()
        return self._chunks[self._chunk[i]][self._start[i] :][: height * width * 3].view(height, width, 3)

    def train_batch(self, views: Views, index: NDArray, seeds: NDArray) -> Tensor:
        """uint8 (V, n, S, S, 3) on the device: training views of images `index` (n,) for seeds (n, V)."""
        if self.device.type == "cpu":
            return torch.from_numpy(views.train_batch((self.image(i).numpy() for i in index), seeds))
        boxes = [views.draw(*self.sizes[i], seed) for row in seeds.T.tolist() for i, seed in zip(index, row)]  # noqa: B905
        cut = self._cut(np.tile(index, seeds.shape[1]), boxes)
        flip = torch.tensor([box.flip for box in boxes]).to(self.device, non_blocking=True)[:, None, None, None]
        return torch.where(flip, cut.flip(2), cut).unflatten(0, seeds.T.shape)

    def eval_batch(self, views: Views, index: NDArray) -> Tensor:
        """uint8 (n, S, S, 3) on the device: the centres of images `index` (n,)."""
        if self.device.type == "cpu":
            return torch.from_numpy(views.eval_batch((self.image(i).numpy() for i in index), len(index)))
        return self._cut(index, [views.centre(*self.sizes[i]) for i in index])

    def _cut(self, index: NDArray, boxes: list) -> Tensor:
        """Boxes of the views' own size, on the device by one kernel."""
        return torch.stack(
            [
                self.image(i)[box.top : box.top + box.height, box.left : box.left + box.width]
                for i, box in zip(index, boxes, strict=True)
            ]
        )


def host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still take: of the machine's and of what its control groups (v2; containers and
    batch systems set them) allow it, the least. 0 where the system does not tell."""
    try:
        fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        least = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return 0
    with contextlib.suppress(OSError, ValueError):
        own = next(line[3:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::"))
        for group in [own, *map(str, Path(own).parents)]:
            with contextlib.suppress(OSError, ValueError):  # no limit here: no such file, or 'max'
                folder = groups / group.lstrip("/")
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                least = min(least, limit - used + int(stat["inactive_file"]))  # files' pages are given up when needed
    return max(least, 0)


# ---- In a file ----


class Cache:
    """Resized images of a whole list, mapped into memory: `<path>.images`; and in `<path>.npy` int32 (n, 3) their
    sizes, height and width, and the `changes` of `images.Shown`."""

    def __init__(self, pixels: NDArray[np.uint8], index: NDArray[np.int32]):
        self.pixels, self.sizes, self.changes = pixels, index[:, :2], index[:, 2]
        self.ends = _ends(self.sizes)

    @classmethod
    def open(cls, path: str, n: int) -> "Cache":
        """Raises ValueError or OSError for what is no whole cache of n images."""
        index = np.load(f"{path}.npy")
        if index.shape != (n, 3) or index.dtype != np.int32 or (index[:, :2] <= 0).any():
            raise ValueError(f"{path}.npy is not the index of {n} images")
        expected, length = int(_ends(index[:, :2])[-1]), os.path.getsize(f"{path}.images")
        if length != expected:
            raise ValueError(f"{path}.images has {length} bytes, expected {expected}")
        return cls(np.asarray(np.memmap(f"{path}.images", np.uint8, "r")), index)

    def image(self, i: int) -> NDArray[np.uint8]:
        """(H, W, 3), a view."""
        return self.pixels[self.ends[i] : self.ends[i + 1]].reshape(*self.sizes[i], 3)


def cache_path(folder: Path, name: str, images: ImageList, resize: int) -> str:
    """Where the cache of a list belongs. The name follows from all that its pixels depend on: the paths, sizes and
    times of the files, how they are read, the short side, and Pillow, whose decoder may change. Labels are no part
    of it."""
    key = hashlib.sha256(f"{_FORMAT} {images.as_shown} {resize} {PIL.__version__} {images.folder}\n".encode())
    for part in (images.paths.tobytes(), _file_states(images)):
        key.update(part)
    return str(folder / f"{name}-{resize}-{key.hexdigest()[:16]}")


def _file_states(images: ImageList) -> NDArray[np.int64]:
    """Size and time of each file (N, 2), -1 for one that cannot be asked."""

    def look(start: int) -> list[tuple[int, int]]:
        found = []
        for i in range(start, min(start + 256, len(images))):
            try:
                status = os.stat(images.path(i))
                found.append((status.st_size, status.st_mtime_ns))
            except (OSError, ValueError):
                found.append((-1, -1))
        return found

    with ThreadPoolExecutor(16) as pool:  # over a network most of the time is waiting
        parts = pool.map(look, range(0, len(images), 256))
        return np.array([state for part in parts for state in part], np.int64)


def is_whole(path: str, n: int) -> bool:
    """Whether there is a whole cache of n images at `path`; warns of a damaged one."""
    if not os.path.exists(f"{path}.npy"):  # written last
        return False
    try:
        Cache.open(path, n)
    except (OSError, ValueError, EOFError) as error:
        warn(f"the cache of resized images cannot be used and is built anew: {error}")
        return False
    return True


def check_space(folder: Path, need: int) -> None:
    """Make the cache's folder. Raises DivideMixError where `need` bytes more do not fit in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DivideMixError(f"cannot use {folder} for resized images: {error.strerror or error}") from error
    if need > free:
        raise DivideMixError(
            f"{folder}: the resized images need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, or "
            "give another folder, or run without a cache"
        )


def write_cache(path: str, parts: Iterable["Part"]) -> None:
    """Whole images, in the order of the list. There under its name when it is whole, and not at
    all if that fails. Raises DivideMixError where the disk refuses."""
    index = []
    temporary = f"{path}.tmp"
    try:
        with _writing(path):
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part.pixels.numpy())
                    index.append(np.column_stack([part.sizes, part.changes.astype(np.int32)]))
            os.replace(temporary, f"{path}.images")
            with open(temporary, "wb") as file:
                np.save(file, np.concatenate(index))
            os.replace(temporary, f"{path}.npy")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DivideMixError(f"cannot write the resized images to {path}.*: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Only one process at a time is in the block: several runs are often started together, with one cache."""
    with _writing(path):
        try:
            lock = lock_file(f"{path}.lock")
        except Timeout:
            warn(f"another run is building the cache of resized images {path}: waiting for it")
            lock = FileLock(f"{path}.lock")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _ends(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each image begins in a row of them, and where the last one ends: (n, 2) -> (n + 1,)."""
    ends = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes.prod(axis=1, dtype=np.int64) * 3, out=ends[1:])
    return ends
