"""The rows of the paper's tables: made from recipes, each a command that its script takes; and their runs' folders."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import Train_cifar
import Train_clothing1M
import Train_webvision
from dividemix import DivideMixError, recipes
from dividemix.reproduction import rows
from dividemix.reproduction.rows import DATA, select
from dividemix.run import defaults

SCRIPTS = {script.__name__ + ".py": script for script in (Train_cifar, Train_clothing1M, Train_webvision)}
ROWS = {row.name: row for row in rows.all_rows()}


def plan(names: str, seeds: int = 1, extra: str = "", out: Path = Path("out")) -> list[rows.PlannedRun]:
    return rows.plan(select([], names.split()), seeds, Path("data"), out, extra.split())


def test_the_rows_and_numbers_of_the_papers_tables():
    """A missing row is one that nobody can check us on; a wrong number is another row's, or one without a source."""
    by_table = {table: [row.name for row in rows.all_rows() if row.table == table] for table in rows.TABLES}
    assert sum(map(len, by_table.values())) == len(ROWS)
    assert len(by_table["1"]) == 24 and "cifar100-sym-90" in by_table["1"]
    assert by_table["2"] == ["cifar10-asym-40-ce", "cifar10-asym-40", "cifar10-asym-40-strong"]
    assert (by_table["3"], by_table["4"]) == (["clothing1m"], ["webvision"])
    assert len(by_table["5"]) == 5 * 5 and "cifar10-sym-20-one_view" in by_table["5"]
    assert {"digits-sym-80-ce", "digits-sym-80-strong", "fashionmnist-sym-50"} < {*by_table["here"]}
    assert ROWS["cifar10-sym-80"].paper == {"best": 93.2, "last": 92.9}
    assert ROWS["cifar100-sym-50-ce"].paper == {"best": 46.7, "last": None}
    assert {*ROWS["cifar10-sym-80-strong"].paper.values()} == {None}  # the paper has no such row
    table5 = {name: row.paper["best"] for name, row in ROWS.items() if row.table == "5" and row.paper["best"]}
    assert table5 == {"cifar10-sym-20-divide_mixmatch": 94.1, "cifar10-asym-40-divide_mixmatch": 86.5}
    one_net = ROWS["cifar10-sym-50-one_net"]
    assert (one_net.run_name, one_net.column) == ("cifar10-sym-50", "test_acc_net1")
    assert ROWS["clothing1m"].paper == {"test_acc": 74.76} and len(ROWS["webvision"].paper) == 4
    assert {*ROWS["digits-sym-50"].paper.values()} == {None}


@pytest.mark.parametrize("name", ROWS)
def test_each_row_is_a_command_of_its_script_and_the_papers_setting(name):
    """The run would end at once, or train something else and be called the paper's."""
    row = ROWS[name]
    [run] = plan(row.run_name)
    args = SCRIPTS[row.script].parse_args(run.command[2:])
    if row.script == "Train_cifar.py":
        defaults.resolve_recipe(args)
        assert all(getattr(args, flag) == row.setting[flag] for flag in ("dataset", "noise_mode", "r", "num_epochs"))
        variant = name.rsplit("-", 1)[1]
        assert args.method == ("ce" if variant == "ce" else "dividemix")
        assert args.augment == ("strong" if variant == "strong" else "weak")
        assert args.ablation == (variant if variant in recipes.ABLATIONS else "none")
    else:
        defaults.resolve_images(args, SCRIPTS[row.script].PAPER)
    assert recipes.setting_differences(vars(args), row.setting) == []


def test_rows_are_chosen_by_table_and_pattern():
    """Somebody starts 48 runs of 300 epochs for a typing error, or none."""
    assert [row.name for row in select([], ["cifar10-sym-50", "*webv*"])] == ["cifar10-sym-50", "webvision"]
    assert len(select(["2", "3"], ["cifar10-asym-40"])) == 4
    assert select(["all"], []) == rows.all_rows()
    with pytest.raises(DivideMixError, match="--rows cifar11"):
        select(["1"], ["cifar11"])


@pytest.mark.parametrize(
    ("data", "file"),
    [
        ("cifar10", "cifar-10/cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python/train"),  # torchvision's layout, all sets side by side
        ("fashionmnist", "data/FashionMNIST/raw/train-images-idx3-ubyte.gz"),
        ("webvision", "webvision/info/train_filelist_google.txt"),
    ],
)
def test_missing_data_are_seen_before_anything_starts(tmp_path, data, file):
    """A night's queue ends in 18 errors of which the first told all."""
    assert DATA[data].find(tmp_path)[1].startswith(f"needs {DATA[data].title} in {tmp_path}")
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert DATA[data].find(tmp_path)[1] == ""


def test_a_run_is_its_scripts_command_and_seeds_share_the_noise():
    """What is copied from --dry_run would be another run; the spread over seeds would be that of the noise, too."""
    [run] = plan("cifar10-sym-50")
    flags = ("--data_path", "data/cifar-10", "--r", "0.5", "--run_dir", "out/cifar10-sym-50_seed123")
    assert run.command == (sys.executable, str(rows.ROOT / "Train_cifar.py"), *flags) and run.num_epochs == 300
    first, second = plan("digits-sym-50", seeds=2)
    assert not {"--data_path", "--seed"} & {*first.command} and second.folder == Path("out/digits-sym-50_seed124")
    args = Train_cifar.parse_args(second.command[2:])
    assert (args.seed, args.noise_seed) == (124, Train_cifar.parse_args(first.command[2:]).noise_seed)
    _, second = plan("clothing1m", seeds=2)
    assert second.command[2:6] == ("--data_path", "data/Clothing1M/data", "--seed", "124")


def test_runs_have_a_folder_each():
    """Else a short run is continued to 300 epochs and called the paper's, or two runs share a folder."""
    assert [run.name for run in plan("cifar10-sym-50 cifar10-sym-50-one_net")] == ["cifar10-sym-50_seed123"]
    [run] = plan("cifar10-sym-50", extra="--width 16 --num_epochs 20 --workers 3 --device cpu --no_label_scores")
    assert run.name == "cifar10-sym-50_seed123_num_epochs-20_width-16" and run.num_epochs == 20
    assert run.command[-5:-2] == ("--device", "cpu", "--no_label_scores")
    assert plan("cifar10-sym-50", extra="--num_epochs=20 --width=16")[0].name == run.name
    [run] = plan("cifar10-sym-50", extra="--noise_file /a/b c.json")
    assert run.name == "cifar10-sym-50_seed123_noise_file--a-b-c.json"
    runs = plan("cifar10-sym-50 clothing1m digits-sym-50", extra="--download")
    assert {run.row.data: bool(run.missing) for run in runs} == {"clothing1M": True, "cifar10": False, "digits": False}


@pytest.mark.parametrize(
    ("extra", "flag"),
    [("--seed 1", "--seeds"), ("--width 3 --fresh", "--fresh"), ("16", "16"), ("--num_epochs x", "--num_epochs x")],
)
def test_flags_that_are_not_the_users_to_give_are_refused(extra, flag):
    """All runs in one folder, or each start anew: each moves the one before aside."""
    with pytest.raises(DivideMixError, match=flag):
        plan("cifar10-sym-50", extra=extra)


def test_half_a_line_is_no_epoch(tmp_path):
    """A run that was killed while it wrote would end every later command, until somebody mends the file by hand."""
    [run] = plan("digits-sym-50", extra="--num_epochs 1", out=tmp_path)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1, "test_')
    assert rows.read(run.folder) == ({}, [{"epoch": 0}], {}) and not run.is_finished
    (run.folder / "result.json").write_text('{"test_acc": 1}')
    assert run.is_finished and not replace(run, num_epochs=2).is_finished
