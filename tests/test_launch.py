"""Runs as jobs: with scripts that only write run folders (fake_script.py), through the real submitit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from dividemix import DivideMixError, experiments, launch, measured, status
from dividemix.jobs import Command, Job, is_alive
from dividemix.launch import FAILED, FINISHED, NOT_RUN, QUEUED, STOPPED, Slot
from dividemix.plan import Plan

FAKE = Path(__file__).parent / "fake_script.py"
ROW = experiments.every_row()[0]


def fake_run(out: Path, name: str, *flags: str, epochs: int = 2, missing: str = "") -> Plan:
    folder = out / name
    words = (sys.executable, str(FAKE), "--run_dir", str(folder), "--num_epochs", str(epochs), *flags)
    return Plan(ROW, 123, folder, words, epochs, missing, f"_num_epochs-{epochs}")


def go(out: Path, runs: list[Plan], slots: int = 2, meanwhile=None, launcher="local", parameters=None, size=1):
    """-> (tasks, the signal). meanwhile: called in a thread with the tasks."""
    tasks = launch.make_tasks(runs, out / "logs")
    with launch.session_folder(out) as session:
        executor = launch.make_executor(launcher, session, parameters or {"timeout_min": 60})
        if meanwhile:
            threading.Thread(target=meanwhile, args=(tasks,), daemon=True).start()
        places = [Slot({"OMP_NUM_THREADS": "1"}, size)] * slots
        number = launch.launch(tasks, places, executor, session, status.Lines(False), launcher == "slurm")
    return tasks, number


def starts(task: launch.Task) -> int:
    return (task.run.folder / "times").read_text().count("start")


def when(condition, number: int, tasks) -> None:
    """Send this process a signal as soon as `condition` holds."""
    while not condition(tasks):
        time.sleep(0.05)
    os.kill(os.getpid(), number)


def has_epoch(tasks) -> bool:
    return all(measured.read(task.run.folder).records for task in tasks)


# ---- On this machine ----


def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    """One bad row, and a night's queue behind it is lost; or a run that is finished is trained again."""
    done = fake_run(tmp_path, "done")
    subprocess.run(done.command, check=True)
    runs = [fake_run(tmp_path, "fails", "--fail"), done, fake_run(tmp_path, "lacks", missing="needs CIFAR-10 in x")]
    runs += [fake_run(tmp_path, "no result", "--quiet"), fake_run(tmp_path, "whole"), fake_run(tmp_path, "more")]
    tasks, number = go(tmp_path, runs)
    assert [task.state for task in tasks] == [FAILED, FINISHED, NOT_RUN, FAILED, FINISHED, FINISHED] and number == 0
    assert tasks[0].note == "error: this one fails"
    assert "error: this one fails" in tasks[0].log.read_text() and str(FAKE) in tasks[0].log.read_text()
    assert tasks[3].note == f"ended without error, and without 2 epochs and a result in {tmp_path}/no result"
    assert starts(tasks[1]) == 1 and not tasks[2].run.folder.exists()
    assert not list(tmp_path.glob(".session-*"))  # pickles and empty logs of submitit
    assert launch.summary(tasks) == "3 finished, 2 failed, 1 not run"
    out = capsys.readouterr().out
    assert "cifar10-sym-20-ce seed 123: failed: error: this one fails" in out and "queued" not in out
    spans = [(task.run.folder / "times").read_text().split() for task in (tasks[4], tasks[5])]
    assert all(span[2] == "1" for span in spans)  # OMP_NUM_THREADS of the slot


@pytest.mark.slow
def test_slots_are_never_exceeded_and_all_used(tmp_path):
    """More runs at once than asked for do not fit in a card's memory; fewer leave it idle."""
    runs = [fake_run(tmp_path, f"run{k}", "--seconds", "3") for k in range(4)]
    tasks, _ = go(tmp_path, runs, slots=2)
    spans = [[float(line.split()[1]) for line in (r.folder / "times").read_text().splitlines()] for r in runs]
    at_once = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(at_once) == 2 and all(task.state == FINISHED for task in tasks)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_all_runs_cleanly_and_the_same_command_continues_them(tmp_path, number):
    """Ctrl-C loses hours of every run under way, or leaves processes behind that hold cards and folders."""
    runs = [fake_run(tmp_path, f"run{k}", "--seconds", "0.3", epochs=40) for k in range(2)]
    waits = fake_run(tmp_path, "waits")
    tasks, heard = go(tmp_path, [*runs, waits], meanwhile=lambda tasks: when(lambda t: has_epoch(t[:2]), number, tasks))
    assert heard == number and [task.state for task in tasks] == [STOPPED] * 3
    for task in tasks[:2]:
        assert task.log.read_text().splitlines()[-1] == "interrupted: by SIGTERM"  # once, and not killed
        assert 0 < len(task.found.records) < 40 and not is_alive(pid_of(task))
    assert not waits.folder.exists() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    short = [fake_run(tmp_path, run.name, epochs=len(measured.read(run.folder).records) + 1) for run in runs]
    again, _ = go(tmp_path, short)
    assert all(task.state == FINISHED and "begins with epoch 0" in task.log.read_text() for task in again)
    assert all(starts(task) == 2 and len(task.found.records) == task.run.num_epochs for task in again)


def pid_of(task: launch.Task) -> int:
    return int((task.run.folder / "times").read_text().split()[3])


@pytest.mark.slow
def test_a_second_signal_kills(tmp_path):
    """A run that hangs, in a driver or on a dead disk, keeps the command from ever ending."""

    def twice(tasks):
        when(has_epoch, signal.SIGINT, tasks)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    tasks, number = go(
        tmp_path, [fake_run(tmp_path, "deaf", "--deaf", "--seconds", "0.2", epochs=900)], meanwhile=twice
    )
    assert number == signal.SIGINT and tasks[0].state == STOPPED and not is_alive(pid_of(tasks[0]))


def test_which_processes_are_there():
    """Runs whose command was killed train on, for as long as a script that started the command does not notice."""
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(os.getpid()) and not is_alive(ended.pid)
    ended.wait()
    assert not is_alive(ended.pid)


@pytest.mark.slow
def test_runs_end_when_the_command_is_killed(tmp_path):
    """Else they train on unseen, and the same command finds their folders locked."""
    driver = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_launch import fake_run, go
go(Path({str(tmp_path)!r}), [fake_run(Path({str(tmp_path)!r}), "run", "--seconds", "0.2", epochs=900)])
"""
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.DEVNULL)
    task = launch.make_tasks([fake_run(tmp_path, "run", epochs=900)], tmp_path / "logs")[0]
    while not has_epoch([task]):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()  # and its parent, a shell script perhaps, does not ask how it ended
    give_up = time.monotonic() + 60
    while is_alive(pid_of(task)) and time.monotonic() < give_up:
        time.sleep(0.1)
    process.wait()
    assert not is_alive(pid_of(task)) and task.log.read_text().splitlines()[-1] == "interrupted: by SIGTERM"


# ---- Where ----


def test_slots_of_cards_and_cores(monkeypatch):
    """Two runs on the first card while the second idles, or eight runs that start 64 threads each."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    envs = [slot.env for slot in launch.local_slots(["0", "GPU-b"], 2, 16)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in envs] == ["0", "GPU-b", "0", "GPU-b"]
    assert all(env["OMP_NUM_THREADS"] == "4" for env in envs)
    assert [slot.env for slot in launch.local_slots([], 3, 2)] == [{"OMP_NUM_THREADS": "1"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch.local_slots([], 1, 2) == [Slot({})]


def test_cards_are_those_that_are_visible(monkeypatch):
    """In a container that was given cards 2 and 3, run 0 would be sent to a card that is not there."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.visible_cards(None) == ["0", "1"] and launch.visible_cards("1") == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-b")
    assert launch.visible_cards(None) == ["2", "GPU-b"]
    with pytest.raises(DivideMixError, match=r"--gpus 0: expected cards of 2, GPU-b"):
        launch.visible_cards("0")


# ---- On a cluster ----


def test_a_run_whose_node_was_taken_away_is_submitted_again(tmp_path):
    """A preempted job, which is the rule in many queues, would count as failed and stop its row at epoch 40."""
    run = fake_run(tmp_path, "run", epochs=2)
    ends = iter([143, None, 0])
    submitted = []

    def submit(job):
        [command] = job.commands
        submitted.append(command)
        status = next(ends)
        if status is not None:
            job.write(f"{command.name}.json", f'{{"status": {status}}}')
        if status == 0:
            subprocess.run(run.command, check=True)
        return SimpleNamespace(done=lambda _: True)

    tasks, session = launch.make_tasks([run], tmp_path / "logs"), tmp_path / "session"
    session.mkdir()
    executor = SimpleNamespace(submit=submit)
    assert launch.launch(tasks, [Slot()], executor, session, status.Lines(True), True) == 0
    assert tasks[0].state == FINISHED and len(submitted) == 3
    ends = iter([None] * 9)
    tasks = launch.make_tasks([fake_run(tmp_path, "never")], tmp_path / "logs")
    launch.launch(tasks, [Slot()], executor, session, status.Lines(True), True)
    assert tasks[0].state == FAILED and len(submitted) == 3 + launch._TRIES
    assert tasks[0].note.startswith("its job ended without a word; see ") and (session / "keep").exists()


def test_a_queue_that_takes_no_more_jobs_is_asked_again(tmp_path, capsys):
    """A limit of so many jobs a user would end the command, with the jobs that were taken training on unseen."""
    runs, inside, submitted = [fake_run(tmp_path, name) for name in ("a", "b", "c")], [], []

    def submit(job):
        submitted.append(job)
        if inside:
            raise RuntimeError("QOSMaxSubmitJobPerUserLimit")
        [command] = job.commands
        inside.append(command)

        def done(_):
            subprocess.run(command.words, check=True)
            job.write(f"{command.name}.json", '{"status": 0}')
            inside.clear()
            return True

        return SimpleNamespace(done=done)

    tasks, session = launch.make_tasks(runs, tmp_path / "logs"), tmp_path / "session"
    session.mkdir()
    executor = SimpleNamespace(submit=submit)
    assert launch.launch(tasks, [Slot()] * 3, executor, session, status.Lines(True), True) == 0
    assert [task.state for task in tasks] == [FINISHED] * 3
    assert "QOSMaxSubmitJobPerUserLimit; tried again when another job has ended" in capsys.readouterr().out

    assert len(submitted) == 5  # each of b and c once more, when the one before had ended

    inside.append("somebody else's")
    tasks = launch.make_tasks([fake_run(tmp_path, "d")], tmp_path / "logs")
    with pytest.raises(DivideMixError, match="a job could not be submitted: QOSMax"):
        launch.launch(tasks, [Slot()], executor, session, status.Lines(True), True)
    assert (session / "stop").exists()


@pytest.mark.parametrize("retry", [300.0, 0.0])
def test_a_queue_that_fails_once_is_filled_again(tmp_path, monkeypatch, retry):
    """One timeout of sbatch, and a hundred slots would be one for the rest of the week."""
    runs, now, most, calls = [fake_run(tmp_path, f"run{k}") for k in range(9)], set(), [], []

    def submit(job):
        calls.append(job)
        if len(calls) == 2:
            raise RuntimeError("Socket timed out")
        [command] = job.commands
        now.add(command.name)
        most.append(len(now))

        def done(_):
            if retry == 0 and len(calls) < 5:
                return False  # a job of a day: it is not waited for
            subprocess.run(command.words, check=True)
            job.write(f"{command.name}.json", '{"status": 0}')
            now.discard(command.name)
            return True

        return SimpleNamespace(done=done)

    tasks, session = launch.make_tasks(runs, tmp_path / "logs"), tmp_path / "session"
    session.mkdir()
    monkeypatch.setattr(launch, "_RETRY", retry)
    launch.launch(tasks, [Slot()] * 4, SimpleNamespace(submit=submit), session, status.Lines(False))
    assert [task.state for task in tasks] == [FINISHED] * 9 and max(most) == 4
    assert most[:2] == ([1, 1] if retry else [1, 2])


def test_a_finished_run_of_another_setting_is_not_the_rows(tmp_path):
    """After a recipe was mended, runs with the old value would stand as finished for ever, and in no table."""
    run = fake_run(tmp_path, "old")
    subprocess.run(run.command, check=True)
    path = run.folder / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"args": {"width": 8, "num_epochs": 2}}))
    [task] = launch.make_tasks([run], tmp_path / "logs")
    assert task.state == FAILED and task.note == f"{run.folder} holds a run with --width 8 (row: 64): move it away"
    [task] = launch.make_tasks([replace(run, variant=f"{run.variant}_width-8")], tmp_path / "logs")
    assert task.state == FINISHED


def test_waiting_jobs_are_cancelled_at_the_first_signal(tmp_path):
    """Ctrl-C would wait for hours until the queue has started jobs that then end at once."""
    cancelled = []
    task = launch.make_tasks([fake_run(tmp_path, "run")], tmp_path / "logs")[0]
    task.state = QUEUED
    active = [launch.Active(SimpleNamespace(cancel=lambda check: cancelled.append(check)), [task], Slot())]
    waits = launch.make_tasks([fake_run(tmp_path, "waits")], tmp_path / "logs")
    assert launch.give_up(waits, active, tmp_path, 1, True, print) == []
    assert cancelled == [False] and waits[0].state == STOPPED and (tmp_path / "stop").exists()


# SLURM's programs, as far as submitit calls them: jobs run on this machine, at once.
SBATCH = """#!/bin/bash
id=$(( $(cat "$FAKE_SLURM/last" 2>/dev/null || echo 100) + 1 )); echo $id > "$FAKE_SLURM/last"
cp "${@: -1}" "$FAKE_SLURM/$id.sh"; "$FAKE_SLURM/go" $id > /dev/null 2>&1 &
echo "Submitted batch job $id"
"""
GO = """#!/bin/bash
export SLURM_JOB_ID=$1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
echo RUNNING > "$FAKE_SLURM/$1.state"; bash "$FAKE_SLURM/$1.sh" & echo $! > "$FAKE_SLURM/$1.pid"; wait
[ -e "$FAKE_SLURM/$1.requeued" ] || echo COMPLETED > "$FAKE_SLURM/$1.state"
"""
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@" > "$FAKE_SLURM/$SLURM_JOB_ID.out" 2>&1
"""
SACCT = """#!/bin/bash
echo "JobID|State"; for f in "$FAKE_SLURM"/*.state; do echo "$(basename "$f" .state)|$(cat "$f")"; done
"""
SCONTROL = """#!/bin/bash
echo PENDING > "$FAKE_SLURM/$2.state"; touch "$FAKE_SLURM/$2.requeued"
( sleep 1; rm "$FAKE_SLURM/$2.requeued"; "$FAKE_SLURM/go" $2 ) > /dev/null 2>&1 &
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """A real queue is asked less often. Ctrl-C is ignored where a shell started the tests in the background."""
    monkeypatch.setattr(launch, "_POLL_QUEUE", 0.3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    programs = {
        "sbatch": SBATCH,
        "go": GO,
        "srun": SRUN,
        "sacct": SACCT,
        "scontrol": SCONTROL,
        "scancel": "#!/bin/bash\n",
    }
    for name, content in programs.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def test_jobs_of_several_runs_through_slurms_programs(tmp_path, slurm):
    """The cluster's path is another one than this machine's, and fails on the first job there."""
    runs = [fake_run(tmp_path, f"run{k}") for k in range(3)]
    parameters = {"timeout_min": 60, "slurm_partition": "small", "gpus_per_node": 1}
    tasks, _ = go(tmp_path, runs, slots=5, launcher="slurm", parameters=parameters, size=2)
    assert [task.state for task in tasks] == [FINISHED] * 3
    scripts = sorted(slurm.glob("*.sh"))
    assert len(scripts) == 2  # two runs share the first job's card
    assert "#SBATCH --partition=small" in scripts[0].read_text() and "--gpus-per-node=1" in scripts[0].read_text()


@pytest.mark.slow
def test_a_job_that_slurm_takes_back_ends_cleanly_and_goes_on(tmp_path, slurm):
    """The warning before preemption kills the script in mid-epoch, or the job is never queued again."""

    def warn(tasks):
        while not has_epoch(tasks):
            time.sleep(0.1)
        children = subprocess.run(
            ["pgrep", "-P", (slurm / "101.pid").read_text().strip()], capture_output=True, text=True
        )
        os.kill(int(children.stdout.split()[0]), signal.SIGUSR2)  # what `srun` became

    run = fake_run(tmp_path, "run", "--seconds", "0.4", epochs=8)
    tasks, _ = go(tmp_path, [run], launcher="slurm", parameters={"timeout_min": 60}, meanwhile=warn)
    assert tasks[0].state == FINISHED and starts(tasks[0]) == 2 and len(tasks[0].found.records) == 8
    log = tasks[0].log.read_text()
    assert "interrupted: by SIGTERM" in log and log.count("begins with epoch 0") == 1
    assert len(list(slurm.glob("*.sh"))) == 1  # the same job, requeued


def test_slurm_that_is_not_here_is_said(tmp_path, monkeypatch):
    """Else the user of a laptop sees a stack trace of submitit."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DivideMixError, match=r"--launcher slurm: .*srun"):
        launch.make_executor("slurm", tmp_path, {})


def test_a_job_writes_how_each_command_ended(tmp_path):
    """A pack of runs of which one fails would fail as a whole, or hide the failure."""
    words = [(sys.executable, "-c", f"import sys; print('hello'); sys.exit({k})") for k in (0, 3)]
    commands = [Command(f"c{k}", each, tmp_path / "logs" / f"{k}.log") for k, each in enumerate(words)]
    assert Job(commands, tmp_path, None)() == {"c0": 0, "c1": 3}
    assert (tmp_path / "c1.json").read_text() == '{"status": 3}' and (tmp_path / "c0.started").exists()
    assert (tmp_path / "logs" / "1.log").read_text().splitlines()[-1] == "hello"
