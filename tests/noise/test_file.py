"""The noise file: where a run's labels come from, and files that cannot be this noise are refused."""

import json

import numpy as np
import pytest
from helpers.data import make_human
from hypothesis import given
from hypothesis import strategies as st

from dividemix import DivideMixError, noise
from dividemix.noise import file as noise_file
from dividemix.noise import synthetic
from dividemix.noise.file import NoiseSpec, expected_changed, noisy_labels, read
from dividemix.noise.synthetic import asym_transition, inject


def spec(mode="sym", r=0.5, num_class=10, dataset="cifar10", seed=123, **more):
    return NoiseSpec(dataset, mode, r, seed, num_class, asym_transition(num_class, dataset)[0], **more)


def test_file_names_tell_rates_apart():
    """With one decimal alone, 0.45 and 0.5 would share a file and silently a noise."""
    assert spec().file_name == "0.5_sym.json"
    assert spec(r=1.0, dataset="cifar100").file_name == "1.0_sym.json"
    assert spec("asym", 0.45).file_name == "0.45_asym.json"
    assert spec(r=0.2, dataset="digits").file_name == "digits_0.2_sym.json"
    assert spec(definition="exclude_self").file_name == "0.5_sym_exclude_self.json"
    assert spec("idn", 0.4, dataset="digits").file_name == "digits_0.4_idn.json"
    assert spec("human", None, key="worse_label").file_name == "worse_label.json"


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
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    run.mkdir()
    write = noise_file.write_atomically

    def refuse_data(path, content, exclusive=False):
        if path.parent == data:
            raise PermissionError("read-only")
        write(path, content, exclusive)

    monkeypatch.setattr(noise_file, "write_atomically", refuse_data)
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
        ("[" + "1," * 40_000 + "1]", "40001 labels"),
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


KINDS = [("sym", "with_self"), ("sym", "exclude_self"), ("asym", "with_self"), ("idn", "with_self")]


@given(st.floats(0, 1), st.integers(0, 1000), st.sampled_from(KINDS), st.sampled_from([20, 200, 5000]))
def test_our_own_noise_is_always_accepted(tmp_path_factory, r, seed, kind, n):
    """A run whose own noise file is refused when it continues would be lost; small sets stray by more than a point."""
    truth = np.arange(n) % 10
    s = spec(kind[0], r, seed=seed, definition=kind[1])
    low, high = expected_changed(truth, s)
    images = np.random.default_rng(0).integers(0, 256, (n, 2, 2, 3), dtype=np.uint8)
    made, _ = noisy_labels(truth, s, None, tmp_path_factory.getbasetemp(), begun=False, images=images)
    changed = np.mean(made != truth)
    assert low <= changed <= high


@pytest.mark.parametrize("definition", noise.DEFINITIONS)
def test_a_file_of_the_other_definition_is_refused(tmp_path, definition):
    """50 % noise is 45 % or 50 % wrong labels: the two numbers cannot be compared. with_self accepts files that never
    draw the true class, as other groups call theirs by the same name."""
    truth = np.arange(20_000) % 10
    (tmp_path / "noise.json").write_text(json.dumps(inject(truth.tolist(), "sym", 0.5, 10, 0, None, "with_self")))
    asked = spec(definition=definition)
    if definition == "with_self":
        assert len(read(tmp_path / "noise.json", truth, asked)) == 20_000
    else:
        with pytest.raises(DivideMixError, match=r"--noise_definition exclude_self should change 49\.0% to 51\.0%"):
            read(tmp_path / "noise.json", truth, asked)


def test_instance_dependent_noise_is_made_saved_and_read_again(tmp_path):
    """Else a run that continues learns from other labels, or two runs that should share them do not."""
    data, first, second = (tmp_path / name for name in ("data", "first", "second"))
    for folder in (data, first, second):
        folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (500, 4, 4, 3), dtype=np.uint8)
    truth, asked = np.arange(500) % 10, spec("idn", 0.3, dataset="digits")
    made, origin = noisy_labels(truth, asked, data, first, begun=False, images=images)
    np.testing.assert_array_equal(made, synthetic.inject_instance_dependent(images, truth, 0.3, 10, 123))
    assert f"saved as {data / 'digits_0.3_idn.json'}" in origin
    for run, begun, said in ((second, False, "wins over --noise_seed"), (first, True, "own copy")):
        other = spec("idn", 0.3, dataset="digits", seed=9)
        again, origin = noisy_labels(truth, other, data, run, begun=begun, images=images)
        np.testing.assert_array_equal(again, made)
        assert said in origin


# ---- Human labels ----


@pytest.fixture
def human(tmp_path):
    """(what noisy_labels needs, the data folder, the labels that people gave) of 100 images."""
    data, run = tmp_path / "data" / "cifar-10-batches-py", tmp_path / "run"
    data.mkdir(parents=True)
    run.mkdir()
    truth = np.arange(100) % 10
    given = np.where(truth == 3, 5, truth)
    return (truth, spec("human", None, key="worse_label"), data, run), data, given


def test_human_labels_come_from_the_file_beside_the_data(human, tmp_path):
    """Else --noise_file must be typed each time, or an older copy wins over the one that is named."""
    asked, data, given = human
    with pytest.raises(DivideMixError, match=r"CIFAR-10_human\.pt is not in .* get it from https://github"):
        noisy_labels(*asked, begun=False)
    truth = asked[0]
    for place in (data.parent, data):
        file = make_human(place / "CIFAR-10_human.pt", {"clean_label": truth, "worse_label": given})
        labels, origin = noisy_labels(*asked, begun=False)
        np.testing.assert_array_equal(labels, given)
        assert origin == f"read from {file}"
    other = make_human(tmp_path / "other.pt", {"clean_label": truth, "worse_label": truth})
    np.testing.assert_array_equal(noisy_labels(*asked, other, begun=False)[0], truth)
    with pytest.raises(DivideMixError, match="does not exist"):
        noisy_labels(*asked, tmp_path / "mistyped.pt", begun=False)


def test_a_run_on_human_labels_keeps_a_copy(human):
    """A run that is continued where the published file is not would be lost; and one that goes on with other labels
    belongs to no file. Its copy must not be overwritten by them."""
    asked, data, given = human
    truth, _, _, run = asked
    file = make_human(data / "CIFAR-10_human.pt", {"clean_label": truth, "worse_label": given})
    noisy_labels(*asked, begun=False)
    copy = (run / "worse_label.json").read_bytes()
    assert json.loads(copy) == given.tolist()
    file.unlink()
    labels, origin = noisy_labels(*asked, begun=True)
    np.testing.assert_array_equal(labels, given)
    assert "own copy" in origin
    make_human(file, {"clean_label": truth, "worse_label": truth})
    with pytest.raises(DivideMixError, match=r"are not those that .* began with"):
        noisy_labels(*asked, begun=True)
    assert (run / "worse_label.json").read_bytes() == copy


def test_a_set_without_published_human_labels_needs_a_file(tmp_path):
    """Else the message sends its user to a file that does not exist."""
    with pytest.raises(DivideMixError, match="digits has no published file, name one with --noise_file"):
        noisy_labels(TRUTH, spec("human", None, dataset="digits", key="worse_label"), None, tmp_path, begun=False)


def test_wrong_share_is_what_a_recipe_is_looked_up_by(human):
    """Noise that the paper has keeps its row; of other noise, r does not say what it says there."""
    asked, data, given = human
    truth, human_spec, _, run = asked
    make_human(data / "CIFAR-10_human.pt", {"clean_label": truth, "worse_label": given})
    places = data, run, None
    assert noise_file.wrong_share(truth, human_spec, *places) == 0.1
    assert noise_file.wrong_share(truth, spec("idn", 0.4), *places) == pytest.approx(0.4, abs=1e-4)
    assert noise_file.wrong_share(truth, spec(definition="exclude_self"), *places) == 0.5
    assert (
        noise_file.wrong_share(truth, spec(), *places) is noise_file.wrong_share(truth, spec("asym"), *places) is None
    )


def test_files_that_never_draw_the_true_class_are_accepted():
    """Other groups' 50 % files change a full 50 % of the labels."""
    low, high = expected_changed(np.arange(50_000) % 10, spec())
    assert low <= 0.45 <= 0.5 <= high
    assert low > 0.43
    assert high < 0.515


def test_labels_of_a_run_that_never_finished_an_epoch_do_not_stick(tmp_path):
    """Ctrl-C in the first epoch, then another --noise_seed: training on the first seed's labels would be a lie."""
    truth = np.arange(200) % 10
    noisy_labels(truth, spec(seed=1), None, tmp_path, begun=False)
    labels, origin = noisy_labels(truth, spec(seed=2), None, tmp_path, begun=False)
    assert "seed 2" in origin
    assert labels.tolist() == inject(truth.tolist(), "sym", 0.5, 10, 2)


def test_two_runs_that_start_together_share_one_noise(tmp_path, monkeypatch):
    """A sweep over seeds on fresh data: each run would train on its own noise, and the last one's file would stay."""
    data, first, second = (tmp_path / name for name in ("data", "first", "second"))
    for folder in (data, first, second):
        folder.mkdir()
    truth = np.arange(500) % 10
    inject_for_one = synthetic.inject

    def inject_while_another_run_is_quicker(*args):
        monkeypatch.setattr(synthetic, "inject", inject_for_one)
        noisy_labels(truth, spec(seed=1), data, first, begun=False)
        return inject_for_one(*args)

    monkeypatch.setattr(synthetic, "inject", inject_while_another_run_is_quicker)
    labels, origin = noisy_labels(truth, spec(seed=2), data, second, begun=False)
    assert "another run" in origin
    assert json.loads((data / "0.5_sym.json").read_text()) == labels.tolist()
    assert json.loads((second / "0.5_sym.json").read_text()) == json.loads((first / "0.5_sym.json").read_text())
    assert sorted(file.name for file in data.iterdir()) == ["0.5_sym.json"]
