"""The run folder: the same command again continues the run. Seeds, logs, progress, checkpoints.

A run's whole history is the list of its epochs' records, kept in the checkpoint. The log files are written from it,
line by line, and anew when a run continues: they cannot disagree with the weights.
"""

import contextlib
import datetime
import fcntl
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from dividemix import DivideMixError, warn
from dividemix.checkpoint import load_last, save_last, to_bytes, write_atomically

PHASES = ("init", "subset", "validation", "warmup", "divide", "train")  # a generator's third number; append only

# Flags that may change between two starts of one run: they do not change what is computed.
FREE_FLAGS = frozenset(
    [
        "num_epochs",
        "fresh",
        "out_dir",
        "run_dir",
        "data_path",
        "download",
        "device",
        "gpuid",
        "workers",
        "eval_batch_size",
        "save_scores",
        "deterministic",
        "no_compile",
        "no_graph",
        "noise_file",
    ]
)


def draws(seed: int, phase: str, epoch: int = 0, net: int = 0) -> np.random.Generator:
    """The generator of one phase: a function of these four alone, so a continued run draws what the uninterrupted one
    did."""
    return np.random.default_rng([seed, PHASES.index(phase), epoch, net])


def seeded(seed: int, net: int, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a network whose initial weights depend on (seed, net) alone; the global stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draws(seed, "init", net=net).integers(2**63)))
        return build()


class Run:
    """One run folder, open for writing.

    folder; state: what the last checkpoint holds, {} for a new run; records: one flat dict for each finished epoch.
    `config` holds the values that may not differ between two starts in one folder. Raises DivideMixError for a folder
    that cannot be written, is in use by another process, or belongs to a run with another config.
    """

    def __init__(self, folder: Path, config: dict[str, Any], fresh: bool = False):
        self.folder = folder
        self.config = {k: v for k, v in config.items() if k not in FREE_FLAGS}
        try:
            self._new, self._aside = fresh or not folder.exists(), None
            if fresh and folder.exists():
                with lock(folder):  # not away from under a process that trains in it
                    self._aside = set_aside(folder)
                print(f"--fresh: {folder} moved to {self._aside}")
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(folder)
        except OSError as error:
            raise DivideMixError(
                f"run folder {folder} cannot be written: {error.strerror}; choose --out_dir or --run_dir"
            ) from error
        self.pins: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.epoch = 0
        self._board = None
        try:
            self.state = load_last(folder) or {}
            self._refuse_other_config()
        except DivideMixError:
            self._lock.close()
            raise
        self.records: list[dict[str, Any]] = self.state.get("records", [])
        self.best_epoch: int | None = self.state.get("best_epoch")
        for orphan in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            orphan.unlink()

    def _refuse_other_config(self) -> None:
        before = self.state.get("config", self.config)
        # Only what both know: a flag that a later version adds does not cut older runs off.
        names = sorted(k for k in before.keys() & self.config.keys() if before[k] != self.config[k])
        if names:
            listed = ", ".join(f"--{k} was {before[k]}, now {self.config[k]}" for k in names)
            remedy = "give this one an --id, or --fresh to start anew"
            raise DivideMixError(f"{self.folder} holds a run with other settings ({listed}): {remedy}")

    def pin(self, name: str, value: Any, problem: str) -> None:
        """Hold a value that must stay what it was when the run began; raises DivideMixError with `problem` if it is
        not."""
        if self.state.get("pins", {}).get(name, value) != value:
            raise DivideMixError(f"{problem}: put them back, give this run an --id, or --fresh to start anew")
        self.pins[name] = value

    def start(self, about: dict[str, Any]) -> None:
        """Write args.json and bring the logs in line with the checkpoint. `about`: command, arguments, data."""
        try:
            starts = json.loads((self.folder / "args.json").read_bytes())["starts"]
        except (OSError, ValueError, KeyError, TypeError):
            starts = []
        this = {"epoch": len(self.records), "command": about["command"], "versions": versions(), "commit": commit()}
        about = {**about, "versions": versions(), "commit": commit(), "starts": [*starts, this]}
        write_atomically(self.folder / "args.json", json.dumps(about, indent=1, default=str).encode())
        for name, lines in (("metrics.jsonl", metric_line), ("acc.txt", acc_line), ("stats.txt", stats_lines)):
            write_atomically(self.folder / name, "".join(map(lines, self.records)).encode())
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=len(self.records))
        except (OSError, ImportError) as error:
            warn(f"no TensorBoard events: {error}")

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The epochs that are still to do."""
        done = len(self.records)
        if done >= num_epochs:
            print(f"{self.folder} is finished ({done} epochs): a higher --num_epochs continues it, --fresh starts anew")
        elif done:
            print(f"continuing {self.folder} with epoch {done} (of 0..{num_epochs - 1})")
        for self.epoch in range(done, num_epochs):
            self.num_epochs = num_epochs
            self.seconds = {}
            yield self.epoch

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Callable[[Iterable], Iterable]]:
        """Time a phase as seconds_<name>; yields a function that wraps batches in a progress bar (on a terminal)."""
        label = f"epoch {self.epoch} {name}"
        start = time.perf_counter()
        yield lambda batches: tqdm(batches, label, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
        key = f"seconds_{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    def end_epoch(
        self, metrics: dict[str, Any], state: dict[str, Any], scores: dict[str, np.ndarray] | None, keep_scores: bool
    ) -> None:
        """Log one finished epoch, write its scores and its checkpoint: `metrics` as `record` completes them, `state`
        with 'nets'."""
        record = self._record(metrics)
        self.records.append(record)
        if self.best_epoch is None or selection(record) > selection(self.records[self.best_epoch]):
            self.best_epoch = record["epoch"]
        record["best_acc"] = self.records[self.best_epoch]["test_acc"]
        record["last10_acc"] = last10(self.records)
        if scores:
            save_scores(self.folder / "scores", record["epoch"], scores, keep_scores)
        self._save(record, state)
        for name, lines in (("metrics.jsonl", metric_line), ("acc.txt", acc_line), ("stats.txt", stats_lines)):
            with open(self.folder / name, "a") as file:
                file.write(lines(record))
        if self._board:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "epoch":
                    self._board.add_scalar(key, value, record["epoch"])
        print(epoch_line(record, self.num_epochs), flush=True)

    def _record(self, metrics: dict[str, Any]) -> dict[str, Any]:
        seconds = {k: round(v, 3) for k, v in self.seconds.items()}
        record = {"epoch": self.epoch, **metrics, **seconds}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}

    def _save(self, record: dict[str, Any], state: dict[str, Any]) -> None:
        state = {**state, "records": self.records, "best_epoch": self.best_epoch, "versions": versions()}
        state |= {"config": self.config, "pins": self.pins}
        try:
            if self.best_epoch == record["epoch"]:
                best = {
                    "nets": state["nets"],
                    "epoch": record["epoch"],
                    "test_acc": record["test_acc"],
                    "config": self.config,
                }
                write_atomically(self.folder / "best.pt", to_bytes(best))
            save_last(self.folder, record["epoch"], state)
        except OSError as error:
            raise DivideMixError(
                f"the checkpoint of epoch {record['epoch']} could not be written to {self.folder} ({error.strerror}); "
                "the one before is intact: make room, then the same command continues"
            ) from error

    def close(self) -> None:
        if self._board:
            self._board.close()
        self._lock.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._new and not self.records and not (self.folder / "args.json").exists():  # refused: leave nothing behind
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._aside:
                self._aside.rename(self.folder)


def folder_for(out_dir: str, run_dir: str | None, *parts: str) -> Path:
    """--run_dir, or --out_dir / the non-empty parts joined by '_'."""
    return Path(run_dir) if run_dir else Path(out_dir) / "_".join(part for part in parts if part)


def lock(folder: Path) -> TextIO:
    """The folder's lock file, held until it is closed. Raises DivideMixError where another process holds it."""
    file = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when the process dies
    except OSError as error:
        file.close()
        raise DivideMixError(
            f"another process is training in {folder}: wait for it, or give this run another --id"
        ) from error
    return file


def set_aside(folder: Path) -> Path:
    """Rename a folder to <name>.<time>, never deleting anything. -> its new name."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    aside, k = folder.with_name(f"{folder.name}.{stamp}"), 1
    while aside.exists():
        aside, k = folder.with_name(f"{folder.name}.{stamp}-{k}"), k + 1
    folder.rename(aside)
    return aside


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of an epoch's record


def selection(record: dict[str, Any]) -> float:
    """What the best epoch is chosen by: accuracy on the validation part where there is one, else, as the authors do,
    on the test set."""
    return record.get("val_acc", record["test_acc"])


def last10(records: list[dict[str, Any]]) -> float:
    """Mean test accuracy of the last 10 epochs (of all while there are fewer), the paper's 'last'."""
    return float(np.mean([record["test_acc"] for record in records[-10:]]))


def metric_line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def acc_line(record: dict[str, Any]) -> str:
    """The authors' line."""
    return f"Epoch:{record['epoch']}   Accuracy:{record['test_acc']:.2f}\n"


def stats_lines(record: dict[str, Any]) -> str:
    """The authors' two lines a divided epoch, their spelling included: net 2's division, on which net 1 trains, then
    net 1's."""
    divided = [k for k in (2, 1) if record.get(f"labeled_net{k}") is not None]
    auc = {k: "null" if record[f"auc_net{k}"] is None else f"{record[f'auc_net{k}']:.3f}" for k in divided}
    return "".join(f"Numer of labeled samples:{record[f'labeled_net{k}']}   AUC:{auc[k]}\n" for k in divided)


def epoch_line(record: dict[str, Any], num_epochs: int) -> str:
    """One epoch for people, on one line."""

    def pair(name: str, form: str) -> str:
        return "/".join(
            "-" if record[f"{name}_net{k}"] is None else format(record[f"{name}_net{k}"], form) for k in (1, 2)
        )

    parts = [f"epoch {record['epoch']}/{num_epochs - 1} {record['phase']}"]
    if any(record.get(f"labeled_net{k}") is not None for k in (1, 2)):
        parts += [f"labeled {pair('labeled', 'd')} unlabeled {pair('unlabeled', 'd')}", f"AUC {pair('auc', '.3f')}"]
    terms = {"Lx": record.get("loss_x"), "Lu": record.get("loss_u"), "penalty": record.get("penalty")}
    parts.append(" ".join(f"{name} {value:.4f}" for name, value in terms.items() if value is not None))
    validation = f"val {record['val_acc']:.2f} " if "val_acc" in record else ""
    parts.append(f"{validation}test {record['test_acc']:.2f} (nets {pair('test_acc', '.2f')})")
    parts.append(f"best {record['best_acc']:.2f} last-10 {record['last10_acc']:.2f}")
    parts.append(
        " ".join(f"{k.removeprefix('seconds_')} {v:.1f}s" for k, v in record.items() if k.startswith("seconds_"))
    )
    return " | ".join(part for part in parts if part)


def save_scores(folder: Path, epoch: int, scores: dict[str, np.ndarray], keep_all: bool) -> None:
    """scores/epoch_NNN.npz; without keep_all the last epoch's alone is kept, for the report."""
    folder.mkdir(exist_ok=True)
    for old in [] if keep_all else folder.glob("epoch_*.npz"):
        old.unlink()
    with open(folder / f"epoch_{epoch:03d}.npz", "wb") as file:
        np.savez(file, **scores)


# ---------------------------------------------------------------------------------------------------------------------
# What args.json says of the world


def versions() -> dict[str, str]:
    import sklearn
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }


def commit() -> str | None:
    """The project's git commit, with '+changes' where the working tree differs; None outside a git checkout."""

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve().parent.parent
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
