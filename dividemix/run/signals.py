"""Ctrl-C, and SIGTERM, which queues and containers send: the run ends so that it can be continued."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from dividemix.runtime import ranks


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
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        raise Stopped(number)

    numbers = () if ranks.from_environment()[1] > 1 else (signal.SIGINT, signal.SIGTERM)
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
