"""An epoch's record, and the lines of the log files and of the console made from it, for each training script.

acc.txt and stats.txt have the formats of the authors' scripts, so that existing scripts can plot them. metrics.jsonl
has the records themselves. The console gets one line an epoch."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dividemix.codivide import Division

Record = dict[str, Any]  # metrics of one epoch, a flat dictionary


# ---- Numbers over the epochs ----


def by_ensemble(record: Record, k: int) -> float:
    """What the best epoch of net k (0 or 1) is chosen by: the accuracy of both networks together, on the validation
    images if there are any, else, as in the authors' code, on the test set."""
    return float(record["val_acc"] if "val_acc" in record else record["test_acc"])


def by_network(record: Record, k: int) -> float:
    """For Clothing1M: the network's own accuracy on the clean validation set."""
    return float(record[f"val_acc_net{k + 1}"])


def by_own_images(record: Record, k: int) -> tuple:
    """For own images, whose few and noisy held-out labels often give equal accuracies: of these the later epoch. Any
    other epoch is better than a warm-up epoch, since there the method has not trained the networks yet. Where nothing
    is held out, the last epoch."""
    if not measured(record):
        return True, 0.0, record["epoch"]
    if record["phase"] == "warmup":
        return False, record["epoch"]
    return True, by_ensemble(record, k), record["epoch"]


def measured(record: Record) -> str:
    """The name of the accuracy that every epoch has; '' where nothing is held out."""
    return next((name for name in ("test_acc", "val_acc") if name in record), "")


def of_averages(record: Record) -> Record:
    """With the numbers of the averaged weights (`--ema`), if there are any, in the place of the others."""
    return record | {name.removesuffix("_ema"): record[name] for name in record if name.endswith("_ema")}


def last10(records: list[Record]) -> float:
    """The mean test accuracy of the last 10 epochs, or of all if there are fewer: the paper's 'last'."""
    return float(np.mean([record["test_acc"] for record in records[-10:]]))


# ---- Numbers of an epoch ----


def training(
    divisions: Sequence, terms: Sequence, truly_clean: NDArray[np.bool_] | None = None, unlabeled_loss: bool = False
) -> Record:
    """The training part of an epoch's record: sizes of net 1's and net 2's divisions (None in warm-up), their quality
    if it is known which labels are `truly_clean` (N,), and means of both networks' `engine.Terms`. In warm-up
    loss_x is the cross-entropy and penalty the confidence penalty. loss_u, if there is an unlabeled loss, is the mean
    over the networks that learned from a division."""
    record: Record = {}
    for k, division in enumerate(divisions, start=1):
        record[f"labeled_net{k}"] = int(division.labeled.sum()) if division else None
        record[f"unlabeled_net{k}"] = int((~division.labeled).sum()) if division else None
        if truly_clean is not None:
            quality = division.precision_recall(truly_clean) if division else (None, None)
            record[f"clean_precision_net{k}"], record[f"clean_recall_net{k}"] = quality
            record[f"auc_net{k}"] = division.auc if division else None
    record["loss_x"] = float(np.mean([t.labeled for t in terms]))
    record["penalty"] = float(np.mean([t.penalty for t in terms]))
    if unlabeled_loss:
        divided = [t.unlabeled for t, division in zip(terms, divisions[::-1], strict=True) if division]
        record["loss_u"] = float(np.mean(divided)) if divided else None
    return record


def without_nan(record: Record) -> Record:
    """With None (null in JSON) instead of NaN and infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def score_arrays(k: int, division: Division, index: NDArray | None = None) -> dict[str, NDArray]:
    """The content of scores/epoch_NNN.npz for net k (0 or 1): raw and normalised loss, clean probability, prediction
    (n,); the mixture (2,). index (n,): their rows in the training list, if not all samples were divided."""
    names = ("raw_loss", "loss", "clean_probability", "means", "variances", "weights", "threshold")
    arrays = {name: np.asarray(getattr(division, name)) for name in names}
    arrays |= {"prediction": division.prediction.astype(np.int32)} | ({} if index is None else {"index": index})
    return {f"{name}_net{k + 1}": value for name, value in arrays.items()}


# ---- Lines of files ----


def metric_line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def acc_line(record: Record) -> str:
    """Of the test set, or, without one, of the validation images; '' without both."""
    name = measured(record)
    return f"Epoch:{record['epoch']}   Accuracy:{record[name]:.2f}\n" if name else ""


def webvision_acc(record: Record) -> str:
    """Top-1 (top-5) on both validation sets."""
    webvision = f"WebVision Acc: {record['test_acc']:.2f}% ({record['test_acc_top5']:.2f}%)"
    imagenet = f"ImageNet Acc: {record['imagenet_acc']:.2f}% ({record['imagenet_acc_top5']:.2f}%)"
    return f"Epoch:{record['epoch']} \t {webvision} \t {imagenet}\n"


def clothing1m_acc(record: Record) -> str:
    accuracy = f"Acc1:{record['val_acc_net1']:.2f}  Acc2:{record['val_acc_net2']:.2f}"
    return f"Validation Epoch:{record['epoch']}      {accuracy}\n"


def clothing1m_final(final: Record) -> str:
    return f"Test Accuracy:{final['test_acc']:.2f}\n"


def divided(record: Record) -> list[int]:
    """The networks (1, 2) that have a division, in the authors' order: net 2, by which net 1 learns, then net 1."""
    return [k for k in (2, 1) if record.get(f"labeled_net{k}") is not None]


def stats_lines(record: Record) -> str:
    """One line for each network of a divided epoch, with the authors' spelling."""
    auc = {k: "null" if (value := record.get(f"auc_net{k}")) is None else f"{value:.3f}" for k in (1, 2)}
    return "".join(f"Numer of labeled samples:{record[f'labeled_net{k}']}   AUC:{auc[k]}\n" for k in divided(record))


def labeled_lines(record: Record) -> str:
    """The same without true labels: WebVision's format, used for Clothing1M too, where the authors log none."""
    return "".join(f"Numer of labeled samples:{record[f'labeled_net{k}']} \n" for k in divided(record))


# ---- One line an epoch for the console ----


def duration(seconds: float) -> str:
    """To two digits or so: '50 seconds', '12 minutes', '5.5 hours', '3.1 days'."""
    for size, unit, digits in ((86400, "days", 1), (3600, "hours", 1), (60, "minutes", 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} seconds"


LEGEND = (
    "columns: labeled, the samples whose labels net 1 / net 2 regards as clean; AUC, how well its losses",
    "tell right from wrong labels; Lx and Lu, the losses of labeled and unlabeled samples (in warm-up Lx",
    "is the cross-entropy); val, test and ema (averaged weights), accuracy (%) of both networks together;",
    "best, that of the networks in best.pt; --verbose: more",
)


def epoch_line(record: Record, num_epochs: float, verbose: bool = False) -> str:
    """Without a newline at the end. About 100 characters at most, unless it is verbose: more than two of AUC and
    accuracies leave no room for losses."""
    columns = [f"epoch {record['epoch']}/{num_epochs - 1} {record['phase']}"]
    if divided(record):
        unlabeled = f" unlabeled {pair(record, 'unlabeled', 'd')}" if verbose else ""
        columns.append(f"labeled {pair(record, 'labeled', 'd')}{unlabeled}")
        columns += [f"AUC {pair(record, 'auc', '.3f')}"] if "auc_net1" in record else []
    terms = {"Lx": record.get("loss_x"), "Lu": record.get("loss_u")}
    if verbose or not divided(record):
        terms["penalty"] = record.get("penalty") or None
    accurate = [name for name in ("auc_net1", "val_acc", "test_acc", "val_acc_ema", "test_acc_ema") if name in record]
    if divided(record) and len(accurate) > 2 and not verbose:
        terms = {}
    losses = " ".join(f"{name} {value:.3f}" for name, value in terms.items() if value is not None)
    seconds = {k.removeprefix("seconds_"): v for k, v in record.items() if k.startswith("seconds_") and verbose}
    ends = [accuracies(record, verbose), " ".join(f"{name} {value:.1f}s" for name, value in seconds.items())]
    return "  ".join(filter(None, [*columns, losses, *ends]))


def accuracies(record: Record, verbose: bool) -> str:
    """The epoch's accuracies (%), top-5 in brackets, and the best so far, of the averaged weights if there are any; ''
    where nothing is held out."""
    if not measured(record):
        return ""
    val = f"val {record['val_acc']:.2f}" if "val_acc" in record else ""
    if "test_acc" not in record:
        nets = f" (nets {pair(record, 'val_acc', '.2f')})" if verbose else ""
        is_of_both = "best_val_acc" in record
        best = f"{record['best_val_acc']:.2f}" if is_of_both else pair(record, "best_val_acc", ".2f")
        if "val_acc_ema" in record:
            return f"{val}{nets} ema {record['val_acc_ema']:.2f} best {record['best_val_acc_ema']:.2f}"
        return f"{val}{nets} best {best}"
    test = f"test {record['test_acc']:.2f}"
    if "imagenet_acc" in record:
        top5 = [f" ({record[f'{name}_acc_top5']:.2f})" if verbose else "" for name in ("test", "imagenet")]
        test = f"test {record['test_acc']:.2f}{top5[0]} ImageNet {record['imagenet_acc']:.2f}{top5[1]}"
    nets = f" (nets {pair(record, 'test_acc', '.2f')})" if verbose and "test_acc_net2" in record else ""
    last10 = f" last-10 {record['last10_acc']:.2f}" if verbose else ""
    ema = f" ema {record['test_acc_ema']:.2f}" if "test_acc_ema" in record else ""
    return f"{val} {test}{nets}{ema} best {record.get('best_acc_ema', record['best_acc']):.2f}{last10}".lstrip()


def pair(record: Record, name: str, form: str) -> str:
    """Net 1's and net 2's value, such as '0.91/0.92', '-' for one without a value; of one network alone, its value."""
    values = [record[f"{name}_net{k}"] for k in (1, 2) if k == 1 or f"{name}_net{k}" in record]
    return "/".join("-" if value is None else format(value, form) for value in values)


@dataclass(frozen=True)
class Logs:
    """The formats of one script. acc, stats: an epoch's lines in acc.txt and stats.txt. best_by: (record, k) -> what is
    largest in the best epoch of net k (0 or 1), the first of equals. final: acc.txt's end, from the final metrics."""

    script: str
    acc: Callable[[Record], str] = acc_line
    stats: Callable[[Record], str] = stats_lines
    best_by: Callable[[Record, int], Any] = by_ensemble
    final: Callable[[Record], str] = lambda final: ""

    def best_epochs(self, records: Sequence[Record], num_nets: int) -> list[int]:
        """The best epoch of each network, as `Run.end_epoch` chooses it."""
        averaged = [*map(of_averages, records)]
        return [max(averaged, key=lambda record: self.best_by(record, k))["epoch"] for k in range(num_nets)]

    def is_better(self, record: Record, before: Record, k: int) -> bool:
        """Whether an epoch is a better one of net k (0 or 1), by the averaged weights if there are any."""
        return bool(self.best_by(of_averages(record), k) > self.best_by(of_averages(before), k))

    def running(self, records: list[Record], best_epochs: list[int]) -> Record:
        """The last record's numbers on all epochs so far: best and last-10 test accuracy, or, without a test set, the
        best validation accuracy, of both networks together or of each, {} where nothing is held out; then of the
        averaged weights, if there are any, whose best epochs these are."""
        if not any(name.endswith("_ema") for name in records[-1]):
            return self._running(records, best_epochs)
        averaged = [*map(of_averages, records)]
        best = max(range(len(records)), key=lambda epoch: self.best_by(records[epoch], 0))
        of_both = self._running(records, [best]), self._running(averaged, best_epochs)
        return of_both[0] | {f"{name}_ema": value for name, value in of_both[1].items()}

    def _running(self, records: list[Record], best_epochs: list[int]) -> Record:
        best = [records[epoch] for epoch in best_epochs]
        if "test_acc" in records[-1]:
            return {"best_acc": best[0]["test_acc"], "last10_acc": last10(records)}
        if self.best_by is by_network:
            return {f"best_val_acc_net{k}": record[f"val_acc_net{k}"] for k, record in enumerate(best, start=1)}
        return {"best_val_acc": best[0]["val_acc"]} if measured(records[-1]) else {}


CIFAR = Logs("Train_cifar.py")
WEBVISION = Logs("Train_webvision.py", webvision_acc, labeled_lines)
FOLDER = Logs("Train_folder.py", best_by=by_own_images)
CLOTHING1M = Logs("Train_clothing1M.py", clothing1m_acc, labeled_lines, by_network, clothing1m_final)
OF_SCRIPT = {logs.script: logs for logs in (CIFAR, WEBVISION, FOLDER, CLOTHING1M)}
