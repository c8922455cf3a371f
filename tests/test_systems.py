"""Windows and macOS, as far as Linux can play them: what they lack is taken away. The workflow runs the tests there."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import read_records
from helpers.scripts import SMALL_NET
from helpers.trees import make_folder

ROOT = Path(__file__).parents[1]
# Before anything is imported
WITHOUT = """
import os, signal, sys
sys.modules["fcntl"] = None
for name in ("fork", "link", "sched_getaffinity", "killpg"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTSTP"):
    delattr(signal, name)
real_open = os.open
def no_folders(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *args, **kwargs)
os.open = no_folders
import dividemix.data.workers
dividemix.data.workers.START_METHOD = "spawn"
"""
# What Windows' file system refuses: to rename a folder in which a file is open
FOLDERS = """
from pathlib import Path
real_rename = Path.rename
def rename(path, target):
    if any(path.resolve() in Path(os.path.realpath(link)).parents for link in Path("/proc/self/fd").iterdir()):
        raise PermissionError(13, "Permission denied", str(path))
    return real_rename(path, target)
Path.rename = rename
"""


@pytest.mark.slow
def test_a_run_begins_goes_on_and_is_set_aside_without_what_windows_lacks(tmp_path):
    """Else nobody with Windows gets past the first epoch."""
    tree, run = make_folder(tmp_path / "images", 40), tmp_path / "run"
    flags = [*SMALL_NET, "--data_path", tree, "--run_dir", run, "--warm_up", "1", "--workers", "1"]
    flags += ["--data_mode", "stream", "--keep_images", "no", "--cache_dir", tmp_path / "cache", "--no_label_scores"]

    def start(*more: str, stubs: str = WITHOUT) -> str:
        code = f"{stubs}\nimport Train_folder\nfrom dividemix.run import command_line\ncommand_line(Train_folder.main)"
        command = [sys.executable, "-c", code, *map(str, flags), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    start("--num_epochs", "1")
    assert "with epoch 1" in start("--num_epochs", "2")
    assert len(read_records(run)) == 2 and b"\r" not in (run / "metrics.jsonl").read_bytes()
    if sys.platform == "linux":
        windows = WITHOUT + FOLDERS + "import dividemix.run.run as module\nclass Sys:\n    platform = 'win32'\n"
        windows += "    argv, stderr = sys.argv, sys.stderr\nmodule.sys = Sys\n"
        assert "moved to" in start("--num_epochs", "1", "--fresh", stubs=windows)
        assert len([*tmp_path.glob("run.*")]) == 1 and len(read_records(run)) == 1


def test_a_signal_without_sigchld(monkeypatch):
    """Ctrl-C would end in an AttributeError instead of the line that says how to go on."""
    from dividemix.run import signals

    monkeypatch.delattr(signal, "SIGCHLD", raising=False)
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM")}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(signals.Stopped), signals.stoppable():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def test_the_workflow_tests_the_oldest_and_the_pinned_torch():
    """Else the lower bound that pip accepts was never tried."""
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    oldest = dict(re.findall(r'"(torch|torchvision)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    pinned = dict(re.findall(r"^(torch|torchvision)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    for name in ("torch", "torchvision"):
        assert f"{name}: {oldest[name]}.*" in workflow and f"{name}: {pinned[name]}" in workflow
    for system in ("ubuntu", "macos", "windows"):
        assert f"{system}-latest" in workflow
