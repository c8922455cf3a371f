"""What run folders say while and after they are written: how far a run is, and how long its epochs take. Reads the
small files alone, so that it can be done every second."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAIN, DIVIDED = "plain", "divided"  # the two kinds of epochs: of cross-entropy, and with co-divide


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
        found = json.loads(content, parse_constant=lambda _: None)  # NaN is no number
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


def hours(value: float) -> str:
    """'48 s', '12 min', '3.4 h'."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
