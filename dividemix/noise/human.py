"""Human label noise: CIFAR-10N and CIFAR-100N, labels that people gave to CIFAR's training images.

Source: Wei, Zhu, Cheng, Liu, Niu, Liu, "Learning with Noisy Labels Revisited: A Study Using Real-World Human
Annotations", ICLR 2022. The file is written by torch.save: a dict of int64 arrays (N,), `clean_label` and noisy ones.
"""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError, files

TRUTH = "clean_label"
_KEYS = {  # random: three people's labels; aggre: their majority; worse: a wrong one of the three, if there is one
    "cifar10": ("worse_label", "aggre_label", "random_label1", "random_label2", "random_label3"),
    "cifar100": ("noisy_label",),
}
KEYS = (*_KEYS["cifar10"], *_KEYS["cifar100"])
_FILES = {"cifar10": "CIFAR-10_human.pt", "cifar100": "CIFAR-100_human.pt"}
_PUBLISHED = "https://github.com/UCSC-REAL/cifar-10-100n, folder data"


def keys(dataset: str) -> tuple[str, ...]:
    """The names of the noisy labels in this data set's file; for a data set without a published file, all names."""
    return _KEYS.get(dataset, KEYS)


def find(dataset: str, data_folder: Path | None) -> Path | None:
    """The published file, in the folder of CIFAR's batches or the folder above; None if it is in neither."""
    folders = [data_folder, data_folder.parent] if data_folder and dataset in _FILES else []
    return next((folder / _FILES[dataset] for folder in folders if (folder / _FILES[dataset]).is_file()), None)


def missing(dataset: str, data_folder: Path | None) -> DivideMixError:
    """The error when no file was found and --noise_file names none."""
    if dataset not in _FILES or data_folder is None:
        return DivideMixError(f"--noise_mode human: {dataset} has no published file, name one with --noise_file")
    problem = f"{_FILES[dataset]} is not in {data_folder} or {data_folder.parent}"
    advice = f"get it from {_PUBLISHED}, or name it with --noise_file"
    return DivideMixError(f"--noise_mode human: {problem}: {advice}")


def read(path: Path, key: str, truth: NDArray[np.int64], num_class: int) -> NDArray[np.int64]:
    """The labels `key`, (N,) int64, of a file whose `clean_label` equals the true labels, `truth` (N,).

    Raises DivideMixError naming the file and what is wrong with it. No code in the file is run.
    """
    arrays = _load(path, len(truth), TRUTH, key)
    for name in (TRUTH, key):
        if name not in arrays:
            printable = [name for name in arrays if isinstance(name, str) and re.fullmatch(r"\w{1,40}", name)]
            names = ", ".join(printable[:12]) or "others"
            advice = "choose one of these with --noise_key, or another --noise_file"
            raise DivideMixError(f"noise file {path}: it has no {name!r}, only {names}: {advice}")
    clean, noisy = (_labels(path, name, arrays[name], len(truth), num_class) for name in (TRUTH, key))
    if count := int((clean != truth).sum()):
        raise _invalid(path, f"its {TRUTH} is not the data set's label for {count} of {len(truth)} samples")
    return noisy


def _invalid(path: Path, problem: str) -> DivideMixError:
    return DivideMixError(f"noise file {path}: {problem}: name a good copy with --noise_file ({_PUBLISHED})")


def _load(path: Path, n: int, *names: str) -> dict[Any, Any]:
    """The dict in the file, with the arrays `names`. n: the number of labels in an array, to limit the file's size."""
    try:
        if path.stat().st_size > 2**20 + 256 * n:  # the published files: 48 bytes a sample
            raise _invalid(path, f"far too large for {n} labels")
        with zipfile.ZipFile(io.BytesIO(files.read_file(path))) as archive:  # what torch.save writes
            [entry] = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed")
            return files.read_pickle(archive.read(entry), *names)
    except DivideMixError:
        raise
    except OSError as error:
        raise DivideMixError(f"noise file {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damage can end in anything: BadZipFile, KeyError, MemoryError ...
        problem = "damaged, or not a dict of number arrays that torch.save wrote"
        raise _invalid(path, f"{problem} ({error!r:.200})") from error


def _labels(path: Path, name: str, labels: Any, n: int, num_class: int) -> NDArray[np.int64]:
    """(n,) int64, checked: type, length, range."""
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise _invalid(path, f"{name!r} is not an array (N,) of whole numbers")
    if len(labels) != n:
        raise _invalid(path, f"{name!r} has {len(labels)} labels, the data set {n} training samples")
    if n and not 0 <= labels.min() <= labels.max() < num_class:
        raise _invalid(path, f"{name!r} has labels outside 0..{num_class - 1}")
    return labels.astype(np.int64)
