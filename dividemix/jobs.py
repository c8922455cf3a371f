"""What happens inside a job of `reproduce.py`, on this machine or on a node of a cluster: a few training scripts run as
processes, and a file says how each ended. Imports nothing but the standard library, as each job loads it anew.

A job is told to end by a file in the session's folder, which every machine sees and which reaches it once: STOP passes
SIGTERM on to the scripts, which end cleanly, KILL kills them. Signals cannot serve for this, since a terminal and SLURM
send theirs to all processes at once, and a script that gets a second one dies at once.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

STOP, KILL = "stop", "kill"  # files in the session's folder
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class Command:
    """One script. log: its stdout and stderr are added to it. env: what the environment has beside the job's."""

    name: str
    words: tuple[str, ...]
    log: Path
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Job:
    """Runs its commands side by side and waits for all. session: a folder of its own, where <name>.started and
    <name>.json ({"status": exit status, negative for a signal}) appear. scheduler: the process on this machine without
    which the job ends; None on a cluster, where it goes on."""

    commands: Sequence[Command]
    session: Path
    scheduler: int | None
    children: dict[str, subprocess.Popen] = field(default_factory=dict, init=False)
    told: bool = field(default=False, init=False)
    asked: bool = field(default=False, init=False)

    def __call__(self) -> dict[str, int]:
        ended: dict[str, int] = {}
        if self.scheduler is not None:  # on a cluster it reaches the scripts without us
            signal.signal(signal.SIGTERM, self.ask)
        try:
            for command in self.commands:
                self.children[command.name] = self.start(command)
            while len(ended) < len(self.children):
                for name, child in self.children.items():
                    if name not in ended and child.poll() is not None:
                        ended[name] = child.returncode
                        self.write(f"{name}.json", json.dumps({"status": child.returncode}))
                if not self.told and self.is_over():
                    self.tell(signal.SIGTERM)
                if (self.session / KILL).exists():
                    self.tell(signal.SIGKILL)
                time.sleep(_POLL)
        except BaseException:
            self.tell(signal.SIGKILL)
            raise
        return ended

    def checkpoint(self):
        """Called by submitit before a cluster takes the node away: the scripts end cleanly, and the job is queued
        again, where the same commands continue them."""
        from submitit.helpers import DelayedSubmission

        self.tell(signal.SIGTERM)
        for child in self.children.values():
            child.wait()
        return DelayedSubmission(Job(self.commands, self.session, self.scheduler))

    def ask(self, *_: object) -> None:
        self.asked = True

    def is_over(self) -> bool:
        return self.asked or (self.session / STOP).exists() or not (self.scheduler is None or is_alive(self.scheduler))

    def start(self, command: Command) -> subprocess.Popen:
        self.write(f"{command.name}.started", "")
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with open(command.log, "ab") as log:
            log.write(f"$ {shlex.join(command.words)}\n".encode("utf-8", "backslashreplace"))
            log.flush()
            return subprocess.Popen(
                command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | command.env,  # else a log's last line is not the error
                start_new_session=self.scheduler is not None,  # beyond the reach of the terminal's Ctrl-C
                preexec_fn=usual_signals,
            )

    def tell(self, number: int) -> None:
        """Send a signal to each script that is there still; a kill also to the processes that it started."""
        self.told = True
        for child in self.children.values():
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    if number == signal.SIGKILL and self.scheduler is not None:
                        os.killpg(child.pid, number)
                    else:
                        child.send_signal(number)

    def write(self, name: str, content: str) -> None:
        """Whole or not at all."""
        part = self.session / f".{name}.part"
        part.write_text(content)
        part.replace(self.session / name)


def usual_signals() -> None:
    """In the new process: Ctrl-C works as ever, which the job itself ignores; the signals with which a cluster warns
    the job do not end the script."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def is_alive(process: int) -> bool:
    """Of this machine. One that has ended, and whose end its parent has not asked for yet, is not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no Linux
        return True
