"""What the terminal shows of the runs."""

from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from test_measured import epoch, write

from dividemix import launch, measured, status
from dividemix.experiments import every_row

ROW = every_row()[0]


def task(tmp_path, name: str, state: str, done: int = 0, note: str = "") -> launch.Task:
    folder = tmp_path / name
    records = [epoch(e, 9) for e in range(done)]
    found = measured.read(write(folder, records, warm_up=0, num_epochs=300)) if done else None
    run = SimpleNamespace(name=name, experiment=ROW, seed=124, num_epochs=300, folder=folder)
    return launch.Task(run, Path("log"), state, note, found)


def test_a_runs_line_says_how_far_it_is(tmp_path):
    """The user kills a run that would have ended in a minute, or waits for one that failed."""
    assert status.cells(task(tmp_path, "a", "running", 5)) == (
        *(ROW.name, "124", "running epoch 6/300", "54.00", "10.0", "49 min"),
    )
    assert status.cells(task(tmp_path, "b", "stopped", 5))[2] == "stopped epoch 5/300"
    assert status.cells(task(tmp_path, "c", "finished", 5))[2:] == ("finished", "54.00", "10.0", "-")
    assert status.cells(task(tmp_path, "d", "failed", note="error: no"))[2:] == ("failed: error: no", "-", "-", "-")
    assert status.cells(task(tmp_path, "e", "waiting"))[2:] == ("waiting", "-", "-", "-")


def test_without_a_terminal_there_is_a_line_at_each_change(tmp_path, capsys):
    """A log of a night has a line every half second, or none."""
    show, one = status.Lines(False), task(tmp_path, "a", "waiting")
    for state in ("waiting", "queued", "running", "running", "finished", "finished"):
        one.state = state
        show.update([one])
    assert capsys.readouterr().out.splitlines() == [f"{ROW.name} seed 124: running", f"{ROW.name} seed 124: finished"]
    one.state = "queued"
    queue = status.Lines(True)
    queue.update([one])
    queue.say("stopping")
    assert capsys.readouterr().out == f"{ROW.name} seed 124: queued\nstopping\n"


def test_on_a_terminal_what_runs_comes_first_and_names_are_text(tmp_path):
    """Of 90 waiting runs nothing of the two that run would be seen; a '[red]' in an error would vanish."""
    shown = []
    live = SimpleNamespace(console=SimpleNamespace(height=9), update=shown.append)
    tasks = [task(tmp_path, f"w{k}", "waiting") for k in range(20)]
    tasks += [task(tmp_path, "f", "failed", note="[red]no[/red]"), task(tmp_path, "r", "running", 2)]
    status.Table(live).update(tasks)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown[0])
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    assert "running epoch 3/300" in lines[1] and "failed: [red]no[/red]" in lines[2] and len(lines) == 1 + 5 + 1
    assert "1 failed, 1 running, 20 waiting" in lines[-1]


def test_a_narrow_terminal_holds_a_line_a_run(tmp_path):
    """Errors of three lines push the runs that go on, and the totals, off the screen."""
    shown = []
    live = SimpleNamespace(console=SimpleNamespace(height=24), update=shown.append)
    tasks = [task(tmp_path, f"f{k}", "failed", note="a long line " * 30) for k in range(5)]
    status.Table(live).update(tasks)
    console = Console(width=50, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown[0])
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    assert len(lines) == 1 + 5 + 1 and lines[-1].strip() == "5 failed"


def test_lines_where_stdout_is_no_terminal(capsys):
    """A log full of control characters."""
    with status.show() as show:
        assert isinstance(show, status.Lines)
