"""Train_cifar.py: its data sets and noise, cross-entropy, selection, and --ablation in whole runs. What it shares with
the other scripts is in test_scripts.py, what follows from its flags in run/test_defaults.py."""

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
from helpers.runs import assert_same_run, last_state, read_records, without_times
from helpers.scripts import assert_co_divided, end_of, note_co_division, note_phases, tiny

import dataloader_cifar
import Train_cifar
from dividemix import DivideMixError, engine, files, noise
from dividemix.codivide import clean_probability
from dividemix.data.device import DeviceImages
from dividemix.deploy import ensemble as deploy
from dividemix.deploy import export
from dividemix.noise import synthetic
from dividemix.report import issues as label_issues
from dividemix.report import report
from dividemix.run.description import read_description
from dividemix.run.folder import read_run
from dividemix.seeds import draws

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


def train(out_dir: Path, *flags: str) -> tuple[dict, Path, dict]:
    """A run of one epoch. -> its final metrics, its folder, and its labels"""
    final = Train_cifar.main(tiny(out_dir, "--num_epochs", "1", *flags))
    folder = Path(final["run_dir"])
    return final, folder, dict(np.load(folder / "labels.npz", allow_pickle=False))


def given_labels(folder: Path, labels: dict, name: str) -> list[int]:
    """The run's copy of its noise file, of which it trains on some."""
    given = json.loads((folder / name).read_text())
    assert labels["list_given"].tolist() == given
    assert labels["given"].tolist() == [given[i] for i in labels["index"]]
    return given


# ---- Data sets and noise ----


@pytest.mark.parametrize(
    ("dataset", "make", "mode", "paper"),
    [
        ("cifar10", make_cifar10, "asym", "93.4 / 92.1"),
        ("cifar100", make_cifar100, "sym", None),
        ("fashionmnist", make_fashionmnist, "sym", None),
    ],
)
def test_every_data_set_in_its_published_format(tmp_path, phases, capsys, dataset, make, mode, paper):
    """Else a data set is read wrong, has another row's settings, or shares its noise with another data set."""
    batches = make(tmp_path / "data", 64, 20)
    flags = ["--dataset", dataset, "--data_path", str(tmp_path / "data"), "--limit_train", "64"]
    final, folder, labels = train(tmp_path / "out", *flags, "--r", "0.4", "--noise_mode", mode)
    out, data = capsys.readouterr().out, dataloader_cifar.load(dataset, tmp_path / "data")
    assert f"{dataset}: 64 training, 20 test images, {data.num_class} classes\n" in out
    last = next(line for line in out.splitlines() if line.startswith("best "))
    assert (f"paper: {paper} (but this run: " in last and "not the official" in last) if paper else "paper" not in last
    assert final.get("paper_best") == (93.4 if paper else None)
    assert {call["mixmatch"].conf_penalty for call in phases} == {mode == "asym"}

    name = f"0.4_{mode}.json" if dataset.startswith("cifar") else f"{dataset}_0.4_{mode}.json"
    given = given_labels(folder, labels, name)
    transition, _ = noise.asym_transition(data.num_class, dataset)
    assert given == noise.inject(data.train_labels.tolist(), mode, 0.4, data.num_class, 123, transition)
    beside = (tmp_path / "data" if dataset == "fashionmnist" else batches) / name
    assert json.loads(beside.read_text()) == given
    assert labels["true"].tolist() == data.train_labels[labels["index"]].tolist()


def test_the_noise_is_what_the_flags_say(tmp_path, phases):
    """Else runs over several seeds do not share their labels, 50 % noise is 45 % wrong labels unasked, or noise that
    depends on the images is made without them. What a noise file decides is in noise/test_file.py."""
    digits = dataloader_cifar.load("digits", "")
    truth = digits.train_labels.tolist()
    idn = synthetic.inject_instance_dependent(digits.train_images, digits.train_labels, 0.4, 10, 123)
    exclude_self = noise.inject(truth, "sym", 0.5, 10, 123, definition="exclude_self")
    for flags, name, expected in (
        ("--noise_seed 7", "digits_0.5_sym", noise.inject(truth, "sym", 0.5, 10, 7)),
        ("--noise_mode idn --r 0.4", "digits_0.4_idn", idn.tolist()),
        ("--noise_definition exclude_self", "digits_0.5_sym_exclude_self", exclude_self),
    ):
        _, folder, labels = train(tmp_path / name, *flags.split())
        assert given_labels(folder, labels, f"{name}.json") == expected


def test_human_labels_are_trained_on(tmp_path, phases, capsys):
    """Else a run called CIFAR-10N trains on injected noise, or with the settings or the name of another one."""
    flags = cifar10(tmp_path / "data", "--noise_mode", "human", "--noise_key", "worse_label")
    truth = dataloader_cifar.load("cifar10", tmp_path / "data").train_labels
    worse = np.where(np.arange(40) % 4, truth, (truth + 1) % 10)  # every fourth image is called the next class
    file = make_human(tmp_path / "data" / "CIFAR-10_human.pt", {"clean_label": truth, "worse_label": worse})
    final, folder, labels = train(tmp_path / "out", *flags)
    assert folder.name == "cifar10_worse_label" and "paper_best" not in final
    assert given_labels(folder, labels, "worse_label.json") == worse.tolist()
    assert [call["mixmatch"].conf_penalty for call in phases] == [False] * 2
    out = capsys.readouterr().out
    assert f"noise human worse_label: 25.0% of the training labels are wrong; read from {file}\n" in out
    assert "lambda_u 0 (not in the paper; nearest row by 25.0% wrong labels, " in out
    file.unlink()  # the run has its copy
    assert train(tmp_path / "out", *flags, "--num_epochs", "2")[0]["epoch"] == 1
    with pytest.raises(DivideMixError, match=r"CIFAR-10_human\.pt is not in"):
        train(tmp_path / "out", *flags, "--fresh")
    assert len(read_records(folder)) == 2  # put back


# ---- Method ----


def test_cross_entropy_is_the_baseline_of_the_papers_rows(tmp_path, phases, capsys):
    """Else the baseline has another schedule or name, or the ensemble's number beside the paper's single network."""
    final, folder, _ = train(tmp_path / "out", *cifar10(tmp_path / "data", "--num_epochs", "3", "--method", "ce"))
    assert [call["kind"] for call in phases] == ["warmup"] * 6  # also after --warm_up
    records = read_records(folder)
    assert [(record["phase"], record["auc_net1"], record["labeled_net2"]) for record in records] == [
        ("ce", None, None)
    ] * 3
    assert (final["paper_best"], "paper_last" in final) == (79.4, False)
    out = capsys.readouterr().out
    assert "net 1 alone: best 41.00; " in out and "best 79.4 (but this run: " in out


def test_several_ranks_are_refused(tmp_path, monkeypatch):
    """Under torchrun each rank would train the whole run by itself, all in one folder."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DivideMixError, match=r"Train_cifar\.py .* torchrun"):
        train(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- Subset and validation ----


def test_limit_train_is_a_seeded_subset(tmp_path, phases):
    """Else two runs of one command train on different images, or always on the first N of a sorted data set."""
    flags = ["--limit_train", "100"]
    seeds = ([], ["--id", "again"], ["--seed", "5"])
    first, again, another = (train(tmp_path, *flags, *seed)[2]["index"].tolist() for seed in seeds)
    assert len(set(first)) == 100 and max(first) > 1000 and first == sorted(first)
    assert again == first != another


def test_val_fraction_selects_the_best_epoch_off_the_test_set(tmp_path, phases, monkeypatch):
    """Else 'best' is the peak on the test set, held-out images are trained on, or their clean labels are used."""
    flags = ["--limit_train", "100", "--seed", "5"]
    _, _, subset = train(tmp_path, *flags, "--id", "whole")
    accuracy = iter(zip([30.0, 10.0, 40.0], [50.0, 90.0, 60.0], strict=True))
    held_out = []

    def test(nets, sets, phase):
        held_out[:] = sets["val"].labels.tolist()
        assert (len(sets["val"]), len(sets["test"])) == (25, 347)
        return dict(zip(("val_acc", "test_acc"), next(accuracy), strict=True)) | {"test_acc_net1": 0.0}

    monkeypatch.setattr(Train_cifar, "test", test)
    final, folder, labels = train(tmp_path, *flags, "--val_fraction", "0.25", "--num_epochs", "3")
    assert (final["best_acc"], final["val_acc"], final["test_acc"]) == (60.0, 40.0, 60.0)
    assert torch.load(folder / "best.pt", weights_only=True)["epochs"] == [2, 2]
    rest = np.setdiff1d(subset["index"], labels["index"])
    assert (len(labels["index"]), len(rest)) == (75, 25) and np.isin(labels["index"], subset["index"]).all()
    given, truth = (subset[name][np.isin(subset["index"], rest)].tolist() for name in ("given", "true"))
    assert held_out == given != truth


# ---- Ablations, in whole runs ----


def ablated(out_dir: Path, name: str, *flags: str) -> list[str]:
    return tiny(out_dir, "--limit_train", "64", "--num_epochs", "3", "--ablation", name, *flags)


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
    """A second network, another division, another start than the whole method's, or a flag that does nothing, makes the
    ablation measure nothing. Without co-training the division is the network's own, and so is the peer."""
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
    """Else a reader of the logs finds a second network that never was, or half a label's quality."""
    run = runs[name]
    assert run.records[-1].keys() == {key for key in runs["none"].records[-1] if not key.endswith("2")}
    assert all(record["test_acc"] == record["test_acc_net1"] for record in run.records)
    expected = [f"Numer of labeled samples:{r['labeled_net1']}   AUC:{r['auc_net1']:.3f}" for r in run.records[1:]]
    assert (run.folder / "stats.txt").read_text().splitlines() == expected
    assert '"net2"' not in (run.folder / "histograms.jsonl").read_text()
    [line] = [line for line in run.out if line.startswith("epoch 2/2")]
    assert re.search(r"  labeled \d+  AUC \d\.\d+  ", line) and "net" not in line
    assert any(line.startswith(f"ablation {name}: one network") for line in run.out)
    for file in ("scores/epoch_002.npz", "label_scores.npz"):
        assert not [key for key in np.load(run.folder / file) if key.endswith("_net2")]
    issues, scores = label_issues.find(read_run(run.folder)), np.load(run.folder / "label_scores.npz")
    assert len(issues.p_clean) == 1 and scores["probabilities"].shape == (len(issues), 10)
    np.testing.assert_array_equal(issues.loss, scores["loss_net1"])


def test_what_does_not_go_with_an_ablation_is_refused(runs, tmp_path, capsys):
    """Else half a run is of the method and half is not, or two networks begin as one."""
    with pytest.raises(DivideMixError, match=r"\(--ablation was none, now no_refinement\)"):
        Train_cifar.main(ablated(tmp_path, "no_refinement", "--run_dir", str(runs["none"].folder)))
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
def test_report_and_export_of_one_network(runs, tmp_path, monkeypatch):
    """Else the page has an empty second network, or the exported file means another confidence by its logits."""
    monkeypatch.undo()  # the report
    run = runs["no_cotraining"].folder
    report.main([str(run), "--out", str(tmp_path / "report")])
    page = " ".join(html.unescape((tmp_path / "report" / "report.html").read_text()).split())
    assert "net 2" not in page and "net 1/2" not in page and "two networks" not in page
    assert "AUC, net 1" in page and "net 1, epoch 2" in page
    assert end_of(export, [str(run), str(tmp_path / "model.pt2")], monkeypatch) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    about = json.loads(extra["metadata.json"])
    assert about["networks"]["count"] == 1 and "softmax(logits) " in about["output"]["meaning"]
    x = torch.rand(3, *about["input"]["shape"][1:])
    with torch.no_grad():
        expected = deploy.load_ensemble(run, read_description(run))(x)
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4)


# ---- Beyond the paper ----


def test_strong_views_and_averages_in_a_whole_run(tmp_path, capsys):
    """--ema would train other networks, or be lost where a run continues; or best.pt, the label list and the export
    have the weights that are not said to be there."""
    flags = ["--augment", "strong", "--num_epochs", "3", "--no_label_scores"]
    averaged = tmp_path / "averaged", "--ema", "0.9", *flags
    for folder, *more in (
        (tmp_path / "plain", *flags),
        averaged,
        (tmp_path / "cut", *averaged[1:], "--num_epochs", "2"),
    ):
        Train_cifar.main(tiny(tmp_path, "--run_dir", str(folder), *more))
    Train_cifar.main(tiny(tmp_path, "--run_dir", str(tmp_path / "cut"), *averaged[1:]))
    assert_same_run(tmp_path / "cut", averaged[0])
    out, plain, state = capsys.readouterr().out, last_state(tmp_path / "plain"), last_state(averaged[0])
    assert out.count("augment strong: ") == 4 and out.count("ema 0.9: ") == 3
    assert all(same(a, b) for a, b in zip(plain["nets"], state["nets"], strict=True))
    for record, more in zip(*map(read_records, (tmp_path / "plain", averaged[0])), strict=True):
        assert {name: more[name] for name in without_times(record)} == without_times(record)
        assert {*without_times(more)} - {*record} == {"test_acc_ema", "best_acc_ema", "last10_acc_ema"}
    [weights, steps] = state["averages"]
    assert min(steps) > 0 and not same(weights[0], state["nets"][0])
    ensemble = deploy.load_ensemble(averaged[0], read_description(averaged[0]), "last")
    assert ensemble.averaged and all(same(net.state_dict(), w) for net, w in zip(ensemble.nets, weights, strict=True))
    assert not deploy.load_ensemble(tmp_path / "plain", read_description(tmp_path / "plain")).averaged
    best = torch.load(averaged[0] / "best.pt", weights_only=True)
    records = read_records(averaged[0])
    assert max(records, key=lambda record: record["test_acc_ema"])["epoch"] == best["epochs"][0]
    assert (best["epochs"][0] == 2) == same(best["nets"][0], weights[0])


def test_the_label_list_is_by_the_averaged_weights(tmp_path, capsys):
    """Else the list and the model that is shipped are of two different runs."""
    folder = train(tmp_path, "--ema", "0.5", "--num_epochs", "3", "--loss_window", "3")[1]
    assert "training labels with the averaged weights" in capsys.readouterr().out
    scores, labels = (dict(np.load(folder / f"{name}.npz")) for name in ("label_scores", "labels"))
    ensemble = deploy.load_ensemble(folder, read_description(folder), "last")
    images = dataloader_cifar.load("digits", "").train_images[scores["index"]]
    with torch.no_grad():
        x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - ensemble.mean) / ensemble.std
        logits = ensemble.nets[0](x)
    given = torch.from_numpy(labels["list_given"][scores["index"]])
    expected = torch.nn.functional.cross_entropy(logits, given, reduction="none")
    np.testing.assert_allclose(scores["loss_net1"], expected, rtol=1e-3, atol=1e-4)
    clean = clean_probability(scores["loss_net1"], 3, int(draws(123, "divide", 3).integers(2**32)))
    np.testing.assert_array_equal(scores["p_clean_net1"], clean)  # not with earlier losses, of other weights


def test_strong_views_without_a_mixed_batch_are_refused(tmp_path):
    """A run that is called strong and is not."""
    with pytest.raises(DivideMixError, match="--augment strong"):
        Train_cifar.main(tiny(tmp_path, "--augment", "strong", "--method", "ce"))
