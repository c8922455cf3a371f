"""Images kept in memory and in files: the same pixels, found again, and no more room than there is."""

import fcntl
import multiprocessing
import os
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trees import make_clothing1M

import dataloader_clothing1M
from dividemix import DivideMixError, DivideMixWarning
from dividemix.data.images import Views
from dividemix.data.store import Cache, Kept, Part, cache_path, check_space, host_memory, is_whole, locked, write_cache

CPU = torch.device("cpu")


def some_images(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (16, int(rng.integers(16, 30)), 3), dtype=np.uint8) for _ in range(n)]


def part(images):
    flat = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    return Part("train", np.arange(len(images)), flat, sizes, np.arange(len(images)).astype(np.uint8))


# ---- In memory ----


def test_kept_images_are_those_that_came():
    """An image in the place of another; or in the workers' shared memory, of which there is little."""
    images, kept = some_images(40), Kept(CPU)
    for start in range(0, 40, 7):
        came = part(images[start : start + 7])
        kept.add(came)
        came.pixels.zero_()
    for found, image in zip(kept.images, images, strict=True):
        np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("seeds", [np.arange(6).reshape(3, 2), None], ids=["training", "evaluation"])
def test_views_on_a_card_are_those_on_the_host(seeds):
    """The choice of memory would change the training."""
    images, views = some_images(3), Views(16, 12)
    found = views.batch([torch.from_numpy(image) for image in images], seeds)
    assert found.shape == (1 if seeds is None else 2, 3, 12, 12, 3)
    assert torch.equal(found, views.batch(images, seeds))


def system(tmp_path: Path, available: int, **limits: tuple[int | str, int, int]) -> dict[str, Path]:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable:   {available // 1024} kB\n")
    (proc / "self/cgroup").write_text("0::/job/step\n")
    for name, (limit, used, files) in limits.items():
        folder = groups / {"root": "", "job": "job", "step": "job/step"}[name]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 0\n")
    return {"proc": proc, "groups": groups}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 1 << 30),
        ({"step": ("max", 5, 0), "job": (1 << 29, 1 << 28, 0)}, 1 << 28),
        ({"step": (1 << 29, 1 << 29, 1 << 20), "job": (1 << 30, 0, 0)}, 1 << 20),
        ({"root": (1 << 20, 1 << 21, 0)}, 0),
    ],
    ids=["no limit", "the job's limit", "files count as free", "beyond the limit"],
)
def test_memory_that_is_free(tmp_path, limits, expected):
    """In a container or a batch job: the run would be killed for the memory of a machine that is not all its own."""
    assert host_memory(**system(tmp_path, 1 << 30, **limits)) == expected


def test_memory_where_the_system_does_not_tell(tmp_path):
    """A run would end with an error on another system than Linux."""
    assert host_memory(tmp_path, tmp_path) == 0


# ---- In a file ----


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "train")


def test_a_cache_is_what_was_written(path):
    """Training on other pixels than without the cache."""
    images = some_images(20)
    write_cache(path, [part(images[:7]), part(images[7:])])
    assert is_whole(path, 20)
    cache = Cache(path, 20)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(cache.image(i), image)
    assert cache.changes.tolist() == [*range(7), *range(13)]
    assert sorted(os.listdir(os.path.dirname(path))) == ["train.images", "train.npy"]


def spoil(path: str, how: str) -> None:
    file = Path(f"{path}.npy" if "index" in how else f"{path}.images")
    if how == "too short":
        os.truncate(file, 1000)
    elif how == "too long":
        file.write_bytes(file.read_bytes() + b"x")
    elif how == "missing":
        file.unlink()
    elif how == "no index":
        file.write_bytes(b"")
    elif how == "another index":
        np.save(file, np.ones((3, 2), np.int32))
    elif how == "index of objects":
        np.save(file, np.array([{}], object), allow_pickle=True)
    elif how == "index of zeros":
        np.save(file, np.zeros((20, 2), np.int32))


@pytest.mark.parametrize(
    "how", ["too short", "too long", "missing", "no index", "another index", "index of objects", "index of zeros"]
)
def test_a_damaged_cache_is_not_used(path, how):
    """A copy that broke off: workers would die of reading past the end, or train on shifted pixels."""
    write_cache(path, [part(some_images(20))])
    spoil(path, how)
    with pytest.warns(DivideMixWarning, match="built anew"):
        assert not is_whole(path, 20)


def test_a_build_that_fails_leaves_nothing(path):
    """27 GB of half a cache on the disk, or half a cache that a later run takes for whole."""

    def broken():
        yield part(some_images(3))
        raise DivideMixError("bad image")

    with pytest.raises(DivideMixError, match="bad image"):
        write_cache(path, broken())
    assert os.listdir(os.path.dirname(path)) == []


def test_the_name_follows_from_the_files(tmp_path):
    """Pixels of a photo that was exchanged, or of another short side; or a new cache for other labels."""
    images = dataloader_clothing1M.load(make_clothing1M(tmp_path / "data")).train
    name = cache_path(tmp_path, "train", images, 256)
    relabeled = images.select(np.arange(len(images)))
    relabeled.labels[:] = 0
    assert cache_path(tmp_path, "train", relabeled, 256) == name
    assert cache_path(tmp_path, "train", images, 320) != name
    assert cache_path(tmp_path, "train", replace(images, as_shown=True), 256) != name
    assert cache_path(tmp_path, "train", images.select(np.arange(len(images))[::-1]), 256) != name
    os.utime(images.path(5), (1, 1))
    changed = cache_path(tmp_path, "train", images, 256)
    assert changed != name
    os.unlink(images.path(5))
    assert cache_path(tmp_path, "train", images, 256) not in (name, changed)


def test_room_on_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    """The disk would be full after minutes, for other users as well."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(10**9))
    check_space(tmp_path / "new" / "folder", 10**9)
    with pytest.raises(DivideMixError, match=r"need about 2\.5 GB, 1\.0 GB are free"):
        check_space(tmp_path, 5 * 10**9 // 2)


def test_a_folder_that_cannot_be_made(tmp_path):
    """A traceback for a mistyped folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DivideMixError, match="cannot write"):
        check_space(tmp_path / "file" / "cache", 1)


def test_a_disk_that_refuses(tmp_path):
    """A traceback that does not name the folder."""
    with pytest.raises(DivideMixError, match="cannot write"):
        write_cache(str(tmp_path / "gone" / "train"), [part(some_images(2))])
    (tmp_path / "file").touch()
    with pytest.raises(DivideMixError, match="cannot write"), locked(str(tmp_path / "file" / "train")):
        pass


def test_one_builds_at_a_time(path):
    """Two runs that are started together would write into one file."""
    import threading

    inside = []

    def other():
        with pytest.warns(DivideMixWarning, match="waiting"), locked(path):
            inside.append("other")

    with locked(path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.3)
        assert inside == []
        inside.append("first")
    thread.join(10)
    assert inside == ["first", "other"]


def test_a_lock_ends_with_its_block_whatever_was_started_in_it(tmp_path):
    """Workers start while the cache is built and live as long as the run: a second run, or another machine's rank,
    would wait for the end of the first."""
    path = str(tmp_path / "cache")
    with locked(path):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
    try:
        with open(f"{path}.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        worker.kill()
        worker.join()
