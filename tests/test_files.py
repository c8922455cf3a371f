"""Files: what is written is complete or not there, and nothing that is read runs code or waits for ever."""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.data import Call, pickled
from helpers.runs import assert_equal, full

from dividemix import DivideMixError, files
from dividemix.data.store import locked


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    """A full disk in the middle of a checkpoint takes the one before with it, or its remains fill the disk."""
    file = tmp_path / "file"
    files.write_atomically(file, b"old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        files.write_atomically(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("link", [None, OSError(errno.EPERM, "Operation not permitted")])
def test_a_system_that_syncs_no_folder_and_has_no_links(tmp_path, monkeypatch, link):
    """Windows, exFAT and some network drives: else no checkpoint could be written there."""
    opened = os.open

    def no_folder(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(files.os, "open", no_folder)
    if link is None:
        monkeypatch.delattr(files.os, "link")
    else:
        monkeypatch.setattr(files.os, "link", mock.Mock(side_effect=link))
    file = tmp_path / "file"
    for content in (b"old", b"new"):
        files.write_atomically(file, content)
        assert file.read_bytes() == content
    with pytest.raises(FileExistsError):
        files.write_atomically(file, b"other", exclusive=True)
    files.write_atomically(tmp_path / "once", b"content", exclusive=True)
    assert file.read_bytes() == b"new" and (tmp_path / "once").read_bytes() == b"content"
    assert len([*tmp_path.iterdir()]) == 2


def test_a_state_is_written_without_a_copy_of_it_in_python_s_memory(tmp_path):
    """Such a copy is made under the GIL: the loss pass beside it launches nothing, and the card idles."""
    state, path = {"nets": [{str(i): torch.randn(50_000) for i in range(20)}]}, tmp_path / "state.pt"  # 4 MB
    files.write_state(path, state)  # imports
    tracemalloc.start()
    try:
        sha256 = files.write_state(path, state)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_equal(files.load_file(path, sha256), state)
    assert_equal(torch.load(path, weights_only=True), state)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' full disk")
def test_a_disk_that_fills_up_in_the_middle_of_a_state_is_an_error_of_the_system(tmp_path, monkeypatch):
    """torch's own error, or the end of the process, says nothing of the disk; and the old file must stay."""
    path = tmp_path / "best.pt"
    path.write_bytes(b"old")
    device = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(files.tempfile, "mkstemp", lambda **_: (device, str(tmp_path / "temporary")))
    with pytest.raises(OSError) as error:
        files.write_state(path, {"w": torch.zeros(100_000)})
    assert error.value.errno == errno.ENOSPC and path.read_bytes() == b"old"


def test_a_state_that_would_run_code_or_is_anothers_is_refused(tmp_path):
    """A checkpoint from the internet is a pickle: loading it must not be trusting it."""
    path, marker = tmp_path / "state.pt", tmp_path / "marker"
    for content in ({"nets": [Call(os.mkdir, str(marker))]}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(DivideMixError, match=r"state\.pt") as error:
            files.load_file(path)
        assert "\n" not in str(error.value)
    files.write_state(path, {"w": 1})
    with pytest.raises(DivideMixError, match="SHA-256"):
        files.load_file(path, "0" * 64)
    assert not marker.exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Lustre without flock, some network folders: every run is refused, for another process that does not exist."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with pytest.warns(UserWarning, match=r"\.lock cannot be locked"):
        files.lock_file(tmp_path / ".lock").release()
    with pytest.warns(UserWarning, match=r"cache\.lock cannot be locked"), locked(str(tmp_path / "cache")):
        pass


def test_a_pipe_is_not_waited_for(tmp_path):
    """A pipe where a file is expected: a run says nothing until a queue kills it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file"):
        files.read_file(tmp_path / "pipe")


def test_a_lock_is_not_held_on_by_workers(tmp_path):
    """Workers outlive a killed main process for seconds: the same command again would be refused."""
    lock, context = files.lock_file(tmp_path / ".lock"), multiprocessing.get_context("fork")
    running, stop = context.Event(), context.Event()
    worker = context.Process(target=lambda: running.set() or stop.wait(60))
    worker.start()
    assert running.wait(60)
    try:
        lock.release()
        files.lock_file(tmp_path / ".lock").release()
    finally:
        stop.set()
        worker.join()


# ---- Pickles from elsewhere ----


def forged_arrays() -> list[bytes]:
    """Arrays whose 640 bytes numpy would take for addresses, or whose parts are of another kind."""
    addresses, empty = np.arange(1, 81).tobytes(), np._core.multiarray._reconstruct
    forged = Call(np.dtype, "i8", False, True, state=(3, "<", None, None, None, -1, -1, 63))
    tame = Call(np.dtype, "O", False, True, state=(3, "|", None, None, None, -1, -1, 0))
    types = ["O", "O8", "V8,O", "(1,)O", "V8", forged, tame, Call(np.dtype, "O"), Call(np.dtype, [("a", "O")])]
    calls = [Call(np.ndarray, (40,), kind, addresses) for kind in types]
    calls += [Call(empty, np.ndarray, (40,), kind, state=(1, (40,), kind, False, addresses)) for kind in types]
    sound = Call(np.dtype, "i8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
    wide, many = (), addresses * 1_600  # 1 MB
    for _ in range(60):
        wide = (wide, wide)

    def array(shape: object, data: bytes = addresses) -> Call:
        return Call(empty, np.ndarray, (0,), "b", state=(1, shape, sound, False, data))

    calls += map(array, [{"a": wide}, (-2,), (10**30,), ("a",), None])
    calls.append(Call(np._core.numeric._frombuffer, addresses, sound, (80,), "K", {"a": wide}))
    calls.append([array((len(many) // 8,), many) for _ in range(5_000)])
    return [pickled({"a": call}) for call in calls]


DEEP = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple ...
WIDE = b"N" + b"2\x86" * 60  # a tuple of two tuples of two ...: 2 ** 60 elements to hash or show
ARRAY, MILLION = b"cnumpy\nndarray\n", (10**6).to_bytes(4, "little")
EQUAL_HASHES = b"".join(b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"N" for k in range(1, 200_000))
HOSTILE = {
    "deep key": b"}" + DEEP + b"Ns.",
    "deep key as text": b"}c_codecs\nencode\n" + DEEP + b"\x85RNs.",
    "wide key": b"}" + WIDE + b"Ns.",
    "wide key, dict at once": b"(" + WIDE + b"Nd.",
    "keys of equal hash": b"}(" + EQUAL_HASHES + b"u.",
    "set": b"\x80\x04\x8f(" + DEEP + b"\x90.",
    "frozen set": b"\x80\x04(" + DEEP + b"\x91.",
    "chain of functions": ARRAY + (b"q\x00" + ARRAY + b"N}U\x07__doc__h\x00s\x86b") * 50_000 + b".",
    "copies of arguments": b"]" + ARRAY + b"q\x00(" + b"N" * 10**6 + b"tq\x01" + b"h\x00h\x01R" * 10**4 + b".",
    "copies of text": b"}U\x01a](T" + MILLION + b"x" * 10**6 + b"q\x00" + b"h\x00" * 10**6 + b"es.",
}


def test_no_pickle_crashes_or_stops_the_process(tmp_path):
    """A file of 300 bytes ends a night's queue, or fills the memory. numpy's own ndarray of objects takes bytes of a
    file for addresses, and crashes or runs what lies there."""
    contents = [*HOSTILE.values(), *forged_arrays()]

    def read_all() -> None:
        import resource  # Windows has none

        limit = 4 * 2**30
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        for number, content in enumerate(contents):
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):  # not MemoryError
                files.read_pickle(content, "a")
            (tmp_path / f"{number}").touch()

    process = multiprocessing.get_context("fork").Process(target=read_all)
    process.start()
    process.join()
    assert process.exitcode == 0 and len(list(tmp_path.iterdir())) == len(contents)
