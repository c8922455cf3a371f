"""Runs as jobs, with scripts that only write run folders (fake_script.py)."""

import os
import signal
import subprocess
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

FAKE = Path(__file__).parents[1] / "helpers" / "fake_script.py"
ROW = rows.all_rows()[0]


def fake_run(out: Path, name: str, *flags: str, epochs: int = 2) -> rows.PlannedRun:
    words = (sys.executable, str(FAKE), "--run_dir", str(out / name), "--num_epochs", str(epochs), *flags)
    return rows.PlannedRun(ROW, out / name, words, epochs)


def fake_job(out: Path, run: rows.PlannedRun, in_queue: bool = False) -> jobs.Job:
    return jobs.Job([run], out, {}, in_queue)


def wait_for(condition, seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def has_epoch(run: rows.PlannedRun) -> bool:
    return bool(rows.read(run.folder).records)


def starts(run: rows.PlannedRun) -> list[list[str]]:
    """Process, time and threads of each start."""
    return [line.split() for line in (run.folder / "starts").read_text().splitlines()]


def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    """One bad row, and a night's queue behind it is lost; or nobody learns which one it was, and why."""
    runs = [fake_run(tmp_path, "fails", "--fail"), fake_run(tmp_path, "one"), fake_run(tmp_path, "two")]
    [line] = jobs.launch(runs, tmp_path / "logs", [{"OMP_NUM_THREADS": "3"}])
    assert line == f"fails: failed: error: this one fails ({tmp_path}/logs/fails.log)"
    assert [run.is_finished for run in runs] == [False, True, True]
    assert str(FAKE) in (tmp_path / "logs" / "fails.log").read_text() and starts(runs[1])[0][2] == "3"
    told = capsys.readouterr().out.splitlines()
    assert told == ["fails: started", line, "one: started", "one: finished", "two: started", "two: finished"]


def test_a_run_that_is_killed_says_by_what(tmp_path):
    """Out of memory: the last line of the log is that of an epoch like any other."""
    run = fake_run(tmp_path, "killed", "--seconds", "0.2", epochs=900)

    def kill():
        wait_for(lambda: has_epoch(run))
        os.kill(int(starts(run)[0][0]), signal.SIGKILL)

    threading.Thread(target=kill).start()
    [line] = jobs.launch([run], tmp_path / "logs", [{}])
    assert "ended by SIGKILL" in line


@pytest.mark.slow
def test_slots_are_never_exceeded_and_all_used(tmp_path):
    """More runs at once than asked for do not fit in a card's memory; fewer leave it idle."""
    runs = [fake_run(tmp_path, f"run{k}", "--seconds", "2") for k in range(4)]
    assert jobs.launch(runs, tmp_path / "logs", [{}] * 2) == []
    spans = [(float(starts(run)[0][1]), float((run.folder / "end").read_text())) for run in runs]
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_all_runs_cleanly_and_the_same_runs_continue(tmp_path, number):
    """Ctrl-C loses hours of every run under way, or leaves processes behind that hold cards and folders."""
    runs = [fake_run(tmp_path, f"run{k}", "--seconds", "0.3", epochs=40) for k in range(2)]

    def interrupt():
        wait_for(lambda: all(map(has_epoch, runs)))
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us so
    with pytest.raises(signals.Stopped) as stopped, signals.stoppable():
        jobs.launch([*runs, fake_run(tmp_path, "waits")], tmp_path / "logs", [{}] * 2)
    signal.signal(signal.SIGINT, before)
    assert stopped.value.status == 128 + number and not (tmp_path / "waits").exists()
    for run in runs:
        log = (tmp_path / "logs" / f"{run.name}.log").read_text()
        assert log.splitlines()[-1] == "interrupted: by SIGTERM"  # once, and not killed
        assert 0 < len(rows.read(run.folder).records) < 40 and is_gone(run)
    short = [fake_run(tmp_path, run.name, epochs=len(rows.read(run.folder).records) + 1) for run in runs]
    assert jobs.launch(short, tmp_path / "logs", [{}]) == []
    assert all(len(starts(run)) == 2 and len(rows.read(run.folder).records) == run.num_epochs for run in short)


def is_gone(run: rows.PlannedRun) -> bool:
    """Whether the process of its last start has ended; one that nobody waited for yet (Z) has."""
    try:
        return Path(f"/proc/{starts(run)[-1][0]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death")
def test_runs_end_when_the_command_is_killed(tmp_path):
    """Else they train on unseen, and the same command finds their folders locked."""
    driver = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "reproduction")!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import test_jobs
run = test_jobs.fake_run(Path({str(tmp_path)!r}), "run", "--seconds", "0.2", epochs=900)
test_jobs.jobs.launch([run], Path({str(tmp_path)!r}) / "logs", [{{}}])
"""
    process, run = subprocess.Popen([sys.executable, "-c", driver]), fake_run(tmp_path, "run")
    wait_for(lambda: has_epoch(run))
    process.kill()
    process.wait()
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
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert jobs.local_slots(1, 2, on_cpu=True) == [{"OMP_NUM_THREADS": "5"}]


# ---- SLURM: submitit's executor for this machine stands for it ----


@pytest.mark.slow
def test_a_queue_runs_several_runs_a_job(tmp_path, monkeypatch):
    """The cluster's path is another one than this machine's, and fails on the first job there."""
    monkeypatch.setattr(jobs, "PAUSE_QUEUE", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as `slurm_executor` sets it
    runs = [fake_run(tmp_path, name) for name in ("a", "b")] + [fake_run(tmp_path, "fails", "--fail")]
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    [line] = jobs.launch(runs, tmp_path / "logs", [{"OMP_NUM_THREADS": "1"}] * 5, 2, executor)
    assert (
        line.startswith("fails: failed: error: this one fails") and [run.is_finished for run in runs[:2]] == [True] * 2
    )
    assert len(list((tmp_path / "jobs").glob("*_result.pkl"))) == 2


def test_a_job_that_is_requeued_ends_cleanly_and_goes_on(tmp_path):
    """The end of a job's time kills the script in mid-epoch, or the job is never queued again."""
    run = fake_run(tmp_path, "run", "--seconds", "0.3", epochs=6)
    job = fake_job(tmp_path, run, in_queue=True).start()
    wait_for(lambda: has_epoch(run))
    for number in (signal.SIGTERM, signal.SIGUSR2):  # SLURM's warnings, which reach every process of a job
        os.kill(int(starts(run)[0][0]), number)
    again = job.checkpoint()
    assert job.result() == [130] and 0 < len(rows.read(run.folder).records) < 6
    assert again.result() == [0] and len(starts(run)) == 2 and run.is_finished


def test_a_requeue_is_asked_for_while_the_job_waits(tmp_path):
    """submitit calls `checkpoint` from a signal's handler: one that waits as the job does hangs until it is killed, and
    the runs are never queued again."""
    run = fake_run(tmp_path, "run", "--seconds", "0.3", epochs=6)
    job, again = fake_job(tmp_path, run, in_queue=True), []
    before = signal.signal(signal.SIGUSR2, lambda *_: again.append(job.checkpoint()))

    def warn() -> None:
        wait_for(lambda: has_epoch(run))
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=warn).start()
    try:
        assert job() == [130]
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert again[0].result() == [0] and run.is_finished


def test_a_queue_that_takes_no_more_jobs_is_filled_as_far_as_it_goes(tmp_path, monkeypatch):
    """A limit of jobs a user would end the command, with the jobs that were taken training on unseen."""
    monkeypatch.setattr(jobs, "PAUSE_QUEUE", 0.1)
    inside = []

    def submit(job):
        if any(not taken.done() for taken in inside):
            raise RuntimeError("QOSMaxSubmitJobPerUserLimit")
        inside.append(job.start())
        return job

    runs = [fake_run(tmp_path, name, "--seconds", "0.3") for name in ("a", "b", "c")]
    assert jobs.launch(runs, tmp_path / "logs", [{}] * 2, 1, SimpleNamespace(submit=submit)) == []
    assert len(inside) == 3 and all(run.is_finished for run in runs)
    executor = SimpleNamespace(submit=lambda job: 1 / 0)
    with pytest.raises(DivideMixError, match="division by zero"):
        jobs.launch([fake_run(tmp_path, "d")], tmp_path / "logs", [{}], 1, executor)


def test_a_job_that_is_lost_is_a_failure(tmp_path, monkeypatch):
    """A node that died: its run would stand as finished, or end the command."""
    monkeypatch.setattr(jobs, "PAUSE_QUEUE", 0)
    lost = SimpleNamespace(done=lambda: True, exception=lambda: RuntimeError("NODE_FAIL"))
    run = fake_run(tmp_path, "lost")
    [line] = jobs.launch([run], tmp_path / "logs", [{}], 1, SimpleNamespace(submit=lambda job: lost))
    assert "lost: failed: its job was lost" in line


def test_what_slurm_is_told(tmp_path, monkeypatch):
    """A job of the default five minutes, or without a card; of a laptop's user a stack trace of submitit."""
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    parameters = {"slurm_time": 90, "slurm_gpus_per_node": 1, "slurm_partition": "small"}
    executor = jobs.slurm_executor(tmp_path, **parameters, slurm_additional_parameters={"qos": "high"})
    script = executor._executor._make_submission_file_text("", "")
    for asked in ("--partition=small", "--gpus-per-node=1", "--time=90", "--qos=high", "--job-name=dividemix"):
        assert f"#SBATCH {asked}\n" in script
    assert os.environ["PYTHONPATH"] == f"{rows.ROOT}:mine"
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: -1))
    with pytest.raises(DivideMixError, match=r"--launcher slurm: .*srun"):
        jobs.slurm_executor(tmp_path)
