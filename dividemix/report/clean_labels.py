"""A corrected copy of a run's labels, in the format of its data set (see `corrected_list`). The originals are not
written, nor even read. Samples that were not scored (held out, or left out as damaged) keep the labels that they were
given.

    python -m dividemix report RUN --export_clean DIR
"""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.files import csv_bytes, write_atomically
from dividemix.report.issues import LabelIssues, cleaned_table, texts
from dividemix.run import RunFolder


def export(run: RunFolder, issues: LabelIssues, folder: Path) -> list[str]:
    """Write the corrected labels into `folder`, which is new or empty. -> lines that say what was written and how to
    use it. Raises DivideMixError for a folder that holds something, or is in the data folder."""
    refuse_originals(run, folder)
    labels = run.labels["list_given"].copy()
    labels[issues.index] = issues.cleaned
    name, content = corrected_list(run, labels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
        write_atomically(folder / "cleaned_labels.csv", csv_bytes(cleaned_table(issues)))
    except OSError as error:
        raise DivideMixError(
            f"--export_clean {folder}: cannot be written ({error.strerror}); name another folder"
        ) from error
    changed, kept = int(issues.is_issue.sum()), len(labels) - len(issues)
    unscored = f", {kept} were not scored and keep theirs" if kept else ""
    return [
        f"corrected labels: {folder / name} ({changed} of {len(labels)} changed{unscored}), and "
        f"{folder / 'cleaned_labels.csv'}",
        f"  train on it, with the flags of this run: {use(run, issues, folder / name)}",
    ]


def refuse_originals(run: RunFolder, folder: Path) -> None:
    """Raises DivideMixError where writing into `folder` could touch what was there before."""
    advice = "name a new folder, the originals are never touched"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DivideMixError(f"--export_clean {folder}: is there and not empty: {advice}")
    if data_path := run.args.get("data_path"):
        data = Path(data_path).expanduser().resolve()
        data = data.parent if data.is_file() else data  # of own images it may be a list, which lies beside them
        if folder.resolve().is_relative_to(data):
            raise DivideMixError(f"--export_clean {folder}: is in the data folder {data}: {advice}")


def corrected_list(run: RunFolder, labels: NDArray) -> tuple[str, bytes]:
    """Name and content of the file that has the labels (M,) of the whole list, as the run's script reads it."""
    if run.script == "Train_cifar.py":  # for --noise_file
        return "cleaned_labels.json", json.dumps(labels.tolist()).encode()
    paths = run.labels["list_path"].tolist()
    if run.script == "Train_folder.py":
        names = np.array(run.class_names, dtype=object)
        table = pd.DataFrame({"path": texts(map(os.fsdecode, paths)), "label": texts(names[labels])})
        return "labels.csv", csv_bytes(table, errors="surrogateescape")
    name = "train_filelist_google.txt"
    if run.script == "Train_clothing1M.py":  # whose keys begin with images/ wherever the images are
        name, paths = "noisy_label_kv.txt", [b"images/" + path.removeprefix(b"images/") for path in paths]
    return name, b"".join(b"%s %d\n" % line for line in zip(paths, labels.tolist(), strict=True))


def use(run: RunFolder, issues: LabelIssues, file: Path) -> str:
    """How to train on the corrected list."""
    if run.script == "Train_cifar.py":
        flags = "--noise_file", file
        if issues.true is None:
            return f"{command(run, *flags)}, with --r as the part that you think is wrong still"
        return command(run, "--noise_mode", "sym", "--r", f"{rate_left(run, issues):g}", *flags)
    if run.script == "Train_folder.py":
        return command(run, "--labels", file)
    return f"put {file.name} in the place of the file of this name in a copy of the data folder"


def rate_left(run: RunFolder, issues: LabelIssues) -> float:
    """What --r says of the corrected labels: a noise file of another rate is refused."""
    before, after = (float(np.mean(labels != issues.true)) for labels in (issues.given, issues.cleaned))
    n, whole = len(issues), len(run.labels["list_given"])
    wrong, classes = (n * after + (whole - n) * before) / whole, len(issues.class_names)
    return min(1.0, round(wrong * classes / (classes - 1), 2))


def command(run: RunFolder, *flags: str | Path) -> str:
    """As a shell takes it: the script on the run's data, with other flags."""
    dataset = run.args.get("dataset")
    data = {"--dataset": dataset, "--data_path": None if dataset == "digits" else run.args.get("data_path")}
    words = [word for name, value in data.items() if value is not None for word in (name, value)]
    return shlex.join(map(str, ["python", run.script, *words, *flags]))
