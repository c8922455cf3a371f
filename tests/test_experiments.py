"""The rows: made from recipes, and each a command that its script takes."""

import pytest

import Train_cifar
import Train_clothing1M
import Train_webvision
from dividemix import DivideMixError, experiments, options, recipes
from dividemix.experiments import DATA, every_row, select

SCRIPTS = {script.__name__ + ".py": script for script in (Train_cifar, Train_clothing1M, Train_webvision)}
ROWS = {row.name: row for row in every_row()}


def parsed(row):
    """The flags of a run, as its args.json has them."""
    args = SCRIPTS[row.script].parse_args(row.flags)
    if row.script == "Train_cifar.py":
        options.resolve_recipe(args)
    else:
        options.resolve_images(args, SCRIPTS[row.script].PAPER)
    return vars(args)


def test_names_are_the_rows_of_the_papers_tables():
    """A row that is missing is one that nobody can check us on."""
    assert len(ROWS) == len(every_row())
    by_table = {table: [row.name for row in every_row() if row.table == table] for table in experiments.TABLES}
    assert len(by_table["1"]) == 16 and {"cifar100-sym-90", "cifar10-sym-20-ce"} < {*by_table["1"]}
    assert by_table["2"] == ["cifar10-asym-40-ce", "cifar10-asym-40"]
    assert (by_table["3"], by_table["4"]) == (["clothing1m"], ["webvision"])
    assert len(by_table["5"]) == 5 * 5 and "cifar10-sym-20-one_view" in by_table["5"]
    assert {"digits-sym-80-ce", "digits-asym-40", "fashionmnist-sym-50"} < {*by_table["here"]}


def test_the_papers_numbers_are_those_of_the_recipes():
    """Ours would be compared with another row's."""
    assert ROWS["cifar10-sym-80"].paper == {"best": 93.2, "last": 92.9}
    assert ROWS["cifar100-sym-50-ce"].paper == {"best": 46.7, "last": None}
    assert ROWS["cifar10-asym-40-no_refinement"].paper == {"best": 87.7}
    assert ROWS["cifar10-sym-90-divide_mixmatch"].paper == {"best": 70.1}
    one_net = ROWS["cifar10-sym-50-one_net"]
    assert (one_net.paper, one_net.run_name, one_net.column) == ({"best": 94.2}, "cifar10-sym-50", "test_acc_net1")
    assert one_net.flags == ROWS["cifar10-sym-50"].flags
    assert ROWS["clothing1m"].paper == {"test_acc": 74.76} and len(ROWS["webvision"].paper) == 4
    assert {*ROWS["digits-sym-50"].paper.values()} == {None}


@pytest.mark.parametrize("name", ROWS)
def test_each_row_is_a_command_of_its_script_and_the_papers_setting(name):
    """The run would end at once, or train something else and be called the paper's."""
    row = ROWS[name]
    args = parsed(row)
    assert row.setting_differences(args) == []
    assert args["num_epochs"] == row.num_epochs
    if row.script == "Train_cifar.py":
        assert (args["dataset"], args["noise_mode"], args["r"]) == tuple(
            row.setting[k] for k in ("dataset", "noise_mode", "r")
        )
        assert args["method"] == ("ce" if name.endswith("-ce") else "dividemix")
        end = name.rsplit("-", 1)[1]
        assert args.get("ablation", "none") == (end if end in recipes.ABLATIONS else "none")


def test_setting_differences_name_the_flags_that_differ():
    """A short run of a narrow net would stand in the table as a failed reproduction."""
    row = ROWS["cifar10-sym-20"]
    args = parsed(row) | {"lambda_u": 25.0, "num_epochs": 20}
    assert row.setting_differences(args) == ["--num_epochs 20 (row: 300)", "--lambda_u 25 (row: 0)"]
    assert row.setting_differences({"width": 64}) == []  # a run of before a flag was there
    assert ROWS["webvision"].setting_differences({"num_epochs": 80, "lr_drop": 50}) == ["--num_epochs 80 (row: 100)"]
    assert row.setting_differences(parsed(row) | {"noise_definition": "exclude_self"}) == [
        "--noise_definition exclude_self (row: with_self)"
    ]


def test_rows_are_chosen_by_table_and_pattern():
    """Somebody starts 48 runs of 300 epochs for a typing error, or none."""
    rows = every_row()
    assert [row.name for row in select(rows, [], ["cifar10-sym-50", "*webv*"])] == ["cifar10-sym-50", "webvision"]
    assert len(select(rows, ["2", "3"], ["cifar10-asym-40"])) == 3
    assert select(rows, ["all"], []) == rows
    with pytest.raises(DivideMixError, match="--rows cifar11: no row has such a name"):
        select(rows, ["1"], ["cifar11"])


@pytest.mark.parametrize(
    ("data", "files"),
    [
        ("cifar10", ["cifar-10/cifar-10-batches-py/data_batch_1"]),
        ("cifar10", ["cifar-10/data_batch_3"]),
        ("cifar100", ["cifar-100/cifar-100-python/train"]),
        ("fashionmnist", ["data/FashionMNIST/raw/train-images-idx3-ubyte.gz"]),
        ("clothing1M", ["Clothing1M/data/noisy_train_key_list.txt"]),
        (
            "webvision",
            ["webvision/info/train_filelist_google.txt", "webvision/val_images_256/", "webvision/imagenet/val/"],
        ),
    ],
)
def test_missing_data_are_found_before_anything_starts(tmp_path, data, files):
    """A night's queue ends in 18 errors of which the first told all."""
    for file in files:
        assert DATA[data].missing(tmp_path).startswith(f"needs {DATA[data].title} in {tmp_path}")
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if file.endswith("/") else path.touch()
    assert DATA[data].missing(tmp_path) == ""


def test_data_in_torchvisions_layout_are_found(tmp_path):
    """--data_root data, where torchvision has put all sets side by side, would be refused, which the scripts take."""
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    assert DATA["cifar10"].place(tmp_path) == tmp_path and DATA["cifar100"].place(tmp_path) is None


def test_what_can_be_fetched_is_not_missing(tmp_path):
    """`-- --download` on a new machine would run nothing; Clothing1M has no download."""
    assert DATA["cifar10"].missing(tmp_path, download=True) == "" and DATA["digits"].missing(tmp_path) == ""
    assert DATA["clothing1M"].missing(tmp_path, download=True)


def test_the_smoke_rows_are_in_no_list():
    """Their numbers, of 300 images, would stand among the results."""
    rows = experiments.smoke_rows()
    assert len({row.name for row in rows}) == 4 and not {row.run_name for row in rows} & {*ROWS}
    assert all(row.setting["limit_train"] == recipes.SMOKE["limit_train"] for row in rows)
