"""A run that is stopped in the middle of its epochs, again and again, ends as one that was left alone: all
scripts, with a worker that reads images."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.data import make_cifar10
from helpers.runs import assert_same_run, read_records
from helpers.scripts import CLOTHING1M, FOLDER, ROOT, SMALL_NET, WEBVISION, end_of, tiny
from helpers.trees import make_webvision

import Train_cifar
from dividemix.noise import file as noise_file
from dividemix.report import report

CIFAR = SimpleNamespace(main=Train_cifar, lr=0.02)
OWN = SimpleNamespace(main=FOLDER.main, make=FOLDER.make, lr=0.02, size=["--lr", "0.02", "--weights", "none"])
# Two epochs of warm-up, two divided ones; in the last the learning rate drops.
SCHEDULE = ["--warm_up", "2", "--lr_drop", "3", "--num_epochs", "4"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: [])


@pytest.fixture
def flags(tmp_path):
    """-> the flags of a script's run in a folder."""

    def flags(script, folder: Path) -> list[str]:
        if script is CIFAR:
            return [*tiny(tmp_path, "--run_dir", str(folder)), *SCHEDULE]
        if not (tmp_path / "data").exists():
            script.make(tmp_path / "data", noise=0.2, sides=(16, 24))
        data = ["--data_path", str(tmp_path / "data"), *SMALL_NET, *script.size, "--workers", "1"]
        return [*data, *SCHEDULE, "--run_dir", str(folder)]

    return flags


@pytest.mark.slow
@pytest.mark.parametrize("script", [CIFAR, CLOTHING1M, WEBVISION, OWN], ids=lambda script: script.main.__name__)
def test_stopped_in_each_epoch(tmp_path, monkeypatch, capsys, flags, script):
    """Stopped in the second warm-up epoch, in the first divided one and in that where the learning rate drops, when
    net 1 has learned and net 2 has not: something of the epoch that was cut off, or a rate, is left in what follows."""
    assert end_of(script.main, flags(script, tmp_path / "straight"), monkeypatch) == 0
    for epoch in (1, 2, 3):
        phases = iter(range(4))  # of two networks: of one epoch, and of the next

        def stop(function, phases=phases):
            def phase(*args, **kwargs):
                terms = function(*args, **kwargs)
                if next(phases) == 3:
                    raise KeyboardInterrupt
                return terms

            return phase

        with monkeypatch.context() as patch:
            for name in ("warmup_epoch", "train_epoch"):
                patch.setattr(script.main, name, stop(getattr(script.main, name)))
            capsys.readouterr()
            assert end_of(script.main, flags(script, tmp_path / "stopped"), monkeypatch) == 130
        said = f"\ninterrupted: the same command continues {tmp_path / 'stopped'} with epoch {epoch}\n"
        assert capsys.readouterr().err.endswith(said)
    assert end_of(script.main, flags(script, tmp_path / "stopped"), monkeypatch) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    assert [record["phase"] for record in read_records(tmp_path / "stopped")] == ["warmup"] * 2 + ["train"] * 2
    assert [record["lr"] for record in read_records(tmp_path / "stopped")] == [script.lr] * 3 + [script.lr / 10]


@pytest.mark.slow
@pytest.mark.parametrize("script", [CLOTHING1M, WEBVISION], ids=lambda script: script.main.__name__)
def test_killed_with_its_workers_alive(tmp_path, monkeypatch, flags, script):
    """The main process is killed, its workers notice some seconds later: the same command at once is refused, as if
    another process was training, or reads what they left."""
    code = (
        f"import os, signal, {script.main.__name__} as script; from dividemix.run import checkpoint, options\n"
        "saved = checkpoint.save_last\n"
        "def save(folder, epoch, state):\n"
        "    saved(folder, epoch, state) if epoch < 2 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.save_last = save\n"
        "options.command_line(script.main)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *flags(script, tmp_path / "killed"), "--workers", "2"]
    with open(tmp_path / "output", "w") as output:  # a pipe would stay open for as long as the workers
        killed = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert end_of(script.main, flags(script, tmp_path / "killed"), monkeypatch) == 0
    assert end_of(script.main, flags(script, tmp_path / "straight"), monkeypatch) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


# ---- Other settings, other places ----


def test_another_number_of_classes_is_refused(tmp_path, monkeypatch, capsys, flags):
    """The heads of the networks would not fit: it must be said by the flag's name, and the run stay as it is."""
    make_webvision(tmp_path / "data", noise=0, num_class=12, sides=(16, 24))
    start = [*flags(WEBVISION, tmp_path / "run"), "--workers", "0", "--num_epochs", "1"]
    assert end_of(WEBVISION.main, start, monkeypatch) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert end_of(WEBVISION.main, [*start, "--num_class", "12", "--num_epochs", "2"], monkeypatch) == 1
    assert "(--num_class was 10, now 12)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_data_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Data on a read-only mount, the rule on shared machines: the run ends before it begins."""
    folder = make_cifar10(tmp_path / "data", 64, 20)
    write = noise_file.write_atomically

    def read_only(path, content, exclusive=False):
        if path.parent == folder:
            raise OSError(30, "Read-only file system", str(path))
        write(path, content, exclusive)

    monkeypatch.setattr(noise_file, "write_atomically", read_only)
    start = tiny(
        tmp_path, "--dataset", "cifar10", "--data_path", str(tmp_path / "data"), "--run_dir", f"{tmp_path}/run"
    )
    for epochs in ("1", "2"):
        assert end_of(Train_cifar, [*start, "--num_epochs", epochs], monkeypatch) == 0, capsys.readouterr().err
    own = tmp_path / "run" / "0.5_sym.json"
    assert len(json.loads(own.read_text())) == 64 and not list(folder.glob("*.json"))
    assert f"saved as {own}" in capsys.readouterr().out and len(read_records(tmp_path / "run")) == 2
