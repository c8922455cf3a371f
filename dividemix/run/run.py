"""Write the run folder; the same command again continues the run.

The checkpoint holds the records and loss histograms of all epochs. The logs are written from them, and written again
when a run continues. A thread writes an epoch while the next one trains, in the order checkpoint, last.json, best.pt,
logs: at every moment the logs hold no epoch that the checkpoint lacks.
"""

import contextlib
import datetime
import json
import math
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from dividemix import DivideMixError, files, networks, warn
from dividemix.codivide import Division, Mixture
from dividemix.engine import DataSet, MixMatch, Terms
from dividemix.run import checkpoint, histograms, logs, progress, scoring
from dividemix.run.description import commit, versions
from dividemix.run.folder import load
from dividemix.run.logs import Logs
from dividemix.run.progress import RunPhase
from dividemix.runtime import Runtime
from dividemix.runtime.device import load_optimizer
from dividemix.seeds import PHASES, draws

# Flags that may differ between two starts of one run, since they do not change what is computed
FREE_FLAGS = {"num_epochs", "fresh", "out_dir", "run_dir", "save_scores", "no_label_scores"}
FREE_FLAGS |= {"data_path", "download", "noise_file", "labels", "check_data", "skip_bad_images", "keep_images"}
FREE_FLAGS |= {"corrections", "path_column", "label_column"}
FREE_FLAGS |= {"cache_dir", "device", "gpuid", "workers", "eval_batch_size", "deterministic", "no_compile", "no_graph"}
FREE_FLAGS |= {"feature_file", "verbose"}  # its content is pinned


class Run:
    """An open run folder. With several ranks each has a Run, but only the first reads, locks, writes and prints; the
    others need not see the folder.

    args: the script's flags. logs: its formats. The same on all ranks: state, the content of the last checkpoint until
    `start` restores it, {} for a new run; records, one flat dict for each finished epoch; best_epochs, one for each
    network, [] before the first epoch's end; probabilities, which `co_divide` fills. labels: what `save_labels` got, on
    the first rank. Raises DivideMixError, on the first rank, for a folder that cannot be written, is in use by another
    process, or belongs to another script or to a run with other flags.
    """

    def __init__(self, folder: Path, args: Namespace, runtime: Runtime | None = None, logs: Logs = logs.CIFAR):
        self.folder, self.args, self.runtime, self.logs = folder, args, runtime or Runtime(), logs
        self.ranks = self.runtime.ranks
        self.config = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
        self.pins: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.epoch, self.num_epochs = 0, math.inf
        self._is_new = self._old_folder = self._host_state = None
        self._tensorboard: Any = None
        self._is_untimed = True
        self._lock: Any = None
        self._writer = ThreadPoolExecutor(1, "save")  # starts its thread at the first epoch's end
        self._writing: Future[list[int]] | None = None  # of the last finished epoch
        self.state: dict[str, Any] = self.ranks.broadcast_from_rank0(self._open, args.fresh)
        self.records: list[dict[str, Any]] = self.state.get("records", [])
        self.histograms: list[dict[str, Any]] = self.state.get("histograms", [])
        self.best_epochs: list[int] = self.state.get("best_epochs", [])
        self.probabilities = scoring.MeanProbabilities()
        self.labels: dict[str, NDArray] = {}
        self._truly_clean: NDArray[np.bool_] | None = None
        self._epochs_saved = len(self.records)

    @property
    def begun(self) -> bool:
        """Whether the run continues from a checkpoint."""
        return bool(self.records)

    def _open(self, fresh: bool) -> dict[str, Any]:
        """Make and lock the folder. -> the state of its last checkpoint"""
        folder = self.folder
        try:
            self._is_new = fresh or not folder.exists()
            with contextlib.ExitStack() as old_lock:  # until the new folder is locked: no process may use the old one
                if fresh and folder.exists():
                    lock = lock_folder(folder)
                    if sys.platform == "win32":  # renames no folder with an open file in it
                        lock.release()
                    old_lock.callback(lock.release)
                    self._old_folder = set_aside(folder)
                    print(f"--fresh: {folder} moved to {self._old_folder}")
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = lock_folder(folder)
        except OSError as error:
            problem = f"run folder {folder} cannot be written: {error.strerror}"
            raise DivideMixError(f"{problem}; choose --out_dir or --run_dir") from error
        try:
            state = checkpoint.load_last(folder)
            if state:
                self._refuse_another_run(state["script"], state["config"])
            for temporary in [*folder.glob(".*.tmp"), *folder.glob("scores/.*.tmp")]:  # of a killed process
                temporary.unlink()
        except BaseException:
            self._lock.release()
            raise
        return state

    def _refuse_another_run(self, script: str, config: dict[str, Any]) -> None:
        remedy = self._another_run()
        if script != self.logs.script:
            raise DivideMixError(f"{self.folder} holds a run of {script}: {remedy}")
        if changed := sorted(k for k in config.keys() | self.config.keys() if config.get(k) != self.config.get(k)):
            changes = ", ".join(f"--{k} was {config.get(k)}, now {self.config.get(k)}" for k in changed)
            raise DivideMixError(f"{self.folder} holds a run with other settings ({changes}): {remedy}")

    def _another_run(self) -> str:
        """What to do where this folder's run cannot go on, for the end of a message."""
        flag = "--run_dir DIR" if vars(self.args).get("run_dir") else "--id NAME"
        return f"start another run with {flag} or --fresh"

    def pin(self, name: str, value: Any, problem: str) -> None:
        """Keep a value that must be the same in every start of the run, and on all ranks. Raises DivideMixError with
        `problem` if it is not."""
        if self.ranks.broadcast_from_rank0(lambda: value) != value:
            raise DivideMixError(f"{name}: this rank reads other data than the first rank")
        if self.state.get("pins", {}).get(name, value) != value:
            raise DivideMixError(f"{problem}: restore the old ones, or {self._another_run()}")
        self.pins[name] = value

    def keep(self, name: str, value: Any) -> Any:
        """The value that the run had at its first start, or `value` if this is the first; plain numbers and lists."""
        self.pins[name] = self.state.get("pins", {}).get(name, value)
        return self.pins[name]

    def say(self, *lines: str) -> None:
        """Print lines, on the first rank only."""
        if lines and self.ranks.first:
            print(*lines, sep="\n", flush=True)

    def save_labels(self, **arrays: np.ndarray) -> None:
        """Write labels.npz: of each training sample index, given label and, if it is known, true label, (N,) each; of
        each entry of the list that `index` refers to list_given, its label, list_true and list_path, its file, (M,)
        each; held_out (H,): the entries that are held out."""
        if self.ranks.first:
            self.labels = arrays
            self._truly_clean = arrays["given"] == arrays["true"] if "true" in arrays else None
            files.write_arrays(self.folder / "labels.npz", arrays)

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
        """Restore the last checkpoint, write the logs and best.pt as of then, write args.json, and print the first
        lines. data, model: what args.json says of the data and, for `deploy`, of the networks."""
        self.nets, self.optimizers, self.mixtures, self.mixmatch = nets, optimizers, mixtures, mixmatch
        if self.state:
            networks.load_weights(nets, self.state["nets"], "the last checkpoint")
            for optimizer, saved in zip(optimizers, self.state["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
            for mixture, history in zip(mixtures, self.state["histories"], strict=True):
                mixture.history = [losses.numpy() for losses in history]
            for net, saved, steps in zip(nets, *self.state.get("averages", ((), ())), strict=False):
                average = self.runtime.averages[net]
                networks.load_weights([average.net], [saved], "the last checkpoint")
                average.steps = steps
            mean, count = self.state["probabilities"]
            self.probabilities.mean = None if mean is None else mean.to(self.runtime.device)
            self.probabilities.count = count
            self.best_epochs = self.ranks.broadcast_from_rank0(self._write_best, self.state)
        self.state = {}  # no longer needed; about a gigabyte for large networks
        self.say(self.runtime.describe(), *lines, f"run folder {self.folder}")
        if not self.ranks.first:
            return
        command = [self.logs.script, *(sys.argv[1:] if argv is None else argv)]
        origin = {"command": command, "versions": versions(), "commit": commit()}
        starts = load(self.folder / "args.json", json.loads, {}).get("starts", [])
        content = origin | {"program": Path(sys.argv[0]).name}
        content |= {"args": vars(self.args), "data": data, "model": model, "machine": self.runtime.describe()}
        content["starts"] = [*starts, {"epoch": len(self.records), **origin}]
        self._write("args.json", json.dumps(content, indent=1, default=str))
        for name, text in self._log_lines(self.records, self.histograms).items():
            self._write(name, text)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=len(self.records))
        except (OSError, ImportError, ValueError) as error:  # ValueError: a path that is not UTF-8
            warn(f"no TensorBoard events: {error}")

    def _write(self, name: str, text: str) -> None:
        files.write_atomically(self.folder / name, text.encode())

    def _log_lines(self, records: list[dict[str, Any]], histograms: list[dict[str, Any]]) -> dict[str, str]:
        """The lines of each log file."""
        lines = {"metrics.jsonl": map(logs.metric_line, records), "acc.txt": map(self.logs.acc, records)}
        lines |= {"stats.txt": map(self.logs.stats, records), "histograms.jsonl": map(logs.metric_line, histograms)}
        return {name: "".join(text) for name, text in lines.items()}

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The epochs that are not done yet. After the last, waits until everything is written."""
        done, self.num_epochs = len(self.records), num_epochs
        self.epoch = max(done - 1, 0)
        if done >= num_epochs:
            next_steps = "continue with more --num_epochs, or restart with --fresh"
            self.say(f"{self.folder} is finished ({done} epochs): {next_steps}")
        elif done:
            self.say(f"continuing {self.folder} with epoch {done} (of 0..{num_epochs - 1})")
        if done < num_epochs:
            self.say(*logs.LEGEND)
        if done < num_epochs and self.ranks.first:
            (self.folder / "result.json").unlink(missing_ok=True)  # that of fewer epochs
        for self.epoch in range(done, num_epochs):
            self.seconds = {}
            yield self.epoch
        self._wait()

    def phase(self, name: str, k: int = 0) -> RunPhase:
        """Phase `name` of net k (0 or 1) in this epoch. As a context manager it is timed, as seconds_<name>."""
        rng = draws(self.args.seed, name, self.epoch, k) if name in PHASES else None
        title = f"{name}{k + 1}" if name in ("warmup", "train") else name
        hidden = not (self.ranks.first and sys.stderr.isatty())
        bar = partial(tqdm, desc=f"epoch {self.epoch} {title}", leave=False, dynamic_ncols=True, disable=hidden)
        if title == "warmup1" and self._is_untimed and self.ranks.first:
            bar = partial(progress.timed, bar, self.runtime.device, self._say_expected_time)
        return RunPhase(self.epoch, rng, bar, title, self.seconds)

    def _say_expected_time(self, step: float, steps: int) -> None:
        """Print how long the rest of the run takes. step: seconds of a network's warm-up step, of which an epoch has
        `steps`."""
        self._is_untimed = False
        epochs = int(self.num_epochs) - self.epoch
        divided = epochs - min(max(self.mixmatch.warm_up - self.epoch, 0), epochs)
        warmup = step * steps * len(self.nets)
        tqdm.write(progress.expected_time(step, warmup, epochs, divided, self.mixmatch.unlabeled_loss))

    def end_epoch(
        self,
        lr: float,
        divisions: Sequence[Division | None],
        losses: Sequence[Terms],
        accuracy: Mapping[str, float],
        index: Sequence[NDArray[np.int64]] = (),
    ) -> None:
        """Record a finished epoch; a thread writes it while training goes on. accuracy: from `engine.test`, and more
        items for the record. index: which samples each network divided, if not all. seconds_save is the wait for the
        previous epoch's writing, and the copy of the state. All ranks get the first rank's record. Raises
        DivideMixError if the previous epoch could not be written."""
        with self.phase("save"):
            self._wait()
            if self.ranks.first:
                # All that the next epoch depends on, beside the flags
                state: dict[str, Any] = {"nets": [net.state_dict() for net in self.nets]}
                state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
                state["histories"] = [[torch.from_numpy(row) for row in mixture.history] for mixture in self.mixtures]
                state["probabilities"] = [self.probabilities.mean, self.probabilities.count]
                if averages := [*self.runtime.averages.values()]:
                    weights, steps = zip(*((a.net.state_dict(), a.steps) for a in averages), strict=True)
                    state["averages"] = [[*weights], [*steps]]
                self._host_state = checkpoint.to_host(state, self._host_state)
        record = self.ranks.broadcast_from_rank0(self._record, lr, list(divisions), losses, accuracy)
        self.records.append(record)
        self.best_epochs = [
            record["epoch"] if self.logs.is_better(record, self.records[epoch], k) else epoch
            for k, epoch in enumerate(self.best_epochs or [record["epoch"]] * len(self.nets))
        ]
        record |= self.logs.running(self.records, self.best_epochs)
        if self.ranks.first:
            scores: dict[str, np.ndarray] = {}
            histogram: dict[str, Any] = {"epoch": self.epoch}
            for k, division in enumerate(divisions):
                if division:
                    scores |= logs.score_arrays(k, division, index[k] if index else None)
                    histogram[f"net{k + 1}"] = histograms.count(division, self._truly_clean)
            self.histograms += [histogram] if scores else []
            history = {"records": list(self.records), "histograms": list(self.histograms)}
            origin = {"format": checkpoint.FORMAT, "script": self.logs.script, "versions": versions()}
            origin |= {"config": self.config, "pins": dict(self.pins), "best_epochs": self.best_epochs}
            self._writing = self._writer.submit(self._save, self._host_state | origin | history, scores)
        self.say(logs.epoch_line(record, self.num_epochs, self.args.verbose))

    def _record(self, lr: float, divisions: list, losses: Sequence[Terms], accuracy: Mapping[str, float]) -> dict:
        phase = "train" if any(divisions) else "ce" if self.mixmatch.warm_up == math.inf else "warmup"
        record = {"epoch": self.epoch, "phase": phase, "lr": lr, **accuracy}
        record |= logs.training(divisions, losses, self._truly_clean, self.mixmatch.unlabeled_loss)
        return logs.without_nan(record | {k: round(v, 3) for k, v in self.seconds.items()})

    def _wait(self) -> None:
        """Wait until the last finished epoch is written."""
        self.best_epochs = self.ranks.broadcast_from_rank0(
            lambda: self._writing.result() if self._writing else self.best_epochs
        )

    def _save(self, state: dict[str, Any], scores: dict[str, np.ndarray]) -> list[int]:
        """Write all files of an epoch, in the thread. -> the epochs of the networks in best.pt"""
        record = state["records"][-1]
        epoch = record["epoch"]
        try:
            if scores:
                self._save_scores(epoch, scores)
            checkpoint.save_last(self.folder, epoch, state)
            self._epochs_saved = epoch + 1
            # best.pt comes later: if the process ends between the two, `start` makes it from the checkpoint.
            best_epochs = self._write_best(state)
            histogram = state["histograms"][-1:] if scores else []
            for name, text in self._log_lines([record], histogram).items():
                with open(self.folder / name, "ab") as file:
                    file.write(text.encode())
        except OSError as error:
            problem = f"epoch {epoch} could not be written completely to {self.folder} ({error.strerror})"
            raise DivideMixError(f"{problem}: free some disk space, then {self._next_start()}") from error
        self._write_tensorboard(record)
        return best_epochs

    def _next_start(self) -> str:
        """What the next start will do, for the end of a message."""
        if self._epochs_saved >= self.num_epochs:
            return f"the same command makes the result and figures of {self.folder}"
        next_epoch = self._epochs_saved
        if not next_epoch:
            return "the same command starts from the beginning (no epoch was finished)"
        return f"the same command continues {self.folder} with epoch {next_epoch}"

    def _save_scores(self, epoch: int, scores: dict[str, np.ndarray]) -> None:
        """Write scores/epoch_NNN.npz. Without --save_scores, if the script has it, only the last is kept."""
        folder = self.folder / "scores"
        folder.mkdir(exist_ok=True)
        path = folder / f"epoch_{epoch:03d}.npz"
        files.write_arrays(path, scores)
        for old in [] if getattr(self.args, "save_scores", True) else folder.glob("epoch_*.npz"):
            if old != path:
                old.unlink()

    def _write_tensorboard(self, record: dict[str, Any]) -> None:
        """A failure is a warning."""
        try:
            for key, value in record.items() if self._tensorboard else ():
                if isinstance(value, int | float) and key != "epoch":
                    self._tensorboard.add_scalar(key, value, record["epoch"])
        except OSError as error:
            warn(f"no more TensorBoard events: {error}")
            self._tensorboard = None

    def _write_best(self, state: dict[str, Any]) -> list[int]:
        """Write best.pt if the last epoch is the best of at least one network; the other network's weights in the file
        stay. -> the epochs of the networks in it"""
        path, last = self.folder / "best.pt", state["records"][-1]["epoch"]
        nets, epochs = state["averages"][0] if "averages" in state else state["nets"], state["best_epochs"]
        if last not in epochs:
            return epochs
        if set(epochs) != {last}:
            try:
                old_nets = files.load_file(path)["nets"]
                nets = [nets[k] if epoch == last else old_nets[k] for k, epoch in enumerate(epochs)]
            except DivideMixError as error:
                warn(f"{error}: all weights in it are now those of epoch {last}")
                epochs = [last] * len(epochs)
        files.write_state(path, {"nets": nets, "epochs": epochs, "config": self.config})
        return epochs

    def best_networks(self) -> list[dict[str, Any]]:
        """The weights of each network, or their averages, at its best epoch, on all ranks. Raises DivideMixError for a
        damaged file."""
        return self.ranks.broadcast_from_rank0(files.load_file, self.folder / "best.pt")["nets"]

    def finish(
        self,
        line: str,
        train: DataSet | None = None,
        held_out: DataSet | None = None,
        first_equal: Callable[[], NDArray] | None = None,
        /,
        **results: Any,
    ) -> dict[str, Any]:
        """End the run: print `line`, score the labels of `train` and of the `held_out` training samples, write
        result.json and, if the script's format has one, the last line of acc.txt. first_equal gives
        `duplicates.first_equal` of these samples, once they were read. -> the last record with `results` and run_dir,
        None instead of NaN. A second call writes the same again."""
        final = logs.without_nan({**self.records[-1], **results, "run_dir": str(self.folder)})
        self.say(line)
        if train is not None and not self.args.no_label_scores:  # before result.json, which marks a finished run
            self._score_labels(train, held_out, first_equal)
        if self.ranks.first:
            self._write("result.json", json.dumps(final, indent=1, allow_nan=False))
            self._write("acc.txt", "".join(map(self.logs.acc, self.records)) + self.logs.final(final))
        return final

    def _score_labels(self, train: DataSet, held_out: DataSet | None, first_equal: Callable | None) -> None:
        """Write label_scores.npz, unless the folder has these scores. A failure is a warning, since the run is saved;
        with several ranks, which wait for each other, it is raised."""
        epochs, splits = len(self.records), {"index": train} | ({} if held_out is None else {"held_out": held_out})
        if self.ranks.broadcast_from_rank0(
            lambda: scoring.is_scored(self.folder, epochs, np.concatenate([self.labels[name] for name in splits]))
        ):
            return
        nets, averaged = self.runtime.averaged(self.nets), bool(self.runtime.averages)
        weights = " with the averaged weights" * averaged
        self.say(f"scoring all {sum(map(len, splits.values()))} training labels{weights}")
        try:
            scores = [scoring.ensemble_scores(nets, data, self.phase("labels")) for data in splits.values()]
            first = first_equal() if first_equal else None
            if self.ranks.first:
                mean = self.probabilities.mean
                # Not with averaged weights; nor if damaged images were left out since
                if mean is not None and len(mean) == len(train) and not averaged:
                    scores[0]["probabilities"] = mean.float().cpu().numpy()
                if self.mixmatch.warm_up != math.inf:  # cross-entropy has no clean probabilities
                    settings = self.mixtures, self.args.seed, epochs, self.labels["given"], averaged
                    scores[0] |= scoring.clean_probabilities(scores[0], *settings)
                scoring.write(self.folder, epochs, splits, scores, self.labels, first)
        except Exception as error:
            if self.ranks.world > 1:
                raise
            warn(f"no list of doubtful labels; the run is saved, and the same command tries again: {error}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Complete what is being written, also after an error or a signal."""
        try:
            if self._writing:
                self._writing.result()
        except DivideMixError as failed:
            if error is None:
                raise
            if failed is not error:
                warn(str(failed))
        finally:
            self._writer.shutdown()
            if self._tensorboard:
                with contextlib.suppress(OSError):
                    self._tensorboard.close()
            if self._lock:
                self._lock.release()
        made = [*self.folder.glob("skipped.json"), *self.folder.glob("features/*.npy")]  # these take hours
        begun = made or (self.folder / "args.json").exists()
        if self._is_new and not self.records and not begun:  # refused before it began: restore what was there
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._old_folder:
                self._old_folder.rename(self.folder)
        if isinstance(error, KeyboardInterrupt) and self.ranks.first:
            error.add_note(self._next_start())


def lock_folder(folder: Path) -> FileLock:
    """Lock the folder until the lock's `release`. Raises DivideMixError if another process holds it, and OSError."""
    try:
        return files.lock_file(folder / ".lock")
    except Timeout as error:
        raise DivideMixError(f"another process is training in {folder}: wait, or give this run another --id") from error


def set_aside(folder: Path) -> Path:
    """Rename a folder to <name>.<time>. -> its new path. Raises DivideMixError for a path that ends in no name."""
    if folder.name in ("", ".."):
        raise DivideMixError(f"--fresh cannot rename {folder}: give --run_dir with the folder's name")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    target, k = folder.with_name(f"{folder.name}.{stamp}"), 1
    while target.exists():
        target, k = folder.with_name(f"{folder.name}.{stamp}-{k}"), k + 1
    folder.rename(target)
    return target
