"""Files that survive a crash: atomic writes, and the checkpoints of a run.

A checkpoint is written under a new name, then the small last.json is pointed at it; the one before is kept. Whatever
moment the machine dies at, last.json names a file that is whole, and should that file be damaged later, the one
before is used.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import nn

from dividemix import DivideMixError, warn
from dividemix.ranks import Ranks

FORMAT = 1  # of a checkpoint's state

if TYPE_CHECKING:
    from pandas import DataFrame


def write_atomically(path: Path, content: bytes | memoryview, exclusive: bool = False) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path, exclusive) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Write a file so that a reader finds the old content or the new one, never a part: temporary file, fsync,
    rename, fsync.

    `exclusive` leaves a file that is there already and raises FileExistsError.
    Raises OSError (disk full, read-only ...) and then leaves the old file as it was and no temporary one.
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


def csv_bytes(table: "DataFrame", errors: str = "backslashreplace") -> bytes:
    """A table as CSV without its index, lines that end in a line feed. errors: what becomes of a name that is no text,
    as in str.encode; by default the file stays one that can be read."""
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
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
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
    """What `torch.save` writes to: hashes everything and passes it on to a file. The file's first error is kept for the
    caller: torch's C++ code would say another instead or, in some versions, end the process (pytorch issue 156955)."""

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
        """Called by torch; `atomic_file` does it."""


def write_state(path: Path, state: dict[str, Any]) -> str:
    """Write `state` for `from_bytes`, as `atomic_file` does. -> the SHA-256 of the file.

    It goes straight into the file: the GIL is free while it is hashed and written. A copy in memory, as by `to_bytes`,
    is made under the GIL, and the thread that trains launches nothing meanwhile.
    """
    with atomic_file(path) as file:
        hashing = HashingFile(file)
        torch.save(state, hashing)
        if hashing.error:
            raise hashing.error
    return hashing.sha256.hexdigest()


def to_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def save_last(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write `epoch-NNN.pt`, point last.json at it, and delete all but it and the one before."""
    pointer = folder / "last.json"
    before = json.loads(read_file(pointer)) if pointer.exists() else {}
    file = folder / f"epoch-{epoch:03d}.pt"
    entry = {"file": file.name, "sha256": write_state(file, state), "epoch": epoch}
    previous = {k: before[k] for k in entry} if before and before["epoch"] != epoch else before.get("previous")
    write_atomically(pointer, json.dumps(entry | {"previous": previous}, indent=1).encode())
    keep = {file.name, previous["file"] if previous else ""}
    for old in folder.glob("epoch-*.pt"):
        # Copies under other names, and folders, are the user's.
        if re.fullmatch(r"epoch-\d+\.pt", old.name) and old.name not in keep and old.is_file():
            old.unlink()


def load_last(folder: Path) -> dict[str, Any]:
    """The state of the last checkpoint that is whole, {} where there is no checkpoint yet.

    One whose content is not what was written, or that another version wrote, is passed over with a warning. Raises
    DivideMixError where there are checkpoints but none that loads.
    """
    pointer = folder / "last.json"
    if not pointer.exists():
        # The first epoch's file alone: the machine died before last.json was there.
        if any(re.fullmatch(r"epoch-0*[1-9]\d*\.pt", path.name) for path in folder.glob("epoch-*.pt")):
            raise DivideMixError(
                f"{pointer} is missing: put it back, or --fresh moves the folder aside and starts anew"
            )
        return {}
    try:
        last = json.loads(read_file(pointer))
        entries = [last, *([last["previous"]] if last["previous"] else [])]
        named = [(folder / Path(entry["file"]).name, entry["sha256"]) for entry in entries if entry["epoch"] >= 0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DivideMixError(f"{pointer} is damaged: --fresh moves the folder aside and starts anew") from error
    for path, sha256 in named:
        try:
            content = read_file(path)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise DivideMixError("its content is not what was written (sha256 differs)")
            state = from_bytes(content)
            if state.get("format") != FORMAT:
                raise DivideMixError(f"it is of another version of the project (format {state.get('format')})")
            return state
        except (OSError, ValueError, DivideMixError) as error:  # ValueError: a name with a null byte
            warn(f"checkpoint {path} is passed over: {error}")
    raise DivideMixError(f"no checkpoint in {folder} can be read: --fresh moves the folder aside and starts anew")


def from_bytes(content: bytes) -> dict[str, Any]:
    """Tensors and plain values only: weights_only refuses a file that would run code. Raises DivideMixError."""
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in many ways: zip, pickle, storage sizes
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # some have no text
        raise DivideMixError(f"not a loadable checkpoint ({reason[:120]})") from error
    if not isinstance(state, dict):
        raise DivideMixError("not a checkpoint of this project (no dictionary)")
    return state


def load_file(path: Path) -> dict[str, Any]:
    """`from_bytes` of a file. Raises DivideMixError naming the file."""
    try:
        return from_bytes(read_file(path))
    except OSError as error:
        raise DivideMixError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except DivideMixError as error:
        raise DivideMixError(f"checkpoint {path}: {error}") from error


def load_weights(nets: Sequence[nn.Module], states: Sequence[dict[str, Any]], source: str) -> None:
    """Raises DivideMixError, naming `source`, for states that are not those of such networks."""
    try:
        for net, state in zip(nets, states, strict=True):
            net.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise DivideMixError(f"{source} does not fit these networks: another --arch, --width or data set?") from error


def share(ranks: Ranks, state: dict[str, Any]) -> dict[str, Any]:
    """The first rank's state on all ranks. It travels as a checkpoint's bytes, and so comes as it would from a file."""
    if ranks.world == 1:
        return state
    content = ranks.from_first(to_bytes, state)
    return state if ranks.first else from_bytes(content)
