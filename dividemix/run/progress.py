"""What a run adds to a phase: its time, and, once, how long the run will take."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dividemix import Diverged
from dividemix.engine import Phase
from dividemix.run import logs
from dividemix.runtime import Batches
from dividemix.runtime.loops import Bar

SLOW_STEPS = 3  # at a run's beginning: compilation, memory, file caches
TIMED_SECONDS = 5.0  # at most, after these steps
LABELED = 0.75  # share of the samples that a division is assumed to label


@dataclass
class RunPhase(Phase):
    """Phase of a run: adds its time to `seconds`, and the epoch to the message if training diverges."""

    title: str = ""
    seconds: dict[str, float] | None = None

    def __enter__(self) -> "RunPhase":
        self.begin = time.perf_counter()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        key = f"seconds_{self.title}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - self.begin
        if isinstance(error, Diverged):
            raise Diverged(f"epoch {self.epoch}: {error}") from error


def timed(bar: Bar, device: torch.device, tell: Callable[[float, int], None], batches: Batches) -> Iterator:
    """`bar` around the batches, which are steps. Calls `tell(seconds of a step, number of batches)` once, if there are
    SLOW_STEPS + 2 batches or more."""

    def now() -> float:
        """The time when the device has done all that it was given."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = None
    for k, batch in enumerate(bar(batches)):
        if k == SLOW_STEPS:
            begin = now()
        elif begin and (k == len(batches) - 1 or time.perf_counter() > begin + TIMED_SECONDS):
            tell((now() - begin) / (k - SLOW_STEPS), len(batches))
            begin = None
        yield batch


def expected_time(step: float, warmup: float, epochs: int, divided: float, unlabeled_loss: bool) -> str:
    """The line on the time of `epochs`, of which `divided` are not warm-up. step: seconds of a warm-up step of one
    network; warmup: seconds of a warm-up epoch, all networks."""
    # A labeled image costs as much as 7 in warm-up: measured 5 on an H200, 7 to 8 on a CPU. By forward passes it is
    # 6: 6 to guess and refine and 4 x 3 to train, against 3. Without an unlabeled loss 2 x 3 fall away.
    ratio = LABELED * (7 if unlabeled_loss else 5) + 1 / 3  # and scoring, one forward pass
    basis = f"a warm-up step takes {step:.2g} s"
    basis += f", an epoch after warm-up takes as long as about {ratio:.1f} warm-up epochs" if divided else ""
    total = logs.duration(warmup * (epochs - divided + divided * ratio))
    return f"expected time: about {total} for {epochs} epochs ({basis})"
