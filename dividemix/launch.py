"""Runs the commands of a plan: as many at once as there are slots, through submitit, on this machine or by SLURM.

Both ways have the same loop and the same job (`jobs.Job`); only the executor differs. What is finished is skipped, what
fails is noted and the rest goes on. The first Ctrl-C or SIGTERM ends all runs cleanly, the second one kills.
"""

import contextlib
import os
import queue
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dividemix import DivideMixError, jobs, measured
from dividemix.plan import ROOT, Plan, decides

WAITING, QUEUED, RUNNING, FINISHED = "waiting", "queued", "running", "finished"
FAILED, STOPPED, NOT_RUN = "failed", "stopped", "not run"
_TRIES = 3  # submissions of a run that ends before it gets further, on a cluster
_RETRY = 300.0  # seconds after which a queue that refused a job is asked again
_POLL, _POLL_QUEUE = 0.5, 5.0  # seconds; each look at jobs that are told to end asks the queue


@dataclass
class Task:
    """A run and where it stands. note: why it is not run, or failed."""

    run: Plan
    log: Path
    state: str = WAITING
    note: str = ""
    found: measured.Found | None = None
    tries: int = 0  # submissions since it last got further
    epochs: int = 0  # when it was last submitted


@dataclass(frozen=True)
class Slot:
    """A place for one job at a time. size: how many runs a job holds; env: what they see beside the environment."""

    env: dict[str, str] = field(default_factory=dict)
    size: int = 1


class Show(Protocol):
    """The status on the terminal."""

    def update(self, tasks: Sequence[Task]) -> None: ...
    def say(self, line: str) -> None: ...


def make_tasks(runs: Sequence[Plan], logs: Path) -> list[Task]:
    """The runs of a plan as they are on the disk."""
    tasks = []
    for run in runs:
        task = Task(run, logs / f"{run.name}.log", found=measured.read(run.folder))
        if task.found.is_finished(run.num_epochs):
            notes = run.experiment.setting_differences(task.found.args)
            other = [note for note in notes if not decides(run.variant, note.split()[0].removeprefix("--"))]
            task.state = FAILED if other else FINISHED
            task.note = f"{run.folder} holds a run with {', '.join(other)}: move it away" if other else ""
        elif run.missing:
            task.state, task.note = NOT_RUN, run.missing
        tasks.append(task)
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Where


def local_slots(cards: Sequence[str], jobs_per_gpu: int, cores: int) -> list[Slot]:
    """jobs_per_gpu slots on each card, which its runs see as card 0, or on the CPU; each has its part of the cores.
    Cards take turns, so that a second run comes to one only when all have one."""
    places = [{"CUDA_VISIBLE_DEVICES": card} for card in cards] or [{}]
    threads = str(max(1, cores // (len(places) * jobs_per_gpu)))
    omp = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
    return [Slot(place | omp) for _ in range(jobs_per_gpu) for place in places]


def visible_cards(chosen: str | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES of a job can be: the cards chosen by --gpus, else all that this process sees. Raises
    DivideMixError for a card that is not there."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [card.strip() for card in named.split(",") if card.strip()][:count] if named else []
    cards = cards or [str(k) for k in range(count)]
    if chosen is None:
        return cards
    wanted = [card.strip() for card in chosen.split(",")]
    if len(set(wanted)) < len(wanted):
        raise DivideMixError(f"--gpus {chosen}: a card twice; --jobs_per_gpu is how many runs are on each")
    for card in wanted:
        if card not in cards:
            raise DivideMixError(f"--gpus {chosen}: expected cards of {', '.join(cards) or 'none: no CUDA card here'}")
    return wanted


def make_executor(launcher: str, session: Path, parameters: dict[str, Any]) -> Any:
    """submitit's executor. Raises DivideMixError where it is not installed, or SLURM not here."""
    try:
        import submitit
    except ImportError as error:
        raise DivideMixError("submitit is not installed: pip install -r requirements.txt") from error
    try:
        executor = submitit.AutoExecutor(folder=session, cluster=launcher)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        shutil.rmtree(session, ignore_errors=True)
        raise DivideMixError(f"--launcher {launcher}: {' '.join(str(error).split())[:300]}") from error
    return executor


@contextlib.contextmanager
def session_folder(out_dir: Path) -> Iterator[Path]:
    """A new folder for submitit's files and those of `jobs`, removed at the end unless it explains a failure."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        session = Path(tempfile.mkdtemp(prefix=".session-", dir=out_dir)).resolve()
    except OSError as error:
        raise DivideMixError(f"--out_dir {out_dir}: cannot be written ({error.strerror}); choose another") from error
    yield session
    if not (session / "keep").exists():
        shutil.rmtree(session, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


class Stop:
    """Counts the signals that ask to end. number: the first one's, 0 before."""

    def __init__(self) -> None:
        self.number, self.count = 0, 0
        self._told: queue.SimpleQueue[None] = queue.SimpleQueue()  # unlike an Event's set, a handler may call its put

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            if before[number] is not signal.SIG_IGN:  # as nohup does
                signal.signal(number, self._heard)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, _: object) -> None:
        self.number, self.count = self.number or number, self.count + 1
        self._told.put(None)

    def wait(self, seconds: float) -> None:
        """Until the next look at the runs, or a signal."""
        with contextlib.suppress(queue.Empty):
            self._told.get(timeout=seconds)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Active:
    job: Any  # submitit's
    tasks: list[Task]
    slot: Slot


def launch(
    tasks: Sequence[Task],
    slots: Sequence[Slot],
    executor: Any,
    session: Path,
    show: Show,
    on_cluster: bool = False,
) -> int:
    """Run all waiting tasks, and change their states. -> the signal that ended it early, or 0. Raises DivideMixError
    where not one job can be submitted; whatever it raises, the jobs that run are told to end."""
    waiting = [task for task in tasks if task.state == WAITING]
    free, active, stop, told, refused = list(slots), [], Stop(), 0, -_RETRY
    scheduler = None if on_cluster else os.getpid()
    try:
        with stop.listening():
            while waiting or active:
                if stop.count > told:
                    told = stop.count
                    waiting = give_up(waiting, active, session, told, on_cluster, show.say)
                while waiting and free and time.monotonic() >= refused + _RETRY and not stop.count:
                    slot = free.pop(0)
                    batch, waiting = waiting[: slot.size], waiting[slot.size :]
                    try:
                        active.append(Active(submit(batch, slot, executor, session, scheduler), batch, slot))
                    except DivideMixError as error:  # a queue takes so many jobs of a user
                        if not active:
                            raise
                        show.say(f"{error}; tried again when another job has ended, or in a while")
                        for task in batch:
                            task.state, task.tries = WAITING, task.tries - 1
                        waiting, refused = batch + waiting, time.monotonic()
                        free.insert(0, slot)
                        break
                for each in list(active):
                    is_over = each.job.done(bool(stop.count))  # before the files are read: they are complete then
                    for task in each.tasks:
                        look(task, session)
                    if is_over:
                        active.remove(each)
                        free.append(each.slot)
                        refused = -_RETRY
                        for task in each.tasks:
                            waiting += [task] if settle(task, session, on_cluster, bool(stop.count)) else []
                show.update(tasks)
                if waiting or active:
                    stop.wait(_POLL_QUEUE if on_cluster else _POLL)
    except BaseException:
        (session / jobs.STOP).touch()
        raise
    return stop.number


def submit(batch: list[Task], slot: Slot, executor: Any, session: Path, scheduler: int | None) -> Any:
    """Hand a job over. It gets no Ctrl-C of the terminal and outlives its end: it ends when this process does. Raises
    DivideMixError where the queue refuses it."""
    commands = []
    for task in batch:
        for end in ("started", "json"):
            (session / f"{task.run.name}.{end}").unlink(missing_ok=True)
        epochs = len(task.found.records) if task.found else 0
        task.tries = 1 if epochs > task.epochs else task.tries + 1
        task.state, task.epochs = QUEUED, epochs
        commands.append(jobs.Command(task.run.name, task.run.command, task.log.resolve(), slot.env))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])  # the job imports `jobs`
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP])  # its process inherits it
    try:
        return executor.submit(jobs.Job(commands, session, scheduler))
    except Exception as error:  # whatever the queue's own programs do
        raise DivideMixError(f"a job could not be submitted: {' '.join(str(error).split())[:300]}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def look(task: Task, session: Path) -> None:
    """How far a run is."""
    if task.state == QUEUED and (session / f"{task.run.name}.started").exists():
        task.state = RUNNING
    if task.state == RUNNING:
        task.found = measured.read(task.run.folder)


def settle(task: Task, session: Path, on_cluster: bool, stopping: bool) -> bool:
    """The state of a run whose job has ended. -> whether it has to be submitted again: a cluster took the node away."""
    task.found = measured.read(task.run.folder)
    status = measured.parsed(measured.text(session / f"{task.run.name}.json")).get("status")
    if task.found.is_finished(task.run.num_epochs) and status == 0:
        task.state, task.note = FINISHED, ""
        return False
    taken = status is None or status in (130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
    if stopping and taken:
        task.state = STOPPED
        return False
    if on_cluster and taken and task.tries < _TRIES:
        task.state = WAITING
        return True
    task.state, task.note = FAILED, why(task, status)
    if status is None:
        task.note += f"; see {session}"
        (session / "keep").touch()
    return False


def why(task: Task, status: int | None) -> str:
    """The last line that a run left, with how it ended where the line does not say it."""
    said = [line for line in measured.text(task.log).splitlines() if line.strip()]
    last = said[-1].strip()[:300] if said and not said[-1].startswith("$ ") else ""
    if status is None:
        return "its job ended without a word"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}" + (f" after: {last}" if last else "")
    if status == 0:
        return f"ended without error, and without {task.run.num_epochs} epochs and a result in {task.run.folder}"
    return last or f"exit status {status}"


def give_up(
    waiting: list[Task], active: list[Active], session: Path, count: int, on_cluster: bool, say: Callable[[str], None]
) -> list[Task]:
    """Tell the jobs to end: cleanly the first time, at once the second. -> [], what still waits."""
    for task in waiting:
        task.state = STOPPED
    runs = sum(len(each.tasks) for each in active)
    (session / (jobs.STOP if count == 1 else jobs.KILL)).touch()
    if count == 1:
        say(f"stopping: {runs} runs end after what they are writing; once more kills them")
    for each in active if on_cluster else ():
        if count > 1 or all(task.state == QUEUED for task in each.tasks):
            each.job.cancel(check=False)
    return []


def summary(tasks: Sequence[Task]) -> str:
    """'3 finished, 1 failed'"""
    states = (FINISHED, FAILED, STOPPED, RUNNING, QUEUED, WAITING, NOT_RUN)
    counts = {state: sum(task.state == state for task in tasks) for state in states}
    return ", ".join(f"{n} {state}" for state, n in counts.items() if n)
