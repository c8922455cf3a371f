"""The noise file, a JSON list or .npy array of N labels: where a run's labels come from, and how a file is checked.

An existing file is used whatever the seed, so that several runs and several programs share their noise. Human labels
come in another kind of file (`human`); the run folder gets a JSON list of them, too.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.files import read_file, write_atomically
from dividemix.noise import human, synthetic

_SURELY_DRAWN = 50  # a class that is drawn so many times on average is never drawn with probability e^-50


@dataclass(frozen=True)
class NoiseSpec:
    """The noise of a run: what a noise file is checked against, and what is injected if there is no file."""

    dataset: str
    mode: str  # 'sym' | 'asym' | 'idn' | 'human'
    r: float | None  # noise rate; None for human
    seed: int
    num_class: int
    transition: Sequence[int]  # for asym: label -> label
    definition: str = "with_self"  # for sym
    key: str | None = None  # for human: the name of the labels in the published file

    @property
    def name(self) -> str:
        """As printed: 'sym 0.5', 'human worse_label'."""
        if self.mode == "human":
            return f"human {self.key}"
        return f"{self.mode} {self.r:g}" + ("" if self.definition == "with_self" else f" {self.definition}")

    @property
    def folder_parts(self) -> list[str]:
        """The noise in the name of a run folder. The definition is not in it; the run's config has it."""
        return [self.key] if self.mode == "human" else [f"{self.r:g}", self.mode]

    @property
    def file_name(self) -> str:
        """`<r>_<mode>.json` as in the authors' code (r with one decimal, or as many as it has); for exclude_self
        `<r>_<mode>_exclude_self.json`; for human labels `<key>.json`. Data sets other than CIFAR have a prefix."""
        if self.mode == "human":
            name = self.key
        else:
            name = f"{self.r:.1f}_{self.mode}" if round(self.r, 1) == self.r else f"{self.r!r}_{self.mode}"
            name += "" if self.definition == "with_self" else f"_{self.definition}"
        return f"{name}.json" if self.dataset.startswith("cifar") else f"{self.dataset}_{name}.json"


# ---- Where the labels come from ----


def noisy_labels(
    truth: NDArray[np.int64],
    spec: NoiseSpec,
    data_folder: Path | None,
    run_folder: Path,
    file: Path | None = None,
    *,
    begun: bool,
    images: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.int64], str]:
    """Noisy labels (N,) int64 for the true labels, `truth` (N,), and a phrase that says where they come from.

    The first of these that applies: `file`; for a run that has `begun`, its copy in the run folder; `spec.file_name`
    beside the data; else noise is injected (idn needs the `images` (N, ...)) and saved beside the data, if that folder
    can be written. Human labels: see `human_labels`. The run folder always gets a copy. Raises DivideMixError for a
    file that cannot be this noise, and for a `file` that is missing or has other labels than the run began with.
    """
    copy = run_folder / spec.file_name
    if file is not None and not file.exists():
        raise DivideMixError(f"noise file {file} does not exist: correct --noise_file, or leave it out")
    saved = read(copy, truth, spec) if begun and copy.exists() else None
    if spec.mode == "human":
        labels, origin = human_labels(truth, spec, data_folder, run_folder, file)
    elif file is not None:
        labels, origin = read(file, truth, spec), f"read from {file}"
    elif saved is not None:
        labels, origin = saved, f"read from {copy}, this run's copy"
    else:
        labels, origin = shared_labels(truth, spec, data_folder, copy, images)
    if saved is None:
        write_labels(copy, labels)
    elif not np.array_equal(saved, labels):
        raise DivideMixError(
            f"the noisy labels ({origin}) are not those that {run_folder} began with: leave --noise_file out, or "
            "start another run with --id, --run_dir or --fresh"
        )
    return labels, origin


def shared_labels(
    truth: NDArray[np.int64], spec: NoiseSpec, data_folder: Path | None, copy: Path, images: NDArray[np.uint8] | None
) -> tuple[NDArray[np.int64], str]:
    """The labels in the file beside the data; if there is no such file, newly made ones, saved there. `copy`: the file
    in the run folder, used instead if there is no data folder or it cannot be written."""
    path = data_folder / spec.file_name if data_folder else copy
    if data_folder and path.exists():
        return read(path, truth, spec), f"read from {path} (an existing file has priority over --noise_seed)"
    if spec.mode == "idn":
        labels = synthetic.inject_instance_dependent(images, truth, spec.r, spec.num_class, spec.seed)
    else:
        arguments = spec.mode, spec.r, spec.num_class, spec.seed, spec.transition, spec.definition
        labels = np.array(synthetic.inject(truth.tolist(), *arguments), dtype=np.int64)
    if data_folder:
        try:
            write_labels(path, labels, exclusive=True)
        except FileExistsError:  # a run that started at the same time made it first: share its noise
            return read(path, truth, spec), f"read from {path} (another run has just made it)"
        except OSError:
            path = copy  # the data folder is read-only
    return labels, f"made with seed {spec.seed}, saved as {path}"


def human_labels(
    truth: NDArray[np.int64], spec: NoiseSpec, data_folder: Path | None, run_folder: Path, file: Path | None
) -> tuple[NDArray[np.int64], str]:
    """Labels that people gave: from `file`, else from the published file beside the data, else from the run's copy (on
    a computer that has the run but not the file). Raises DivideMixError if there is none of these."""
    path = file or human.find(spec.dataset, data_folder)
    if path:
        return human.read(path, spec.key, truth, spec.num_class), f"read from {path}"
    copy = run_folder / spec.file_name
    if not copy.exists():
        raise human.missing(spec.dataset, data_folder)
    return read(copy, truth, spec), f"read from {copy}, this run's copy"


def wrong_share(
    truth: NDArray[np.int64], spec: NoiseSpec, data_folder: Path | None, run_folder: Path, file: Path | None
) -> float | None:
    """The share of wrong labels, by which the nearest recipe is found for noise that is not in the paper: counted in
    human labels, expected for other noise. None for the paper's noise, whose recipe goes by r."""
    if spec.mode == "human":
        labels, _ = human_labels(truth, spec, data_folder, run_folder, file)
        return float((labels != truth).mean())
    if spec.mode == "idn":
        return synthetic.mean_flip_rate(spec.r)
    return spec.r if spec.definition == "exclude_self" else None


# ---- Files ----


def write_labels(path: Path, labels: NDArray[np.int64], exclusive: bool = False) -> None:
    write_atomically(path, json.dumps(labels.tolist()).encode(), exclusive)


def read(path: Path, truth: NDArray[np.int64], spec: NoiseSpec) -> NDArray[np.int64]:
    """A JSON list or .npy array of N labels -> (N,) int64, checked against the true labels, `truth` (N,): type, length,
    range, share of changed labels, and whether each class is drawn. Raises DivideMixError naming the file and what is
    wrong."""
    advice = "delete it to have it made again, or name another with --noise_file"
    if spec.mode == "human":
        advice = "delete it, and name the published file with --noise_file"

    def invalid(problem: str) -> DivideMixError:
        return DivideMixError(f"noise file {path} {problem}: {advice}")

    try:
        content = read_file(path)
        is_array = content.startswith(b"\x93NUMPY")
        labels = np.load(io.BytesIO(content), allow_pickle=False).tolist() if is_array else json.loads(content)
    except OSError as error:
        advice = "move it away, or name another with --noise_file"
        raise DivideMixError(f"noise file {path} cannot be read ({error.strerror}): {advice}") from error
    except (
        Exception
    ) as error:  # a damaged header of numpy's fails in many ways: ValueError, TokenError, MemoryError ...
        reason = " ".join(str(error).split())[:200]
        raise invalid(f"is not a complete JSON or .npy file ({reason})") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise invalid("must hold one flat list of whole numbers")
    if len(labels) != len(truth):
        raise invalid(f"has {len(labels)} labels, the data set {len(truth)} training samples")
    if labels and not 0 <= min(labels) <= max(labels) < spec.num_class:
        raise invalid(f"has labels outside 0..{spec.num_class - 1}")
    noisy = np.array(labels, dtype=np.int64)
    changed = float((noisy != truth).mean())
    low, high = expected_changed(truth, spec)
    if not low <= changed <= high:
        flags = f"--noise_mode {spec.mode} --r {spec.r:g}"
        flags += "" if spec.definition == "with_self" else f" --noise_definition {spec.definition}"
        expected = f"{flags} should change {low:.1%} to {high:.1%}: it is for another rate or data set"
        raise invalid(f"changes {changed:.1%} of the labels, {expected}")
    # Near rate 1 the share alone shows nothing: CIFAR-10's file, too, changes 99 % of CIFAR-100's labels.
    absent = np.flatnonzero(np.bincount(noisy, minlength=spec.num_class) == 0)
    if len(absent) and spec.mode == "sym" and spec.r * len(truth) / spec.num_class >= _SURELY_DRAWN:
        raise invalid(f"never has the label {absent[0]}, and --noise_mode sym draws all: it is for another data set")
    return noisy


def expected_changed(truth: NDArray[np.int64], spec: NoiseSpec) -> tuple[float, float]:
    """Lowest and highest plausible share of changed labels. sym: r (C-1)/C, and up to r, for files that never draw the
    true class; with exclude_self r. asym: r times the share of samples whose class the map changes. idn: the mean flip
    rate. human: any. The bounds are wider by 0.01, or by 4 standard deviations of the share if that is more."""
    if spec.mode == "human":
        return 0.0, 1.0
    n, r = max(len(truth), 1), spec.r
    if spec.mode == "sym":
        p_same = 1 / spec.num_class if spec.definition == "with_self" else 0.0  # a drawn label is the true one
        low, high, variance = r * (1 - p_same), r, r * p_same * (1 - p_same)
    elif spec.mode == "asym":
        moved = float((np.asarray(spec.transition)[truth] != truth).mean())
        low = high = r * moved
        variance = r * (1 - r) * moved * (1 - moved)
    elif spec.mode == "idn":
        low = high = synthetic.mean_flip_rate(r)
        variance = high * (1 - high)
    else:
        raise ValueError(f"the share of labels that noise mode {spec.mode!r} changes is not known here: add it")
    slack = max(0.01, 4 * math.sqrt(variance / n) + 1 / n)
    return max(low - slack, 0.0), min(high + slack, 1.0)
