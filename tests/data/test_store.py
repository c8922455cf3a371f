"""Images kept in memory and in files: the same pixels, found again, and no more room than there is."""

import fcntl
import io
import multiprocessing
import os
import shutil
import threading
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
from dividemix.data import store
from dividemix.data.images import Views
from dividemix.data.store import Cache, TaskResult, cache_path, check_space, host_memory, is_whole, locked, write_cache


def some_images(n):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (16, int(rng.integers(16, 30)), 3), dtype=np.uint8) for _ in range(n)]


def result_of(images):
    flat = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    return TaskResult("train", np.arange(len(images)), flat, sizes, np.arange(len(images)).astype(np.uint8))


# ---- In memory ----


def test_kept_images_are_those_that_came():
    """An image in the place of another; or in the workers' shared memory, of which there is little."""
    images, kept = some_images(20), store.KeptImages(torch.device("cpu"))
    for start in range(0, 20, 7):
        result = result_of(images[start : start + 7])
        kept.add(result)
        result.pixels.zero_()
    for image, expected in zip(kept.images, images, strict=True):
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("seeds", [np.arange(6).reshape(3, 2), None], ids=["training", "evaluation"])
def test_views_on_a_card_are_those_on_the_host(seeds):
    """The choice of memory would change the training."""
    images, views = some_images(3), Views(16, 12)
    on_card = views.batch([torch.from_numpy(image) for image in images], seeds)
    assert on_card.shape == (1 if seeds is None else 2, 3, 12, 12, 3)
    assert torch.equal(on_card, views.batch(images, seeds))


@pytest.mark.parametrize(
    ("limits", "expected"),  # of a group: its limit, the memory in use, and what of that are files
    [
        ({}, 1 << 30),
        ({"job/step": ("max", 5, 0), "job": (1 << 29, 1 << 28, 0)}, 1 << 28),
        ({"job/step": (1 << 29, 1 << 29, 1 << 20), "job": (1 << 30, 0, 0)}, 1 << 20),
        ({"": (1 << 20, 1 << 21, 0)}, 0),
    ],
    ids=["no limit", "the job's limit", "files count as free", "beyond the limit"],
)
def test_memory_that_is_free(tmp_path, limits, expected):
    """In a container or a batch job the run would be killed for memory that only the machine has."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable:   {(1 << 30) // 1024} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    for name, (limit, used, files) in limits.items():
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 0\n")
    assert host_memory(tmp_path / "proc", tmp_path / "groups") == expected
    assert host_memory(tmp_path, tmp_path) == 0


# ---- In a file ----


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "train")


def test_a_cache_is_what_was_written(path):
    """Training on other pixels than without the cache."""
    images = some_images(20)
    write_cache(path, [result_of(images[:7]), result_of(images[7:])])
    assert is_whole(path, 20)
    cache = Cache(path, 20)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(cache.image(i), image)
    assert cache.changes.tolist() == [*range(7), *range(13)]
    assert sorted(os.listdir(os.path.dirname(path))) == ["train.images", "train.npy"]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


DAMAGE = {
    "too short": ("images", lambda content: content[:1000]),
    "too long": ("images", lambda content: content + b"x"),
    "missing": ("images", None),
    "no index": ("npy", lambda content: b""),
    "index of another shape": ("npy", lambda content: npy(np.ones((3, 2), np.int32))),
    "index of objects": ("npy", lambda content: npy(np.array([{}], object))),
}


@pytest.mark.parametrize(("ending", "change"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_not_used(path, ending, change):
    """A copy that broke off: workers would die of reading past the end, or train on shifted pixels."""
    write_cache(path, [result_of(some_images(20))])
    file = Path(f"{path}.{ending}")
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    with pytest.warns(DivideMixWarning, match=path):
        assert not is_whole(path, 20)


def test_a_build_that_fails_leaves_nothing(path):
    """27 GB of half a cache on the disk, or half a cache that a later run takes for whole."""

    def broken():
        yield result_of(some_images(3))
        raise DivideMixError("bad image")

    with pytest.raises(DivideMixError, match="bad image"):
        write_cache(path, broken())
    assert os.listdir(os.path.dirname(path)) == []


def test_the_name_follows_from_the_files(tmp_path):
    """Pixels of a photo that was exchanged, or of another short side; or a new cache for other labels."""
    images = dataloader_clothing1M.load(make_clothing1M(tmp_path / "data", 14, 14, 14)).train
    name = cache_path(tmp_path, "train", images, 256)
    relabeled = images.select(np.arange(len(images)))
    relabeled.labels[:] = 0
    assert cache_path(tmp_path, "train", relabeled, 256) == name
    names = {name, cache_path(tmp_path, "train", images, 320)}
    names |= {cache_path(tmp_path, "train", replace(images, as_shown=True), 256)}
    names |= {cache_path(tmp_path, "train", images.select(np.arange(len(images))[::-1]), 256)}
    os.utime(images.path(5), (1, 1))
    names |= {cache_path(tmp_path, "train", images, 256)}
    os.unlink(images.path(5))
    names |= {cache_path(tmp_path, "train", images, 256)}
    assert len(names) == 6


def test_a_disk_without_room_or_that_refuses(tmp_path, monkeypatch):
    """The disk would be full after minutes, for other users as well; a mistyped folder would end in a traceback."""
    assert store.estimate(10**6, 256) == 275_251_200_000
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(10**9))
        check_space(tmp_path / "new" / "folder", 10**9)
        with pytest.raises(DivideMixError, match=r"2\.5 GB.* 1\.0 GB"):
            check_space(tmp_path, 5 * 10**9 // 2)
    (file := tmp_path / "file").touch()
    with pytest.raises(DivideMixError, match=str(file)):
        check_space(file / "cache", 1)
    with pytest.raises(DivideMixError, match="gone"):
        write_cache(str(tmp_path / "gone" / "train"), [result_of(some_images(2))])
    with pytest.raises(DivideMixError, match=str(file)), locked(str(file / "train")):
        pass


def test_one_builds_at_a_time(path):
    """Two runs that are started together would write into one file."""
    inside = []

    def other():
        with pytest.warns(DivideMixWarning, match=path), locked(path):
            inside.append("other")

    with locked(path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.3)
        assert inside == []
        inside.append("first")
    thread.join(10)
    assert inside == ["first", "other"]


def test_a_lock_ends_with_its_block_whatever_was_started_in_it(path):
    """Workers that start while the cache is built would hold the lock as long as the run."""
    with locked(path):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
    try:
        with open(f"{path}.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        worker.kill()
        worker.join()
