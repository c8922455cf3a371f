"""The rows of the paper's tables as experiments: which script with which flags makes a row, from what data, and what
the paper reports. All of it comes from `recipes`; here is only how it is put together.

Names: <dataset>-<mode>-<per cent>, then -ce (cross-entropy), or the ablation.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dividemix import DivideMixError, recipes

TABLES = {
    "1": "Table 1: CIFAR-10 and CIFAR-100, symmetric noise",
    "2": "Table 2: CIFAR-10, 40 % asymmetric noise",
    "3": "Table 3: Clothing1M",
    "4": "Table 4: WebVision, and ILSVRC12 with the same networks",
    "5": "Table 5: parts of the method left out, CIFAR-10 (the paper's numbers are from memory)",
    "here": "Small sets, which the paper lacks",
}
SMOKE = "smoke"  # the rows of --smoke, which are no results and in no list
FIRST_SEED = 123  # the scripts' default
MEASURES = {  # name of a number -> its name in tables
    **{"best": "best", "last": "last", "test_acc": "test", "test_acc_top5": "top-5"},
    **{"imagenet_acc": "ILSVRC12", "imagenet_acc_top5": "ILSVRC12 top-5"},
}


@dataclass(frozen=True)
class DataSet:
    """Where a set is looked for: in `folder` below --data_root, then in --data_root itself. needs: what has to be
    there, of each a choice of patterns of which one must match."""

    title: str
    folder: str = ""
    needs: tuple[tuple[str, ...], ...] = ()
    can_download: bool = False

    def place(self, data_root: Path) -> Path | None:
        """The first folder that has all, None where none has."""
        for folder in (data_root / self.folder, data_root):
            if all(any(any(folder.glob(pattern)) for pattern in patterns) for patterns in self.needs):
                return folder
        return None

    def missing(self, data_root: Path, download: bool = False) -> str:
        """What a row that has no data says, '' where nothing is missing."""
        if self.place(data_root) or (download and self.can_download):
            return ""
        return f"needs {self.title} in {data_root / self.folder}"


_FASHION = "train-images-idx3-ubyte*"
DATA = {
    "cifar10": DataSet("CIFAR-10", "cifar-10", (("cifar-10-batches-py/data_batch_*", "data_batch_*"),), True),
    "cifar100": DataSet("CIFAR-100", "cifar-100", (("cifar-100-python/train", "train"),), True),
    "fashionmnist": DataSet(
        "Fashion-MNIST", "data", ((f"FashionMNIST/raw/{_FASHION}", f"raw/{_FASHION}", _FASHION),), True
    ),
    "digits": DataSet("scikit-learn's digits"),
    "clothing1M": DataSet("Clothing1M", "Clothing1M/data", (("noisy_train_key_list.txt",),)),
    "webvision": DataSet(
        "WebVision", "webvision", (("info/train_filelist_google.txt",), ("val_images_256",), ("imagenet/val",))
    ),
}


@dataclass(frozen=True)
class Experiment:
    """A row. flags: what its runs have beside data, seed and folder. paper: the numbers that the row is about, None
    where the paper does not report one. setting: flag -> value of everything that a run should have. column: the
    accuracy of an epoch that is read, both networks' or net 1's. run: the row whose runs are read, where it has none of
    its own."""

    name: str
    table: str
    script: str
    flags: tuple[str, ...]
    data: str
    paper: dict[str, float | None]
    setting: dict[str, Any] = field(repr=False)
    column: str = "test_acc"
    run: str = ""

    @property
    def run_name(self) -> str:
        return self.run or self.name

    @property
    def num_epochs(self) -> int:
        return self.setting["num_epochs"]

    def setting_differences(self, args: dict[str, Any]) -> list[str]:
        """The flags of a run, as args.json has them, that are not the row's."""
        return recipes.setting_differences(args, self.setting, "row")


def to_flags(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(word for name, value in values.items() for word in (f"--{name}", str(value)))


# ---------------------------------------------------------------------------------------------------------------------
# The rows


def small_images(row: recipes.Recipe, table: str, variant: str = "", own: dict[str, Any] | None = None) -> Experiment:
    """A row of Train_cifar.py. variant: '', 'ce' or an ablation; own: flags that are not the paper's, of a set that the
    paper lacks."""
    name = f"{row.dataset}-{row.mode}-{round(100 * row.r)}"
    flags: dict[str, Any] = {} if row.dataset == "cifar10" else {"dataset": row.dataset}
    flags |= {} if row.mode == "sym" else {"noise_mode": row.mode}
    flags |= {"r": f"{row.r:g}", **(own or {})}
    paper: dict[str, float | None] = {"best": row.best, "last": row.last}
    setting = recipes.setting(row, "ce" if variant == "ce" else "dividemix") | (own or {})
    setting |= {"dataset": row.dataset, "noise_mode": row.mode, "r": row.r}
    setting |= {"method": "ce" if variant == "ce" else "dividemix", "ablation": "none"}
    if variant == "ce":
        flags["method"], paper = "ce", {"best": row.ce_best, "last": None}
    elif variant:
        flags["ablation"] = setting["ablation"] = variant
        paper = {"best": recipes.ABLATIONS[variant].paper_best(row)} if row.best else {"best": None, "last": None}
    # The paper's cross-entropy is one network; where there is nothing to compare with, it is both, as for DivideMix.
    column = "test_acc_net1" if variant == "ce" and row.ce_best is not None else "test_acc"
    named = f"{name}-{variant}" if variant else name
    return Experiment(named, table, "Train_cifar.py", to_flags(flags), row.dataset, paper, setting, column)


def one_net_test(row: recipes.Recipe) -> Experiment:
    """Table 5's test with net 1 alone: another reading of the row's own runs."""
    base = small_images(row, "5")
    paper = {"best": recipes.ONE_NET_TEST.paper_best(row)}
    shared = base.script, base.flags, base.data, paper, base.setting
    return Experiment(f"{base.name}-one_net", "5", *shared, "test_acc_net1", base.name)


def large_images(recipe: recipes.ImageRecipe, name: str, table: str, data: str, script: str) -> Experiment:
    flags = to_flags(recipe.results_with)
    return Experiment(name, table, script, flags, data, dict(recipe.results), recipe.setting)


def paper_rows() -> list[Experiment]:
    """All rows of Tables 1 to 5, each of Tables 1 and 2 with its cross-entropy."""
    rows = []
    for row in recipes.ROWS:
        table = "1" if row.mode == "sym" else "2"
        rows += [small_images(row, table, "ce"), small_images(row, table)]
    rows.append(large_images(recipes.CLOTHING1M, "clothing1m", "3", "clothing1M", "Train_clothing1M.py"))
    rows.append(large_images(recipes.WEBVISION, "webvision", "4", "webvision", "Train_webvision.py"))
    for row in (row for row in recipes.ROWS if row.dataset == "cifar10"):
        rows.append(one_net_test(row))
        rows += [small_images(row, "5", ablation) for ablation in recipes.ABLATIONS if ablation != "none"]
    return sorted(rows, key=lambda each: list(TABLES).index(each.table))


def small_rows() -> list[Experiment]:
    """The rows that run on a small machine: DivideMix and cross-entropy with the paper's values for the noise."""
    rows = []
    for dataset, flags in recipes.SMALL_SETS.items():
        for noise in recipes.SMALL_NOISE[dataset]:
            rows += [small_images(borrowed(dataset, *noise), "here", variant, flags) for variant in ("ce", "")]
    return rows


def borrowed(dataset: str, mode: str, r: float) -> recipes.Recipe:
    """The row that a set which the paper lacks is trained by, without its results."""
    row, _ = recipes.nearest(dataset, mode, r)
    values = {name: getattr(row, name) for name in ("lambda_u", "p_threshold", "loss_window")}
    return recipes.Recipe(dataset, mode, r, **values)


def smoke_rows() -> list[Experiment]:
    """The machinery in miniature: DivideMix, cross-entropy, an ablation, and a row whose runs fail."""
    row = borrowed("digits", "sym", 0.5)
    rows = [small_images(row, SMOKE, variant, recipes.SMOKE) for variant in ("", "ce", "no_refinement")]
    rows = [replace(row, name=f"smoke-{row.name}") for row in rows]
    broken = replace(rows[0], name=f"{rows[0].name}-fails", flags=(*rows[0].flags, "--init_from", "no-such-file.pt"))
    return [rows[0], broken, *rows[1:]]


def every_row() -> list[Experiment]:
    return paper_rows() + small_rows()


def select(rows: Sequence[Experiment], tables: Sequence[str], patterns: Sequence[str]) -> list[Experiment]:
    """The rows of these tables ('all': of all) and those whose names match a pattern. Raises DivideMixError for a
    pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter([row.name for row in rows], pattern):
            raise DivideMixError(f"--rows {pattern}: no row has such a name; --list shows them")
    return [
        row
        for row in rows
        if row.table in tables or "all" in tables or any(fnmatch.fnmatchcase(row.name, p) for p in patterns)
    ]
