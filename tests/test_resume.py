"""A run that is stopped in the middle of its epochs, again and again, ends as one that was left alone: all scripts,
with workers that read images."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import assert_same_run, read_records
from helpers.scripts import CIFAR, CLOTHING1M, FOLDER, ROOT, WEBVISION, end_of, small_run

pytestmark = pytest.mark.slow
# Two epochs of warm-up, two divided ones; in the last the learning rate drops.
SCHEDULE = ["--warm_up", "2", "--lr_drop", "3", "--num_epochs", "4", "--workers", "1"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def flags(tmp_path, no_figures):
    """-> the flags of a script's run in a folder."""

    def flags(script, folder: Path) -> list[str]:
        tree = tmp_path / "data"
        if not tree.exists():
            script.make(tree, noise=0.2, sides=(16, 24))
        return small_run(script, tree, tmp_path, *SCHEDULE, "--run_dir", str(folder))

    return flags


@pytest.mark.parametrize("script", [CIFAR, CLOTHING1M, WEBVISION, FOLDER], ids=lambda script: script.id)
def test_stopped_in_each_epoch(tmp_path, monkeypatch, capsys, flags, script):
    """Stopped in the second warm-up epoch, in the first divided one and in that where the learning rate drops, when
    net 1 has learned and net 2 has not: something of the epoch that was cut off, or a rate, is left in what follows."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert end_of(script.main, flags(script, straight), monkeypatch) == 0
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
            assert end_of(script.main, flags(script, stopped), monkeypatch) == 130
        assert capsys.readouterr().err.endswith(f" continues {stopped} with epoch {epoch}\n")
    assert end_of(script.main, flags(script, stopped), monkeypatch) == 0
    assert_same_run(stopped, straight)
    assert [record["phase"] for record in read_records(stopped)] == ["warmup"] * 2 + ["train"] * 2
    assert [record["lr"] for record in read_records(stopped)] == [script.lr] * 3 + [script.lr / 10]


@pytest.mark.parametrize("script", [CLOTHING1M, WEBVISION], ids=lambda script: script.id)
def test_killed_with_its_workers_alive(tmp_path, monkeypatch, flags, script):
    """The main process is killed, its workers notice some seconds later: the same command at once is refused, as if
    another process was training, or reads what they left."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    code = (
        f"import os, signal, {script.main.__name__} as script; from dividemix.run import checkpoint, command_line\n"
        "saved = checkpoint.save_last\n"
        "def save(folder, epoch, state):\n"
        "    saved(folder, epoch, state) if epoch < 2 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.save_last = save\n"
        "command_line(script.main)"
    )
    command = [sys.executable, "-c", code, *flags(script, killed), "--workers", "2"]
    with open(tmp_path / "output", "w") as output:  # a pipe would stay open for as long as the workers
        process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output, check=False)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "output").read_text()
    for folder in (killed, straight):
        assert end_of(script.main, flags(script, folder), monkeypatch) == 0
    assert_same_run(killed, straight)


def test_a_signal_ends_the_workers(tmp_path, flags):
    """Processes that live on hold the memory of the card's machine, and of the next job's."""
    argv = [*flags(WEBVISION, tmp_path / "run"), "--workers", "2", "--num_epochs", "500"]
    command = [sys.executable, str(ROOT / "Train_webvision.py"), *argv]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("interrupted: the same command continues"), err
    assert len(children) >= 2 and not [child for child in children if Path(f"/proc/{child}").exists()]
