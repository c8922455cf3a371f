"""Train_cifar.py: its data sets and noise, cross-entropy, selection, the run folder's name, and --ablation in whole
runs. What it shares with the other scripts is in test_scripts.py."""

import contextlib
import html
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.data import make_cifar10, make_cifar100, make_fashionmnist, make_human
from helpers.nets import ABLATED, ALONE, same
from helpers.runs import assert_equal, assert_same_run, last_state, read_records
from helpers.scripts import assert_co_divided, end_of, note_co_division, note_phases, tiny

import dataloader_cifar
import Train_cifar
from dividemix import DivideMixError, engine, files, noise
from dividemix.data.device import DeviceImages
from dividemix.deploy import ensemble as deploy
from dividemix.deploy import export
from dividemix.noise import synthetic
from dividemix.report import issues as label_issues
from dividemix.report import report
from dividemix.run import options
from dividemix.run.description import read_description
from dividemix.run.folder import read_run
from dividemix.runtime.device import Runtime

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def phases(monkeypatch) -> list[dict]:
    """The phases of a run that neither trains nor tests."""

    def test(nets, sets, phase):
        accuracy = {f"{name}_acc": 50.0 for name in sets}
        return accuracy | {f"{name}_net{k}": 40.0 + k for name in accuracy for k in range(1, len(nets) + 1)}

    monkeypatch.setattr(Train_cifar, "test", test)
    return note_phases(monkeypatch, Train_cifar)


def cifar10(folder: Path, *flags: str) -> list[str]:
    """Flags for a tiny set in CIFAR-10's format."""
    make_cifar10(folder, 40, 20)
    return ["--dataset", "cifar10", "--data_path", str(folder), "--limit_train", "40", "--num_epochs", "1", *flags]


def given_labels(final: dict, name: str) -> list[int]:
    """The run's copy of its noise file, of which it trains on some."""
    folder = Path(final["run_dir"])
    given, labels = json.loads((folder / name).read_text()), np.load(folder / "labels.npz")
    assert labels["given"].tolist() == [given[i] for i in labels["index"]]
    return given


# ---- Data sets and noise ----


@pytest.mark.parametrize(
    ("dataset", "make", "mode", "lambda_u", "paper"),
    [
        ("cifar10", make_cifar10, "asym", "0 (paper, Table 7: cifar10 asym 40%)", "93.4 / 92.1"),
        ("cifar100", make_cifar100, "sym", "150 (not in the paper; nearest row, Table 7: cifar100 sym 50%)", None),
        (
            "fashionmnist",
            make_fashionmnist,
            "sym",
            "25 (not in the paper; nearest row, Table 7: cifar10 sym 50%)",
            None,
        ),
    ],
)
def test_every_data_set_in_its_published_format(tmp_path, phases, capsys, dataset, make, mode, lambda_u, paper):
    """Else a data set is read wrong, the settings are another row's, runs that should share their noise do not, or a
    data folder that holds several data sets mixes up their noise."""
    batches = make(tmp_path / "data", 64, 20)
    flags = ["--dataset", dataset, "--data_path", str(tmp_path / "data"), "--limit_train", "64", "--r", "0.4"]
    final = Train_cifar.main(tiny(tmp_path / "out", *flags, "--noise_mode", mode, "--num_epochs", "1"))
    out, data = capsys.readouterr().out, dataloader_cifar.load(dataset, tmp_path / "data")
    assert f"{dataset}: 64 training, 20 test images, {data.num_class} classes\n" in out
    assert f"lambda_u {lambda_u}\n" in out
    last = next(line for line in out.splitlines() if line.startswith("best "))
    assert (f"paper: {paper} (but this run: " in last and "not the official" in last) if paper else "paper" not in last
    assert final.get("paper_best") == (93.4 if paper else None)
    assert ("asymmetric map: truck->automobile" in out) == (mode == "asym")
    assert {call["mixmatch"].conf_penalty for call in phases} == {mode == "asym"}
    assert final["run_dir"] == str(tmp_path / "out" / f"{dataset}_0.4_{mode}")

    name = f"0.4_{mode}.json" if dataset.startswith("cifar") else f"{dataset}_0.4_{mode}.json"
    given = given_labels(final, name)
    transition, _ = noise.asym_transition(data.num_class, dataset)
    assert given == noise.inject(data.train_labels.tolist(), mode, 0.4, data.num_class, 123, transition)
    beside = (tmp_path / "data" if dataset == "fashionmnist" else batches) / name
    assert json.loads(beside.read_text()) == given
    labels = np.load(Path(final["run_dir"], "labels.npz"), allow_pickle=False)
    assert sorted(labels) == ["given", "index", "list_given", "true"] and labels["list_given"].tolist() == given
    assert labels["true"].tolist() == data.train_labels[labels["index"]].tolist()


def test_noise_seed_and_noise_file_decide_the_labels(tmp_path, phases, capsys):
    """Else runs over several seeds do not share the labels, or a shared noise file is not the one that is used."""
    truth = dataloader_cifar.load("digits", "").train_labels.tolist()
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--noise_seed", "7"))
    given = given_labels(final, "digits_0.5_sym.json")
    assert given == noise.inject(truth, "sym", 0.5, 10, 7)
    shared = tmp_path / "shared.json"
    shared.write_text(json.dumps(given))
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--id", "b", "--noise_file", str(shared)))
    assert given_labels(final, "digits_0.5_sym.json") == given
    labels = np.load(Path(final["run_dir"], "labels.npz"))
    wrong = float((labels["given"] != labels["true"]).mean())  # of the samples that are trained on
    assert f"noise sym 0.5: {wrong:.1%} of the training labels are wrong; read from {shared}" in capsys.readouterr().out


def test_instance_dependent_noise_depends_on_the_images(tmp_path, phases, capsys):
    """Else it is made without the images, or of other samples' images, and nobody can see it."""
    digits = dataloader_cifar.load("digits", "")
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--noise_mode", "idn", "--r", "0.4"))
    expected = synthetic.inject_instance_dependent(digits.train_images, digits.train_labels, 0.4, 10, 123)
    assert given_labels(final, "digits_0.4_idn.json") == expected.tolist()
    assert "lambda_u 25 (not in the paper; nearest row by 40.0% wrong labels, " in capsys.readouterr().out


def test_the_definition_of_symmetric_noise(tmp_path, phases):
    """Else 50 % noise is 45 % wrong labels although the other definition was asked for; the two share a noise file or a
    run folder; or the paper's number is set beside noise that is not the paper's."""
    flags = cifar10(tmp_path / "data")
    truth = dataloader_cifar.load("cifar10", tmp_path / "data").train_labels.tolist()
    final = Train_cifar.main(tiny(tmp_path, *flags, "--noise_definition", "exclude_self"))
    given = given_labels(final, "0.5_sym_exclude_self.json")
    assert given == noise.inject(truth, "sym", 0.5, 10, 123, definition="exclude_self")
    assert "paper_best" not in final
    with pytest.raises(DivideMixError, match="--noise_definition was exclude_self, now with_self"):
        Train_cifar.main(tiny(tmp_path, *flags))
    assert Train_cifar.main(tiny(tmp_path / "two", *flags))["paper_best"] == 94.6
    beside = {path.name for path in (tmp_path / "data" / "cifar-10-batches-py").glob("*.json")}
    assert beside == {"0.5_sym.json", "0.5_sym_exclude_self.json"}


def test_human_labels_are_trained_on(tmp_path, phases, capsys):
    """Else a run called CIFAR-10N trains on injected noise, with the penalty of asymmetric noise or the settings of
    another rate, or under a name that another noise has."""
    flags = [*cifar10(tmp_path / "data"), "--noise_mode", "human", "--noise_key", "worse_label"]
    truth = dataloader_cifar.load("cifar10", tmp_path / "data").train_labels
    labels = np.where(np.arange(40) % 4, truth, (truth + 1) % 10)  # every fourth image is called the next class
    file = make_human(tmp_path / "data" / "CIFAR-10_human.pt", {"clean_label": truth, "worse_label": labels})
    final = Train_cifar.main(tiny(tmp_path / "out", *flags))
    folder = Path(final["run_dir"])
    assert folder.name == "cifar10_worse_label" and "paper_best" not in final
    assert given_labels(final, "worse_label.json") == labels.tolist()
    assert [call["mixmatch"].conf_penalty for call in phases] == [False] * 2
    out = capsys.readouterr().out
    assert f"noise human worse_label: 25.0% of the training labels are wrong; read from {file}\n" in out
    assert "lambda_u 0 (not in the paper; nearest row by 25.0% wrong labels, " in out
    arguments = json.loads((folder / "args.json").read_text())["args"]
    assert (arguments["r"], arguments["noise_key"], arguments["noise_definition"]) == (None, "worse_label", None)

    file.unlink()  # the run has its copy
    assert Train_cifar.main(tiny(tmp_path / "out", *flags, "--num_epochs", "2"))["epoch"] == 1
    with pytest.raises(DivideMixError, match=r"CIFAR-10_human\.pt is not in"):
        Train_cifar.main(tiny(tmp_path / "out", *flags, "--fresh"))
    assert len(read_records(folder)) == 2  # put back


# ---- Method ----


def test_cross_entropy_is_the_baseline_of_the_papers_rows(tmp_path, phases, capsys):
    """Else the comparison that shows what the method brings is with another schedule, other names, or the ensemble's
    number beside the paper's single network."""
    flags = cifar10(tmp_path / "data", "--num_epochs", "3", "--method", "ce")
    final = Train_cifar.main(tiny(tmp_path / "out", *flags))
    assert [call["kind"] for call in phases] == ["warmup"] * 6  # also after --warm_up
    assert final["run_dir"] == str(tmp_path / "out" / "cifar10_0.5_sym_ce")
    records = read_records(final["run_dir"])
    assert [record["phase"] for record in records] == ["ce"] * 3
    assert all(record["auc_net1"] is None and record["labeled_net2"] is None for record in records)
    assert not Path(final["run_dir"], "stats.txt").read_text()
    assert (final["paper_best"], "paper_last" in final) == (79.4, False)
    out = capsys.readouterr().out
    best = max(record["test_acc_net1"] for record in records)
    assert f"net 1 alone: best {best:.2f}; " in out and "best 79.4 (but this run: " in out
    assert "lambda_u" not in out  # it has none


def test_confidence_penalty_in_warm_up():
    """Without it the nets fit asymmetric noise within the warm-up; with it under symmetric noise, or in the plain
    cross-entropy baseline, it is not the paper's method."""
    for flags, penalised in (
        (["--noise_mode", "sym"], False),
        (["--noise_mode", "asym"], True),
        (["--noise_mode", "sym", "--conf_penalty", "on"], True),
        (["--noise_mode", "asym", "--conf_penalty", "off"], False),
        (["--noise_mode", "idn"], False),
        (["--noise_mode", "asym", "--method", "ce"], False),
        (["--noise_mode", "asym", "--method", "ce", "--conf_penalty", "on"], True),
    ):
        assert options.uses_conf_penalty(Train_cifar.parse_args(flags)) == penalised, flags


def test_several_ranks_are_refused(tmp_path, monkeypatch):
    """Under torchrun each rank would train the whole run by itself, all in one folder."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DivideMixError, match=r"Train_cifar\.py .* torchrun"):
        Train_cifar.main(tiny(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_mixtures_fitted_in_the_background_are_those_fitted_in_place(tmp_path, monkeypatch):
    """On a card net 1's mixture is fitted while net 1 already trains: a draw or a loss that it shares with the training
    would make the run another one, and another one each time."""
    states = []
    for name in ("in place", "background"):
        Train_cifar.main(tiny(tmp_path / name))
        states.append(last_state(tmp_path / name / "digits_0.5_sym"))
        monkeypatch.setattr(Runtime, "background", lambda self, work, *args: self._worker.submit(work, *args).result)
    assert_equal(*states)


# ---- Subset and validation ----


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


# ---- The run folder ----


def test_name_of_the_run_folder():
    """Else two different runs share a folder, or the documented paths do not exist."""
    for flags, name in (
        ([], "out/digits_0.5_sym"),
        (["--r", "0.80", "--noise_mode", "asym"], "out/digits_0.8_asym"),
        (["--r", "0.45", "--seed", "123", "--id", "try-2"], "out/digits_0.45_sym_try-2"),
        (["--noise_mode", "idn", "--r", "0.4"], "out/digits_0.4_idn"),
        (["--method", "ce", "--seed", "7", "--id", "a"], "out/digits_0.5_sym_ce_seed7_a"),
        (["--ablation", "one_view"], "out/digits_0.5_sym_one_view"),
        (["--run_dir", "elsewhere/run", "--id", "a"], "elsewhere/run"),
    ):
        args = Train_cifar.parse_args(tiny(Path("out"), *flags))
        assert options.resolve_small_images(args, np.zeros(1000, np.int64), 10, None).folder == Path(name), flags


def test_fresh_moves_the_old_run_aside_whole(tmp_path, phases, capsys):
    """Else --fresh deletes a run of days, or goes on with its checkpoint or its noise."""
    folder = Path(Train_cifar.main(tiny(tmp_path, "--num_epochs", "2"))["run_dir"])
    before = bytes_of(folder)
    Train_cifar.main(tiny(tmp_path, "--num_epochs", "1", "--fresh", "--lr", "0.05", "--noise_seed", "9"))
    [aside] = [path for path in tmp_path.iterdir() if path != folder]
    assert aside.name.startswith(f"{folder.name}.") and bytes_of(aside) == before
    assert f"{folder} moved to {aside}" in capsys.readouterr().out
    assert len(read_records(folder)) == 1
    assert (folder / "digits_0.5_sym.json").read_bytes() != before["digits_0.5_sym.json"]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_papers_number_stands_alone_only_beside_the_papers_setting():
    """A short run of a narrow net beside "94.6" without a word, or one network without co-training: its user looks for
    a mistake that is not there."""
    divide_mixmatch = ["--ablation", "divide_mixmatch"]
    for flags, official, results, expected in (
        ([], True, [94.6, 94.4], "; paper: 94.6 / 94.4"),
        (["--width", "16"], True, [94.6, 94.4], "94.4 (but this run: --width 16 (paper: 64))"),
        (["--lambda_u", "0"], False, [94.6, 94.4], "(paper: 25), not the official cifar10)"),
        ([*divide_mixmatch, "--r", "0.2"], True, [94.1], "Divide and MixMatch (Table 5): best 94.1"),
        ([*divide_mixmatch, "--dataset", "cifar100"], True, [], "mean of the last 10 93.00"),  # none with a source
    ):
        args = Train_cifar.parse_args(flags)
        options.resolve_recipe(args)
        line, paper = options.compare_with_paper(args, [{"best_acc": 94.0, "last10_acc": 93.0}], 3, official)
        assert line.startswith("best 94.00 (epoch 3), mean of the last 10 93.00") and line.endswith(expected)
        assert [*paper.values()] == results


# ---- Ablations, in whole runs ----

EPOCHS = 3  # one of warm-up


def ablated(out_dir: Path, name: str, *flags: str) -> list[str]:
    return tiny(out_dir, "--limit_train", "64", "--num_epochs", str(EPOCHS), "--ablation", name, *flags)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """A run of each ablation, one warm-up epoch and two divided ones, and what happened in it."""
    finished, out_dir = {}, tmp_path_factory.mktemp("runs")
    for name in ABLATED:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(report, "draw", lambda *_: [])
            events = note_co_division(patch, Train_cifar)
            final = Train_cifar.main(ablated(out_dir, name))
        folder = Path(final["run_dir"])
        run = {"final": final, "folder": folder, "records": read_records(folder), "out": out.getvalue().splitlines()}
        finished[name] = SimpleNamespace(**run, events=events)
    return finished


@pytest.mark.parametrize("name", ABLATED)
def test_who_trains_on_whose_division_with_which_peer(runs, name):
    """Without co-training the division is the network's own, and so is the peer; with it all stays as in Algorithm 1.
    A second network, another division, another start than the whole method's, or a flag that does nothing, makes the
    ablation measure nothing."""
    run, (count, refine, views) = runs[name], ABLATED[name]
    epoch = ["score"] * count + ["train"] * count + ["test"]
    assert [event["what"] for event in run.events] == ["test", *epoch, *epoch]
    for begin in (1, 1 + len(epoch)):
        *scored_and_trained, _ = run.events[begin : begin + len(epoch)]
        if count == 2:
            assert_co_divided(*scored_and_trained)
        else:
            scored, trained = scored_and_trained
            assert same(trained["net"], scored["net"]) and same(trained["peer"], scored["net"])
            np.testing.assert_allclose(trained["loss"], scored["loss"], rtol=1e-5, atol=1e-6)
        mixmatch = scored_and_trained[-1]["mixmatch"]
        assert (mixmatch.refine, mixmatch.views) == (refine, views)
    assert same(run.events[0]["nets"][0], runs["none"].events[0]["nets"][0])  # after warm-up
    nets, of_whole_method = (last_state(folder)["nets"] for folder in (run.folder, runs["none"].folder))
    assert len(nets) == count and same(nets[0], of_whole_method[0]) == (name == "none")


@pytest.mark.parametrize("name", ALONE)
def test_logs_of_one_network(runs, name):
    """Else a reader of the logs finds a second network that never was, every tool that reads them stops, or the quality
    of a label is half of what the network says."""
    run = runs[name]
    assert run.records[-1].keys() == {key for key in runs["none"].records[-1] if not key.endswith("2")}
    assert all(record["test_acc"] == record["test_acc_net1"] for record in run.records)
    assert [record["labeled_net1"] is None for record in run.records] == [True, False, False]
    stats = (run.folder / "stats.txt").read_text().splitlines()
    expected = [f"Numer of labeled samples:{r['labeled_net1']}   AUC:{r['auc_net1']:.3f}" for r in run.records[1:]]
    assert stats == expected
    lines = (run.folder / "histograms.jsonl").read_text().splitlines()
    assert [json.loads(line).keys() for line in lines] == [{"epoch", "net1"}] * 2
    assert all(key.endswith("_net1") for key in np.load(run.folder / "scores/epoch_002.npz"))
    best = torch.load(run.folder / "best.pt", weights_only=True)
    accuracy = [record["test_acc"] for record in run.records]
    assert len(best["nets"]) == 1 and best["epochs"] == [accuracy.index(max(accuracy))]
    [line] = [line for line in run.out if line.startswith("epoch 2/2")]
    assert re.search(r"labeled \d+ unlabeled \d+ \| AUC \d\.\d+ \|", line) and "net" not in line
    assert any(line.startswith(f"ablation {name}: one network") for line in run.out)

    scores = dict(np.load(run.folder / "label_scores.npz"))
    assert "p_clean_net2" not in scores and "loss_net2" not in scores
    issues = label_issues.find(read_run(run.folder))
    np.testing.assert_array_equal(issues.quality, scores["p_clean_net1"])
    np.testing.assert_array_equal(issues.loss, scores["loss_net1"])
    label_issues.write(issues, run.folder)
    head, first, *_ = (run.folder / "label_issues.csv").read_text().splitlines()
    row = dict(zip(head.split(","), first.split(","), strict=True))
    assert float(row["p_clean_net1"]) == float(row["label_quality"]) and row["p_clean_net2"] == ""


@pytest.mark.parametrize(
    "name", ["no_cotraining", *(pytest.param(name, marks=pytest.mark.slow) for name in [*ABLATED][2:])]
)
def test_an_interrupted_ablation_is_an_uninterrupted_one(tmp_path, name):
    """Else a run of one network cannot be continued, or ends as another."""
    flags = ["--ablation", name, "--save_scores", "--r", "0.9"]  # averages losses over epochs
    Train_cifar.main(tiny(tmp_path, *flags, "--run_dir", f"{tmp_path}/straight", "--num_epochs", "3"))
    for epochs in ("2", "3"):
        Train_cifar.main(tiny(tmp_path, *flags, "--run_dir", f"{tmp_path}/stopped", "--num_epochs", epochs))
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def test_what_does_not_go_with_an_ablation_is_refused(runs, tmp_path, capsys):
    """Else half a run has a part of the method and half has not, a cross-entropy run goes by an ablation's name, or two
    networks begin as one."""
    for name in ("no_refinement", "no_cotraining"):
        with pytest.raises(DivideMixError, match=rf"\(--ablation was none, now {name}\)"):
            Train_cifar.main(ablated(tmp_path, name, "--run_dir", str(runs["none"].folder)))
    with pytest.raises(SystemExit) as ended:
        Train_cifar.parse_args(["--method", "ce", "--ablation", "no_refinement"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "--ablation no_refinement" in error
    best = runs["no_cotraining"].folder / "best.pt"
    with pytest.raises(DivideMixError, match=r"--init_from .*best\.pt: .* 2 networks"):
        Train_cifar.main(ablated(tmp_path, "none", "--init_from", str(best)))


@pytest.mark.parametrize("name", ["none", "no_cotraining"])
def test_one_network_may_start_from_one_or_the_first_of_two(runs, tmp_path, phases, name):
    """Else an ablation cannot begin with what the whole method has learned in its warm-up."""
    file = runs[name].folder / "best.pt"
    Train_cifar.main(ablated(tmp_path, "no_cotraining", "--num_epochs", "1", "--init_from", str(file)))
    assert [same(call["state"], files.load_file(file)["nets"][0]) for call in phases] == [True]


def test_the_ensemble_of_one_network_is_the_network_that_was_tested(runs, tmp_path):
    """Else a user of the run gets another classifier than the tested one, or half its confidence."""
    run = runs["divide_mixmatch"]
    description = read_description(run.folder)
    assert description.count == 1 and str(description).startswith("one preresnet18")
    ensemble = deploy.load_ensemble(run.folder, description)
    data = dataloader_cifar.load("digits", "")
    images = DeviceImages(data.test_images, data.test_labels, data.mean, data.std, data.flip)
    best = dict.fromkeys(("test_acc", "test_acc_net1"), run.final["best_acc"])
    assert engine.test([*ensemble.nets], {"test": images}) == pytest.approx(best, abs=0.5 * 100 / len(images))
    (tmp_path / "best.pt").write_bytes((runs["none"].folder / "best.pt").read_bytes())  # of two networks
    with pytest.raises(DivideMixError, match=r"best\.pt does not fit these networks"):
        deploy.load_ensemble(tmp_path, description)


@pytest.mark.slow
def test_blind_recipe_works_with_one_network(tmp_path):
    """It estimates the noise from both divisions; there may be one."""
    final = Train_cifar.main(ablated(tmp_path, "no_cotraining", "--recipe", "blind"))
    assert None not in (final["noise_rate_estimate"], final["lambda_u"], final["concentration"])


@pytest.mark.slow
def test_report_and_export_of_one_network(runs, tmp_path, monkeypatch, capsys):
    """Else the page has an empty second network, ablations cannot be compared with the whole method, or the exported
    file says of its logits what would make another confidence of them."""
    monkeypatch.undo()  # the report
    run = runs["no_cotraining"].folder
    report.main([str(run), "--out", str(tmp_path / "report")])
    page = " ".join(html.unescape((tmp_path / "report" / "report.html").read_text()).split())
    assert "net 2" not in page and "net 1/2" not in page and "two networks" not in page
    assert "AUC, net 1" in page and "net 1, epoch 2" in page
    capsys.readouterr()
    report.main([*(str(runs[name].folder) for name in ("none", *ALONE)), "--out", str(tmp_path)])
    table = capsys.readouterr().out
    for name in ALONE:
        [line] = [line for line in table.splitlines() if line.startswith(runs[name].folder.name)]
        assert f" {runs[name].final['auc_net1']:.3f} " in line

    assert end_of(export, [str(run), str(tmp_path / "model.pt2")], monkeypatch) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    about = json.loads(extra["metadata.json"])
    assert about["networks"]["count"] == 1 and "softmax(logits) " in about["output"]["meaning"]
    x = torch.rand(3, *about["input"]["shape"][1:])
    with torch.no_grad():
        expected = deploy.load_ensemble(run, read_description(run))(x)
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4)
