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
    missing = (
        "not run: needs WebVision; `python reproduce.py --rows webvision --seeds 2 --out_dir out -- --num_epochs 2`"
    )
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
    for name, epochs in (("seed123", 20), ("seed124", 3), ("seed123_width-8", 20)):
        folder = fake / "out" / f"digits-sym-50_{name}"
        subprocess.run([sys.executable, str(FAKE), "--run_dir", str(folder), "--num_epochs", str(epochs)], check=True)
    reproduce.main(["--list", "--rows", "digits-sym-50*", "--out_dir", "out"])
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split() == ["digits-sym-50-ce", "-", "/", "-"]
    assert second.split() == ["digits-sym-50", "-", "/", "-", "1", "finished"]


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
