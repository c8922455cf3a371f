"""The command: with fake_script.py in the place of the training scripts, and once, tiny, with the real ones."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import submitit
from helpers.scripts import ROOT

import reproduce
from dividemix import DivideMixError
from dividemix.reproduction import jobs, rows
from dividemix.run import command_line

FAKE = ROOT / "tests" / "helpers" / "fake_script.py"


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A folder in which the script is the fake one, CIFAR-10 is there, and nothing else."""
    shutil.copy(FAKE, tmp_path / "Train_cifar.py")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    (tmp_path / "cifar-10").mkdir()
    (tmp_path / "cifar-10" / "data_batch_1").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_are_run_reported_and_skipped_the_next_time(fake, capsys):
    """What the command does every time."""
    command = ["--rows", "cifar10-asym-40", "--rows", "webvision", "--seeds", "2", "--jobs_per_gpu", "2"]
    command += ["--out_dir", "out", "--", "--num_epochs", "2"]
    reproduce.main(command)
    output = capsys.readouterr().out
    assert "webvision_seed123_num_epochs-2: not run: needs WebVision in webvision" in output
    assert "cifar10-asym-40_seed124_num_epochs-2: finished" in output
    markdown = (fake / "out" / "RESULTS.md").read_text()
    assert "| cifar10-asym-40 | 93.4 / 92.1 | 50.00 ± 0.00 / - | -43.40 / - | 2 | 2 | 72 | ccccccccc | num_" in markdown
    assert (fake / "out" / "curves" / "cifar10-asym-40.png").exists()
    starts = [path.read_text() for path in (fake / "out").glob("*/starts")]
    reproduce.main(command)
    assert "started" not in capsys.readouterr().out and len(starts) == 2
    assert starts == [path.read_text() for path in (fake / "out").glob("*/starts")]


def test_a_failure_is_the_commands_failure(fake, capsys):
    """A script that calls it would go on with half a table; a typing error in --data_root would look like a success."""
    with pytest.raises(DivideMixError, match="1 of 1"):
        reproduce.main(["--rows", "cifar10-sym-50", "--out_dir", "out", "--", "--fail"])
    assert "cifar10-sym-50_seed123_fail: failed: error: this one fails" in capsys.readouterr().out
    assert (fake / "out" / "RESULTS.md").exists()
    with pytest.raises(DivideMixError, match="needs CIFAR-100 in nowhere/cifar-100"):
        reproduce.main(["--rows", "cifar100-*", "--data_root", "nowhere", "--out_dir", "out"])
    for flags in ("--seeds 2", "--table 1 --slurm_extra qos"):  # nothing to run, and what sbatch would refuse
        with pytest.raises(SystemExit):
            reproduce.parse_args(flags.split())


def test_dry_runs_and_lists_write_nothing(fake, capsys):
    """A look would leave folders that are in the way of the real thing; a short run would be listed as the paper's."""

    def finish(run: str, epochs: int) -> None:
        flags = ["--run_dir", f"reproduced/{run}", "--num_epochs", str(epochs)]
        subprocess.run([sys.executable, str(FAKE), *flags], check=True)

    finish("cifar10-sym-20_seed123_num_epochs-2", 2)
    before = sorted(fake.rglob("*"))
    reproduce.main(["--rows", "cifar10-sym-50", "--seeds", "2", "--dry_run", "--", "--num_epochs", "200"])
    output = capsys.readouterr().out
    assert "\npython Train_cifar.py --data_path cifar-10 --r 0.5 --seed 124 --noise_seed 123" in output
    assert "# cifar10-sym-50_seed123_num_epochs-200: time not measured here" in output
    reproduce.main(["--rows", "cifar10-sym-50", "--dry_run", "--", "--num_epochs", "2"])
    assert "about 0.0 hours" in capsys.readouterr().out
    reproduce.main(["--list"])
    listed = capsys.readouterr().out
    assert all(row.name in listed for row in rows.all_rows()) and "1 finished" not in listed
    assert "needs Clothing1M in Clothing1M/data" in listed
    assert sorted(fake.rglob("*")) == before
    finish("digits-sym-50_seed123", rows.select([], ["digits-sym-50"])[0].setting["num_epochs"])
    reproduce.main(["--list", "--rows", "digits-sym-50"])
    assert "1 finished" in capsys.readouterr().out
    reproduce.main(["--table", "all", "--report_only", "--out_dir", "out"])  # runs that were made elsewhere
    assert "Table 5" in (fake / "out" / "RESULTS.md").read_text() and not list((fake / "out").glob("*_seed*"))


def test_data_are_downloaded_once_and_for_the_rows_that_lack_them(tmp_path, monkeypatch):
    """Several runs would unpack into one folder at once."""
    loaded = []
    monkeypatch.setattr(reproduce.dataloader_cifar, "load", lambda *args, **flags: loaded.append((*args, flags)))
    monkeypatch.setattr(jobs, "launch", lambda *_: [])
    names = [word for name in ("cifar10-sym-?0", "digits-sym-50", "clothing1m") for word in ("--rows", name)]
    for extra in ([], ["--download"]):
        reproduce.main([*names, "--data_root", str(tmp_path), "--out_dir", str(tmp_path / "out"), "--", *extra])
    assert loaded == [("cifar10", tmp_path / "cifar-10", {"download": True})]


def test_a_queue_gets_the_flags_of_slurm(tmp_path, monkeypatch):
    """Else a job has the default five minutes or no card, or a laptop's user sees a stack trace."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "before")
    launched = []
    monkeypatch.setattr(jobs, "launch", lambda *args: launched.extend(args[2:]) or [])
    command = ["--rows", "digits-sym-50", "--launcher", "slurm", "--jobs_per_gpu", "2", "--seeds", "3"]
    command += ["--slurm_partition", "p", "--slurm_extra", "qos=high", "--out_dir", str(tmp_path)]
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    reproduce.main(command)
    slots, size, executor = launched
    assert (slots, size) == ([{"OMP_NUM_THREADS": "4"}] * 3, 2)
    script = executor._executor._make_submission_file_text("", "")
    for flag in ("partition=p", "gpus-per-node=1", "time=1440", "cpus-per-task=8", "qos=high", "job-name=dividemix"):
        assert f"#SBATCH --{flag}\n" in script
    assert os.environ["PYTHONPATH"] == f"{rows.ROOT}:before"
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: -1))
    with pytest.raises(DivideMixError, match="--launcher slurm"):
        reproduce.main(command)


@pytest.mark.parametrize("count", [1, 10_000])  # fewer and more than a buffer holds
def test_a_reader_that_ends_is_no_error(count, monkeypatch, capsys):
    """`reproduce.py --list | head` would end in a stack trace."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output, warnings.catch_warnings():
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        with pytest.raises(SystemExit) as ended:
            command_line(lambda _: print("a row\n" * count))
    assert ended.value.code == 141 and capsys.readouterr().err == ""


@pytest.mark.slow
def test_all_of_it_in_miniature(tmp_path):
    """Two seeds of the real script, an interruption, the same command again: a mistake costs a week of runs."""
    out, epochs = tmp_path / "out", 5
    command = [sys.executable, str(ROOT / "reproduce.py"), "--rows", "digits-sym-50*", "--seeds", "2"]
    command += ["--jobs_per_gpu", "2", "--out_dir", str(out), "--", "--device", "cpu", "--no_label_scores"]
    command += ["--limit_train", "300", "--width", "4", "--warm_up", "2", "--num_epochs", str(epochs)]
    process, give_up = subprocess.Popen(command), time.monotonic() + 900
    while not any(path.read_text() for path in out.glob("*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) == 143
    begun = {path.parent.name: len(rows.read(path.parent).records) for path in out.glob("*/metrics.jsonl")}
    assert any(0 < n < epochs for n in begun.values())

    subprocess.run(command, timeout=1800, check=True)
    for folder in out.glob("digits-*_seed*"):
        files, log = rows.read(folder), (out / "logs" / f"{folder.name}.log").read_text()
        assert files.result and len(files.records) == epochs, log
        assert "continuing " in log or not 0 < begun.get(folder.name, 0) < epochs
    lines = (out / "RESULTS.md").read_text().splitlines()
    for name in ("digits-sym-50-ce", "digits-sym-50"):
        counts = [line.split(" | ")[4] for line in lines if line.startswith(f"| {name} |") and "not run" not in line]
        assert counts == ["2"], lines
