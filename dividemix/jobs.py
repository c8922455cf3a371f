"""Runs as jobs: processes on this machine, or jobs of SLURM through submitit. One loop keeps every slot busy."""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dividemix import DivideMixError
from dividemix.rows import ROOT, PlannedRun

PAUSE, PAUSE_QUEUE = 0.5, 5.0  # seconds between two looks at the jobs


@dataclass
class Job:
    """Training scripts side by side, one process each, whose output is added to its log. On this machine `start` starts
    them; in a queue submitit calls the job on a node, and gives an object with the same methods to look after it."""

    commands: Sequence[tuple[str, ...]]
    logs: Sequence[Path]
    env: dict[str, str]  # beside the environment
    in_queue: bool = False
    processes: list[subprocess.Popen] = field(default_factory=list, init=False)

    def start(self) -> "Job":
        for command, path in zip(self.commands, self.logs, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", errors="backslashreplace") as log:
                print("$", shlex.join(command), file=log, flush=True)
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                env = os.environ | {"PYTHONUNBUFFERED": "1"} | self.env
                # A session for itself: the terminal's Ctrl-C would be a second signal, which kills.
                where = {"env": env, "start_new_session": True, "preexec_fn": self.prepare_signals}
                self.processes.append(subprocess.Popen(command, **streams, **where))
        return self

    def prepare_signals(self) -> None:
        """In the new process, before the script."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell started us in the background
        if self.in_queue:  # SLURM sends its warnings to every process; `checkpoint` alone ends the scripts
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
        elif sys.platform == "linux":  # they end with this process, however it ends: PR_SET_PDEATHSIG
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    def __call__(self) -> list[int]:
        return self.start().result()

    def done(self, force_check: bool = False) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def exception(self) -> None:
        """None; of submitit's job where the node was lost, or the job cancelled."""

    def result(self) -> list[int]:
        """Exit statuses, negative for a signal."""
        return [process.wait() for process in self.processes]

    def cancel(self, check: bool = True) -> None:
        """Tell the scripts to end; they leave runs that can be continued."""
        for process in self.processes:
            process.send_signal(signal.SIGINT if self.in_queue else signal.SIGTERM)

    def checkpoint(self) -> Any:
        """Called by submitit when the time is up or the node is taken away: the job is queued again, and continues."""
        from submitit.helpers import DelayedSubmission

        self.cancel()
        for process in self.processes:
            with contextlib.suppress(ChildProcessError):  # `result`, which this interrupts, holds the lock of `wait`
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Job(self.commands, self.logs, self.env, self.in_queue))


def launch(
    runs: Sequence[PlannedRun], logs: Path, slots: Sequence[dict[str, str]], size: int = 1, executor: Any = None
) -> list[str]:
    """Run them all: one job at a time on each slot, which is the environment of its jobs; `size` runs are a job.
    executor: submitit's, None for this machine. -> a line for each run that failed. Raises DivideMixError where no job
    can be started; whatever is raised, Ctrl-C too, the jobs that run are told to end and waited for."""
    waiting = deque(runs[i : i + size] for i in range(0, len(runs), size))
    free, running, failed = list(slots), [], []
    pause, retry = PAUSE_QUEUE if executor else PAUSE, 0.0
    try:
        while waiting or running:
            while waiting and free and time.monotonic() >= retry:
                batch, slot = waiting[0], free.pop(0)
                paths = [logs.absolute() / f"{run.name}.log" for run in batch]
                job = Job([run.command for run in batch], paths, slot, executor is not None)
                try:
                    job = executor.submit(job) if executor else job.start()
                except Exception as error:  # the queue takes no more jobs of one user, or no memory is left
                    message = f"a job could not be started: {' '.join(str(error).split())[:300]}"
                    if not running:
                        raise DivideMixError(message) from error
                    print(f"{message}; tried again when another job ends, or in five minutes", flush=True)
                    free.append(slot)
                    retry = time.monotonic() + 300
                    break
                waiting.popleft()
                running.append((job, batch, paths, slot))
                for run in batch:
                    print(f"{run.name}: {'submitted' if executor else 'started'}", flush=True)
            time.sleep(pause)
            for entry in list(running):
                job, batch, paths, slot = entry
                if job.done():
                    running.remove(entry)
                    free.append(slot)
                    retry = 0.0
                    ended = [None] * len(batch) if job.exception() else job.result()
                    for run, path, status in zip(batch, paths, ended, strict=True):
                        line = f"{run.name}: finished"
                        if not run.is_finished:
                            line = f"{run.name}: failed: {last_line(path, status)} ({path})"
                            failed.append(line)
                        print(line, flush=True)
    except BaseException:
        for job, *_ in running:
            job.cancel(check=False)
        while not all(job.done(force_check=True) for job, *_ in running):
            time.sleep(pause)
        raise
    return failed


def last_line(log: Path, status: int | None) -> str:
    """Why a run failed: what its log ends with, and a signal, of which the log says nothing."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
    if status is None:
        return f"its job was lost or cancelled; last line of the log: {last}"
    return f"ended by {signal.Signals(-status).name}; last line of the log: {last}" if status < 0 else last


def local_slots(jobs_per_gpu: int, cores: int, on_cpu: bool = False) -> list[dict[str, str]]:
    """jobs_per_gpu slots on each visible card, or on the CPU. A second run comes to a card when all have one."""
    import torch

    count = 0 if on_cpu else torch.cuda.device_count()
    cards = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]
    places = [{"CUDA_VISIBLE_DEVICES": card} for card in cards] or [{}]
    return [place | threads(cores // (len(places) * jobs_per_gpu)) for _ in range(jobs_per_gpu) for place in places]


def threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, count)))}


def slurm_executor(folder: Path, **parameters: Any) -> Any:
    """submitit's. Raises DivideMixError where submitit is not installed, SLURM not here, or a parameter wrong."""
    # The job on the node imports this package.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        import submitit

        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(**parameters)
    except (ImportError, RuntimeError, ValueError, TypeError, NameError) as error:
        raise DivideMixError(f"--launcher slurm: {' '.join(str(error).split())[:300]}") from error
    return executor
