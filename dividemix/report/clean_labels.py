"""A corrected copy of a run's labels, in the format of its data set. The original files are neither changed nor read.
Samples without a score (damaged images) keep their given labels.

    dividemix report RUN --export_clean DIR
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.files import csv_bytes, write_atomically
from dividemix.report.issues import LabelIssues, cleaned_table, texts
from dividemix.run import RunFolder, options

# Flags that corrected labels make invalid, or that would put the next run into the folder of this one
_REPLACED = {"--labels", "--corrections", "--noise_mode", "--r", "--noise_definition", "--noise_key", "--noise_file"}
_REPLACED |= {"--noise_seed", "--run_dir", "--fresh", "--id"}


def export(run: RunFolder, issues: LabelIssues, folder: Path) -> list[str]:
    """Write the corrected labels into `folder`, which is new or empty. -> lines for the terminal: the files, and how to
    train on them. Raises DivideMixError for a folder that is not empty or that is in the data folder."""
    check_is_new(run, folder)
    labels = run.labels["list_given"].copy()
    labels[issues.index] = issues.cleaned_labels
    name, content = corrected_list(run, labels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
        write_atomically(folder / "cleaned_labels.csv", csv_bytes(cleaned_table(issues)))
    except OSError as error:
        problem = f"cannot be written ({error.strerror}); choose another folder"
        raise DivideMixError(f"--export_clean {folder}: {problem}") from error
    n_changed, n_unscored = int(issues.is_issue.sum()), len(labels) - len(issues)
    unscored = f"; {n_unscored} without a score, unchanged" if n_unscored else ""
    return [
        f"corrected labels: {folder / name} ({n_changed} of {len(labels)} changed{unscored}), and "
        f"{folder / 'cleaned_labels.csv'}",
        "WARNING: DO NOT TRAIN ON THESE LABELS: THE LIST MEANS NOTHING, as said above"
        if issues.failures
        else f"  to train on them: {next_step(run, issues, folder / name)}",
    ]


def check_is_new(run: RunFolder, folder: Path) -> None:
    """Raises DivideMixError where writing into `folder` could change a file that exists."""
    advice = "choose a new folder, the original labels are never changed"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DivideMixError(f"--export_clean {folder}: exists and is not empty: {advice}")
    data = run.data_folder
    if data and folder.resolve().is_relative_to(data):
        raise DivideMixError(f"--export_clean {folder}: is in the data folder {data}: {advice}")


def corrected_list(run: RunFolder, labels: NDArray) -> tuple[str, bytes]:
    """Name and content of the file with the labels (M,) of all samples, in the format that the run's script reads."""
    if run.script == "Train_cifar.py":  # for --noise_file
        return "cleaned_labels.json", json.dumps(labels.tolist()).encode()
    paths = run.labels["list_path"].tolist()
    if run.script == "Train_folder.py":
        names = np.array(run.class_names, dtype=object)
        columns = [run.args.get(f"{name}_column") or name for name in ("path", "label")]  # the next run has these flags
        rows = zip(texts(map(os.fsdecode, paths)), texts(names[labels]), strict=True)
        table = pd.DataFrame(rows, columns=columns)
        return "labels.csv", csv_bytes(table, errors="surrogateescape")
    name = "train_filelist_google.txt"
    if run.script == "Train_clothing1M.py":  # its keys begin with images/, also where no such folder exists
        name, paths = "noisy_label_kv.txt", [b"images/" + path.removeprefix(b"images/") for path in paths]
    return name, b"".join(b"%s %d\n" % line for line in zip(paths, labels.tolist(), strict=True))


def next_step(run: RunFolder, issues: LabelIssues, file: Path) -> str:
    """How to train on the corrected labels: a command, or what to do with the file."""
    name = re.sub(r"[^\w.-]", "-", file.parent.name)
    if run.script == "Train_cifar.py":
        if issues.true_labels is None:
            line = command(run, name, "--noise_file", file)
            return f"{line}, and --r, the share of the labels that you think are still wrong"
        noise = "--noise_mode", "sym", "--r", f"{remaining_noise_rate(run, issues):g}"
        return command(run, name, *noise, "--noise_file", file)
    if run.script == "Train_folder.py":
        if not run.data_folder.is_dir():  # data in memory, or moved
            return f"give them to find_label_issues as labels=, or, where {run.data_folder} is now, as --labels {file}"
        return command(run, name, "--labels", file)
    return f"let it replace {file.name} in a copy of the data folder"


def remaining_noise_rate(run: RunFolder, issues: LabelIssues) -> float:
    """--r of the corrected labels: a noise file of another rate is refused."""
    before = float(np.mean(issues.given_labels != issues.true_labels))
    after = float(np.mean(issues.cleaned_labels != issues.true_labels))
    n_scored, n = len(issues), len(run.labels["list_given"])
    wrong, num_class = (n_scored * after + (n - n_scored) * before) / n, len(issues.class_names)
    return min(1.0, round(wrong * num_class / (num_class - 1), 2))


def command(run: RunFolder, name: str, *flags: str | Path) -> str:
    """The run's command with these flags in place of those of its labels and folder, quoted for a shell. name: what the
    new run's folder has behind the old one's, or ''."""
    words: list[list[str]] = []  # each flag with its values
    for word in started_by(run):
        if word.startswith("--") or not words:
            words.append([])
        words[-1].append(word)
    kept = [word for flag in words if flag[0].partition("=")[0] not in _REPLACED for word in flag]
    folder = run.args.get("run_dir")
    place = ["--id", name] if name else []
    if folder:
        place = ["--run_dir", f"{os.path.normpath(folder)}-{name or 'corrected'}"]
    return shlex.join(map(str, [*kept, *place, *flags]))


def started_by(run: RunFolder) -> list[str]:
    """The run's command, as a script or by `dividemix`, as this process was started."""
    started, flags = Path(sys.argv[0]), run.args_json["command"][1:]
    if started.name.startswith("Train_"):
        return ["python", str(started.with_name(run.script)), *flags]
    program = options.interface().split()
    if run.args_json.get("program", "").endswith(" issues"):
        flags = flags[len(options.HOLD_NOTHING_OUT) :]
        return [*program, "issues", *flags[flags[0] == "--data_path" :]]
    return [*program, "train", run.script[len("Train_") : -3].lower(), *flags]
