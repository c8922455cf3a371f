"""dataloader_cifar: the pixels and labels that a run trains on, and what a damaged or hostile file can do."""

import gzip
import hashlib
import os
import pickle
import shutil
import struct
import tracemalloc
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
from helpers.data import (
    Call,
    batch,
    colour_digits,
    grey_digits,
    make_cifar10,
    make_cifar100,
    make_fashionmnist,
    pickled,
    rows_of,
    write_pickle,
)
from helpers.errors import assert_refused
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100

from dataloader_cifar import load
from dividemix.data.images import shown
from dividemix.data.lists import Boundary

MAKERS = {"cifar10": make_cifar10, "cifar100": make_cifar100, "fashionmnist": make_fashionmnist}


def refused(dataset: str, path: Path, *expected: object, download: bool = False) -> None:
    assert_refused(lambda: load(dataset, path, download), *expected)


def publish(monkeypatch, source: type, folder: Path) -> None:
    """Makes the files in `folder` the published ones: torchvision's lists get their md5s."""

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(source, attribute, [[name, md5(name)] for name, _ in getattr(source, attribute)])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5(source.meta["filename"])})


# ---- CIFAR: what is read ----


@pytest.mark.parametrize(
    ("dataset", "source", "mean"),
    [("cifar10", CIFAR10, (0.4914, 0.4822, 0.4465)), ("cifar100", CIFAR100, (0.507, 0.487, 0.441))],
)
def test_pixels_and_labels_are_those_of_torchvision(tmp_path, monkeypatch, dataset, source, mean):
    """Runs would train on scrambled pixels, labels of other images, or CIFAR-100's superclasses."""
    folder = MAKERS[dataset](tmp_path)  # as Python 2 wrote the published files
    publish(monkeypatch, source, folder)
    data = load(dataset, tmp_path)
    splits = {True: (data.train_images, data.train_labels), False: (data.test_images, data.test_labels)}
    for train, (images, labels) in splits.items():
        reference = source(str(tmp_path), train=train)
        np.testing.assert_array_equal(images, reference.data)
        assert labels.tolist() == reference.targets and labels.dtype == np.int64 and data.official
        assert images.flags["C_CONTIGUOUS"] and images.flags["WRITEABLE"] and images.dtype == np.uint8
    assert (data.name, data.class_names, data.mean, data.flip) == (dataset, reference.classes, mean, True)
    (folder / source.meta["filename"]).write_bytes((folder / source.meta["filename"]).read_bytes() + b" ")
    (tmp_path / "test_batch").write_bytes(b"stray")  # the folder with more of the files is taken
    assert [load(dataset, path).folder for path in (tmp_path, folder)] == [folder] * 2
    assert not load(dataset, folder).official


def test_own_data_of_other_sizes(tmp_path):
    """Else: data_batch_10 is read before data_batch_2, or own data in CIFAR's format are misread as 32x32."""
    make_cifar10(tmp_path, n_train=45, n_test=3, batches=11, side=16, bare=True)
    data = load("cifar10", tmp_path)
    images, labels = colour_digits(48, side=16)
    np.testing.assert_array_equal(data.train_images, images[:45])
    np.testing.assert_array_equal(data.train_labels, labels[:45])
    assert data.class_names == [str(c) for c in range(10)] and data.folder == tmp_path and not data.official


@pytest.mark.parametrize(("protocol", "numpy1"), [*((k, False) for k in range(6)), *((k, True) for k in range(4))])
def test_every_protocol_of_python_3(tmp_path, protocol, numpy1):
    """Data that a user wrote with a current Python could not be read, or be read as noise."""
    labels, rows = batch()["labels"], batch()["data"]
    entries = [batch(labels=np.array(labels, kind)) for kind in ("<i8", ">i4", "u1", "<u8")]
    entries += [batch(labels=[np.int64(label) for label in labels]), batch(data=np.asfortranarray(rows))]
    entries += [{key.encode(): value for key, value in batch().items()}]
    entries += [batch(a=b"", b=bytearray(b"\xff\x00"), c=bytearray(), d=[(1, None), {"a": 2.5}])]
    entries += [batch(a=np.zeros((2, 3, 4)).transpose(1, 0, 2))]  # order "K" in protocol 5
    for entry in entries:
        for name in ("data_batch_1", "test_batch"):
            path = write_pickle(tmp_path / name, entry, protocol, numpy1=numpy1)
        assert (b"numpy.core" in path.read_bytes()) == numpy1
        data = load("cifar10", tmp_path)
        np.testing.assert_array_equal(data.train_images, colour_digits(4)[0])
        assert data.train_labels.tolist() == labels and data.train_labels.dtype == np.int64


# ---- CIFAR: what is missing or wrong ----


@pytest.mark.parametrize(
    ("dataset", "folder", "name"),
    [
        ("cifar10", "cifar-10-batches-py", "data_batch_3"),
        ("cifar10", "cifar-10-batches-py", "test_batch"),
        ("cifar100", "cifar-100-python", "train"),
        ("fashionmnist", "FashionMNIST/raw", "t10k-labels-idx1-ubyte"),
    ],
)
def test_missing_data_are_named(tmp_path, dataset, folder, name):
    """A new user would not learn where the data belong; or a run train on four fifths of them."""
    refused(dataset, tmp_path, tmp_path / folder, "--data_path", "--download", "--dataset digits")
    path = MAKERS[dataset](tmp_path) / name
    path.unlink()
    refused(dataset, tmp_path, path, "missing")


def test_a_wrong_number_of_classes_is_refused(tmp_path):
    """One damaged label would make a network with 10^12 classes; with one class all losses are 0."""
    folder = make_cifar10(tmp_path, n_train=4, n_test=4, batches=1)
    for entry in ({}, {"label_names": []}, {"label_names": [1, 2]}, {"label_names": "ab"}, []):
        write_pickle(folder / "batches.meta", entry)
        refused("cifar10", folder, folder / "batches.meta")
    (folder / "batches.meta").unlink()
    write_pickle(folder / "data_batch_1", batch(labels=[0, 1, 2, 10**12]))
    refused("cifar10", tmp_path, folder / "data_batch_1", f"label {10**12} of sample 3")
    for name in ("data_batch_1", "test_batch"):
        write_pickle(folder / name, batch(labels=[0] * 4))
    refused("cifar10", tmp_path, folder, "one class")


# ---- Pickles that are damaged or want to run code ----


def odd_array(shape: object, code: str, content: bytes, order: str = "<") -> bytes:
    """A batch with an array whose shape, type and contents do not fit together."""
    dtype = Call(np.dtype, code, 0, 1, state=(3, order, None, None, None, -1, -1, 0))
    reconstruct = np.zeros(1).__reduce__()[0]
    array = Call(reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))
    return pickle.dumps(batch(data=array), 2)


ROWS = batch()["data"]
# the content of a batch file, what the message names
REFUSED = [
    (pickled(batch(**changes)), expected)
    for changes, expected in (
        ({"labels": [0, 1, 2]}, "3 labels for 4 images"),
        ({"labels": [0, 1, 2, 10]}, "label 10 of sample 3"),
        ({"labels": [0, 1, 2, -1]}, "label -1 of sample 3"),
        ({"labels": [0, 1, 2, 2**63]}, "labels"),
        ({"labels": [0, 1, 2, [3]]}, "labels"),
        ({"labels": np.zeros(4)}, "labels"),
        ({"data": ROWS.astype(np.float32)}, "float32"),
        ({"data": ROWS.astype(object)}, "expected numbers"),
        ({"data": ROWS[:, :-1]}, "3071"),
        ({"data": ROWS[:, : 3 * 15 * 15]}, "side >= 16"),
        ({"data": ROWS[:0], "labels": []}, "n > 0"),
        ({"data": rows_of(colour_digits(4, side=24)[0])}, "size"),
    )
]
REFUSED += [
    (content, "code")
    for content in (
        b"(S'touch x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch x'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
        b"cnumpy.core.multiarray._reconstruct.__globals__\nx\n.",
    )
]
REFUSED += [
    (content, "damaged")
    for content in (
        b"",
        b"\x82\x01.",  # extension registry
        b"(" * 100_000 + b"t" * 100_000 + b".",  # deeply nested
        b"cbuiltins\nbytes\n(I1000000000000\ntR.",
        b"}(U\x04datacnumpy\nndarray\n((I1000000\nI1000000\nttRs.",
        b"}(U\x04datacnumpy.core.multiarray\n_reconstruct\n}U\x08__call__NsbS'x'\ns.",
        pickle.dumps(batch(), 5)[:9000],
        b"\x96" + struct.pack("<Q", 10**9) + b".",  # a length
        b"}r\x00\x00\x00\x04.",  # a memo index
        b"](h\x00h\x00h\x00e.",
        odd_array((10**9, 10**9), "u1", b"a"),
        odd_array((1, 3072), "O8", b"\0" * 8 * 3072, "|"),  # numpy itself would take the bytes for pointers
        odd_array((1, 3072), "u1", b"\0" * 3071),
        odd_array((1, 3072), "u1", b"\0" * 3072, "x"),
    )
]


@pytest.mark.parametrize(("content", "expected"), REFUSED, ids=lambda value: str(value)[:30])
def test_wrong_damaged_and_hostile_files_are_refused_by_name(tmp_path, content, expected):
    """An opcode would reach a function past the guard, crash numpy, or take gigabytes; wrong labels end in CUDA."""
    folder = make_cifar10(tmp_path, n_train=20, n_test=4, batches=2)
    (folder / "data_batch_2").write_bytes(content)
    tracemalloc.start()
    try:
        refused("cifar10", tmp_path, folder / "data_batch_2", expected)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_code_is_refused_and_not_run(tmp_path):
    """Else: whoever offers a data set for download can run programs on the computers of its users."""
    folder, marker = make_cifar10(tmp_path, n_train=4, n_test=4, batches=1), tmp_path / "marker"
    evil = Call(os.mkdir, str(marker))
    batches = [evil, batch(data=evil), batch(filenames=[{"a": (1, [evil])}]), batch() | {evil: 1}]
    for name, entries in (("data_batch_1", batches), ("batches.meta", [{"label_names": [evil]}])):
        sound = (folder / name).read_bytes()
        for entry in entries:
            for protocol in (0, 2, 4):
                (folder / name).write_bytes(pickle.dumps(entry, protocol))
                refused("cifar10", tmp_path, folder / name, "mkdir")
        (folder / name).write_bytes(sound)
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # the attack would have worked


# ---- Downloads ----


@pytest.mark.parametrize(("dataset", "module"), [("cifar10", "cifar"), ("fashionmnist", "mnist")])
def test_a_failed_download_says_what_to_fetch(tmp_path, monkeypatch, dataset, module):
    """Else: a user behind a firewall sees a traceback and not what to fetch; or a download with a wrong md5 is used."""
    fetch = f"torchvision.datasets.{module}.download_and_extract_archive"
    monkeypatch.setattr(fetch, mock.Mock(side_effect=URLError("no\nnetwork")))
    refused(dataset, tmp_path / "new", "download", tmp_path / "new", "http", download=True)
    if dataset == "cifar10":
        monkeypatch.setattr(fetch, lambda url, root, **_: make_cifar10(root))
        refused(dataset, tmp_path, "download", download=True)


def test_download_finds_its_files_again_and_overwrites_none(tmp_path, monkeypatch):
    """--download would put files where no run finds them, or replace a user's own data."""
    folder = make_cifar10(tmp_path / "source")
    publish(monkeypatch, CIFAR10, folder)

    def fetch(url, root, **_):
        shutil.copytree(folder, Path(root) / "cifar-10-batches-py", dirs_exist_ok=True)

    forbid = mock.Mock(side_effect=AssertionError("downloaded although there was no need"))
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", forbid)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    for path in (tmp_path / "a", tmp_path / "b" / "cifar-10-batches-py"):
        data = load("cifar10", path, download=True)
        assert data.official and data.folder.name == "cifar-10-batches-py" and data.folder.parent.parent == tmp_path
        (data.folder / "data_batch_4").unlink()  # some of the published files are missing: fetch again
        assert load("cifar10", path, download=True).official
        (data.folder / "data_batch_4").write_bytes(b"damaged")  # or somebody's own: overwrite nothing
        refused("cifar10", path, data.folder / "data_batch_4", "delete it", download=True)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", forbid)
    assert load("cifar10", folder, download=True).official
    (folder / "data_batch_5").unlink()
    refused("cifar10", folder, folder / "data_batch_5", "missing")
    make_cifar10(tmp_path, batches=2)
    make_fashionmnist(tmp_path)
    for dataset in ("cifar10", "fashionmnist"):
        assert len(load(dataset, tmp_path, download=True).train_images) == 200
    assert not forbid.called


# ---- Fashion-MNIST and digits ----


def test_fashionmnist(tmp_path):
    """Else: Fashion-MNIST runs see shifted images, unequal channels or the wrong split."""
    raw = make_fashionmnist(tmp_path)
    for path in (tmp_path, tmp_path / "FashionMNIST", raw):
        data = load("fashionmnist", path)
        assert data.folder == tmp_path
    grey, labels = grey_digits(260)
    assert data.train_images.shape == (200, 32, 32, 3) and data.test_images.shape == (60, 32, 32, 3)
    assert data.train_images.dtype == np.uint8 and data.train_images.flags["C_CONTIGUOUS"]
    images = np.concatenate([data.train_images, data.test_images])
    for channel in range(3):
        np.testing.assert_array_equal(images[:, 4:28:3, 4:28:3, channel], grey)
    border = np.ones((32, 32), bool)
    border[2:30, 2:30] = False
    assert not images[:, border].any()
    assert [*data.train_labels, *data.test_labels] == labels.tolist() and data.train_labels.dtype == np.int64
    assert data.mean == (0.2860,) * 3 and data.std == (0.3530,) * 3 and data.flip and not data.official


@pytest.mark.parametrize(
    ("name", "of_other_data"),
    [
        ("train-images-idx3-ubyte", struct.pack(">iiii", 0x803, 200, 32, 32) + bytes(200 * 32 * 32)),
        ("t10k-labels-idx1-ubyte", struct.pack(">ii", 0x801, 60) + bytes([10] * 60)),
    ],
)
def test_damaged_fashionmnist_is_named(tmp_path, name, of_other_data):
    """A truncated IDX file would end in torchvision's bare AssertionError, or other IDX data pass."""
    path = make_fashionmnist(tmp_path) / name
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content + b"x", b"\xff" * 50, of_other_data):
        path.write_bytes(damaged)
        refused("fashionmnist", tmp_path, path)
    path.unlink()
    path.with_name(f"{name}.gz").write_bytes(gzip.compress(content))
    refused("fashionmnist", tmp_path, f"{path}.gz", "gunzip")


def test_digits(tmp_path):
    """The demo would split, scale or mirror the digits otherwise than its published numbers assume."""
    data, digits = load("digits", tmp_path / "unused", download=True), load_digits()
    assert data.train_images.shape == (1450, 16, 16, 3) and data.test_images.shape == (347, 16, 16, 3)
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int64
    assert (data.class_names, data.flip, data.folder, data.official) == ([*"0123456789"], False, None, False)
    order = np.random.RandomState(0).permutation(1797)
    np.testing.assert_array_equal([*data.train_labels, *data.test_labels], digits.target[order])
    assert data.train_labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    # Bilinear, align_corners=False, factor 2: pixel 5 lies at (5 + 0.5) / 2 - 0.5 = 2.25 and mixes four neighbours.
    rows, weights = [2, 3], np.array([0.75, 0.25])
    expected = weights @ digits.images[order[0]][np.ix_(rows, rows)] @ weights * 255 / 16
    np.testing.assert_array_equal(data.train_images[0, 5, 5], [round(expected)] * 3)
    assert data.train_images.max() == 255 and data.train_images.min() == 0
    pixels = data.train_images / 255
    np.testing.assert_allclose((data.mean, data.std), (pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))))


# ---- Files like the set's images ----


def prepared(data, path: Path, pixels: np.ndarray) -> np.ndarray:
    """An image file as the set's preparation makes it, with its border and three channels: (H, W, 3)."""
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    border = data.preparation.border
    pixels = data.preparation.view(shown(path, Boundary(path.parent)).image)
    padded = np.pad(pixels, ((border, border), (border, border), (0, 0)))
    return np.repeat(padded, 3 // padded.shape[2], axis=2)


def test_an_image_file_is_prepared_as_the_set(tmp_path):
    """A trained network would be asked about other pixels than those of its test set."""
    make_cifar10(tmp_path, side=48)
    make_fashionmnist(tmp_path)
    cifar, fashion, digits = (load(dataset, tmp_path) for dataset in ("cifar10", "fashionmnist", "digits"))
    assert (cifar.preparation.image_size, cifar.preparation.resize) == (48, 48)
    assert (cifar.preparation.mean, cifar.preparation.std) == (cifar.mean, cifar.std)
    path, order = tmp_path / "a.png", np.random.RandomState(0).permutation(1797)[1450:]
    for i in range(10):
        image = fashion.test_images[i]
        pairs = [(data, data.test_images[i], data.test_images[i]) for data in (cifar, digits)]
        pairs += [(fashion, image[2:-2, 2:-2, 0], image), (fashion, image[2:-2, 2:-2], image)]  # 28x28, grey or not
        for data, pixels, expected in pairs:
            np.testing.assert_array_equal(prepared(data, path, pixels), expected)
        # 8x8 digits have 256 levels in a file and 17 in the set, so that rounding differs by one.
        small = prepared(digits, path, np.round(load_digits().images[order[i]] * (255 / 16)).astype(np.uint8))
        np.testing.assert_allclose(small.astype(int), digits.test_images[i], atol=1)
