"""`make demo`: cross-entropy and DivideMix on digits, half of whose labels were drawn anew. Minutes on 2 cores.

python benchmarks/demo.py              # trains both, or continues, and says what came out
python benchmarks/demo.py --seeds 5    # with 5 seeds, and the mean of each method
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import Train_cifar
from dividemix.report import issues, mean_and_deviation, report
from dividemix.run import command_line, read_run

FLAGS = "--dataset digits --noise_mode sym --r 0.5 --width 16 --warm_up 8 --num_epochs 40"
NAMES = {"ce": "cross-entropy", "dividemix": "DivideMix"}


def train(method: str, k: int, out_dir: str) -> dict[str, Any]:
    """Run `k` of a method, or what is left of it. -> its final metrics"""
    command = f"{FLAGS} --method {method} --seed {123 + k} --run_dir {out_dir}/demo-{NAMES[method]}{k or ''}"
    print(f"\npython Train_cifar.py {command}\n", flush=True)
    return Train_cifar.main(command.split())


def summary(ce: dict[str, Any], dividemix: dict[str, Any], page: Path) -> list[str]:
    """Three sentences, a picture and a page, three commands. ce, dividemix: final metrics; page: the folder of their
    report."""
    folder = Path(dividemix["run_dir"])
    truth = issues.against_truth(issues.find(read_run(folder)))
    means = f"{ce['last10_acc']:.1f} % (cross-entropy) and {dividemix['last10_acc']:.1f} % (DivideMix)"
    return [
        "",
        f"Trained: small networks, on {truth.n} images of digits; {truth.wrong} of their labels are wrong.",
        f"Reached: test accuracy {means}, mean of the last 10 epochs.",
        f"Found: DivideMix lists {truth.listed} labels as wrong, and {truth.listed_wrong} of these are wrong.",
        "",
        f"Look at: {page / 'figures' / 'accuracy.png'}  (cross-entropy learns the wrong labels, DivideMix does not)",
        f"         {folder / report.PAGE}  (the images whose labels look wrong)",
        "",
        "Try next:",
        "python Train_cifar.py --data_path ./cifar-10 --download --r 0.5   # a row of the paper",
        "python -m dividemix issues ./your-images                          # which of your labels are wrong?",
        f"python -m dividemix report {folder} --export_clean corrected",
    ]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="(default: 1)")
    parser.add_argument("--out_dir", default="./checkpoint", help="folder of the run folders (default: ./checkpoint)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    pairs = [[train(method, k, args.out_dir) for method in NAMES] for k in range(args.seeds)]
    page = Path(args.out_dir) / "demo_report"
    with contextlib.redirect_stdout(io.StringIO()):  # said at the end of each run
        report.main([*(run["run_dir"] for run in reversed(pairs[0])), "--out", str(page)])
    if args.seeds > 1:
        for name in ("best_acc", "last10_acc"):
            values = [mean_and_deviation([run[name] for run in runs]) for runs in zip(*pairs, strict=True)]
            print(f"{name}, n = {args.seeds}: cross-entropy {values[0]}, DivideMix {values[1]}")
    print(*summary(*pairs[0], page), sep="\n")


if __name__ == "__main__":
    command_line(main)
