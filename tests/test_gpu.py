"""On a CUDA card (`make gpu`): the reference is the same there, nothing synchronises, a captured step is the eager one,
and a run continues exactly."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers.captured import digits, state, train
from helpers.captured import start as start_nets
from helpers.nets import golden_step, golden_weights, gradients, half, placed
from helpers.runs import assert_equal, last_state, read_records
from helpers.runs import train as train_script
from helpers.scripts import CLOTHING1M, ROOT, WEBVISION
from helpers.trees import make_folder, make_webvision

import dataloader_webvision
import Train_folder
from dividemix import DivideMixError, DivideMixWarning, engine
from dividemix.data.images import Views
from dividemix.data.stream import Pipeline
from dividemix.engine import MixMatch, Phase
from dividemix.run.checkpoint import to_host
from dividemix.runtime import device, graph
from dividemix.runtime.device import Runtime, start
from PreResNet import ResNet18

pytestmark = pytest.mark.gpu

# torch reads it once, at the first matrix product of the process: else --deterministic fails in all later tests.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def settings():
    """No TF32, whatever ran before. A capture or compilation that fails is a warning to the user, and an error here."""
    start("cuda", precision="fp32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the run goes on without it", category=DivideMixWarning)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def runtime() -> Runtime:
    return start("cuda", precision="fp32", graph=False, compile=False)


@pytest.fixture
def exact(settings):
    """cuDNN's and cuBLAS' deterministic algorithms, so that equal means bit for bit."""
    start("cuda", precision="fp32", deterministic=True)


SIZE = 167  # `train` labels 94: 22 full steps of 4, one where the unlabeled set ends, and one of two images


def card(**options) -> Runtime:
    return Runtime(torch.device("cuda", 0), **options)


# ---- The reference ----


@pytest.mark.parametrize(
    ("name", "num_class", "lr", "weight_decay", "unlabeled_loss"),
    [("cifar", 10, 0.02, 5e-4, True), ("webvision", 50, 0.01, 5e-4, False), ("clothing1M", 14, 0.002, 1e-3, False)],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_golden_step(precision, name, num_class, lr, weight_decay, unlabeled_loss):
    """TF32, another order of the forwards, or a loss scale whose first step overflows, where results are made."""
    runtime, loss = card(precision=precision), 1e-4 if precision == "fp32" else 1e-3
    golden, net, terms = golden_step(name, num_class, lr, weight_decay, runtime, unlabeled_loss=unlabeled_loss)
    assert terms.loss.item() == pytest.approx(golden["loss"][0], rel=loss)
    for key, norm in zip(golden["keys"], golden["param_norm"], strict=True):
        assert net.state_dict()[key].double().norm().item() == pytest.approx(norm, rel=2e-4, abs=1e-12)


def test_bf16_gradients_reach_every_parameter():
    """The card may have an older torch, whose autocast hands the guesses' cast weights to the training forward."""
    reference, bf16 = gradients("fp32", torch.device("cuda", 0)), gradients("bf16", torch.device("cuda", 0))
    for name, grad in bf16.items():
        assert grad is not None and grad.abs().max() > 0, name
        if grad.dim() > 1:
            assert (grad - reference[name]).norm() < 0.7 * reference[name].norm(), name


@pytest.mark.parametrize(
    ("precision", "merge", "strong"), [("bf16", False, False), ("bf16", True, True), ("fp16", True, False)]
)
def test_no_host_sync_in_a_step(tiny_images, precision, merge, strong):
    """A single sync in a step makes the card wait for Python 391 times an epoch."""
    runtime = card(precision=precision, merge=merge)
    net, peer = (runtime.prepare(golden_weights(ResNet18(3, width=8), seed)) for seed in (2, 3))
    optimizer = runtime.optimizer(net, 0.02, 5e-4)
    data = placed(runtime, tiny_images)
    data.strong = strong
    batch = next(iter(data.mixmatch_batches(half(24), 4, np.random.default_rng(0))))
    lam, index = torch.tensor(0.7, device=runtime.device), torch.randperm(16).to(runtime.device)
    arguments = {"lam": lam, "index": index, "T": 0.5, "lambda_u": lam, "num_class": 3, "forward": runtime.forward}

    def step() -> None:
        views = data.mixmatch_views(*batch)
        engine.mixmatch_step(net, peer, optimizer, *views[:6], strong=views[6:], **arguments)

    step()  # first-call set-up may sync
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        x, labels = data.warmup_views(batch[0], batch[2][: len(batch[0])])
        engine.warmup_step(net, optimizer, x, labels, conf_penalty=True, forward=runtime.forward)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_epoch_on_the_card_draws_what_the_cpu_draws(tiny_images, runtime):
    """Draws that depend on the device would make a result of one machine impossible to check on another."""
    losses = []
    mixmatch = MixMatch(3, batch_size=4, lambda_u=8.0, warm_up=1)
    for host_or_card in (start("cpu", precision="fp32"), runtime):
        net, peer = (host_or_card.prepare(golden_weights(ResNet18(3, width=8), seed)) for seed in (2, 3))
        optimizer, data = host_or_card.optimizer(net, 1e-3, 5e-4), placed(host_or_card, tiny_images)
        losses.append(engine.train_epoch(net, peer, optimizer, data, half(24), mixmatch, Phase(epoch=3)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


# ---- Captured steps ----


@pytest.mark.parametrize(
    ("precision", "merge", "strong"), [("fp32", False, False), ("fp32", True, True), ("fp16", True, False)]
)
def test_graph_equals_eager_step_by_step(exact, monkeypatch, precision, merge, strong):
    """Whatever froze in the graph, or was left by the runs before the capture, shows in weights and momentum."""
    monkeypatch.setattr(device, "FIRST_SCALE", 2.0**23)  # in fp16 the first gradients overflow
    eager, replayed = (card(precision=precision, merge=merge, graph=on) for on in (False, True))
    runs = [start_nets(eager), start_nets(replayed)]
    sets = [digits(SIZE, runtime, strong) for runtime in (eager, replayed)]
    for epoch in range(2):
        terms = [train(data, [epoch], *run) for data, run in zip(sets, runs, strict=True)]
        assert terms[0] == terms[1]
        assert_equal(state(*runs[0]), state(*runs[1]))
    assert len(replayed.steps) == 4
    assert all(isinstance(step, graph.CapturedStep) for step in replayed.steps.values())


def test_bf16_graph_and_compiled_step_stay_near_eager_fp32():
    """Compiled, captured, bf16: the run as users start it must train as the reference, and divide the same samples."""
    fast = card(precision="bf16", merge=True, compile=True, graph=True, eval_batch_size=80)
    terms = [train(digits(SIZE, runtime), [0], *start_nets(runtime)) for runtime in (card(), fast)]
    assert fast.compile and fast.graph
    for reference, result in zip(*terms, strict=True):
        assert result.loss == pytest.approx(reference.loss, rel=0.15)
    eager, compiled = (card(compile=on, eval_batch_size=80) for on in (False, True))
    nets, _ = start_nets(eager)
    scores = [engine.per_sample_loss(nets[0], digits(SIZE, runtime)).loss for runtime in (eager, compiled)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_a_non_finite_loss_stops_replayed_updates_too():
    """The flag must be read by the captured optimiser, or a graph trains on NaN to the end of the epoch."""
    runtime = card(graph=True)
    nets, optimizers = start_nets(runtime)
    data = digits(SIZE, runtime)
    train(data, [0], nets, optimizers)
    data.mean.fill_(torch.nan)
    tensors = [*nets[0].parameters(), *(state["momentum_buffer"] for state in optimizers[0].state.values())]
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(DivideMixError, match="batch 1 of"):
        train(data, [1], nets, optimizers)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


# ---- A run ----


@pytest.mark.parametrize("flags", [(), ("--no_graph",)])
def test_interrupted_equals_uninterrupted(tmp_path, flags):
    """The promise for one GPU model with --deterministic. A continued run captures its steps anew."""
    cuda = ("--device", "cuda", "--deterministic", *flags)
    train_script(tmp_path / "straight", 3, *cuda)
    for epochs in (1, 2, 3):
        train_script(tmp_path / "stopped", epochs, *cuda)
    assert_equal(last_state(tmp_path / "straight"), last_state(tmp_path / "stopped"))


@pytest.mark.parametrize("flags", [(), ("--augment", "strong", "--ema", "0.9")])
def test_a_run_as_users_start_it(tmp_path, capsys, flags):
    """Compiled, captured and in bf16, without a fallback."""
    final = train_script(tmp_path / "run", 3, "--device", "cuda", *flags)
    assert "bf16 autocast, losses in fp32, compiled, CUDA graphs" in capsys.readouterr().out
    assert np.isfinite(final["loss_x"])


# ---- Large images ----


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """56 JPEGs of 10 classes."""
    return dataloader_webvision.load(make_webvision(tmp_path_factory.mktemp("photos"), n_train=56, num_class=10), 10)


def streams(data, runtime: Runtime, **options) -> Pipeline:
    return Pipeline({"train": data.train}, Views(40, 32), data.mean, data.std, runtime, workers=1, **options)


@pytest.mark.parametrize("keep", ["host", "device", "no"])
def test_streamed_batches_are_those_of_a_cpu(photos, keep):
    """Pinned memory that is used again before its copy has ended, or a crop that is cut otherwise on the card."""
    results = []
    for runtime, keep_images in ((Runtime(), "no"), (card(), keep)):
        tensors = []
        with streams(photos, runtime, keep=keep_images) as pipeline:
            data = pipeline.images("train", keep=True)
            for _ in range(3):
                passes = data.eval_batches(20), data.mixmatch_batches(half(56, 40), 8, np.random.default_rng(0))
                tensors += [tensor.cpu() for batches in passes for batch in batches for tensor in batch]
        results.append(tensors)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)  # the card divides by another rounding


@pytest.mark.parametrize("keep", ["host", "device", "no"])
def test_a_captured_step_takes_streamed_batches(photos, exact, keep):
    """A graph that reads the memory of the first batch trains on one batch all epoch long."""
    results = []
    for runtime in (card(), card(graph=True)):
        nets, optimizers = start_nets(runtime)
        with streams(photos, runtime, keep=keep) as pipeline:
            for epoch in range(2):
                data = pipeline.images("train", np.arange(epoch, 54 + epoch), keep=True)
                terms = train(data, [epoch], nets, optimizers)
        results.append(state(nets, optimizers))
        assert np.isfinite(terms).all()
    assert len(runtime.steps) == 4  # each net's two steps, captured once
    assert_equal(*results)


@pytest.mark.parametrize(
    ("script", "arch", "compiled"),
    [(CLOTHING1M, "resnet50", True), (WEBVISION, "inceptionresnetv2", False)],  # that one compiles for minutes
    ids=["Clothing1M", "WebVision"],
)
def test_the_image_scripts_as_users_start_them(tmp_path, script, arch, compiled, capsys):
    """Compiled, captured and in bf16, without a fallback, with the paper's networks."""
    flags = ["--data_path", str(script.make(tmp_path / "data")), *script.size, "--arch", arch, "--weights", "none"]
    flags += ["--image_size", "112", "--batch_size", "8", "--num_epochs", "3", "--device", "cuda", "--workers", "2"]
    flags += [] if compiled else ["--no_compile"]
    final = script.main.main([*flags, "--out_dir", str(tmp_path)])
    faster = "compiled, CUDA graphs" if compiled else "CUDA graphs"
    assert f"bf16 autocast, losses in fp32, {faster};" in capsys.readouterr().out
    assert np.isfinite(final["loss_x"])


@pytest.mark.parametrize(("arch", "mode"), [("mobilenet_v3_small", "device"), ("preresnet18", "stream")])
def test_own_images_as_users_start_them(tmp_path, arch, mode, capsys):
    """Networks of torchvision's, with layers that draw, compiled and captured; interrupted is uninterrupted."""
    side = {"preresnet18": "32", "mobilenet_v3_small": "64"}[arch]
    flags = ["--data_path", str(make_folder(tmp_path / "data")), "--arch", arch, "--weights", "none", "--warm_up", "1"]
    flags += ["--image_size", side, "--data_mode", mode, "--device", "cuda", "--workers", "2", "--lr", "0.001"]
    for name, epochs in (("straight", "3"), ("stopped", "1"), ("stopped", "3")):
        run = ["--deterministic", "--num_epochs", epochs, "--run_dir", str(tmp_path / name)]
        assert np.isfinite(Train_folder.main([*flags, *run])["loss_x"])
    assert_equal(last_state(tmp_path / "straight"), last_state(tmp_path / "stopped"))
    capsys.readouterr()
    Train_folder.main([*flags, "--num_epochs", "2", "--run_dir", str(tmp_path / "fast")])
    assert "bf16 autocast, losses in fp32, compiled, CUDA graphs" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_two_cards_train_together(tmp_path):
    """NCCL: from one start, two cards make the first division of one."""
    flags = ["--data_path", str(make_folder(tmp_path / "data")), "--data_mode", "stream", "--arch", "preresnet18"]
    flags += ["--weights", "none", "--image_size", "32", "--batch_size", "8", "--warm_up", "0", "--num_epochs", "2"]
    flags += ["--precision", "fp32", "--save_scores"]
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2"])):
        command = [sys.executable, *launcher, str(ROOT / "Train_folder.py"), *flags, "--run_dir", str(tmp_path / name)]
        subprocess.run(command, check=True, timeout=600)
    records = [read_records(tmp_path / name) for name in ("one", "two")]
    assert len(records[0]) == len(records[1]) == 2 and np.isfinite(records[1][1]["loss_x"])
    scores = [np.load(tmp_path / name / "scores" / "epoch_000.npz") for name in ("one", "two")]
    for name in ("clean_probability_net1", "clean_probability_net2"):  # before anything is trained
        np.testing.assert_allclose(scores[0][name], scores[1][name], atol=1e-3)


def test_a_batch_of_a_new_size_is_not_autotuned():
    """cuDNN tries each of its kernels for each convolution of a new size: 2.4 s in two epochs of three."""
    runtime = start("cuda", precision="bf16", compile=False, graph=False)
    net = runtime.prepare(ResNet18(10, width=8)).train()
    optimizer = runtime.optimizer(net, 0.02, 5e-4)

    def step(forward, x):
        [logits] = forward(net, x)
        engine.update(optimizer, logits.square().mean())
        return logits

    launched = []
    for rows in (17, 17, 19, 23):  # the first sets up more than convolutions
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            runtime.run_partial(step, [torch.randn(rows, 3, 32, 32, device=runtime.device)])
            torch.cuda.synchronize()
        # Kernels alone: calls of the host, of which a new plan makes thousands, are events, too.
        launched.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))
    assert max(launched[2:]) < 1.5 * launched[1]
    assert torch.backends.cudnn.benchmark


def test_a_state_is_copied_to_pinned_memory_and_again_to_the_same():
    """Else each epoch's end waits for a copy that is several times slower; or, asynchronous, for none at all."""
    state = {"w": torch.randn(64, 3, 3, 3, device="cuda").to(memory_format=torch.channels_last)}
    first = to_host(state)
    expected = state["w"].cpu()
    assert first["w"].is_pinned() and torch.equal(first["w"], expected) and first["w"].stride() == state["w"].stride()
    state["w"].add_(1)
    second = to_host(state, first)
    assert second["w"] is first["w"] and torch.equal(second["w"], expected + 1)


# The last test: a capture that fails leaves torch's allocator and generator as if it still went on.
def test_a_failed_capture_leaves_an_eager_run():
    """What cannot be captured must cost speed, not the run: the next steps are eager, on the usual stream."""
    runtime = card(graph=True)
    nets, optimizers = start_nets(runtime)
    data = digits(SIZE, runtime)
    hook = nets[0].register_forward_hook(lambda _, inputs, logits: logits.sum().item() and None)  # a sync
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivideMixWarning)
        terms = train(data, [0], nets, optimizers)
    hook.remove()
    assert not runtime.graph and torch.cuda.current_stream() == torch.cuda.default_stream()
    eager = card()
    assert np.allclose(terms, train(digits(SIZE, eager), [0], *start_nets(eager)), rtol=1e-2)
    assert not engine.per_sample_loss(nets[0], data).loss.isnan().any()
