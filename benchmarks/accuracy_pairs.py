"""Does the fast way cost accuracy? The same runs twice, as fast as the machine can and in fp32 eager, over seeds.

    python benchmarks/accuracy_pairs.py --seeds 5 --out_dir pairs -- --dataset fashionmnist --data_path ./data

What follows -- goes to Train_cifar.py. Runs are kept in <out_dir>/fast and <out_dir>/reference: the same command again
continues. Prints, for the best accuracy and the mean of the last 10 epochs, the mean difference fast - reference over
the seeds and its standard error. The noise is that of the noise file, the same for all seeds.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import Train_cifar

WAYS = {"fast": [], "reference": ["--precision", "fp32", "--no_graph", "--no_compile"]}
NUMBERS = {"best": "best_acc", "last 10": "last10_acc"}


def run(flags: list[str]) -> dict[str, float]:
    """One run in a process of its own (a runtime changes settings of the whole process), then its last metrics."""
    subprocess.run([sys.executable, Train_cifar.__file__, *flags], check=True)
    return Train_cifar.main(flags)  # finished: only reads what it ended with


def summary(pairs: list[dict[str, dict[str, float]]]) -> str:
    """A table of pairs {'fast': metrics, 'reference': metrics}, one a seed, and the mean differences."""
    lines = []
    for name, key in NUMBERS.items():
        fast, reference = ([pair[way][key] for pair in pairs] for way in WAYS)
        differences = [a - b for a, b in zip(fast, reference, strict=True)]
        mean, n = statistics.mean(differences), len(differences)
        error = statistics.stdev(differences) / n**0.5 if n > 1 else float("nan")
        verdict = "  MORE THAN TWO STANDARD ERRORS" if n > 1 and abs(mean) > 2 * error else ""
        each = " ".join(f"{difference:+.2f}" for difference in differences)
        lines.append(
            f"{name:8} fast {statistics.mean(fast):.2f}, reference {statistics.mean(reference):.2f}; difference "
            f"{mean:+.2f} +- {error:.2f} (standard error, n = {n}: {each}){verdict}"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to SEEDS")
    parser.add_argument("--out_dir", type=Path, default=Path("pairs"))
    parser.add_argument("flags", nargs="*", help="of Train_cifar.py, after --")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pairs = []
    for seed in range(1, args.seeds + 1):
        common = [*args.flags, "--noise_seed", "123", "--seed", str(seed)]
        pairs.append({way: run([*common, *how, "--out_dir", str(args.out_dir / way)]) for way, how in WAYS.items()})
        print(summary(pairs), flush=True)


if __name__ == "__main__":
    main()
