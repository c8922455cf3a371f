"""Runs as jobs, with scripts that only write run folders (fake_script.py)."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
import torch
from helpers.scripts import ROOT

from dividemix import DivideMixError
from dividemix.reproduction import jobs, rows
from dividemix.run import signals

FAKE = ROOT / "tests" / "helpers" / "fake_script.py"
ROW = rows.all_rows()[0]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(jobs, "PAUSE", 0.05)
    monkeypatch.setattr(jobs, "PAUSE_QUEUE", 0.05)


def fake_run(out: Path, name: str, *flags: str, epochs: int = 2) -> rows.PlannedRun:
    command = (sys.executable, str(FAKE), "--run_dir", str(out / name), "--num_epochs", str(epochs), *flags)
    return rows.PlannedRun(ROW, out / name, command, epochs)


def wait_for(condition, seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def has_epoch(run: rows.PlannedRun) -> bool:
    return bool(rows.read(run.folder).records)


def starts(run: rows.PlannedRun) -> list[list[str]]:
    """Process and threads of each start."""
    return [line.split() for line in (run.folder / "starts").read_text().splitlines()]


def is_gone(run: rows.PlannedRun) -> bool:
    """Whether the process of its last start has ended, or is a zombie (Z)."""
    try:
        return Path(f"/proc/{starts(run)[-1][0]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def once_begun(runs: list[rows.PlannedRun], action) -> None:
    """Call `action` in a thread when each of the runs has an epoch."""

    def wait_and_act() -> None:
        wait_for(lambda: all(map(has_epoch, runs)))
        action()

    threading.Thread(target=wait_and_act).start()


def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    """One bad row, and a night's queue behind it is lost; or nobody learns which one it was, and why."""
    killed = fake_run(tmp_path, "killed", "--seconds", "0.1", epochs=900)
    runs = [fake_run(tmp_path, "fails", "--fail"), killed, fake_run(tmp_path, "sound")]
    once_begun([killed], lambda: os.kill(int(starts(killed)[0][0]), signal.SIGKILL))
    lines = jobs.launch(runs, tmp_path / "logs", [{"OMP_NUM_THREADS": "3"}])
    assert lines[0] == f"fails: failed: error: this one fails ({tmp_path}/logs/fails.log)"
    assert len(lines) == 2 and "SIGKILL" in lines[1]  # memory that runs out: the log says nothing of it
    assert [run.is_finished for run in runs] == [False, False, True]
    assert str(FAKE) in (tmp_path / "logs" / "fails.log").read_text() and starts(runs[2])[0][1] == "3"
    assert "sound: finished" in capsys.readouterr().out


def test_ctrl_c_ends_all_runs_cleanly_and_the_same_runs_continue(tmp_path):
    """Else hours of every run are lost, or processes are left that hold cards and folders."""
    runs = [fake_run(tmp_path, f"run{k}", "--seconds", "0.1", epochs=300) for k in range(2)]
    once_begun(runs, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started pytest so
    with pytest.raises(signals.Stopped) as stopped, signals.stoppable():
        jobs.launch([*runs, fake_run(tmp_path, "waits")], tmp_path / "logs", [{}] * 2)
    signal.signal(signal.SIGINT, before)
    assert stopped.value.status == 130
    assert not (tmp_path / "logs" / "waits.log").exists(), "more runs at once than slots"
    for run in runs:
        log = (tmp_path / "logs" / f"{run.name}.log").read_text()
        assert log.splitlines()[-1] == "interrupted: by SIGTERM"  # once, and not killed
        assert 0 < len(rows.read(run.folder).records) < 300 and is_gone(run)
    longer = [fake_run(tmp_path, run.name, epochs=len(rows.read(run.folder).records) + 1) for run in runs]
    assert jobs.launch(longer, tmp_path / "logs", [{}]) == []
    assert all(len(starts(run)) == 2 and run.is_finished for run in longer)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death")
def test_runs_end_when_the_command_is_killed(tmp_path):
    """Else they train on unseen, and the same command finds their folders locked."""
    run = fake_run(tmp_path, "run", "--seconds", "0.1", epochs=900)
    process = multiprocessing.get_context("fork").Process(target=jobs.launch, args=([run], tmp_path / "logs", [{}]))
    process.start()
    wait_for(lambda: has_epoch(run))
    process.kill()
    process.join()
    wait_for(lambda: is_gone(run))
    assert (tmp_path / "logs" / "run.log").read_text().splitlines()[-1] == "interrupted: by SIGTERM"


def test_slots_of_cards_and_cores(monkeypatch):
    """Two runs on the first card while the second idles; eight runs of 64 threads each; a card that is not ours."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    slots = jobs.local_slots(2, 16)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2", "GPU-b", "2", "GPU-b"]
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"4"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in jobs.local_slots(1, 2)] == ["0", "1"]
    assert jobs.local_slots(3, 2, on_cpu=True) == [{"OMP_NUM_THREADS": "1"}] * 3


# ---- SLURM: submitit's executor for this machine stands for it ----


@pytest.mark.slow
def test_a_queue_runs_several_runs_a_job(tmp_path, monkeypatch):
    """The cluster's path is another one than this machine's, and fails on the first job there."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as `slurm_executor` sets it
    runs = [fake_run(tmp_path, name) for name in ("a", "b")] + [fake_run(tmp_path, "fails", "--fail")]
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    [line] = jobs.launch(runs, tmp_path / "logs", [{"OMP_NUM_THREADS": "1"}] * 5, 2, executor)
    assert line.startswith("fails: failed: error: this one fails")
    assert runs[0].is_finished and runs[1].is_finished
    assert len(list((tmp_path / "jobs").glob("*_result.pkl"))) == 2


def test_a_job_that_is_requeued_ends_cleanly_and_goes_on(tmp_path):
    """Else the end of a job's time kills the script in mid-epoch, or `checkpoint` hangs in its signal handler."""
    run = fake_run(tmp_path, "run", "--seconds", "0.1", epochs=20)
    job, requeued = jobs.Job([run], tmp_path, {}, in_queue=True), []
    before = signal.signal(signal.SIGUSR2, lambda *_: requeued.append(job.checkpoint()))

    def warn() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2):  # SLURM's warnings, which reach every process of a job
            os.kill(int(starts(run)[0][0]), number)
        os.kill(os.getpid(), signal.SIGUSR2)

    once_begun([run], warn)
    try:
        assert job() == [130] and 0 < len(rows.read(run.folder).records) < 20
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert requeued[0].result() == [0] and len(starts(run)) == 2 and run.is_finished


def test_a_queue_that_takes_no_more_jobs_or_loses_one(tmp_path):
    """Else a limit of jobs a user ends the command, or a run on a node that died counts as finished."""
    taken = []

    def submit(job):
        if any(not running.done() for running in taken):
            raise RuntimeError("QOSMaxSubmitJobPerUserLimit")
        taken.append(job.start())
        return job

    runs = [fake_run(tmp_path, name) for name in ("a", "b", "c")]
    assert jobs.launch(runs, tmp_path / "logs", [{}] * 2, 1, SimpleNamespace(submit=submit)) == []
    assert len(taken) == 3 and all(run.is_finished for run in runs)
    lost = SimpleNamespace(done=lambda: True, exception=lambda: RuntimeError("NODE_FAIL"))
    [line] = jobs.launch([fake_run(tmp_path, "d")], tmp_path, [{}], 1, SimpleNamespace(submit=lambda job: lost))
    assert line.startswith("d: failed: ") and "lost" in line
    with pytest.raises(DivideMixError, match="division by zero"):
        jobs.launch([fake_run(tmp_path, "d")], tmp_path, [{}], 1, SimpleNamespace(submit=lambda job: 1 / 0))
