"""Keeps resized images, so that they are decoded once: in memory for an epoch (`KeptImages`), or for all runs in one
flat file that all processes map into memory (`Cache`). Images have the same short side, but vary in the long one."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from dividemix import DivideMixError, warn
from dividemix.data.images import Views
from dividemix.data.lists import ImageList
from dividemix.files import lock_file

_FORMAT = 3  # of the cache; another number makes another file


class TaskResult(NamedTuple):
    """The images `index` (n,) of the list `name`. pixels uint8: their views (V, n, S, S, 3), or the uncut images one
    after the other, flattened; sizes int32 (n, 2): resized height, width; changes uint8 (n,): of `images.Shown`;
    checksums uint32 (n,): of the resized pixels, see `duplicates`."""

    name: str
    index: NDArray[np.int64]
    pixels: Tensor
    sizes: NDArray[np.int32]
    changes: NDArray[np.uint8]
    checksums: NDArray[np.uint32]


def estimate(n: int, resize: int) -> int:
    """Bytes of n resized images; a photo's long side is on average 1.4 times its short side."""
    return int(n * resize * resize * 1.4 * 3)


# ---- In memory ----


class KeptImages:
    """Resized images (H, W, 3) in the memory of `device`, in the order in which they are added: on the host arrays,
    which take less memory than tensors, else tensors."""

    def __init__(self, device: torch.device):
        self.device = device
        self.images: list[NDArray[np.uint8] | Tensor] = []

    def add(self, result: TaskResult) -> None:
        """Adds the uncut images of a result."""
        # Always a copy: a worker's result is in shared memory, of which there is little.
        pixels, sizes = result.pixels.to(self.device, non_blocking=True, copy=True), result.sizes
        for image, size in zip(pixels.split((sizes.prod(axis=1) * 3).tolist()), sizes.tolist(), strict=True):
            image = image.view(*size, 3)
            self.images.append(image.numpy() if self.device.type == "cpu" else image)

    def batch(self, views: Views, rows: NDArray, seeds: NDArray | None) -> Tensor:
        """`images.Views.batch` of the images `rows` (n,)."""
        return views.batch([self.images[i] for i in rows.tolist()], seeds)


def host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still take: the least of what the machine has free and what its control groups (v2,
    set by containers and batch systems) allow. 0 where the system does not tell."""

    def fields(file: Path) -> dict[str, str]:
        return dict(line.split()[:2] for line in file.read_text().splitlines())

    try:
        least = int(fields(proc / "meminfo")["MemAvailable:"]) * 1024
    except (OSError, KeyError):
        return 0
    with contextlib.suppress(OSError, StopIteration):
        lines = (proc / "self/cgroup").read_text().splitlines()
        group = groups / next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # without a limit: no such file, or 'max'
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                files = int(fields(folder / "memory.stat")["inactive_file"])  # the system frees these pages when needed
                least = min(least, limit - used + files)
    return max(least, 0)


# ---- In a file ----


class Cache:
    """Resized images of a whole list: `<path>.images`, mapped into memory, and `<path>.npy`, int64 (n, 4) with height,
    width, the `changes` of `images.Shown` and the checksum. Raises DivideMixError unless it is whole, of n images."""

    def __init__(self, path: str, n: int):
        try:
            index = np.load(f"{path}.npy")
            self.pixels = np.asarray(np.memmap(f"{path}.images", np.uint8, "r"))
            self.sizes, self.changes, self.checksums = index[:, :2], index[:, 2], index[:, 3]
            self.ends = np.concatenate([[0], np.cumsum(self.sizes.prod(axis=1) * 3)])
            if len(index) != n or len(self.pixels) != self.ends[-1]:
                raise ValueError(f"expected {n} images of {self.ends[-1]} bytes")
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise DivideMixError(f"the cache of resized images cannot be read: {path}.*: {error}") from error

    def image(self, i: int) -> NDArray[np.uint8]:
        """(H, W, 3), not copied."""
        return self.pixels[self.ends[i] : self.ends[i + 1]].reshape(*self.sizes[i], 3)


def cache_path(folder: Path, name: str, images: ImageList, resize: int) -> str:
    """The path of a list's cache. The name depends on all that the pixels depend on: the paths, sizes and times of the
    files, how they are read, the short side, and Pillow's version. It does not depend on labels."""

    def state(i: int) -> tuple[int, int]:
        try:
            status = os.stat(images.path(i))
        except (OSError, ValueError):
            return -1, -1
        return status.st_size, status.st_mtime_ns

    with ThreadPool(16) as pool:  # most of the time is waiting for the disk
        states = np.array(pool.map(state, range(len(images))), np.int64)
    key = hashlib.sha256(f"{_FORMAT} {images.as_shown} {resize} {PIL.__version__} {images.folder}\n".encode())
    for data in (images.paths.tobytes(), states):
        key.update(data)
    return str(folder / f"{name}-{resize}-{key.hexdigest()[:16]}")


def is_whole(path: str, n: int) -> bool:
    """Whether there is a whole cache of n images at `path`; warns of a damaged one."""
    try:
        Cache(path, n)
        return True
    except DivideMixError as error:
        if os.path.exists(f"{path}.npy"):  # written last
            warn(f"{error}: it is built again")
        return False


def check_space(folder: Path, need: int) -> None:
    """Makes the cache's folder. Raises DivideMixError where it has no room for `need` bytes."""
    with writing("the resized images", folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if need > free:
        sizes = f"need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        advice = "free some disk space, name another folder, or leave --cache_dir out"
        raise DivideMixError(f"{folder}: the resized images {sizes}: {advice}")


def write_cache(path: str, results: Iterable[TaskResult]) -> None:
    """Writes uncut images, in the order of the list. The cache gets its name when it is whole; a failure leaves nothing
    behind. Raises DivideMixError where the disk refuses."""
    index, temporary = [], f"{path}.tmp"
    with writing("the resized images", path):
        try:
            with open(temporary, "wb") as file:
                for result in results:
                    file.write(result.pixels.numpy())
                    columns = result.sizes, result.changes, result.checksums
                    index.append(np.column_stack([column.astype(np.int64) for column in columns]))
            os.replace(temporary, f"{path}.images")
            with open(temporary, "wb") as file:
                np.save(file, np.concatenate(index))
            os.replace(temporary, f"{path}.npy")
        finally:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def writing(what: str, path: str | Path) -> Iterator[None]:
    """Raises DivideMixError, which names both, where the block cannot write `what` to `path`."""
    try:
        yield
    except OSError as error:
        raise DivideMixError(f"cannot write {what} to {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Lets one process at a time into the block: several runs with one cache are often started together."""
    with writing("the resized images", path):
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
