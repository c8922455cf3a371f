"""On a CUDA card (`make gpu`): the reference is the same there, nothing synchronises, a captured step is the eager one,
and a run continues exactly."""

import copy
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.captured import SETTINGS, state, train
from helpers.captured import start as start_nets
from helpers.data import colour_digits
from helpers.nets import golden_step, golden_weights, gradients, half, placed
from helpers.runs import assert_equal, last_state, read_records
from helpers.runs import train as train_script
from helpers.scripts import ROOT
from helpers.trees import make_clothing1M, make_folder, make_webvision

import dataloader_webvision
import Train_clothing1M
import Train_folder
import Train_webvision
from dividemix import DivideMixError, DivideMixWarning, engine, runtime
from dividemix.data.device import DeviceImages
from dividemix.data.images import Views
from dividemix.data.stream import Pipeline
from dividemix.engine import MixMatch, Phase
from dividemix.run.checkpoint import to_host
from dividemix.runtime import graph
from dividemix.runtime.device import Runtime, start
from dividemix.runtime.loops import changed_by_step
from PreResNet import ResNet18

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def settings():
    """No TF32, whatever ran before. A capture or compilation that fails is a warning to the user, and an error here."""
    start("cuda", precision="fp32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the run goes on without it", category=DivideMixWarning)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def machine():
    return start("cuda", precision="fp32", graph=False, compile=False)


@pytest.fixture
def exact(settings):
    """cuDNN's and cuBLAS' deterministic algorithms, so that equal means bit for bit."""
    start("cuda", precision="fp32", deterministic=True)


@pytest.fixture
def digits() -> DeviceImages:
    """167 digits on the card, 94 of them labeled by `train`: batches of 4 make 22 full steps, one where the unlabeled
    set ends, and one of two images."""
    images, labels = colour_digits(167)
    return DeviceImages(images[:, ::2, ::2].copy(), labels, (0.5,) * 3, (0.25,) * 3, flip=True, runtime=card())


def card(**how) -> Runtime:
    return Runtime(torch.device("cuda", 0), **how)


# ---- The reference ----


@pytest.mark.parametrize(
    ("name", "num_class", "lr", "weight_decay", "unlabeled_loss"),
    [("cifar", 10, 0.02, 5e-4, True), ("webvision", 50, 0.01, 5e-4, False), ("clothing1M", 14, 0.002, 1e-3, False)],
)
def test_golden_step(machine, name, num_class, lr, weight_decay, unlabeled_loss):
    """TF32, or another order of the forwards, on the machine that results are made on."""
    golden, net, terms = golden_step(name, num_class, lr, weight_decay, machine, unlabeled_loss=unlabeled_loss)
    assert terms.loss.item() == pytest.approx(golden["loss"][0], rel=1e-4)
    for key, norm in zip(golden["keys"], golden["param_norm"], strict=True):
        assert net.state_dict()[key].double().norm().item() == pytest.approx(norm, rel=2e-4, abs=1e-12)


def test_bf16_gradients_reach_every_parameter():
    """The card may have an older torch, whose autocast hands the guesses' cast weights to the training forward."""
    reference, bf16 = gradients("fp32", torch.device("cuda", 0)), gradients("bf16", torch.device("cuda", 0))
    for name, grad in bf16.items():
        assert grad is not None and grad.abs().max() > 0, name
        if grad.dim() > 1:
            assert (grad - reference[name]).norm() < 0.7 * reference[name].norm(), name


@pytest.mark.parametrize("compiled", [False, True])
def test_four_batches_together_are_four_forwards(compiled):
    """Also through Inductor's kernels: values, and running statistics in the official order."""
    torch.manual_seed(0)
    batches = [scale * torch.randn(6, 3, 16, 16, device="cuda") for scale in (1, 2, 3, 4)]
    results = []
    for one in (card(), card(merge=True, compile=compiled)):
        net = one.prepare(golden_weights(ResNet18(5, width=8), seed=0)).train()
        with torch.no_grad():
            logits = (one.compiled_forward if one.compile else one.forward)(net, *batches)
        results.append((torch.cat(logits), *net.buffers()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("merge", [False, True])
def test_no_host_sync_in_a_step(tiny_images, merge):
    """A single sync in a step makes the card wait for Python 391 times an epoch."""
    machine = card(precision="bf16", merge=merge)
    net, peer = (machine.prepare(golden_weights(ResNet18(3, width=8), seed)) for seed in (2, 3))
    optimizer = machine.optimizer(net, 0.02, 5e-4)
    data = placed(machine, tiny_images)
    batch = next(iter(data.mixmatch_batches(half(24), 4, np.random.default_rng(0))))
    lam, index = torch.tensor(0.7, device=machine.device), torch.randperm(16).to(machine.device)
    arguments = {"lam": lam, "index": index, "T": 0.5, "lambda_u": lam, "num_class": 3, "forward": machine.forward}
    engine.mixmatch_step(net, peer, optimizer, *data.mixmatch_views(*batch), **arguments)  # first-call set-up may sync
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.mixmatch_step(net, peer, optimizer, *data.mixmatch_views(*batch), **arguments)
        x, labels = data.warmup_views(batch[0], batch[2][: len(batch[0])])
        engine.warmup_step(net, optimizer, x, labels, conf_penalty=True, forward=machine.forward)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_epoch_on_the_card_draws_what_the_cpu_draws(tiny_images, machine):
    """Draws that depend on the device would make a result of one machine impossible to check on another."""
    losses = []
    mixmatch = MixMatch(3, batch_size=4, lambda_u=8.0, warm_up=1)
    for where in (start("cpu", precision="fp32"), machine):
        net, peer = (where.prepare(golden_weights(ResNet18(3, width=8), seed)) for seed in (2, 3))
        optimizer, data = where.optimizer(net, 1e-3, 5e-4), placed(where, tiny_images)
        losses.append(engine.train_epoch(net, peer, optimizer, data, half(24), mixmatch, Phase(epoch=3)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


# ---- Captured steps ----


@pytest.mark.parametrize("merge", [False, True])
def test_graph_equals_eager_step_by_step(exact, digits, merge):
    """fp32, two nets in turn, a falling learning rate, more than 20 steps and partial batches: weights, statistics and
    momentum bit for bit. Whatever froze in the graph would show."""
    eager, replayed = card(merge=merge), card(merge=merge, graph=True)
    runs = [start_nets(eager), start_nets(replayed)]
    sets = [placed(machine, digits) for machine in (eager, replayed)]
    for epoch in range(2):
        terms = [train(data, [epoch], *run) for data, run in zip(sets, runs, strict=True)]
        assert terms[0] == terms[1]
        assert_equal(state(*runs[0]), state(*runs[1]))
    assert len(replayed.steps) == 4
    assert all(isinstance(step, graph.CapturedStep) for step in replayed.steps.values())


def test_graphs_of_ablations_equal_eager_steps(exact, digits):
    """One view has other shapes, one network no peer: each is another step on the same networks, never another's
    graph."""
    runs = []
    for machine in (card(merge=True), card(merge=True, graph=True)):
        nets, optimizers = start_nets(machine)
        (net, other), data, terms = nets, placed(machine, digits), []
        for peer, refine, views in ((other, True, 2), (net, True, 2), (other, False, 2), (other, True, 1)):
            mixmatch = replace(SETTINGS, batch_size=8, refine=refine, views=views)
            terms.append(engine.train_epoch(net, peer, optimizers[0], data, half(167), mixmatch, Phase(epoch=3)))
        runs.append((terms, state(nets, optimizers)))
    assert len(machine.steps) == 4 and all(isinstance(step, graph.CapturedStep) for step in machine.steps.values())
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


def test_bf16_graph_and_compiled_step_stay_near_eager_fp32(digits):
    """The run as users start it: compiled, captured, bf16. After an epoch its losses are those of the reference."""
    fast = card(precision="bf16", merge=True, compile=True, graph=True)
    terms = [train(placed(one, digits), range(1), *start_nets(one)) for one in (card(), fast)]
    assert fast.compile and fast.graph
    for reference, ours in zip(*terms, strict=True):
        assert ours.loss == pytest.approx(reference.loss, rel=0.15)


def test_compiled_evaluation_equals_eager(digits):
    """A loss that a compiled kernel computes otherwise divides other samples."""
    eager, compiled = (card(compile=on, eval_batch_size=80) for on in (False, True))
    nets, _ = start_nets(eager)
    scores = [engine.per_sample_loss(nets[0], placed(one, digits)).loss for one in (eager, compiled)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_augmentation_differs_between_replays(digits):
    """A crop that froze in the graph shows each network the same few views for 300 epochs."""
    rng = np.random.default_rng(0)
    first, second = list(digits.mixmatch_batches(half(167), 4, rng))[:2]
    captured = graph.CapturedStep(
        lambda *batch: torch.cat(digits.mixmatch_views(*batch)[:2]), first, [], graph.GraphPool()
    )
    one, same_images = captured(*first).clone(), (*first[:2], second[2], first[3])
    other = captured(*same_images).clone()
    assert not torch.equal(one, other)
    torch.testing.assert_close(other, torch.cat(digits.mixmatch_views(*same_images)[:2]))
    torch.testing.assert_close(captured(*first), one)


def test_a_capture_leaves_no_trace(digits):
    """The runs before a capture are steps of training too many, unless all is put back: statistics and momentum too."""
    machine = card(graph=True)
    nets, optimizers = start_nets(machine)
    before = copy.deepcopy(state(nets, optimizers))
    batch = next(iter(digits.warmup_batches(8, np.random.default_rng(0))))

    def step(index, crops):
        terms = engine.warmup_step(
            nets[0], optimizers[0], *digits.warmup_views(index, crops), conf_penalty=False, forward=machine.forward
        )
        return torch.stack(terms)

    captured = graph.CapturedStep(step, batch, changed_by_step(nets[0], optimizers[0]), graph.GraphPool())
    assert_equal(state(nets, optimizers), before)
    captured(*batch)
    assert not torch.equal(nets[0].conv1.weight, before[0]["conv1.weight"])


def test_resumed_capture(exact, digits):
    """A run that is continued captures anew: it must go on as if it had never stopped."""
    straight = card(graph=True)
    nets, optimizers = start_nets(straight)
    data = placed(straight, digits)
    train(data, [0], nets, optimizers)
    kept = copy.deepcopy(state(nets, optimizers))
    train(data, [1], nets, optimizers)
    resumed = card(graph=True)
    others, their_optimizers = start_nets(resumed)
    for net, saved in zip(others, kept[:2], strict=True):
        net.load_state_dict(saved)
    for optimizer, saved in zip(their_optimizers, kept[2:], strict=True):
        runtime.load_optimizer(optimizer, saved)
    train(placed(resumed, digits), [1], others, their_optimizers)
    assert_equal(state(nets, optimizers), state(others, their_optimizers))


def test_a_non_finite_loss_stops_replayed_updates_too(digits):
    """The flag must be read by the captured optimiser, or a graph trains on NaN to the end of the epoch."""
    machine = card(graph=True)
    nets, optimizers = start_nets(machine)
    data = placed(machine, digits)
    train(data, [0], nets, optimizers)
    data.mean.fill_(torch.nan)
    before = [tensor.detach().clone() for tensor in (*nets[0].parameters(), *momentum(optimizers[0]))]
    with pytest.raises(DivideMixError, match="batch 1 of"):
        train(data, [1], nets, optimizers)
    for tensor, old in zip((*nets[0].parameters(), *momentum(optimizers[0])), before, strict=True):
        assert torch.equal(tensor, old)


def test_a_failed_capture_leaves_an_eager_run(digits):
    """What cannot be captured must cost speed, not the run: the next steps are eager, on the usual stream."""
    machine = card(graph=True)
    (nets, optimizers), data = start_nets(machine), placed(machine, digits)
    hook = nets[0].register_forward_hook(lambda _, inputs, logits: logits.sum().item() and None)  # a sync
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivideMixWarning)
        terms = train(data, [0], nets, optimizers)
    hook.remove()
    assert not machine.graph and torch.cuda.current_stream() == torch.cuda.default_stream()
    eager = card()
    others = start_nets(eager)
    expected = train(placed(eager, digits), [0], *others)
    assert np.allclose(terms, expected, rtol=1e-2)
    assert not engine.per_sample_loss(nets[0], data).loss.isnan().any()


def momentum(optimizer):
    return [state["momentum_buffer"] for state in optimizer.state.values()]


# ---- A run ----


@pytest.mark.parametrize("how", [(), ("--no_graph",)])
def test_interrupted_equals_uninterrupted(tmp_path, how):
    """The promise for one GPU model with --deterministic."""
    cuda = ("--device", "cuda", "--deterministic", *how)
    train_script(tmp_path / "straight", 3, *cuda)
    for epochs in (1, 2, 3):
        train_script(tmp_path / "stopped", epochs, *cuda)
    assert_equal(last_state(tmp_path / "straight"), last_state(tmp_path / "stopped"))


def test_a_run_as_users_start_it(tmp_path, capsys):
    """Compiled, captured and in bf16, without a fallback."""
    final = train_script(tmp_path / "run", 3, "--device", "cuda")
    assert "bf16 autocast, losses in fp32, compiled, CUDA graphs" in capsys.readouterr().out
    assert np.isfinite(final["loss_x"])


# ---- Large images ----


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """56 JPEGs of 10 classes."""
    return dataloader_webvision.load(make_webvision(tmp_path_factory.mktemp("photos"), n_train=56, num_class=10), 10)


def streams(data, machine: Runtime, **options) -> Pipeline:
    return Pipeline({"train": data.train}, Views(40, 32), data.mean, data.std, machine, workers=1, **options)


@pytest.mark.parametrize("keep", ["host", "device", "no"])
def test_streamed_batches_are_those_of_a_cpu(photos, keep):
    """Pinned memory that is used again before its copy has ended, or a crop that is cut otherwise on the card."""
    found, expected = [], []
    for machine, where, into in ((Runtime(), "no", expected), (card(), keep, found)):
        with streams(photos, machine, keep=where) as pipeline:
            data = pipeline.images("train", keep=True)
            for _ in range(3):
                passes = data.eval_batches(20), data.mixmatch_batches(half(56, 40), 8, np.random.default_rng(0))
                into += [tensor.cpu() for batches in passes for batch in batches for tensor in batch]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", ["host", "device", "no"])
def test_a_captured_step_takes_streamed_batches(photos, exact, keep):
    """Batches that come from workers are other tensors each time: a graph that reads the first one's memory trains on
    one batch all epoch long. Each epoch draws new images: a step captured for each of them fills the card."""
    results = {}
    for how in ("eager", "graph"):
        machine = card(graph=how == "graph")
        nets, optimizers = start_nets(machine)
        with streams(photos, machine, keep=keep) as pipeline:
            for epoch in range(2):
                data = pipeline.images("train", np.arange(epoch, 54 + epoch), keep=True)
                terms = train(data, [epoch], nets, optimizers)
        results[how] = state(nets, optimizers)
        assert np.isfinite(terms).all()
    assert len(machine.steps) == 4  # each net's two steps, captured once
    assert_equal(results["graph"], results["eager"])


@pytest.mark.parametrize("script", [Train_clothing1M, Train_webvision])
@pytest.mark.parametrize("arch", ["preresnet18", "resnet50", "inceptionresnetv2"])
def test_the_image_scripts_as_users_start_them(tmp_path, script, arch, capsys):
    """Compiled, captured and in bf16, without a fallback, with the paper's networks too."""
    if script is Train_clothing1M:
        flags = ["--data_path", str(make_clothing1M(tmp_path / "data")), "--num_batches", "4"]
    else:
        flags = ["--data_path", str(make_webvision(tmp_path / "data")), "--num_class", "10"]
    flags += ["--arch", arch, "--weights", "none", "--image_size", "112", "--batch_size", "8", "--num_epochs", "3"]
    final = script.main([*flags, "--device", "cuda", "--workers", "2", "--out_dir", str(tmp_path)])
    assert "bf16 autocast, losses in fp32, compiled, CUDA graphs" in capsys.readouterr().out
    assert np.isfinite(final["loss_x"])


@pytest.mark.parametrize("mode", ["device", "stream"])
@pytest.mark.parametrize("arch", ["preresnet18", "mobilenet_v3_small"])
def test_own_images_as_users_start_them(tmp_path, arch, mode, capsys):
    """Networks of torchvision's, with layers that draw, compiled and captured; interrupted is uninterrupted."""
    side = {"preresnet18": "32", "mobilenet_v3_small": "64"}[arch]
    flags = ["--data_path", str(make_folder(tmp_path / "data")), "--arch", arch, "--weights", "none", "--warm_up", "1"]
    flags += ["--image_size", side, "--data_mode", mode, "--device", "cuda", "--workers", "2", "--lr", "0.001"]
    for name, epochs in (("straight", "3"), ("stopped", "1"), ("stopped", "3")):
        final = Train_folder.main(
            [*flags, "--deterministic", "--num_epochs", epochs, "--run_dir", str(tmp_path / name)]
        )
        assert np.isfinite(final["loss_x"])
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
    for k in (1, 2):  # before anything is trained
        a, b = (each[f"clean_probability_net{k}"] for each in scores)
        np.testing.assert_allclose(a, b, atol=1e-3)


def on_card(images: DeviceImages, device: torch.device) -> DeviceImages:
    """The same data set on the card."""
    raw = images.padded[:, 4:-4, 4:-4].contiguous().numpy()
    return DeviceImages(raw, images.labels.numpy(), images.mean.tolist(), images.std.tolist(), images.flip, device)


def test_a_batch_of_a_new_size_is_not_autotuned():
    """cuDNN tries each of its kernels for each convolution of a new size: 2.4 s in two epochs of three."""
    machine = start("cuda", precision="bf16", compile=False, graph=False)
    net = machine.prepare(ResNet18(10, width=8)).train()
    optimizer = machine.optimizer(net, 0.02, 5e-4)

    def step(forward, x):
        [logits] = forward(net, x)
        engine.update(optimizer, logits.square().mean())
        return logits

    launched = []
    for rows in (17, 17, 19, 23):  # the first sets up more than convolutions
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            machine.run_partial(step, [torch.randn(rows, 3, 32, 32, device=machine.device)])
            torch.cuda.synchronize()
        launched.append(sum(event.count for event in profile.key_averages()))
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
