"""The runs of the rows: their commands and folders."""

import shlex
import sys
from pathlib import Path

import pytest

import Train_cifar
from dividemix import DivideMixError, plan
from dividemix.experiments import every_row, select

ROWS = {row.name: row for row in every_row()}


def plans(names: str, seeds: int = 1, extra: str = "", root: str = "data"):
    rows = select(every_row(), [], names.split())
    return plan.plan(rows, seeds, Path(root), Path("out"), extra.split())


def test_a_run_is_its_scripts_command(tmp_path):
    """What is copied from --dry_run would be another run than that which the command makes."""
    [run] = plans("cifar10-sym-50")
    script = str(plan.ROOT / "Train_cifar.py")
    flags = ("--data_path", "data/cifar-10", "--r", "0.5", "--run_dir", "out/cifar10-sym-50_seed123")
    assert run.command == (sys.executable, script, *flags) and run.num_epochs == 300
    assert run.missing == "needs CIFAR-10 in data/cifar-10"
    [run] = plans("digits-sym-50-ce")
    assert "--data_path" not in run.command and run.missing == "" and run.num_epochs == 40


def test_seeds_share_the_noise():
    """The spread would be that of the noise, too."""
    first, second = plans("digits-sym-50", seeds=2)
    assert "--seed" not in first.command and second.folder == Path("out/digits-sym-50_seed124")
    args = Train_cifar.parse_args(second.command[2:])
    assert (args.seed, args.noise_seed) == (124, Train_cifar.parse_args(first.command[2:]).noise_seed)
    _, second = plans("clothing1m", seeds=2)
    assert second.command[2:6] == ("--data_path", "data/Clothing1M/data", "--seed", "124")


def test_rows_that_read_the_same_runs_have_them_once():
    """Table 5's test with one network would train 300 epochs again, in a folder that is in use."""
    runs = plans("cifar10-sym-50 cifar10-sym-50-one_net", seeds=2)
    assert [run.name for run in runs] == ["cifar10-sym-50_seed123", "cifar10-sym-50_seed124"]
    assert [run.name for run in plans("cifar10-sym-50-one_net")] == ["cifar10-sym-50_seed123"]


def test_other_flags_have_folders_of_their_own():
    """A short run would be continued to the paper's 300 epochs and called the paper's, or refused."""
    [run] = plans("cifar10-sym-50", extra="--width 16 --num_epochs 20 --workers 3 --device cpu --no_label_scores")
    assert run.name == "cifar10-sym-50_seed123_num_epochs-20_width-16" and run.num_epochs == 20
    assert " ".join(run.command[-11:-1]) == (
        "--width 16 --num_epochs 20 --workers 3 --device cpu --no_label_scores --run_dir"
    )
    [other] = plans("cifar10-sym-50", extra="--num_epochs=20 --width=16")
    assert other.name == run.name and other.num_epochs == 20
    [other] = plans("cifar10-sym-50", extra="--noise_file x.json")
    assert other.name == "cifar10-sym-50_seed123_noise_file-x.json"
    assert (
        plans("cifar10-sym-50", extra="--init_from /a/b c.pt")[0].name == "cifar10-sym-50_seed123_init_from--a-b-c.pt"
    )


def test_many_flags_are_a_name_that_file_systems_take():
    """A long path, and 'file name too long' ends the command and tells all other runs to stop."""
    names = [plans("cifar10-sym-50", extra=f"--init_from /{'a' * 300}{k}")[0].name for k in range(2)]
    assert names[0] != names[1] and all(len(name) < 200 for name in names)


@pytest.mark.parametrize(
    "extra",
    [
        *("--seed 1", "--run_dir x", "--width 3 --fresh", "--data_path x", "16", "--num_epochs x", "--num_epochs"),
        *("--warm_up x", "--gpuid 1", "--check_data", "--check_data=full", "--help"),
    ],
)
def test_flags_that_are_not_the_users_to_give_are_refused(extra):
    """All runs in one folder: each moves the one before aside; on a card that they do not see; or nothing is run."""
    with pytest.raises(DivideMixError):
        plans("cifar10-sym-50", extra=extra)


def test_commands_can_be_copied(monkeypatch, tmp_path):
    """A path with a space ends in an error, and another folder has no Train_cifar.py."""
    [run] = plans("cifar10-sym-50", root="my data")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(plan.shown(run.command))[1:] == list(run.command[1:])
    monkeypatch.chdir(plan.ROOT)
    assert shlex.split(plan.shown(run.command))[1] == "Train_cifar.py"
    monkeypatch.setattr(plan.shutil, "which", lambda _: sys.executable)
    assert plan.shown(run.command).startswith("python Train_cifar.py --data_path 'my data/cifar-10' --r 0.5")


def test_a_rows_own_command_makes_it():
    """RESULTS.md would show a command that makes another table."""
    row = ROWS["cifar10-sym-50"]
    assert plan.row_command(row, 1, Path(), plan.OUT_DIR) == "python reproduce.py --rows cifar10-sym-50"
    whole = plan.row_command(row, 3, Path("a b"), Path("o"))
    asked = "python reproduce.py --rows cifar10-sym-50 --seeds 3 --data_root 'a b' --out_dir o"
    assert whole == asked
