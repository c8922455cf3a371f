"""Killed and interrupted: whenever it happens, the same command ends as a run that was left alone."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers.runs import Forked, assert_same_run, begin, end_epoch, go_on, last_epoch, opened, read_records, validated

from dividemix import files
from dividemix.run import checkpoint, logs, signals

ACCURACIES = [(60.0, 60.0), (70.0, 50.0), (65.0, 80.0)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    go_on(folder, ACCURACIES)
    return folder


def assert_logs_are_not_ahead(folder: Path) -> None:
    """Of the checkpoint that a run goes on from: else a number is published that no weights belong to."""
    state = checkpoint.load_last(folder) or {"records": []}
    records = read_records(folder) if (folder / "metrics.jsonl").exists() else []
    assert [record["epoch"] for record in records] == [*range(len(records))] and len(records) <= len(state["records"])


# ---- Killed, without a word ----


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(folder: Path, moment: str) -> None:
    """From now on, in the epoch 1 of this process."""
    replace, line = os.replace, logs.metric_line

    def killing_replace(source, target):
        begun = moment == "epoch-001.pt" or (folder / "epoch-001.pt").exists()
        kill() if begun and Path(target).name == moment else replace(source, target)

    files.os.replace = killing_replace
    if moment == "logs":
        logs.metric_line = lambda record: kill() if record["epoch"] == 1 else line(record)


@pytest.mark.parametrize(("moment", "left"), [("epoch-001.pt", 0), ("last.json", 0), ("best.pt", 1), ("logs", 1)])
def test_killed_while_an_epoch_is_written(straight, tmp_path, moment, left):
    """Else half a file is taken for a checkpoint, best.pt is not of the best epochs, or another run goes on."""
    folder = tmp_path / "run"

    def main(_):
        kill_at(folder, moment)
        go_on(folder, ACCURACIES)

    status, out, err = Forked(tmp_path / "output", main).end()
    assert (status, err) == (-signal.SIGKILL, "") and "epoch 1/2" in out
    assert last_epoch(folder) == left
    assert_logs_are_not_ahead(folder)
    go_on(folder, ACCURACIES)
    assert_same_run(folder, straight)


def test_killed_at_random_moments(tmp_path):
    """A cluster that takes its nodes back again and again: the run must end as if it had been left alone."""
    accuracies = [(float(epoch % 7), float(epoch % 5)) for epoch in range(20)]
    go_on(tmp_path / "straight", accuracies)
    folder, moments, seen = tmp_path / "run", random.Random(0), []

    def main(ready):
        ready()
        go_on(folder, accuracies)

    for _ in range(6):
        process = Forked(tmp_path / "output", main)
        process.wait()
        time.sleep(moments.uniform(0, 0.3))
        process.send(signal.SIGKILL)
        process.end()
        assert_logs_are_not_ahead(folder)
        seen.append(last_epoch(folder))
    assert seen == sorted(seen)
    go_on(folder, accuracies)
    assert_same_run(folder, tmp_path / "straight")


# ---- SIGTERM and Ctrl-C ----


def wait_in(folder: Path, where: str, seconds: float):
    """-> main of a run that waits in its epoch 1: in training, or while that is written"""

    def main(ready):
        saved = checkpoint.save_last

        def wait(epoch, here):
            if (epoch, here) == (1, where):
                ready()
                time.sleep(seconds)

        def save(folder, epoch, state):
            wait(epoch, "save")
            saved(folder, epoch, state)

        checkpoint.save_last = save
        go_on(folder, ACCURACIES, in_epoch=lambda run: wait(run.epoch, "epoch"))

    return main


@pytest.mark.parametrize(
    ("number", "status", "where", "seconds", "done"),
    [(signal.SIGTERM, 143, "epoch", 60, 1), (signal.SIGINT, 130, "save", 1, 2)],
    ids=["TERM in an epoch", "INT while one is saved"],
)
def test_a_signal_ends_a_run_cleanly(straight, tmp_path, number, status, where, seconds, done):
    """Else the run is left damaged, or nobody is told that it can go on. What was being written is completed."""
    folder = tmp_path / "run"
    process = Forked(tmp_path / "output", wait_in(folder, where, seconds))
    process.wait()
    process.send(number)
    ended, _, err = process.end()
    assert ended == status and err.endswith(f" continues {folder} with epoch {done}\n"), err
    assert err.count("\n") == 2  # one of them ends the line of the bar
    assert last_epoch(folder) == done - 1
    go_on(folder, ACCURACIES)
    assert_same_run(folder, straight)


def test_a_second_signal_kills(straight, tmp_path):
    """A disk that hangs: the user who presses Ctrl-C again waits for it for ever."""
    process = Forked(tmp_path / "output", wait_in(tmp_path / "run", "save", 120))
    process.wait()
    while process.process.is_alive():
        process.send(signal.SIGTERM)
        time.sleep(0.2)  # for the first to be noticed
    assert process.end()[0] == -signal.SIGTERM
    go_on(tmp_path / "run", ACCURACIES)
    assert_same_run(tmp_path / "run", straight)


def test_ctrl_c_while_the_figures_are_drawn(tmp_path):
    """A run that is done is said to continue with an epoch that there is not."""
    with pytest.raises(KeyboardInterrupt) as stopped, opened(tmp_path / "run") as run:
        begin(run)
        for _ in run.epochs(1):
            end_epoch(run, validated())
        raise KeyboardInterrupt
    [note] = stopped.value.__notes__
    assert "result" in note and "epoch" not in note


def test_signals_that_are_not_ours_are_left_alone(monkeypatch):
    """Several ranks wait in collectives, nohup's commands ignore Ctrl-C, and who calls main has handlers of his own."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with signals.stoppable():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with signals.stoppable():
            assert [signal.getsignal(number) for number in numbers] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.stoppable():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
