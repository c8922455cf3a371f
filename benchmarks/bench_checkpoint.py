"""What saving an epoch costs: seconds of its parts, bytes, and what training waits for it, in one command.

    python benchmarks/bench_checkpoint.py                                     # two networks as on CIFAR-10
    python benchmarks/bench_checkpoint.py --folder /mnt/slow --json out.json  # on another disk

The parts are timed one after the other; then a run folder gets --repeats epochs, each --epoch_seconds long, in which
this process sleeps, as one that waits for a card does. Its seconds_save, of every epoch but the first, is what training
waited: the copy to host memory, and what was left of the save before. Figures are medians.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dividemix.codivide import Mixture
from dividemix.engine import MixMatch, Terms
from dividemix.files import write_state
from dividemix.run import Run, to_host
from dividemix.runtime import Runtime, start
from PreResNet import ResNet18


def random_state(runtime: Runtime, width: int, samples: int) -> tuple[list, list, list[Mixture]]:
    """What a run's state is of, random: networks, optimizers, and mixtures with the losses of a window of five."""
    rng = np.random.default_rng(0)
    nets = [runtime.prepare(ResNet18(10, width)) for _ in range(2)]
    optimizers = [runtime.optimizer(net, 0.02, 5e-4) for net in nets]
    mixtures = [Mixture(0.5, window=5) for _ in nets]
    for mixture in mixtures:
        mixture.history = [rng.random(samples, np.float32) for _ in range(4)]
    return nets, optimizers, mixtures


def state_of(nets: list, optimizers: list, mixtures: list[Mixture]) -> dict[str, Any]:
    """As `Run` saves it."""
    state: dict[str, Any] = {"nets": [net.state_dict() for net in nets]}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    return state | {"histories": [[torch.from_numpy(row) for row in mixture.history] for mixture in mixtures]}


def seconds(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def time_parts(state: dict[str, Any], folder: Path, repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of each part of a save, and the bytes of its files."""
    begin = time.perf_counter()
    host = to_host(state)
    first = time.perf_counter() - begin
    files = {"checkpoint": folder / "epoch-000.pt", "best": folder / "best.pt"}
    timed = {
        "copy to host memory": lambda: to_host(state, host),
        "checkpoint": lambda: write_state(files["checkpoint"], host),
        "best.pt": lambda: write_state(files["best"], {"nets": host["nets"]}),
    }
    measured = {"copy to new memory": first} | {name: seconds(function, repeats) for name, function in timed.items()}
    return measured, {name: file.stat().st_size for name, file in files.items()}


def kept_waiting(function: Callable[[], Any], repeats: int) -> float | None:
    """Median seconds that a thread of short torch operations, as one that launches kernels, sleeps while another calls
    `function`: it waits for the GIL. None where the system does not tell this from waiting for a core."""
    scheduled = Path("/proc/thread-self/schedstat")  # nanoseconds: running, waiting for a core
    if not scheduled.exists():
        return None

    def asleep() -> float:
        return time.perf_counter() - sum(map(int, scheduled.read_text().split()[:2])) / 1e9

    x, times = torch.ones(1), []
    for _ in range(repeats):
        beside, begin = threading.Thread(target=function), asleep()
        beside.start()
        while beside.is_alive():
            x.add_(1)
        times.append(asleep() - begin)
    return statistics.median(times)


def waited(run_folder: Path, trained: tuple[list, list, list], epoch_seconds: float, repeats: int) -> float:
    """Median seconds_save of a run's epochs but the first; each is the best yet, so best.pt is written too."""
    flags = argparse.Namespace(seed=0, fresh=False, save_scores=False, verbose=False)
    with Run(run_folder, flags) as run:
        run.start([], *trained, MixMatch(10), data={}, model={})
        for epoch in run.epochs(1 + repeats):
            time.sleep(epoch_seconds)
            accuracy = {name: float(epoch) for name in ("test_acc", "test_acc_net1", "test_acc_net2")}
            run.end_epoch(0.02, [None, None], [Terms(0.0, 0.0, 0.0, 0.0)] * 2, accuracy)
    return statistics.median(record["seconds_save"] for record in run.records[1:])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 64, "samples": 50000, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epoch_seconds", type=float, default=5.0, help="length of an epoch; an H100's is about this")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--folder", help="where to write (default: the system's folder for temporary files)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.samples < 2 or args.epoch_seconds < 0:
        parser.error("expected 1 or more repeats, 2 or more samples, and epochs of 0 seconds or more")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    runtime = start(args.device, width=args.width)
    trained = random_state(runtime, args.width, args.samples)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        part_seconds, sizes = time_parts(state_of(*trained), Path(folder), args.repeats)
        host = to_host(state_of(*trained))
        held = kept_waiting(lambda: write_state(Path(folder, "held.pt"), host), args.repeats)
        wait = waited(Path(folder, "run"), trained, args.epoch_seconds, args.repeats)
    report = {
        "part_seconds": part_seconds,
        "save_seconds": sum(part_seconds[name] for name in part_seconds if not name.startswith("copy")),
        "kept_waiting_seconds": held,
        "bytes": sizes,
        "waited_seconds": wait,
        "share_of_epoch": wait / args.epoch_seconds if args.epoch_seconds else None,
        "device": runtime.describe(),
        "date": datetime.date.today().isoformat(),
        "flags": vars(args),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    print(runtime.describe())
    for name, value in (*part_seconds.items(), ("a save, beside training", report["save_seconds"])):
        print(f"{name:<28}{value:>9.3f} s")
    share = f", {wait / args.epoch_seconds:.1%} of an epoch of {args.epoch_seconds:g} s" if args.epoch_seconds else ""
    if held is not None:
        print(f"{'a thread beside it waited':<28}{held:>9.3f} s for the GIL, beside the checkpoint")
    print(f"{'training waited':<28}{wait:>9.3f} s{share}")
    print(f"an epoch writes {sizes['checkpoint'] / 1e6:.1f} MB, and {sizes['best'] / 1e6:.1f} MB where it is the best")
    print(f"medians of {args.repeats}; {report['date']}")
    return report


if __name__ == "__main__":
    main()
