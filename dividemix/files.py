"""Files that survive a crash: written whole or not at all, read with their SHA-256, locked against another process."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock

from dividemix import DivideMixError, warn


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


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
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
        hashing: Any = HashingFile(file)
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
