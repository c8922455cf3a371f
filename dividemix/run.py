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
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from dividemix import Diverged, DivideMixError, histograms, logs, scoring, warn
from dividemix.checkpoint import (
    FORMAT,
    from_bytes,
    load_file,
    load_last,
    load_weights,
    lock_file,
    read_file,
    save_last,
    share,
    write_atomically,
    write_state,
)
from dividemix.codivide import Division, Mixture
from dividemix.engine import DataSet, MixMatch, Phase, PhaseTerms
from dividemix.logs import Logs
from dividemix.provenance import commit, versions
from dividemix.runtime import Runtime, load_optimizer
from dividemix.saving import Background, save_scores, to_host
from dividemix.seeds import PHASES, draws

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


class Run:
    """One run folder, open for writing, on every rank; the first rank alone reads, locks, writes and prints.

    args: the script's flags, of which those that change the result may not differ between two starts in one folder.
    logs: the script's formats. state: what the last checkpoint holds until `start` has restored it, {} for a new run;
    records: one flat dict for each finished epoch; best_epochs: of each network, [] before the first epoch's end. All
    ranks have the same of these: the first sends them what it read, so the others need not see the folder. labels: what
    `save_labels` was given, on the first rank. Raises DivideMixError, on the first rank, for a folder that cannot be
    written, is in use by another process, or belongs to another script or to a run with other flags.
    """

    def __init__(self, folder: Path, args: Namespace, runtime: Runtime | None = None, logs: Logs = logs.CIFAR):
        self.folder, self.args, self.runtime, self.logs = folder, args, runtime or Runtime(), logs
        self.ranks = self.runtime.ranks
        self.config = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
        self.pins: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.epoch, self.num_epochs = 0, math.inf
        self._board = self._lock = self._aside = self._copy = None
        self._saving = Background()
        self._new = False
        self.state: dict[str, Any] = share(self.ranks, self._open(args.fresh) if self.ranks.first else {})
        self.records: list[dict[str, Any]] = self.state.get("records", [])
        self.histograms: list[dict[str, Any]] = self.state.get("histograms", [])
        self.best_epochs: list[int] = self.state.get("best_epochs", [])
        self.labels: dict[str, np.ndarray] = {}
        self._saved = len(self.records)

    @property
    def begun(self) -> bool:
        """Whether it goes on from a checkpoint."""
        return bool(self.records)

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
            state = load_last(folder)
            self._refuse_other_config(state)
            for orphan in [*folder.glob(".*.tmp"), *folder.glob("scores/.*.tmp")]:  # of a process killed in writing
                if orphan.is_file():
                    orphan.unlink()
        except BaseException:
            self._lock.release()
            raise
        return state

    def _refuse_other_config(self, state: dict[str, Any]) -> None:
        remedy = "give this one an --id, or --fresh to start anew"
        script, before = state.get("script", self.logs.script), state.get("config", self.config)
        if script != self.logs.script:
            raise DivideMixError(f"{self.folder} holds a run of {script}: {remedy}")
        # Only what both know: a flag that a later version adds does not cut older runs off.
        names = sorted(k for k in before.keys() & self.config.keys() if before[k] != self.config[k])
        if names:
            listed = ", ".join(f"--{k} was {before[k]}, now {self.config[k]}" for k in names)
            raise DivideMixError(f"{self.folder} holds a run with other settings ({listed}): {remedy}")

    def pin(self, name: str, value: Any, problem: str) -> None:
        """Hold a value that must stay what it was when the run began, and be the same on all ranks; raises
        DivideMixError with `problem` if it is not."""
        if self.ranks.from_first(lambda: value) != value:
            raise DivideMixError(f"{name}: this rank reads other data than the first rank")
        if self.state.get("pins", {}).get(name, value) != value:
            raise DivideMixError(f"{problem}: put them back, give this run an --id, or --fresh to start anew")
        self.pins[name] = value

    def keep(self, name: str, value: Any) -> Any:
        """The value of this name that the run began with, else this one; plain numbers and lists."""
        self.pins[name] = self.state.get("pins", {}).get(name, value)
        return self.pins[name]

    def say(self, *lines: str) -> None:
        """Print, once for all ranks."""
        if lines and self.ranks.first:
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

    def start(
        self,
        argv: Sequence[str] | None,
        nets: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        mixtures: Sequence[Mixture],
        mixmatch: MixMatch,
        *,
        data: Mapping[str, Any],
        model: Mapping[str, Any],
        lines: Iterable[str] = (),
    ) -> None:
        """Restore what the last checkpoint holds, bring logs and best.pt in line with it, write args.json, and print
        how the run begins. data, model: what args.json says of the data and, for `deploy`, of the networks."""
        self.nets, self.optimizers, self.mixtures, self.mixmatch = nets, optimizers, mixtures, mixmatch
        if self.state:
            load_weights(nets, self.state["nets"], "the last checkpoint")
            for optimizer, saved in zip(optimizers, self.state["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
            for mixture, history in zip(mixtures, self.state["histories"], strict=True):
                mixture.history = [losses.numpy() for losses in history]
            self.best_epochs = self.ranks.from_first(
                self._write_best, self.records[-1]["epoch"], self.best_epochs, self.state["nets"]
            )
        self.state = {}  # restored by now; for large networks about a gigabyte
        self.say(self.runtime.describe(), *lines, f"run folder {self.folder}")
        if not self.ranks.first:
            return
        about = {"command": [self.logs.script, *(sys.argv[1:] if argv is None else argv)], "args": vars(self.args)}
        about |= {"data": data, "model": model, "machine": self.runtime.describe()}
        about |= {"versions": versions(), "commit": commit()}
        path = self.folder / "args.json"
        starts = json.loads(read_file(path))["starts"] if path.exists() else []
        this = {"epoch": len(self.records)} | {name: about[name] for name in ("command", "versions", "commit")}
        about["starts"] = [*starts, this]
        write_atomically(path, json.dumps(about, indent=1, default=str).encode())
        for name, lines_of in self._files():
            write_atomically(self.folder / name, "".join(map(lines_of, self.records)).encode())
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

    def phase(self, name: str, k: int = 0) -> "RunPhase":
        """The phase `name` of net k (0 or 1) in this epoch; entered, it is timed as seconds_<name>."""
        rng = draws(self.args.seed, name, self.epoch, k) if name in PHASES else None
        title = f"{name}{k + 1}" if name in ("warmup", "train") else name
        hidden = not (self.ranks.first and sys.stderr.isatty())

        def bar(batches: Iterable) -> Iterable:
            return tqdm(batches, f"epoch {self.epoch} {title}", leave=False, dynamic_ncols=True, disable=hidden)

        return RunPhase(self.epoch, rng, bar, title, self.seconds)

    def end_epoch(
        self,
        lr: float,
        divisions: Sequence[Division | None],
        losses: Sequence[PhaseTerms],
        accuracy: Mapping[str, float],
        index: Sequence[NDArray[np.int64]] = (),
    ) -> None:
        """One finished epoch. accuracy: what `engine.test` gives, and more for the record; index: where not all samples
        were divided, which ones by each network. It is written while training goes on: what an epoch's end waits for,
        the epoch before and a copy of the state, is seconds_save. All ranks go on with the first one's record. Raises
        DivideMixError where the epoch before could not be written."""
        with self.phase("save"):
            self._wait()
            if self.ranks.first:
                self._copy = to_host(self._state(), self._copy)
        record = self.ranks.from_first(self._record, lr, list(divisions), losses, accuracy)
        self.records.append(record)
        best_by = self.logs.best_by
        self.best_epochs = [
            record["epoch"] if best_by(record, k) > best_by(self.records[epoch], k) else epoch
            for k, epoch in enumerate(self.best_epochs or [record["epoch"]] * len(self.nets))
        ]
        record |= self.logs.running(self.records, self.best_epochs)
        if self.ranks.first:
            scores: dict[str, np.ndarray] = {}
            for k, division in enumerate(divisions):
                scores |= score_arrays(k, division, index[k] if index else None)
            nets = histograms.count(scores, self._truly_clean)
            histogram = [{"epoch": self.epoch, **nets}] if nets else []
            self.histograms += histogram
            about = {"format": FORMAT, "script": self.logs.script, "config": self.config, "pins": dict(self.pins)}
            about |= {"records": list(self.records), "histograms": list(self.histograms)}
            about |= {"best_epochs": self.best_epochs, "versions": versions()}
            self._saving.start(self._save, record, histogram, self._copy | about, scores)
        self.say(self.logs.epoch(record, self.num_epochs))

    def _state(self) -> dict[str, Any]:
        """What the next epoch depends on, beside the flags."""
        return {
            "nets": [net.state_dict() for net in self.nets],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "histories": [[torch.from_numpy(losses) for losses in mixture.history] for mixture in self.mixtures],
        }

    @property
    def _truly_clean(self) -> NDArray[np.bool_] | None:
        """Which of the labels are right, where that is known."""
        return self.labels["given"] == self.labels["true"] if "true" in self.labels else None

    def _record(self, lr: float, divisions: list, losses: Sequence[PhaseTerms], accuracy: Mapping[str, float]) -> dict:
        phase = "train" if any(divisions) else "ce" if self.mixmatch.warm_up == math.inf else "warmup"
        record = {"epoch": self.epoch, "phase": phase, "lr": lr, **accuracy}
        record |= logs.training(divisions, losses, self._truly_clean, self.mixmatch.unlabeled_loss)
        return without_nan(record | {k: round(v, 3) for k, v in self.seconds.items()})

    def _wait(self) -> None:
        """Until the last finished epoch is written."""
        self.best_epochs = self.ranks.from_first(self._saving.wait, self.best_epochs)

    def _save(
        self,
        record: dict[str, Any],
        histogram: list[dict[str, Any]],
        state: dict[str, Any],
        scores: dict[str, np.ndarray],
    ) -> list[int]:
        """Write everything that an epoch leaves, beside training. -> the epochs of the networks in best.pt"""
        try:
            if scores:
                save_scores(self.folder / "scores", record["epoch"], scores, getattr(self.args, "save_scores", True))
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
        return share(self.ranks, load_file(self.folder / "best.pt") if self.ranks.first else {})["nets"]

    def finish(self, line: str, train: DataSet | None = None, **more: Any) -> dict[str, Any]:
        """The end: print `line`, score the labels of `train` (see `scoring`), write result.json and the last line of
        acc.txt where the script's format has one. -> the last record with `more` and run_dir, null instead of NaN.
        Called again, it leaves the same."""
        final = without_nan({**self.records[-1], **more, "run_dir": str(self.folder)})
        self.say(line)
        if train is not None and not self.args.no_label_scores:  # first: with a result.json a run counts as finished
            scoring.score_labels(self, train)
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


@dataclass
class RunPhase(Phase):
    """A phase of a run: adds its time to `seconds`, and the epoch to the message of a training that diverged."""

    title: str = ""
    seconds: dict[str, float] | None = None

    def __enter__(self) -> "RunPhase":
        self.begin = time.perf_counter()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        key = f"seconds_{self.title}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - self.begin
        if isinstance(error, Diverged):
            raise Diverged(f"epoch {self.epoch}: {error}") from error


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


def score_arrays(k: int, division: Division | None, index: NDArray | None = None) -> dict[str, NDArray]:
    """What scores/epoch_NNN.npz holds of net k (0 or 1): raw and fitted loss, clean probability, prediction (n,); the
    mixture (2,). index (n,): which of the training list's samples they are, where not all were divided. Nothing of a
    network without a division."""
    if division is None:
        return {}
    names = ("raw_loss", "loss", "clean_probability", "means", "variances", "weights", "threshold")
    arrays = {name: np.asarray(getattr(division, name)) for name in names}
    arrays["prediction"] = division.prediction.astype(np.int32)
    if index is not None:
        arrays["index"] = index
    return {f"{name}_net{k + 1}": value for name, value in arrays.items()}
