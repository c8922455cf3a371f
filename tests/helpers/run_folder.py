"""Run folders made by hand, as a training script leaves them, for the tests of the report.

`make_run(folder)` is of 12 samples and 3 classes: 0, 3, 6 and 9 have wrong labels where the truth is known. Both nets
doubt 0, 3, 6 and 1, and suggest the true class of 0, 3 and 1, another wrong one of 6. They have memorised the label of
9. So few samples show nothing of the rule by which labels are listed: `simple_rule` takes its place.
"""

import json
from pathlib import Path

import numpy as np

from dividemix.run import thumbnail
from dividemix.run.label_quality import LabelQuality

N = 12
CLASSES = ["cat", "dog", "bird"]
TRUE = np.arange(N) % 3
WRONG = np.arange(N) % 3 == 0
GIVEN = np.where(WRONG, 1, TRUE)
SUGGESTED = np.where(np.arange(N) == 6, 2, np.where(np.arange(N) == 9, 1, TRUE))
P_CLEAN = np.where(np.isin(np.arange(N), [0, 3, 6, 1]), 0.1, 0.95)  # net 1's; net 2's is a little lower
P_GIVEN = np.where(SUGGESTED == GIVEN, 0.75, 0.125) - np.where(np.arange(N) == 1, 0.375, np.arange(N) / 1024)
LOSS = np.where(WRONG, 2.0, 0.25).astype(np.float32) + np.arange(N, dtype=np.float32) / 16


def make_run(
    folder: Path,
    *,
    truth: bool = True,
    epochs: int = 3,
    warm_up: int = 1,
    scored: bool = True,
    histograms: bool = True,
    thumbnails: bool = True,
    paths: list[bytes] | None = None,
    classes: list[str] | None = None,
    command: str = "Train_cifar.py",
    method: str = "dividemix",
    accuracy: float = 50.0,
    averaged: float | None = None,
    **flags,
) -> Path:
    """`accuracy`: of epoch 0; each later one has one point more. averaged: that of averaged weights, in all epochs.
    flags: more of the run's settings."""
    folder.mkdir(parents=True)
    divided = method == "dividemix"
    args = {"warm_up": warm_up, "method": method, "seed": 123, "p_threshold": 0.5, "r": 0.5, **flags}
    data = [word for name in ("dataset", "data_path") if name in flags for word in (f"--{name}", flags[name])]
    about = {
        "command": [command, *data, "--r", "0.5", "--width=8"],
        "args": args,
        "data": {"classes": classes or CLASSES, "train": N},
    }
    about |= {"model": {}, "machine": "cpu, 1 threads", "commit": "0" * 40, "versions": {"torch": "2"}}
    (folder / "args.json").write_text(json.dumps(about))
    labels = {"index": np.arange(N), "given": GIVEN, "list_given": GIVEN}
    labels |= {"true": TRUE, "list_true": TRUE} if truth else {}
    labels |= {"list_path": np.array(paths, np.bytes_)} if paths else {}
    np.savez(folder / "labels.npz", **labels)
    records = [record(e, accuracy + e, accuracy, divided and e >= warm_up, truth) for e in range(epochs)]
    if averaged is not None:
        records = [line | {f"{name}_acc_ema": averaged for name in ("test", "best", "last10")} for line in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    if histograms and divided:
        lines = [{"epoch": e, "net1": histogram(truth, e), "net2": histogram(truth, e)} for e in range(warm_up, epochs)]
        (folder / "histograms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if scored:
        np.savez(folder / "label_scores.npz", **label_scores(epochs, divided))
    if thumbnails:
        index = np.array([0, 3, 6, 1])
        files = [thumbnail(np.full((8, 6, 3), 20 * i, np.uint8)) for i in index]
        content = np.frombuffer(b"".join(files), np.uint8)
        np.savez(folder / "thumbnails.npz", index=index, content=content, ends=np.cumsum([*map(len, files)]))
    return folder


def record(epoch: int, accuracy: float, first: float, divided: bool, truth: bool) -> dict:
    """A line of metrics.jsonl."""
    known = {"test_acc": accuracy, "test_acc_net1": accuracy - 1, "test_acc_net2": accuracy - 2}
    known |= {"best_acc": accuracy, "last10_acc": (first + accuracy) / 2}
    for k in (1, 2):
        known |= {f"labeled_net{k}": 8 + k if divided else None, f"auc_net{k}": 0.875 if divided and truth else None}
        if truth:
            known |= {f"clean_{name}_net{k}": 0.75 if divided else None for name in ("precision", "recall")}
    return {"epoch": epoch, "phase": "train", **known, "seconds_train1": 1.5, "seconds_test": 0.5}


def label_scores(epochs: int, divided: bool = True) -> dict[str, np.ndarray]:
    scores = {"index": np.arange(N), "loss_net1": LOSS, "loss_net2": LOSS + np.float32(0.5)}
    probabilities = np.full((N, 3), 0.0625, np.float32)
    probabilities[np.arange(N), SUGGESTED] = 0.8125
    probabilities[np.arange(N), GIVEN] = P_GIVEN
    scores |= {"probabilities": probabilities, "held_out": np.zeros(N, bool), "epochs": np.int64(epochs)}
    return scores | ({"p_clean_net1": P_CLEAN, "p_clean_net2": P_CLEAN - 0.01} if divided else {})


def simple_rule(probabilities: np.ndarray, labels: np.ndarray) -> LabelQuality:
    """In place of `label_quality`: a label is an issue if its probability, the quality, is below 0.5 and not the
    largest."""
    quality, suggested = probabilities[np.arange(len(labels)), labels].astype(float), probabilities.argmax(axis=1)
    is_issue = (quality < 0.5) & (suggested != labels)
    return LabelQuality(quality, is_issue, suggested, is_issue.mean(), 0.125)


def histogram(truth: bool, epoch: int = 0) -> dict:
    """One network's, as `dividemix.run.histograms.count` makes it."""
    clean, wrong = [0] * 60, [0] * 60
    clean[3 + epoch % 40], wrong[50] = 8, 4
    bins = {"clean": clean, "wrong": wrong} if truth else {"all": [a + b for a, b in zip(clean, wrong, strict=True)]}
    mixture = {"means": [0.1, 0.8], "variances": [0.001, 0.04], "weights": [0.6, 0.4], "threshold": 0.5}
    return bins | mixture
