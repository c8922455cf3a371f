"""The command itself: with fake_script.py in the place of the training scripts, and once, in miniature, with them."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import reproduce
from dividemix import DivideMixError, experiments, launch, plan, signals

FAKE = Path(__file__).parent / "fake_script.py"


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A folder in which all scripts are fake ones, CIFAR-10 is there, and nothing else."""
    for script in ("Train_cifar.py", "Train_clothing1M.py", "Train_webvision.py"):
        shutil.copy(FAKE, tmp_path / script)
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    (tmp_path / "cifar-10").mkdir()
    (tmp_path / "cifar-10" / "data_batch_1").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_rows_are_run_reported_and_skipped_the_next_time(fake, capsys):
    """The whole: what it does every time."""
    command = [
        "--rows",
        "cifar10-asym-40",
        "--rows",
        "webvision",
        "--seeds",
        "2",
        "--jobs_per_gpu",
        "2",
        "--out_dir",
        "out",
    ]
    reproduce.main([*command, "--", "--num_epochs", "2"])
    out = capsys.readouterr().out
    assert "webvision seed 123: not run: needs WebVision in webvision" in out
    assert "2 finished, 2 not run" in out and "cifar10-asym-40 seed 124: finished, best 51.00" in out
    markdown = (fake / "out" / "RESULTS.md").read_text()
    assert "| cifar10-asym-40 | 93.4 / 92.1 | 51.00 ± 0.00 / - | -42.40 / - | 2 |" in markdown
    missing = "not run: needs WebVision; `python reproduce.py --rows webvision --seeds 2 --out_dir out`"
    assert missing in markdown
    times = (fake / "out" / "cifar10-asym-40_seed123_num_epochs-2" / "times").read_text()
    reproduce.main([*command, "--", "--num_epochs", "2"])
    assert "running" not in capsys.readouterr().out
    assert (fake / "out" / "cifar10-asym-40_seed123_num_epochs-2" / "times").read_text() == times


def test_a_failure_is_the_commands_failure(fake, capsys):
    """A script that calls it would go on with half a table."""
    with pytest.raises(DivideMixError, match="1 of 1 runs failed; the same command tries them again"):
        reproduce.main(["--rows", "cifar10-sym-50", "--out_dir", "out", "--", "--fail", "--num_epochs", "2"])
    out = capsys.readouterr().out
    assert "failed: cifar10-sym-50_seed123_fail_num_epochs-2: error: this one fails (out/logs/" in out
    assert (fake / "out" / "RESULTS.md").exists()


def test_nothing_that_can_be_run_is_an_error(fake):
    """A typing error in --data_root would look like a success."""
    with pytest.raises(DivideMixError, match="nothing could be run: needs CIFAR-100 in nowhere/cifar-100"):
        reproduce.main(["--rows", "cifar100-*", "--data_root", "nowhere", "--out_dir", "out"])


def test_dry_runs_and_lists_write_nothing(fake, capsys):
    """Somebody looks, and has folders in the way of the real thing."""
    before = files(fake)
    reproduce.main(["--rows", "cifar10-sym-50", "--seeds", "2", "--dry_run"])
    out = capsys.readouterr().out
    assert "Train_cifar.py --data_path cifar-10 --r 0.5 --seed 124 --noise_seed 123 --run_dir" in out
    assert "# cifar10-sym-50_seed123: 300 epochs; time not measured here" in out
    reproduce.main(["--list"])
    listed = capsys.readouterr().out
    assert all(row.name in listed for row in experiments.every_row())
    assert "Table 3: Clothing1M (--table 3)" in listed and "needs Clothing1M in Clothing1M/data" in listed
    assert files(fake) == before


def test_tables_can_be_written_without_running(fake, capsys):
    """The tables of runs that were made elsewhere could not be made where their folders are."""
    reproduce.main(["--table", "all", "--report_only", "--out_dir", "out"])
    assert "Table 5" in (fake / "out" / "RESULTS.md").read_text() and files(fake / "out") == [
        "RESULTS.md",
        "results.csv",
    ]


def test_the_list_counts_the_rows_own_finished_runs(fake, capsys):
    """A short run with other flags would be listed as the paper's row, done."""
    whole = experiments.select(experiments.every_row(), [], ["digits-sym-50"])[0].num_epochs
    for name, epochs in (("seed123", whole), ("seed124", 3), ("seed123_width-8", whole)):
        folder = fake / "out" / f"digits-sym-50_{name}"
        subprocess.run([sys.executable, str(FAKE), "--run_dir", str(folder), "--num_epochs", str(epochs)], check=True)
    reproduce.main(["--list", "--rows", "digits-sym-50*", "--out_dir", "out"])
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split() == ["digits-sym-50-ce", "-", "/", "-"]
    assert second.split() == ["digits-sym-50", "-", "/", "-", "1", "finished"]


def test_a_run_whose_flags_imply_others_is_finished_the_next_time(tmp_path, capsys):
    """`--recipe blind` leaves lambda_u open, `--learning_rate` is --lr: else the same command fails on its own runs."""
    command = ["--rows", "digits-sym-50", "--out_dir", str(tmp_path / "out"), "--", "--learning_rate", "0.1"]
    command += ["--recipe", "blind", "--limit_train", "64", "--width", "4", "--num_epochs", "1", "--no_label_scores"]
    for _ in range(2):
        reproduce.main([*command, "--device", "cpu"])
    assert capsys.readouterr().out.count("1 finished") == 2
    table = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "| not run; `python reproduce.py --rows digits-sym-50 --out_dir" in table and " -- " not in table


def test_data_are_fetched_once_and_for_the_rows_that_lack_them(tmp_path, monkeypatch):
    """Several runs would unpack into one folder at once."""
    fetched = []
    monkeypatch.setattr(reproduce.dataloader_cifar, "load", lambda *args, **how: fetched.append((*args, how)))
    names = [
        "--rows",
        "cifar10-sym-?0",
        "--rows",
        "digits-sym-50",
        "--rows",
        "clothing1m",
        "--data_root",
        str(tmp_path),
    ]
    for extra in ([], ["--download"]):
        args = reproduce.parse_args([*names, "--", *extra])
        rows = experiments.select(experiments.every_row(), [], args.rows)
        reproduce.fetch(reproduce.plan.plan(rows, 2, tmp_path, tmp_path / "out", args.extra), args)
    assert fetched == [("cifar10", tmp_path / "cifar-10", {"download": True})]


def test_runs_on_the_cpu_get_no_card(monkeypatch):
    """`-- --device cpu` on a box with eight cards would start eight runs."""
    monkeypatch.setattr(reproduce.launch, "visible_cards", lambda _: ["0", "1"])
    slots = [
        reproduce.make_slots(reproduce.parse_args(["--table", "1", "--", *extra])) for extra in ([], ["--device=cpu"])
    ]
    assert [len(each) for each in slots] == [2, 1] and "CUDA_VISIBLE_DEVICES" not in slots[1][0].env


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_an_out_dir_that_cannot_be_made_is_one_line(tmp_path, launcher):
    """'File exists', of what nobody named."""
    (tmp_path / "file").touch()
    with pytest.raises(DivideMixError, match=r"--out_dir .*file: cannot be written"):
        reproduce.main(["--rows", "digits-sym-50", "--launcher", launcher, "--out_dir", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "say what to run"),
        (["--table", "6"], "invalid choice"),
        (["--seeds", "0", "--table", "1"], "expected a whole number of 1 or more"),
        (["--table", "1", "--slurm_extra", "qos"], "expected KEY=VALUE"),
        (["--table", "1", "x"], "unrecognized arguments: x"),
    ],
)
def test_a_wrong_command_line_is_one_line(flags, said, capsys):
    """A page of usage hides what is wrong."""
    with pytest.raises(SystemExit) as ended:
        reproduce.parse_args(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_an_interrupted_command_says_what_the_next_continues(tmp_path):
    """Exit status 0 after Ctrl-C starts the next line of somebody's script."""
    task = launch.Task(plan.Plan(experiments.every_row()[0], 123, tmp_path / "a", (), 3), tmp_path, launch.STOPPED)
    with pytest.raises(signals.Stopped) as stopped:
        reproduce.conclude([task], 15)
    assert stopped.value.status == 143 and stopped.value.__notes__ == [
        "the same command continues the runs that have begun (0), and starts the others"
    ]


def test_what_slurm_is_told():
    """A job of the default five minutes, or without a card."""
    slurm = ["--table", "1", "--launcher", "slurm"]
    args = reproduce.parse_args(
        ["--table", "1", "--launcher", "slurm", "--slurm_partition", "p", "--slurm_extra", "qos=high"]
    )
    assert reproduce.parameters(args) == {
        **{"timeout_min": 1440, "cpus_per_task": 8, "name": "dividemix", "gpus_per_node": 1, "slurm_partition": "p"},
        "slurm_additional_parameters": {"qos": "high"},
    }
    args = reproduce.parse_args([*slurm, "--jobs_per_gpu", "2", "--slurm_jobs", "3"])
    assert reproduce.make_slots(args) == [launch.Slot({"OMP_NUM_THREADS": "4"}, 2)] * 3


@pytest.mark.slow
def test_the_smoke_test_passes():
    """The machinery with the real scripts: two seeds, two at once, a failure, an interruption that is continued."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "reproduce.py"), "--smoke"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke test passed" in done.stdout and "## In miniature" in done.stdout


DRIVER = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
import reproduce
from dividemix import options, plan
plan.ROOT = Path({scripts!r})
sys.argv[1:] = {argv!r}
options.command_line(reproduce.main)
"""


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_reaches_each_run_once(fake):
    """A terminal sends it to every process of the command: a run that gets it twice dies in the middle of writing."""
    argv = ["--rows", "cifar10-sym-50", "--seeds", "2", "--jobs_per_gpu", "2", "--out_dir", str(fake / "out")]
    argv += ["--", "--seconds", "0.3", "--device", "cpu", "--num_epochs", "300"]
    driver = DRIVER.format(path=[str(ROOT)], scripts=str(fake), argv=argv)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell started the tests in the background
        os.execv(sys.executable, [sys.executable, "-c", driver])
    shown, interrupted, give_up = b"", False, time.monotonic() + 240
    while time.monotonic() < give_up:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                content = os.read(terminal, 65536)
            except OSError:  # closed by its end
                break
            shown += content
        if not interrupted and len(list((fake / "out").glob("*/metrics.jsonl"))) == 2:
            os.write(terminal, b"\x03")
            interrupted = True
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130, shown.decode(errors="replace")
    logs = [log.read_text().splitlines() for log in (fake / "out" / "logs").glob("*.log")]
    assert [log[-1] for log in logs] == ["interrupted: by SIGTERM"] * 2, shown.decode(errors="replace")
    assert b"s/epoch" in shown and b"the runs that have begun (2)" in shown
