"""dataloader_cifar: the pixels and labels that a run trains on, and what a damaged or hostile file can do."""

import gzip
import hashlib
import pickle
import shutil
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from helpers.data import (
    batch,
    colour_digits,
    grey_digits,
    make_cifar10,
    make_cifar100,
    make_fashionmnist,
    rows_of,
    write_pickle,
)
from PIL import Image
from sklearn.datasets import load_digits

from dataloader_cifar import load
from dividemix import DivideMixError
from dividemix.data.images import shown
from dividemix.data.lists import Boundary

CIFAR10, CIFAR100, FashionMNIST = (getattr(torchvision.datasets, n) for n in ("CIFAR10", "CIFAR100", "FashionMNIST"))


def refused(dataset: str, path: Path, *expected: object, download: bool = False) -> str:
    """`load` fails with a DivideMixError of one line that contains each of `expected`; returns the line."""
    with pytest.raises(DivideMixError) as caught:
        load(dataset, path, download)
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in expected), message
    return message


def publish(monkeypatch, source: type, folder: Path) -> None:
    """Makes the files in `folder` the published ones: torchvision's lists get their md5s."""

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(source, attribute, [[name, md5(name)] for name, _ in getattr(source, attribute)])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5(source.meta["filename"])})


# ---- CIFAR: what is read ----


@pytest.mark.parametrize("subfolder", [True, False])
def test_cifar10_pixels_and_labels_are_exact(tmp_path, subfolder):
    """Else: every run trains on scrambled pixels or colours, or on labels of other images."""
    folder = make_cifar10(tmp_path, subfolder=subfolder)
    data = load("cifar10", tmp_path)
    images, labels = colour_digits(260)
    np.testing.assert_array_equal(data.train_images, images[:200])
    np.testing.assert_array_equal(data.test_images, images[200:])
    np.testing.assert_array_equal(data.train_labels, labels[:200])
    np.testing.assert_array_equal(data.test_labels, labels[200:])
    assert data.train_images.shape == (200, 32, 32, 3) and data.train_images.dtype == np.uint8
    assert data.train_images.flags["C_CONTIGUOUS"] and data.test_images.flags["C_CONTIGUOUS"]
    assert data.train_images.flags["WRITEABLE"] and data.test_images.flags["WRITEABLE"]
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert (data.name, data.num_class, data.flip, data.folder) == ("cifar10", 10, True, folder)
    assert data.class_names[0] == "zero" and data.official is False
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2023, 0.1994, 0.2010)


@pytest.mark.parametrize(
    "make, dataset, source", [(make_cifar10, "cifar10", CIFAR10), (make_cifar100, "cifar100", CIFAR100)]
)
def test_same_as_torchvision_and_official_by_md5(tmp_path, monkeypatch, make, dataset, source):
    """Else: our reader and the reader of everyone else see different data in the same files."""
    folder = make(tmp_path)
    publish(monkeypatch, source, folder)
    theirs = [source(str(tmp_path), train=train) for train in (True, False)]
    data = load(dataset, tmp_path)
    np.testing.assert_array_equal(data.train_images, theirs[0].data)
    np.testing.assert_array_equal(data.test_images, theirs[1].data)
    assert data.train_labels.tolist() == theirs[0].targets and data.test_labels.tolist() == theirs[1].targets
    assert data.class_names == theirs[0].classes and data.official is True
    (folder / source.meta["filename"]).write_bytes((folder / source.meta["filename"]).read_bytes() + b" ")
    assert load(dataset, tmp_path).official is False


def test_cifar100_uses_the_fine_labels(tmp_path):
    """Else: CIFAR-100 runs learn the 20 superclasses."""
    folder = make_cifar100(tmp_path)
    data = load("cifar100", folder)
    assert data.num_class == 100 and data.class_names[99] == "class_99" and data.folder == folder
    assert len(np.unique(data.train_labels)) > 90 and data.train_labels.max() == 99
    np.testing.assert_array_equal(data.train_labels // 10, colour_digits(260)[1][:200])
    assert data.mean == (0.507, 0.487, 0.441) and data.std == (0.267, 0.256, 0.276) and data.flip


@pytest.mark.parametrize("batches", [1, 2, 11])
def test_any_number_of_batches_in_numeric_order(tmp_path, batches):
    """Else: data_batch_10 is read before data_batch_2, and a noise file gives its labels to other images."""
    make_cifar10(tmp_path, n_train=45, n_test=3, batches=batches)
    data = load("cifar10", tmp_path)
    np.testing.assert_array_equal(data.train_images, colour_digits(48)[0][:45])


def test_other_image_sides_and_no_meta_file(tmp_path):
    """Else: own data in CIFAR's format are misread as 32x32 or as ten classes."""
    make_cifar10(tmp_path, n_train=12, n_test=4, batches=1, side=16, meta=False)
    data = load("cifar10", tmp_path)
    np.testing.assert_array_equal(data.train_images, colour_digits(16, side=16)[0][:12])
    labels = colour_digits(16)[1]
    assert data.num_class == labels.max() + 1 and data.class_names[:2] == ["0", "1"] and not data.official


def test_the_folder_with_more_files_is_taken(tmp_path):
    """Else: a stray file in data_path hides the complete data set in the subfolder."""
    folder = make_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(b"stray")
    assert load("cifar10", tmp_path).folder == folder


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("numpy1", [False, True])
@pytest.mark.parametrize("keys", [str, str.encode])
def test_every_protocol_of_python_3(tmp_path, protocol, numpy1, keys):
    """Else: data that a user wrote with a current Python or numpy cannot be read."""
    entry = {keys(key): value for key, value in batch().items()}
    entry[keys("labels")] = [np.int64(label) for label in batch()["labels"]]  # numpy scalars
    for name in ("data_batch_1", "test_batch"):
        path = write_pickle(tmp_path / name, entry, protocol, numpy1=numpy1)
        assert (b"numpy.core" in path.read_bytes()) == numpy1
    data = load("cifar10", tmp_path)
    np.testing.assert_array_equal(data.train_images, colour_digits(4)[0])
    np.testing.assert_array_equal(data.train_labels, colour_digits(4)[1])


@pytest.mark.parametrize("protocol", range(6))
def test_own_pickler_writes_what_pickle_writes(protocol, tmp_path):
    """Else: the files of these tests are not what Python really writes, and the tests above show nothing."""
    value = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "x": [np.int64(3), b"", bytearray(b"a")]}
    content = write_pickle(tmp_path / "p", value, protocol).read_bytes()
    assert pickle.loads(content)["x"] == value["x"] and content == pickle._dumps(value, protocol)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_python_2_files(tmp_path, protocol):
    """Else: the published files, which Python 2 wrote, cannot be read."""
    folder = make_cifar10(tmp_path, n_train=10, n_test=4, batches=2, protocol=protocol)
    content = (folder / "data_batch_1").read_bytes()
    assert b"_codecs" not in content and b"cnumpy.core.multiarray\n_reconstruct\n" in content
    np.testing.assert_array_equal(load("cifar10", tmp_path).train_images, colour_digits(14)[0][:10])


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("labels", ["<i8", ">i4", "u1", "<u8"])
def test_fortran_order_and_label_arrays(tmp_path, protocol, labels):
    """Else: an array that was stored transposed or big-endian is read as noise."""
    entry = batch(data=np.asfortranarray(batch()["data"]), labels=np.array(batch()["labels"], dtype=labels))
    for name in ("data_batch_1", "test_batch"):
        write_pickle(tmp_path / name, entry, protocol)
    data = load("cifar10", tmp_path)
    np.testing.assert_array_equal(data.train_images, colour_digits(4)[0])
    assert data.train_labels.tolist() == batch()["labels"] and data.train_labels.dtype == np.int64


def test_bytes_bytearray_and_empty_strings_of_protocol_2(tmp_path):
    """Else: harmless extra entries make a file unreadable."""
    entry = batch(note=b"", more=bytearray(b"\xff\x00"), none=bytearray(), nested=[(1, None), {"a": 2.5}])
    for protocol in (0, 2, 3, 5):
        for name in ("data_batch_1", "test_batch"):
            write_pickle(tmp_path / name, entry, protocol)
        assert len(load("cifar10", tmp_path).train_images) == 4


# ---- CIFAR: what is missing or wrong ----


def test_not_found_says_where_and_what_to_do(tmp_path):
    """Else: a new user does not learn where the data belong, or that there is something to run without them."""
    for dataset, name in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        refused(dataset, tmp_path, f"{tmp_path / name} and {tmp_path}", "--download", "--dataset digits")
        refused(dataset, tmp_path / "no" / "such", tmp_path / "no" / "such" / name)
    refused("fashionmnist", tmp_path, tmp_path / "FashionMNIST" / "raw", "--download", "--dataset digits")
    refused("cifar10", "~nobody/\0", "not found")


@pytest.mark.parametrize("missing", ["data_batch_1", "data_batch_3", "test_batch"])
def test_missing_file_is_named(tmp_path, missing):
    """Else: a run trains on four fifths of the data and nobody notices."""
    folder = make_cifar10(tmp_path)
    (folder / missing).unlink()
    refused("cifar10", tmp_path, folder / missing, "missing")


def test_missing_file_cifar100(tmp_path):
    """Else: a CIFAR-100 copy without its test file ends in a traceback."""
    folder = make_cifar100(tmp_path)
    (folder / "test").unlink()
    refused("cifar100", tmp_path, folder / "test", "missing")
    make_cifar100(tmp_path)
    (folder / "train").unlink()
    refused("cifar100", tmp_path, folder / "train", "missing")


def test_four_official_batches_lack_the_fifth(tmp_path, monkeypatch):
    """Else: a published copy without its last batch passes for a smaller data set."""
    folder = make_cifar10(tmp_path)
    (folder / "data_batch_5").rename(tmp_path / "kept")
    assert len(load("cifar10", tmp_path).train_images) == 160  # own data, four batches: complete
    (tmp_path / "kept").rename(folder / "data_batch_5")
    publish(monkeypatch, CIFAR10, folder)
    (folder / "data_batch_5").unlink()
    refused("cifar10", tmp_path, folder / "data_batch_5", "missing")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"labels": [0, 1, 2]}, "3 labels for 4 images"),
        ({"labels": [0, 1, 2, 10]}, "label 10 of sample 3, expected 0 to 9"),
        ({"labels": [0, -1, 2, 3]}, "label -1 of sample 1"),
        ({"labels": [0, 1, 2, 2**63]}, "labels"),
        ({"labels": [0, 1, 2, 2.0]}, "labels"),
        ({"labels": [0, 1, 2, None]}, "labels"),
        ({"labels": [0, 1, 2, [3]]}, "labels"),
        ({"labels": np.zeros((4, 1), int)}, "labels"),
        ({"labels": np.zeros(4)}, "labels"),
        ({"labels": None}, "labels"),
        ({"labels": "0123"}, "labels"),
        ({"data": None}, "data"),
        ({"data": batch()["data"].tolist()}, "data"),
        ({"data": batch()["data"].astype(np.float32)}, "float32"),
        ({"data": batch()["data"].astype(np.int64)}, "int64"),
        ({"data": batch()["data"].astype(object)}, "expected numbers"),
        ({"data": np.zeros(4, dtype=[("a", "u1"), ("b", "O")])}, "expected numbers"),
        ({"data": np.array(["a", "b", "c", "d"])}, "expected numbers"),
        ({"data": batch()["data"].reshape(4, 3, 32, 32)}, "(4, 3, 32, 32)"),
        ({"data": batch()["data"][:, :-1]}, "3071"),
        ({"data": np.zeros((4, 3 * 15 * 15), np.uint8)}, "side >= 16"),
        ({"data": np.zeros((4, 0), np.uint8)}, "side >= 16"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "n > 0"),
        ({"data": rows_of(colour_digits(4, side=24)[0])}, "differ in size"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_wrong_contents_are_refused_by_name(tmp_path, changes, expected, protocol):
    """Else: wrong labels or shapes reach the training loop and end there in a CUDA assert, or in bad numbers."""
    folder = make_cifar10(tmp_path, n_train=20, n_test=4, batches=2)
    write_pickle(folder / "data_batch_2", batch(**changes), protocol)
    refused("cifar10", tmp_path, folder / "data_batch_2", expected)


def test_wild_label_without_a_meta_file(tmp_path):
    """Else: one damaged label makes a network with 10^12 classes."""
    folder = make_cifar10(tmp_path, batches=1, meta=False)
    write_pickle(folder / "data_batch_1", batch(labels=[0, 1, 2, 10**12]))
    refused("cifar10", tmp_path, folder / "data_batch_1", f"label {10**12} of sample 3")


@pytest.mark.parametrize("entry", [{}, {"label_names": []}, {"label_names": [1, 2]}, {"label_names": "ab"}, []])
def test_wrong_meta_file(tmp_path, entry):
    """Else: the number of classes comes from a file that does not say it."""
    folder = make_cifar10(tmp_path)
    refused("cifar10", write_pickle(folder / "batches.meta", entry).parent, folder / "batches.meta")


def test_unreadable_file(tmp_path):
    """Else: a file that cannot be opened ends in a traceback."""
    folder = make_cifar10(tmp_path)
    (folder / "data_batch_2").unlink()
    (folder / "data_batch_2").mkdir()
    refused("cifar10", tmp_path, folder / "data_batch_2")


# ---- Downloads ----


def forbid(*_, **__):
    raise AssertionError("downloaded although there was no need")


@pytest.mark.parametrize("dataset, module", [("cifar10", "cifar"), ("cifar100", "cifar"), ("fashionmnist", "mnist")])
@pytest.mark.parametrize(
    "error", [URLError("no\nnetwork"), RuntimeError("File not found or corrupted."), OSError(28, "full")]
)
def test_failed_download_says_what_to_fetch(tmp_path, monkeypatch, dataset, module, error):
    """Else: a user behind a firewall sees a traceback and not the address and the place of the file."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fail)
    message = refused(dataset, tmp_path / "new", "download", "failed", tmp_path / "new", download=True)
    assert "http" in message


def test_wrong_md5_of_a_download(tmp_path, monkeypatch):
    """Else: a tampered download is used, or reported as a mystery."""
    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive", lambda url, root, **_: make_cifar10(root)
    )
    refused("cifar10", tmp_path, "download", "failed", download=True)


def test_download_into_each_form_of_data_path(tmp_path, monkeypatch):
    """Else: --download puts the files where the next run does not find them."""
    folder = make_cifar10(tmp_path / "source")
    publish(monkeypatch, CIFAR10, folder)

    def fetch(url, root, **_):
        shutil.copytree(folder, Path(root) / "cifar-10-batches-py", dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    for path in (tmp_path / "a", tmp_path / "b" / "cifar-10-batches-py"):
        data = load("cifar10", path, download=True)
        assert data.official and data.folder.name == "cifar-10-batches-py" and data.folder.parent.parent == tmp_path
        (data.folder / "data_batch_4").unlink()  # a part of the published files: fetch again
        assert load("cifar10", path, download=True).official
        (data.folder / "data_batch_4").write_bytes(b"damaged")  # may be somebody's own: say so, overwrite nothing
        refused("cifar10", path, data.folder / "data_batch_4", "delete it", download=True)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", forbid)
    assert load("cifar10", folder, download=True).official


def test_download_leaves_own_data_alone(tmp_path, monkeypatch):
    """Else: --download replaces a user's own data in CIFAR's format by CIFAR-10."""
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", forbid)
    make_cifar10(tmp_path, batches=2)
    assert len(load("cifar10", tmp_path, download=True).train_images) == 200
    make_fashionmnist(tmp_path)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", forbid)
    assert len(load("fashionmnist", tmp_path, download=True).train_images) == 200


# ---- Fashion-MNIST ----


def test_fashionmnist(tmp_path):
    """Else: Fashion-MNIST runs see shifted images, unequal channels or the wrong split."""
    raw = make_fashionmnist(tmp_path)
    for path in (tmp_path, tmp_path / "FashionMNIST", raw):
        data = load("fashionmnist", path)
        assert data.folder == tmp_path
    grey, labels = grey_digits(260)
    assert data.train_images.shape == (200, 32, 32, 3) and data.test_images.shape == (60, 32, 32, 3)
    assert data.train_images.dtype == np.uint8 and data.train_images.flags["C_CONTIGUOUS"]
    for channel in range(3):
        np.testing.assert_array_equal(data.train_images[:, 4:28:3, 4:28:3, channel], grey[:200])
    border = np.ones((32, 32), bool)
    border[2:30, 2:30] = False
    assert not data.train_images[:, border].any() and not data.test_images[:, border].any()
    assert data.train_labels.tolist() == labels[:200].tolist() and data.test_labels.tolist() == labels[200:].tolist()
    assert data.train_labels.dtype == np.int64 and data.class_names == FashionMNIST.classes
    assert data.mean == (0.2860,) * 3 and data.std == (0.3530,) * 3 and data.flip and not data.official


def test_fashionmnist_only_compressed(tmp_path):
    """Else: a user who fetched the four .gz files by hand does not learn that one command is missing."""
    raw = make_fashionmnist(tmp_path)
    for path in list(raw.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    refused("fashionmnist", tmp_path, raw / "train-images-idx3-ubyte.gz", "gunzip")


@pytest.mark.parametrize("name", [n.removesuffix(".gz") for n, _ in FashionMNIST.resources])
def test_fashionmnist_damage_is_named(tmp_path, name):
    """Else: a truncated IDX file ends in torchvision's bare AssertionError."""
    raw = make_fashionmnist(tmp_path)
    path = raw / name
    whole = path.read_bytes()
    for content in (b"", whole[:3], whole[:8], whole[:60], whole[:-1], whole + b"x", b"\xff" * 50, whole[::-1]):
        path.write_bytes(content)
        refused("fashionmnist", tmp_path, path)
    path.unlink()
    refused("fashionmnist", tmp_path, path, "missing")


def test_fashionmnist_wrong_contents(tmp_path):
    """Else: other IDX data pass for Fashion-MNIST."""
    raw = make_fashionmnist(tmp_path)
    images, labels = raw / "t10k-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">ii", 0x801, 60) + bytes([10] * 60))
    refused("fashionmnist", tmp_path, labels, "label 10 of sample 0, expected 0 to 9")
    labels.write_bytes(struct.pack(">ii", 0x801, 59) + bytes(59))
    refused("fashionmnist", tmp_path, labels, "59 labels for 60 images")
    images.write_bytes(struct.pack(">iiii", 0x803, 59, 32, 32) + bytes(59 * 32 * 32))
    refused("fashionmnist", tmp_path, images, "(32, 32)")
    shutil.copy(labels, images)
    refused("fashionmnist", tmp_path, images)


# ---- Digits ----


def test_digits(tmp_path):
    """Else: `make demo` splits, scales or mirrors the digits otherwise than its published numbers assume."""
    data = load("digits", tmp_path / "unused", download=True)
    assert data.train_images.shape == (1450, 32, 32, 3) and data.test_images.shape == (347, 32, 32, 3)
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int64
    assert data.train_images.flags["C_CONTIGUOUS"] and data.test_images.flags["C_CONTIGUOUS"]
    assert (data.num_class, data.flip, data.folder, data.official) == (10, False, None, False)
    assert data.class_names == [str(digit) for digit in range(10)]

    digits = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    np.testing.assert_array_equal(data.train_labels, digits.target[order[:1450]])
    np.testing.assert_array_equal(data.test_labels, digits.target[order[1450:]])
    # bilinear, align_corners=False, factor 4: the corner is the corner pixel, the inner ones mix four neighbours
    first = digits.images[order[0]]
    np.testing.assert_array_equal(data.train_images[0, 0, 0], [round(first[0, 0] * 255 / 16)] * 3)
    # output 13 lies at (13 + 0.5) / 4 - 0.5 = 2.875
    rows, weights = [2, 3], np.array([0.125, 0.875])
    expected = weights @ first[np.ix_(rows, rows)] @ weights * 255 / 16
    np.testing.assert_array_equal(data.train_images[0, 13, 13], [round(expected)] * 3)
    assert data.train_images.max() == 255 and data.train_images.min() == 0

    pixels = data.train_images.astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 1, 2)))
    assert all(type(value) is float for value in data.mean + data.std)


def test_digits_split_is_stable():
    """Else: two installations train on different digits, and their results cannot be compared."""
    data = load("digits", "x")
    assert data.train_labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    again = load("digits", "y")
    np.testing.assert_array_equal(data.train_images, again.train_images)


# ---- Files like the set's images ----


def prepared(data, path: Path, pixels: np.ndarray) -> np.ndarray:
    """An image file as the set's preparation makes it, with its border and three channels: (H, W, 3)."""
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    border = data.preparation.border
    pixels = data.preparation.view(shown(path, Boundary(path.parent)).image)
    found = np.pad(pixels, ((border, border), (border, border), (0, 0)))
    return np.repeat(found, 3 // found.shape[2], axis=2)


@pytest.mark.parametrize(
    ("make", "side"), [(make_cifar10, 32), (lambda root: make_cifar10(root, side=48), 48), (make_cifar100, 32)]
)
def test_a_file_of_cifar_is_prepared_as_it_is(tmp_path, make, side):
    """Else: a trained network is asked about other pixels than those of its test set."""
    dataset = "cifar100" if make(tmp_path).name == "cifar-100-python" else "cifar10"
    data = load(dataset, tmp_path)
    for image in data.test_images[:5]:
        np.testing.assert_array_equal(prepared(data, tmp_path / "a.png", image), image)
    assert (data.preparation.image_size, data.preparation.resize) == (side, side)
    assert (data.preparation.mean, data.preparation.std) == (data.mean, data.std)


def test_a_published_file_of_fashionmnist_is_prepared_as_the_set(tmp_path):
    """Else: 28x28 files are blown up to 32x32, which no image of the training set was."""
    make_fashionmnist(tmp_path)
    data = load("fashionmnist", tmp_path)
    for image in data.test_images[:5]:
        np.testing.assert_array_equal(prepared(data, tmp_path / "a.png", image[2:-2, 2:-2, 0]), image)
        np.testing.assert_array_equal(prepared(data, tmp_path / "a.png", image[2:-2, 2:-2]), image)  # in three channels


def test_a_digit_of_8x8_is_prepared_as_the_set(tmp_path):
    """Else: digits in their own size are scaled otherwise than those trained on. A file has 256 levels, the set 17:
    rounding differs by one level. A file of 32x32 is taken as it is."""
    data, digits = load("digits", tmp_path), load_digits()
    order = np.random.RandomState(0).permutation(1797)[1450:]
    for i, image in zip(order[:60], data.test_images, strict=False):
        found = prepared(data, tmp_path / "a.png", np.round(digits.images[i] * (255 / 16)).astype(np.uint8))
        np.testing.assert_allclose(found.astype(int), image, atol=1)
        np.testing.assert_array_equal(prepared(data, tmp_path / "a.png", image), image)
