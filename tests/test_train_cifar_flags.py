"""Train_cifar.main in-process: the order of Algorithm 1, and what each flag does."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import make_cifar10, make_cifar100, make_human
from helpers.nets import same
from helpers.runs import assert_equal, last_state, read_records
from helpers.scripts import assert_co_divided, note_co_division, note_phases, tiny

import dataloader_cifar
import PreResNet
import Train_cifar
from dividemix import DivideMixError, codivide, noise
from dividemix.noise import synthetic
from dividemix.report import issues as label_issues
from dividemix.run import options
from dividemix.run.checkpoint import load_last
from dividemix.run.folder import read_run
from dividemix.runtime.device import Runtime
from dividemix.seeds import seeded

pytestmark = pytest.mark.usefixtures("no_figures")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def phases(monkeypatch) -> list[dict]:
    return note_phases(monkeypatch, Train_cifar)


# ---- Algorithm 1 ----


def test_networks_swap_divisions_and_the_peer_is_fresh(tmp_path, monkeypatch):
    """Exchanged divisions make each net confirm its own errors; a stale peer or a division made after net 1 was trained
    is another method. All of these train without any error, and cost accuracy that nobody can explain."""
    events = note_co_division(monkeypatch, Train_cifar)
    Train_cifar.main(tiny(tmp_path, "--num_epochs", "3"))
    assert [event["what"] for event in events] == ["score", "score", "train", "train"] * 2
    for epoch in (events[:4], events[4:]):
        assert_co_divided(*epoch)
    for scored, trained in zip(events[4:6], (events[3], events[2]), strict=True):
        assert same(scored["net"], trained["after"])


def test_the_two_networks_start_differently(tmp_path, phases):
    """Else both networks make the same errors, and co-teaching teaches nothing. Each start depends on the seed."""
    Train_cifar.main(tiny(tmp_path, "--num_epochs", "1"))
    Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--seed", "5"))
    states = [call["state"] for call in phases]
    assert len(states) == 4 and not any(same(states[i], states[k]) for i in range(4) for k in range(i))
    assert same(states[0], seeded(123, 0, lambda: PreResNet.ResNet18(10, 4)).state_dict())


def test_learning_rate_is_a_tenth_from_lr_drop_on(tmp_path, phases):
    """Else the last half of the paper's schedule is missing, or one net has another than the other."""
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "4", "--lr_drop", "2", "--lr", "0.03"))
    assert [call["kind"] for call in phases] == ["warmup"] * 2 + ["train"] * 6
    assert [call["lr"] for call in phases] == pytest.approx([0.03] * 4 + [0.003] * 4)
    records = read_records(final["run_dir"])
    assert [record["lr"] for record in records] == pytest.approx([0.03, 0.03, 0.003, 0.003])


@pytest.mark.parametrize("empty", [1, 2])
def test_a_net_that_finds_nothing_clean(tmp_path, phases, monkeypatch, empty):
    """Its peer warms up for one more epoch, and the next epoch divides anew. Else training stops, trains on nothing or
    on a division of another epoch, or stats.txt has a line that no script reads."""
    divide, times = codivide.Mixture.divide, []

    def nothing_at_first(self, *arguments):
        division, name = divide(self, *arguments), arguments[-1]
        times.append(name)
        return None if name == f"net {empty}" and times.count(name) == 1 else division

    monkeypatch.setattr(codivide.Mixture, "divide", nothing_at_first)
    folder = Train_cifar.main(tiny(tmp_path, "--num_epochs", "3"))["run_dir"]
    kinds = ["train", "warmup"] if empty == 1 else ["warmup", "train"]
    assert [call["kind"] for call in phases] == ["warmup"] * 2 + kinds + ["train"] * 2
    _, once, again = read_records(folder)
    other = 3 - empty
    assert (once["phase"], once[f"labeled_net{empty}"], once[f"auc_net{empty}"]) == ("train", None, None)
    labeled = [int(call["division"].labeled.sum()) for call in phases if call["kind"] == "train"]
    assert labeled == [once[f"labeled_net{other}"], again["labeled_net2"], again["labeled_net1"]]
    assert again["phase"] == "train" and times == ["net 2", "net 1"] * 2
    lines = [(once, other), (again, 2), (again, 1)]
    expected = [f"Numer of labeled samples:{r[f'labeled_net{k}']}   AUC:{r[f'auc_net{k}']:.3f}" for r, k in lines]
    assert Path(folder, "stats.txt").read_text().splitlines() == expected
    assert {name[-4:] for name in np.load(Path(folder, "scores/epoch_002.npz"))} == {"net1", "net2"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 0.7), ("T", 0.3), ("lambda_u", 11), ("warm_up", 0), ("batch_size", 8), ("num_class", 10)],
)
def test_hyper_parameters_reach_the_training(tmp_path, phases, capsys, name, value):
    """Else a flag is accepted, saved and reported, and has no effect."""
    Train_cifar.main(tiny(tmp_path, f"--{name}", str(value)))
    assert {call["kind"] for call in phases} == ({"train"} if name == "warm_up" else {"warmup", "train"})
    assert [getattr(call["mixmatch"], name) for call in phases] == [value] * 4
    assert [call["phase"].epoch for call in phases] == [0, 0, 1, 1]
    assert name != "lambda_u" or "lambda_u 11 (given; cifar10 sym 50% has 25)" in capsys.readouterr().out


def test_several_ranks_are_refused(tmp_path, monkeypatch, capsys):
    """Under torchrun each rank would train the whole run by itself, all in one folder."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DivideMixError, match=r"Train_cifar\.py .* torchrun"):
        Train_cifar.main(tiny(tmp_path / "out"))
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


# ---- Method and noise ----


def test_cross_entropy_is_the_baseline_of_the_papers_rows(tmp_path, phases, capsys):
    """Else the comparison that shows what the method brings is with another schedule, other names, or the ensemble's
    number beside the paper's single network."""
    make_cifar10(tmp_path / "data", 40, 20)
    flags = ["--dataset", "cifar10", "--data_path", f"{tmp_path}/data", "--limit_train", "40", "--num_epochs", "3"]
    final = Train_cifar.main(tiny(tmp_path / "out", *flags, "--method", "ce"))
    assert {call["kind"] for call in phases} == {"warmup"} and len(phases) == 6  # also after --warm_up
    assert final["run_dir"] == str(tmp_path / "out" / "cifar10_0.5_sym_ce")
    records = read_records(final["run_dir"])
    assert [record["phase"] for record in records] == ["ce"] * 3
    assert all(record["auc_net1"] is None and record["labeled_net2"] is None for record in records)
    assert not Path(final["run_dir"], "stats.txt").read_text()
    assert (final["paper_best"], "paper_last" in final) == (79.4, False)
    out = capsys.readouterr().out
    best = max(record["test_acc_net1"] for record in records)
    assert f"; net 1 alone: best {best:.2f}; paper's cross-entropy, one net: best 79.4 (but this run: " in out
    assert "lambda_u" not in out  # it has none


@pytest.mark.parametrize(
    ("flags", "penalised"),
    [
        (["--noise_mode", "sym"], False),
        (["--noise_mode", "asym"], True),
        (["--noise_mode", "sym", "--conf_penalty", "on"], True),
        (["--noise_mode", "asym", "--conf_penalty", "off"], False),
        (["--noise_mode", "idn"], False),
        (["--noise_mode", "idn", "--conf_penalty", "on"], True),
        (["--noise_mode", "asym", "--method", "ce"], False),
        (["--noise_mode", "asym", "--method", "ce", "--conf_penalty", "on"], True),
    ],
)
def test_confidence_penalty_in_warm_up(tmp_path, phases, flags, penalised):
    """Without it the nets fit asymmetric noise within the warm-up; with it under symmetric noise, or in the plain
    cross-entropy baseline, it is not the paper's method."""
    Train_cifar.main(tiny(tmp_path, *flags, "--num_epochs", "1"))
    assert [call["mixmatch"].conf_penalty for call in phases] == [penalised] * 2


def test_the_asymmetric_map_is_printed(tmp_path, phases, capsys):
    """Else two codes' 'asym 40 %' are compared although they confuse other classes."""
    make_cifar10(tmp_path / "ten", 64, 10)
    make_cifar100(tmp_path / "hundred", 64, 10)
    for dataset, folder, expected in (
        ("cifar10", "ten", "truck->automobile, bird->airplane, deer->horse, cat<->dog (the paper's map)"),
        ("cifar100", "hundred", "ring inside each CIFAR-100 superclass, fine labels ascending"),
        ("digits", "", "class c -> c+1, last -> first"),
    ):
        flags = ["--dataset", dataset, "--data_path", str(tmp_path / folder), "--noise_mode", "asym", "--r", "0.4"]
        final = Train_cifar.main(tiny(tmp_path / "out", *flags, "--num_epochs", "1"))
        assert f"asymmetric map: {expected}\n" in capsys.readouterr().out
        assert final["run_dir"].endswith(f"{dataset}_0.4_asym")


def test_noise_seed_and_noise_file_decide_the_labels(tmp_path, phases, capsys):
    """Else runs over several seeds do not share the labels, or a shared noise file is not the one that is used."""
    truth = dataloader_cifar.load("digits", "").train_labels.tolist()
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--noise_seed", "7"))
    given = json.loads(Path(final["run_dir"], "digits_0.5_sym.json").read_text())
    assert given == noise.inject(truth, "sym", 0.5, 10, 7)
    (tmp_path / "shared.json").write_text(json.dumps(given))
    final = Train_cifar.main(
        tiny(tmp_path, "--num_epochs", "1", "--id", "b", "--noise_file", f"{tmp_path}/shared.json")
    )
    labels = np.load(Path(final["run_dir"], "labels.npz"))
    assert labels["given"].tolist() == [given[i] for i in labels["index"]]
    out = capsys.readouterr().out
    assert f"read from {tmp_path}/shared.json" in out
    changed = float((labels["given"] != labels["true"]).mean())
    assert f"noise sym 0.5: {changed:.1%} of the training labels are wrong" in out


def test_instance_dependent_noise_depends_on_the_images(tmp_path, phases, capsys):
    """Else it is made without the images, or of other samples' images, and nobody can see it."""
    digits = dataloader_cifar.load("digits", "")
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--noise_mode", "idn", "--r", "0.4"))
    given = json.loads(Path(final["run_dir"], "digits_0.4_idn.json").read_text())
    expected = synthetic.inject_instance_dependent(digits.train_images, digits.train_labels, 0.4, 10, 123)
    assert given == expected.tolist()
    labels = np.load(Path(final["run_dir"], "labels.npz"))
    assert labels["given"].tolist() == [given[i] for i in labels["index"]]
    out = capsys.readouterr().out
    assert "noise idn 0.4: " in out and "made with seed 123" in out
    assert "lambda_u 25 (not in the paper; nearest row by 40.0% wrong labels, Table 7: cifar10 sym 50%)" in out


def test_the_definition_of_symmetric_noise(tmp_path, phases, capsys):
    """Else 50 % noise is 45 % wrong labels although the other definition was asked for; the two share a noise file or a
    run folder; or the paper's number is set beside noise that is not the paper's."""
    truth = dataloader_cifar.load("digits", "").train_labels.tolist()
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--noise_definition", "exclude_self"))
    folder = Path(final["run_dir"])
    assert folder.name == "digits_0.5_sym"
    given = json.loads((folder / "digits_0.5_sym_exclude_self.json").read_text())
    assert given == noise.inject(truth, "sym", 0.5, 10, 123, definition="exclude_self")
    out = capsys.readouterr().out
    assert "noise sym 0.5 exclude_self: " in out and "nearest row by 50.0% wrong labels" in out
    with pytest.raises(DivideMixError, match="--noise_definition was exclude_self, now with_self"):
        Train_cifar.main(tiny(tmp_path, "--num_epochs", "1"))
    make_cifar10(tmp_path / "data", 40, 20)
    flags = ["--dataset", "cifar10", "--data_path", f"{tmp_path}/data", "--limit_train", "40", "--num_epochs", "1"]
    Train_cifar.main(tiny(tmp_path / "one", *flags))
    final = Train_cifar.main(tiny(tmp_path / "two", *flags, "--noise_definition", "exclude_self"))
    assert "paper_best" not in final
    beside = {path.name for path in (tmp_path / "data" / "cifar-10-batches-py").glob("*.json")}
    assert beside == {"0.5_sym.json", "0.5_sym_exclude_self.json"}


def human_data(folder: Path, n: int = 40) -> tuple[list[str], np.ndarray, Path]:
    """A set in CIFAR's format with labels from people: every fourth image is called the next class. -> (flags, the
    labels, the file)"""
    batches = make_cifar10(folder, n, 20)
    truth = dataloader_cifar.load("cifar10", folder).train_labels
    given = np.where(np.arange(n) % 4, truth, (truth + 1) % 10)
    file = make_human(batches.parent / "CIFAR-10_human.pt", {"clean_label": truth, "worse_label": given})
    flags = ["--dataset", "cifar10", "--data_path", str(folder), "--limit_train", str(n), "--num_epochs", "1"]
    return [*flags, "--noise_mode", "human", "--noise_key", "worse_label"], given, file


def test_human_labels_are_trained_on(tmp_path, phases, capsys):
    """Else a run called CIFAR-10N trains on injected noise, with the penalty of asymmetric noise or the settings of
    another rate, or under a name that another noise has."""
    flags, given, file = human_data(tmp_path / "data")
    final = Train_cifar.main(tiny(tmp_path / "out", *flags))
    folder = Path(final["run_dir"])
    assert folder.name == "cifar10_worse_label" and "paper_best" not in final
    np.testing.assert_array_equal(np.load(folder / "labels.npz")["given"], given)
    assert json.loads((folder / "worse_label.json").read_text()) == given.tolist()
    assert [call["mixmatch"].conf_penalty for call in phases] == [False] * 2
    out = capsys.readouterr().out
    assert f"noise human worse_label: 25.0% of the training labels are wrong; read from {file}\n" in out
    assert "lambda_u 0 (not in the paper; nearest row by 25.0% wrong labels, Table 7: cifar10 sym 20%)" in out
    arguments = json.loads((folder / "args.json").read_text())["args"]
    assert (arguments["r"], arguments["noise_key"], arguments["noise_definition"]) == (None, "worse_label", None)

    other = Train_cifar.main(tiny(tmp_path / "out", *flags, "--seed", "5", "--method", "ce", "--id", "a"))
    assert Path(other["run_dir"]).name == "cifar10_worse_label_ce_seed5_a"
    file.unlink()  # the run has its copy
    longer = Train_cifar.main(tiny(tmp_path / "out", *flags, "--num_epochs", "2"))
    assert longer["epoch"] == 1
    with pytest.raises(DivideMixError, match=r"CIFAR-10_human\.pt is not in"):
        Train_cifar.main(tiny(tmp_path / "out", *flags, "--fresh"))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2  # put back


def test_human_labels_of_other_images_are_refused(tmp_path, phases):
    """Else labels are given to other images than people saw, and nothing is left to tell that they were."""
    flags, given, file = human_data(tmp_path / "data")
    make_human(file, {"clean_label": given, "worse_label": given})
    with pytest.raises(DivideMixError, match="clean_label is not the data set's label for 10 of 40 samples"):
        Train_cifar.main(tiny(tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists() and not phases


def test_the_transition_matrix_is_of_the_samples_that_are_trained_on(tmp_path, phases, capsys):
    """Else it is of all samples while the run has a part of them, or the realised rate is said of others."""
    flags = ["--noise_mode", "asym", "--r", "1", "--num_epochs", "1", "--val_fraction", "0.25"]
    final = Train_cifar.main(tiny(tmp_path, *flags, "--limit_train", "200"))
    assert "100.0% of the training labels are wrong" in capsys.readouterr().out
    table = label_issues.transition_table(read_run(Path(final["run_dir"])))
    assert table["true_class"].tolist() == [str(c) for c in range(10)] and table["samples"].sum() == 150
    assert all(row[f"count_{(c + 1) % 10}"] == row["samples"] for c, row in table.iterrows())


# ---- Subset, validation, initial weights ----


def test_limit_train_is_a_seeded_subset(tmp_path, phases):
    """Else two runs of one command train on different images, or always on the first N of a sorted data set."""

    def index(*flags: str) -> np.ndarray:
        final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--limit_train", "100", *flags))
        return np.load(Path(final["run_dir"], "labels.npz"))["index"]

    first = index()
    assert len(set(first)) == 100 and first.max() > 1000 and (np.diff(first) > 0).all()
    np.testing.assert_array_equal(index("--id", "again"), first)
    assert not np.array_equal(index("--seed", "5"), first)


def test_val_fraction_selects_the_best_epoch_off_the_test_set(tmp_path, phases, monkeypatch, capsys):
    """Else 'best' is the peak on the test set although the user asked for an honest selection, the held-out images are
    trained on, or their clean labels are used."""
    flags = ["--limit_train", "100", "--num_epochs", "3", "--seed", "5"]
    subset = np.load(Path(Train_cifar.main(tiny(tmp_path, *flags, "--id", "whole"))["run_dir"], "labels.npz"))
    accuracy = iter(zip([30.0, 10.0, 40.0], [50.0, 90.0, 60.0], strict=True))
    held_out = []

    def test(nets, sets, phase):
        held_out[:] = sets["val"].labels.tolist()
        assert (len(sets["val"]), len(sets["test"])) == (25, 347)
        return dict(zip(("val_acc", "test_acc"), next(accuracy), strict=True)) | {"test_acc_net1": 0.0}

    monkeypatch.setattr(Train_cifar, "test", test)
    final = Train_cifar.main(tiny(tmp_path, *flags, "--val_fraction", "0.25"))
    assert (final["best_acc"], final["val_acc"], final["test_acc"]) == (60.0, 40.0, 60.0)
    assert torch.load(Path(final["run_dir"], "best.pt"), weights_only=True)["epochs"] == [2, 2]
    out = capsys.readouterr().out
    assert "best 60.00 (epoch 2)" in out and "digits: 75 training" in out and "25 held out" in out
    trained = np.load(Path(final["run_dir"], "labels.npz"))["index"]
    rest = np.setdiff1d(subset["index"], trained)
    assert (len(trained), len(rest)) == (75, 25) and np.isin(trained, subset["index"]).all()
    given, truth = (subset[name][np.isin(subset["index"], rest)].tolist() for name in ("given", "true"))
    assert held_out == given != truth


def test_init_from_starts_both_networks_from_a_checkpoint(tmp_path, phases):
    """Else a run that claims pretrained weights starts from random ones, or has two copies of one network."""
    first = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--seed", "5"))
    for file in ("best.pt", "epoch-000.pt"):
        phases.clear()
        source = Path(first["run_dir"], file)
        Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--id", file, "--init_from", str(source)))
        nets = torch.load(source, weights_only=True)["nets"]
        assert same(phases[0]["state"], nets[0]) and same(phases[1]["state"], nets[1]) and not same(*nets)


# ---- The run folder ----


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "digits_0.5_sym"),
        (["--r", "0.80", "--noise_mode", "asym"], "digits_0.8_asym"),
        (["--r", "0.45", "--seed", "123", "--id", "try-2"], "digits_0.45_sym_try-2"),
        (["--noise_mode", "idn", "--r", "0.4"], "digits_0.4_idn"),
        (["--method", "ce", "--seed", "7", "--id", "a"], "digits_0.5_sym_ce_seed7_a"),
        (["--run_dir", "elsewhere/run", "--id", "a"], "../elsewhere/run"),
    ],
)
def test_name_of_the_run_folder(tmp_path, monkeypatch, phases, flags, name):
    """Else two different runs share a folder, or the documented paths do not exist."""
    monkeypatch.chdir(tmp_path)
    final = Train_cifar.main(tiny("out", *flags, "--num_epochs", "1"))
    folder = (tmp_path / "out" / name).resolve()
    assert Path(final["run_dir"]).resolve() == folder and (folder / "metrics.jsonl").exists()
    assert {path.name for path in tmp_path.iterdir()} == {Path(final["run_dir"]).parts[0]}  # and nothing elsewhere


def test_the_same_command_again_continues_and_then_is_finished(tmp_path, capsys):
    """Else a second start trains the whole run again, or a run that was continued is not the one that would have
    been trained in one go."""
    whole = Train_cifar.main(tiny(tmp_path, "--num_epochs", "3", "--id", "whole"))
    short = Train_cifar.main(tiny(tmp_path, "--num_epochs", "2"))
    folder = Path(short["run_dir"])
    before = load_last(folder)
    capsys.readouterr()

    again = Train_cifar.main(tiny(tmp_path, "--num_epochs", "2"))
    out = capsys.readouterr().out
    assert again == short and f"{folder} is finished (2 epochs)" in out and "\nepoch " not in out
    assert same(load_last(folder)["nets"][0], before["nets"][0])

    longer = Train_cifar.main(tiny(tmp_path, "--num_epochs", "3"))
    out = capsys.readouterr().out
    assert f"continuing {folder} with epoch 2 (of 0..2)" in out
    assert re.findall(r"^epoch (\d)/2", out, re.MULTILINE) == ["2"]
    untimed = {key for key in whole if not key.startswith("seconds_")} - {"run_dir"}
    assert {key: longer[key] for key in untimed} == {key: whole[key] for key in untimed}
    for mine, other in zip(load_last(folder)["nets"], load_last(Path(whole["run_dir"]))["nets"], strict=True):
        assert same(mine, other)
    assert (folder / "acc.txt").read_text() == Path(whole["run_dir"], "acc.txt").read_text()


def test_another_setting_in_the_same_folder_is_refused(tmp_path, phases):
    """Else half a run is trained with one learning rate and half with another, under one name."""
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1"))
    before = bytes_of(Path(final["run_dir"]))
    with pytest.raises(DivideMixError) as caught:
        Train_cifar.main(tiny(tmp_path, "--num_epochs", "2", "--lr", "0.05", "--T", "0.4", "--width", "5"))
    message = str(caught.value)
    assert "(--T was 0.5, now 0.4, --lr was 0.02, now 0.05, --width was 4, now 5)" in message
    assert final["run_dir"] in message and "--id" in message and "--fresh" in message
    assert bytes_of(Path(final["run_dir"])) == before and len(phases) == 2


def test_fresh_moves_the_old_run_aside_whole(tmp_path, phases, capsys):
    """Else --fresh deletes a run of days, or goes on with its checkpoint or its noise."""
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "2"))
    folder = Path(final["run_dir"])
    before = bytes_of(folder)
    Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--fresh", "--lr", "0.05", "--noise_seed", "9"))
    aside = [path for path in tmp_path.iterdir() if path != folder]
    assert len(aside) == 1 and aside[0].name.startswith(f"{folder.name}.")
    assert bytes_of(aside[0]) == before
    assert f"{folder} moved to {aside[0]}" in capsys.readouterr().out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert (folder / "digits_0.5_sym.json").read_bytes() != before["digits_0.5_sym.json"]


def test_main_returns_the_final_metrics(tmp_path, phases):
    """Else scripts that call main, as reproduce.py does, tabulate something else than the log says."""
    make_cifar10(tmp_path / "data", 40, 20)
    flags = ["--dataset", "cifar10", "--data_path", f"{tmp_path}/data", "--limit_train", "40"]
    final = Train_cifar.main(tiny(tmp_path / "out", *flags, "--r", "0.2"))
    assert (final.pop("paper_best"), final.pop("paper_last")) == (96.1, 95.7)
    last = read_records(final["run_dir"])[-1]
    folder = Path(final.pop("run_dir"))
    assert final == last and last["epoch"] == 1
    whole = final | {"run_dir": str(folder), "paper_best": 96.1, "paper_last": 95.7}
    assert json.loads((folder / "result.json").read_text()) == whole
    assert "paper_best" not in Train_cifar.main(tiny(tmp_path / "out"))  # digits: no row of the paper


def test_the_papers_number_stands_alone_only_beside_the_papers_setting():
    """A short run of a narrow net beside "94.6" without a word: its user looks for a mistake that is not there."""
    records = [{"best_acc": 94.0, "last10_acc": 93.0}]
    for flags, official, expected in (
        ([], True, "; paper: 94.6 / 94.4"),
        (["--width", "16"], True, "; paper: 94.6 / 94.4 (but this run: --width 16 (paper: 64))"),
        (["--lambda_u", "0"], True, "; paper: 94.6 / 94.4 (but this run: --lambda_u 0 (paper: 25))"),
        ([], False, "; paper: 94.6 / 94.4 (but this run: not the official cifar10)"),
    ):
        args = Train_cifar.parse_args(flags)
        options.resolve_recipe(args)
        line, paper = options.compare_with_paper(args, records, 3, official)
        assert line == f"best 94.00 (epoch 3), mean of the last 10 93.00{expected}"
        assert paper == {"paper_best": 94.6, "paper_last": 94.4}


def test_mixtures_fitted_in_the_background_are_those_fitted_in_place(tmp_path, monkeypatch):
    """On a card net 1's mixture is fitted while net 1 already trains: a draw or a loss that it shares with the training
    would make the run another one, and another one each time."""
    states = []
    for name in ("in place", "background"):
        Train_cifar.main(tiny(tmp_path / name, "--num_epochs", "3"))
        states.append(last_state(tmp_path / name / "digits_0.5_sym"))
        monkeypatch.setattr(Runtime, "background", lambda self, work, *args: self._worker.submit(work, *args).result)
    assert_equal(*states)
