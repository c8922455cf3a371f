"""`make gpu`: its parts, and what the time limit does to them (no card is needed)."""

import importlib
import sys
import time

import pytest

from benchmarks import gpu


@pytest.fixture
def ran(monkeypatch):
    """The parts that `main` runs, without running them: (first flag, seconds allowed)."""
    parts: list[tuple[str, float]] = []
    monkeypatch.setattr(gpu, "run", lambda arguments, seconds: parts.append((arguments, seconds)))
    return parts


def test_every_part_has_flags_that_its_script_knows():
    """A card is lent for minutes: a wrong flag would cost it."""
    for part, text in gpu.PARTS.items():
        _, script, *flags = gpu.command(part, "cuda")
        if part == "tests":
            assert (script, *flags[:3]) == ("-m", "pytest", "-m", "gpu") and "-n" in flags
        else:
            args = importlib.import_module(f"benchmarks.{text.split()[0][:-3]}").parse_args(flags)
            assert args.device == "cuda" and args.json == f"gpu-{part}.json"


def test_tests_have_half_of_the_time_and_each_part_what_is_left(ran, capsys):
    """Tests that take all of it leave no benchmark; what was cut off is no failure, and is said."""
    assert gpu.main(["--seconds", "300"]) == 0
    assert len(ran) == len(gpu.PARTS) and ran[0][1] == 150
    assert all(280 < seconds <= 300 - gpu.GRACE for _, seconds in ran[1:])
    assert capsys.readouterr().out.count("cut off") == 2 * len(gpu.PARTS)
    ran.clear()
    assert gpu.main(["--seconds", "10", "bench"]) == 0 and ran == []
    assert "not begun" in capsys.readouterr().out
    gpu.main(["--seconds", "300", "ablation", "bench"])
    assert [arguments[-1] for arguments, _ in ran] == ["gpu-ablation.json", "gpu-bench.json"]
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["benches"])


def test_a_part_that_fails_does_not_stop_the_next(monkeypatch, capsys):
    """One test that fails on a card would cost all its benchmarks."""
    statuses = iter([1, 0])
    monkeypatch.setattr(gpu, "run", lambda *_: next(statuses))
    assert gpu.main(["tests", "bench"]) == 1
    assert "failed, exit status 1" in capsys.readouterr().out and next(statuses, None) is None


def test_a_command_is_stopped_at_its_limit_with_all_that_it_started(monkeypatch, tmp_path):
    """A helper process that lives on takes the card from the next part."""
    monkeypatch.setattr(gpu, "GRACE", 1)
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    child = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(6); open('alive', 'w')"
    code = f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    assert gpu.run([sys.executable, "-c", code], 2) is None
    assert time.monotonic() - begin < 6
    time.sleep(5)
    assert not (tmp_path / "alive").exists()
