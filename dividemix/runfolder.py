"""Reading a run folder: what a run left, as the report needs it. A run under way lacks some of it; damaged files count
as missing, with a warning."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError, histograms, recipes, warn


@dataclass(frozen=True)
class RunFolder:
    """A record per epoch and what else there is, empty where it is missing."""

    path: Path
    about: dict[str, Any]  # args.json
    records: list[dict[str, Any]]
    result: dict[str, Any]  # the final metrics, {} before the end
    labels: dict[str, NDArray]
    label_scores: dict[str, NDArray]
    thumbnails: dict[str, NDArray]
    histograms: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def args(self) -> dict[str, Any]:
        return self.about["args"]

    @property
    def script(self) -> str:
        """The training script's file name, '' where it is not known."""
        command = self.about.get("command")
        return Path(str(command[0])).name if isinstance(command, list) and command else ""

    @property
    def data(self) -> dict[str, Any]:
        """What args.json says of the data."""
        data = self.about.get("data")
        return data if isinstance(data, dict) else {}

    @property
    def class_names(self) -> list[str]:
        names = self.data.get("classes")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def measured(self) -> str:
        """The accuracy that every epoch has."""
        return "test_acc" if "test_acc" in self.records[-1] else "val_acc"

    @property
    def ablation(self) -> recipes.Ablation:
        """What was left out; nothing where the run does not say so."""
        return recipes.ABLATIONS.get(str(self.args.get("ablation")), recipes.ABLATIONS["none"])

    @property
    def nets(self) -> range:
        """The networks' numbers: 1 and 2, or 1 alone."""
        return range(1, 1 + self.ablation.nets)

    @property
    def best(self) -> float | None:
        """Test accuracy of the best epoch; None where it is not known yet."""
        return self.records[-1].get("best_acc", self.result.get("test_acc"))

    @property
    def divides(self) -> bool:
        """Whether it is DivideMix, and not the cross-entropy that it is compared with."""
        return self.args.get("method") != "ce"

    def column(self, name: str) -> list[float | None]:
        """A metric over the epochs, None where it has no value."""
        return [record.get(name) for record in self.records]

    def numbers(self, name: str) -> list[float]:
        """The same, epochs without a value left out."""
        return [value for value in self.column(name) if isinstance(value, int | float)]


def read_run(path: Path) -> RunFolder:
    """Raises DivideMixError where there is no run, or none with a finished epoch."""
    try:
        about = json.loads((path / "args.json").read_text())
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        # Half a line at the end is being written, or was when the run was killed.
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        if not isinstance(about["args"], dict):
            raise ValueError("args.json has no flags")
        records = [usable(record) if isinstance(record, dict) else {} for record in records]
        if not all(isinstance(record.get("epoch"), int) for record in records):
            raise ValueError("metrics.jsonl has lines that are no epoch")
        about["args"] = usable(about["args"])
        if records and "test_acc" not in records[-1] and "val_acc" not in records[-1]:
            raise ValueError("metrics.jsonl has no accuracy")
        accuracy = "test_acc" if records and "test_acc" in records[-1] else "val_acc"
        numbers = [about["args"]["warm_up"], *(record[accuracy] for record in records)]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("text where a number is expected")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DivideMixError(f"{path} is not a run folder ({error})") from error
    if not records:
        raise DivideMixError(f"{path} has no finished epoch yet")
    parts = {name: arrays(path / f"{name}.npz") for name in ("labels", "label_scores", "thumbnails")}
    return RunFolder(path, about, records, read_result(path), **parts, histograms=read_histograms(path))


def usable(values: dict[str, Any]) -> dict[str, Any]:
    """None for numbers that nothing can be computed with or drawn: NaN, infinite, beyond 10^15."""
    return {k: None if isinstance(v, int | float) and not -1e15 < v < 1e15 else v for k, v in values.items()}


def read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads((path / "result.json").read_text())
        return usable(result) if isinstance(result, dict) else {}
    except (OSError, ValueError, RecursionError):  # not finished yet
        return {}


def read_histograms(path: Path) -> list[dict[str, Any]]:
    """histograms.jsonl: an object for each divided epoch."""
    try:
        lines = (path / "histograms.jsonl").read_text().splitlines()
    except (OSError, ValueError):
        return []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    sound = [entry for entry in entries if histograms.is_sound(entry)]
    if len(sound) < len(lines):
        warn(f"{path / 'histograms.jsonl'}: {len(lines) - len(sound)} of {len(lines)} lines are damaged, left out")
    return sound


def arrays(path: Path) -> dict[str, NDArray]:
    """An .npz without pickles as a dict; {} where there is none, and with a warning where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        return {}
    except Exception as error:  # damage can end in anything: BadZipFile, ValueError, EOFError, zlib.error, KeyError ...
        what = " ".join(str(error).split())[:200] or type(error).__name__
        what = "not an archive of plain arrays" if "pickle" in what else what  # numpy's advice is to trust the file
        warn(f"{path} cannot be read and is left out ({what})")
        return {}
