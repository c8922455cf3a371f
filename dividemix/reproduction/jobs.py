"""Start runs as processes on this machine, or as jobs of a SLURM queue by submitit. One loop keeps all slots busy."""

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

PAUSE, PAUSE_QUEUE = 0.5, 30.0  # seconds between two checks of the jobs


@dataclass
class Job:
    """Runs side by side: a process and a log for each. On this machine `start` starts them. In a queue submitit calls
    the job on a node, and returns an object that has the same methods."""

    runs: Sequence[PlannedRun]
    logs: Path
    env: dict[str, str]  # added to the environment
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
                streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                # A session of its own, else the terminal's Ctrl-C is a second signal, which kills.
                session: dict[str, Any] = {"start_new_session": True, "preexec_fn": self.prepare_signals}
                if sys.platform == "win32":  # the same by another name
                    session = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
                self.processes.append(subprocess.Popen(run.command, env=env, **streams, **session))
        return self

    def prepare_signals(self) -> None:
        """Called in the new process before the script starts."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell started us in the background
        if self.in_queue:  # SLURM sends its warnings to every process; `checkpoint` alone ends the scripts
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
        elif sys.platform == "linux":  # PR_SET_PDEATHSIG: the script gets SIGTERM when this process dies
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    def __call__(self) -> list[int]:
        return self.start().result()

    def done(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def exception(self) -> None:
        """None. submitit's returns an error if the node was lost or the job was cancelled."""

    def result(self) -> list[int]:
        """Wait, and return the exit status of each run, negative for a signal."""
        return [process.wait() for process in self.processes]

    wait = result

    def cancel(self, check: bool = True) -> None:
        """Ask the scripts to stop. Their runs can be continued."""
        for process in self.processes:
            process.send_signal(signal.SIGINT if self.in_queue else signal.SIGTERM)

    def checkpoint(self) -> Any:
        """Called by submitit when the time is over or the node is taken away. The job is queued again."""
        from submitit.helpers import DelayedSubmission

        self.cancel()
        for process in self.processes:
            with contextlib.suppress(ChildProcessError):  # this interrupts `result`, which holds the lock of `wait`
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Job(self.runs, self.logs, self.env, self.in_queue))


def launch(
    runs: Sequence[PlannedRun], logs: Path, slots: Sequence[dict[str, str]], size: int = 1, executor: Any = None
) -> list[str]:
    """Run all of them. -> a line for each run that failed. slots: environments; one job at a time runs in each. size:
    runs of a job. executor: submitit's, None for this machine. Raises DivideMixError if no job can be started. After
    any error, or Ctrl-C, it stops the jobs that run and waits for them."""
    waiting = [runs[i : i + size] for i in range(0, len(runs), size)]
    free, failed = list(slots), []
    running: list[tuple[Any, Job]] = []
    try:
        while waiting or running:
            while waiting and free:
                job = Job(waiting[0], logs.absolute(), free[0], executor is not None)
                try:
                    running.append((executor.submit(job) if executor else job.start(), job))
                except Exception as error:
                    if running:
                        break  # the queue takes no more jobs of one user: try again after the pause
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
    """Why a run failed: the last line of its log, and the signal that ended it, which the log does not show."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
    if status is None:
        return f"its job was lost or cancelled; last line of the log: {last}"
    return f"ended by {signal.Signals(-status).name}; last line of the log: {last}" if status < 0 else last


def local_slots(jobs_per_gpu: int, cores: int, on_cpu: bool = False) -> list[dict[str, str]]:
    """jobs_per_gpu slots on each visible card, or on the CPU. No card gets a second run before every card has one."""
    import torch

    count = 0 if on_cpu else torch.cuda.device_count()
    cards = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]
    devices: list[dict[str, str]] = [{"CUDA_VISIBLE_DEVICES": card} for card in cards] or [{}]
    thread_limit = threads(cores // (len(devices) * jobs_per_gpu))
    return [device | thread_limit for _ in range(jobs_per_gpu) for device in devices]


def threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, count)))}


def slurm_executor(folder: Path, **parameters: Any) -> Any:
    """submitit's executor. Raises DivideMixError if submitit or SLURM is not installed, or a parameter is wrong."""
    # A job imports this package on its node.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        import submitit

        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(name="dividemix", **parameters)
    except (ImportError, RuntimeError, ValueError, TypeError, NameError) as error:
        raise DivideMixError(f"--launcher slurm: {' '.join(str(error).split())[:300]}") from error
    return executor
