"""Files that survive a crash: atomic writes, and the checkpoints of a run.

A checkpoint is written under a new name, then the small last.json is pointed at it; the one before is kept. Whatever
moment the machine dies at, last.json names a file that is whole. Should it be damaged later, the one before is used.
"""

import contextlib
import copy
import csv
import errno
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn

from dividemix import DivideMixError, warn

FORMAT = 1  # of a checkpoint's state


def write_atomically(path: Path, content: bytes | memoryview, exclusive: bool = False) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path, exclusive) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Write a file so that a reader finds the old content or the new one: temporary file, fsync, rename, fsync.

    `exclusive` leaves a file that is there already and raises FileExistsError. Raises OSError (disk full, read-only
    ...) and then leaves the old file as it was and no temporary one.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared run or noise file from colleagues
        if exclusive:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_arrays(path: Path, arrays: dict[str, NDArray]) -> None:
    """An .npz file, as `atomic_file` writes it."""
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def csv_bytes(table: Any, errors: str = "backslashreplace") -> bytes:
    """A pandas table as CSV without its index, lines that end in a line feed. errors: what becomes of a name that is no
    text, as in str.encode; by default the file stays one that can be read."""
    text = table.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # before Python 3.13 such a name is not quoted, and ends its line for every reader
        text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    return text.encode("utf-8", errors)


def lock_file(path: str | Path) -> FileLock:
    """Hold the lock of a file until `release`, or the end of this process; never in a process forked from it. Raises
    filelock.Timeout where another process holds it, and OSError. On a file system without locks it is not locked, with
    a warning."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError) as error:  # a Timeout is an OSError
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warn(f"{path} cannot be locked ({error}): see to it that no other process uses it")
    return lock


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, also for a pipe, which would be waited for."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.read_bytes()


class HashingFile:
    """Hashes what `torch.save` writes and passes it on to a file. The file's first error is kept: raised in `write`, it
    becomes another one, or ends the process, in some versions of torch (pytorch issue 156955)."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """torch calls it; `atomic_file` flushes."""


def write_state(path: Path, state: dict[str, Any]) -> str:
    """Write `state` for `load_file`, as `atomic_file` does. -> the SHA-256 of the file. No copy is made in memory: that
    would be done under the GIL, and the thread that trains launches nothing meanwhile."""
    with atomic_file(path) as file:
        hashing = HashingFile(file)
        torch.save(state, hashing)
        if hashing.error:
            raise hashing.error
    return hashing.sha256.hexdigest()


def load_file(path: Path, sha256: str = "") -> dict[str, Any]:
    """What `write_state` wrote: tensors and plain values only, since weights_only refuses a file that would run code.
    Raises DivideMixError, naming the file, also where its SHA-256 is not the one given."""
    try:
        content = read_file(path)
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its content is not what was written: sha256 differs")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("no dictionary")
    except Exception as error:  # a damaged file can fail in many ways: zip, pickle, storage sizes
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise DivideMixError(f"checkpoint {path} cannot be read ({reason[:120]})") from error
    return state


def load_weights(nets: Sequence[nn.Module], states: Sequence[dict[str, Any]], source: str) -> None:
    """Raises DivideMixError, naming `source`, for states that are not those of such networks."""
    try:
        for net, state in zip(nets, states, strict=True):
            net.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise DivideMixError(f"{source} does not fit these networks: another --arch, --width or data set?") from error


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoints of a run


def save_last(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write `epoch-NNN.pt`, point last.json at it, and delete all but it and the one before."""
    pointer, path = folder / "last.json", folder / f"epoch-{epoch:03d}.pt"
    before = json.loads(read_file(pointer)) if pointer.exists() else None
    entry = {"file": path.name, "sha256": write_state(path, state), "epoch": epoch}
    was_damaged = before and before["epoch"] == epoch  # and so the run goes on from the one before it
    previous = before["previous"] if was_damaged else before and {name: before[name] for name in entry}
    write_atomically(pointer, json.dumps(entry | {"previous": previous}, indent=1).encode())
    kept = {path.name, previous and previous["file"]}
    for old in folder.glob("epoch-*.pt"):
        if re.fullmatch(r"epoch-\d+\.pt", old.name) and old.name not in kept:  # other names are the user's copies
            old.unlink()


def load_last(folder: Path) -> dict[str, Any]:
    """The state of the last checkpoint, {} where there is none yet. One that is not what was written, or of another
    version, is passed over with a warning. Raises DivideMixError where there are checkpoints but none that loads."""
    pointer, remedy = folder / "last.json", "--fresh moves the folder aside and starts anew"
    if not pointer.exists():
        # The first epoch's file alone: the machine died before last.json was there.
        if any(re.fullmatch(r"epoch-0*[1-9]\d*\.pt", path.name) for path in folder.glob("epoch-*.pt")):
            raise DivideMixError(f"{pointer} is missing: put it back, or {remedy}")
        return {}
    try:
        last = json.loads(read_file(pointer))
        entries = [(folder / entry["file"], entry["sha256"]) for entry in (last, last["previous"]) if entry]
    except Exception as error:
        raise DivideMixError(f"{pointer} is damaged: {remedy}") from error
    for path, sha256 in entries:
        try:
            state = load_file(path, sha256)
            if state.get("format") == FORMAT:
                return state
            warn(f"{path} is passed over: another version of the project wrote it")
        except DivideMixError as error:
            warn(f"{error}: it is passed over")
    raise DivideMixError(f"no checkpoint in {folder} can be read: {remedy}")


def to_host(value: Any, room: Any = None) -> Any:
    """A copy of `value` to be written while training goes on: its tensors in host memory, its lists and dicts its own.

    `room`: an earlier copy that nobody reads any more; its tensors are written anew where they fit. New memory of this
    size takes the system longer than the copying. For a CUDA card the memory is pinned, several times faster.
    """
    if isinstance(value, Tensor):
        kind = value.shape, value.dtype, value.stride()
        if room is None or (room.shape, room.dtype, room.stride()) != kind:
            room = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return room.copy_(value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with a state dict's metadata
        copied.update({key: to_host(item, (room or {}).get(key)) for key, item in value.items()})
        return copied
    if isinstance(value, list):
        return [to_host(item, earlier) for item, earlier in zip(value, chain(room or [], repeat(None)), strict=False)]
    return value
