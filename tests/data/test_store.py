"""Images kept in memory and in files: the same pixels, found again, and no more room than there is."""

import io
import os
import shutil
import threading
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
from dividemix.data.store import TaskResult, cache_path, check_space, host_memory, is_whole, locked, write_cache


def random_images(n):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (16, int(rng.integers(16, 30)), 3), dtype=np.uint8) for _ in range(n)]


def result_of(images):
    flat = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    return TaskResult(
        "train",
        np.arange(len(images)),
        flat,
        sizes,
        np.arange(len(images)).astype(np.uint8),
        np.uint32(sizes[:, 1]) << 26,
    )


def test_kept_images_are_copies():
    """They would stay in the workers' shared memory, of which there is little."""
    images, kept = random_images(7), store.KeptImages(torch.device("cpu"))
    kept.add(result := result_of(images))
    result.pixels.zero_()
    for image, expected in zip(kept.images, images, strict=True):
        np.testing.assert_array_equal(image, expected)


def test_views_on_a_card_are_those_on_the_host():
    """The choice of memory would change the training."""
    images, views = random_images(3), Views(16, 12)
    for seeds in (np.arange(6).reshape(3, 2), None):
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


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_a_damaged_cache_is_not_used(tmp_path):
    """A copy that broke off: workers would die of reading past the end, or train on shifted pixels."""
    path = str(tmp_path / "train")
    write_cache(path, [result_of(random_images(20))])
    pixels, index = (Path(f"{path}.{ending}") for ending in ("images", "npy"))
    sound = pixels.read_bytes(), index.read_bytes()
    assert is_whole(path, 20)
    other_shape, objects = npy(np.ones((20, 2), np.int32)), npy(np.array([{}], object))
    damages = [(sound[0][:1000], sound[1]), (sound[0] + b"x", sound[1]), (b"", sound[1])]
    damages += [(sound[0], content) for content in (b"", other_shape, objects)]
    for contents in damages:
        pixels.write_bytes(contents[0])
        index.write_bytes(contents[1])
        with pytest.warns(DivideMixWarning, match=path):
            assert not is_whole(path, 20)


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
        write_cache(str(tmp_path / "gone" / "train"), [result_of(random_images(2))])
    with pytest.raises(DivideMixError, match=str(file)), locked(str(file / "train")):
        pass


def test_one_builds_at_a_time(tmp_path):
    """Two runs that are started together would write into one file."""
    path, inside = str(tmp_path / "train"), []

    def second_run():
        with pytest.warns(DivideMixWarning, match=path), locked(path):
            inside.append("second")

    with locked(path):
        thread = threading.Thread(target=second_run)
        thread.start()
        thread.join(0.3)
        assert inside == []
        inside.append("first")
    thread.join(10)
    assert inside == ["first", "second"]
