"""Run folders: made, continued and compared."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import Train_cifar
from dividemix.codivide import Mixture
from dividemix.engine import MixMatch, Terms
from dividemix.run import checkpoint, command_line, logs
from dividemix.run.run import Run
from dividemix.runtime.device import Runtime
from helpers.nets import half

TINY = "--dataset digits --limit_train 96 --width 4 --batch_size 16 --warm_up 1 --lr_drop 3 --device cpu"


def train(folder, epochs, *more):
    return Train_cifar.main([*TINY.split(), "--run_dir", str(folder), "--num_epochs", str(epochs), *more])


def last_state(folder):
    return torch.load(folder / json.loads((folder / "last.json").read_text())["file"], weights_only=True)


def without_times(record):
    return {k: v for k, v in record.items() if not k.startswith("seconds_")}


def assert_equal(a, b, path="state"):
    """Bitwise, through dicts and lists."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        a, b = (without_times(x) if "phase" in x else x for x in (a, b))
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def args_of(folder) -> Namespace:
    """The flags of the run in `folder`."""
    return Namespace(**checkpoint.load_last(folder)["config"], fresh=False, no_label_scores=True, verbose=False)


# ---- Runs without training: quick, of networks whose weights say the epoch ----


class Marked(torch.nn.Module):
    """A network of two weights: the epoch, and which network it is."""

    def __init__(self, k):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([-1.0, k]))


def opened(folder, logs=logs.CLOTHING1M, runtime=None, **flags) -> Run:
    return Run(
        folder,
        Namespace(**{"seed": 123, "fresh": False, "no_label_scores": True, "verbose": False} | flags),
        runtime,
        logs,
    )


def begin(run: Run) -> None:
    nets = [Marked(k) for k in (1, 2)]
    optimizers = [Runtime().optimizer(net, 0.1, 0.0) for net in nets]
    mixtures = [Mixture(0.5) for _ in nets]
    run.start([], nets, optimizers, mixtures, MixMatch(2, warm_up=1), data={}, model={})


def end_epoch(run: Run, accuracy: dict, phase: str = "train") -> None:
    """The networks are marked with the epoch, and it ends with such a record."""
    for net in run.nets:
        net.w.data[0] = run.epoch
    loss = np.array([0.0, 0.1, 0.9, 1.0], np.float32)
    division = dataclasses.replace(half(4), raw_loss=loss, prediction=np.zeros(4, np.int64))
    divisions = [division if phase == "train" else None] * 2
    run.end_epoch(0.1, divisions, [Terms(1.0, float("nan"), 0.0, 0.0)] * 2, accuracy)


def validated(net1=60.0, net2=60.0):
    return {"val_acc": 50.0, "val_acc_net1": net1, "val_acc_net2": net2}


def go_on(folder, accuracies, last=None, in_epoch=lambda run: None, **flags) -> Run:
    """A run like Clothing1M's through epochs of these accuracies (net 1, net 2), from where the folder is. in_epoch is
    called in each epoch before its end."""
    with opened(folder, **flags) as run:
        run.save_labels(index=np.arange(4), given=np.zeros(4, np.int64))
        begin(run)
        for epoch in run.epochs(last or len(accuracies)):
            in_epoch(run)
            end_epoch(run, validated(*accuracies[epoch]))
    return run


def last_epoch(folder: Path) -> int:
    """The epoch that last.json names; -1 without it."""
    file = folder / "last.json"
    return json.loads(file.read_text())["epoch"] if file.exists() else -1


def full(*_) -> None:
    """Stands for a call that writes to a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


class Forked:
    """A process that runs `command_line(main)` as a script does; forked, so that it imports nothing. main's argument is
    called when the test may go on after `wait`."""

    def __init__(self, output: Path, main, **environment: str):
        context = multiprocessing.get_context("fork")
        self.output, self.ready = output, context.Event()
        self.process = context.Process(target=self._run, args=(main, environment))
        self.process.start()

    def _run(self, main, environment) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
        os.environ.update(environment)
        outputs = [open(f"{self.output}.{name}", "w", buffering=1) for name in ("out", "err")]  # noqa: SIM115
        sys.stdout, sys.stderr = outputs
        warnings.showwarning = lambda *warning: sys.stderr.write(warnings.formatwarning(*warning))  # pytest keeps them
        command_line(lambda _: main(self.ready.set))

    def wait(self) -> None:
        assert self.ready.wait(60)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """-> exit status (-n where signal n killed it), stdout, stderr"""
        self.process.join(120)
        status = self.process.exitcode
        self.process.kill()
        assert status is not None, "it hangs"
        return status, *(Path(f"{self.output}.{name}").read_text() for name in ("out", "err"))


# ---- What runs leave ----


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_records(folder) -> list[dict]:
    """metrics.jsonl; NaN and Infinity, which are no JSON, are an error."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} in metrics.jsonl")

    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def assert_same_run(folder: Path, straight: Path) -> None:
    """Bit for bit: weights, momentum, losses, records, histograms, scores, logs; and nothing temporary is left."""
    assert_equal(last_state(folder), last_state(straight))
    assert [*map(without_times, read_records(folder))] == [*map(without_times, read_records(straight))]
    assert_equal(*(torch.load(run / "best.pt", weights_only=True) for run in (folder, straight)))
    for name in ("acc.txt", "stats.txt", "histograms.jsonl"):
        assert (folder / name).read_text() == (straight / name).read_text()
    scores = [sorted((run / "scores").iterdir()) for run in (folder, straight)]
    assert [file.name for file in scores[0]] == [file.name for file in scores[1]]
    for pair in zip(*scores, strict=True):
        np.testing.assert_equal(*(dict(np.load(file)) for file in pair))
    assert not [*folder.rglob("*.tmp")]
