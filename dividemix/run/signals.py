"""SIGTERM, with which queues and containers end a process, and Ctrl-C: a run is left as it can be continued."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from dividemix.runtime import ranks


class Stopped(KeyboardInterrupt):
    """The user or the system wants the process to end. status: what it exits with, 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In the block the first of the two signals raises Stopped in the main thread, and a second one kills.

    Among several ranks signals are as they were: a rank that waits for the others in a collective does not come to
    Python, so torchrun would wait for it in vain, and then kill.
    """

    def stop(number: int, _: FrameType | None) -> None:
        # A queue's signal reaches the workers too: torch would report their deaths, by SIGCHLD, in the middle of ours.
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        raise Stopped(number)

    numbers = () if ranks.from_environment()[1] > 1 else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # as nohup does
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:  # stopped, the next signal kills until the very end
                signal.signal(number, handler)
