"""Tiny data sets in the published file formats, made of real images (scikit-learn's handwritten digits).

Every maker returns the folder of the files; that folder and `root` both serve as --data_path. Nothing needs pytest.
"""

import functools
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
from sklearn.datasets import load_digits

DIGIT_NAMES = [b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine"]


@functools.cache
def _digits():
    return load_digits()  # parses a text file: 0.1 s


def grey_digits(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n digits in random order, uint8 (n, 8, 8) in 0..255 and labels (n,); no image twice while n <= 1797."""
    digits = _digits()
    index = np.resize(np.random.RandomState(seed).permutation(len(digits.target)), n)
    return np.round(digits.images[index] * (255 / 16)).astype(np.uint8), digits.target[index]


def colour_digits(n: int, seed: int = 0, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, side, side, 3), side a multiple of 8, the three channels different; labels (n,)."""
    grey, labels = grey_digits(n, seed)
    red = grey.repeat(side // 8, axis=1).repeat(side // 8, axis=2)
    return np.stack([red, red // 2, 255 - red], axis=3), labels


def rows_of(images: np.ndarray) -> np.ndarray:
    """(n, side, side, 3) -> (n, 3 * side * side): CIFAR stores an image as its red, green and blue plane."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


class Python2Pickler(pickle._Pickler):
    """As Python 2 wrote the published files: every string, array contents included, is a byte string."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, obj):
        value = obj.encode("latin1") if isinstance(obj, str) else obj
        if self.proto == 0:
            self.write(pickle.STRING + repr(value)[1:].encode() + b"\n")
        elif len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_string


def pickled(entry: object, protocol: int = 2, python2: bool = False, numpy1: bool = False) -> bytes:
    """numpy1: with the names of numpy 1's functions, up to protocol 3, in which names have no length."""
    file = io.BytesIO()
    (Python2Pickler if python2 else pickle._Pickler)(file, protocol).dump(entry)
    content = file.getvalue()
    return content.replace(b"numpy._core", b"numpy.core") if numpy1 or python2 else content


def write_pickle(path: Path, *arguments, **keywords) -> Path:
    path.write_bytes(pickled(*arguments, **keywords))
    return path


def torch_archive(content: bytes, compression: int = zipfile.ZIP_STORED, second: str = "") -> bytes:
    """A pickle as torch.save puts it into a file. second: another name for the same pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        if second:
            archive.writestr(second, content)
    return file.getvalue()


def make_human(path: str | Path, arrays: dict[str, np.ndarray], numpy1: bool = True) -> Path:
    """A file like CIFAR-10_human.pt, with these labels; with numpy 1's names, as published."""
    Path(path).write_bytes(torch_archive(pickled(arrays, numpy1=numpy1)))
    return Path(path)


def make_cifar10(
    root: str | Path, n_train: int = 200, n_test: int = 60, batches: int = 5, side: int = 32, bare: bool = False
) -> Path:
    """CIFAR-10's "python version", byte for byte as Python 2 writes it. bare: without the folder's published name and
    without class names."""
    folder = Path(root) / ("" if bare else "cifar-10-batches-py")
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = colour_digits(n_train + n_test, side=side)
    indices = [*np.array_split(np.arange(n_train), batches), np.arange(n_train, n_train + n_test)]
    for number, index in enumerate(indices, start=1):
        entry = {
            b"batch_label": f"training batch {number} of {batches}".encode(),
            b"labels": labels[index].tolist(),
            b"data": rows_of(images[index]),
            b"filenames": [b"%s_s_%06d.png" % (DIGIT_NAMES[labels[i]], i) for i in index],
        }
        name = f"data_batch_{number}" if number <= batches else "test_batch"
        write_pickle(folder / name, entry, python2=True)
    if not bare:
        entry = {b"num_cases_per_batch": len(indices[0]), b"label_names": DIGIT_NAMES, b"num_vis": 3 * side * side}
        write_pickle(folder / "batches.meta", entry, python2=True)
    return folder


def make_cifar100(root: str | Path, n_train: int = 200, n_test: int = 60) -> Path:
    """CIFAR-100's "python version"; each digit is ten fine classes in turn, and five of these are a coarse class."""
    folder = Path(root) / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    images, digits = colour_digits(n_train + n_test)
    turn = np.array([np.count_nonzero(digits[:i] == digit) % 10 for i, digit in enumerate(digits)])
    fine = 10 * digits + turn
    for name, index in (("train", np.arange(n_train)), ("test", np.arange(n_train, n_train + n_test))):
        entry = {
            b"filenames": [b"class_%d_s_%06d.png" % (fine[i], i) for i in index],
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": fine[index].tolist(),
            b"coarse_labels": (fine[index] // 5).tolist(),
            b"data": rows_of(images[index]),
        }
        write_pickle(folder / name, entry, python2=True)
    names = {b"fine_label_names": [b"class_%d" % c for c in range(100)]}
    names |= {b"coarse_label_names": [b"superclass_%d" % c for c in range(20)]}
    write_pickle(folder / "meta", names, python2=True)
    return folder


def make_fashionmnist(root: str | Path, n_train: int = 200, n_test: int = 60) -> Path:
    """The four raw IDX files under FashionMNIST/raw: magic number, sizes (big endian), bytes."""
    folder = Path(root) / "FashionMNIST/raw"
    folder.mkdir(parents=True, exist_ok=True)
    grey, labels = grey_digits(n_train + n_test)
    images = np.pad(grey.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    for split, index in (("train", slice(n_train)), ("t10k", slice(n_train, None))):
        pixels, classes = images[index], labels[index].astype(np.uint8)
        header = struct.pack(">iiii", 0x803, len(pixels), 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, len(classes)) + classes.tobytes())
    return folder


class Call:
    """Asks, when it is read from a pickle, for function(*args), and then to set the state."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def batch(n: int = 4, **changes: object) -> dict:
    """The content of a CIFAR-10 batch file, with str keys."""
    images, labels = colour_digits(n)
    return {"batch_label": "b", "labels": labels.tolist(), "data": rows_of(images), "filenames": ["f"] * n} | changes
