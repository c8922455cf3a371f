"""Does the fast way cost accuracy? The same runs twice, as fast as the machine can and in fp32 eager, over seeds.

    python benchmarks/accuracy_pairs.py --seeds 5 --out_dir pairs -- --dataset fashionmnist --data_path ./data

What follows -- goes to Train_cifar.py. Runs are kept in <out_dir>/fast_seed<n> and reference_seed<n>: the same command
again continues. Prints, for the best accuracy and the mean of the last 10 epochs, the mean difference fast - reference
over the seeds and its standard error. The noise is that of the noise file, the same for all seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "Train_cifar.py"
WAYS = {"fast": [], "reference": ["--precision", "fp32", "--no_graph", "--no_compile"]}
NUMBERS = {"best": "best_acc", "last 10": "last10_acc"}


def run(folder: Path, flags: list[str]) -> dict[str, float]:
    """One run in a process of its own. -> its last epoch's metrics."""
    subprocess.run([sys.executable, str(SCRIPT), *flags, "--run_dir", str(folder)], check=True)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


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
        folders = {way: args.out_dir / f"{way}_seed{seed}" for way in WAYS}
        pairs.append({way: run(folders[way], [*common, *how]) for way, how in WAYS.items()})
        print(summary(pairs), flush=True)


if __name__ == "__main__":
    main()
