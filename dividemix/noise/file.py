"""The file that holds noisy labels: a JSON list of N labels. Where the labels of a run come from, and what is checked.

A file that exists wins over the seed, so that several runs and several codes share their noise. Labels that people gave
come from another kind of file (`human`); of these, too, the run folder keeps a JSON list.
"""

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

_SURELY_DRAWN = 50  # labels that a class gets on average: the odds that it gets none are e^-50


@dataclass(frozen=True)
class NoiseSpec:
    """The noise that was asked for: what a file is checked against, and what is injected where there is no file."""

    dataset: str
    mode: str  # 'sym' | 'asym' | 'idn' | 'human'
    r: float | None  # None for human
    seed: int
    num_class: int
    transition: Sequence[int]  # of asym
    definition: str = "with_self"  # of sym
    key: str | None = None  # of human

    @property
    def name(self) -> str:
        """For people: 'sym 0.5', 'human worse_label'."""
        if self.mode == "human":
            return f"human {self.key}"
        return f"{self.mode} {self.r:g}" + ("" if self.definition == "with_self" else f" {self.definition}")

    @property
    def folder_parts(self) -> list[str]:
        """What a run folder's name says of the noise; another definition is told apart by the run's config alone."""
        return [self.key] if self.mode == "human" else [f"{self.r:g}", self.mode]

    @property
    def file_name(self) -> str:
        """`<r>_<mode>.json` as the authors write it (r with one decimal, more where it needs more), with another
        definition than theirs `<r>_<mode>_<definition>.json`, for human labels `<key>.json`; for other sets than
        CIFAR's with a prefix."""
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
    """Noisy labels (N,) int64 of the true labels (N,), and one sentence saying where they come from.

    A run that has `begun` goes on with its own copy in the run folder. Otherwise, in this order: `file`; `file_name`
    beside the data; else noise is injected (idn: for the `images` (N, ...)), and saved beside the data where that
    folder can be written. Human labels: see `human_labels`. The labels used are always copied to the run folder. Raises
    DivideMixError for a file that cannot be this noise, and for a `file` that is missing or holds other labels than the
    run began with.
    """
    copy = run_folder / spec.file_name
    if file is not None and not file.exists():
        raise DivideMixError(f"noise file {file} does not exist: mend --noise_file, or leave it out to make the noise")
    kept = read(copy, truth, spec) if begun and copy.exists() else None
    if spec.mode == "human":
        labels, origin = human_labels(truth, spec, data_folder, run_folder, file)
    elif file is not None:
        labels, origin = read(file, truth, spec), f"read from {file}"
    elif kept is not None:
        labels, origin = kept, f"read from {copy}, this run's own copy"
    else:
        labels, origin = shared_labels(truth, spec, data_folder, copy, images)
    if kept is None:
        write_labels(copy, labels)
    elif not np.array_equal(kept, labels):
        raise DivideMixError(
            f"the noisy labels ({origin}) are not those that {run_folder} began with: leave --noise_file out, give "
            "this run an --id, or --fresh to start anew"
        )
    return labels, origin


def shared_labels(
    truth: NDArray[np.int64], spec: NoiseSpec, data_folder: Path | None, copy: Path, images: NDArray[np.uint8] | None
) -> tuple[NDArray[np.int64], str]:
    """The labels in the file beside the data; where there is none, newly made ones, which become that file. `copy`: the
    run folder's, which is the file where there is no such folder or it cannot be written."""
    path = data_folder / spec.file_name if data_folder else copy
    if data_folder and path.exists():
        return read(path, truth, spec), f"read from {path} (an existing file wins over --noise_seed)"
    if spec.mode == "idn":
        labels = synthetic.inject_instance_dependent(images, truth, spec.r, spec.num_class, spec.seed)
    else:
        asked = spec.mode, spec.r, spec.num_class, spec.seed, spec.transition, spec.definition
        labels = np.array(synthetic.inject(truth.tolist(), *asked), dtype=np.int64)
    if data_folder:
        try:
            write_labels(path, labels, exclusive=True)
        except FileExistsError:  # another run, started at the same time, was quicker: share its noise
            return read(path, truth, spec), f"read from {path} (another run has just made it)"
        except OSError:
            path = copy  # a read-only data folder is fine: the run folder has its copy
    return labels, f"made with seed {spec.seed}, saved as {path}"


def human_labels(
    truth: NDArray[np.int64], spec: NoiseSpec, data_folder: Path | None, run_folder: Path, file: Path | None
) -> tuple[NDArray[np.int64], str]:
    """Labels that people gave: `file`, else the published file beside the data, else the run's own copy (on a machine
    that has the run and not the file). Raises DivideMixError where there is none of these."""
    path = file or human.find(spec.dataset, data_folder)
    if path:
        return human.read(path, spec.key, truth, spec.num_class), f"read from {path}"
    own = run_folder / spec.file_name
    if not own.exists():
        raise human.missing(spec.dataset, data_folder)
    return read(own, truth, spec), f"read from {own}, this run's own copy"


def wrong_share(
    truth: NDArray[np.int64], spec: NoiseSpec, data_folder: Path | None, run_folder: Path, file: Path | None
) -> float | None:
    """The share of wrong labels that a recipe is looked up by, for noise that the paper lacks: counted in human labels,
    else expected. None where r says what it says in the paper."""
    if spec.mode == "human":
        labels, _ = human_labels(truth, spec, data_folder, run_folder, file)
        return float((labels != truth).mean())
    if spec.mode == "idn":
        return synthetic.expected_wrong(spec.r)
    return spec.r if spec.definition == "exclude_self" else None


# ---- Files ----


def write_labels(path: Path, labels: NDArray[np.int64], exclusive: bool = False) -> None:
    write_atomically(path, json.dumps(labels.tolist()).encode(), exclusive)


def read(path: Path, truth: NDArray[np.int64], spec: NoiseSpec) -> NDArray[np.int64]:
    """A JSON list of N labels -> (N,) int64, checked against the truth (N,): type, length, range, share of changed
    labels, and whether each class is drawn. Raises DivideMixError naming the file and what is wrong with it."""
    advice = "delete it to have it made anew, or name another with --noise_file"
    if spec.mode == "human":
        advice = "delete it, and name the published file with --noise_file"

    def bad(problem: str) -> DivideMixError:
        return DivideMixError(f"noise file {path} {problem}: {advice}")

    try:
        labels = json.loads(read_file(path))
    except OSError as error:
        how = "move it away, or name another with --noise_file"
        raise DivideMixError(f"noise file {path} cannot be read ({error.strerror}): {how}") from error
    except (ValueError, RecursionError) as error:
        raise bad(f"is not a complete JSON file ({error})") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise bad("must hold one flat JSON list of whole numbers")
    if len(labels) != len(truth):
        raise bad(f"has {len(labels)} labels, the data set {len(truth)} training samples")
    if labels and not 0 <= min(labels) <= max(labels) < spec.num_class:
        raise bad(f"has labels outside 0..{spec.num_class - 1}")
    noisy = np.array(labels, dtype=np.int64)
    changed = float((noisy != truth).mean())
    low, high = expected_changed(truth, spec)
    if not low <= changed <= high:
        flags = f"--noise_mode {spec.mode} --r {spec.r:g}"
        flags += "" if spec.definition == "with_self" else f" --noise_definition {spec.definition}"
        expected = f"{flags} should change {low:.1%} to {high:.1%}: it is another rate's or data set's"
        raise bad(f"changes {changed:.1%} of the labels, {expected}")
    # Near rate 1 the share says nothing any more: CIFAR-10's file changes 99 % of CIFAR-100's labels, as it should.
    absent = np.flatnonzero(np.bincount(noisy, minlength=spec.num_class) == 0)
    if len(absent) and spec.mode == "sym" and spec.r * len(truth) / spec.num_class >= _SURELY_DRAWN:
        raise bad(f"gives no sample the label {absent[0]}, and --noise_mode sym draws all: it is another data set's")
    return noisy


def expected_changed(truth: NDArray[np.int64], spec: NoiseSpec) -> tuple[float, float]:
    """Bounds on the share of changed labels: sym r (C-1)/C, up to r for files that never draw the true class; r alone
    where this is the definition; asym r times the share of samples whose class the map moves; idn the mean of the flip
    rates; human any. Each with 1 point to spare, or 4 standard deviations of the draw where these are more."""
    if spec.mode == "human":
        return 0.0, 1.0
    n, r = max(len(truth), 1), spec.r
    if spec.mode == "sym":
        kept = 1 / spec.num_class if spec.definition == "with_self" else 0.0
        low, high, variance = r * (1 - kept), r, r * kept * (1 - kept)
    elif spec.mode == "asym":
        moved = float((np.asarray(spec.transition)[truth] != truth).mean())
        low = high = r * moved
        variance = r * (1 - r) * moved * (1 - moved)
    else:
        low = high = synthetic.expected_wrong(r)
        variance = high * (1 - high)
    slack = max(0.01, 4 * math.sqrt(variance / n) + 1 / n)
    return max(low - slack, 0.0), min(high + slack, 1.0)
