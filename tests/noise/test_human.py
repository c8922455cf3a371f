"""Human labels: the published files are read, anything else ends in one line, and nothing that a file holds is run."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import make_human, pickled, torch_archive

from dividemix import DivideMixError
from dividemix.noise.human import KEYS, find, keys, read

ROOT = Path(__file__).parents[2]
TRUTH = np.arange(40) % 10
GIVEN = np.where(TRUTH == 3, 5, TRUTH)
SOUND = {"clean_label": TRUTH, "aggre_label": TRUTH, "worse_label": GIVEN}


class Call:
    """Asks, when it is read, for function(*args), then for the state to be set."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("numpy1", [True, False])
def test_the_published_format_is_read(tmp_path, numpy1):
    """The published files name numpy 1's functions, one that is saved again today numpy 2's."""
    file = make_human(tmp_path / "human.pt", SOUND, numpy1)
    np.testing.assert_array_equal(read(file, "worse_label", TRUTH, 10), GIVEN)
    assert read(file, "aggre_label", TRUTH, 10).dtype == np.int64


def test_what_torch_saves_is_read(tmp_path):
    """Else people cannot bring labels of their own in this format."""
    torch.save({**SOUND, "worse_label": GIVEN.astype(">i8")}, tmp_path / "human.pt")
    np.testing.assert_array_equal(read(tmp_path / "human.pt", "worse_label", TRUTH, 10), GIVEN)


def test_the_lists_of_cifar100s_published_file_do_not_matter(tmp_path):
    """CIFAR-100_human.pt holds two arrays and, of the coarse classes, two lists of int: it would be refused."""
    truth = np.arange(200) % 100
    given = np.where(truth % 5 == 0, (truth + 1) % 100, truth)
    entry = {"clean_label": truth, "noisy_label": given}
    entry |= {"noisy_coarse_label": (given // 5).tolist(), "clean_coarse_label": (truth // 5).tolist()}
    file = make_human(tmp_path / "CIFAR-100_human.pt", entry)
    np.testing.assert_array_equal(read(file, "noisy_label", truth, 100), given)
    with pytest.raises(DivideMixError, match="'noisy_coarse_label' is not an array"):
        read(file, "noisy_coarse_label", truth, 100)


def test_nothing_is_admitted_beyond_the_reading(tmp_path):
    """A name that stays admitted would open every later torch.load, that of checkpoints too."""
    before = torch.serialization.get_safe_globals()
    read(make_human(tmp_path / "human.pt", SOUND), "worse_label", TRUTH, 10)
    with pytest.raises(DivideMixError):
        read(make_human(tmp_path / "human.pt", {"a": TRUTH}), "worse_label", TRUTH, 10)
    assert torch.serialization.get_safe_globals() == before


FAULTS = {
    "a shorter list": ({**SOUND, "worse_label": GIVEN[:-1]}, "'worse_label' has 39 labels, the data set 40"),
    "shorter true labels": ({**SOUND, "clean_label": TRUTH[:-1]}, "'clean_label' has 39 labels, the data set 40"),
    "a label too large": ({**SOUND, "worse_label": GIVEN + 1}, "'worse_label' has labels outside 0..9"),
    "a negative label": ({**SOUND, "worse_label": GIVEN - 1}, "'worse_label' has labels outside 0..9"),
    "another data set's": ({**SOUND, "clean_label": GIVEN}, "clean_label is not the data set's label for 4 of 40"),
    "no such labels": ({"clean_label": TRUTH, "noisy_label": GIVEN}, "no 'worse_label', only clean_label, noisy_label"),
    "no true labels": ({"worse_label": GIVEN}, "no 'clean_label', only worse_label"),
    "keys that cannot be shown": ({"a\nb": TRUTH, 3: TRUTH}, "no 'clean_label', only others"),
    "two axes": ({**SOUND, "worse_label": GIVEN.reshape(4, 10)}, "'worse_label' is not an array (N,)"),
    "fractions": ({**SOUND, "worse_label": GIVEN / 2}, "'worse_label' is not an array (N,) of int64 numbers"),
    "short numbers": ({**SOUND, "worse_label": GIVEN.astype(np.int32)}, "'worse_label' is not an array (N,) of int64"),
    "objects": ({**SOUND, "worse_label": GIVEN.astype(object)}, "'worse_label' is not an array (N,) of int64 numbers"),
    "no dict": (list(SOUND.values()), "one dict of arrays"),
    "lists": ({name: labels.tolist() for name, labels in SOUND.items()}, "'clean_label' is not an array"),
    "tensors": (
        {name: torch.tensor(labels) for name, labels in SOUND.items()},
        "'clean_label' is not an array (N,) of",
    ),
    "an array without its contents": ({**SOUND, "worse_label": Call(np.ndarray, (40,))}, "not an array (N,) of int64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_labels_that_cannot_be_these_are_refused(tmp_path, fault):
    """Training on labels of other images gives a plausible wrong number: the worst outcome of all."""
    entry, words = FAULTS[fault]
    torch.save(entry, tmp_path / "human.pt")
    with pytest.raises(DivideMixError) as error:
        read(tmp_path / "human.pt", "worse_label", TRUTH, 10)
    assert words in str(error.value) and str(tmp_path / "human.pt") in str(error.value)
    assert "\n" not in str(error.value) and "--noise_file" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04", "damaged"),
        (b"[1, 2, 3]", "damaged"),
        (torch_archive(pickled(SOUND))[:-30], "damaged"),
        (torch_archive(pickled(SOUND)[:-30]), "damaged"),
        (torch_archive(pickled(SOUND, protocol=4)), "damaged"),  # torch.load knows protocol 2
        (pickled(SOUND), "damaged"),  # no archive
        (b"\0" * 2**21, "damaged"),
        (torch_archive(pickled({"a": "x" * 10**8}), zipfile.ZIP_DEFLATED), "far too large for 40 labels once unpacked"),
    ],
    ids=["empty", "a beginning", "JSON", "cut", "cut inside", "protocol", "no archive", "large", "packed"],
)
def test_damaged_files_are_refused(tmp_path, recwarn, content, words):
    """Else half a download ends in a stack trace, or 100 kB fill the machine's memory."""
    (tmp_path / "human.pt").write_bytes(content)
    with pytest.raises(DivideMixError, match=words) as error:
        read(tmp_path / "human.pt", "worse_label", TRUTH, 10)
    assert "\n" not in str(error.value) and not recwarn


def test_code_in_a_file_is_not_run(tmp_path):
    """A label file from anywhere would run programs on its users' machines."""
    file, marker = tmp_path / "human.pt", tmp_path / "marker"
    for name, call in (
        ("posix.mkdir", Call(os.mkdir, str(marker))),
        ("eval", Call(eval, f"open({str(marker)!r}, 'w')")),
        ("numpy.load", Call(np.load, str(marker))),
        ("torch.serialization.load", Call(torch.load, str(marker))),
        ("numpy.dtypes.Int64DType", Call(np.dtypes.Int64DType)),
    ):
        file.write_bytes(torch_archive(pickled({**SOUND, "worse_label": call})))
        with pytest.raises(DivideMixError, match=f"it asks for '{name}', refused and nothing run") as error:
            read(file, "worse_label", TRUTH, 10)
        assert "\n" not in str(error.value) and not marker.exists()


READ = """
import sys
from pathlib import Path
import numpy as np
from dividemix import DivideMixError
from dividemix.noise import human
for path in sys.argv[1:]:
    try:
        human.read(Path(path), "worse_label", np.arange(40) % 10, 10)
    except DivideMixError:
        print("refused")
"""


def test_no_file_crashes_the_process(tmp_path):
    """numpy's own ndarray, called with bytes and an object type, takes the file's bytes for addresses of objects: 90
    bytes crash whoever reads them, or run what lies there. This is what the names that arrays need would open."""
    addresses = np.arange(1, 81).tobytes()
    empty = np._core.multiarray._reconstruct
    forged = Call(np.dtype, "i8", False, True, state=(3, "<", None, None, None, -1, -1, 63))
    tame = Call(np.dtype, "O", False, True, state=(3, "|", None, None, None, -1, -1, 0))
    types = ["O", "O8", "V8,O", "(1,)O", "V8", forged, tame, Call(np.dtype, "O"), Call(np.dtype, [("a", "O")])]
    calls = [Call(np.ndarray, (40,), kind, addresses) for kind in types]
    calls += [Call(empty, np.ndarray, (40,), kind, state=(1, (40,), kind, False, addresses)) for kind in types]
    calls += [Call(set, call) for call in calls]  # looks at what is in it
    files = [tmp_path / f"{number}.pt" for number in range(len(calls))]
    for file, call in zip(files, calls, strict=True):
        file.write_bytes(torch_archive(pickled({**SOUND, "worse_label": call})))
    done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * len(files)


def test_a_file_that_cannot_be_opened(tmp_path):
    """Else a folder of this name ends in a stack trace."""
    with pytest.raises(DivideMixError, match="cannot be read: not a file"):
        read(tmp_path, "worse_label", TRUTH, 10)


def test_names_of_labels_and_files(tmp_path):
    """Else the labels of the papers on CIFAR-10N and CIFAR-100N cannot be asked for, or a set finds another's file."""
    assert keys("cifar10") == ("worse_label", "aggre_label", "random_label1", "random_label2", "random_label3")
    assert keys("cifar100") == ("noisy_label",) and keys("digits") == KEYS
    (tmp_path / "inner").mkdir()
    (tmp_path / "CIFAR-100_human.pt").touch()
    assert find("cifar100", tmp_path) == find("cifar100", tmp_path / "inner") == tmp_path / "CIFAR-100_human.pt"
    assert find("cifar10", tmp_path) is find("digits", tmp_path) is find("cifar100", None) is None
