"""How a script ends: errors in one line, and Ctrl-C or SIGTERM (of queues and containers) so that the run can go on."""

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

from dividemix import DivideMixError, DivideMixWarning
from dividemix.runtime import is_out_of_memory, ranks


class Stopped(KeyboardInterrupt):
    """A signal that ends the process. status: its exit status, 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In the block the first of these signals raises Stopped in the main thread; a second one kills the process.

    With several ranks nothing changes: a rank that waits in a collective runs no Python, so torchrun would wait for it
    in vain, and then kill it.
    """

    def stop(number: int, _: FrameType | None) -> None:
        # A queue signals the workers too: torch would report their ends, by SIGCHLD, while this process is ending.
        for name in ("SIGINT", "SIGTERM", "SIGCHLD"):
            if hasattr(signal, name):  # Windows has no SIGCHLD
                signal.signal(getattr(signal, name), signal.SIG_DFL)
        raise Stopped(number)

    numbers = () if ranks.from_environment().world > 1 else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}  # without those that nohup ignores
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:  # else a signal came: the next one kills, to the end of the process
                signal.signal(number, handler)


def command_line(
    main: Callable[[Sequence[str] | None], Any],
    stopped_means: str = "the same command continues after the last finished epoch",
) -> NoReturn:
    """Run a script's main, and end the process. An error that the user can correct is one line and exit status 1;
    Ctrl-C is 130, SIGTERM 143, and 141 where nobody reads the output any more (`| head`). With several ranks each line
    begins with the rank, and a rank that fails ends at once, so that torchrun ends the others."""
    prefix = rank_prefix()
    sys.stdout.reconfigure(errors="backslashreplace")  # a path that is not UTF-8 can be printed
    warnings.formatwarning = lambda message, *_, **__: f"{prefix}warning: {message}\n"
    # All ranks of one machine would print the same.
    warnings.simplefilter("always" if ranks.from_environment().local_rank == 0 else "ignore", DivideMixWarning)
    try:
        with stoppable():
            main(None)
        sys.stdout.flush()
        ranks.leave()
    except DivideMixError as error:
        end(f"{prefix}error: {error}")
    except OSError as error:  # a full disk, a folder that went away
        try:
            if isinstance(error, BrokenPipeError):
                print(flush=True)
        except BrokenPipeError:  # nobody reads the output any more, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end("", 141)  # as a program that SIGPIPE ends
        # filename2: the user's name of the file, where the first is that of a temporary file
        end(f"{prefix}error: {error.filename2 or error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt as stopped:
        next_steps = getattr(stopped, "__notes__", [stopped_means])
        end(f"\n{prefix}interrupted: {'; '.join(next_steps)}", getattr(stopped, "status", 130))
    except Exception as error:
        if is_out_of_memory(error):
            end(f"{prefix}error: not enough memory ({(str(error) or 'of the host').splitlines()[0][:120]})")
        if not prefix:
            raise
        # A collective failed because of another rank; gloo has no error class of its own.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            end(f"{prefix}error: another rank ended or cannot be reached: its own line, if there is one, says why")
        end(prefix + traceback.format_exc().rstrip())
    end("", 0)


def rank_prefix() -> str:
    """The beginning of a line on stderr: the rank if there are several, else ''."""
    this = ranks.from_environment()
    return f"rank {this.rank}: " if this.world > 1 else ""


def end(message: str, status: int = 1) -> NoReturn:
    """Print the message, and end the process. With several ranks without the interpreter's clean-up: freeing the memory
    of the card could wait for a collective that the other ranks never reach, and a thread of gloo that frees a tensor
    meanwhile aborts the process (torch.distributed.nn keeps the process group alive until then)."""
    if message:
        print(message, file=sys.stderr)
    if rank_prefix():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
