"""Does it cost accuracy? The same runs in two ways, over seeds: unless told otherwise, as fast as the device can and
in fp32 eager.

    python benchmarks/accuracy_pairs.py --seeds 5 --out_dir pairs -- --dataset fashionmnist --data_path ./data
    python benchmarks/accuracy_pairs.py --ways "blind=--recipe blind" paper= --out_dir blind -- --dataset digits --r 0.2

What follows -- goes to Train_cifar.py, and so do each way's own flags. Runs are kept in <out_dir>/<way>_seed<n>: the
same command again continues. Prints, for the best accuracy and the mean of the last 10 epochs, the mean difference
first way - second way over the seeds and its standard error. The noise is that of the noise file, the same for all
seeds.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "Train_cifar.py"
WAYS = ("fast=", "reference=--precision fp32 --no_graph --no_compile")
NUMBERS = {"best": "best_acc", "last 10": "last10_acc"}


def run(folder: Path, flags: list[str]) -> dict[str, float]:
    """One run in a process of its own. -> its last epoch's metrics."""
    subprocess.run([sys.executable, str(SCRIPT), *flags, "--run_dir", str(folder)], check=True)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def way(text: str) -> tuple[str, list[str]]:
    """'name=flags' -> name, flags."""
    name, separator, flags = text.partition("=")
    if not (name.isidentifier() and separator):
        raise argparse.ArgumentTypeError(f"expected NAME=FLAGS, got '{text}'")
    return name, shlex.split(flags)


def summary(pairs: list[dict[str, dict[str, float]]]) -> str:
    """For each number both means and the mean difference. pairs: {way: metrics, other way: metrics} of each seed."""
    lines = []
    first_way, second_way = pairs[0]
    for name, key in NUMBERS.items():
        of_ways = ([pair[way] for pair in pairs] for way in (first_way, second_way))
        first, second = ([run.get(f"{key}_ema", run[key]) for run in runs] for runs in of_ways)
        differences = [a - b for a, b in zip(first, second, strict=True)]
        mean, n = statistics.mean(differences), len(differences)
        error = statistics.stdev(differences) / n**0.5 if n > 1 else float("nan")
        verdict = "  MORE THAN TWO STANDARD ERRORS" if n > 1 and abs(mean) > 2 * error else ""
        by_seed = " ".join(f"{difference:+.2f}" for difference in differences)
        lines.append(
            f"{name:8} {first_way} {statistics.mean(first):.2f}, {second_way} {statistics.mean(second):.2f}; "
            f"difference {mean:+.2f} +- {error:.2f} (standard error, n = {n}: {by_seed}){verdict}"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to SEEDS")
    parser.add_argument("--out_dir", type=Path, default=Path("pairs"))
    default = [way(text) for text in WAYS]
    help_ways = "the two ways, each a name and its flags"
    parser.add_argument("--ways", type=way, nargs=2, default=default, metavar="NAME=FLAGS", help=help_ways)
    parser.add_argument("flags", nargs="*", help="of Train_cifar.py, after --")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    ways: dict[str, list[str]] = dict(args.ways)
    pairs: list[dict[str, dict[str, float]]] = []
    for seed in range(1, args.seeds + 1):
        common = [*args.flags, "--noise_seed", "123", "--seed", str(seed)]
        pairs.append(
            {name: run(args.out_dir / f"{name}_seed{seed}", [*common, *way_flags]) for name, way_flags in ways.items()}
        )
        print(summary(pairs), flush=True)


if __name__ == "__main__":
    main()
