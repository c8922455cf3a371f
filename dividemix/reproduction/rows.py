"""The rows of the paper's tables: the data that they need, their commands, and their run folders. Settings and the
paper's numbers come from `recipes`. Names: <dataset>-<mode>-<per cent>, then -ce (cross-entropy), -strong (strong
views, not in the paper) or the ablation."""

import fnmatch
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dividemix import DivideMixError, recipes
from dividemix.run import FREE_FLAGS
from dividemix.run.folder import load, parse_json_lines

ROOT = Path(__file__).resolve().parents[2]  # the folder of the scripts
TABLES = {
    "1": "Table 1: CIFAR-10 and CIFAR-100, symmetric noise",
    "2": "Table 2: CIFAR-10, 40 % asymmetric noise",
    "3": "Table 3: Clothing1M",
    "4": "Table 4: WebVision, and ILSVRC12 with the same networks",
    "5": "Table 5: ablations, CIFAR-10",
    "here": "Small sets, not in the paper",
}
FIRST_SEED = 123  # the scripts' default


@dataclass(frozen=True)
class DataSet:
    """A data set: in `folder` below --data_root, or in --data_root itself, where a pattern of `files` matches."""

    title: str
    folder: str = ""
    files: tuple[str, ...] = ()
    can_download: bool = False

    def find(self, data_root: Path) -> tuple[Path, str]:
        """Its folder, or where it should be; and what is missing, '' for nothing."""
        default = data_root / self.folder
        for folder in (default, data_root):
            if not self.files or any(any(folder.glob(pattern)) for pattern in self.files):
                return folder, ""
        return default, f"needs {self.title} in {default}"


_FASHION = ("FashionMNIST/raw/train-images-*", "raw/train-images-*", "train-images-*")
DATA = {
    "cifar10": DataSet("CIFAR-10", "cifar-10", ("cifar-10-batches-py/data_batch_*", "data_batch_*"), True),
    "cifar100": DataSet("CIFAR-100", "cifar-100", ("cifar-100-python/train", "train"), True),
    "fashionmnist": DataSet("Fashion-MNIST", "data", _FASHION, True),
    "digits": DataSet("scikit-learn's digits"),
    "clothing1M": DataSet("Clothing1M", "Clothing1M/data", ("noisy_train_key_list.txt",)),
    "webvision": DataSet("WebVision", "webvision", ("info/train_filelist_google.txt",)),
}


@dataclass(frozen=True)
class Row:
    """A row of a table. run_name: the row whose runs it reads. flags: of the script, without data, seed and folder.
    paper: its numbers, None where the paper has none. setting: flag -> value that a run should have. column: the
    accuracy in metrics.jsonl, of both networks or of net 1."""

    name: str
    run_name: str
    table: str
    script: str
    flags: dict[str, Any]
    data: str
    paper: dict[str, float | None]
    setting: dict[str, Any] = field(repr=False)
    column: str = "test_acc"


def small_images(row: recipes.Recipe, table: str, variant: str = "", flags: dict[str, Any] | None = None) -> Row:
    """A row of Train_cifar.py. variant: '', 'ce', 'strong' or an ablation. flags: more flags, of a small set."""
    method, ablation = "ce" if variant == "ce" else "dividemix", variant if variant in recipes.ABLATIONS else "none"
    defaults = {"dataset": "cifar10", "noise_mode": "sym", "r": None, "method": "dividemix", "ablation": "none"}
    values = dict(zip(defaults, (row.dataset, row.mode, row.r, method, ablation), strict=True)) | (flags or {})
    values |= {"augment": "strong"} if variant == "strong" else {}
    setting = recipes.setting(row, method) | values
    flags = {name: value for name, value in values.items() if name not in defaults or defaults[name] != value}
    results = {} if variant == "strong" else recipes.paper_results(row, method, ablation)
    paper = {name: results.get(name) for name in (("best",) if ablation != "none" else ("best", "last"))}
    # The paper's cross-entropy is one network. Without a number to compare with, it is both, like DivideMix.
    column = "test_acc_net1" if method == "ce" and row.ce_best is not None else "test_acc"
    name = "-".join(filter(None, (row.dataset, row.mode, f"{round(100 * row.r)}", variant)))
    return Row(name, name, table, "Train_cifar.py", flags, row.dataset, paper, setting, column)


def all_rows() -> list[Row]:
    """The rows of Tables 1 to 5, with cross-entropy and strong views beside those of Tables 1 and 2, and of the small
    sets."""
    tables, variants = {"sym": "1", "asym": "2"}, ("ce", "", "strong")
    rows = [small_images(row, tables[row.mode], variant) for row in recipes.ROWS for variant in variants]
    for table, data, recipe in (("3", "clothing1M", recipes.CLOTHING1M), ("4", "webvision", recipes.WEBVISION)):
        name, paper = data.lower(), dict(recipe.results)
        rows.append(Row(name, name, table, f"Train_{data}.py", recipe.results_with, data, paper, recipe.setting))
    for row in (row for row in recipes.ROWS if row.dataset == "cifar10"):
        # Net 1 tested alone reads DivideMix's runs. We have no source for the paper's numbers.
        base = small_images(row, "5")
        rows.append(replace(base, name=f"{base.name}-one_net", paper={"best": None}, column="test_acc_net1"))
        rows += [small_images(row, "5", ablation) for ablation in recipes.ABLATIONS if ablation != "none"]
    for dataset, (flags, noises) in recipes.SMALL_SETS.items():
        for mode, r in noises:
            noise: dict[str, Any] = {"dataset": dataset, "mode": mode, "r": r}
            row = replace(recipes.nearest(**noise)[0], **noise, best=None, last=None, ce_best=None)
            rows += [small_images(row, "here", variant, flags) for variant in variants]
    return sorted(rows, key=lambda row: list(TABLES).index(row.table))


def select(tables: Sequence[str], patterns: Sequence[str]) -> list[Row]:
    """The rows of these tables ('all': every table), and rows whose names match a pattern. Raises DivideMixError for a
    pattern that matches no row."""
    rows = all_rows()
    matches = {pattern: fnmatch.filter([row.name for row in rows], pattern) for pattern in patterns}
    if missed := [pattern for pattern in patterns if not matches[pattern]]:
        raise DivideMixError(f"--rows {missed[0]}: no row has such a name; --list shows them")
    names = set().union(*matches.values())
    return [row for row in rows if row.name in names or row.table in tables or "all" in tables]


@dataclass(frozen=True)
class PlannedRun:
    """One run. missing: why it cannot be started, or ''. extra_name: made of the flags after --, or ''."""

    row: Row
    folder: Path
    command: tuple[str, ...]
    num_epochs: int
    missing: str = ""
    extra_name: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        files = read(self.folder)
        return bool(files.result) and len(files.records) >= self.num_epochs


def plan(rows: Sequence[Row], seeds: int, data_root: Path, out_dir: Path, extra: Sequence[str]) -> list[PlannedRun]:
    """The runs, in the order of the rows, no folder twice. extra: more flags for the scripts; those that change what is
    computed are part of the folders' names. Raises DivideMixError for flags that reproduce.py itself sets."""
    flags = grouped(extra)
    for name in flags.keys() & {"seed", "run_dir", "out_dir", "data_path", "fresh"}:
        raise DivideMixError(f"--{name} after --: use --seeds, --out_dir and --data_root of reproduce.py instead")
    extra_name = folder_name(flags)
    runs: dict[Path, PlannedRun] = {}
    for row in rows:
        data = DATA[row.data]
        data_path, missing = data.find(data_root)
        missing = "" if data.can_download and "download" in flags else missing
        epochs = int(flags.get("num_epochs", row.setting["num_epochs"]))
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            folder = out_dir / f"{row.run_name}_seed{seed}{extra_name and '_' + extra_name}"
            run_flags = ({"data_path": data_path} if data.folder else {}) | row.flags
            if seed != FIRST_SEED:  # all seeds have the same noise
                run_flags |= {"seed": seed} | ({"noise_seed": FIRST_SEED} if row.script == "Train_cifar.py" else {})
            words = [word for name, value in run_flags.items() for word in (f"--{name}", f"{value}")]
            command = (sys.executable, str(ROOT / row.script), *words, *extra, "--run_dir", str(folder))
            runs.setdefault(folder, PlannedRun(row, folder, command, epochs, missing, extra_name))
    return list(runs.values())


def grouped(extra: Sequence[str]) -> dict[str, str]:
    """['--lr', '0.1', '--no_graph'] -> {'lr': '0.1', 'no_graph': ''}. Raises DivideMixError for words that belong to no
    flag, and for a --num_epochs that is no number."""
    first, *flag_texts = " ".join(["", *extra]).split(" --")
    if first:
        raise DivideMixError(f"{extra[0]}: expected flags of the training scripts after --, like -- --num_epochs 20")
    pairs = [re.split(r"[ =]", text, maxsplit=1) for text in flag_texts]
    flags = {pair[0]: pair[1] if len(pair) > 1 else "" for pair in pairs}
    if not flags.get("num_epochs", "1").isdecimal():
        raise DivideMixError(f"--num_epochs {flags['num_epochs']}: expected a whole number")
    return flags


def folder_name(flags: dict[str, str]) -> str:
    """'' or 'num_epochs-20_width-16'. Flags that a run may change when it continues are left out, except the three that
    make it another experiment: the number of epochs and those for the data."""
    free = FREE_FLAGS - {"num_epochs", "noise_file", "skip_bad_images"}
    words = sorted(f"{name}-{value}".removesuffix("-") for name, value in flags.items() if name not in free)
    return re.sub(r"[^\w.+-]", "-", "_".join(words))


class RunFiles(NamedTuple):
    """What a run folder holds: args.json, metrics.jsonl (a record an epoch), result.json ({} before the end)."""

    info: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any]


def read(folder: Path) -> RunFiles:
    """Of a file that does not exist: empty. Raises DivideMixError for a damaged one."""
    args_json, result = (load(folder / name, json.loads, {}) for name in ("args.json", "result.json"))
    return RunFiles(args_json, load(folder / "metrics.jsonl", parse_json_lines, []), result)
