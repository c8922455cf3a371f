"""What the ranks of test_torchrun.py run: many checks after one start by torchrun, which takes long.

torchrun --nproc_per_node=2 tests/helpers/torchrun_driver.py small OUT      # results go to OUT/<name>.<rank>.pt
torchrun --nproc_per_node=2 tests/helpers/torchrun_driver.py runs FILE      # each line: the flags of a run
torchrun --nproc_per_node=2 tests/helpers/torchrun_driver.py fail KIND STAMP <flags of Train_folder.py>
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import Train_folder  # noqa: E402
from dividemix import DivideMixError, engine, warn  # noqa: E402
from dividemix.codivide import Mixture  # noqa: E402
from dividemix.data.device import DeviceImages, draw_crops, plan_mixmatch, plan_warmup  # noqa: E402
from dividemix.engine import MixMatch, Phase  # noqa: E402
from dividemix.report import report  # noqa: E402
from dividemix.run import command_line  # noqa: E402
from dividemix.runtime import Average, Batches, Runtime, start  # noqa: E402
from dividemix.seeds import seeded  # noqa: E402
from helpers.nets import half, small_net, snapshot  # noqa: E402

STEP = {"lam": 0.8, "T": 0.5, "lambda_u": 3.0, "num_class": 4}


def runtime_of_two() -> Runtime:
    return start("cpu", precision="fp32", width=4, batch_size=2)


# ---- What the ranks compute, and the test itself as one process ----


class RankImages(DeviceImages):
    """In memory, and split among the ranks as streamed images are."""

    def warmup_batches(self, batch_size: int, rng: np.random.Generator) -> Batches:
        ranks = self.runtime.ranks
        index = plan_warmup(len(self), batch_size, rng, ranks)
        crops = [draw_crops(rng, len(rows), self.flip, self.pad) for rows in index]
        return self._batches([list(map(ranks.shard_rows, index))], list(map(ranks.shard_rows, crops)))

    def mixmatch_batches(self, division, batch_size: int, rng: np.random.Generator) -> Batches:
        shard, crops = self.runtime.ranks.shard_rows, []
        labeled, unlabeled = plan_mixmatch(division, batch_size, rng, self.runtime.ranks)
        for x, u in zip(labeled, unlabeled, strict=True):
            views = np.split(
                draw_crops(rng, 2 * (len(x) + len(u)), self.flip, self.pad), np.cumsum([len(x), len(x), len(u)])
            )
            crops.append(np.concatenate([shard(view) for view in views]))
        w = [division.clean_probability[shard(x)].astype(np.float32) for x in labeled]
        return self._batches([list(map(shard, labeled)), list(map(shard, unlabeled))], crops, w)

    def eval_batches(self, batch_size: int) -> Batches:
        of_all = super().eval_batches(batch_size)
        numbers, batches = self.runtime.ranks.shard_batches(len(of_all)), list(of_all)
        return Batches([of_all.sizes[k] for k in numbers], [batches[k] for k in numbers])


def digits(n: int, runtime: Runtime) -> RankImages:
    """n images of noise that is not the same in any two, and labels of four classes; two of three are right."""
    images = np.random.default_rng(n).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    truly_clean = np.arange(n) % 3 > 0
    return RankImages(images, np.arange(n) % 4, (0.5,) * 3, (0.25,) * 3, True, runtime, truly_clean)


def network(runtime: Runtime, seed: int) -> nn.Module:
    return runtime.prepare(seeded(seed, 0, lambda: small_net(4)))


def without_bn(runtime: Runtime, seed: int) -> nn.Module:
    """A network whose rows do not see each other: several ranks then compute what one process does."""

    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, 4))

    return runtime.prepare(seeded(seed, 0, build))


def scored(runtime: Runtime, n: int, batch_size: int) -> dict:
    """Losses, accuracy and division of n samples by two nets in one state."""
    nets = [network(runtime, seed) for seed in (1, 2)]
    for net in nets:
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    runtime.eval_batch_size, data = batch_size, digits(n, runtime)
    scores = engine.per_sample_loss(nets[0], data)
    accuracy = engine.top_k_accuracy(nets, data, (1, 3))
    division = engine.co_divide(nets[:1], [data], [Mixture(0.5)])[0]
    return {"loss": scores.loss, "prediction": scores.prediction, "accuracy": accuracy, "division": vars(division)}


SIZES = [(47, 10), (47, 1000), (7, 1), (30, 10), (2, 1)]  # five batches for two ranks, one, seven, three, one each


def views(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, n, 3, 16, 16)).astype(np.float32))
    return both[0], both[1]


def step_of(net, peer, optimizer, rows, index, forward=engine.plain_forward, ranks=engine.ALONE) -> engine.Terms:
    """One step on the rows `rows` of a batch of eight labeled and eight unlabeled images."""
    (x1, x2), (u1, u2) = views(8, 0), views(8, 1)
    w = torch.linspace(0.6, 1, 8)
    batch = [x1[rows], x2[rows], (torch.arange(8) % 4)[rows], w[rows], u1[rows], u2[rows]]
    return engine.mixmatch_step(net, peer, optimizer, *batch, **STEP, index=index, forward=forward, ranks=ranks)


def local_index() -> torch.Tensor:
    """A permutation of one rank's 16 rows of that batch."""
    return torch.from_numpy(np.random.default_rng(3).permutation(16))


# ---- What the ranks run ----


def small(out: str) -> None:
    """Everything that needs no run folder, then the runs of OUT/runs.txt."""
    runtime = runtime_of_two()
    ranks = runtime.ranks

    def save(name: str, result) -> None:
        torch.save(result, Path(out, f"{name}.{ranks.rank}.pt"))

    save("scored", [scored(runtime, n, batch_size) for n, batch_size in SIZES])

    # One step: each rank its rows, and the same rows on both ranks
    net, peer = without_bn(runtime, 1), without_bn(runtime, 2)
    optimizer = runtime.optimizer(net, 0.1, 5e-4)
    terms = step_of(net, peer, optimizer, slice(ranks.rank, None, 2), local_index(), runtime.forward, ranks)
    save("split", {"terms": list(terms), "weights": snapshot(net), "peer": snapshot(peer)})
    net, peer = network(runtime, 1), network(runtime, 2)
    optimizer = runtime.optimizer(net, 0.1, 5e-4)
    step_of(net, peer, optimizer, slice(0, None, 2), local_index(), runtime.forward, ranks)
    save("copies", snapshot(net))

    # Phases with BN: tails of one row, an unlabeled set of one sample, more ranks than rows
    phases = []
    for n, labeled, batch_size in ((18, 17, 8), (23, 9, 4), (9, 9, 4), (3, 1, 2)):
        net, peer = network(runtime, 1), network(runtime, 2)
        optimizer = runtime.optimizer(net, 0.02, 5e-4)
        runtime.averages = {net: Average(net, 0.9)}
        data, phase = digits(n, runtime), Phase(3, np.random.default_rng(n))
        settings = MixMatch(num_class=4, batch_size=batch_size, warm_up=1)
        warmup = engine.warmup_epoch(net, optimizer, data, settings, phase)
        terms = engine.train_epoch(net, peer, optimizer, data, half(n, labeled), settings, phase)
        momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
        average = snapshot(runtime.averages.pop(net).net)
        phases.append([list(warmup), list(terms), snapshot(net), momentum, snapshot(peer), average])
    save("phases", phases)

    # BN statistics that differ are averaged
    net = network(runtime, 1)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.fill_(1.0 + ranks.rank)
    ranks.average_buffers(net)
    save("averaged", snapshot(net))

    # A loss that is bad on the second rank alone, in the second of three steps
    net = network(runtime, 1)
    optimizer = runtime.optimizer(net, 0.02, 5e-4)
    data = digits(12, runtime)
    sound, after = data.warmup_views, []

    def views_of_a_bad_batch(index, crops):
        x, labels = sound(index, crops)
        after.append(snapshot(net))
        return (torch.full_like(x, torch.nan) if ranks.rank == 1 and len(after) == 2 else x), labels

    data.warmup_views = views_of_a_bad_batch
    error = None
    try:
        engine.warmup_epoch(net, optimizer, data, MixMatch(num_class=4, batch_size=2), Phase())
    except DivideMixError as raised:
        error = str(raised)
    weights = [{key: value for key, value in state.items() if "weight" in key} for state in [*after, snapshot(net)]]
    save("bad", [error, weights, float(optimizer.found_inf)])

    # In fp16: a gradient that overflows on the second rank alone, then a bad loss there
    fp16 = dataclasses.replace(runtime, precision="fp16", parallel={})
    net = network(fp16, 1)
    optimizer, steps = fp16.optimizer(net, 0.02, 5e-4), []
    for factor in (1.0, 1e4, torch.nan):
        [logits] = fp16.forward(net, views(4, 0)[0])
        engine.update(optimizer, logits.square().mean() * (factor if ranks.rank == 1 else 1.0), ranks)
        weights = [parameter.detach().clone() for parameter in net.parameters()]
        steps.append([float(optimizer.grad_scale), float(optimizer.found_inf), weights])
    save("fp16", steps)

    warn("the disk is nearly full")
    runs(f"{out}/runs.txt")


def runs(file: str) -> None:
    """Runs of Train_folder.py, one after the other, in this start."""
    for line in Path(file).read_text().splitlines():
        Train_folder.main(line.split("\t"))


def fail(kind: str, stamp: str, *argv: str) -> None:
    """Train_folder.main, but in the first divided epoch something happens to one rank; `stamp`, a file, says when."""
    rank = int(os.environ["RANK"])
    steps = 0

    def happen(*_, **__) -> None:
        Path(stamp).write_text(str(time.time()))
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {
            "error": DivideMixError("images/7.jpg: not an image"),
            "bug": ValueError("a fault of ours"),
            "mixture": DivideMixError("all per-sample losses are equal"),
        }[kind]

    def failing(*args, **kwargs):
        nonlocal steps
        steps += 1
        if kind == "wait":
            Path(stamp).touch()
            time.sleep(0.2)
        elif rank == (0 if kind == "kill" else 1) and steps == 2:
            happen()
        return step(*args, **kwargs)

    step = engine.train_step
    if kind == "mixture":
        Mixture.divide = happen
    else:
        engine.train_step = failing
    Train_folder.main(list(argv))


if __name__ == "__main__":
    torch.set_num_threads(1)
    # To draw, and to import what writes TensorBoard events, takes seconds.
    nothing = SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
    report.draw = lambda *_: []
    sys.modules["torch.utils.tensorboard"] = SimpleNamespace(SummaryWriter=lambda *_, **__: nothing)
    name, *arguments = sys.argv[1:]
    command_line(lambda _: {"small": small, "runs": runs, "fail": fail}[name](*arguments))
