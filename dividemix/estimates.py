"""How long runs will take: from the epochs that are in run folders already, and the exact commands, for --dry_run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dividemix.experiments import Experiment
from dividemix.measured import Found, epoch_seconds, hours, read, to_do, total
from dividemix.plan import Plan, grouped, shown

# Flags that say how much work an epoch is
_SIZE = ("dataset", "arch", "width", "batch_size", "limit_train", "num_batches", "image_size", "num_class")


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


def estimate(run: Plan, extra: Sequence[str], there: Sequence[Found]) -> Estimate:
    """From the epochs of the same row's runs of those that are there, else of runs with the same data, network and
    batch."""
    experiment, own = run.experiment, read(run.folder)
    wanted = experiment.setting | {name: " ".join(words) for name, words in grouped(extra).items()}
    warm_up = None if wanted.get("method") == "ce" else int(wanted["warm_up"])
    epochs = to_do(run.num_epochs, warm_up, len(own.records))
    each: dict[str, float] = {}
    sources: dict[str, None] = {}
    for found in ordered(run, there) if sum(epochs.values()) else []:
        if all(kind in each for kind, n in epochs.items() if n):
            break
        for kind, value in epoch_seconds(found).items():
            if epochs[kind] and kind not in each and is_like(found, experiment, wanted):
                each[kind], sources[found.folder.name] = value, None
    return Estimate(epochs, each, tuple(sources), total(epochs, each))


def all_in(out_dir: Path) -> list[Found]:
    """The runs that are there."""
    return [read(path.parent) for path in sorted(out_dir.glob("*/metrics.jsonl"))] if out_dir.is_dir() else []


def ordered(run: Plan, there: Sequence[Found]) -> list[Found]:
    """The run itself, those of its row, then others."""
    same = f"{run.experiment.run_name}_seed"
    return sorted(there, key=lambda found: (found.folder != run.folder, not found.folder.name.startswith(same)))


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


def dry_run(runs: Sequence[Plan], extra: Sequence[str], out_dir: Path, slots: int, where: str) -> list[str]:
    """Each run's command and time, then the time of all. slots: how many run at once; where: for people."""
    lines, known, unknown, there = [], [], 0, all_in(out_dir)
    for run in runs:
        found = estimate(run, extra, there)
        lines += [f"# {run.name}: {'; '.join(filter(None, (run.missing, str(found))))}", shown(run.command)]
        if run.missing or not sum(found.epochs.values()):
            continue
        known += [] if found.seconds is None else [found.seconds]
        unknown += found.seconds is None
    missing = sum(bool(run.missing) for run in runs)
    lines.append(f"# {len(runs)} runs: {len(known)} of known length, {unknown} not measured here, {missing} lack data")
    if known:
        lines.append(f"# those of known length: {hours(wall_seconds(known, slots))} {where}")
    return lines
