"""Damaged and hostile files of every kind that the scripts read: they are read, or refused by a DivideMixError of one
line. No traceback, no crash, no hang. `make test` tries 40 files of each kind, always the same; `make test-slow` others
each time, 1,000 of each kind or as many as the environment variable FUZZ says."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.data import batch, colour_digits, make_cifar10, pickled, rows_of, torch_archive
from helpers.trained import COLOUR, draw_photos
from helpers.trees import make_clothing1M, make_folder, make_webvision
from hypothesis import given, settings
from hypothesis import strategies as st

import dataloader_cifar
import dataloader_clothing1M
import dataloader_folder
import dataloader_webvision
from dividemix import DivideMixError, networks, noise
from dividemix.data.images import BadImage, shown
from dividemix.deploy import predict
from dividemix.noise import file as noise_file
from dividemix.noise import human as noise_human
from dividemix.run import checkpoint
from dividemix.runtime.device import Runtime


class Target(NamedTuple):
    sound: list[bytes]  # the contents of sound files
    read: Callable[[bytes, int], None]  # read(content, k): reads `content` in the place of the k-th of them

    def __repr__(self) -> str:  # hypothesis prints it: not all the bytes
        return self.read.__qualname__


def cifar(root: Path) -> Target:
    """A batch of two images of 16x16 pixels, as Python 2 and 3 write it."""
    folder = make_cifar10(root, n_train=2, n_test=2, batches=1, side=16)
    entry = batch(2, data=rows_of(colour_digits(2, side=16)[0]))
    sound = [pickled(entry, protocol) for protocol in (0, 2, 4, 5)] + [pickled(entry, 0, python2=True)]
    sound.append((folder / "data_batch_1").read_bytes())

    def read(content: bytes, _: int) -> None:
        (folder / "data_batch_1").write_bytes(content)
        images = dataloader_cifar.load("cifar10", folder)
        assert images.train_images.dtype == np.uint8 and len(images.train_images) == len(images.train_labels)
        assert 0 <= images.train_labels.min() <= images.train_labels.max() < images.num_class

    return Target(sound, read)


TRUTH = np.arange(40) % 5


def assert_labels(labels: np.ndarray) -> None:
    assert labels.dtype == np.int64 and labels.shape == (40,) and 0 <= labels.min() <= labels.max() < 5


def noise_json(root: Path) -> Target:
    """40 labels of 5 classes, 20 % of them redrawn: a changed one may pass, as other noise would."""
    spec = noise_file.NoiseSpec("digits", "sym", 0.2, 0, 5, noise.synthetic.next_class(5))
    labels = noise.inject(TRUTH.tolist(), "sym", 0.2, 5, 0)

    def read(content: bytes, _: int) -> None:
        (root / "noise.json").write_bytes(content)
        assert_labels(noise_file.read(root / "noise.json", TRUTH, spec))

    np.save(root / "noise.npy", np.array(labels))
    as_json = [json.dumps(labels).encode(), json.dumps(labels, indent=1).encode("utf-16")]
    return Target([*as_json, (root / "noise.npy").read_bytes()], read)


def human_labels(root: Path) -> Target:
    """Labels that people gave to 40 images, as numpy 1 and 2 write them; a changed label may pass."""
    arrays = {"clean_label": TRUTH, "worse_label": TRUTH[::-1].copy()}
    pickles = [pickled(arrays, numpy1=numpy1) for numpy1 in (False, True)]

    def read(content: bytes, k: int) -> None:
        (root / "human.pt").write_bytes(torch_archive(content) if k < 2 else content)
        assert_labels(noise_human.read(root / "human.pt", "worse_label", TRUTH, 5))

    return Target([*pickles, torch_archive(pickles[0])], read)


def lists(root: Path, names: list[str], find: Callable[[], tuple[dict, list[str]]]) -> Target:
    """The list files of a data folder, one of which is damaged. The problems that `find` returns are of one line."""
    sound = [(root / name).read_bytes() for name in names]

    def read(content: bytes, k: int) -> None:
        (root / names[k]).write_bytes(content)
        try:
            image_lists, problems = find()
        finally:
            (root / names[k]).write_bytes(sound[k])
        for images in image_lists.values():
            paths = [os.path.normpath(images.path(i)) for i in range(len(images))]
            assert paths and all(path.startswith(f"{root}/") for path in paths) and len(set(paths)) == len(paths)
            assert 0 <= images.labels.min() <= images.labels.max() < images.num_class
        if problems:
            raise DivideMixError("; ".join(problems))

    return Target(sound, read)


def clothing1m(root: Path) -> Target:
    names = ["noisy_train_key_list.txt", "clean_val_key_list.txt", "noisy_label_kv.txt", "clean_label_kv.txt"]
    make_clothing1M(root, 6, 3, 3)
    return lists(root, names, lambda: dataloader_clothing1M.find(root))


def webvision(root: Path) -> Target:
    names = [f"info/{name}.txt" for name in ("train_filelist_google", "val_filelist", "synsets")]
    make_webvision(root, 4, 2, 2, num_class=2, wnid_folders=True)
    return lists(root, names, lambda: dataloader_webvision.find(root, 2))


def folder_table(root: Path) -> Target:
    make_folder(root, 4, 2)
    (root / "train.csv").write_text('path,label\nc0/0000.jpg,cat\n"c1/0001.jpg", dog \n')
    return lists(root, ["train.csv"], lambda: (dataloader_folder.load(root).lists, []))


def tiny_state() -> dict:
    """The content of a checkpoint of two networks of one layer."""
    nets = [torch.nn.Linear(2, 2) for _ in range(2)]
    return {
        "format": checkpoint.FORMAT,
        "nets": [net.state_dict() for net in nets],
        "optimizers": [Runtime().optimizer(net, 0.1, 0.0).state_dict() for net in nets],
        "records": [{"epoch": 0, "phase": "train", "lr": 0.1, "test_acc": 50.0, "auc_net1": None}],
        "config": {"r": 0.5, "id": ""},
    }


def checkpoint_file(root: Path) -> Target:
    """Read as `--init_from` reads it, into networks that it fits; as now and as old versions of torch write it."""
    now, old = io.BytesIO(), io.BytesIO()
    torch.save(tiny_state(), now)
    torch.save(tiny_state(), old, _use_new_zipfile_serialization=False)

    def read(content: bytes, _: int) -> None:
        (root / "best.pt").write_bytes(content)
        with mock.patch.object(networks, "build", lambda *_: torch.nn.Linear(2, 2)):
            start = {"init_from": str(root / "best.pt"), "begun": False, "seed": 0, "runtime": Runtime()}
            networks.pair("linear", 2, 2, "none", **start)

    return Target([now.getvalue(), old.getvalue()], read)


def last_checkpoint(root: Path) -> Target:
    """The last of two checkpoints in a run folder. The one before it is sound."""
    for epoch in range(2):
        checkpoint.save_last(root, epoch, tiny_state())
    file = root / "epoch-001.pt"

    def read(content: bytes, _: int) -> None:
        file.write_bytes(content)
        assert checkpoint.load_last(root)["records"] == tiny_state()["records"]

    return Target([file.read_bytes()], read)


def prediction_list(root: Path) -> Target:
    """The list that `predict` takes. The images that it names are opened, and may be missing."""
    [photo] = draw_photos(root, 1)

    def read(content: bytes, _: int) -> None:
        (root / "list.csv").write_bytes(content)
        names, paths, boundary, _ = predict.find_images(root / "list.csv", skip_bad_images=True)
        assert names and len(names) == len(paths)
        for path in paths:
            with contextlib.suppress(BadImage):
                assert COLOUR.view(shown(path, boundary).image).shape == (16, 16, 3)

    quoted = "".join(f'"{name}"\n' for name in (photo.name, photo, "a,b", 'c""d', "é\n"))
    tables = [f"path,label\n{photo.name},1\n", "\ufeffid;x,path\r\n1,none.png\r\n", f"path\n{quoted}"]
    return Target([content.encode() for content in tables], read)


TARGETS = [cifar, noise_json, human_labels, clothing1m, webvision, folder_table]
TARGETS += [checkpoint_file, last_checkpoint, prediction_list]

# ---- Damage ----

TEXTS = ["\n", " ", "/", "..", "../", "/etc/passwd 0", "images/", "\0", "\r", "\x1c", "\u3000", "-1", "1e9", "NaN", "{"]
TOKENS = [*map(str.encode, TEXTS), b"[" * 3000, b"9" * 5000, b"a" * 300, b"\xff", b"\x80\x02.", b"PK\x03\x04"]


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """The content of a sound file, changed in up to six positions; or bytes that were never a file."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(TOKENS), max_size=8).map(b"".join)))
    content = bytearray(sound)
    changes = st.sampled_from(["set", "set", "set", "insert", "delete", "cut", "repeat"])
    # Most of a file is numbers without meaning: strike near both ends, where the structure is.
    positions = st.one_of(st.integers(0, 300), st.integers(-300, -1), st.integers(0, len(content) - 1))
    for i, change in draw(st.lists(st.tuples(positions, changes), max_size=6)):
        if change == "insert":
            content[i:i] = draw(st.sampled_from(TOKENS))
        elif change == "cut":
            del content[i:]
        elif change == "delete":
            del content[i : i + draw(st.integers(1, 20))]
        elif change == "repeat":
            content[i:i] = content[i : i + 40]
        elif -len(content) <= i < len(content):
            content[i] = draw(st.integers(0, 255))
    return bytes(content)


@pytest.fixture(scope="module", params=TARGETS, ids=lambda make: make.__name__)
def target(request, tmp_path_factory) -> Target:
    return request.param(tmp_path_factory.mktemp("fuzz"))


def attack(target: Target, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(target.sound) - 1))
    content = data.draw(damaged(target.sound[k]))
    try:
        target.read(content, k)
    except DivideMixError as error:
        assert str(error) and "\n" not in str(error)


ignored = pytest.mark.filterwarnings(
    "ignore::dividemix.DivideMixWarning",  # a checkpoint that cannot be read
    "ignore:invalid escape",  # of codecs.escape_decode, in Python 2 strings
    "ignore::UserWarning:torch",
)


def test_sound_files_are_read(target):
    """Nothing would be tested if the files were refused before they are damaged."""
    for k, content in enumerate(target.sound):
        target.read(content, k)


@ignored
@settings(max_examples=40)
@given(data=st.data())
def test_a_few_damaged_files(target, data):
    """Some damaged file ends in a traceback, a crash or a hang: its user does not learn which it is."""
    attack(target, data)


@pytest.mark.slow
@ignored
@settings(max_examples=int(os.environ.get("FUZZ", "1000")), derandomize=False)
@given(data=st.data())
def test_many_damaged_files(target, data):
    """The same with other files each time: what a few fixed examples do not reach."""
    attack(target, data)
