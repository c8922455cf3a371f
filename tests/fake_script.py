"""Stands for a training script: a run folder with records, and the same command again continues. No torch, so that a
test can start dozens of them.

    python fake_script.py --num_epochs 3 --run_dir DIR [--seconds 0.1] [--fail] [--deaf] [--quiet]

--seconds: of an epoch; --deaf: signals are ignored; --quiet: no result at the end. All other flags are passed over.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--num_epochs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0)
    for name in ("fail", "deaf", "quiet"):
        parser.add_argument(f"--{name}", action="store_true")
    args, _ = parser.parse_known_args()
    folder = args.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if args.deaf else stop)
    with open(folder / "times", "a") as times:
        print("start", time.time(), os.environ.get("OMP_NUM_THREADS"), os.getpid(), file=times)
    flags = {"num_epochs": args.num_epochs, "warm_up": 10, "seed": 123}
    about = {"command": ["Train_cifar.py"], "args": flags, "machine": "cpu", "commit": "c" * 40, "versions": {}}
    (folder / "args.json").write_text(json.dumps(about))
    if args.fail:
        print("error: this one fails", file=sys.stderr)
        return 1
    metrics = folder / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    print(f"begins with epoch {done}")
    for epoch in range(done, args.num_epochs):
        time.sleep(args.seconds)
        record = {"epoch": epoch, "phase": "train" if epoch else "warmup", "test_acc": 50.0 + epoch}
        record |= {"test_acc_net1": 40.0 + epoch, "best_acc": 50.0 + epoch, "seconds_train1": 2.0}
        with open(metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
    if not args.quiet:
        (folder / "result.json").write_text(json.dumps({"test_acc": 50.0}))
    with open(folder / "times", "a") as times:
        print("end", time.time(), file=times)
    return 0


def stop(number: int, _: object) -> None:
    print(f"interrupted: by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # as the real ones: a second signal kills
    time.sleep(1)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
