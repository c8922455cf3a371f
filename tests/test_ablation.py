"""--ablation: each switches off what it names, and nothing else, from the step to the run's report."""

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import graph_emulator
import numpy as np
import pytest
import torch
from conftest import ROOT, end_of, half, read_records, same, snapshot, tiny
from PIL import Image
from test_engine import Linear, NoSync, softmax, train_arguments
from test_resume import assert_same_run
from test_torchrun import torchrun

import dataloader_cifar
import Train_cifar
from dividemix import (
    DivideMixError,
    checkpoint,
    deploy,
    engine,
    export,
    graph,
    label_issues,
    networks,
    options,
    predict,
    recipes,
    report,
)
from dividemix.codivide import normalise
from dividemix.data import DeviceImages
from dividemix.filelist import Boundary
from dividemix.runfolder import read_run
from dividemix.runtime import Runtime
from PreResNet import ResNet18

CPU = torch.device("cpu")

# What each is to switch off, typed from the README and not from recipes.py: networks, refinement, views.
ASKED = {
    "none": (2, True, 2),
    "no_cotraining": (1, True, 2),
    "no_refinement": (2, False, 2),
    "one_view": (2, True, 1),
    "divide_mixmatch": (1, False, 2),
}
ALONE = ("no_cotraining", "divide_mixmatch")  # those with one network
# The paper's Table 5 (CIFAR-10, best; sym 20, 50, 80, 90 %, asym 40 %), typed from memory and not from recipes.py
TABLE5 = {
    "no_cotraining": (95.0, 94.0, 92.6, 74.3, 91.9),
    "no_refinement": (96.0, 94.6, 93.0, 73.7, 87.7),
    "one_view": (95.3, 94.1, 92.2, 73.9, 89.5),
    "divide_mixmatch": (94.1, 92.8, 89.7, 70.1, 86.5),
}
ONE_NET_TEST = (95.2, 94.2, 93.0, 75.5, 92.7)
CIFAR10 = [row for row in recipes.ROWS if row.dataset == "cifar10"]


# ---- The paper's numbers ----


def test_the_recipes_are_the_papers_table():
    """Else an ablation is compared with a number that nobody published, or with the whole method's."""
    assert [(row.mode, row.r) for row in CIFAR10] == [
        ("sym", 0.2),
        ("sym", 0.5),
        ("sym", 0.8),
        ("sym", 0.9),
        ("asym", 0.4),
    ]
    assert recipes.ABLATIONS.keys() == ASKED.keys() == {"none", *TABLE5}
    for name, best in TABLE5.items():
        assert [recipes.paper_results(row, ablation=name) for row in CIFAR10] == [{"best": value} for value in best]
    assert tuple(map(recipes.ONE_NET_TEST.paper_best, CIFAR10)) == ONE_NET_TEST
    for row in recipes.ROWS:
        assert recipes.paper_results(row) == {"best": row.best, "last": row.last}
        assert recipes.paper_results(row, "ce") == {"best": row.ce_best}
        assert row.dataset == "cifar10" or recipes.paper_results(row, ablation="one_view") == {}  # Table 5 lacks it


def test_the_readme_says_the_same():
    """Else the table that people compare with is another than the program's."""
    text = (ROOT / "README.md").read_text().split("### Ablations")[1].split("\n## ")[0]
    for name, best in [*TABLE5.items(), ("none", [row.best for row in CIFAR10]), ("", ONE_NET_TEST)]:
        found = recipes.ABLATIONS[name] if name else recipes.ONE_NET_TEST
        shown = f"| `--ablation {name}` |" if name in TABLE5 else f"| {found.paper_name} |"
        [line] = [line for line in text.splitlines() if shown in line]
        assert line.endswith(f"| {' | '.join(map(str, best))} |"), line
        assert found.paper_name in line


# ---- One step ----


def ablated(name: str, peer):
    """The arguments of `mixmatch_step` and `train_epoch` for an ablation: (peer, keyword arguments)."""
    found = recipes.ABLATIONS[name]
    return (peer if found.nets == 2 else None), {"refine": found.refine, "M": found.M}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("unlabeled_rows", [5, 0])
def test_a_step_leaves_out_what_is_named_and_no_more(monkeypatch, name, unlabeled_rows):
    """The inputs and targets that are mixed, and all forwards with their modes, against the equations in numpy. An
    ablation that leaves out more, or less, measures another part of the method than its name says."""
    nets, refine, M = ASKED[name]
    rng = np.random.default_rng(3)
    B, C, D, T, lambda_u = 4, 3, 12, 0.5, 2.0
    x = rng.standard_normal((2, B, 3, 2, 2))
    u = rng.standard_normal((2, unlabeled_rows, 3, 2, 2))
    if M == 1:
        x[1], u[1] = np.nan, np.nan  # whoever looks at the second view gets nothing else
    labels, w = rng.integers(0, C, B), np.array([0.0, 0.3, 0.9, 1.0])
    torch.manual_seed(1)
    net, other = Linear(D, C), Linear(D, C)
    weights = [[p.detach().numpy().copy() for p in each.layer.parameters()] for each in (net, other)]

    def sharp(p):
        return p ** (1 / T) / (p ** (1 / T)).sum(axis=1, keepdims=True)

    def said(k, views):  # what net or peer predicts: the mean over the views
        weight, bias = weights[k]
        return np.mean([softmax(view.reshape(len(view), D) @ weight.T + bias) for view in views[:M]], axis=0)

    one_hot = np.eye(C)[labels]
    targets_x = sharp(w[:, None] * one_hot + (1 - w[:, None]) * said(0, x)) if refine else one_hot
    guess = (said(0, u) + said(1, u)) / 2 if nets == 2 else said(0, u)
    targets_u = sharp(guess) if unlabeled_rows else np.empty((0, C))
    inputs, targets = np.concatenate([*x[:M], *u[:M]]), np.concatenate([targets_x] * M + [targets_u] * M)

    seen = {}
    mixup = engine.mixup
    monkeypatch.setattr(engine, "mixup", lambda *args: seen.update(args=args) or mixup(*args))
    peer, how = ablated(name, other)
    index = torch.from_numpy(rng.permutation(len(inputs)))
    batch = map(torch.from_numpy, (x[0], x[1], labels, w, u[0], u[1]))
    terms = engine.mixmatch_step(
        net, peer, torch.optim.SGD(net.parameters(), 0.1), *batch,
        lam=0.7, index=index, T=T, lambda_u=lambda_u, num_class=C, **how,
    )  # fmt: skip
    np.testing.assert_allclose(seen["args"][0], inputs, rtol=1e-12)
    np.testing.assert_allclose(seen["args"][1], targets, rtol=1e-9)

    mixed, mixed_targets = (0.7 * each + 0.3 * each[index.numpy()] for each in (inputs, targets))
    weight, bias = weights[0]
    p = softmax(mixed.reshape(len(mixed), D) @ weight.T + bias)
    Lx = -(mixed_targets[: M * B] * np.log(p[: M * B])).sum(axis=1).mean()
    Lu = ((p[M * B :] - mixed_targets[M * B :]) ** 2).mean() if unlabeled_rows else 0.0
    penalty = (1 / C * np.log(1 / C / p.mean(axis=0))).sum()  # on in all of them
    np.testing.assert_allclose([float(t) for t in terms], [Lx + lambda_u * Lu + penalty, Lx, Lu, penalty], rtol=1e-9)

    guessing = [*u[:M], *x[:M]] if unlabeled_rows else [*x[:M]]
    assert [call[:2] for call in net.calls] == [(True, False)] * len(guessing) + [(True, True)]
    for (_, _, images), expected in zip(net.calls, [*guessing, mixed], strict=True):
        np.testing.assert_allclose(images, expected, rtol=1e-12)
    consulted = M if nets == 2 and unlabeled_rows else 0
    assert [call[:2] for call in other.calls] == [(False, False)] * consulted


@pytest.mark.parametrize("name", ASKED)
def test_no_host_sync_in_a_step(tiny_images, name):
    """Else an ablation cannot be captured, and runs at a tenth of the speed of what it is compared with."""
    machine = Runtime(CPU, "bf16", merge=True, small_convs=True)
    net, other = (machine.prepare(ResNet18(3, width=4)) for _ in range(2))
    peer, how = ablated(name, other)
    optimizer = machine.optimizer(net, 0.1, 5e-4)
    batch, *_ = tiny_images.mixmatch_batches(half(24), 4, np.random.default_rng(0))
    with NoSync():
        engine.mixmatch_step(
            net, peer, optimizer, *tiny_images.mixmatch_views(*batch), lam=torch.tensor(0.7),
            index=torch.arange(8 * how["M"]), T=0.5, lambda_u=torch.tensor(2.0), num_class=3, forward=machine.forward,
            **how,
        )  # fmt: skip


# ---- One phase ----


def test_all_draw_alike(monkeypatch, tiny_images):
    """Else a difference from the whole method is other images, crops or lam, too; and with one view the partners in
    mixup are of rows that are not there, or of some rows never."""
    seen: dict[str, list] = {name: [] for name in ASKED}

    def spy(net, peer, optimizer, *batch, lam, index, lambda_u, **_):
        seen[name].append([*batch, lam, lambda_u])
        assert sorted(index.tolist()) == list(range(ASKED[name][2] * (len(batch[0]) + len(batch[4]))))
        return engine.StepTerms(*torch.zeros(4))

    monkeypatch.setattr(engine, "mixmatch_step", spy)
    net = ResNet18(3, width=4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for name in ASKED:
        peer, how = ablated(name, net)
        engine.train_epoch(net, peer, optimizer, tiny_images, half(24, 13), **train_arguments(**how))
    assert len(seen["none"]) == 4
    for name in ASKED:
        for mine, whole in zip(seen[name], seen["none"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, whole, strict=True))


@pytest.mark.parametrize("name", TABLE5)
@pytest.mark.parametrize("labeled", [1, 23, 24])
def test_phases_survive_the_smallest_sets(tiny_images, labeled, name):
    """One labeled sample, one unlabeled, none: an epoch that crashes there loses the run."""
    net, other = ResNet18(3, width=4), ResNet18(3, width=4)
    peer, how = ablated(name, other)
    optimizer = Runtime(CPU).optimizer(net, 0.02, 5e-4)
    terms = engine.train_epoch(net, peer, optimizer, tiny_images, half(24, labeled), **train_arguments(**how))
    assert np.isfinite(terms).all()
    assert (terms.unlabeled == 0) == (labeled == 24)


@pytest.mark.parametrize(("precision", "merge"), [("bf16", True), pytest.param("fp32", False, marks=pytest.mark.slow)])
def test_replayed_steps_equal_eager_ones(monkeypatch, tiny_images, precision, merge):
    """On a card every full batch is a replay. A graph of two views that is replayed for one, or of one ablation for
    another on the same networks, trains another method without an error."""
    monkeypatch.setattr(graph, "capture", graph_emulator.capture)
    states = []
    for on in (False, True):
        machine = Runtime(CPU, precision, merge=merge, graph=on)
        torch.manual_seed(0)
        net, other = (machine.prepare(ResNet18(3, width=4)) for _ in range(2))
        optimizer, terms = machine.optimizer(net, 0.02, 5e-4), []
        for name in ASKED:
            peer, how = ablated(name, other)
            how = train_arguments(machine=machine, **how)
            terms.append(engine.train_epoch(net, peer, optimizer, tiny_images, half(24, 13), **how))
        assert len(machine.steps) == (len(ASKED) if on else 0)
        assert all(isinstance(step, graph.CapturedStep) for step in machine.steps.values())
        states.append((snapshot(net), terms))
    assert same(states[0][0], states[1][0]) and states[0][1] == states[1][1]
    assert len(set(states[0][1])) == len(ASKED)  # and they do differ


@pytest.mark.parametrize("name", TABLE5)
def test_merged_guesses_are_those_of_single_forwards(tiny_images, name):
    """On a card guesses go through a network together: with one view, or none of a peer's, other batches than usual."""
    terms = []
    for merge in (False, True):
        machine = Runtime(CPU, merge=merge)
        torch.manual_seed(0)
        net, other = (machine.prepare(ResNet18(3, width=4)) for _ in range(2))
        peer, how = ablated(name, other)
        how = train_arguments(machine=machine, **how)
        terms.append(
            engine.train_epoch(net, peer, machine.optimizer(net, 0.02, 5e-4), tiny_images, half(24, 13), **how)
        )
    np.testing.assert_allclose(terms[0], terms[1], rtol=1e-4)


# ---- Whole runs ----

EPOCHS = 3


def flags(out_dir: Path, name: str, *more: str) -> list[str]:
    return tiny(out_dir, "--limit_train", "64", "--num_epochs", str(EPOCHS), "--ablation", name, *more)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of each ablation, one warm-up epoch and two divided ones, and what happened in it."""
    runs, out = {}, tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: [])  # a figure takes a second
        for name in ASKED:
            built, trained, divided = [], [], []
            spy_on(patch, built, trained, divided)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                final = Train_cifar.main(flags(out, name))
            folder = Path(final["run_dir"])
            made = {"final": final, "folder": folder, "records": read_records(folder)}
            happened = {"built": built, "trained": trained, "divided": divided, "said": said.getvalue().splitlines()}
            runs[name] = SimpleNamespace(**made, **happened)
            patch.undo()
            patch.setattr(report, "draw", lambda *_: [])
    return runs


def spy_on(patch, built: list, trained: list, divided: list) -> None:
    """Note each network that is built, each division that is made with its network's number, and each training phase
    with what it was given."""
    build, train, divide = networks.build, Train_cifar.train_epoch, Train_cifar.CoDivide.__call__

    def spy_build(*args):
        built.append(build(*args))
        return built[-1]

    def spy_train(net, peer, optimizer, data, division, **how):
        before = [None if each is None else snapshot(each) for each in (net, peer)]
        terms = train(net, peer, optimizer, data, division, **how)
        trained.append(SimpleNamespace(net=net, peer=peer, division=division, before=before, data=data, **how))
        return terms

    def spy_divide(self, losses, truly_clean, random_state, name="net"):
        division = divide(self, losses, truly_clean, random_state, name)
        divided.append((name, normalise(losses.numpy()), division))
        return division

    patch.setattr(networks, "build", spy_build)
    patch.setattr(Train_cifar, "train_epoch", spy_train)
    patch.setattr(Train_cifar.CoDivide, "__call__", spy_divide)


@pytest.mark.parametrize("name", ASKED)
def test_who_trains_on_whose_division_with_which_peer(done, name):
    """Without co-training no other network may be made or asked, and the division is its own; with it all stays as in
    Algorithm 1. A hidden second network, or an exchanged division, makes the ablation measure nothing."""
    run, (nets, refine, M) = done[name], ASKED[name]
    assert len(run.built) == nets
    assert len(run.trained) == len(run.divided) == nets * (EPOCHS - 1)
    assert all((phase.refine, phase.M) == (refine, M) for phase in run.trained)
    for i, phase in enumerate(run.trained):
        k, epoch = i % nets, i // nets
        of_epoch = {each[0]: each for each in run.divided[nets * epoch : nets * (epoch + 1)]}
        assert phase.net is run.built[k]
        if nets == 1:
            assert phase.peer is None and list(of_epoch) == ["net 1"]
            assert phase.division is of_epoch["net 1"][2]
        else:
            assert phase.peer is run.built[1 - k]
            assert phase.division is of_epoch[f"net {2 - k}"][2]


@pytest.mark.parametrize("name", ALONE)
def test_one_network_divides_by_its_own_losses_before_it_is_trained(done, name):
    """Else the split is a stale one, or that of a network which has already learned from it."""
    run = done[name]
    for phase, (_, loss, division) in zip(run.trained, run.divided, strict=True):
        net = ResNet18(10, 4)
        net.load_state_dict(phase.before[0])
        found = normalise(engine.per_sample_loss(net, phase.data).loss.numpy())
        np.testing.assert_allclose(found, loss, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(division.loss, loss, rtol=1e-5, atol=1e-6)


def test_all_start_from_the_same_network_and_warm_up(done):
    """Else an ablation differs from the whole method before it has left anything out."""
    first = {name: run.records[0]["test_acc_net1"] for name, run in done.items()}
    assert len(set(first.values())) == 1
    assert all(same(run.trained[0].before[0], done["none"].trained[0].before[0]) for run in done.values())


@pytest.mark.parametrize("name", TABLE5)
def test_an_ablation_is_another_run(done, name):
    """A flag that does nothing gives the whole method's numbers under another name."""
    weights = [checkpoint.load_last(done[each].folder)["nets"][0] for each in ("none", name)]
    assert not same(*weights)
    assert done[name].folder.name == f"digits_0.5_sym_{name}"


@pytest.mark.parametrize("name", ALONE)
def test_logs_of_one_network(done, name):
    """Else a reader of the logs finds a second network that never was, or every tool that reads them stops."""
    run = done[name]
    assert not [key for record in run.records for key in record if key.endswith("_net2") or key.endswith("2")]
    for record in run.records:
        assert record["test_acc"] == record["test_acc_net1"]
    assert [record["labeled_net1"] is None for record in run.records] == [True, False, False]
    assert run.records[-1].keys() == {key for key in done["none"].records[-1] if not key.endswith("2")}
    assert (run.folder / "acc.txt").read_text().count("\n") == EPOCHS
    stats = (run.folder / "stats.txt").read_text().splitlines()
    expected = [f"Numer of labeled samples:{r['labeled_net1']}   AUC:{r['auc_net1']:.3f}" for r in run.records[1:]]
    assert stats == expected
    lines = (run.folder / "histograms.jsonl").read_text().splitlines()
    assert [json.loads(line).keys() for line in lines] == [{"epoch", "net1"}] * 2
    assert all(key.endswith("_net1") for key in np.load(run.folder / "scores/epoch_002.npz"))
    best = torch.load(run.folder / "best.pt", weights_only=True)
    accuracy = [record["test_acc"] for record in run.records]
    assert len(best["nets"]) == 1 and best["epochs"] == [accuracy.index(max(accuracy))]


@pytest.mark.parametrize("name", ALONE)
def test_the_list_of_wrong_labels_is_the_one_networks(done, name):
    """Else the list is missing, or its quality is half of what the network says."""
    run = done[name]
    scores = dict(np.load(run.folder / "label_scores.npz"))
    assert "p_clean_net2" not in scores and "loss_net2" not in scores
    issues = label_issues.find(read_run(run.folder))
    np.testing.assert_array_equal(issues.quality, scores["p_clean_net1"])
    np.testing.assert_array_equal(issues.loss, scores["loss_net1"])
    label_issues.write(issues, run.folder)
    head, first, *_ = (run.folder / "label_issues.csv").read_text().splitlines()
    row = dict(zip(head.split(","), first.split(","), strict=True))
    assert float(row["p_clean_net1"]) == float(row["label_quality"]) and row["p_clean_net2"] == ""


def test_what_is_printed(done):
    """Else nobody sees in a log that a part was left out, or a network's line speaks of two."""
    lines = done["no_cotraining"].said
    assert (
        "ablation no_cotraining: one network, which divides and guesses for itself (DivideMix w/o co-training)" in lines
    )
    [divided] = [line for line in lines if line.startswith("epoch 2/2")]
    assert re.search(r"\| labeled \d+ unlabeled \d+ \| AUC \d\.\d+ \|", divided)
    assert re.search(r"\| test \d+\.\d\d \| best", divided) and "net" not in divided


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], "; paper: 94.6 / 94.4"),
        (["--ablation", "one_view"], "; paper's DivideMix w/o augmentation (Table 5): best 94.1"),
        (
            ["--ablation", "divide_mixmatch", "--num_epochs", "9"],
            "; paper's Divide and MixMatch (Table 5): best 92.8 (but this run: --num_epochs 9)",
        ),
    ],
)
def test_the_paper_number_beside_an_ablation_is_its_own(tmp_path, capsys, asked, expected):
    """One network without co-training beside 94.6: its user looks for a mistake that is not there."""
    records = [{"epoch": 0, "best_acc": 94.0, "last10_acc": 93.0, "test_acc": 94.0, "test_acc_net1": 94.0}]
    run = SimpleNamespace(records=records, best_epochs=[0], folder=tmp_path, say=print, finish=lambda final, _: final)
    args = Train_cifar.parse_args(asked)
    options.resolve_recipe(args)
    final = Train_cifar.finish(run, CIFAR10[1], args, True)
    assert capsys.readouterr().out.splitlines()[0] == f"best 94.00 (epoch 0), mean of the last 10 93.00{expected}"
    assert ("paper_last" in final) == (not asked)
    row = next(row for row in recipes.ROWS if row.dataset == "cifar100")  # which Table 5 lacks
    final = Train_cifar.finish(run, row, Train_cifar.parse_args(["--ablation", "one_view"]), True)
    assert "paper" not in capsys.readouterr().out and "paper_best" not in final


# ---- Stop, continue, refuse ----


@pytest.mark.parametrize(
    "name",
    ["no_cotraining", *(pytest.param(name, marks=pytest.mark.slow) for name in TABLE5 if name != "no_cotraining")],
)
def test_interrupted_is_uninterrupted(tmp_path, monkeypatch, name):
    """Else a run of one network cannot be continued, or ends as another."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    asked = ["--ablation", name, "--save_scores", "--r", "0.9"]  # averages losses over epochs
    Train_cifar.main(tiny(tmp_path, *asked, "--run_dir", f"{tmp_path}/whole", "--num_epochs", "3"))
    for epochs in ("2", "3"):
        Train_cifar.main(tiny(tmp_path, *asked, "--run_dir", f"{tmp_path}/parts", "--num_epochs", epochs))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_another_ablation_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    """Else half a run has a part of the method and half has not; also where it was begun before there was the flag."""
    monkeypatch.setattr(report, "draw", lambda *_: [])

    def start(*more: str) -> dict:
        return Train_cifar.main(tiny(tmp_path, "--run_dir", f"{tmp_path}/run", *more))

    start("--num_epochs", "1")
    for name in ("no_refinement", "no_cotraining"):
        with pytest.raises(DivideMixError, match=rf"other settings \(--ablation was none, now {name}\)"):
            start("--ablation", name)
    state = checkpoint.load_last(tmp_path / "run")
    del state["config"]["ablation"]
    checkpoint.save_last(tmp_path / "run", 0, state)
    with pytest.raises(DivideMixError, match="--ablation was none, now no_refinement"):
        start("--ablation", "no_refinement")
    assert start("--num_epochs", "2")["epoch"] == 1


def test_cross_entropy_has_nothing_to_leave_out(capsys):
    """Else a cross-entropy run goes by an ablation's name."""
    with pytest.raises(SystemExit) as ended:
        Train_cifar.parse_args(["--method", "ce", "--ablation", "no_refinement"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "--ablation no_refinement: --method ce has no part of DivideMix to leave out" in error


def test_a_checkpoint_of_one_network_and_one_of_two(done, tmp_path, monkeypatch):
    """--init_from: an ablation may begin with the first of two networks; two from one would begin as the same."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    both, one = (done[name].folder / "best.pt" for name in ("none", "no_cotraining"))
    trained: list = []
    spy_on(monkeypatch, [], trained, [])
    short = ["--num_epochs", "1", "--warm_up", "0"]
    for file in (both, one):
        Train_cifar.main(flags(tmp_path, "no_cotraining", *short, "--init_from", str(file), "--id", file.parent.name))
        assert same(trained.pop().before[0], checkpoint.load_networks(file)[0]) and not trained
    with pytest.raises(DivideMixError, match=r"best.pt does not hold two networks"):
        Train_cifar.main(flags(tmp_path, "none", *short, "--init_from", str(one)))


@pytest.mark.slow
def test_blind_recipe_works_with_one_network(tmp_path, monkeypatch):
    """It estimates the noise from both divisions; there may be one."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    final = Train_cifar.main(flags(tmp_path, "no_cotraining", "--recipe", "blind"))
    assert None not in (final["noise_rate_estimate"], final["lambda_u"], final["concentration"])


# ---- A run that has ended ----


@pytest.mark.slow
def test_the_report_of_one_network(done, tmp_path):
    """Else the page has an empty second network, or does not come."""
    run = done["no_cotraining"].folder
    report.main([str(run), "--out", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "net 2" not in page and "net 1/2" not in page and "two networks" not in page
    assert "their quality, the network's clean probability" in page
    assert "AUC, net 1" in page and "net 1, epoch 2" in page


@pytest.mark.slow
def test_one_network_and_two_are_compared(done, tmp_path, capsys):
    """That is what an ablation is for."""
    report.main([*(str(done[name].folder) for name in ("none", *ALONE)), "--out", str(tmp_path)])
    table = capsys.readouterr().out
    for name in ALONE:
        [line] = [line for line in table.splitlines() if line.startswith(done[name].folder.name)]
        assert f" {done[name].final['auc_net1']:.3f} " in line
    assert (tmp_path / "report.html").exists()


def test_prediction_of_one_network(done, tmp_path, monkeypatch):
    """Else a user of the run gets another classifier than the tested one, or half its confidence."""
    run = done["divide_mixmatch"]
    description = deploy.read_description(run.folder)
    assert description.count == 1 and str(description).startswith("one preresnet18")
    ensemble = deploy.load_ensemble(run.folder, description)
    data = dataloader_cifar.load("digits", "")
    test = DeviceImages(data.test_images, data.test_labels, data.mean, data.std, data.flip)
    accuracy = engine.ensemble_accuracy(list(ensemble.nets), test)
    assert accuracy == pytest.approx([run.final["best_acc"]] * 2, abs=0.5 * 100 / len(test))
    Image.fromarray(data.test_images[0]).save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    assert end_of(predict, [str(run.folder), "digit.png", "--device", "cpu"], monkeypatch) == 0
    row = dict(zip(*(line.split(",") for line in Path("predictions.csv").read_text().splitlines()), strict=True))
    with torch.no_grad():
        pixels = torch.tensor(description.preparation.pixels(f"{tmp_path}/digit.png", Boundary(tmp_path)))
        p = ensemble(deploy.to_images(pixels[None])).softmax(1)[0]
    assert int(row["label"]) == p.argmax() and float(row["confidence"]) == pytest.approx(float(p.max()), abs=1e-3)
    # A file with another number of networks than the run has is not this run's
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_bytes((run.folder / "args.json").read_bytes())
    (tmp_path / "run" / "best.pt").write_bytes((done["none"].folder / "best.pt").read_bytes())
    with pytest.raises(DivideMixError, match="does not hold what"):
        deploy.load_ensemble(tmp_path / "run", description)


@pytest.mark.slow
def test_export_of_one_network(done, tmp_path, monkeypatch):
    """Its file says what to make of the logits: half of them would be another confidence."""
    run, file = done["divide_mixmatch"].folder, tmp_path / "model.pt2"
    assert end_of(export, [str(run), str(file)], monkeypatch) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    about = json.loads(extra["metadata.json"])
    assert about["program"] == "DivideMix: one network" and about["networks"]["count"] == 1
    assert "softmax(logits) " in about["output"]["meaning"]
    x = torch.rand(3, *about["input"]["shape"][1:])
    with torch.no_grad():
        expected = deploy.load_ensemble(run, deploy.read_description(run))(x)
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["divide_mixmatch", "one_view"])
def test_two_ranks_train_an_ablation(tmp_path, name):
    """One network in each of two processes: a rank that waits for a network which is not there hangs the job."""
    asked = ["--ablation", name, "--warm_up", "0", "--num_epochs", "2"]
    one = read_records(Train_cifar.main(tiny(tmp_path / "one", *asked))["run_dir"])
    result = torchrun("Train_cifar.py", *tiny(tmp_path / "two", *asked))
    assert result.returncode == 0, result.stderr
    two = read_records(tmp_path / "two" / f"digits_0.5_sym_{name}")
    assert len(two) == 2 and two[0].keys() == one[0].keys()
    # Before anything is trained, both have the same losses, so they must have the same divisions.
    assert [two[0][key] for key in ("labeled_net1", "auc_net1")] == [
        one[0][key] for key in ("labeled_net1", "auc_net1")
    ]
