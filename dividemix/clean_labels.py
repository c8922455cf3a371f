"""A corrected copy of a run's labels, in the format of its data set. The originals are not written, nor even read.

    python -m dividemix.report RUN --export_clean DIR

    Train_cifar.py        cleaned_labels.json              for --noise_file: a JSON list of the labels of all samples
    Train_clothing1M.py   noisy_label_kv.txt               a line: images/0/00/name.jpg 3
    Train_webvision.py    train_filelist_google.txt        a line: google/q0001/images000001/name.jpg 0
    Train_folder.py       labels.csv                       path,label; a class by its name

Samples that were not scored (held out, or left out as damaged) keep the labels that they were given.
"""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.checkpoint import csv_bytes, write_atomically
from dividemix.label_issues import LabelIssues, cleaned_table, texts
from dividemix.runfolder import RunFolder


def export(run: RunFolder, issues: LabelIssues, folder: Path) -> list[str]:
    """Write the corrected labels into `folder`, which is new or empty. -> lines that say what was written and how to
    use it. Raises DivideMixError for a folder that holds something, or is in the data folder."""
    labels = run.labels["list_given"].copy()
    labels[issues.index] = issues.cleaned
    name, form, use = FORMATS.get(
        run.script, FORMATS["Train_folder.py" if "list_path" in run.labels else "Train_cifar.py"]
    )
    content = form(run, labels)
    refuse_originals(run, folder)
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
        f"  {use(run, issues, folder / name)}",
    ]


def refuse_originals(run: RunFolder, folder: Path) -> None:
    """Raises DivideMixError where writing into `folder` could touch what was there before."""
    how = "name a new folder, the originals are never touched"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DivideMixError(f"--export_clean {folder}: is there and not empty: {how}")
    if not run.args.get("data_path"):
        return
    data = Path(str(run.args["data_path"])).expanduser().resolve()
    data = data.parent if data.is_file() else data  # of own images it may be a list, which lies beside them
    if folder.resolve().is_relative_to(data):
        raise DivideMixError(f"--export_clean {folder}: is in the data folder {data}: {how}")


# ---------------------------------------------------------------------------------------------------------------------
# Formats: (run, labels of the whole list (M,)) -> a file


def as_json(run: RunFolder, labels: NDArray) -> bytes:
    return json.dumps(labels.tolist()).encode()


def as_key_values(run: RunFolder, labels: NDArray) -> bytes:
    """Clothing1M's lines, whose keys begin with images/ wherever the images are."""
    keys = (b"images/" + path.removeprefix(b"images/") for path in run.labels["list_path"].tolist())
    return lines_of(keys, labels)


def as_file_list(run: RunFolder, labels: NDArray) -> bytes:
    return lines_of(run.labels["list_path"].tolist(), labels)


def lines_of(paths, labels: NDArray) -> bytes:
    return b"".join(b"%s %d\n" % pair for pair in zip(paths, labels.tolist(), strict=True))


def as_csv(run: RunFolder, labels: NDArray) -> bytes:
    import pandas

    names = run.class_names
    classes = (names[label] if label < len(names) else str(label) for label in labels.tolist())
    columns = {"path": texts(map(os.fsdecode, run.labels["list_path"].tolist())), "label": texts(classes)}
    return csv_bytes(pandas.DataFrame(columns), errors="surrogateescape")


# ---------------------------------------------------------------------------------------------------------------------
# How to train on it


def use_json(run: RunFolder, issues: LabelIssues, file: Path) -> str:
    """--r must say how much noise is left: a noise file of another rate is refused."""
    if issues.true is None:
        used = command("Train_cifar.py", run, "--noise_file", file)
        return f"train on it: {used}, with --r as the part that you think is wrong still"
    before, after = (float(np.mean(labels != issues.true)) for labels in (issues.given, issues.cleaned))
    n, whole = len(issues), len(run.labels["list_given"])
    changed = (n * after + (whole - n) * before) / whole
    rate = min(1.0, round(changed * issues.num_class / (issues.num_class - 1), 2))
    flags = "--noise_mode", "sym", "--r", f"{rate:g}", "--noise_file", file
    return f"train on it: {command('Train_cifar.py', run, *flags)}"


def use_list(run: RunFolder, issues: LabelIssues, file: Path) -> str:
    return f"train on it: put {file.name} in the place of the file of this name in a copy of the data folder"


def use_csv(run: RunFolder, issues: LabelIssues, file: Path) -> str:
    return f"train on it: {command('Train_folder.py', run, '--labels', file)}"


def command(script: str, run: RunFolder, *flags: str | Path) -> str:
    """As a shell takes it: the script on the run's data, with other flags."""
    dataset = run.args.get("dataset")
    data = {"--dataset": dataset, "--data_path": None if dataset == "digits" else run.args.get("data_path")}
    words = [str(word) for name, value in data.items() if value is not None for word in (name, value)]
    return shlex.join(["python", script, *words, *map(str, flags)])


Use = Callable[[RunFolder, LabelIssues, Path], str]
FORMATS: dict[str, tuple[str, Callable[[RunFolder, NDArray], bytes], Use]] = {
    "Train_cifar.py": ("cleaned_labels.json", as_json, use_json),
    "Train_clothing1M.py": ("noisy_label_kv.txt", as_key_values, use_list),
    "Train_webvision.py": ("train_filelist_google.txt", as_file_list, use_list),
    "Train_folder.py": ("labels.csv", as_csv, use_csv),
}
