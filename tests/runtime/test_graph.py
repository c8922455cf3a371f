"""Captured steps, on an emulation of CUDA graphs (the same on a card: test_gpu.py)."""

import copy
import dataclasses
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import captured, graph_emulator
from helpers.captured import SETTINGS, digits, state, train
from helpers.nets import CPU, half, small_net
from helpers.runs import assert_equal
from helpers.trees import make_webvision

import dataloader_webvision
from dividemix import DivideMixError, DivideMixWarning, engine
from dividemix.data.images import Views
from dividemix.data.stream import Pipeline
from dividemix.engine import MixMatch, Phase
from dividemix.runtime import device, graph
from dividemix.runtime.device import Runtime, load_optimizer

start = partial(captured.start, build=lambda: small_net(10))
SIZE = 39  # `train` labels 22: in batches of 4, partial ones at the end and where the unlabeled set ends


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    graph_emulator.install(monkeypatch)
    monkeypatch.setattr(device, "FIRST_SCALE", 2.0**23)  # in fp16 the first gradients overflow


def assert_captured(runtime: Runtime, count: int) -> None:
    assert len(runtime.steps) == count
    assert all(isinstance(step, graph.CapturedStep) for step in runtime.steps.values())


@pytest.mark.parametrize(
    ("precision", "merge", "strong"), [("fp32", False, False), ("bf16", True, False), ("fp16", True, True)]
)
def test_replayed_steps_equal_eager_ones(merge, precision, strong):
    """A number that was frozen, or momentum that the capture spoiled, trains another method without an error."""
    eager, replayed = (Runtime(CPU, precision, merge=merge, graph=on) for on in (False, True))
    runs = [start(eager), start(replayed)]
    sets = [digits(SIZE, runtime, strong) for runtime in (eager, replayed)]
    terms = [train(data, [0, 1], *run) for data, run in zip(sets, runs, strict=True)]
    assert_captured(replayed, 4)  # each net's two steps, once
    assert eager.steps == {}, "networks and data sets that were trained stay in memory"
    assert terms[0] == terms[1]
    assert_equal(state(*runs[0]), state(*runs[1]))
    for optimizer in runs[1][1] if precision == "fp16" else ():
        assert 1 < optimizer.grad_scale < 2**23 and optimizer.param_groups[0]["growth"] > 0


def test_a_capture_leaves_the_random_streams_alone():
    """A continued run captures in another epoch than the uninterrupted one: else its dropout is another."""

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(784, 10)
        )

    states = []
    for runtime in (Runtime(CPU), Runtime(CPU, graph=True)):
        run = captured.start(runtime, build)
        train(digits(SIZE, runtime), [0, 1], *run)
        states.append(state(*run))
    assert_captured(runtime, 4)
    assert_equal(*states)


@pytest.mark.parametrize("keep", ["host", "no"])
def test_streamed_batches_are_replayed_too(tmp_path, keep):
    """A graph that reads the memory of the first batch trains on one batch all epoch long."""
    data = dataloader_webvision.load(make_webvision(tmp_path, n_train=36, num_class=10), 10)
    states = []
    for runtime in (Runtime(CPU), Runtime(CPU, graph=True)):
        run = start(runtime)
        lists = {"train": data.train}
        with Pipeline(lists, Views(20, 16), data.mean, data.std, runtime, workers=0, keep=keep) as pipeline:
            for epoch in range(2):
                train(pipeline.images("train", np.arange(epoch, 34 + epoch), keep=True), [epoch], *run)
        states.append(state(*run))
    assert_captured(runtime, 4)
    assert_equal(*states)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_restored_run_captures_the_restored_state(precision):
    """A graph that holds the addresses of what was there before a checkpoint was loaded would train something else."""
    straight, resumed = (Runtime(CPU, precision, graph=True) for _ in range(2))
    run, again = start(straight), start(resumed)
    train(digits(SIZE, straight), [0], *run)
    saved = copy.deepcopy([trained.state_dict() for trained in (*run[0], *run[1])])
    train(digits(SIZE, straight), [1], *run)
    for net, optimizer, of_net, of_optimizer in zip(*again, saved[:2], saved[2:], strict=True):
        net.load_state_dict(of_net)
        load_optimizer(optimizer, of_optimizer)
    train(digits(SIZE, resumed), [1], *again)
    assert_equal(state(*run), state(*again))


def full_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# ---- Partial batches ----


def test_partial_batches_are_neither_captured_nor_autotuned(monkeypatch):
    """Their sizes are new in each epoch: to capture or autotune them takes longer than the epoch."""
    runtime, notes = Runtime(CPU), []
    nets, optimizers = start(runtime)

    def note(_, inputs, output):
        notes.append((len(output), torch.backends.cudnn.benchmark))
        if output.requires_grad:
            output.register_hook(lambda gradient: notes.append((len(gradient), torch.backends.cudnn.benchmark)))

    nets[0][0].register_forward_hook(note)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    engine.train_epoch(*nets, optimizers[0], digits(SIZE, runtime), half(SIZE, 22), SETTINGS, Phase())
    # 6 batches of 4 labeled and 4 unlabeled: four guesses, then 16 rows forward and backward; the fifth has one
    # unlabeled image, the last two labeled ones
    full = [(4, True)] * 4 + [(16, True)] * 2
    fifth = [(1, False)] * 2 + [(4, False)] * 2 + [(10, False)] * 2
    last = [(4, False)] * 2 + [(2, False)] * 2 + [(12, False)] * 2
    assert notes == full * 4 + fifth + last
    assert torch.backends.cudnn.benchmark  # again, for what follows
    with pytest.raises(torch.OutOfMemoryError):
        runtime.run_partial(full_memory, ())
    assert torch.backends.cudnn.benchmark  # also after a failure: evaluation goes on with smaller batches


# ---- The key of a captured step ----


@dataclass(frozen=True)
class Extended(MixMatch):
    """What somebody makes who adds a setting."""

    new_setting: int = 0


@pytest.mark.parametrize(("precision", "merge"), [("fp32", False), ("bf16", True)])
def test_a_step_is_captured_anew_for_each_setting_that_it_reads_and_for_no_other(precision, merge):
    """Else T = 0.5 is replayed for T = 1, a lambda_u is frozen, or captures for each lambda_u fill the card."""
    fields = dataclasses.asdict(SETTINGS)
    calls = [  # labeled, settings, the peer's number, captures so far
        (9, SETTINGS, 1, 1),
        (8, SETTINGS, 1, 1),
        *((9, replace(SETTINGS, **free), 1, 1) for free in ({"lambda_u": 50}, {"alpha": 0.5}, {"warm_up": 3})),
        (9, replace(SETTINGS, T=1.0), 1, 2),
        (9, Extended(**fields, new_setting=1), 1, 3),
        (9, SETTINGS, 1, 3),
        (9, SETTINGS, 0, 4),
        (9, replace(SETTINGS, refine=False), 1, 5),
        (9, replace(SETTINGS, views=1), 1, 6),
    ]
    results = []
    for runtime in (Runtime(CPU, precision, merge=merge), Runtime(CPU, precision, merge=merge, graph=True)):
        (nets, optimizers), data, terms = start(runtime), digits(SIZE, runtime), []
        for labeled, mixmatch, peer, count in calls:
            division, phase = half(SIZE, labeled), Phase(epoch=5)
            terms.append(engine.train_epoch(nets[0], nets[peer], optimizers[0], data, division, mixmatch, phase))
            assert_captured(runtime, count if runtime.graph else 0)
        results.append((terms, nets[0].state_dict()))
    assert results[0][0] == results[1][0] and len(set(results[0][0])) == len(calls)
    assert_equal(results[0][1], results[1][1])


# ---- What fails ----


def test_a_failed_capture_is_said_and_the_run_goes_on_as_if_nothing_had_been(monkeypatch):
    """An exotic card or driver must cost speed, not the run; the runs before the failed capture must leave no trace."""

    def fail(step, pool):
        step()
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("capture failed due to a previous error")

    monkeypatch.setattr(graph, "capture", fail)
    eager, failing = Runtime(CPU), Runtime(CPU, graph=True)
    runs = [start(eager), start(failing)]
    expected = train(digits(SIZE, eager), [0], *runs[0])
    with pytest.warns(DivideMixWarning, match=r"CUDA graph.*not permitted.*--no_graph"):
        assert train(digits(SIZE, failing), [0], *runs[1]) == expected
    assert not failing.graph and not any(isinstance(step, graph.CapturedStep) for step in failing.steps.values())
    assert_equal(state(*runs[0]), state(*runs[1]))


@pytest.mark.parametrize("work", ["training", "evaluation"])
def test_a_failed_compilation_is_said_once_and_the_run_goes_on(monkeypatch, work):
    """No compiler, or a network that torch.compile cannot take: the run must not end with its stack trace."""

    def broken(net, x):
        raise RuntimeError("Failed to find C compiler")

    def run(runtime: Runtime) -> list:
        data, (nets, optimizers) = digits(SIZE, runtime), start(runtime)
        if work == "training":
            return [train(data, [0], nets, optimizers), state(nets, optimizers)]
        return [engine.per_sample_loss(nets[0], data).loss]

    monkeypatch.setattr(Runtime, "_compiled", property(lambda self: broken))
    failing = Runtime(CPU, compile=True, eval_batch_size=20)
    with pytest.warns(DivideMixWarning, match=r"torch.compile.*C compiler.*--no_compile") as warnings:
        results = run(failing)
    assert len(warnings) == 1 and not failing.compile
    assert_equal(results, run(Runtime(CPU, eval_batch_size=20)))


def test_training_out_of_memory_names_the_remedies(monkeypatch):
    """A stack trace from deep inside torch does not say which flag makes the step smaller."""
    runtime = Runtime(CPU, graph=True)
    nets, optimizers = start(runtime)
    monkeypatch.setattr(graph, "capture", full_memory)
    monkeypatch.setattr(engine, "train_step", full_memory)
    with pytest.warns(DivideMixWarning, match="CUDA graph"), pytest.raises(DivideMixError, match="--batch_size"):
        train(digits(SIZE, runtime), [0], nets, optimizers)


def test_the_emulator_freezes_numbers():
    """The tests above prove nothing if the emulator runs Python again instead of what was launched."""
    x, factor = torch.ones(2), 2.0
    frozen = graph.CapturedStep(lambda x: x * factor + 1, [x], [], graph.GraphPool())
    factor = 5.0
    assert torch.equal(frozen(torch.full((2,), 3.0)), torch.full((2,), 7.0))
    with pytest.raises(ValueError):  # other shapes: a copy would broadcast
        frozen(torch.ones(1))
