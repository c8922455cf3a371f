"""Saving while training goes on: a copy of the state in host memory, which one thread writes.

The copy is made at an epoch's end, and is all that training waits for; what is written is what was then. One save at a
time: the next epoch's end waits for it, so at most one finished epoch is in memory alone, and a run that is killed
repeats it.
"""

import copy
import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dividemix.checkpoint import write_atomically


class Background:
    """One thread that does one thing at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "save")  # begins with the first work
        self._work: Future | None = None

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """After `wait`."""
        self._work = self._thread.submit(function, *args)

    def wait(self, otherwise: Any = None) -> Any:
        """Until what was started is done. -> its result, or `otherwise` where nothing was; raises what it raised."""
        if self._work is None:
            return otherwise
        try:
            result = self._work.result()
        except Exception:
            self._work = None  # said once
            raise
        self._work = None
        return result

    def close(self) -> None:
        """What was started is done first."""
        self._thread.shutdown()


def to_host(value: Any, room: Any = None) -> Any:
    """A copy of `value`, whose tensors are in host memory and whose lists and dicts are its own.

    `room`: an earlier copy that nobody reads any more; its tensors are written anew where they fit. New memory of this
    size takes the system longer than the copying. For a CUDA card the memory is pinned, several times faster.
    """
    if isinstance(value, Tensor):
        if not fits(room, value):
            room = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return room.copy_(value)
    if isinstance(value, dict):
        copied, room = copy.copy(value), room if isinstance(room, dict) else {}  # with a state dict's metadata
        copied.update({key: to_host(item, room.get(key)) for key, item in value.items()})
        return copied
    if isinstance(value, list):
        room = room if isinstance(room, list) else []
        return [to_host(item, earlier) for item, earlier in zip(value, chain(room, repeat(None)), strict=False)]
    return value


def fits(room: Any, value: Tensor) -> bool:
    shape = value.shape, value.dtype, value.stride()
    return isinstance(room, Tensor) and (room.shape, room.dtype, room.stride()) == shape


def save_scores(folder: Path, epoch: int, scores: dict[str, np.ndarray], keep_all: bool) -> None:
    """scores/epoch_NNN.npz; without keep_all the last epoch's alone is kept, for the report."""
    folder.mkdir(exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **scores)
    path = folder / f"epoch_{epoch:03d}.npz"
    write_atomically(path, content.getbuffer())
    for old in [] if keep_all else folder.glob("epoch_*.npz"):
        if old.name != path.name:
            old.unlink()
