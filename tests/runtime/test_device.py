"""How a run is run: the device that is chosen and what is said of it, precision, and the optimiser."""

import functools
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers.nets import CPU, digits_batch, golden_weights, gradients

import PreResNet
from dividemix import DivideMixError, DivideMixWarning, engine
from dividemix.runtime import device as runtime
from dividemix.runtime.device import Runtime


def mps(monkeypatch, available: bool) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: available))  # cached, as torch's


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """One rank, and no card unless a test says so, whatever machine the tests run on."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mps(monkeypatch, False)
    monkeypatch.setattr(runtime, "unusable_card", lambda: None)


def with_cards(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


# ---- Device ----


def test_auto_takes_the_card_then_mps_then_the_cpu(monkeypatch):
    """Else a machine with a GPU trains on its CPU, or one without a GPU cannot train."""
    assert runtime.pick_device("auto", 0) == CPU
    mps(monkeypatch, True)
    assert runtime.pick_device("auto", 0) == torch.device("mps")
    assert runtime.pick_device("cpu", 0) == CPU
    with_cards(monkeypatch, 2)
    assert runtime.pick_device("auto", 1) == torch.device("cuda", 1)
    assert runtime.pick_device("cuda", 0) == torch.device("cuda", 0)
    assert runtime.pick_device("mps", 0) == torch.device("mps")
    assert runtime.pick_device("cpu", 0) == CPU


def test_a_card_that_is_not_there_is_refused(monkeypatch):
    """Else --gpuid 5 dies with a CUDA stack trace, or a job runs on a card that belongs to somebody else."""
    with_cards(monkeypatch, 2)
    with pytest.raises(DivideMixError, match="--gpuid 2: this machine has 2 CUDA cards"):
        runtime.pick_device("auto", 2)


@pytest.mark.parametrize(("device", "reason"), [("cuda", "no CUDA card here"), ("mps", "not available here")])
def test_a_device_that_was_asked_for_is_not_replaced(device, reason):
    """Else `--device cuda` quietly trains for days on the CPU."""
    with pytest.raises(DivideMixError, match=f"--device {device}: .*{reason}.*--device cpu"):
        runtime.pick_device(device, 0)


def test_a_card_that_torch_cannot_use_is_a_loud_warning(monkeypatch):
    """Else a user with a GPU and an old driver waits days for what takes minutes, and never learns why."""
    monkeypatch.setattr(runtime, "unusable_card", lambda: "the driver is too old")
    with pytest.warns(DivideMixWarning, match=r"GPU.*NOT USED.*SLOW.*the driver is too old"):
        assert runtime.pick_device("auto", 0) == CPU
    with pytest.raises(DivideMixError, match="--device cuda: the driver is too old"):
        runtime.pick_device("cuda", 0)


def test_why_a_card_cannot_be_used(monkeypatch, tmp_path):
    """Else the advice is wrong: a new torch build and a new driver mend different faults, and a machine without any
    NVIDIA driver must not be told of one."""
    monkeypatch.undo()
    proc = tmp_path / "version"
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    assert runtime.unusable_card(proc) is None
    proc.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 2021\n")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    problem = runtime.unusable_card(proc)
    assert "CUDA 13.0" in problem and "update the driver" in problem and "\n" not in problem
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU-only build" in runtime.unusable_card(proc)
    proc.unlink()  # as under WSL, where the driver shows only as nvidia-smi
    monkeypatch.setattr(runtime.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "CPU-only build" in runtime.unusable_card(proc)


def test_a_batch_that_the_ranks_do_not_divide_is_refused(monkeypatch):
    """Else ranks would take batches of other sizes and wait for each other for ever."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DivideMixError, match=r"--batch_size 64 .* 3 ranks do not divide it.* 66"):
        runtime.start("cpu", batch_size=64)


# ---- Precision ----


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_bf16_only_where_it_is_fast(monkeypatch, native, chosen):
    """Else an old CPU or card emulates bf16 and is slower than in fp32, or a new one runs at half its speed."""
    monkeypatch.setattr(runtime, "computes_bf16", lambda _: native)
    assert runtime.start("cpu").precision == chosen
    assert runtime.start("cpu", precision="fp32").precision == "fp32"


def test_bf16_without_units_is_warned_of_and_on_mps_refused(monkeypatch):
    """Else the user who asks for the fast mode gets the slow one, or a stack trace from deep inside torch."""
    monkeypatch.setattr(runtime, "computes_bf16", lambda _: False)
    with pytest.warns(DivideMixWarning, match="no bf16 units"):
        assert runtime.start("cpu", precision="bf16").precision == "bf16"
    mps(monkeypatch, True)
    with pytest.raises(DivideMixError, match="mps: neither --precision bf16"):
        runtime.start("mps", precision="bf16")


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_cards_before_sm80_have_no_bf16_units(monkeypatch, capability, native):
    """Else a T4 or V100 trains in emulated bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert runtime.computes_bf16(torch.device("cuda", 0)) is native


def test_deterministic_switches_torch_to_deterministic_kernels(monkeypatch):
    """Else reruns with --deterministic differ in the last digits, and nobody is told."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a user's own choice stays
    try:
        runtime.start("cpu", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_describe_names_device_precision_and_torch():
    """Else a log does not tell which arithmetic its numbers come from."""
    assert "fp32" in Runtime(CPU).describe() and "bf16" in Runtime(CPU, "bf16").describe()
    assert torch.__version__ in Runtime(CPU).describe() and "cpu" in Runtime(CPU).describe()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_float32_in_both_precisions(precision):
    """Else softmax, sharpening and losses are computed with 8 bits of mantissa."""
    machine = Runtime(CPU, precision)
    net = machine.prepare(PreResNet.ResNet18(10, 4))
    seen = []
    net.layer1[0].conv1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    assert machine.forward(net, digits_batch(4)[0])[0].dtype == torch.float32
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]  # and the body in what was asked for
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    plain = torch.nn.Conv2d(3, 2, 1)  # a net whose own last layer runs in bf16
    assert machine.forward(plain, digits_batch(4)[0])[0].dtype == torch.float32


def test_each_forward_sees_the_weights_as_they_are_now():
    """Autocast keeps cast weights as long as its block lasts. Two forwards in one block would share them, and the
    second would compute with the weights from before the update: peer and net would be stale, without any error."""
    machine = Runtime(CPU, "bf16")
    net = machine.prepare(torch.nn.Conv2d(3, 2, 3, bias=False))
    x = digits_batch(4)[0]
    [before] = machine.forward(net, x)
    with torch.no_grad():
        net.weight.mul_(2)
    torch.testing.assert_close(machine.forward(net, x)[0], 2 * before)


def test_bf16_gradients_reach_every_parameter_and_are_those_of_fp32():
    """Else only BN and biases train: older autocasts hand the cast weights of a forward without gradients to the next
    forward in their block, where they then get none (torch 2.14 no longer does). Bounds: over all parameters a cosine
    above 0.9 (measured 0.95: rounding flips ReLUs all the way down), each weight within 0.7 of its norm (0.5)."""
    reference, bf16 = gradients("fp32"), gradients("bf16")
    for name, grad in bf16.items():
        assert grad is not None and grad.dtype == torch.float32 and grad.abs().max() > 0, name
        if grad.dim() > 1:
            assert (grad - reference[name]).norm() < 0.7 * reference[name].norm(), name
    flat, flat_reference = (torch.cat([g.flatten() for g in grads.values()]) for grads in (bf16, reference))
    assert F.cosine_similarity(flat, flat_reference, dim=0) > 0.9
    assert not torch.equal(flat, flat_reference)  # else fp32 was compared with itself


def test_channels_last_gradients_are_those_of_the_contiguous_layout():
    """A kernel that reads the other layout's strides trains on scrambled gradients. Bounds: 0.1 in fp32 (measured 0.04:
    on a CPU, channels_last BN sums less exactly, and rounding flips ReLUs), 0.7 in bf16 as above."""
    reference = gradients("fp32", layout=torch.contiguous_format)
    for precision, bound in (("fp32", 0.1), ("bf16", 0.7)):
        for name, grad in gradients(precision).items():
            if grad.dim() > 1:
                assert (grad - reference[name]).norm() < bound * reference[name].norm(), (precision, name)


# ---- Speed ----


def card_that_computes(monkeypatch):
    """start() as on a card of today, as far as it asks the card."""
    with_cards(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")


def test_a_card_compiles_and_captures_unless_told_not_to(monkeypatch):
    """Else the flags do nothing, or the fast way is one that has to be known of; and TF32 would make fp32 no
    reference."""
    card_that_computes(monkeypatch)
    machine = runtime.start("cuda")
    assert (machine.precision, machine.compile, machine.graph, machine.merge) == ("bf16", True, True, True)
    assert "bf16" in machine.describe() and "compiled, CUDA graphs" in machine.describe()
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    plain = runtime.start("cuda", precision="fp32", compile=False, graph=False)
    assert not plain.compile and not plain.graph and not plain.merge
    assert "TF32 off; torch" in plain.describe()


def test_deterministic_runs_are_not_compiled(monkeypatch):
    """Inductor chooses kernels by timing them: two runs could compute with different ones."""
    card_that_computes(monkeypatch)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        machine = runtime.start("cuda", deterministic=True)
        assert not machine.compile and machine.graph and not torch.backends.cudnn.benchmark
        runtime.start("cpu")
        assert not torch.are_deterministic_algorithms_enabled()  # the next run of the process did not ask for it
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_cpu_neither_compiles_nor_captures():
    """There, compiling costs a minute and measured no faster, and there is nothing to capture."""
    machine = runtime.start("cpu")
    assert not machine.compile and not machine.graph and not machine.merge


@pytest.mark.parametrize(
    ("cores", "environment", "expected"), [(2, {}, [2]), (64, {}, []), (2, {"OMP_NUM_THREADS": "7"}, [])]
)
def test_threads_are_the_containers_cores(monkeypatch, cores, environment, expected):
    """A container with two of a server's 64 cores: 64 threads on them are ten times slower than two."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(runtime, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    runtime.start("cpu")
    assert asked == expected


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_background_work_gives_its_result_or_its_error(kind):
    """A mixture that cannot be fitted must end the run with its own message, wherever it was fitted."""
    machine = Runtime(torch.device(kind))
    here = threading.get_ident()
    assert (machine.background(threading.get_ident)() == here) == (kind == "cpu")

    def fail():
        raise DivideMixError("all losses are equal")

    with pytest.raises(DivideMixError, match="all losses are equal"):
        machine.background(fail)()


# ---- Optimiser ----


def test_a_learning_rate_tensor_is_changed_in_place_and_restored():
    """A captured step reads the rate at its address: a new tensor would leave it at the old rate for ever."""
    net = torch.nn.Linear(2, 2)
    captured, eager = Runtime(CPU, graph=True).optimizer(net, 0.5, 0.0), Runtime(CPU).optimizer(net, 0.25, 0.0)
    rate = captured.param_groups[0]["lr"]
    engine.set_learning_rate([captured, eager], 0.125)
    assert captured.param_groups[0]["lr"] is rate and rate.item() == 0.125
    assert eager.param_groups[0]["lr"] == 0.125 and isinstance(eager.param_groups[0]["lr"], float)
    engine.set_learning_rate([eager], 0.0625)
    states = captured.state_dict(), eager.state_dict()
    runtime.load_optimizer(captured, states[1])
    assert captured.param_groups[0]["lr"] is rate and rate.item() == 0.0625
    rate.fill_(0.5)
    runtime.load_optimizer(eager, states[0])
    assert eager.param_groups[0]["lr"] == 0.5 and isinstance(eager.param_groups[0]["lr"], float)


def test_sgd_is_the_papers_without_nesterov():
    """Else the update is another one than the paper's, which shows only as a slightly other accuracy."""
    optimizer = Runtime(CPU).optimizer(torch.nn.Linear(2, 2), lr=0.02, weight_decay=5e-4)
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.9, 5e-4)
        assert (group["nesterov"], group["dampening"], group["maximize"]) == (False, 0, False)


def test_momentum_and_decay_by_hand():
    """Else the fused update computes something else than v = 0.9 v + (g + decay p); p = p - lr v."""
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    net = torch.nn.Module()
    net.register_parameter("p", parameter)
    optimizer = Runtime(CPU).optimizer(net, lr=0.1, weight_decay=0.5)
    p, v = 2.0, 0.0
    for g in (1.0, -3.0, 0.25):
        parameter.grad = torch.tensor([g])
        optimizer.step()
        v = 0.9 * v + g + 0.5 * p
        p -= 0.1 * v
        assert parameter.item() == pytest.approx(p, rel=1e-6)


def test_weight_decay_reaches_bn_and_biases():
    """The authors decay every parameter; excluding BN and biases, as many codes do, is another method."""
    machine = Runtime(CPU)
    net = machine.prepare(golden_weights(PreResNet.ResNet18(10, 4), seed=0))
    optimizer = machine.optimizer(net, lr=0.02, weight_decay=5e-4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    names = {name.split(".")[-1] for name in before}
    assert names == {"weight", "bias"} and any("bn" in name for name in before)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.02 * 5e-4), rtol=1e-6, atol=0)
        assert (parameter.detach().abs() < before[name].abs()).all(), name


def test_a_raised_flag_stops_weights_and_momentum():
    """Else the first non-finite gradient destroys a net that was sound, before anybody can look."""
    net = torch.nn.Linear(3, 1)
    optimizer = Runtime(CPU).optimizer(net, lr=0.1, weight_decay=0.0)
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    momentum = [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in net.parameters()]
    net.weight.grad.fill_(torch.nan)
    optimizer.found_inf.fill_(1)
    optimizer.step()
    for parameter, old, buffer in zip(net.parameters(), before, momentum, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)


def test_convolutions_are_channels_last():
    """Else bf16 convolutions run in the slow memory format, two times slower on a card."""
    net = Runtime(CPU, memory_format=torch.channels_last).prepare(PreResNet.ResNet18(10, 4))
    assert net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_narrow_networks_are_contiguous_on_a_cpu(monkeypatch):
    """Else its vector units are half empty, and below 8 channels torch writes out of bounds in the backward pass."""
    layouts = [runtime.start("cpu", width=width).memory_format for width in (4, 15, 16)]
    assert layouts == [torch.contiguous_format, torch.contiguous_format, torch.channels_last]
    assert Runtime().memory_format == torch.contiguous_format
    card_that_computes(monkeypatch)
    assert runtime.start("cuda", width=4).memory_format == torch.channels_last


def test_momentum_takes_the_layout_and_the_kernel_of_this_machine():
    """A checkpoint from a machine with another memory format or device: SGD would scramble its momentum."""
    torch.manual_seed(0)
    here, there = (PreResNet.ResNet18(3, width=8) for _ in range(2))
    there.load_state_dict(here.state_dict())
    there = there.to(memory_format=torch.channels_last)
    optimizers = [Runtime(CPU).optimizer(net, 0.1, 5e-4) for net in (here, there)]
    x = torch.randn(4, 3, 16, 16)
    for net, optimizer in zip((here, there), optimizers, strict=True):
        engine.update(optimizer, net(x).square().mean())
    state = optimizers[1].state_dict()
    state["param_groups"][0]["fused"] = False  # as mps writes it
    here.load_state_dict(there.state_dict())
    runtime.load_optimizer(optimizers[0], state)
    assert optimizers[0].param_groups[0]["fused"] is True
    for parameter in here.parameters():
        assert optimizers[0].state[parameter]["momentum_buffer"].stride() == parameter.stride()
    for net, optimizer in zip((here, there), optimizers, strict=True):
        engine.update(optimizer, net(x).square().mean())
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
