"""Time and memory of what is kept and done per sample, at 50,000, 1 million and 10 million samples.

    python benchmarks/bench_scale.py                                     # about 5 minutes on 2 cores, 5 GB
    python benchmarks/bench_scale.py --sizes 100000 --json scale.json

No image is opened: it is the lists of paths and labels, drawing samples, co-dividing and planning batches. Each size
runs in a process of its own, each part once. Memory is the resident peak of a part beyond what was there before it.
Past the limit of the fit (`dividemix.codivide.FIT_LIMIT`) the mixture is also fitted to all losses, which shows what
the subsample changes.
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataloader_clothing1M
from dividemix import codivide
from dividemix.data import ImageList, plan_mixmatch, read_lines
from dividemix.runtime import Ranks, available_cores

SAMPLE = 32_000  # images of a Clothing1M epoch
NUM_CLASS = dataloader_clothing1M.NUM_CLASS


def random_losses(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) float32 as a net gives them after its warm-up, and (n,) bool, which labels are right: 60 %, with small
    losses; the others' lie around 0.6 of the largest."""
    rng = np.random.default_rng(1)
    clean = rng.random(n) < 0.6
    losses = np.where(clean, rng.gamma(1.5, 0.06, n), rng.normal(0.6, 0.13, n).clip(0.01))
    return losses.astype(np.float32), clean


def write_lists(root: Path, n: int) -> None:
    """Clothing1M's five key lists, n training images of 14 classes of unequal size; for the others one image each."""
    rng = np.random.default_rng(0)
    classes = (NUM_CLASS * rng.random(n) ** 1.5).astype(int).tolist()
    first, second = rng.integers(0, 10**10, (2, n)).tolist()
    with open(root / "noisy_train_key_list.txt", "w") as keys, open(root / "noisy_label_kv.txt", "w") as labels:
        for i, (a, b, c) in enumerate(zip(first, second, classes, strict=True)):
            key = f"images/{i % 10}/{i // 10 % 100:02}/{a:010},{b:010}-{i}.jpg"
            keys.write(f"{key}\n")
            labels.write(f"{key} {c}\n")
    for name in ("val", "test"):
        (root / f"clean_{name}_key_list.txt").write_text(f"images/{name}.jpg\n")
    (root / "clean_label_kv.txt").write_text("images/val.jpg 0\nimages/test.jpg 1\n")


# ---- One size, in its own process ----


class Meter:
    """What each part took: seconds, and its peak of resident memory beyond what was there before."""

    def __init__(self) -> None:
        self.highest_mb = 0.0  # of all parts, with all that is there
        self.seconds: dict[str, float] = {}
        self.peak_mb: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)  # else a part fills what others have freed, and seems to need nothing
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from now
        before, begin = memory_mb("VmRSS"), time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
        peak = memory_mb("VmHWM")
        self.peak_mb[name], self.highest_mb = max(0.0, peak - before), max(self.highest_mb, peak)


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in MB of 10^6 bytes; 0 where Linux's /proc is missing."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith(field + ":"))
    return 0.0


def measure_size(n: int, batch_size: int, fit_limit: int) -> dict[str, Any]:
    """Every part at n samples."""
    codivide.FIT_LIMIT = fit_limit
    meter, start_mb = Meter(), memory_mb("VmRSS")
    figures = lists(meter, n) | dividing(meter, n, batch_size)
    memory = {"start_mb": start_mb, "highest_mb": meter.highest_mb}
    return {"samples": n, "seconds": meter.seconds, "peak_mb": meter.peak_mb, **memory, **figures}


def lists(meter: Meter, n: int) -> dict[str, Any]:
    """The lists of images, and an epoch's sample of them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_lists(root, n)
        with meter.measure("read one list with labels"):
            lines = read_lines(root / "noisy_label_kv.txt", NUM_CLASS, drop=b"images/")
        blocks = sys.getallocatedblocks()
        with meter.measure("pack it (ImageList)"):
            images = ImageList(folder, folder, "", lines.paths, lines.labels, NUM_CLASS, lines.numbers)
        objects = sys.getallocatedblocks() - blocks
        del lines
        held = images.paths.nbytes + images.labels.nbytes + images.numbers.nbytes
        del images
        with meter.measure("Clothing1M: keys and labels joined"):
            train = dataloader_clothing1M.find(root)[0]["train"]
    rng = np.random.default_rng(2)
    for name, size in ((f"balanced sample of {SAMPLE:,}", SAMPLE), ("balanced sample of a quarter", n // 4)):
        with meter.measure(name):
            index = dataloader_clothing1M.balanced_sample(train.labels, size, NUM_CLASS, rng)
    with meter.measure("that quarter as a list"):
        train.select(index)
    return {"list_bytes_per_sample": held / n, "list_objects": objects, "path_bytes": train.paths.nbytes / n}


def dividing(meter: Meter, n: int, batch_size: int) -> dict[str, Any]:
    """Co-divide of one net, and the batches of one phase."""
    losses, clean = random_losses(n)
    codivide.codivide(losses[:1000], 0.5)  # starts scikit-learn's threads
    mixture = codivide.Mixture(threshold=0.5)
    with meter.measure("co-divide, one net"):
        division = mixture.divide(losses)
    with meter.measure("AUC"):
        auc = codivide.auc(division.clean_probability, clean)
    figures: dict[str, Any] = {"labeled": int(division.labeled.sum()), "auc": auc}
    if n > codivide.FIT_LIMIT:
        second = codivide.codivide(losses, 0.5, random_state=1)
        figures["two_subsamples"] = difference(division, second)
        codivide.FIT_LIMIT, limit = n, codivide.FIT_LIMIT
        with meter.measure("co-divide fitted to all"):
            full = codivide.codivide(losses, 0.5)
        codivide.FIT_LIMIT = limit
        figures["subsample_or_all"] = difference(division, full)
        figures["auc_all"] = codivide.auc(full.clean_probability, clean)
        del second, full
    with meter.measure(f"plan of batches of {batch_size}"):
        labeled, _ = plan_mixmatch(division, batch_size, np.random.default_rng(3), Ranks())
    return figures | {"batches": len(labeled)}


def difference(a: codivide.Division, b: codivide.Division) -> dict[str, float]:
    dp = np.abs(a.clean_probability - b.clean_probability)
    return {
        "change_sides": int((a.labeled != b.labeled).sum()),
        "max_dp": float(dp.max()),
        "mean_dp": float(dp.mean()),
        "max_difference_of_means": float(np.abs(a.means - b.means).max()),
    }


# ---- All sizes ----


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 1_000_000, 10_000_000])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--fit_limit", type=int, default=codivide.FIT_LIMIT)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if min(*args.sizes, args.fit_limit) < 100 or args.batch_size < 1:
        parser.error("expected sizes and a fit_limit of 100 or more, and a batch_size of 1 or more")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    sizes = []
    for n in args.sizes:
        # Spawned, so that it starts with nothing of the size before
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sizes.append(pool.apply(measure_size, (n, args.batch_size, args.fit_limit)))
        print(f"{n:,} samples done", file=sys.stderr, flush=True)
    versions = {m.__name__: m.__version__ for m in (torch, np, sklearn)} | {"python": platform.python_version()}
    report = {"sizes": sizes, "cores": available_cores(), "versions": versions}
    report |= {"date": datetime.date.today().isoformat(), "flags": vars(args)}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    print_table(report)
    return report


def print_table(report: dict[str, Any]) -> None:
    sizes = report["sizes"]
    print(f"{'seconds, peak MB':<38}" + "".join(f"{size['samples']:>20,}" for size in sizes))
    for name in max((size["seconds"] for size in sizes), key=len):
        cells = []
        for size in sizes:
            is_measured = name in size["seconds"]
            cells.append(f"{size['seconds'][name]:.3f} s {size['peak_mb'][name]:6,.0f} MB" if is_measured else "")
        print(f"{name:<38}" + "".join(f"{cell:>20}" for cell in cells))
    for field, title in {
        "highest_mb": "MB of the process at its highest",
        "start_mb": "  of which at its start",
        "list_bytes_per_sample": "list: bytes a sample",
        "path_bytes": "  of which the path",
        "list_objects": "list: Python objects, all together",
    }.items():
        print(f"{title:<38}" + "".join(f"{size[field]:>20,.4g}" for size in sizes))
    for size in sizes:
        for field, title in {
            "subsample_or_all": "fitted to a subsample or to all",
            "two_subsamples": "two subsamples",
        }.items():
            if field in size:
                d = size[field]
                print(
                    f"{size['samples']:,}, {title}: {d['change_sides']:,} samples change sides, p differs by "
                    f"{d['max_dp']:.2g} at most, {d['mean_dp']:.2g} on average"
                )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"one run of each; {report['cores']} cores; {versions}; {report['date']}")


if __name__ == "__main__":
    main()
