"""Captured steps, on an emulation of CUDA graphs (the same on a card: test_gpu.py)."""

import dataclasses
import io
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import graph_emulator
from helpers.captured import SETTINGS, start, state, train
from helpers.data import colour_digits
from helpers.nets import half, placed
from helpers.runs import assert_equal
from helpers.trees import make_webvision

import dataloader_webvision
from dividemix import DivideMixError, DivideMixWarning, engine, runtime
from dividemix.data.device import DeviceImages
from dividemix.data.images import Views
from dividemix.data.stream import Pipeline
from dividemix.engine import MixMatch, Phase
from dividemix.runtime import graph
from dividemix.runtime.device import Runtime

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    graph_emulator.install(monkeypatch)


@pytest.fixture
def digits() -> DeviceImages:
    """83 digits: with batches of 4, partial ones at the end and where the unlabeled set ends."""
    images, labels = colour_digits(83)
    return DeviceImages(images[:, ::2, ::2].copy(), labels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip=True)


@pytest.mark.parametrize(("precision", "merge"), [("fp32", False), ("bf16", True)])
def test_replayed_steps_equal_eager_ones(digits, merge, precision):
    """A number that was frozen (lam, the ramp, the learning rate), a tensor that was copied too late, momentum or
    statistics spoiled by the runs before the capture: all would train another method without an error."""
    eager, replayed = (Runtime(CPU, precision, merge=merge, graph=on) for on in (False, True))
    runs = [start(eager), start(replayed)]
    terms = [
        train(placed(machine, digits), range(2), *run) for machine, run in zip((eager, replayed), runs, strict=True)
    ]
    assert len(replayed.steps) == 4  # each net's two steps, captured once
    assert all(isinstance(step, graph.CapturedStep) for step in replayed.steps.values())
    assert terms[0] == terms[1]
    for optimizer in runs[0][1]:  # eager has numbers where the graph has tensors
        optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
    assert_equal(state(*runs[0]), state(*runs[1]))


@pytest.mark.parametrize("keep", ["host", "no"])
def test_streamed_batches_are_replayed_too(tmp_path, keep):
    """They are other tensors each time: a graph that reads the first one's memory trains on one batch all epoch long.
    And each epoch draws new images: a step captured for each of them fills the card."""
    data = dataloader_webvision.load(make_webvision(tmp_path, n_train=56, num_class=10), 10)
    eager, replayed = (Runtime(CPU, graph=on) for on in (False, True))
    runs = [start(eager), start(replayed)]
    for machine, run in zip((eager, replayed), runs, strict=True):
        lists = {"train": data.train}
        with Pipeline(lists, Views(20, 16), data.mean, data.std, machine, workers=0, keep=keep) as pipeline:
            for epoch in range(2):
                train(pipeline.images("train", np.arange(epoch, 54 + epoch), keep=True), [epoch], *run)
    assert len(replayed.steps) == 4  # each net's two steps, captured once
    for optimizer in runs[0][1]:
        optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
    assert_equal(state(*runs[0]), state(*runs[1]))


def test_partial_batches_are_not_captured(digits):
    """Each epoch's partial batches have sizes of their own: capturing them would take longer than running them."""
    machine = Runtime(CPU, graph=True)
    shapes = []
    run = machine.run
    machine.run = lambda key, step, inputs, changed: (
        shapes.append([len(x) for x in inputs[-4:-2]]) or run(key, step, inputs, changed)
    )
    nets, optimizers = start(machine)
    data = placed(machine, digits)
    terms = engine.train_epoch(nets[0], nets[1], optimizers[0], data, half(83, 46), SETTINGS, Phase())
    # 12 batches, the last of 2 labeled; the 37 unlabeled end with one image in the tenth
    assert shapes == [[4, 4]] * 10
    assert np.isfinite(terms).all()


class Noting(torch.autograd.Function):
    """The identity, which notes the rows and cuDNN's flag, forward and backward."""

    @staticmethod
    def forward(x, notes):
        notes.append((len(x), torch.backends.cudnn.benchmark))
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.notes = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        ctx.notes.append((len(gradient), torch.backends.cudnn.benchmark))
        return gradient, None


def test_partial_batches_are_not_autotuned(digits, monkeypatch):
    """Their sizes are new in each epoch: cuDNN tries all its kernels for each convolution of them, which takes as long
    as the epoch. Full batches without autotuning would be slow for ever."""
    machine, notes = Runtime(CPU), []
    nets, optimizers = start(machine)
    first = type(nets[0].conv1).forward
    nets[0].conv1.forward = lambda x: Noting.apply(first(nets[0].conv1, x), notes)
    data = placed(machine, digits)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    engine.train_epoch(nets[0], nets[1], optimizers[0], data, half(83, 46), SETTINGS, Phase())
    # 12 batches of 4 labeled and 4 unlabeled: four guesses, then 16 rows forward and backward; the tenth has one
    # unlabeled image, the last two labeled ones
    full = [(4, True)] * 4 + [(16, True)] * 2
    tenth = [(1, False)] * 2 + [(4, False)] * 2 + [(10, False)] * 2
    last = [(4, False)] * 2 + [(2, False)] * 2 + [(12, False)] * 2
    assert notes == full * 9 + tenth + full + last
    assert torch.backends.cudnn.benchmark  # again, for what follows


def test_autotuning_is_on_again_after_a_partial_batch_that_failed(monkeypatch):
    """Evaluation that goes on with smaller batches, and a next run in this process, would be slow."""

    def fail(*_):
        raise torch.OutOfMemoryError

    for before in (True, False):  # False: --deterministic
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        with pytest.raises(torch.OutOfMemoryError):
            Runtime(CPU).run_partial(fail, ())
        assert torch.backends.cudnn.benchmark is before


def test_a_restored_run_captures_the_restored_state(digits):
    """Resuming: a graph that holds the addresses of what was there before the restore would train something else."""
    machine = Runtime(CPU, graph=True)
    straight, data = start(machine), placed(machine, digits)
    train(data, range(1), *straight)
    kept = [{**part.state_dict()} for part in (*straight[0], *straight[1])]
    kept = torch.load(saved(kept), weights_only=True)
    train(data, range(1, 2), *straight)
    again = Runtime(CPU, graph=True)
    nets, optimizers = start(again)
    for net, saved_state in zip(nets, kept[:2], strict=True):
        net.load_state_dict(saved_state)
    for optimizer, saved_state in zip(optimizers, kept[2:], strict=True):
        runtime.load_optimizer(optimizer, saved_state)
    train(placed(again, digits), range(1, 2), nets, optimizers)
    assert_equal(state(*straight), state(nets, optimizers))


def saved(what):
    buffer = io.BytesIO()
    torch.save(what, buffer)
    buffer.seek(0)
    return buffer


@dataclass(frozen=True)
class Extended(MixMatch):
    """What somebody makes who adds a setting."""

    more: int = 0


def test_a_step_is_captured_anew_for_each_setting_that_it_reads_and_for_no_other(digits):
    """T is a number: a graph of T = 0.5 that is replayed for T = 1 sharpens as before, and so would be a setting that
    somebody adds to the method. Captured anew with each lambda_u that `--recipe blind` chooses, or for each division,
    the card fills up. What is replayed is what is computed step by step."""
    one, another = half(83, 9), half(83, 8)
    named = dataclasses.asdict(SETTINGS)
    calls = [(one, SETTINGS, 1), (another, SETTINGS, 1)]
    calls += [(one, replace(SETTINGS, **other), 1) for other in ({"lambda_u": 50}, {"alpha": 0.5}, {"warm_up": 3})]
    calls += [(one, replace(SETTINGS, T=1.0), 2), (one, Extended(**named), 3), (one, Extended(**named, more=1), 4)]
    calls += [(one, Extended(**named, more=1), 4), (one, SETTINGS, 4)]
    results = []
    for machine in (Runtime(CPU), Runtime(CPU, graph=True)):
        nets, optimizers = start(machine)
        data, terms = placed(machine, digits), []
        for division, mixmatch, captured in calls:
            phase = Phase(epoch=5)
            terms.append(engine.train_epoch(nets[0], nets[1], optimizers[0], data, division, mixmatch, phase))
            assert len(machine.steps) == (captured if machine.graph else 0), mixmatch
        results.append((terms, nets[0].state_dict()))
    assert results[0][0] == results[1][0]
    assert_equal(results[0][1], results[1][1])


def test_no_step_reads_what_is_not_in_its_key(digits):
    """A lambda_u that the step reads is frozen in the graph: the ramp would stand still, without an error."""
    outside = {field.name for field in dataclasses.fields(MixMatch) if not field.compare}
    assert outside == {"alpha", "lambda_u", "warm_up"}

    class Guarded(MixMatch):
        def __getattribute__(self, name):
            assert name not in outside, f"{name} is read"
            return super().__getattribute__(name)

    guarded = Guarded(num_class=10, batch_size=4)
    with pytest.raises(AssertionError, match="alpha is read"):
        _ = guarded.alpha
    nets, optimizers = start(Runtime(CPU))
    batch = next(iter(digits.mixmatch_batches(half(83), 4, np.random.default_rng(0))))
    draws = torch.tensor(0.7), torch.randperm(16), torch.tensor(2.0)
    images, forward = digits.mixmatch_views(*batch), Runtime(CPU).forward
    terms = engine.train_step(nets[0], nets[1], optimizers[0], images, guarded, *draws, forward=forward)
    assert terms.loss.isfinite() and terms.unlabeled > 0
    assert np.isfinite(engine.warmup_epoch(nets[0], optimizers[0], digits, guarded, Phase())).all()


def test_a_failed_capture_is_said_and_the_run_goes_on_as_if_nothing_had_been(monkeypatch, digits):
    """An exotic card or driver must cost speed, not the run; and the runs before the failed capture must leave no
    trace."""

    def fail(step, pool):
        step()
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("capture failed due to a previous error")

    monkeypatch.setattr(graph, "capture", fail)
    eager, failing = Runtime(CPU), Runtime(CPU, graph=True)
    runs = [start(eager), start(failing)]
    expected = train(placed(eager, digits), range(1), *runs[0])
    with pytest.warns(DivideMixWarning, match=r"CUDA graph failed.*not permitted.*--no_graph"):
        assert train(placed(failing, digits), range(1), *runs[1]) == expected
    assert not failing.graph and not any(isinstance(step, graph.CapturedStep) for step in failing.steps.values())
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert_equal(a.state_dict(), b.state_dict())


def test_a_failed_compilation_is_said_and_the_run_goes_on(monkeypatch, digits):
    """No compiler, or a network that torch.compile cannot take: the run must not end with its stack trace."""

    def broken(net, x):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(Runtime, "_compiled", property(lambda self: broken))
    for work in ("training", "evaluation"):
        eager, failing = Runtime(CPU, eval_batch_size=20), Runtime(CPU, compile=True, eval_batch_size=20)
        runs = [start(eager), start(failing)]
        with pytest.warns(DivideMixWarning, match=r"torch.compile failed.*C compiler.*--no_compile") as record:
            if work == "training":
                train(placed(failing, digits), range(1), *runs[1])
                train(placed(eager, digits), range(1), *runs[0])
            else:
                scores = [
                    engine.per_sample_loss(run[0][0], placed(machine, digits))
                    for machine, run in zip((eager, failing), runs, strict=True)
                ]
                assert torch.equal(scores[0].loss, scores[1].loss)
        assert len(record) == 1
        assert not failing.compile
        for a, b in zip(runs[0][0], runs[1][0], strict=True):
            assert_equal(a.state_dict(), b.state_dict())


def test_preserved_puts_everything_back_also_after_an_error():
    """A capture that fails half-way would leave the weights of three steps too many."""
    weight = torch.nn.Parameter(torch.arange(3.0))
    address = weight.data_ptr()
    with pytest.raises(ValueError), graph.preserved([weight]):
        with torch.no_grad():
            weight.mul_(7)
        raise ValueError
    assert torch.equal(weight.detach(), torch.arange(3.0)) and weight.data_ptr() == address


def test_the_emulator_freezes_numbers():
    """The tests above prove nothing if the emulator runs Python again instead of what was launched."""
    x, factor = torch.ones(2), 2.0
    frozen = graph.CapturedStep(lambda x: x * factor + 1, [x], [], graph.GraphPool())
    factor = 5.0
    assert torch.equal(frozen(torch.full((2,), 3.0)), torch.full((2,), 7.0))
    with pytest.raises(ValueError, match="other shapes"):  # a copy would broadcast it
        frozen(torch.ones(1))


def test_a_reference_runtime_keeps_no_steps(digits):
    """Else every network and data set that was ever trained stays in memory."""
    machine = Runtime(CPU)
    train(placed(machine, digits), range(1), *start(machine))
    assert machine.steps == {}


def test_training_out_of_memory_names_the_remedies(monkeypatch, digits):
    """A stack trace from deep inside torch does not say which flag makes the step smaller."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    machine = Runtime(CPU, graph=True)
    nets, optimizers = start(machine)
    monkeypatch.setattr(graph, "capture", full)
    monkeypatch.setattr(engine, "train_step", full)
    with pytest.warns(DivideMixWarning, match="CUDA graph failed"), pytest.raises(DivideMixError, match="--batch_size"):
        train(placed(machine, digits), range(1), nets, optimizers)
