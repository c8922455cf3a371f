"""How a run is run: the device that is chosen and what is said of it, precision, compilation, and the optimiser."""

import copy
import functools
import os
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.nets import CPU, SETTINGS, digits_batch, gradients, half, placed, small_net

from dividemix import DivideMixError, DivideMixWarning, engine
from dividemix.engine import Phase
from dividemix.runtime import device
from dividemix.runtime.device import Runtime, load_optimizer, pick_device, set_learning_rate, start
from PreResNet import ResNet18


def mps(monkeypatch, available: bool) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: available))  # cached, as torch's


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """One rank, and no card unless a test says so, whatever machine the tests run on."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mps(monkeypatch, False)
    monkeypatch.setattr(device, "unusable_card", lambda: None)
    yield
    torch.use_deterministic_algorithms(False)


def with_cards(monkeypatch, count: int) -> None:
    """As if there were cards of today, as far as `start` asks them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")


# ---- Device ----


def test_auto_takes_the_card_then_mps_then_the_cpu(monkeypatch):
    """Else `--device cuda` or a card with an old driver trains for days on the CPU, without a word."""
    assert pick_device("auto", 0) == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(DivideMixError, match=f"--device {name}: "):
            pick_device(name, 0)
    monkeypatch.setattr(device, "unusable_card", lambda: "the driver is too old")
    with pytest.warns(DivideMixWarning, match="the driver is too old"):
        assert pick_device("auto", 0) == CPU
    with pytest.raises(DivideMixError, match="--device cuda: the driver is too old"):
        pick_device("cuda", 0)
    mps(monkeypatch, True)
    monkeypatch.setattr(device, "unusable_card", lambda: None)
    assert pick_device("auto", 0) == torch.device("mps")
    with_cards(monkeypatch, 2)
    assert pick_device("auto", 1) == pick_device("cuda", 1) == torch.device("cuda", 1)
    assert pick_device("mps", 0) == torch.device("mps") and pick_device("cpu", 0) == CPU
    with pytest.raises(DivideMixError, match="--gpuid 2"):  # not another user's card
        pick_device("auto", 2)


def test_why_a_card_cannot_be_used(monkeypatch, tmp_path):
    """Else the advice is wrong: a new torch build and a new driver mend different faults."""
    monkeypatch.undo()
    proc = tmp_path / "version"
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    assert device.unusable_card(proc) is None
    proc.touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0" in device.unusable_card(proc)
    proc.unlink()  # as under WSL, where the driver shows only as nvidia-smi
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "CPU-only build" in device.unusable_card(proc)


def test_a_batch_that_the_ranks_do_not_divide_is_refused(monkeypatch):
    """Else ranks would take batches of other sizes and wait for each other for ever."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DivideMixError, match=r"--batch_size 64 .* 66"):
        start("cpu", batch_size=64)


# ---- What `start` switches on ----


def test_a_card_compiles_and_captures_unless_told_not_to(monkeypatch):
    """Else the flags do nothing; TF32 would make fp32 no reference, and Inductor chooses its kernels by timing them."""
    with_cards(monkeypatch, 1)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fast = start("cuda", width=4)
    assert (fast.precision, fast.compile, fast.graph, fast.merge) == ("bf16", True, True, True)
    assert fast.memory_format == torch.channels_last and torch.backends.cudnn.benchmark
    assert all(text in fast.describe() for text in ("Card", "bf16", "compiled", "CUDA graphs"))
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert [start("cuda", large_images=large).eval_batch_size for large in (False, True)] == [1000, 200]
    plain = start("cuda", precision="fp32", compile=False, graph=False)
    assert not (plain.compile or plain.graph or plain.merge) and "compiled" not in plain.describe()
    exact = start("cuda", deterministic=True)
    assert not exact.compile and exact.graph and not torch.backends.cudnn.benchmark


def test_a_cpu_neither_compiles_nor_captures_evaluates_in_small_batches_and_narrow_networks_are_contiguous():
    """There compiling is no faster, large batches leave the cache, and below 8 channels torch writes out of bounds in
    channels_last."""
    layouts = [start("cpu", width=width).memory_format for width in (15, 16)]
    assert layouts == [torch.contiguous_format, torch.channels_last]
    runtime = start("cpu")
    assert not (runtime.compile or runtime.graph or runtime.merge)
    assert [start("cpu", eval_batch_size=size).eval_batch_size for size in (None, 1000)] == [64, 1000]
    assert runtime.prepare(ResNet18(10, 4)).conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_deterministic_switches_torch_to_deterministic_kernels(monkeypatch):
    """Else reruns with --deterministic differ in the last digits, and nobody is told."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a user's choice stays
    start("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    start("cpu")
    assert not torch.are_deterministic_algorithms_enabled()  # the next run of the process did not ask for it


@pytest.mark.parametrize(("cores", "given", "expected"), [(2, None, [2]), (64, None, []), (2, "7", [])])
def test_threads_are_the_containers_cores(monkeypatch, cores, given, expected):
    """A container with two of a server's 64 cores: 64 threads on them are ten times slower than two."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    threads = []
    monkeypatch.setattr(device, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    start("cpu")
    assert threads == expected


def test_a_card_does_not_wait_for_background_work():
    """Else a card idles while a mixture is fitted. (What is fitted, and its errors: test_engine.py.)"""
    card = Runtime(torch.device("cuda"))
    assert card.background(threading.get_ident)() != threading.get_ident()


# ---- Precision ----


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_the_default_only_where_it_is_fast_and_fp16_nowhere(monkeypatch, native):
    """Else old hardware emulates bf16, slower than fp32, or new hardware runs at half its speed; fp16 is not proven."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0) if native else (7, 5))
    assert device.computes_bf16(torch.device("cuda", 0)) is native
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, name, lambda: native)
            assert device.computes_bf16(torch.device("cpu")) is native
    monkeypatch.setattr(device, "computes_bf16", lambda _: native)
    assert start("cpu").precision == ("bf16" if native else "fp32")
    assert start("cpu", precision="fp32").precision == "fp32"
    if not native:
        with pytest.warns(DivideMixWarning, match="--precision bf16"):
            assert start("cpu", precision="bf16").precision == "bf16"
    with pytest.warns(DivideMixWarning, match="--precision fp16"):
        assert start("cpu", precision="fp16").precision == "fp16"
    mps(monkeypatch, True)
    for precision in ("bf16", "fp16"):
        with pytest.raises(DivideMixError, match=f"--device mps.*--precision {precision}"):
            start("mps", precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_logits_are_float32_and_of_the_weights_as_they_are_now(precision):
    """Else losses are computed with 8 bits of mantissa, or with autocast's copy of the weights of before an update."""
    runtime = Runtime(CPU, precision)
    net, x, types = runtime.prepare(torch.nn.Conv2d(3, 2, 3, bias=False)), digits_batch(4)[0], []
    net.register_forward_hook(lambda *call: types.append(call[2].dtype))
    [before] = runtime.forward(net, x)
    with torch.no_grad():
        net.weight.mul_(2)
    [after] = runtime.forward(net, x)
    torch.testing.assert_close(after, 2 * before)
    assert after.dtype == net.weight.dtype == torch.float32
    assert types == [{"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)] * 2


def test_gradients_reach_every_parameter_in_all_precisions_and_memory_formats():
    """Else only BN and biases train, as with older autocasts, or a kernel reads the other layout's strides."""
    # Measured: within 0.5 of each norm in bf16, 0.18 in fp16, 0.04 in channels_last; cosine 0.95
    reference = gradients("fp32", layout=torch.contiguous_format)
    for precision, bound, cosine in (("fp32", 0.1, 0.99), ("fp16", 0.3, 0.99), ("bf16", 0.7, 0.9)):
        result = gradients(precision)
        for name, grad in result.items():
            assert grad is not None and grad.dtype == torch.float32 and grad.abs().max() > 0, name
            if grad.dim() > 1:
                assert (grad - reference[name]).norm() < bound * reference[name].norm(), (precision, name)
        flat, expected = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (result, reference))
        assert F.cosine_similarity(flat, expected, dim=0) > cosine
        assert not torch.equal(flat, expected)  # else a layout or precision was compared with itself


# ---- Compilation: on a CPU, where no run uses it, so that it is tested everywhere ----


@pytest.fixture
def no_compilations():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_compilations")
def test_two_nets_and_partial_batches_share_five_compilations(monkeypatch, tiny_images):
    """More cost a minute each on a card; and what they compute is what eager computes."""
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    def phases(compile: bool):
        runtime = Runtime(CPU, merge=True, compile=compile, eval_batch_size=16)
        torch.manual_seed(0)
        nets, data, terms = [runtime.prepare(small_net()) for _ in range(2)], placed(runtime, tiny_images), []
        optimizers = [runtime.optimizer(net, 0.02, 5e-4) for net in nets]
        for epoch in range(2):
            for k, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                phase = Phase(3, np.random.default_rng([epoch, k]))
                engine.per_sample_loss(net, data)
                terms.append(engine.warmup_epoch(net, optimizer, data, SETTINGS, phase))
                terms.append(engine.train_epoch(net, nets[1 - k], optimizer, data, half(24), SETTINGS, phase))
            engine.test(nets, {"test": data})
        assert runtime.compile == compile
        return terms, [net.state_dict() for net in nets]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.testing.assert_close(phases(compile=True), phases(compile=False), rtol=1e-3, atol=1e-4)
    assert len(compiled) == 5


# ---- Optimiser ----


def test_a_learning_rate_tensor_is_changed_in_place_and_restored():
    """A captured step reads the rate at its address: a new tensor would leave it at the old rate for ever."""
    net = torch.nn.Linear(2, 2)
    captured, eager = Runtime(CPU, graph=True).optimizer(net, 0.5, 0.0), Runtime(CPU).optimizer(net, 0.25, 0.0)
    rate = captured.param_groups[0]["lr"]
    assert set_learning_rate([captured, eager], 0.125) == 0.125
    assert captured.param_groups[0]["lr"] is rate and rate.item() == 0.125
    assert eager.param_groups[0]["lr"] == 0.125
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (captured, eager)]
    for optimizer, state in ((captured, states[1]), (eager, states[0])):
        set_learning_rate([captured, eager], 0.0625)
        load_optimizer(optimizer, state)
        assert optimizer.param_groups[0]["lr"] == 0.125
    assert captured.param_groups[0]["lr"] is rate and isinstance(eager.param_groups[0]["lr"], float)


def test_momentum_takes_the_layout_and_the_kernel_of_this_runtime():
    """A checkpoint from a machine with another memory format or device: SGD would scramble its momentum."""
    first = ResNet18(3, width=8)
    nets = [first, copy.deepcopy(first).to(memory_format=torch.channels_last)]
    optimizers = [Runtime(CPU).optimizer(net, 0.1, 5e-4) for net in nets]
    x = torch.randn(4, 3, 16, 16)
    for net, optimizer in zip(nets, optimizers, strict=True):
        engine.update(optimizer, net(x).square().mean())
    state = optimizers[1].state_dict()
    state["param_groups"][0]["fused"] = False  # as mps writes it
    nets[0].load_state_dict(nets[1].state_dict())
    load_optimizer(optimizers[0], state)
    assert optimizers[0].param_groups[0]["fused"] is True
    for parameter in nets[0].parameters():
        assert optimizers[0].state[parameter]["momentum_buffer"].stride() == parameter.stride()
    for net, optimizer in zip(nets, optimizers, strict=True):
        engine.update(optimizer, net(x).square().mean())
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
