"""Read a run folder, for the report. Some files are missing while the run is still training."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError, recipes
from dividemix.run import logs


@dataclass(frozen=True)
class RunFolder:
    """The files of a run folder; a missing one is empty here."""

    path: Path
    args_json: dict[str, Any]
    records: list[dict[str, Any]]  # metrics.jsonl, one for each epoch
    result: dict[str, Any]  # result.json, the final metrics
    labels: dict[str, NDArray]
    label_scores: dict[str, NDArray]
    thumbnails: dict[str, NDArray]
    histograms: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def args(self) -> dict[str, Any]:
        return self.args_json["args"]

    @property
    def script(self) -> str:
        """The training script's file name."""
        return Path(self.args_json["command"][0]).name

    @property
    def data(self) -> dict[str, Any]:
        """What args.json says of the data."""
        return self.args_json["data"]

    @property
    def class_names(self) -> list[str]:
        return self.data.get("classes") or []

    @property
    def measured(self) -> str:
        """The name of the accuracy that every epoch has; '' where nothing is held out."""
        return logs.measured(self.records[-1])

    @property
    def ablation(self) -> recipes.Ablation:
        """The ablation; that of the whole method if the run has no such flag."""
        return recipes.ABLATIONS.get(self.args.get("ablation"), recipes.ABLATIONS["none"])

    @property
    def nets(self) -> range:
        """The networks' numbers: 1 and 2, or 1 alone."""
        return range(1, 1 + self.ablation.nets)

    @property
    def last_record(self) -> dict[str, Any]:
        """The last epoch's record. With --ema, the numbers of the averaged weights, which best.pt has, are in the place
        of those of the trained networks."""
        return logs.of_averages(self.records[-1])

    @property
    def best(self) -> float | None:
        """Test accuracy (%) of the best epoch; None while it is not known."""
        return self.last_record.get("best_acc", self.result.get("test_acc"))

    @property
    def best_epochs(self) -> list[int]:
        """Of each network, as the run chose it."""
        return logs.OF_SCRIPT[self.script].best_epochs(self.records, len(self.nets))

    @property
    def best_validation(self) -> float | None:
        """Validation accuracy (%) of the best epoch; None without validation images."""
        return self.last_record.get("best_val_acc", max(self.numbers("val_acc"), default=None))

    @property
    def labels_digest(self) -> str:
        """A hash of the list of images and of the given labels."""
        names = [name for name in ("list_path", "list_given") if name in self.labels]
        return hashlib.sha256(b"".join(self.labels[name].tobytes() for name in names)).hexdigest()[:12]

    @property
    def data_folder(self) -> Path | None:
        """Where the files of list_path are, if they are still there; None where the run has no such flag."""
        if not self.args.get("data_path"):
            return None
        path = Path(self.args["data_path"]).expanduser().resolve()
        return path.parent if path.is_file() else path  # a list of own images lies beside them

    @property
    def pictures(self) -> dict[int, bytes]:
        """The small images in the run folder, JPEG or PNG files, by the index of their sample."""
        if not self.thumbnails:
            return {}
        index, content, ends = (self.thumbnails[name] for name in ("index", "content", "ends"))
        return {int(i): file.tobytes() for i, file in zip(index, np.split(content, ends[:-1]), strict=True)}

    @property
    def divides(self) -> bool:
        """Whether the method is DivideMix, not plain cross-entropy."""
        return self.args.get("method") != "ce"

    def column(self, name: str) -> list[float | None]:
        """A metric of each epoch, None where it has no value."""
        return [record.get(name) for record in self.records]

    def numbers(self, name: str) -> list[float]:
        """The same without the epochs that have no value."""
        return [value for value in self.column(name) if isinstance(value, int | float)]


def read_run(path: Path) -> RunFolder:
    """Raises DivideMixError for another folder, a run without a finished epoch, and a damaged file."""
    args_json = read_args_json(path)
    records = load(path / "metrics.jsonl", parse_json_lines, [])
    if not records:
        raise DivideMixError(f"{path} has no finished epoch yet")
    files = {name: load(path / f"{name}.npz", parse_arrays, {}) for name in ("labels", "label_scores", "thumbnails")}
    files["histograms"] = load(path / "histograms.jsonl", parse_json_lines, [])
    return RunFolder(path, args_json, records, load(path / "result.json", json.loads, {}), **files)


def read_args_json(path: Path) -> dict[str, Any]:
    """Raises DivideMixError for a folder that is no run folder, and for a damaged file."""
    content = load(path / "args.json", json.loads, {})
    if not (isinstance(content, dict) and {"args", "model"} <= content.keys()):
        raise DivideMixError(f"{path} is not a run folder of this project: it has no args.json of a run")
    return content


def load(file: Path, parse: Callable[[bytes], Any], default: Any) -> Any:
    """The parsed content of a file, `default` if there is none. Raises DivideMixError for a damaged one."""
    try:
        return parse(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return default
    except Exception as error:  # a damaged file: JSONDecodeError, BadZipFile, zlib.error ...
        problem = f"{file} cannot be read ({type(error).__name__})"
        raise DivideMixError(f"{problem}: delete it; the run's training command writes it again") from error


def parse_json_lines(content: bytes) -> list[dict[str, Any]]:
    """Without an unfinished last line: the run is writing it, or was killed meanwhile."""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def parse_arrays(content: bytes) -> dict[str, NDArray]:
    """The arrays of an .npz file; no pickles."""
    return dict(np.load(io.BytesIO(content), allow_pickle=False))
