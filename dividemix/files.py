"""Files that survive a crash: written completely or not at all, read with a check of their SHA-256, and locked."""

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
    """Write a file, as with `atomic_file`."""
    with atomic_file(path, exclusive) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing so that a reader finds the old content or the new: temporary file, fsync, rename, fsync.

    exclusive: an existing file is kept, and FileExistsError raised. Raises OSError (disk full, read-only ...); then the
    old file is unchanged, and the temporary one deleted.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # with mkstemp's 0600 other users could not read it
        if exclusive:
            _link_or_rename(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Windows opens no folder, and some file systems sync none
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _link_or_rename(temporary: str, path: Path) -> None:
    """Give a file its name. Raises FileExistsError for a name that is in use."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (OSError, AttributeError, NotImplementedError):  # exFAT and some network drives have no links
        open(path, "xb").close()
        os.replace(temporary, path)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz file, as with `atomic_file`."""
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def csv_bytes(table: Any, errors: str = "backslashreplace") -> bytes:
    """A pandas table as CSV, without its index. errors: as in str.encode, for file names that are no UTF-8; the default
    keeps the CSV readable."""
    text = table.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # before Python 3.13 such a name is not quoted, and would end the line
        text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    return text.encode("utf-8", errors)


def lock_file(path: str | Path) -> FileLock:
    """Lock a file until `release` or the end of this process; processes forked from it do not hold the lock. Raises
    filelock.Timeout if another process holds it, and OSError. A file system without locks gives a warning."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError) as error:  # a Timeout is an OSError
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warn(f"{path} cannot be locked ({error}): make sure that no other process uses it")
    return lock


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, also for a pipe, which could wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.read_bytes()


class HashingFile:
    """Hashes what `torch.save` writes, and writes it to a file. The file's first error is kept in `error`: raised in
    `write` it would be replaced, or end the process, in some versions of torch (pytorch issue 156955)."""

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
    """Write `state` for `load_file`, as with `atomic_file`. -> the SHA-256 of the file. No copy is made in memory: it
    would hold the GIL, so that the training thread could launch nothing meanwhile."""
    with atomic_file(path) as file:
        hashing: Any = HashingFile(file)
        torch.save(state, hashing)
        if hashing.error:
            raise hashing.error
    return hashing.sha256.hexdigest()


def load_file(path: Path, sha256: str = "") -> dict[str, Any]:
    """Read what `write_state` wrote: tensors and plain values; weights_only refuses a file that would run code. Raises
    DivideMixError that names the file, also if its SHA-256 is not `sha256` (if given)."""
    try:
        content = read_file(path)
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its content was changed: the SHA-256 differs")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("no dictionary")
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise DivideMixError(f"checkpoint {path} cannot be read ({reason[:120]})") from error
    return state
