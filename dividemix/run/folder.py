"""Reading a run folder: what a run left, as the report needs it. A run under way lacks some of it."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError, recipes


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
        """The training script's file name."""
        return Path(self.about["command"][0]).name

    @property
    def data(self) -> dict[str, Any]:
        """What args.json says of the data."""
        return self.about["data"]

    @property
    def class_names(self) -> list[str]:
        return self.data.get("classes") or []

    @property
    def measured(self) -> str:
        """The accuracy that every epoch has."""
        return "test_acc" if "test_acc" in self.records[-1] else "val_acc"

    @property
    def ablation(self) -> recipes.Ablation:
        """What was left out; nothing where the run does not say so."""
        return recipes.ABLATIONS.get(self.args.get("ablation"), recipes.ABLATIONS["none"])

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
    """Raises DivideMixError where there is no run, or none with a finished epoch, and for a damaged file."""
    about = read_about(path)
    records = load(path / "metrics.jsonl", json_lines, [])
    if not records:
        raise DivideMixError(f"{path} has no finished epoch yet")
    files = {name: load(path / f"{name}.npz", arrays, {}) for name in ("labels", "label_scores", "thumbnails")}
    files["histograms"] = load(path / "histograms.jsonl", json_lines, [])
    return RunFolder(path, about, records, load(path / "result.json", json.loads, {}), **files)


def read_about(path: Path) -> dict[str, Any]:
    """args.json. Raises DivideMixError where the folder is none of a run, and for a damaged file."""
    about = load(path / "args.json", json.loads, {})
    if not (isinstance(about, dict) and {"args", "model"} <= about.keys()):
        raise DivideMixError(f"{path} is not a run folder of this project: its args.json is missing, or another's")
    return about


def load(file: Path, parse: Callable[[bytes], Any], otherwise: Any) -> Any:
    """What `parse` makes of a file, `otherwise` where there is none. Raises DivideMixError for a damaged one."""
    try:
        return parse(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return otherwise
    except Exception as error:  # damage can end in anything: JSONDecodeError, BadZipFile, zlib.error ...
        problem = f"{file} cannot be read ({type(error).__name__})"
        raise DivideMixError(f"{problem}: delete it, and the run's training command writes it anew") from error


def json_lines(content: bytes) -> list[dict[str, Any]]:
    """Half a line at the end is being written, or was when the run was killed."""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def arrays(content: bytes) -> dict[str, NDArray]:
    """Of an .npz without pickles."""
    return dict(np.load(io.BytesIO(content), allow_pickle=False))
