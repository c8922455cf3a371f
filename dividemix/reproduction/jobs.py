"""Runs as jobs: processes on this machine, or jobs of SLURM through submitit. One loop keeps every slot busy."""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dividemix import DivideMixError
from dividemix.reproduction.rows import ROOT, PlannedRun

PAUSE, PAUSE_QUEUE = 0.5, 30.0  # seconds between two looks at the jobs


@dataclass
class Job:
    """Runs side by side, one process each, whose output is added to its log. On this machine `start` starts them; in a
    queue submitit calls the job on a node, and gives an object with the same methods to look after it."""

    runs: Sequence[PlannedRun]
    logs: Path
    env: dict[str, str]  # beside the environment
    in_queue: bool = False
    processes: list[subprocess.Popen] = field(default_factory=list, init=False)

    def log(self, run: PlannedRun) -> Path:
        return self.logs / f"{run.name}.log"

    def start(self) -> "Job":
        self.logs.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"PYTHONUNBUFFERED": "1"} | self.env
        for run in self.runs:
            with open(self.log(run), "a", errors="backslashreplace") as log:
                print("$", shlex.join(run.command), file=log, flush=True)
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                # A session for itself: the terminal's Ctrl-C would be a second signal, which kills.
                session = {"start_new_session": True, "preexec_fn": self.prepare_signals}
                self.processes.append(subprocess.Popen(run.command, env=env, **streams, **session))
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

    def done(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def exception(self) -> None:
        """None; of submitit's job where the node was lost, or the job cancelled."""

    def result(self) -> list[int]:
        """Exit statuses, negative for a signal."""
        return [process.wait() for process in self.processes]

    wait = result

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
        return DelayedSubmission(Job(self.runs, self.logs, self.env, self.in_queue))


def launch(
    runs: Sequence[PlannedRun], logs: Path, slots: Sequence[dict[str, str]], size: int = 1, executor: Any = None
) -> list[str]:
    """Run them all: one job at a time on each slot, which is the environment of its jobs; `size` runs are a job.
    executor: submitit's, None for this machine. -> a line for each run that failed. Raises DivideMixError where no job
    can be started; whatever is raised, Ctrl-C too, the jobs that run are told to end and waited for."""
    waiting = [runs[i : i + size] for i in range(0, len(runs), size)]
    free, running, failed = list(slots), [], []
    try:
        while waiting or running:
            while waiting and free:
                job = Job(waiting[0], logs.absolute(), free[0], executor is not None)
                try:
                    running.append((executor.submit(job) if executor else job.start(), job))
                except Exception as error:
                    if running:
                        break  # the queue takes no more jobs of one user: it is asked again at the next look
                    raise DivideMixError(f"no job could be started: {' '.join(str(error).split())[:300]}") from error
                del waiting[0], free[0]
                for run in job.runs:
                    print(f"{run.name}: {'submitted' if executor else 'started'}", flush=True)
            time.sleep(PAUSE_QUEUE if executor else PAUSE)
            for handle, job in [pair for pair in running if pair[0].done()]:
                running.remove((handle, job))
                free.append(job.env)
                statuses = [None] * len(job.runs) if handle.exception() else handle.result()
                for run, status in zip(job.runs, statuses, strict=True):
                    line = f"{run.name}: finished"
                    if not run.is_finished:
                        line = f"{run.name}: failed: {last_line(job.log(run), status)} ({job.log(run)})"
                        failed.append(line)
                    print(line, flush=True)
    except BaseException:
        for handle, _ in running:
            handle.cancel(check=False)
        for handle, _ in running:
            handle.wait()
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
        executor.update_parameters(name="dividemix", **parameters)
    except (ImportError, RuntimeError, ValueError, TypeError, NameError) as error:
        raise DivideMixError(f"--launcher slurm: {' '.join(str(error).split())[:300]}") from error
    return executor
