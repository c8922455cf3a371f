"""Stands for a training script: a run folder with records, and the same command again continues. No torch, so that a
test can start several of them. Flags that it does not know are ignored.

    python fake_script.py --num_epochs 3 --run_dir DIR [--seconds 0.1] [--fail]
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

INFO = {"machine": "cpu", "versions": {}, "starts": [{"commit": "c" * 40}], "data": {"lines": ["(official cifar10)"]}}
RECORD = {"test_acc": 50.0, "test_acc_net1": 40.0, "best_acc": 50.0, "seconds_train1": 36.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--num_epochs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="of an epoch")
    parser.add_argument("--fail", action="store_true")
    args, _ = parser.parse_known_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # like the real scripts
            signal.signal(number, stop)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    with open(args.run_dir / "starts", "a") as starts:
        print(os.getpid(), os.environ.get("OMP_NUM_THREADS"), file=starts)
    (args.run_dir / "args.json").write_text(json.dumps(INFO | {"args": {"num_epochs": args.num_epochs}}))
    if args.fail:
        sys.exit("error: this one fails")
    metrics = args.run_dir / "metrics.jsonl"
    for epoch in range(len(metrics.read_text().splitlines()) if metrics.exists() else 0, args.num_epochs):
        time.sleep(args.seconds)
        with open(metrics, "a") as file:
            file.write(json.dumps({"epoch": epoch} | RECORD) + "\n")
    (args.run_dir / "result.json").write_text(json.dumps({"test_acc": 50.0}))


def stop(number: int, _: object) -> None:
    print(f"interrupted: by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, signal.SIG_DFL)  # like the real scripts: a second signal kills
    time.sleep(0.2)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
