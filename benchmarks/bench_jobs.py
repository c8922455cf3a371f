"""Several runs on one card: what K at once bring, as epochs an hour, in one command. For reproduce.py --jobs_per_gpu K.

    python benchmarks/bench_jobs.py                                              # CIFAR-10's size, K = 1, 2, 3
    python benchmarks/bench_jobs.py --width 16 --jobs 1 2 4 --json jobs.json     # a small network
    python benchmarks/bench_jobs.py --samples 300 --labeled 150 --test_samples 100 --width 4 --jobs 1 2 --repeats 2

K processes, each with networks and random images of its own as in bench_cifar.py, set up and warm up, wait for each
other, and then run --repeats divided epochs at the same time. An epoch's seconds are the median over all of them; K of
them are done in that time. On a CPU each process has its part of the cores.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where a new process imports this file

import torch
from bench_cifar import FastEpoch, Work, size_parser

from dividemix.runtime import available_cores, start

_WAIT = 1800  # seconds for the slowest to be ready: compilation


def worker(flags: dict[str, Any], threads: int | None, barrier: Any, results: Any) -> None:
    """Put (seconds of each epoch, bytes on the card or None, runtime's description) into `results`."""
    if threads:
        torch.set_num_threads(threads)
    runtime = start(flags["device"], width=flags["width"], eval_batch_size=flags["eval_batch_size"])
    work = Work.random(flags["samples"], flags["labeled"], flags["test_samples"])
    epoch = FastEpoch(work, runtime, flags["width"], flags["batch_size"])
    for number in range(flags["warmups"]):
        epoch.run(work.divisions(number))
    barrier.wait(_WAIT)
    numbers = range(flags["warmups"], flags["warmups"] + flags["repeats"])
    times = [epoch.run(work.divisions(number))["epoch"] for number in numbers]
    memory = torch.cuda.max_memory_reserved() if runtime.device.type == "cuda" else None
    results.put((times, memory, runtime.describe()))


def at_once(jobs: int, flags: dict[str, Any]) -> dict[str, Any]:
    """K = jobs processes. -> epoch_seconds, epochs_an_hour, memory (bytes of each on the card, or None), device"""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(jobs), context.Queue()
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, available_cores() // jobs)
    processes = [context.Process(target=worker, args=(flags, threads, barrier, results)) for _ in range(jobs)]
    for process in processes:
        process.start()
    measured = []
    while len(measured) < jobs:
        if results.empty() and any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
            raise SystemExit(f"K = {jobs}: a process ended early; its error stands above")
        if not results.empty():
            measured.append(results.get())
        processes[0].join(0.2)
    for process in processes:
        process.join()
    seconds = statistics.median(time for times, _, _ in measured for time in times)
    report = {"jobs": jobs, "epoch_seconds": seconds, "epochs_an_hour": 3600 * jobs / seconds}
    return report | {"memory": measured[0][1], "device": measured[0][2]}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = size_parser(__doc__, repeats=4, warmups=1)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 3], metavar="K", help="(default: 1 2 3)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if not 0 < args.labeled < args.samples or min(args.repeats, args.test_samples, args.batch_size, *args.jobs) < 1:
        parser.error("expected 0 < labeled < samples, and jobs, repeats, test_samples, batch_size of 1 or more")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    levels = [at_once(jobs, vars(args)) for jobs in args.jobs]
    report = {"jobs": levels, "device": levels[0]["device"], "flags": vars(args)}
    report["date"] = datetime.date.today().isoformat()
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    print(f"{report['device']}\n{'K':>3}{'seconds an epoch':>18}{'epochs an hour':>16}{'gain':>7}{'GB each':>9}")
    for level in levels:
        memory = "-" if level["memory"] is None else f"{level['memory'] / 1e9:.1f}"
        gain = level["epochs_an_hour"] / levels[0]["epochs_an_hour"]
        numbers = f"{level['epoch_seconds']:>18.3f}{level['epochs_an_hour']:>16.1f}{gain:>7.2f}"
        print(f"{level['jobs']:>3}{numbers}{memory:>9}")
    print(f"medians of {args.repeats} epochs of each process, after {args.warmups}; {report['date']}")
    return report


if __name__ == "__main__":
    main()
