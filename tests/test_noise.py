"""Noisy labels: the authors' noise to the label, and files that cannot be this noise are refused."""

import hashlib
import json

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from dividemix import DivideMixError
from dividemix.noise import (
    CIFAR100_SUPERCLASSES,
    NoiseSpec,
    asym_transition,
    expected_changed,
    file_name,
    inject,
    noisy_labels,
    read,
)

GOLDEN_NOISE = json.loads((GOLDEN / "noise.json").read_text())


def spec(mode="sym", r=0.5, num_class=10, dataset="cifar10", seed=123):
    return NoiseSpec(dataset, mode, r, seed, num_class, asym_transition(num_class, dataset)[0])


@pytest.mark.parametrize("name", GOLDEN_NOISE)
def test_seed_123_is_the_authors_noise(name):
    """Other noise than the authors' could not be compared with their numbers."""
    golden = GOLDEN_NOISE[name]
    dataset, r, mode = name.split("_")
    classes = int(dataset.removeprefix("cifar"))
    labels = inject([i % classes for i in range(50_000)], mode, float(r), classes, golden["seed"])
    assert labels[:20] == golden["first20"]
    assert sum(label != i % classes for i, label in enumerate(labels)) == golden["changed"]
    assert hashlib.sha256(json.dumps(labels).encode()).hexdigest() == golden["sha256"]


@given(
    st.integers(1, 300),
    st.floats(0, 1),
    st.integers(2, 20),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["sym", "asym"]),
)
def test_exactly_r_n_samples_are_drawn_and_a_seed_gives_one_list(n, r, classes, seed, mode):
    """A rate that is only about right, or noise that changes between runs, makes two results incomparable."""
    labels = [i % classes for i in range(n)]
    noisy = inject(labels, mode, r, classes, seed)
    assert noisy == inject(labels, mode, r, classes, seed)
    assert len(noisy) == n
    assert all(0 <= label < classes for label in noisy)
    # A map that moves every class shows which samples were drawn.
    moved = inject(labels, "asym", r, classes, seed, transition=[(c + 1) % classes for c in range(classes)])
    drawn = {i for i in range(n) if moved[i] != labels[i]}
    assert len(drawn) == int(r * n)
    assert {i for i in range(n) if noisy[i] != labels[i]} <= drawn


def test_asymmetric_map_of_cifar10_is_the_papers():
    """Another map is another experiment."""
    assert asym_transition(10)[0] == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]


def test_asymmetric_map_of_cifar100_is_a_ring_inside_each_superclass():
    """A label that leaves its superclass would make CIFAR-100's asymmetric noise easier than it is meant to be."""
    transition = asym_transition(100)[0]
    assert sorted(transition) == list(range(100))
    for five in CIFAR100_SUPERCLASSES:
        assert list(five) == sorted(five)
        assert [transition[c] for c in five] == [*five[1:], five[0]]


def test_other_sets_go_to_the_next_class():
    """Digits and Fashion-MNIST have 10 classes too, but CIFAR-10's map means nothing for them."""
    assert asym_transition(10, "digits")[0] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert asym_transition(3)[0] == [1, 2, 0]


def test_file_names_tell_rates_apart():
    """With one decimal alone, 0.45 and 0.5 would share a file and silently a noise."""
    assert file_name("cifar10", 0.5, "sym") == "0.5_sym.json"
    assert file_name("cifar100", 1.0, "sym") == "1.0_sym.json"
    assert file_name("cifar10", 0.45, "asym") == "0.45_asym.json"
    assert file_name("digits", 0.2, "sym") == "digits_0.2_sym.json"


def test_a_file_wins_over_the_seed_and_the_run_keeps_its_labels(tmp_path):
    """Two runs that should share their noise but do not; or a continued run whose labels changed under it."""
    data, first, second = (tmp_path / name for name in ("data", "first", "second"))
    for folder in (data, first, second):
        folder.mkdir()
    truth = np.arange(2000) % 10
    made, origin = noisy_labels(truth, spec(seed=1), data, first, begun=False)
    assert "made with seed 1" in origin
    assert (data / "0.5_sym.json").read_text() == (first / "0.5_sym.json").read_text()
    again, origin = noisy_labels(truth, spec(seed=2), data, second, begun=False)
    assert "wins over --noise_seed" in origin
    np.testing.assert_array_equal(made, again)
    (data / "0.5_sym.json").unlink()
    kept, origin = noisy_labels(truth, spec(seed=2), data, first, begun=True)
    assert "own copy" in origin
    np.testing.assert_array_equal(made, kept)


def test_data_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """A data set on a read-only mount is the rule on shared machines: the noise then lives in the run folder."""
    from dividemix import noise

    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    run.mkdir()
    write = noise.write_atomically

    def refuse_data(path, content, exclusive=False):
        if path.parent == data:
            raise PermissionError("read-only")
        write(path, content, exclusive)

    monkeypatch.setattr(noise, "write_atomically", refuse_data)
    _, origin = noisy_labels(np.arange(100) % 10, spec(), data, run, begun=False)
    assert str(run) in origin
    assert [file.name for file in run.iterdir()] == ["0.5_sym.json"]
    assert not list(data.iterdir())


TRUTH = np.arange(1000) % 10
GOOD = inject(TRUTH.tolist(), "sym", 0.5, 10, 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(GOOD[:-1]), "999 labels"),
        (json.dumps([*GOOD[:-1], 10]), "outside 0..9"),
        (json.dumps([*GOOD[:-1], -1]), "outside 0..9"),
        (json.dumps([*GOOD[:-1], 1.0]), "whole numbers"),
        (json.dumps([*GOOD[:-1], True]), "whole numbers"),
        (json.dumps([GOOD]), "flat"),
        (json.dumps({"labels": GOOD}), "flat"),
        (json.dumps(GOOD)[:-5], "complete JSON"),
        ("[" * 30_000, "complete JSON"),
        ("", "complete JSON"),
        ("\xff\xfe", "complete JSON"),
        ("[" + "1," * 40_000 + "1]", "too large"),
        (json.dumps(inject(TRUTH.tolist(), "sym", 0.2, 10, 0)), "another rate"),
        (json.dumps(TRUTH.tolist()), "another rate"),
        (json.dumps(((TRUTH + 1) % 10).tolist()), "another rate"),
    ],
)
def test_files_that_cannot_be_this_noise_are_refused(tmp_path, content, words):
    """Training on the wrong labels gives a plausible wrong number: the worst outcome of all."""
    file = tmp_path / "0.5_sym.json"
    file.write_bytes(content.encode("latin1"))
    with pytest.raises(DivideMixError, match=words) as error:
        read(file, TRUTH, spec())
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_noise_file_is_refused_not_made(tmp_path):
    """A mistyped name would otherwise quietly give other noise than was asked for."""
    with pytest.raises(DivideMixError, match="does not exist"):
        noisy_labels(TRUTH, spec(), None, tmp_path, tmp_path / "mistyped.json", begun=False)


@given(st.floats(0, 1), st.integers(0, 1000), st.sampled_from(["sym", "asym"]), st.sampled_from([20, 200, 5000]))
def test_our_own_noise_is_always_accepted(r, seed, mode, n):
    """A run whose own noise file is refused when it continues would be lost; small sets stray by more than a point."""
    truth = np.arange(n) % 10
    s = spec(mode, r)
    low, high = expected_changed(truth, s)
    changed = np.mean(np.array(inject(truth.tolist(), mode, r, 10, seed)) != truth)
    assert low <= changed <= high


def test_files_that_never_draw_the_true_class_are_accepted():
    """Other groups' 50 % files change a full 50 % of the labels."""
    low, high = expected_changed(np.arange(50_000) % 10, spec())
    assert low <= 0.45 <= 0.5 <= high
    assert low > 0.43
    assert high < 0.515


def test_unknown_mode_is_refused():
    """The authors' script writes a list that is too short and trains on it."""
    with pytest.raises(DivideMixError, match="pairflip"):
        inject([0, 1], "pairflip", 0.5, 2, 0)


def test_labels_of_a_run_that_never_finished_an_epoch_do_not_stick(tmp_path):
    """Ctrl-C in the first epoch, then another --noise_seed: training on the first seed's labels would be a lie."""
    truth = np.arange(200) % 10
    noisy_labels(truth, spec(seed=1), None, tmp_path, begun=False)
    labels, origin = noisy_labels(truth, spec(seed=2), None, tmp_path, begun=False)
    assert "seed 2" in origin
    assert labels.tolist() == inject(truth.tolist(), "sym", 0.5, 10, 2)


def test_two_runs_that_start_together_share_one_noise(tmp_path, monkeypatch):
    """A sweep over seeds on fresh data: each run would train on its own noise, and the last one's file would stay."""
    from dividemix import noise

    data, first, second = (tmp_path / name for name in ("data", "first", "second"))
    for folder in (data, first, second):
        folder.mkdir()
    truth = np.arange(500) % 10
    inject_for_one = noise.inject

    def inject_while_another_run_is_quicker(*args):
        monkeypatch.setattr(noise, "inject", inject_for_one)
        noisy_labels(truth, spec(seed=1), data, first, begun=False)
        return inject_for_one(*args)

    monkeypatch.setattr(noise, "inject", inject_while_another_run_is_quicker)
    labels, origin = noisy_labels(truth, spec(seed=2), data, second, begun=False)
    assert "another run" in origin
    assert json.loads((data / "0.5_sym.json").read_text()) == labels.tolist()
    assert json.loads((second / "0.5_sym.json").read_text()) == json.loads((first / "0.5_sym.json").read_text())
    assert sorted(file.name for file in data.iterdir()) == ["0.5_sym.json"]
