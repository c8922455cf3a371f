"""`make gpu`: the tests that need a CUDA card, then the benchmarks, in so many seconds.

    python benchmarks/gpu.py --seconds 480                    # all parts, as far as the time goes
    python benchmarks/gpu.py --seconds 180 bench end_to_end   # these parts, in this order

The tests, in six processes, have half of the time; every other part has what is left. A part that the limit cuts off
keeps what it has printed and written so far (gpu-<part>.json here), and is no failure. The exit status is 1 if a part
failed.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_LIMIT = 150  # seconds for one test, where pytest-timeout is installed
GRACE = 15  # seconds that a part has to end after its limit
SHORTEST = 20  # seconds; with less no part is begun

PARTS = {
    "tests": "-m pytest -m gpu tests/test_gpu.py tests/deploy -v --durations 10 -n 6 --dist load --maxschedchunk 1",
    "bench": "bench_cifar.py --repeats 4 --warmups 1",
    "ablation": "bench_cifar.py --ablate --repeats 1 --warmups 1",
    "plain": "bench_cifar.py --against_plain --repeats 1 --warmups 1",
    "images": "bench_images.py --arch resnet50",
    "checkpoint": "bench_checkpoint.py",
    "jobs": "bench_jobs.py",
    "end_to_end": "bench_cifar.py --repeats 1 --warmups 1 --end_to_end 8",
}


def command(part: str, device: str) -> list[str]:
    """Of a part, for this Python."""
    first, *flags = PARTS[part].split()
    if part == "tests":
        limit = ["--timeout", str(TEST_LIMIT)] if importlib.util.find_spec("pytest_timeout") else []
        return [sys.executable, first, *flags, *limit]
    script = str(ROOT / "benchmarks" / first)
    return [sys.executable, script, *flags, "--device", device, "--json", f"gpu-{part}.json"]


def run(arguments: list[str], seconds: float) -> int | None:
    """Run a command in a process group of its own. -> its exit status; None if it was stopped after `seconds`."""
    # Six processes compile at a time: Inductor's default is as many helpers as there are cores, for each of them.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    process = subprocess.Popen(arguments, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then prints the failures so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever it has left running
        process.wait()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--device", default="cuda", help="of the benchmarks")
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"{unknown[0]}: expected parts of {', '.join(PARTS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    end, lines, failed = time.monotonic() + args.seconds, [], False
    for part in args.parts or PARTS:
        left = end - time.monotonic() - GRACE
        if left < SHORTEST:
            lines.append(f"{part:<12}not begun: no time left")
            continue
        arguments, begin = command(part, args.device), time.monotonic()
        print(f"\n==== {part}: {' '.join(arguments)}", flush=True)
        status = run(arguments, args.seconds / 2 if part == "tests" and args.parts != ["tests"] else left)
        outcome = {None: "cut off by the limit", 0: "done"}.get(status, f"failed, exit status {status}")
        failed |= bool(status)
        lines.append(f"{part:<12}{time.monotonic() - begin:6.0f} s  {outcome}")
        print(f"==== {lines[-1]}", flush=True)
    print("\n".join(["", "make gpu:", *lines]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
