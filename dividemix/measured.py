"""What run folders say while and after they are written: how far a run is, how long its epochs take, and from that how
long others will take. Reads the small files alone, so that it can be done every second."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dividemix.experiments import Experiment
from dividemix.plan import Plan, grouped

PLAIN, DIVIDED = "plain", "divided"  # the two kinds of epochs: of cross-entropy, and with co-divide
_SIZE = ("dataset", "arch", "width", "batch_size", "limit_train", "num_batches", "image_size", "num_class")


@dataclass(frozen=True)
class Found:
    """A run folder: args.json, a record per finished epoch, result.json ({} before the end)."""

    folder: Path
    about: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def args(self) -> dict[str, Any]:
        args = self.about.get("args")
        return args if isinstance(args, dict) else {}

    @property
    def script(self) -> str:
        command = self.about.get("command")
        return Path(str(command[0])).name if isinstance(command, list) and command else ""

    def is_finished(self, num_epochs: int) -> bool:
        return bool(self.result) and len(self.records) >= num_epochs

    def column(self, name: str) -> list[float]:
        """A number of each epoch that has it."""
        return [value for record in self.records if isinstance(value := record.get(name), int | float)]

    @property
    def best(self) -> float | None:
        """Of the accuracies that an epoch has, the peak so far."""
        found = self.column("test_acc") or self.column("val_acc")
        return max(found) if found else None


def read(folder: Path) -> Found:
    """Whatever is missing, damaged or half written counts as not there."""
    records = []
    for line in text(folder / "metrics.jsonl").splitlines():
        record = parsed(line)
        if isinstance(record.get("epoch"), int):
            records.append(record)
    return Found(folder, parsed(text(folder / "args.json")), records, parsed(text(folder / "result.json")))


def text(path: Path) -> str:
    try:
        return path.read_text(errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def parsed(content: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Time


def seconds(record: dict[str, Any]) -> float:
    """All phases of an epoch."""
    return sum(v for k, v in record.items() if k.startswith("seconds_") and isinstance(v, int | float))


def epoch_seconds(found: Found) -> dict[str, float]:
    """Median seconds of an epoch of each kind that the run has had, without the first of a kind where there are more:
    it compiles and captures."""
    times: dict[str, list[float]] = {}
    for record in found.records:
        times.setdefault(DIVIDED if record.get("phase") == "train" else PLAIN, []).append(seconds(record))
    return {kind: statistics.median(each[1:] or each) for kind, each in times.items()}


def to_do(num_epochs: int, warm_up: int | None, done: int) -> dict[str, int]:
    """Epochs of each kind that are left. warm_up: None where nothing is divided."""
    plain = num_epochs if warm_up is None else min(warm_up, num_epochs)
    left_plain = max(plain - done, 0)
    return {PLAIN: left_plain, DIVIDED: max(num_epochs - done, 0) - left_plain}


def time_left(found: Found, num_epochs: int) -> float | None:
    """Seconds until the last epoch, None where an epoch of a kind to come was not seen yet."""
    warm_up = None if found.args.get("method") == "ce" else found.args.get("warm_up")
    left = to_do(num_epochs, warm_up if isinstance(warm_up, int) else None, len(found.records))
    return total(left, epoch_seconds(found))


def total(epochs: dict[str, int], each: dict[str, float]) -> float | None:
    if any(n and kind not in each for kind, n in epochs.items()):
        return None
    return sum(n * each[kind] for kind, n in epochs.items() if n)


@dataclass(frozen=True)
class Estimate:
    """What a run still needs. each: seconds of an epoch by kind; sources: the run folders that they were measured in.
    seconds: None where it was not measured here."""

    epochs: dict[str, int]
    each: dict[str, float]
    sources: tuple[str, ...]
    seconds: float | None

    def __str__(self) -> str:
        if not sum(self.epochs.values()):
            return "finished"
        if self.seconds is None:
            return f"{sum(self.epochs.values())} epochs; time not measured here"
        parts = [f"{n} x {self.each[kind]:.1f} s" for kind, n in self.epochs.items() if n]
        return f"{' + '.join(parts)} = {hours(self.seconds)} (measured: {', '.join(self.sources)})"


def estimate(run: Plan, extra: Sequence[str], out_dir: Path) -> Estimate:
    """From the epochs of the same row's runs in out_dir, else of runs with the same data, network and batch."""
    experiment, own = run.experiment, read(run.folder)
    wanted = experiment.setting | {name: " ".join(words) for name, words in grouped(extra).items()}
    warm_up = None if wanted.get("method") == "ce" else int(wanted["warm_up"])
    epochs = to_do(run.num_epochs, warm_up, len(own.records) if own.records else 0)
    each: dict[str, float] = {}
    sources: dict[str, None] = {}
    for found in ordered(run, out_dir):
        for kind, value in epoch_seconds(found).items():
            if epochs[kind] and kind not in each and is_like(found, experiment, wanted):
                each[kind], sources[found.folder.name] = value, None
    return Estimate(epochs, each, tuple(sources), total(epochs, each))


def ordered(run: Plan, out_dir: Path) -> Iterable[Found]:
    """All runs in out_dir: the run itself, those of its row, then others."""
    folders = [path.parent for path in sorted(out_dir.glob("*/metrics.jsonl"))] if out_dir.is_dir() else []
    same = f"{run.experiment.run_name}_seed"
    return map(read, sorted(folders, key=lambda path: (path != run.folder, not path.name.startswith(same), path)))


def is_like(found: Found, experiment: Experiment, wanted: dict[str, Any]) -> bool:
    """Whether its epochs are the same work: same script, data, network, batch, parts of the method. (Of other noise
    another part is labeled, and divided epochs differ by that.)"""
    same = all(str(found.args.get(name)) == str(wanted.get(name)) for name in _SIZE if name in wanted)
    variants = [str(each.get("ablation") or "none") for each in (found.args, wanted)]
    return found.script == experiment.script and same and variants[0] == variants[1]


def wall_seconds(each: Sequence[float], slots: int) -> float:
    """Until the last of these runs ends, where each free slot takes the next."""
    busy = [0.0] * max(slots, 1)
    for value in each:
        k = busy.index(min(busy))
        busy[k] += value
    return max(busy)


def hours(value: float) -> str:
    """'48 s', '12 min', '3.4 h'."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
