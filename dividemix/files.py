"""Files that survive a crash: written completely or not at all, read with a check of their SHA-256, and locked. And
pickles of others, read without running the code in them."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
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


# ---- Pickles of others: number arrays and plain values; no code is run ----

_ALLOWED = re.compile(  # the names that number arrays need, from numpy 1 and 2 and Python 2 and 3, in all protocols
    r"numpy\.(ndarray|dtype|_?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer))"
    r"|_codecs\.encode|(builtins|__builtin__)\.(bytes|bytearray)"
)


def read_pickle(content: bytes, *names: str) -> dict[Any, Any]:
    """The dict in a pickle: text as str, number arrays as np.ndarray. Only the entries `names` have their values, the
    others None. The dict may take 70 times the memory of the pickle. Raises ValueError for a name of other code; damage
    can end in any error: EOFError, AttributeError, MemoryError, RecursionError ..."""
    entries = _Dict()
    for key, item in _Unpickler(content).load().items():
        entries[_value(key)] = item
    return {key: _entry(item) if key in names else None for key, item in entries.items()}


def _entry(item: Any) -> Any:
    if not isinstance(item, list):
        return _value(item)
    values: dict[int, Any] = {}  # a list may have one object millions of times
    for part in item:
        if id(part) not in values:
            values[id(part)] = _value(part)
            if isinstance(values[id(part)], np.ndarray):
                raise ValueError("an array in a list")
    return [values[id(part)] for part in item]


@dataclass(eq=False, repr=False)
class _Call:
    """Stands for a function in a pickle, and for the call of it. Reading calls no function; `_value` works out the
    result afterwards. numpy's own would let a file crash the process: arrays of type "O" take its bytes for addresses.
    """

    function: str
    args: tuple = ()
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dict(dict):
    """Takes no keys whose hashes can crash or stop the process, such as tuples of tuples of tuples ..."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not (isinstance(key, str | bytes | _Call) or (isinstance(key, int) and abs(key) < 2**60)):
            raise ValueError("a key that is no text and no whole number")
        super().__setitem__(key, value)


class _Unpickler(pickle._Unpickler):
    """Imports nothing: allowed names and their calls are recorded, any other name is refused. Extends pickle's Python
    version, since the C version allocates a table of a size that the file names (LONG_BINPUT): 64 GB for one damaged
    byte."""

    stack: Any  # of pickle's, which its type stubs lack
    append: Any
    read: Any
    pop_mark: Any

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")  # str of Python 2 stays bytes
        own = {pickle.REDUCE: _Unpickler.load_reduce, pickle.BYTEARRAY8: _Unpickler.load_bytearray8}
        own |= {pickle.EMPTY_DICT: _Unpickler.load_empty_dictionary, pickle.DICT: _Unpickler.load_dict}
        self.dispatch = self.dispatch | {opcode[0]: load for opcode, load in own.items()}
        for opcode in (pickle.EMPTY_SET, pickle.FROZENSET):  # they hash their elements
            del self.dispatch[opcode[0]]

    def find_class(self, module: str, name: str) -> Any:
        if not _ALLOWED.fullmatch(f"{module}.{name}"):
            raise ValueError(f"it asks for {module[:40]}.{name[:40]}: no code is run")
        return _Call(name)

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(_Call(function.function, args))

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_Dict())
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    def load_bytearray8(self) -> None:  # pickle's own allocates the length in the file before it reads
        self.append(self.read(struct.unpack("<Q", self.read(8))[0]))


def _value(item: Any) -> Any:
    """The result of a recorded call: a number, a number array, or text. Other items are returned unchanged."""
    if isinstance(item, bytes):
        return item.decode("latin1")
    if not isinstance(item, _Call):
        return item
    if item.function in ("encode", "bytes", "bytearray"):  # encode("...", "latin1"), bytes(), or even bytes(10**12)
        return item.args[0] if item.args else ""
    order: Any
    if item.function == "_frombuffer":
        data, dtype, shape, order, *axes = item.args
    elif item.function == "_reconstruct":  # the opcode BUILD has set its state
        _, shape, dtype, is_fortran, data = item.state
        order, axes = "F" if is_fortran else "C", []
    else:
        (dtype, data), shape, order, axes = item.args, (), "C", []  # scalar
    code, byte_order = _value(dtype.args[0]), _value(dtype.state[1])
    if not re.fullmatch("b1|[iu][1248]|f[248]", code) or byte_order not in ("<", ">", "|", "="):
        raise ValueError(f"array of {code[:20]!r}, expected numbers")
    if isinstance(data, _Call):
        data = _value(data).encode("latin1")
    flat = np.frombuffer(data, np.dtype(code).newbyteorder(byte_order)) if len(data) else np.empty(0, code)
    shape, axes = tuple(shape), [*map(tuple, axes)]  # numpy shows others in its errors, which may take for ever
    array = flat.reshape(shape).transpose(*axes) if order == "K" else flat.reshape(shape, order=order)
    return array.item() if item.function == "scalar" else array
