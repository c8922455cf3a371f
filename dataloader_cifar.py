"""The data sets of Train_cifar.py, read into memory once per run: cifar10, cifar100, fashionmnist, digits.

CIFAR's files are pickles; `files.read_pickle` runs no code in them. A wrong file raises a `DivideMixError`, one line
that names the file.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dividemix import DivideMixError, files, noise
from dividemix.data import DeviceImages, absolute
from dividemix.noise import NoiseSpec, noisy_labels
from dividemix.run import Preparation, Run
from dividemix.seeds import draws, hold_out

_MEAN_STD = {  # of pixel values in [0, 1]; for CIFAR the authors' numbers
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "fashionmnist": ((0.2860,) * 3, (0.3530,) * 3),
}
_MIN_SIDE = 16  # the networks halve the image three times
_GREY = ("fashionmnist", "digits")
_BORDER = 2  # black pixels around Fashion-MNIST's images: 28x28 -> 32x32


@dataclass(frozen=True)
class ImageData:
    """One data set in memory."""

    name: str  # 'cifar10' | 'cifar100' | 'fashionmnist' | 'digits'
    train_images: np.ndarray  # uint8 (N, H, W, 3), C-contiguous
    train_labels: np.ndarray  # int64 (N,), the true labels
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    mean: tuple[float, float, float]  # of pixel values in [0, 1]
    std: tuple[float, float, float]
    flip: bool  # a mirrored image keeps its class (not so for digits)
    folder: Path | None  # for the noise file: the folder of CIFAR's batches, FashionMNIST's root; None for digits
    official: bool  # CIFAR: every file has the published md5; only printed

    @property
    def num_class(self) -> int:
        return len(self.class_names)

    @property
    def preparation(self) -> Preparation:
        """How to make such an image from a file: published CIFAR images are 32x32, Fashion-MNIST's 28x28 and grey."""
        border = _BORDER if self.name == "fashionmnist" else 0
        side, channels = self.train_images.shape[1] - 2 * border, 1 if self.name in _GREY else 3
        return Preparation(self.mean, self.std, side, side, channels, border)


def load(dataset: str, data_path: str | Path, download: bool = False) -> ImageData:
    """Reads `dataset` from `data_path` (digits come with scikit-learn: no path, no download). `download` gets missing
    files through torchvision, which verifies the md5; it never overwrites a file that differs from the published one,
    since it may be the user's own data. Raises DivideMixError for a missing or wrong file."""
    if dataset == "digits":
        train, test, class_names, folder, official = _load_digits()
    elif dataset == "fashionmnist":
        train, test, class_names, folder, official = _load_fashionmnist(absolute(data_path), download)
    else:
        train, test, class_names, folder, official = _load_cifar(dataset, absolute(data_path), download)
    if len(class_names) < 2:
        raise DivideMixError(f"{dataset} in {folder} has only one class, expected 2 or more")
    mean, std = _MEAN_STD.get(dataset) or [(float(value / 255),) * 3 for value in (train[0].mean(), train[0].std())]
    return ImageData(dataset, *train, *test, class_names, mean, std, dataset != "digits", folder, official)


def noisy_sets(
    images: ImageData,
    spec: NoiseSpec,
    run: Run,
    limit: int | None,
    val_fraction: float,
    noise_file: Path | None,
    strong: bool = False,
) -> tuple[DeviceImages, dict[str, DeviceImages], dict[str, Any], list[str]]:
    """The images with noisy labels (`noise.noisy_labels`) on the run's device. limit: train on a seeded subset of this
    size; val_fraction: the fraction of it that is held out, with its noisy labels, to select the best epoch; strong:
    whether the training set has strong views (see `DeviceImages`).

    -> training set; test sets 'test' and, if images are held out, 'val'; data for args.json; lines to print.
    """
    truth, seed = images.train_labels, run.args.seed
    sources = images.folder, run.folder, noise_file
    noisy, origin = noisy_labels(truth, spec, *sources, begun=run.begun, images=images.train_images)
    labels_sha256 = hashlib.sha256(noisy.tobytes() + truth.tobytes()).hexdigest()
    run.pin("labels_sha256", labels_sha256, f"the labels ({origin}) are not those that {run.folder} began with")
    index = np.arange(len(noisy))
    if limit:
        index = np.sort(draws(seed, "subset").permutation(index)[:limit])
    index, held_out = hold_out(index, val_fraction, seed)
    shared = images.mean, images.std, images.flip, run.runtime
    train = DeviceImages(images.train_images[index], noisy[index], *shared, noisy[index] == truth[index], strong)
    tests = {"test": DeviceImages(images.test_images, images.test_labels, *shared)}
    if len(held_out):
        tests["val"] = DeviceImages(images.train_images[held_out], noisy[held_out], *shared)
    labels = {"given": noisy[index], "true": truth[index], "list_given": noisy, "list_true": truth}
    run.save_labels(index=index, held_out=held_out, **labels)
    wrong = float((noisy[index] != truth[index]).mean())
    lines = [
        f"{images.name}: {len(index)} training, {len(images.test_labels)} test images, {images.num_class} classes"
        + (f", {len(held_out)} held out with their noisy labels to select the best epoch" if len(held_out) else "")
        + (f" (official {images.name})" if images.official else ""),
        f"noise {spec.name}: {wrong:.1%} of the training labels are wrong; {origin}",
    ]
    if spec.mode == "asym":
        lines.append(f"asymmetric map: {noise.asym_transition(images.num_class, images.name)[1]}")
    description = {"classes": images.class_names, "train": len(index), "test": len(images.test_labels)}
    return train, tests, description | {"wrong": wrong, "lines": lines}, lines


_Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 (n, H, W, 3), labels int64 (n,)


def _find_folder(dataset: str, folders: list[Path], names: Iterable[str], download: bool) -> Path:
    """The first of the folders that has a file of the data set; to download into, the first of all."""
    present = [folder for folder in folders if any((folder / name).is_file() for name in names)]
    if not present and not download:
        searched = " and ".join(dict.fromkeys(map(str, folders)))
        advice = "correct --data_path, add --download to fetch it, or try --dataset digits (nothing to download)"
        raise DivideMixError(f"{dataset} not found, looked in {searched}: {advice}")
    return [*present, folders[0]][0]


def _download(source: type, root: Path, url: str, folder: Path) -> None:
    try:
        source(str(root), train=False, download=True)  # fetches all files; train=False is quicker to build
    except Exception as error:  # network, disk, archive or md5: torchvision has no error type of its own
        problem = f"download of {source.__name__} to {root} failed ({error!r:.300})"
        advice = f"fetch {url} yourself, unpack its files into {folder}, and run without --download"
        raise DivideMixError(f"{problem}: {advice}") from error


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if path.with_name(f"{path.name}.gz").is_file():
        raise DivideMixError(f"{path}.gz is still compressed: run gunzip -k {path.parent}/*.gz")
    raise DivideMixError(f"{path} is missing: put it back (published data: run again with --download)")


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(_existing(path))
    except (DivideMixError, OSError):
        raise
    except Exception as error:  # damage can end in anything: EOFError, AssertionError, MemoryError, RecursionError ...
        raise _invalid(path, f"damaged or of another format ({error!r:.300})") from error


def _read_pickle(path: Path, *names: str) -> dict[Any, Any]:
    return _read(path, lambda path: files.read_pickle(path.read_bytes(), *names))


def _invalid(path: Path, problem: str) -> DivideMixError:
    return DivideMixError(f"{path}: {problem}: use a good copy (published data: delete it, run again with --download)")


def _check_labels(path: Path, labels: np.ndarray, count: int, num_class: int) -> None:
    if len(labels) != count:
        raise _invalid(path, f"{len(labels)} labels for {count} images")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_class))
    if len(wrong):
        raise _invalid(path, f"label {labels[wrong[0]]} of sample {wrong[0]}, expected 0 to {num_class - 1}")


# ---- CIFAR, and own data in the format of its "python version" ----
def _load_cifar(dataset: str, root: Path, download: bool) -> tuple[_Arrays, _Arrays, list[str], Path, bool]:
    from torchvision import datasets  # slow to import; its classes hold the published file names, md5s and addresses

    is_cifar10 = dataset == "cifar10"
    source, label_key = (datasets.CIFAR10, "labels") if is_cifar10 else (datasets.CIFAR100, "fine_labels")
    md5s = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])
    published = root if root.name == source.base_folder else root / source.base_folder
    folder = _find_folder(dataset, [published, root], md5s, download)
    present = [name for name in md5s if (folder / name).is_file()]
    intact = [name for name in present if datasets.utils.check_integrity(folder / name, md5s[name])]
    if download and intact == present != [*md5s]:  # some published files are missing, and there are no others
        _download(source, published.parent, source.url, published)
        folder, intact = published, [*md5s]

    if dataset == "cifar100":
        paths = [_existing(folder / "train")]
    else:  # in numeric order (10 comes after 9); a gap in the numbers is a missing file
        numbers = [int(path.name[11:]) for path in folder.glob("data_batch_*") if path.name[11:].isdecimal()] or [1]
        paths = [_existing(folder / f"data_batch_{n}") for n in range(min(1, *numbers), max(numbers) + 1)]
    if len(paths) < len(source.train_list) and all(path.name in intact for path in paths):
        _existing(folder / source.train_list[len(paths)][0])  # all are published batches, and some are missing
    paths.append(_existing(folder / source.test_list[0][0]))
    batches = [_read_batch(path, label_key) for path in paths]
    meta, largest = folder / source.meta["filename"], max(labels.max(initial=0) for _, labels in batches)
    class_names = [str(c) for c in range(min(int(largest), 10**6) + 1)]  # a label above a million is damage
    if meta.is_file():
        class_names = _read_pickle(meta, source.meta["key"]).get(source.meta["key"])
        if not isinstance(class_names, list) or not class_names or {str} != {*map(type, class_names)}:
            raise _invalid(meta, f"no list of class names {source.meta['key']!r}")
    for path, (images, labels) in zip(paths, batches, strict=True):
        _check_labels(path, labels, len(images), len(class_names))
        if images.shape[1:] != batches[0][0].shape[1:]:
            raise _invalid(path, f"its images differ in size from those in {paths[0].name}")
    images, labels = zip(*batches[:-1], strict=True)  # the last is the test set
    official = len(intact) == len(md5s) == len(paths) + 1  # + 1: the file with the class names
    return (np.concatenate(images), np.concatenate(labels)), batches[-1], class_names, folder, official


def _read_batch(path: Path, label_key: str) -> _Arrays:
    """One file: a dict with `data`, uint8 (n, 3 * side * side), each row three colour planes, and n labels."""
    entry = _read_pickle(path, "data", label_key)
    rows, labels = entry.get("data"), entry.get(label_key)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or len(rows) == 0:
        kind, shape = getattr(rows, "dtype", type(rows).__name__), getattr(rows, "shape", None)
        raise _invalid(path, f"'data' is {kind} {shape}, expected uint8 (n, 3 * side * side) with n > 0")
    side = math.isqrt(rows.shape[1] // 3)
    if rows.shape[1] != 3 * side * side or side < _MIN_SIDE:
        raise _invalid(path, f"{rows.shape[1]} values per image, expected 3 * side * side with side >= {_MIN_SIDE}")
    # The types are checked first: of lists that contain each other, np.array() would fill all memory.
    if isinstance(labels, list) and all(type(label) is int and abs(label) < 2**62 for label in labels):
        labels = np.array(labels, dtype=np.int64)
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise _invalid(path, f"{label_key!r} is not a list of class numbers")
    images = rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int64)


# ---- Fashion-MNIST and the digits ----
def _load_fashionmnist(root: Path, download: bool) -> tuple[_Arrays, _Arrays, list[str], Path, bool]:
    """torchvision's raw IDX files: 28x28 grey images, which get a black border and three equal channels."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    archives = [name for name, _ in FashionMNIST.resources]
    names = [name.removesuffix(".gz") for name in archives]
    raw = _find_folder("fashionmnist", [root / "FashionMNIST" / "raw", root / "raw", root], names + archives, download)
    above = {"raw": root.parent.parent, "FashionMNIST": root.parent}.get(root.name, root)
    if download and not all((raw / name).is_file() for name in names):
        raw = above / "FashionMNIST" / "raw"
        _download(FashionMNIST, above, FashionMNIST.mirrors[0], raw)

    splits = []
    for split in ("train", "t10k"):
        images_path, labels_path = raw / f"{split}-images-idx3-ubyte", raw / f"{split}-labels-idx1-ubyte"
        images, labels = _read(images_path, read_image_file).numpy(), _read(labels_path, read_label_file).numpy()
        if images.shape[1:] != (28, 28):
            raise _invalid(images_path, f"images of {images.shape[1:]} pixels, expected (28, 28)")
        _check_labels(labels_path, labels, len(images), len(FashionMNIST.classes))
        padded = np.pad(images, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER)))
        splits.append((np.repeat(padded[..., None], 3, axis=3), labels))
    folder = raw.parent.parent if raw.parent.name == "FashionMNIST" else root
    return *splits, FashionMNIST.classes[:], folder, False


def _load_digits() -> tuple[_Arrays, _Arrays, list[str], None, bool]:
    """scikit-learn's 1,797 digits, 8x8 with values 0 to 16, scaled up to 16x16; 1,450 of them for training."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = F.interpolate(torch.from_numpy(digits.images)[:, None], (16, 16), mode="bilinear", align_corners=False)
    grey = (grey[:, 0] * (255 / 16)).round().to(torch.uint8).numpy()
    images, labels = np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64)
    train, test = np.split(np.random.RandomState(0).permutation(len(labels)), [1450])
    class_names = [str(digit) for digit in range(10)]
    return (images[train], labels[train]), (images[test], labels[test]), class_names, None, False
