"""Where the runs stand: a live table on a terminal (rich), else a line at each change of state."""

import contextlib
import sys
from collections.abc import Iterator, Sequence

from dividemix import launch, measured
from dividemix.launch import Show, Task

HEAD = ("row", "seed", "state", "best", "s/epoch", "left")
_ORDER = (launch.RUNNING, launch.QUEUED, launch.FAILED, launch.FINISHED, launch.STOPPED, launch.WAITING, launch.NOT_RUN)
_STYLE = {launch.RUNNING: "bold", launch.FAILED: "red", launch.FINISHED: "green", launch.NOT_RUN: "dim"}


def cells(task: Task) -> tuple[str, ...]:
    """A run's line: row, seed, state, best accuracy so far, seconds of the last epoch, time left."""
    found, state = task.found, task.state
    run = (task.run.experiment.run_name, str(task.run.seed))
    if found is None or not found.records:
        return (*run, f"{state}: {task.note}" if task.note else state, "-", "-", "-")
    done, epochs = len(found.records), task.run.num_epochs
    if state in (launch.RUNNING, launch.STOPPED):
        state += f" epoch {min(done + (state == launch.RUNNING), epochs)}/{epochs}"
    left = measured.time_left(found, epochs) if task.state == launch.RUNNING else None
    best = "-" if found.best is None else f"{found.best:.2f}"
    state = f"{state}: {task.note}" if task.note else state
    return (
        *run,
        state,
        best,
        f"{measured.seconds(found.records[-1]):.1f}",
        "-" if left is None else measured.hours(left),
    )


class Lines:
    """For logs and pipes: a line when a run's state is another one; of those that are in a queue only where it may be
    long."""

    def __init__(self, with_queue: bool) -> None:
        self.with_queue, self.seen = with_queue, {}

    def update(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if task.state == launch.QUEUED and not self.with_queue:
                continue
            if self.seen.get(task.run.name, launch.WAITING) != task.state:
                row, seed, state, best, _, _ = cells(task)
                accuracy = f", best {best}" if best != "-" else ""
                print(f"{row} seed {seed}: {state}{accuracy}", flush=True)
            self.seen[task.run.name] = task.state

    def say(self, line: str) -> None:
        print(line, flush=True)


class Table:
    """For a terminal: one table that is drawn anew, as many lines as fit; what happens comes first."""

    def __init__(self, live) -> None:
        self.live = live

    def update(self, tasks: Sequence[Task]) -> None:
        from rich.table import Column
        from rich.table import Table as RichTable

        columns = [Column(name, no_wrap=True, overflow="ellipsis") for name in HEAD]  # a line a run: they fit
        table = RichTable(*columns, caption=launch.summary(tasks), box=None, pad_edge=False)
        for task in sorted(tasks, key=lambda task: _ORDER.index(task.state))[: max(self.live.console.height - 4, 3)]:
            table.add_row(*(cell.replace("[", r"\[") for cell in cells(task)), style=_STYLE.get(task.state))
        self.live.update(table)

    def say(self, line: str) -> None:
        self.live.console.print(line)


@contextlib.contextmanager
def show(with_queue: bool = False) -> Iterator[Show]:
    """The table where stdout is a terminal and rich is there, else lines."""
    try:
        from rich.live import Live
    except ImportError:
        Live = None
    if Live is None or not sys.stdout.isatty():
        yield Lines(with_queue)
        return
    with Live(refresh_per_second=2) as live:
        yield Table(live)
