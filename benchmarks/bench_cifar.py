"""Seconds of an epoch and of its phases on random images: checked, timed, and compared, in one command.

    python benchmarks/bench_cifar.py                                          # CIFAR-10's size, half labeled
    python benchmarks/bench_cifar.py --against_plain --ablate --json out.json # and the plain way, each speed-up off
    python benchmarks/bench_cifar.py --samples 2000 --labeled 1000 --test_samples 400 --against_plain    # on a CPU
    python benchmarks/bench_cifar.py --ablate graphs compile                  # only what has these words in its name
    python benchmarks/bench_cifar.py --end_to_end 20                          # and Train_cifar.py itself, 20 epochs

Everything that is compared is run in turn, epoch by epoch, in this one process, so that a machine whose speed drifts
does not decide. As in a run, the labeled set is another one in each epoch and for each network, of --labeled samples
+- 2 %, and the same for all that is compared: partial batches have new sizes, and what these cost is seen in the mean.
Figures are medians and means of --repeats epochs after --warmups, ratios are of medians; set-up is the check (with its
compilations and captures) and what the first epochs took beyond the median. On a card the plain way computes its
convolutions in TF32, torch's default, and the engine's fp32 does not. Operations are those of --labeled samples, by
torch's count (2 a multiply-add, backward twice the forward); the floor is their time at 790 TFLOP/s, 1.43 s at
CIFAR-10's size. --json is written anew after every round of epochs: what is stopped leaves what it measured.

--end_to_end runs Train_cifar.py in its own process, with logs, checkpoints and all, in a temporary folder: an epoch of
warm-up, a first divided one (with its compilations and captures), then as many as the flag says. Each lasts from the
line that a run prints at an epoch's end to the next. They are compared with epochs of this process with labeled sets of
the same sizes. The images are random ones of ten patterns, so that there is something to divide, or those of
--data_path.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baseline_plain import PlainEpoch, default_workers, division_of

from dividemix import engine
from dividemix.codivide import Division, Mixture
from dividemix.data import DeviceImages
from dividemix.runtime import start as start_runtime
from dividemix.runtime.device import Runtime, at_once, computes_bf16
from PreResNet import ResNet18

ROOT = Path(__file__).resolve().parent.parent
FLOOR_RATE = 790e12  # bf16 operations a second of an H100
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclasses.dataclass
class Work:
    """Random images and the divisions of each epoch, the same for everything that is timed."""

    images: np.ndarray  # uint8 (N, 32, 32, 3)
    labels: np.ndarray  # int64 (N,)
    labeled: int  # samples; a division has 2 % more or fewer
    test_images: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def random(cls, samples: int, labeled: int, test_samples: int) -> "Work":
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (samples + test_samples, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, len(images))
        return cls(images[:samples], labels[:samples], labeled, images[samples:], labels[samples:])

    def divisions(self, epoch: int) -> list[Division]:
        """What net 1 and net 2 are trained on in an epoch."""
        rng, spread, n = np.random.default_rng([0, epoch]), self.labeled // 50, len(self.images)
        sizes = np.clip(self.labeled + rng.integers(-spread, spread + 1, 2), 1, n - 1)
        return [division_of(rng.permutation(n) < size) for size in sizes]

    def operations(self, width: int) -> tuple[float, float]:
        """Of a divided epoch and of a warm-up epoch, both nets, with the test."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ResNet18(10, width).eval()(torch.zeros(1, 3, 32, 32))
        forward = counter.get_total_flops()
        evaluated = 2 * len(self.test_images)
        # a labeled image and its unlabeled partner: 2 + 2 views guessed by net, 2 by peer, 4 trained on
        divided = 2 * (18 * self.labeled + len(self.images)) + evaluated
        return divided * forward, (2 * 3 * len(self.images) + evaluated) * forward


class FastEpoch:
    """The engine's epoch as Train_cifar.py runs it, but for the divisions: fitted, and dropped for given ones."""

    def __init__(self, work: Work, runtime: Runtime, width: int, batch_size: int):
        self.work, self.runtime, self.batch_size = work, runtime, batch_size
        self.train, self.test = (
            DeviceImages(images, labels, MEAN, STD, True, runtime)
            for images, labels in ((work.images, work.labels), (work.test_images, work.test_labels))
        )
        torch.manual_seed(0)
        self.nets = [runtime.prepare(ResNet18(10, width)) for _ in range(2)]
        self.optimizers = [runtime.optimizer(net, 0.02, 5e-4) for net in self.nets]
        self.mixtures = [Mixture(0.5) for _ in self.nets]
        self.settings = engine.MixMatch(num_class=10, batch_size=batch_size)
        self.rng = np.random.default_rng(0)
        self.seconds: dict[str, float] = {}

    def run(self, divisions: list[Division] | None) -> dict[str, float]:
        """An epoch with these divisions, one for each net, or of warm-up. -> seconds of each phase, as `PlainEpoch.run`
        names them, and of all as 'epoch'."""
        self.seconds = {}
        begin = self.time()
        if divisions:
            fitted = engine.co_divide(self.nets, [self.train] * 2, self.mixtures, self.phase)
        for k in range(2):
            if divisions:
                fitted[1 - k]  # waited for, and dropped
                self.mixmatch(k, divisions[k])
            else:
                engine.warmup_epoch(
                    self.nets[k], self.optimizers[k], self.train, self.settings, self.phase("warmup", k)
                )
        engine.test(self.nets, {"test": self.test}, self.phase)
        return {**self.seconds, "epoch": self.time() - begin}

    def mixmatch(self, k: int, division: Division) -> engine.Terms:
        nets, phase = (self.nets[k], self.nets[1 - k]), self.phase("train", k)
        return engine.train_epoch(*nets, self.optimizers[k], self.train, division, self.settings, phase)

    def phase(self, name: str, k: int = 0) -> engine.Phase:
        return TimedPhase(26, self.rng, clock=self, title=f"{name}{k + 1}" if name in ("warmup", "train") else name)

    def time(self) -> float:
        return synchronized_time(self.runtime.device)


@dataclasses.dataclass
class TimedPhase(engine.Phase):
    """Adds its seconds, until the device has done all of it, to the clock's."""

    clock: Any = None
    title: str = ""

    def __enter__(self) -> engine.Phase:
        self.begin = self.clock.time()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = self.clock.seconds
        seconds[self.title] = seconds.get(self.title, 0.0) + self.clock.time() - self.begin


def synchronized_time(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def check(runtime: Runtime, width: int, batch_size: int) -> str:
    """Train one epoch of four batches with this runtime and with the fp32 eager reference, on the same device with the
    same draws; exit if they disagree."""
    work = Work.random(8 * batch_size, 4 * batch_size, 8)
    division = division_of(np.arange(8 * batch_size) < 4 * batch_size)
    terms, weights = [], []
    for checked in (Runtime(runtime.device), dataclasses.replace(runtime, steps={})):
        epoch = FastEpoch(work, checked, width, batch_size)
        before = torch.cat([p.detach().flatten().cpu() for p in epoch.nets[0].parameters()])
        terms.append(epoch.mixmatch(0, division))
        weights.append(torch.cat([p.detach().flatten().cpu() for p in epoch.nets[0].parameters()]) - before)
    cosine = torch.nn.functional.cosine_similarity(*weights, dim=0).item()
    loss = abs(terms[1].loss / terms[0].loss - 1)
    exact = runtime.precision == "fp32"
    sound = np.isfinite(terms[1]).all() and loss < (1e-3 if exact else 0.05) and cosine > (0.999 if exact else 0.9)
    line = (
        f"four steps against the fp32 eager reference: loss differs by {loss:.1e}, cosine of the updates {cosine:.4f}"
    )
    if not sound:
        sys.exit(f"check failed: {line}")
    return line


def variants(runtime: Runtime) -> dict[str, Runtime]:
    """Runtimes without one of the optimisations that this one uses, each under the name of that."""

    def without(**changed: Any) -> Runtime:
        return dataclasses.replace(runtime, steps={}, **changed)

    off: dict[str, Runtime] = {}
    if runtime.precision != "fp32":
        off[f"{runtime.precision} (fp32 instead)"] = without(precision="fp32")
    if runtime.memory_format == torch.channels_last:
        suffix = " outside compiled code" if runtime.compile else ""  # Inductor chooses its layouts itself
        off[f"channels_last{suffix}"] = without(memory_format=torch.contiguous_format)
    for field, name in {
        "graph": "CUDA graphs",
        "compile": "torch.compile",
        "merge": "merged forwards",
    }.items():
        if getattr(runtime, field):
            off[name] = without(**{field: False})
    if runtime.device.type == "cuda":
        off["overlapped GMM"] = without()
        off["overlapped GMM"].background = at_once
    other = 1000 if runtime.device.type == "cpu" else 128
    off[f"evaluation batch {runtime.eval_batch_size} ({other} instead)"] = without(eval_batch_size=other)
    return off


Results = dict[str, list[dict[str, float]]]  # of all that is compared, the seconds of each epoch


def timed(
    epochs: dict[str, Any], count: int, divisions: Callable[[int], Any], after: Callable[[Results], Any] = lambda _: 0
) -> Results:
    """`run` of each in turn, `count` times, with the epoch's divisions; `after` each of these rounds."""
    results: Results = {name: [] for name in epochs}
    for number in range(count):
        epoch_divisions = divisions(number)
        for name, epoch in epochs.items():
            seconds = epoch.run(epoch_divisions)
            results[name].append(seconds | {"epoch": seconds.get("epoch", sum(seconds.values()))})
        after(results)
    return results


def medians(results: list[dict[str, float]], warmups: int) -> dict[str, float]:
    """Of the results after the `warmups`; of a benchmark that was stopped before, of its last one."""
    measured = results[warmups:] or results[-1:]
    return {name: statistics.median(result[name] for result in measured) for name in results[0]}


def means(results: list[dict[str, float]], warmups: int) -> dict[str, float]:
    measured = results[warmups:] or results[-1:]
    return {name: statistics.fmean(result[name] for result in measured) for name in results[0]}


# ---- A real run ----


def write_cifar10(work: Work, folder: Path) -> None:
    """The work's images, half noise and half the pattern of their label, as CIFAR-10's files."""
    folder.mkdir()
    patterns = np.random.default_rng(1).integers(0, 256, (10, *work.images.shape[1:]), dtype=np.uint8)
    for name, images, labels in (
        ("data_batch_1", work.images, work.labels),
        ("test_batch", work.test_images, work.test_labels),
    ):
        rows = (images // 2 + patterns[labels] // 2).transpose(0, 3, 1, 2).reshape(len(images), -1)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels.tolist()}))


def real_run(args: argparse.Namespace, work: Work) -> tuple[list[float], list[dict[str, Any]]]:
    """Train_cifar.py: an epoch of warm-up, then --end_to_end + 1 divided ones. -> the seconds of each epoch, with the
    start in the first, and its records in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.data_path is None:
            write_cifar10(work, folder / "data")
        flags = {"data_path": args.data_path or folder / "data", "run_dir": folder / "run", "r": 0.5, "warm_up": 1}
        flags |= {"num_epochs": args.end_to_end + 2, "limit_train": args.samples if args.data_path else None}
        flags |= {name: getattr(args, name) for name in ("device", "precision", "width", "batch_size")}
        flags |= {"eval_batch_size": args.eval_batch_size}
        command = [sys.executable, str(ROOT / "Train_cifar.py")]
        command += [str(x) for name, value in flags.items() if value is not None for x in (f"--{name}", value)]
        command += [f"--{name}" for name in ("no_graph", "no_compile") if getattr(args, name)]
        times, lines = [time.perf_counter()], []
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, env=unbuffered, text=True, stdout=subprocess.PIPE) as process:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("epoch "):
                    times.append(time.perf_counter())
                    print(line, end="", flush=True)
        if process.returncode:
            sys.exit(f"Train_cifar.py ended with status {process.returncode}: see its message above\n{''.join(lines)}")
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return list(np.diff(times)), records


def end_to_end(args: argparse.Namespace, work: Work, bare: FastEpoch) -> dict[str, Any]:
    """A real run beside bare epochs of labeled sets of the same sizes."""
    seconds, records = real_run(args, work)
    measured, n = records[2:], len(work.images)
    sizes = [
        [record["labeled_net2"] or 0, record["labeled_net1"] or 0] for record in measured
    ]  # each net's labeled set
    rng = np.random.default_rng(2)
    divisions = [[division_of(rng.permutation(n) < np.clip(k, 1, n - 1)) for k in pair] for pair in sizes]
    bare_seconds = [result["epoch"] for result in timed({"": bare}, len(divisions), divisions.__getitem__)[""]]
    phases = [name for name in measured[-1] if name.startswith("seconds_")]
    mean, bare_mean = statistics.fmean(seconds[2:]), statistics.fmean(bare_seconds)
    return {
        "start_and_warmup_epoch_seconds": seconds[0],
        "first_divided_epoch_seconds": seconds[1],
        "mean_epoch_seconds": mean,
        "median_epoch_seconds": statistics.median(seconds[2:]),
        "epoch_seconds": seconds[2:],
        "mean_phase_seconds": {name[8:]: statistics.fmean(record[name] for record in measured) for name in phases},
        "labeled_sizes": sizes,
        "bare_mean_epoch_seconds": bare_mean,
        "bare_epoch_seconds": bare_seconds,
        "ratio_to_bare": mean / bare_mean,
    }


def measured_peak(device: torch.device) -> float:
    """Operations a second of a large matrix product of random numbers, in bf16 where the device has units for it."""
    n, runs = (8192, 20) if device.type == "cuda" else (1024, 5)
    dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(3 + runs):
        begin = synchronized_time(device)
        a @ b
        times.append(synchronized_time(device) - begin)
    return 2 * n**3 / statistics.median(times[3:])


def size_parser(description: str | None, **counts: int) -> argparse.ArgumentParser:
    """With the flags of an epoch's sizes, CIFAR-10's by default, and those of `counts`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"samples": 50000, "labeled": 25000, "test_samples": 10000, "width": 64, "batch_size": 64}
    for name, default in (sizes | counts).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--eval_batch_size", type=int)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = size_parser(__doc__, repeats=8, warmups=2)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--no_graph", action="store_true")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--against_plain", action="store_true", help="time benchmarks/baseline_plain.py beside it")
    parser.add_argument(
        "--plain_workers", type=int, help="default: 5 on CUDA, as the authors; else the cores, at most 5"
    )
    parser.add_argument(
        "--ablate", nargs="*", metavar="WORD", help="time it with each optimisation off in turn; or those with a WORD"
    )
    parser.add_argument("--end_to_end", type=int, metavar="N", help="time Train_cifar.py itself for N divided epochs")
    parser.add_argument("--data_path", help="CIFAR-10 for --end_to_end (default: random images)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if not 0 < args.labeled < args.samples or min(args.repeats, args.test_samples, args.batch_size) < 1:
        parser.error("expected 0 < labeled < samples, and repeats, test_samples and batch_size of 1 or more")
    if args.end_to_end is not None and args.end_to_end < 1:
        parser.error(f"--end_to_end {args.end_to_end}: expected the number of epochs, 1 or more")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    flags = {name: getattr(args, name) for name in ("device", "precision", "width", "eval_batch_size")}
    runtime = start_runtime(**flags, compile=not args.no_compile, graph=not args.no_graph)
    print(runtime.describe())
    begin = time.perf_counter()
    print(check(runtime, args.width, args.batch_size), flush=True)
    set_up = time.perf_counter() - begin

    work = Work.random(args.samples, args.labeled, args.test_samples)
    sizes = args.width, args.batch_size
    epochs: dict[str, Any] = {"": FastEpoch(work, runtime, *sizes)}
    workers = args.plain_workers
    if args.against_plain:
        workers = default_workers(runtime.device.type) if workers is None else workers
        plain = (work.images, work.labels, work.test_images, work.test_labels)
        shape = {"width": args.width, "batch_size": args.batch_size, "workers": workers}
        epochs["plain"] = PlainEpoch(*plain, device=runtime.device, **shape)
    if args.ablate is not None:
        off = variants(runtime)
        chosen = {name: off[name] for name in off if not args.ablate or any(word in name for word in args.ablate)}
        if not chosen:
            sys.exit(f"--ablate {' '.join(args.ablate)}: expected words of {', '.join(off)}")
        epochs |= {name: FastEpoch(work, slower, *sizes) for name, slower in chosen.items()}

    warm = timed({"": epochs[""]}, args.warmups + args.repeats, lambda _: None)[""]
    peak = measured_peak(runtime.device)
    about = {"device": runtime.describe(), "date": datetime.date.today().isoformat(), "flags": vars(args)}
    report: dict[str, Any] = {}

    def after(results: Results) -> None:
        report.update(summary(args, work, set_up, peak, warm, results) | about)
        if args.against_plain:
            report["plain_workers"] = workers
        write(report, args.json)
        print(
            ", ".join(f"{name or 'epoch'} {result[-1]['epoch']:.3f} s" for name, result in results.items()), flush=True
        )

    timed(epochs, args.warmups + args.repeats, work.divisions, after)
    print_table(report, args)
    if args.end_to_end:
        report["end_to_end"] = result = end_to_end(args, work, epochs[""])
        write(report, args.json)
        mean, median, bare = (result[f"{kind}_epoch_seconds"] for kind in ("mean", "median", "bare_mean"))
        print(
            f"Train_cifar.py: {mean:.3f} s an epoch (median {median:.3f}, n = {args.end_to_end}), "
            f"{result['ratio_to_bare']:.3f} times the bare {bare:.3f} s; start and warm-up epoch "
            f"{result['start_and_warmup_epoch_seconds']:.1f} s, first divided epoch "
            f"{result['first_divided_epoch_seconds']:.1f} s"
        )
    return report


def write(report: dict[str, Any], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=1))


def summary(
    args: argparse.Namespace, work: Work, set_up: float, peak: float, warm: Sequence[dict[str, float]], results: Results
) -> dict[str, Any]:
    """What the rounds so far say. warm: the seconds of each warm-up epoch."""
    divided, warmup = (medians(result, args.warmups) for result in (results[""], warm))
    mean, mean_warmup = (means(result, args.warmups) for result in (results[""], warm))
    set_up += sum(
        max(0.0, result[0]["epoch"] - median["epoch"]) for result, median in ((results[""], divided), (warm, warmup))
    )
    operations, warmup_operations = work.operations(args.width)
    rate = operations / divided["epoch"]
    report: dict[str, Any] = {
        "epoch_seconds": divided["epoch"],
        "warmup_epoch_seconds": warmup["epoch"],
        "setup_seconds": set_up,
        "phase_seconds": {name: divided[name] for name in divided if name != "epoch"}
        | {name: warmup[name] for name in ("warmup1", "warmup2")},
        "mean_epoch_seconds": mean["epoch"],
        "mean_warmup_epoch_seconds": mean_warmup["epoch"],
        "mean_phase_seconds": {name: mean[name] for name in mean if name != "epoch"}
        | {name: mean_warmup[name] for name in ("warmup1", "warmup2")},
        "labeled_sizes": [
            [int(division.labeled.sum()) for division in work.divisions(number)] for number in range(len(results[""]))
        ],
        "all_epoch_seconds": [result["epoch"] for result in results[""]],
        "tflops": rate / 1e12,
        "warmup_tflops": warmup_operations / warmup["epoch"] / 1e12,
        "measured_peak_tflops": peak / 1e12,
        "share_of_peak": rate / peak,
        "floor_seconds": operations / FLOOR_RATE,
        "ratio_to_floor": divided["epoch"] / (operations / FLOOR_RATE),
    }
    if "plain" in results:
        plain_median, plain_mean = (average(results["plain"], args.warmups) for average in (medians, means))
        report |= {"mean_plain_epoch_seconds": plain_mean.pop("epoch"), "mean_plain_phase_seconds": plain_mean}
        report |= {"plain_epoch_seconds": plain_median.pop("epoch"), "plain_phase_seconds": plain_median}
        report |= {"ratio": report["plain_epoch_seconds"] / divided["epoch"]}
    if names := [name for name in results if name not in ("", "plain")]:
        report["ablation_epoch_seconds"] = {name: medians(results[name], args.warmups)["epoch"] for name in names}
        report["mean_ablation_epoch_seconds"] = {name: means(results[name], args.warmups)["epoch"] for name in names}
    return report


def print_table(report: dict[str, Any], args: argparse.Namespace) -> None:
    def rows(kind: str) -> dict[str, float]:  # "", "mean_", "plain_", "mean_plain_"
        epochs = {"epoch (divided)": report.get(f"{kind}epoch_seconds")}
        epochs |= {"epoch (warm-up)": report.get(f"{kind}warmup_epoch_seconds")}
        return report.get(f"{kind}phase_seconds", {}) | {name: value for name, value in epochs.items() if value}

    median, mean, plain, mean_plain = map(rows, ("", "mean_", "plain_", "mean_plain_"))
    print(f"\n{'seconds':<38}{'median':>9}{'mean':>9}" + (f"{'plain':>9}{'mean':>9}{'ratio':>7}" if plain else ""))
    for name, seconds in median.items():
        print(f"{name:<38}{seconds:>9.3f}{mean[name]:>9.3f}", end="")
        print(f"{plain[name]:>9.3f}{mean_plain[name]:>9.3f}{plain[name] / seconds:>7.2f}" if name in plain else "")
    for name, seconds in report.get("ablation_epoch_seconds", {}).items():
        mean_seconds = report["mean_ablation_epoch_seconds"][name]
        times = f"{seconds:>9.3f}{mean_seconds:>9.3f}  x {seconds / report['epoch_seconds']:.2f}"
        print(f"epoch without {name:<24.24}{times}")
    print(
        f"set-up {report['setup_seconds']:.1f} s; {report['tflops']:.3g} TFLOP/s, {report['share_of_peak']:.0%} of the "
        f"measured peak ({report['measured_peak_tflops']:.3g}); {report['ratio_to_floor']:.3g} times the floor of "
        f"{report['floor_seconds']:.3g} s\n{args.repeats} epochs after {args.warmups}; {report['date']}"
    )


if __name__ == "__main__":
    main()
