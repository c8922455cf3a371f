"""The noise file: where a run's labels come from, and files that cannot be this noise are refused."""

import io
import json
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
from helpers.data import make_human
from helpers.errors import assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from dividemix import DivideMixError
from dividemix.noise import file as noise_file
from dividemix.noise import synthetic
from dividemix.noise.file import NoiseSpec, expected_changed, noisy_labels, read, wrong_share
from dividemix.noise.synthetic import asym_transition, inject

TRUTH = np.arange(1000) % 10
IMAGES = np.random.default_rng(0).integers(0, 256, (1000, 2, 2, 3), dtype=np.uint8)
GOOD = inject(TRUTH.tolist(), "sym", 0.5, 10, 0)


def spec(mode="sym", r=0.5, num_class=10, dataset="cifar10", seed=123, **more):
    return NoiseSpec(dataset, mode, r, seed, num_class, asym_transition(num_class, dataset)[0], **more)


@pytest.fixture
def folders(tmp_path):
    """A data folder and the folders of two runs."""
    for name in ("data", "first", "second"):
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in ("data", "first", "second")]


def stored(folder):
    """The labels in the one file of a folder."""
    [file] = folder.iterdir()
    return json.loads(file.read_text())


def test_file_names_tell_rates_apart():
    """With one decimal alone, 0.45 and 0.5 would share a file and silently a noise."""
    assert spec().file_name == "0.5_sym.json"
    assert spec(r=1.0, dataset="cifar100").file_name == "1.0_sym.json"
    assert spec("asym", 0.45).file_name == "0.45_asym.json"
    assert spec(definition="exclude_self").file_name == "0.5_sym_exclude_self.json"
    assert spec("idn", 0.4, dataset="digits").file_name == "digits_0.4_idn.json"
    assert spec("human", None, key="worse_label").file_name == "worse_label.json"


@pytest.mark.parametrize("mode", ["sym", "idn"])
def test_a_file_wins_over_the_seed_and_the_run_keeps_its_labels(folders, mode):
    """Two runs that should share their noise but do not; or a continued run whose labels changed under it."""
    data, first, second = folders
    made, origin = noisy_labels(TRUTH, spec(mode, seed=1), data, first, begun=False, images=IMAGES)
    expected = inject(TRUTH.tolist(), "sym", 0.5, 10, 1)
    if mode == "idn":
        expected = synthetic.inject_instance_dependent(IMAGES, TRUTH, 0.5, 10, 1).tolist()
    assert made.tolist() == expected and "seed 1" in origin and str(data / f"0.5_{mode}.json") in origin
    assert stored(data) == stored(first) == expected
    again, origin = noisy_labels(TRUTH, spec(mode, seed=2), data, second, begun=False, images=IMAGES)
    assert again.tolist() == expected and str(data) in origin and "--noise_seed" in origin
    (data / f"0.5_{mode}.json").unlink()
    again, origin = noisy_labels(TRUTH, spec(mode, seed=2), data, first, begun=True, images=IMAGES)
    assert again.tolist() == expected and str(first) in origin


def test_a_data_folder_that_cannot_be_written(folders, monkeypatch):
    """Data sets are often mounted read-only: the noise is then in the run folder."""
    data, run, _ = folders
    write = noise_file.write_atomically
    refuse = mock.Mock(side_effect=PermissionError("read-only"))
    monkeypatch.setattr(
        noise_file, "write_atomically", lambda path, *a: (refuse if path.parent == data else write)(path, *a)
    )
    _, origin = noisy_labels(TRUTH, spec(), data, run, begun=False)
    assert str(run) in origin and [file.name for file in run.iterdir()] == ["0.5_sym.json"]


def test_two_runs_that_start_together_share_one_noise(folders, monkeypatch):
    """A sweep over seeds on fresh data: each run would train on its own noise, and the last one's file would stay."""
    data, first, second = folders

    def inject_while_another_run_is_quicker(*args):
        monkeypatch.setattr(synthetic, "inject", inject)
        noisy_labels(TRUTH, spec(seed=1), data, first, begun=False)
        return inject(*args)

    monkeypatch.setattr(synthetic, "inject", inject_while_another_run_is_quicker)
    labels, _ = noisy_labels(TRUTH, spec(seed=2), data, second, begun=False)
    assert labels.tolist() == inject(TRUTH.tolist(), "sym", 0.5, 10, 1)
    assert [*map(stored, folders)] == [labels.tolist()] * 3


def npy(labels) -> bytes:
    file = io.BytesIO()
    np.save(file, labels)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        *(json.dumps(GOOD, **form).encode() for form in ({}, {"separators": (",", ":")}, {"indent": 2})),
        json.dumps(GOOD).encode() + b"\n",
        *(npy(np.array(GOOD, dtype)) for dtype in ("int64", "int32", "uint8", ">i8")),
    ],
)
def test_noise_files_of_other_programs(tmp_path, content):
    """The noise of a published comparison could not be used, or its labels go to other images."""
    (tmp_path / "noise").write_bytes(content)
    labels = read(tmp_path / "noise", TRUTH, spec())
    assert labels.dtype == np.int64 and labels.tolist() == GOOD


def test_a_noise_file_of_cifar_size(tmp_path):
    """The published files are one list of 50,000 numbers in one line."""
    (tmp_path / "0.5_sym.json").write_text(json.dumps(GOOD * 50))
    assert read(tmp_path / "0.5_sym.json", np.tile(TRUTH, 50), spec()).tolist() == GOOD * 50


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps(GOOD[:-1]), "999 labels"),
        (json.dumps([*GOOD[:-1], 10]), "0..9"),
        (json.dumps([*GOOD[:-1], True]), "whole numbers"),
        (json.dumps({"labels": GOOD}), "list"),
        (json.dumps(GOOD)[:-5], "JSON"),
        ("[" * 30_000, "JSON"),
        (npy(np.array(GOOD))[:-1].decode("latin1"), ".npy"),
        (npy(np.array(GOOD, object)).decode("latin1"), ".npy"),
        (npy(np.eye(10)[GOOD]).decode("latin1"), "flat list of whole numbers"),
        (npy(np.array(GOOD, float)).decode("latin1"), "whole numbers"),
        (json.dumps(inject(TRUTH.tolist(), "sym", 0.2, 10, 0)), "another rate"),
        (json.dumps(((TRUTH + 1) % 10).tolist()), "another rate"),
    ],
)
def test_files_that_cannot_be_this_noise_are_refused(tmp_path, content, expected):
    """Training on the wrong labels gives a plausible wrong number: the worst outcome of all."""
    file = tmp_path / "0.5_sym.json"
    file.write_bytes(content.encode("latin1"))
    assert_refused(lambda: read(file, TRUTH, spec()), file, expected)


@pytest.mark.parametrize("r", [0.5, 0.9, 1.0])
def test_a_noise_file_of_another_data_set(tmp_path, r):
    """CIFAR-10's file beside CIFAR-100, or that of another set of the same size: a run on labels of other images."""
    truth, file = np.arange(10_000) % 100, tmp_path / "noise.json"
    file.write_text(json.dumps(inject((truth % 10).tolist(), "sym", r, 10, 123)))
    with pytest.raises(DivideMixError, match="data set"):
        read(file, truth, spec("sym", r, 100, "cifar100"))
    file.write_text(json.dumps(inject(truth[::-1].tolist(), "sym", r, 100, 123)))
    with pytest.raises(DivideMixError, match="data set") if r < 1 else nullcontext():  # 1: all labels are drawn
        read(file, truth, spec("sym", r, 100, "cifar100"))


KINDS = [("sym", "with_self"), ("sym", "exclude_self"), ("asym", "with_self"), ("idn", "with_self")]


@settings(max_examples=60)
@given(st.floats(0, 1), st.integers(0, 1000), st.sampled_from(KINDS), st.sampled_from([20, 200, 1000]))
def test_our_own_noise_is_always_accepted(tmp_path_factory, r, seed, kind, n):
    """A run whose own noise file is refused when it continues would be lost; small sets stray by more than a point."""
    injected = spec(kind[0], r, seed=seed, definition=kind[1])
    run_folder = tmp_path_factory.getbasetemp()
    made, _ = noisy_labels(TRUTH[:n], injected, None, run_folder, begun=False, images=IMAGES[:n])
    low, high = expected_changed(TRUTH[:n], injected)
    assert low <= np.mean(made != TRUTH[:n]) <= high


def test_the_two_definitions_of_symmetric_noise():
    """50 % noise is 45 % or 50 % wrong labels, which cannot be compared; others' with_self files have 50 %."""
    truth = np.arange(50_000) % 10
    low, high = expected_changed(truth, spec())
    assert 0.43 < low <= 0.45 <= 0.5 <= high < 0.515
    low, high = expected_changed(truth, spec(definition="exclude_self"))
    assert 0.48 < low <= 0.5 <= high < 0.52
    with pytest.raises(ValueError, match="pairflip"):
        expected_changed(truth, spec(mode="pairflip"))


def test_human_labels_come_from_a_file_and_the_run_keeps_a_copy(folders, tmp_path):
    """Else a run that is continued without the file, or with another one, has labels that belong to no file."""
    data, run, second = folders
    worse = np.where(TRUTH == 3, 5, TRUTH)
    arguments = (TRUTH, spec("human", None, key="worse_label"), data)
    with pytest.raises(DivideMixError, match=r"CIFAR-10_human\.pt"):
        noisy_labels(*arguments, run, begun=False)
    for folder in (data.parent, data):
        file = make_human(folder / "CIFAR-10_human.pt", {"clean_label": TRUTH, "worse_label": worse})
        labels, origin = noisy_labels(*arguments, run, begun=False)
        assert labels.tolist() == worse.tolist() and str(file) in origin
        assert wrong_share(*arguments, run, None) == 0.1
    clean = make_human(tmp_path / "clean.pt", {"clean_label": TRUTH, "worse_label": TRUTH})
    assert noisy_labels(*arguments, second, clean, begun=False)[0].tolist() == TRUTH.tolist()
    with pytest.raises(DivideMixError, match="--noise_file"):
        noisy_labels(*arguments, run, clean, begun=True)
    with pytest.raises(DivideMixError, match=r"mistyped\.pt"):
        noisy_labels(*arguments, run, tmp_path / "mistyped.pt", begun=False)
    for folder in (data.parent, data):
        (folder / "CIFAR-10_human.pt").unlink()
    labels, origin = noisy_labels(*arguments, run, begun=True)
    assert labels.tolist() == worse.tolist() and str(run / "worse_label.json") in origin
    with pytest.raises(DivideMixError, match="digits"):
        noisy_labels(TRUTH, spec("human", None, dataset="digits", key="worse_label"), None, tmp_path, begun=False)


def test_wrong_share_is_what_a_recipe_is_found_by(tmp_path):
    """Noise that the paper has keeps its row; for other noise, r has another meaning than in the paper."""
    specs = [spec("idn", 0.4), spec(definition="exclude_self"), spec(), spec("asym")]
    shares = [wrong_share(TRUTH, of_run, None, tmp_path, None) for of_run in specs]
    assert shares == [pytest.approx(0.4, abs=1e-4), 0.5, None, None]
