"""Human labels: the published files are read, anything else ends in one line, and no code in a file is run."""

import os
import zipfile

import numpy as np
import pytest
import torch
from helpers.data import Call, make_human, pickled, torch_archive
from helpers.errors import assert_refused

from dividemix.noise.human import read

TRUTH = np.arange(40) % 10
NOISY = np.where(TRUTH == 3, 5, TRUTH)
SOUND = {"clean_label": TRUTH, "worse_label": NOISY, "noisy_coarse_label": NOISY.tolist()}  # CIFAR-100's has a list


@pytest.fixture
def file(tmp_path):
    return tmp_path / "human.pt"


def refused(file, *expected: str) -> None:
    assert_refused(lambda: read(file, "worse_label", TRUTH, 10), file, *expected)


def test_the_published_format_and_what_torch_saves_are_read(file):
    """The published files name numpy 1's functions, new ones numpy 2's."""
    for numpy1 in (True, False):
        make_human(file, SOUND, numpy1)
        np.testing.assert_array_equal(read(file, "worse_label", TRUTH, 10), NOISY)
    torch.save({**SOUND, "worse_label": NOISY.astype(">i8")}, file)
    labels = read(file, "worse_label", TRUTH, 10)
    assert labels.tolist() == NOISY.tolist() and labels.dtype == np.int64
    truth = np.tile(TRUTH, 500)
    make_human(file, {"clean_label": truth, "worse_label": truth, **{f"label{k}": truth for k in range(24)}})
    assert read(file, "worse_label", truth, 10).tolist() == truth.tolist()
    make_human(file, {"clean_label": TRUTH})
    refused(file)


FAULTS = {
    "one label less": ({**SOUND, "worse_label": NOISY[:-1]}, "39 labels"),
    "a label too large": ({**SOUND, "clean_label": NOISY + 1}, "'clean_label'"),
    "a negative label": ({**SOUND, "worse_label": NOISY - 1}, "'worse_label'"),
    "another data set's": ({**SOUND, "clean_label": NOISY}, "4 of 40"),
    "no such labels": ({"clean_label": TRUTH, "noisy_label": NOISY}, "clean_label, noisy_label"),
    "keys that cannot be shown": ({"a\nb": TRUTH, 3: TRUTH}, "'clean_label'"),
    "two axes": ({**SOUND, "worse_label": NOISY.reshape(40, 1)}, "'worse_label'"),
    "fractions": ({**SOUND, "worse_label": NOISY / 2}, "whole numbers"),
    "no dict": (list(SOUND.values()), "'list'"),
    "a list": ({**SOUND, "worse_label": NOISY.tolist()}, "'worse_label'"),
    "an array without contents": ({**SOUND, "worse_label": Call(np.ndarray, (40,))}, "damaged"),
}


@pytest.mark.parametrize(("entry", "expected"), FAULTS.values(), ids=FAULTS)
def test_labels_that_cannot_be_these_are_refused(file, entry, expected):
    """Training on labels of other images gives a plausible wrong number: the worst outcome of all."""
    torch.save(entry, file)
    refused(file, expected, "--noise_")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (torch_archive(pickled(SOUND))[:-30], "BadZipFile"),
        (pickled(SOUND), "BadZipFile"),
        (torch_archive(pickled(SOUND), second="other/data.pkl"), "too many values"),
        (torch_archive(pickled(SOUND), zipfile.ZIP_DEFLATED), "compressed"),
        (torch_archive(pickled({"a": "x" * 2**21})), "too large"),
    ],
    ids=["cut", "no archive", "two pickles", "packed", "2 MB for 40 labels"],
)
def test_damaged_files_are_refused(file, content, expected):
    """Else half a download ends in a stack trace, or a small file fills the memory."""
    file.write_bytes(content)
    refused(file, expected, "--noise_file")
    refused(file.parent, "cannot be read")


def test_code_in_a_file_is_not_run(file, tmp_path):
    """A label file from anywhere would run programs on its users' computers."""
    marker = tmp_path / "marker"
    for name, call in (
        ("posix.mkdir", Call(os.mkdir, str(marker))),
        ("builtins.eval", Call(eval, f"open({str(marker)!r}, 'w')")),
        ("torch.serialization.load", Call(torch.load, str(marker))),
        ("numpy.dtypes.Int64DType", Call(np.dtypes.Int64DType)),
    ):
        file.write_bytes(torch_archive(pickled({**SOUND, "worse_label": call})))
        refused(file, name.replace("builtins", "__builtin__"))
        assert not marker.exists()
