"""--ablation: the paper's numbers, and that each switches off what it names in a step and a phase, and nothing else."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import graph_emulator
from helpers.nets import ALONE, ASKED, SETTINGS, TABLE5, Linear, NoSync, half, placed, same, snapshot, softmax

from dividemix import engine, recipes
from dividemix.engine import MixMatch, Phase
from dividemix.runtime import graph
from dividemix.runtime.device import Runtime
from PreResNet import ResNet18

CPU = torch.device("cpu")

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
        expected = [{} if value is None else {"best": value} for value in best]
        assert [recipes.paper_results(row, ablation=name) for row in CIFAR10] == expected
    for row in recipes.ROWS:
        assert recipes.paper_results(row) == {"best": row.best, "last": row.last}
        assert recipes.paper_results(row, "ce") == {"best": row.ce_best}
        assert row.dataset == "cifar10" or recipes.paper_results(row, ablation="divide_mixmatch") == {}


# ---- One step ----


def ablated(name: str, peer):
    """What an ablation trains with: (peer, fields of MixMatch)."""
    found = recipes.ABLATIONS[name]
    return (peer if found.nets == 2 else None), {"refine": found.refine, "views": found.M}


def train(name: str, net, other, optimizer, data, labeled: int = 13):
    """An epoch of an ablation on 24 samples. -> its terms"""
    peer, fields = ablated(name, other)
    mixmatch = dataclasses.replace(SETTINGS, **fields)
    return engine.train_epoch(net, peer or net, optimizer, data, half(24, labeled), mixmatch, Phase(epoch=3))


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
    batch = tuple(map(torch.from_numpy, (x[0], x[1], labels, w, u[0], u[1])))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    terms = engine.train_step(net, peer, optimizer, batch, MixMatch(C, B, T, **how), 0.7, index, lambda_u)
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
    machine = Runtime(CPU, "bf16", merge=True)
    net, other = (machine.prepare(ResNet18(3, width=4)) for _ in range(2))
    peer, how = ablated(name, other)
    optimizer, index = machine.optimizer(net, 0.1, 5e-4), torch.arange(8 * how["views"])
    batch, *_ = tiny_images.mixmatch_batches(half(24), 4, np.random.default_rng(0))
    with NoSync():
        images, draws = tiny_images.mixmatch_views(*batch), (torch.tensor(0.7), index, torch.tensor(2.0))
        engine.train_step(net, peer, optimizer, images, MixMatch(3, 4, **how), *draws, forward=machine.forward)


# ---- One phase ----


def test_all_draw_alike(monkeypatch, tiny_images):
    """Else a difference from the whole method is other images, crops or lam, too; and with one view the partners in
    mixup are of rows that are not there, or of some rows never."""
    seen: dict[str, list] = {name: [] for name in ASKED}

    def spy(net, peer, optimizer, batch, mixmatch, lam, index, lambda_u, **_):
        seen[name].append([*batch, lam, lambda_u])
        assert (peer is None) == (name in ALONE)
        assert sorted(index.tolist()) == list(range(ASKED[name][2] * (len(batch[0]) + len(batch[4]))))
        return engine.StepTerms(*torch.zeros(4))

    monkeypatch.setattr(engine, "train_step", spy)
    net, other = ResNet18(3, width=4), ResNet18(3, width=4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for name in ASKED:
        train(name, net, other, optimizer, tiny_images)
    assert len(seen["none"]) == 4
    for name in ASKED:
        for mine, whole in zip(seen[name], seen["none"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, whole, strict=True))


@pytest.mark.parametrize("name", TABLE5)
@pytest.mark.parametrize("labeled", [1, 23, 24])
def test_phases_survive_the_smallest_sets(tiny_images, labeled, name):
    """One labeled sample, one unlabeled, none: an epoch that crashes there loses the run."""
    net, other = ResNet18(3, width=4), ResNet18(3, width=4)
    terms = train(name, net, other, Runtime(CPU).optimizer(net, 0.02, 5e-4), tiny_images, labeled)
    assert np.isfinite(terms).all()
    assert (terms.unlabeled == 0) == (labeled == 24)


@pytest.mark.parametrize(("precision", "merge"), [("bf16", True), pytest.param("fp32", False, marks=pytest.mark.slow)])
def test_replayed_steps_equal_eager_ones(monkeypatch, tiny_images, precision, merge):
    """On a card every full batch is a replay. A graph of two views that is replayed for one, or of one ablation for
    another on the same networks, trains another method without an error."""
    graph_emulator.install(monkeypatch)
    states = []
    for on in (False, True):
        machine = Runtime(CPU, precision, merge=merge, graph=on)
        torch.manual_seed(0)
        net, other = (machine.prepare(ResNet18(3, width=4)) for _ in range(2))
        optimizer, data = machine.optimizer(net, 0.02, 5e-4), placed(machine, tiny_images)
        terms = [train(name, net, other, optimizer, data) for name in ASKED]
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
        terms.append(train(name, net, other, machine.optimizer(net, 0.02, 5e-4), placed(machine, tiny_images)))
    np.testing.assert_allclose(terms[0], terms[1], rtol=1e-4)
