"""Our numbers beside the paper's: run folders -> one table of runs -> results.csv, RESULTS.md and the curves."""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from dividemix import recipes
from dividemix.files import write_atomically
from dividemix.report import figures, mean_and_deviation
from dividemix.reproduction.rows import DATA, TABLES, PlannedRun, Row, RunFiles, all_rows, read
from dividemix.run import logs

# key in metrics.jsonl or result.json -> name in tables
MEASURES = {"best": "best", "last": "last", "test_acc": "test", "test_acc_top5": "top-5"}
MEASURES |= {"imagenet_acc": "ILSVRC12", "imagenet_acc_top5": "ILSVRC12 top-5"}
LAST = 10  # epochs; "last" is their mean
COLUMNS = ["row", "table", "seed", "setting", "finished", *MEASURES, *(f"paper_{name}" for name in MEASURES)]
COLUMNS += ["epochs", "seconds", "commit", "torch", "python", "device", "run_folder"]
HEAD = "| row | paper: {0} | ours: {0} | difference | n | epochs | seconds a run | commit |"
HEAD += " differs from the row's setting |"
NOTE = """Test accuracy in per cent: best is the highest of all epochs, last is the mean of the last 10. Ours: mean ±
standard deviation over n seeds, all with the same noise; each seed draws its own subset of the images, if there is one.
With --ema, accuracies of both networks together are those of the averaged weights.
Cross-entropy beside the paper's is net 1 alone, as in the paper. Only finished runs are here; `results.csv` has all."""


def table_of_runs(rows: Sequence[Row], out_dir: Path) -> pd.DataFrame:
    """A line for each run of these rows in out_dir that has an epoch. setting: what differs from the row, or ''."""
    lines = []
    for row in rows:
        for folder in sorted(out_dir.glob(f"{row.run_name}_seed*")):
            seed, _, flags = folder.name.removeprefix(f"{row.run_name}_seed").partition("_")
            info, records, result = files = read(folder)
            if not (seed.isdecimal() and records):
                continue
            line = {"row": row.name, "table": row.table, "seed": int(seed), "setting": differences(row, info, flags)}
            line |= {"finished": bool(result) and len(records) >= info["args"]["num_epochs"]} | measures(row, files)
            line |= {f"paper_{name}": value for name, value in row.paper.items()} | {"epochs": len(records)}
            line["seconds"] = sum(v for record in records for k, v in record.items() if k.startswith("seconds_"))
            line["commit"] = " ".join(dict.fromkeys(str(start["commit"]) for start in info["starts"]))
            lines.append(line | info["versions"] | {"device": info["machine"], "run_folder": folder.name})
    return pd.DataFrame(lines, columns=COLUMNS).astype({"finished": bool})


def measures(row: Row, files: RunFiles) -> dict[str, float | None]:
    """The run's value of each of the row's numbers; None where it has none."""
    epochs = pd.DataFrame(map(logs.of_averages, files.records))
    values = epochs.loc[epochs["val_acc" if "val_acc" in epochs else "test_acc"].idxmax()].to_dict()
    if row.script == "Train_clothing1M.py":  # tested once, at the end, with each network's best epoch
        values |= files.result
    if "best" in row.paper:
        accuracy = epochs[row.column]
        # best_acc is the accuracy of the chosen epoch: with --val_fraction not the highest one.
        values["best"] = epochs["best_acc"].iloc[-1] if row.column == "test_acc" else accuracy.max()
        values["last"] = accuracy.tail(LAST).mean() if len(accuracy) >= LAST else None
    return {name: values.get(name) for name in row.paper}


def differences(row: Row, info: dict[str, Any], flags: str) -> str:
    """How a run differs from its row: the flags in the name of its folder, other flags of args.json, and data that are
    not the published ones. '' for a run that does not differ."""
    notes = [flags] if flags else []
    setting_differences = recipes.setting_differences(info["args"], row.setting, "row")
    notes += [note for note in setting_differences if f"_{note.split()[0][2:]}-" not in f"_{flags}"]
    if row.data in ("cifar10", "cifar100") and f"(official {row.data})" not in str(info["data"].get("lines")):
        notes.append(f"not the official {row.data}")
    return ", ".join(notes)


def hours_left(run: PlannedRun, table: pd.DataFrame) -> float | None:
    """From the seconds of an epoch in runs with the same data, method and flags after --; None without such runs."""
    names = ("method", "ablation", "augment")
    kinds = {row.name: (row.data, *map(row.setting.get, names)) for row in all_rows()}
    like = table[(table.row.map(kinds) == kinds[run.row.name]) & (table.setting == run.extra_name)]
    if like.empty:
        return None
    epochs_left = max(run.num_epochs - len(read(run.folder).records), 0)
    return epochs_left * like.seconds.sum() / like.epochs.sum() / 3600


def write(chosen: Sequence[Row], out_dir: Path) -> list[Path]:
    """Write results.csv, RESULTS.md and the curves: the chosen rows, and all others that have runs. -> the two files"""
    table = table_of_runs(all_rows(), out_dir)
    groups = dict(list(table.groupby("row")))
    rows = [row for row in all_rows() if row in chosen or row.name in groups]
    drawn = [row for row in rows if row.name in groups and row.name == row.run_name]
    panels: Any = {row.name: partial(draw, row=row, runs=groups[row.name], out_dir=out_dir) for row in drawn}
    curves = figures.write_panels(panels, out_dir / "curves")
    contents = {"results.csv": table.to_csv(index=False, float_format="%.4f")}
    contents["RESULTS.md"] = markdown(rows, table, curves)
    for name, content in contents.items():
        write_atomically(out_dir / name, content.encode())
    return [out_dir / name for name in contents]


def draw(axes: Any, row: Row, runs: pd.DataFrame, out_dir: Path) -> None:
    """Accuracy over the epochs, a colour for each setting, and the paper's numbers as lines."""
    for i, (setting, group) in enumerate(runs.groupby("setting")):
        label = setting[:40] or "the row's setting"
        for name in group.run_folder:
            epochs = pd.DataFrame(map(logs.of_averages, read(out_dir / name).records))
            y = epochs[row.column if row.column in epochs else "val_acc"]
            axes.plot(epochs["epoch"], y, color=f"C{i}", marker="." if len(y) < 30 else "", label=label)
            label = None
    # Clothing1M's curve is on its validation set, so the paper's test accuracy is not drawn.
    for name, value in row.paper.items() if row.column in epochs else ():
        if value is not None and name in ("best", "last", "test_acc"):
            axes.axhline(value, ls=":" if name == "last" else "--", color="#333333", label=f"paper, {MEASURES[name]}")
    figures.finish_axes(axes, row.name, "%")


def markdown(rows: Sequence[Row], table: pd.DataFrame, curves: Collection[str]) -> str:
    """A line for each row and setting. A row without runs shows its command. curves: rows that have a figure."""
    finished = table[table.finished]
    lines = ["# Results", "", NOTE, "", *(f"Made on: {device}." for device in sorted(finished.device.unique()))]
    for number, title in TABLES.items():
        if not (rows_here := [row for row in rows if row.table == number]):
            continue
        names = list(dict.fromkeys(name for row in rows_here for name in row.paper))
        numbers = " / ".join(MEASURES[name] for name in names)
        lines += ["", f"## {title}", "", HEAD.format(numbers), joined(["---"] * (HEAD.count("|") - 1))]
        for row in rows_here:
            runs, paper = finished[finished.row == row.name], paper_numbers(row, names)
            if not (runs.setting == "").any():
                begun = ((table.row == row.name) & (table.setting == "")).sum()
                needs = f": needs {DATA[row.data].title}" if DATA[row.data].folder else ""
                state = f"{begun} begun" if begun else f"not run{needs}"
                lines.append(joined([row.name, paper, f"{state}; `python reproduce.py --rows {row.name}`", *[""] * 6]))
            for setting, group in runs.groupby("setting"):
                lines.append(joined([row.name, paper, *cells(row, names, group), setting]))
        lines += [f"\n![{row.name}](curves/{row.name}.png)" for row in rows_here if row.name in curves]
    return "\n".join(lines) + "\n"


def paper_numbers(row: Row, names: Sequence[str]) -> str:
    return " / ".join("-" if row.paper.get(name) is None else str(row.paper[name]) for name in names)


def cells(row: Row, names: Sequence[str], group: pd.DataFrame) -> list[str]:
    """Finished runs of one row and setting: ours, difference, n, epochs, seconds of a run, commits."""
    ours = " / ".join(mean_and_deviation(group[name]) for name in names)
    distances = group[names].astype(float).mean(skipna=False) - pd.Series(row.paper, names, float)
    difference = " / ".join("-" if pd.isna(distance) else f"{distance:+.2f}" for distance in distances)
    commits = sorted({commit[:9] + "+" * ("+" in commit) for text in group.commit for commit in text.split()})
    epochs = ", ".join(map(str, sorted(group.epochs.unique())))
    return [ours, difference, str(len(group)), epochs, f"{group.seconds.mean():.0f}", ", ".join(commits)]


def joined(row: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
