"""Human label noise: CIFAR-10N and CIFAR-100N, the labels that people on the Internet gave to CIFAR's training images.

Source: Wei, Zhu, Cheng, Liu, Niu, Liu, "Learning with Noisy Labels Revisited: A Study Using Real-World Human
Annotations", ICLR 2022. A file of torch.save with a dict of int64 arrays (N,): `clean_label` and the noisy ones.
"""

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.files import read_file

TRUTH = "clean_label"
_KEYS = {  # three labels an image (random), their majority, and one that is wrong where any of them is (worse)
    "cifar10": ("worse_label", "aggre_label", "random_label1", "random_label2", "random_label3"),
    "cifar100": ("noisy_label",),
}
KEYS = (*_KEYS["cifar10"], *_KEYS["cifar100"])
_FILES = {"cifar10": "CIFAR-10_human.pt", "cifar100": "CIFAR-100_human.pt"}
_PUBLISHED = "https://github.com/UCSC-REAL/cifar-10-100n, folder data"


def keys(dataset: str) -> tuple[str, ...]:
    """The noisy labels that this data set's file has; of a set without a published file, all names."""
    return _KEYS.get(dataset, KEYS)


def find(dataset: str, data_folder: Path | None) -> Path | None:
    """The published file beside the data: in the folder of CIFAR's batches or the one above; None where it is not."""
    places = [data_folder, data_folder.parent] if data_folder and dataset in _FILES else []
    return next((place / _FILES[dataset] for place in places if (place / _FILES[dataset]).is_file()), None)


def missing(dataset: str, data_folder: Path | None) -> DivideMixError:
    """The error where there is no file and none is named."""
    if dataset not in _FILES or data_folder is None:
        return DivideMixError(f"--noise_mode human: {dataset} has no published file, name one with --noise_file")
    places = f"{data_folder} or {data_folder.parent}"
    how = f"get it from {_PUBLISHED}, or name it with --noise_file"
    return DivideMixError(f"--noise_mode human: {_FILES[dataset]} is not in {places}: {how}")


def read(path: Path, key: str, truth: NDArray[np.int64], num_class: int) -> NDArray[np.int64]:
    """The labels `key` (N,) int64 of a file whose `clean_label` is the truth (N,).

    Raises DivideMixError naming the file and what is wrong with it; whatever it holds, no code of it is run.
    """
    arrays = _load(path, len(truth))
    for name in (TRUTH, key):
        if name not in arrays:
            plain = [name for name in arrays if isinstance(name, str) and re.fullmatch(r"\w{1,40}", name)]
            there = ", ".join(plain[:12]) or "others"
            how = "choose one of these with --noise_key, or another --noise_file"
            raise DivideMixError(f"noise file {path}: it has no {name!r}, only {there}: {how}")
    clean, given = (_labels(path, name, arrays[name], len(truth), num_class) for name in (TRUTH, key))
    if differ := int((clean != truth).sum()):
        raise _bad(path, f"its {TRUTH} is not the data set's label for {differ} of {len(truth)} samples")
    return given


def _bad(path: Path, what: str) -> DivideMixError:
    return DivideMixError(f"noise file {path}: {what}: name a good copy with --noise_file ({_PUBLISHED})")


# ---- The file: torch.load with weights_only, and the names admitted that arrays need ----


class _Recorded:
    """Stands for each of these names while a file is read: it keeps what the file says of an array, and makes none.

    Numpy's own would let a file crash the process: ndarray takes bytes for pointers where its type is "O", and an array
    of numbers that is filled twice frees the memory of a tensor that was made of it in between.
    """

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


_NAMES = "ndarray", "dtype", "_core.multiarray._reconstruct", "core.multiarray._reconstruct"  # of numpy 2 and numpy 1
_ADMITTED: list[Any] = [(_Recorded, f"numpy.{name}") for name in _NAMES]


def _load(path: Path, n: int) -> dict[Any, Any]:
    """The dict in the file, of any entries. `n`: how many labels an array should have, for a limit on what is read."""
    try:
        content = read_file(path)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # what torch.save writes
            # The published files have 48 bytes a sample.
            if sum(entry.file_size for entry in archive.infolist()) > 2**20 + 256 * n:
                raise _bad(path, f"far too large for {n} labels once unpacked")
        with torch.serialization.safe_globals(_ADMITTED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: it is read, or the error says what failed
            arrays = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except DivideMixError:
        raise
    except OSError as error:
        raise DivideMixError(f"noise file {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damage can end in anything: BadZipFile, UnpicklingError, KeyError, MemoryError ...
        if asked := re.search(r"GLOBAL ([\w.]{1,60})", str(error)):
            raise _bad(path, f"it asks for {asked[1]!r}, refused and nothing run") from error
        raise _bad(path, "damaged, or not a file of int64 arrays that torch.save wrote") from error
    if not isinstance(arrays, dict):
        raise _bad(path, "it should hold one dict of arrays, and holds something else")
    return arrays


def _labels(path: Path, name: str, array: Any, n: int, num_class: int) -> NDArray[np.int64]:
    """(n,) int64 from what the file says of an array, checked: type, length, range."""
    try:
        _version, shape, dtype, _fortran, data = array.state
        code, order = dtype.args[0], dtype.state[1]
        labels = np.frombuffer(data, f"{order}i8").astype(np.int64)
        if code != "i8" or order not in ("<", ">") or shape != labels.shape:
            raise TypeError
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise _bad(path, f"{name!r} is not an array (N,) of int64 numbers") from error
    if len(labels) != n:
        raise _bad(path, f"{name!r} has {len(labels)} labels, the data set {n} training samples")
    if n and not 0 <= labels.min() <= labels.max() < num_class:
        raise _bad(path, f"{name!r} has labels outside 0..{num_class - 1}")
    return labels
