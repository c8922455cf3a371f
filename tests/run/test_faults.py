"""Faults of machines and people: a run survives them, or refuses in one line; either way nothing is lost.

More of them in test_run.py (damaged checkpoints and pointers, code in a checkpoint, two processes in one folder),
test_bad_input.py (folders) and test_noise.py (a data folder that cannot be written).
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.data import make_cifar10
from helpers.runs import assert_equal, begin, end_epoch, last_state, opened, validated, without_times
from helpers.scripts import ROOT, SMALL_NET, end_of, tiny
from helpers.trees import make_webvision

import PreResNet
import Train_cifar
from dividemix import DivideMixError, DivideMixWarning, files
from dividemix.report import report
from dividemix.run import checkpoint, run, signals

EPOCHS = 3  # one of warm-up
NEW_RUN = ["--num_epochs", str(EPOCHS)]

# The real script in a process of its own, with something added: figures, which take seconds, are left out.
SCRIPT = """
import os, resource, signal, sys, time, types
from pathlib import Path
nothing = types.SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
sys.modules["dividemix.report"] = types.SimpleNamespace(of_finished=lambda _: None)
sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=lambda *_, **__: nothing)
import torch
import Train_cifar
from dividemix import engine
from dividemix.run import checkpoint, options, run
torch.set_num_threads(1)
{added}
options.command_line(Train_cifar.main)
"""


def start(folder: Path, added: str = "", *flags: str) -> subprocess.Popen:
    """A run of three epochs in `folder`, in a process that has `added` at its beginning."""
    argv = [*tiny(folder.parent, "--run_dir", str(folder)), *NEW_RUN, *flags]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(added=added), *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
        **{"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def go_on(folder: Path, *flags: str) -> dict:
    return Train_cifar.main([*tiny(folder.parent, "--run_dir", str(folder)), *NEW_RUN, *flags])


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: [])
        go_on(folder)
    return folder


@pytest.fixture
def begun(whole, tmp_path) -> Path:
    """A copy of that run as it was before its last epoch: state and logs."""
    folder = shutil.copytree(whole, tmp_path / "run")
    pointer = json.loads((folder / "last.json").read_text())
    (folder / pointer["file"]).unlink()
    (folder / "last.json").write_text(json.dumps(pointer["previous"] | {"previous": None}))
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    """Bit for bit: weights, momentum, losses, divisions, records; the logs; and nothing temporary is left."""
    assert_equal(last_state(folder), last_state(whole))
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").open()] for each in (folder, whole)]
    assert [without_times(r) for r in lines[0]] == [without_times(r) for r in lines[1]]
    for name in ("acc.txt", "stats.txt"):
        assert (folder / name).read_text() == (whole / name).read_text()
    best = [torch.load(each / "best.pt", weights_only=True) for each in (folder, whole)]
    assert_equal(*best)
    assert not temporary(folder)


def temporary(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def last_epoch(folder: Path) -> int:
    """Of which last.json speaks; -1 where there is none."""
    file = folder / "last.json"
    return json.loads(file.read_text())["epoch"] if file.exists() else -1


def assert_logs_are_not_ahead(folder: Path) -> None:
    """Of the checkpoint that a run goes on from: else a number is published that no weights belong to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivideMixWarning)
        state = checkpoint.load_last(folder) or {"records": []}
    epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(len(epochs))) and len(epochs) <= len(state["records"])
    assert len((folder / "acc.txt").read_text().splitlines()) <= len(epochs) + 1


# ---- 1, 2: killed ----

# When the checkpoint of epoch 1 comes to be written, {instead} is done first.
AT_EPOCH_1 = """
saved = checkpoint.save_last
def save(folder, epoch, state):
    if epoch == 1:
        {instead}
    saved(folder, epoch, state)
checkpoint.save_last = save
"""

KILL = """
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
replaced = os.replace
def replace(source, target):
    kill() if Path(target).name == at else replaced(source, target)
"""


@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        pytest.param("at = 'epoch-001.pt'; os.replace = replace", 1, id="before the rename"),
        # The checkpoint is there, last.json names the one before.
        pytest.param("at = 'last.json'; os.replace = replace", 1, id="before last.json", marks=pytest.mark.slow),
        pytest.param("run.logs.metric_line = kill", 2, id="before the logs", marks=pytest.mark.slow),
    ],
)
def test_killed_while_a_checkpoint_is_written(whole, tmp_path, moment, kept):
    """The out-of-memory killer or a power cut takes a run at its worst moment: half a file is taken for a checkpoint,
    or the run that goes on is another one."""
    folder = tmp_path / "run"
    instead = f"global at; {moment}"
    status, out, err = end(start(folder, KILL + AT_EPOCH_1.format(instead=instead)))
    assert (status, err) == (-signal.SIGKILL, "") and "epoch 1/2" in out
    assert len(temporary(folder)) == (kept == 1)
    assert_logs_are_not_ahead(folder)
    assert last_epoch(folder) == kept - 1
    go_on(folder)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """A cluster that takes its nodes back ten times: the run must end as if it had been left alone."""
    flags = ["--num_epochs", "16", "--save_scores"]
    go_on(tmp_path / "straight" / "run", *flags)
    folder, moments, seen = tmp_path / "run", random.Random(0), []
    for _ in range(10):
        process = start(folder, "", *flags)
        while process.stdout.readline().startswith("run folder") is False:
            assert process.poll() is None, process.stderr.read()
        time.sleep(moments.uniform(0, 1))
        process.kill()
        process.communicate()
        assert_logs_are_not_ahead(folder)
        seen.append(last_epoch(folder))
    assert seen == sorted(seen)
    go_on(folder, *flags)
    assert_same_run(folder, tmp_path / "straight" / "run")


# ---- 3: a full disk ----


def assert_full(status: int, err: str, folder: Path, epoch: int) -> None:
    line = f"error: epoch {epoch} could not be written to {folder} as a whole (File too large): make room, then"
    assert status == 1 and err == f"{line} the same command continues {folder} with epoch {epoch}\n"
    assert last_epoch(folder) == epoch - 1 and not temporary(folder)
    assert len(checkpoint.load_last(folder)["records"]) == epoch  # whole: its sum is right
    assert_logs_are_not_ahead(folder)


@pytest.mark.slow
def test_a_disk_that_is_full(whole, tmp_path):
    """Hours are lost to a quota: the old checkpoint is destroyed by the new one, or a run ends as if it was saved."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
    status, out, err = end(start(tmp_path / "run", AT_EPOCH_1.format(instead=limit)))
    assert_full(status, err, tmp_path / "run", 1)
    assert "epoch 1/2" in out and "best" in out
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_disk_that_is_full_in_the_last_epoch(begun, whole, monkeypatch):
    """No epoch follows whose end would say so: the run ends with its best words and without its last epoch."""
    with monkeypatch.context() as patch:
        saved = checkpoint.save_last

        def full(_):
            raise OSError(28, "No space left on device")

        def save(*args):
            patch.setattr(files.os, "fsync", full)
            saved(*args)

        patch.setattr(checkpoint, "save_last", save)
        with pytest.raises(
            DivideMixError, match=r"epoch 2 could not be written .*No space left.*continues .* with epoch 2"
        ):
            go_on(begun)
    assert not temporary(begun) and not (begun / "epoch-002.pt").exists()
    go_on(begun)
    assert_same_run(begun, whole)


def test_an_error_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    """Two things go wrong at once: what ended the run is said, and that the last epoch is not saved."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(DivideMixError, match="the first fault"),
        pytest.warns(UserWarning, match="epoch 0 could not be written"),
        opened(tmp_path / "run") as this,
    ):
        begin(this)
        monkeypatch.setattr(checkpoint, "save_last", full)
        for _ in this.epochs(3):
            end_epoch(this, validated(60.0, 60.0))
            raise DivideMixError("the first fault")


# ---- 7: the same folder, another run ----


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--r", "0.2"), ("--noise_mode", "asym"), ("--width", "5"), ("--seed", "1"), ("--dataset", "cifar10")],
)
def test_a_folder_of_another_run_is_refused(whole, tmp_path, flag, value):
    """Half of a run's epochs would be of one data set or noise, and half of another, under one number."""
    folder = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    batches = make_cifar10(tmp_path / "data", 64, 20)
    with pytest.raises(DivideMixError, match=rf"{flag} was \S+, now {value}.*--id, or --fresh"):
        go_on(folder, flag, value, "--data_path", str(batches.parent))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ---- 8: leftovers ----


def test_temporary_files_of_a_killed_process_are_cleaned(begun, whole):
    """Each is as large as a checkpoint: a few kills fill a quota."""
    (begun / ".epoch-002.pt.abc.tmp").write_bytes(b"half")
    (begun / "scores" / ".epoch_002.npz.abc.tmp").write_bytes(b"half")
    go_on(begun)
    assert_same_run(begun, whole)


# ---- 9: SIGTERM and Ctrl-C ----

IN_AN_EPOCH = """
def wait(*_, **__):
    print("now", flush=True)
    time.sleep(120)
Train_cifar.train_epoch = wait
"""
IN_A_SAVE = AT_EPOCH_1.format(instead="print('now', flush=True); time.sleep({seconds})")


def send(process: subprocess.Popen, number: int) -> None:
    """The signal, once the process says 'now'."""
    for line in process.stdout:
        if line == "now\n":
            break
    process.send_signal(number)


@pytest.mark.parametrize(
    ("where", "epoch", "number", "status"),
    [
        (IN_AN_EPOCH, 1, signal.SIGTERM, 143),
        (IN_A_SAVE.format(seconds=2), 2, signal.SIGINT, 130),
        pytest.param(IN_AN_EPOCH, 1, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(IN_A_SAVE.format(seconds=2), 2, signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM in an epoch", "Ctrl-C in a save", "Ctrl-C in an epoch", "SIGTERM in a save"],
)
def test_a_signal_ends_a_run_cleanly(whole, tmp_path, where, epoch, number, status):
    """A queue's time limit, or a user's Ctrl-C: the run is left damaged, or nobody is told that it can go on. What was
    being written is completed."""
    process = start(tmp_path / "run", where)
    send(process, number)
    ended, _, err = end(process)
    line = f"interrupted: the same command continues {tmp_path / 'run'} with epoch {epoch}"
    assert (ended, err) == (status, f"\n{line}\n")
    assert last_epoch(tmp_path / "run") == epoch - 1 and not temporary(tmp_path / "run")
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_second_signal_kills(whole, tmp_path):
    """A disk that hangs: the user who presses Ctrl-C again waits for it for ever."""
    process = start(tmp_path / "run", IN_A_SAVE.format(seconds=120))
    send(process, signal.SIGTERM)
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < 60:
        time.sleep(0.5)  # for the first to be noticed
        process.send_signal(signal.SIGTERM)
    assert end(process)[0] == -signal.SIGTERM
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_signal_before_the_first_epoch_is_done(tmp_path):
    """The words must not promise a checkpoint that is not there."""
    process = start(tmp_path / "run", IN_AN_EPOCH.replace("train_epoch", "warmup_epoch"))
    send(process, signal.SIGTERM)
    assert end(process)[::2] == (143, "\ninterrupted: the same command starts again\n")


@pytest.mark.slow
def test_a_signal_ends_the_workers(tmp_path):
    """Processes that live on hold the memory of the card's machine, and of the next job's."""
    tree = make_webvision(tmp_path / "data", n_train=60, sides=(16, 32))
    flags = ["--data_path", str(tree), "--num_class", "10", "--workers", "2", "--run_dir", str(tmp_path / "run")]
    command = [sys.executable, str(ROOT / "Train_webvision.py"), *SMALL_NET, *flags, "--num_epochs", "500"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(signal.SIGTERM)
    status, _, err = end(process)
    assert status == 143 and err.splitlines()[-1].startswith("interrupted: the same command continues"), err
    assert "Traceback" not in err, err
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_signals_that_are_not_ours_are_left_alone(monkeypatch):
    """Among several ranks one that waits in a collective would not come to a handler; nohup's commands ignore Ctrl-C;
    and whoever calls a script's main has handlers of his own afterwards."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals.stoppable():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    with signals.stoppable():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.delenv("WORLD_SIZE")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.stoppable():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])


# ---- 11, 12: numbers that nothing can be learnt from ----


def test_a_learning_rate_that_explodes(whole, tmp_path, monkeypatch, capsys):
    """A run of NaN goes on for days, and its checkpoints are overwritten with it. The one before stays."""
    folder = shutil.copytree(whole, tmp_path / "run")
    kept = last_state(folder)
    explode = [*tiny(tmp_path, "--run_dir", str(folder)), "--num_epochs", "5"]
    set_rate = Train_cifar.set_learning_rate
    monkeypatch.setattr(Train_cifar, "set_learning_rate", lambda optimizers, _: set_rate(optimizers, 1e20))
    assert end_of(Train_cifar, explode, monkeypatch) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: epoch 3: .*not finite at batch \d+ of \d+, .*Likely causes: --lr too high.*\n", err), (
        err
    )
    assert_equal(last_state(folder), kept)


def test_a_learning_rate_that_explodes_at_once(tmp_path, monkeypatch, capsys):
    """The user's own 1e20."""
    assert end_of(Train_cifar, tiny(tmp_path, "--run_dir", f"{tmp_path}/run", "--lr", "1e20"), monkeypatch) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: epoch 0: .*not finite at batch \d+ of \d+, .*--lr too high.*\n", err), err
    assert not list((tmp_path / "run").glob("*.pt"))


def test_losses_that_are_all_equal(tmp_path, monkeypatch, capsys):
    """A dead network divides nothing: 0 / 0 would call all labels wrong, or all right."""
    state = PreResNet.ResNet18(10, 4).state_dict()
    state["linear.weight"].zero_()
    state["linear.bias"].zero_()
    torch.save({"nets": [state, state]}, tmp_path / "dead.pt")
    flags = ["--init_from", f"{tmp_path}/dead.pt", "--lr", "1e-30", "--run_dir", f"{tmp_path}/run"]
    assert end_of(Train_cifar, tiny(tmp_path, *flags), monkeypatch) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "losses are equal" in err and err.count("\n") == 1
    assert last_epoch(tmp_path / "run") == 0


# ---- 29 to 35: folders, small files, clocks, seeds ----


def test_an_output_folder_that_is_missing_is_made(whole, tmp_path):
    """A first run on a new machine would end with an error after the data were read."""
    go_on(tmp_path / "not" / "yet" / "there" / "run")
    assert_same_run(tmp_path / "not" / "yet" / "there" / "run", whole)


def test_an_output_folder_that_is_read_only(tmp_path):
    """Must be found at the start, not when the first epoch is to be saved."""
    with pytest.raises(DivideMixError, match=r"/proc/run cannot be written: .*choose --out_dir or --run_dir"):
        Train_cifar.main(tiny(tmp_path, "--run_dir", "/proc/run"))


def test_a_tensorboard_folder_that_cannot_be_written(begun, whole):
    """Extras must not end a run."""
    shutil.rmtree(begun / "tensorboard")
    (begun / "tensorboard").write_text("")
    with pytest.warns(UserWarning, match="no TensorBoard events"):
        go_on(begun)
    assert_same_run(begun, whole)


def test_a_tensorboard_that_fails_later(begun, whole, monkeypatch):
    """A disk that fills up while a run goes on: the checkpoints decide, not the events."""
    from torch.utils.tensorboard import SummaryWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.warns(UserWarning, match="no more TensorBoard events"):
        go_on(begun)
    assert_same_run(begun, whole)


def test_a_clock_that_moved_backwards(begun, whole, monkeypatch):
    """A machine that corrects its clock: the older checkpoint is taken for the last, times are negative, or --fresh
    moves one run over another."""
    state = checkpoint.load_last(begun)
    checkpoint.save_last(begun, 1, state)
    os.utime(begun / "epoch-001.pt", (1, 1))
    monkeypatch.setattr(time, "time", lambda: 1e6)
    go_on(begun)
    assert_same_run(begun, whole)
    records = [json.loads(line) for line in (begun / "metrics.jsonl").open()]
    assert all(value >= 0 for record in records for key, value in record.items() if key.startswith("seconds_"))
    now = run.datetime.datetime(2020, 1, 1)
    monkeypatch.setattr(run, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: now)))
    asides = []
    for _ in range(3):
        asides.append(run.set_aside(begun))
        begun.mkdir()
    assert len(set(asides)) == 3 and (asides[0] / "last.json").exists()


def test_a_default_that_is_given_is_the_default(whole, tmp_path):
    """In the authors' script `--seed 123` made other noise than no --seed, since one was a text."""
    go_on(tmp_path / "run", "--seed", "123")
    assert_same_run(tmp_path / "run", whole)
    labels = [json.loads((folder / "digits_0.5_sym.json").read_text()) for folder in (tmp_path / "run", whole)]
    assert labels[0] == labels[1]
