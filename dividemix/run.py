"""The run folder: the same command again continues the run. Seeds, logs, progress, checkpoints.

A run's whole history is the list of its epochs' records and that of their loss histograms, kept in the checkpoint. The
log files are written from these, line by line, and anew when a run continues: they cannot disagree with the weights. An
epoch is written while the next one trains (`saving`), in the order checkpoint, last.json, best.pt, logs: whenever the
process dies, the logs are not ahead of the checkpoint.
"""

import contextlib
import datetime
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from dividemix import Diverged, DivideMixError, histograms, logs, warn
from dividemix.checkpoint import (
    from_bytes,
    load_last,
    load_networks,
    lock_file,
    read_file,
    save_last,
    share,
    write_atomically,
    write_state,
)
from dividemix.logs import Logs
from dividemix.provenance import commit, versions
from dividemix.ranks import Ranks
from dividemix.saving import Background, save_scores, to_host
from dividemix.state import check

ALONE = Ranks()

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
        "skip_bad_images",
        "noise_file",
        "check_data",
        "keep_images",
        "cache_dir",
        "labels",
        "no_label_scores",
    ]
)
# Flags that came later and do change it: what runs of before have.
LATER_FLAGS = {"ablation": "none"}


class Run:
    """One run folder, open for writing, on every rank; the first rank alone reads, locks, writes and prints.

    folder; state: what the last checkpoint holds, {} for a new run; records: one flat dict for each finished epoch;
    best_epochs: of each network, [] before the first epoch's end. All ranks have the same of these: the first sends
    them what it read, so the others need not see the folder. labels: what `save_labels` was given, on the first rank.

    `config` holds the values that may not differ between two starts in one folder. `logs`: the script's formats.
    `best_by`: (record, k) -> what the best epoch of net k (0 or 1) has most of; the first of equals is kept. Raises
    DivideMixError, on the first rank, for a folder that cannot be written, is in use by another process, or belongs to
    a run with another config.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        fresh: bool = False,
        ranks: Ranks = ALONE,
        logs: Logs = logs.CIFAR,
        best_by: Callable[[dict[str, Any], int], Any] = logs.by_ensemble,
    ):
        self.folder, self.ranks, self.logs, self.best_by = folder, ranks, logs, best_by
        self.config = {k: v for k, v in config.items() if k not in FREE_FLAGS}
        self.pins: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.epoch, self.num_epochs = 0, math.inf
        self._board = self._lock = self._aside = self._copy = None
        self._saving = Background()
        self._new = False
        self.state: dict[str, Any] = share(ranks, self._open(fresh) if ranks.first else {})
        self.records: list[dict[str, Any]] = self.state.get("records", [])
        self.histograms: list[dict[str, Any]] = self.state.get("histograms", [])  # those before it had none
        self.labels: dict[str, np.ndarray] = {}
        self._saved = len(self.records)
        self.best_epochs: list[int] = self.state.get("best_epochs", [])
        if "best_epoch" in self.state:  # a checkpoint of before each network had its own
            self.best_epochs = [self.state["best_epoch"]] * 2

    def _open(self, fresh: bool) -> dict[str, Any]:
        """Make and lock the folder. -> the state of its last checkpoint."""
        folder = self.folder
        try:
            self._new = fresh or not folder.exists()
            if fresh and folder.exists():
                lock = lock_folder(folder)  # not away from under a process that trains in it
                try:
                    self._aside = set_aside(folder)
                finally:
                    lock.release()
                print(f"--fresh: {folder} moved to {self._aside}")
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(folder)
        except OSError as error:
            raise DivideMixError(
                f"run folder {folder} cannot be written: {error.strerror}; choose --out_dir or --run_dir"
            ) from error
        try:
            state = load_last(folder, self._check) or {}
            self._refuse_other_config(state)
            for orphan in [*folder.glob(".*.tmp"), *folder.glob("scores/.*.tmp")]:  # of a process killed in writing
                if orphan.is_file():
                    orphan.unlink()
        except BaseException:
            self._lock.release()
            raise
        return state

    def _check(self, state: dict[str, Any]) -> None:
        """Raises DivideMixError where this script cannot go on from `state`, and write its logs."""
        check(state)
        try:
            for record in state["records"]:
                for _, line in self._files():
                    line(record)
                for k in range(len(state["nets"])):
                    self.best_by(record, k)
        except (KeyError, TypeError, ValueError) as error:
            raise DivideMixError(f"record {record['epoch']} is not one of this script ({error!r})") from error

    def _refuse_other_config(self, state: dict[str, Any]) -> None:
        before = {**LATER_FLAGS, **state.get("config", self.config)}
        # Only what both know: a flag that a later version adds does not cut older runs off.
        names = sorted(k for k in before.keys() & self.config.keys() if before[k] != self.config[k])
        if names:
            listed = ", ".join(f"--{k} was {before[k]}, now {self.config[k]}" for k in names)
            remedy = "give this one an --id, or --fresh to start anew"
            raise DivideMixError(f"{self.folder} holds a run with other settings ({listed}): {remedy}")

    def pin(self, name: str, value: Any, problem: str) -> None:
        """Hold a value that must stay what it was when the run began, and be the same on all ranks; raises
        DivideMixError with `problem` if it is not."""
        if self.ranks.from_first(lambda: value) != value:
            raise DivideMixError(f"{name}: this rank reads other data than the first rank")
        if self.state.get("pins", {}).get(name, value) != value:
            raise DivideMixError(f"{problem}: put them back, give this run an --id, or --fresh to start anew")
        self.pins[name] = value

    def say(self, *lines: str) -> None:
        """Print, once for all ranks."""
        if self.ranks.first:
            print(*lines, sep="\n", flush=True)

    def save_labels(self, **arrays: np.ndarray) -> None:
        """labels.npz: index, given and, where it is known, true label of each training sample, (N,) each, also kept as
        `labels`; list_given and, where images are files, list_path: label and path of all that the index counts, (M,)
        each."""
        if self.ranks.first:
            self.labels = {name: arrays[name] for name in ("index", "given", "true") if name in arrays}
            content = io.BytesIO()
            np.savez(content, **arrays)
            write_atomically(self.folder / "labels.npz", content.getbuffer())

    def start(self, about: dict[str, Any]) -> None:
        """Write args.json and bring the logs and best.pt in line with the checkpoint. `about`: command, arguments,
        data."""
        if self.records:
            self.best_epochs = self.ranks.from_first(
                self._write_best, self.records[-1]["epoch"], self.best_epochs, self.state["nets"]
            )
        self.state = {}  # restored by now; for large networks about a gigabyte
        if not self.ranks.first:
            return
        try:
            starts = json.loads(read_file(self.folder / "args.json"))["starts"]
            starts = starts if isinstance(starts, list) else []
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            starts = []
        this = {"epoch": len(self.records), "command": about["command"], "versions": versions(), "commit": commit()}
        about = {**about, "versions": versions(), "commit": commit(), "starts": [*starts, this]}
        write_atomically(self.folder / "args.json", json.dumps(about, indent=1, default=str).encode())
        for name, lines in self._files():
            write_atomically(self.folder / name, "".join(map(lines, self.records)).encode())
        write_atomically(self.folder / "histograms.jsonl", "".join(map(logs.metric_line, self.histograms)).encode())
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=len(self.records))
        except (OSError, ImportError, ValueError) as error:  # ValueError: a path that is not UTF-8
            warn(f"no TensorBoard events: {error}")

    def _files(self) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
        return [("metrics.jsonl", logs.metric_line), ("acc.txt", self.logs.acc), ("stats.txt", self.logs.stats)]

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The epochs that are still to do. After them everything is written."""
        done, self.num_epochs = len(self.records), num_epochs
        self.epoch = max(done - 1, 0)
        if done >= num_epochs:
            self.say(
                f"{self.folder} is finished ({done} epochs): a higher --num_epochs continues it, --fresh starts anew"
            )
        elif done:
            self.say(f"continuing {self.folder} with epoch {done} (of 0..{num_epochs - 1})")
        if done < num_epochs and self.ranks.first:
            (self.folder / "result.json").unlink(missing_ok=True)  # of fewer epochs: no longer this run's result
        for self.epoch in range(done, num_epochs):
            self.seconds = {}
            yield self.epoch
        self._wait()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Callable[[Iterable], Iterable]]:
        """Time a phase as seconds_<name>; yields a function that wraps batches in a progress bar (on a terminal)."""
        label, hidden = f"epoch {self.epoch} {name}", not (self.ranks.first and sys.stderr.isatty())
        start = time.perf_counter()
        try:
            yield lambda batches: tqdm(batches, label, leave=False, dynamic_ncols=True, disable=hidden)
        except Diverged as error:
            raise Diverged(f"epoch {self.epoch}: {error}") from error
        key = f"seconds_{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    def end_epoch(
        self, metrics: dict[str, Any], state: dict[str, Any], scores: dict[str, np.ndarray] | None, keep_scores: bool
    ) -> None:
        """One finished epoch: `metrics` as `_record` and `Logs.running` complete them, `state` with 'nets'. It is
        written while training goes on: what an epoch's end waits for, the epoch before and a copy of the state, is
        seconds_save. All ranks go on with the first one's record. Raises DivideMixError where the epoch before could
        not be written."""
        with self.phase("save"):
            self._wait()
            if self.ranks.first:
                self._copy = to_host(state, self._copy)
        record = self.ranks.from_first(self._record, metrics)
        self.records.append(record)
        best = self.best_epochs or [record["epoch"]] * len(state["nets"])
        self.best_epochs = [
            record["epoch"] if self.best_by(record, k) > self.best_by(self.records[epoch], k) else epoch
            for k, epoch in enumerate(best)
        ]
        record |= self.logs.running(self.records, self.best_epochs)
        if self.ranks.first:
            histogram = self._histogram(scores or {})
            self.histograms += histogram
            about = {"records": list(self.records), "best_epochs": self.best_epochs, "versions": versions()}
            about |= {"config": self.config, "pins": dict(self.pins), "histograms": list(self.histograms)}
            self._saving.start(self._save, record, histogram, self._copy | about, scores, keep_scores)
        self.say(self.logs.epoch(record, self.num_epochs))

    def _record(self, metrics: dict[str, Any]) -> dict[str, Any]:
        seconds = {k: round(v, 3) for k, v in self.seconds.items()}
        return without_nan({"epoch": self.epoch, **metrics, **seconds})

    def _histogram(self, scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """The epoch's line in histograms.jsonl; none of an epoch without a division."""
        truly_clean = self.labels["given"] == self.labels["true"] if "true" in self.labels else None
        nets = histograms.count(scores, truly_clean)
        return [{"epoch": self.epoch, **nets}] if nets else []

    def _wait(self) -> None:
        """Until the last finished epoch is written."""
        self.best_epochs = self.ranks.from_first(self._saving.wait, self.best_epochs)

    def _save(
        self,
        record: dict[str, Any],
        histogram: list[dict[str, Any]],
        state: dict[str, Any],
        scores: dict[str, np.ndarray] | None,
        keep_scores: bool,
    ) -> list[int]:
        """Write everything that an epoch leaves, beside training. -> the epochs of the networks in best.pt"""
        try:
            if scores:
                save_scores(self.folder / "scores", record["epoch"], scores, keep_scores)
            save_last(self.folder, record["epoch"], state)
            self._saved = record["epoch"] + 1
            # best.pt comes after it: should the machine die between them, `start` makes it from the checkpoint.
            best_epochs = self._write_best(record["epoch"], state["best_epochs"], state["nets"])
            for name, lines in self._files():
                with open(self.folder / name, "a") as file:
                    file.write(lines(record))
            with open(self.folder / "histograms.jsonl", "a") as file:
                file.write("".join(map(logs.metric_line, histogram)))
        except OSError as error:
            if self._saved > record["epoch"]:
                what, left = "best.pt and the logs", "; the checkpoint is whole"
            else:
                what, left = "the checkpoint", "; the one before is intact" if self._saved else ""
            how = "continues" if self._saved else "starts again"
            raise DivideMixError(
                f"{what} of epoch {record['epoch']} could not be written to {self.folder} ({error.strerror}){left}: "
                f"make room, then the same command {how}"
            ) from error
        self._show(record)
        return best_epochs

    def _show(self, record: dict[str, Any]) -> None:
        """In TensorBoard, whose failure is no reason to end."""
        try:
            for key, value in record.items() if self._board else ():
                if isinstance(value, int | float) and key != "epoch":
                    self._board.add_scalar(key, value, record["epoch"])
        except OSError as error:
            warn(f"no more TensorBoard events: {error}")
            self._board = None

    def _write_best(self, last: int, best: list[int], nets: list[dict[str, Any]]) -> list[int]:
        """Write best.pt if epoch `last`, whose weights `nets` are, is the `best` of a network; the other network's
        weights stay those in the file. -> the epochs of the networks in it"""
        path, epochs = self.folder / "best.pt", list(best)
        if last not in epochs:
            return epochs
        nets = list(nets)
        for k, epoch in enumerate(epochs):
            if epoch == last:
                continue
            try:
                saved = from_bytes(read_file(path))
                if saved.get("epochs", [])[k : k + 1] != [epoch]:
                    raise DivideMixError(f"it does not hold net {k + 1} of epoch {epoch}")
                nets[k] = saved["nets"][k]
            except (OSError, DivideMixError) as error:
                warn(f"{path}: the best weights of net {k + 1} are lost, those of epoch {last} stand in: {error}")
                epochs[k] = last
        write_state(path, {"nets": nets, "epochs": epochs, "config": self.config})
        return epochs

    def best_networks(self) -> list[dict[str, Any]]:
        """The state of each network at its best epoch, the same on all ranks. Raises DivideMixError."""
        return share(self.ranks, {"nets": load_networks(self.folder / "best.pt")} if self.ranks.first else {})["nets"]

    def finish(self, final: dict[str, Any], score_labels: Callable[["Run"], None] | None = None) -> dict[str, Any]:
        """Write what `score_labels` writes (see `scoring`), result.json, and the last line of acc.txt where the
        script's format has one. -> `final`, with null instead of NaN. Called again, it leaves the same."""
        final = without_nan(final)
        if score_labels:  # first: with a result.json a run counts as finished
            score_labels(self)
        if self.ranks.first:
            write_atomically(self.folder / "result.json", json.dumps(final, indent=1, allow_nan=False).encode())
            lines = [*map(self.logs.acc, self.records), self.logs.final(final)]
            write_atomically(self.folder / "acc.txt", "".join(lines).encode())
        return final

    def close(self) -> None:
        self._saving.close()
        if self._board:
            with contextlib.suppress(OSError):
                self._board.close()
        if self._lock:
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """What was begun to be written is completed, also after an error or a signal."""
        try:
            self._saving.wait()
        except DivideMixError as failed:
            if error is None:
                raise
            warn(str(failed))
        finally:
            self.close()
        begun = any(
            (self.folder / name).exists() for name in ("args.json", "skipped.json")
        )  # hours of looking, the latter
        if self._new and not self.records and not begun:  # refused: leave nothing behind
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._aside:
                self._aside.rename(self.folder)
        if isinstance(error, KeyboardInterrupt) and self.ranks.first:
            how = f"continues {self.folder} with epoch {self._saved}" if self._saved else "starts again"
            if self._saved >= self.num_epochs:  # in the final test, or while the figures were drawn
                how = f"makes the result and figures of {self.folder}"
            error.add_note(f"the same command {how}")


def folder_for(out_dir: str, run_dir: str | None, *parts: str) -> Path:
    """--run_dir, or --out_dir / the non-empty parts joined by '_'."""
    return Path(run_dir) if run_dir else Path(out_dir) / "_".join(part for part in parts if part)


def lock_folder(folder: Path) -> FileLock:
    """The folder's lock, held until it is released. Raises DivideMixError where another process holds it, OSError."""
    before = folder.stat()
    try:
        lock = lock_file(folder / ".lock")
        if os.path.samestat(before, folder.stat()):
            return lock
        lock.release()  # opened, and locked too late
    except Timeout as error:
        raise DivideMixError(
            f"another process is training in {folder}: wait for it, or give this run another --id"
        ) from error
    except FileNotFoundError:
        pass
    raise DivideMixError(f"another process has just moved {folder} aside: give the same command again")


def set_aside(folder: Path) -> Path:
    """Rename a folder to <name>.<time>, never deleting anything. -> its new name. Raises DivideMixError for a path
    that ends in no name."""
    if folder.name in ("", ".."):
        raise DivideMixError(f"--fresh cannot move {folder} aside: give --run_dir with the folder's name")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    aside, k = folder.with_name(f"{folder.name}.{stamp}"), 1
    while aside.exists():
        aside, k = folder.with_name(f"{folder.name}.{stamp}-{k}"), k + 1
    folder.rename(aside)
    return aside


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of an epoch


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """None, in JSON null, for what is not finite: NaN is no JSON."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def score_arrays(k: int, scored, division, index: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What scores/epoch_NNN.npz holds of net k (0 or 1): raw and fitted loss, clean probability, prediction (n,); the
    mixture (2,). index (n,): which of the training list's samples they are, where not all were scored. Nothing of an
    epoch that was not scored."""
    if scored is None:
        return {}
    arrays = {"raw_loss": scored.loss.numpy(), "prediction": scored.prediction.numpy().astype(np.int32)}
    if index is not None:
        arrays["index"] = index
    if division is not None:
        arrays |= {
            name: getattr(division, name) for name in ("loss", "clean_probability", "means", "variances", "weights")
        }
        arrays["threshold"] = np.float64(division.threshold)
    return {f"{name}_net{k + 1}": value for name, value in arrays.items()}
