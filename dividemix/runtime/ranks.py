"""Several processes that train one pair of networks together (torchrun): who has which rows, and what is shared.

All ranks make all draws; then rank r of K takes the rows r, r + K ... of a global batch, which is first filled up with
its own rows until K divides it. Evaluation deals out whole batches, those of a single process, so losses are the same.
"""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from dividemix import DivideMixError

# How long a rank waits for the others: the first may be looking at a million images. A rank that dies is noticed at
# once, by the closed connection or by torchrun, so this is for a machine that vanishes.
TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes: `rank` of all, `local_rank` of those on this machine. Alone by default."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def pad_to_world(self, rows: NDArray) -> NDArray:
        """A global batch's rows (n, ...), then their own beginning again until `world` divides them; none stay none."""
        n = len(rows)
        return rows[np.arange(-(-n // self.world) * self.world) % n] if n and n % self.world else rows

    def shard_rows(self, rows: NDArray) -> NDArray:
        """This rank's rows of a filled global batch."""
        return rows[self.rank :: self.world]

    def shard_batches(self, n: int) -> range:
        """Which of n evaluation batches are this rank's."""
        return range(self.rank, n, self.world)

    # Collectives: every rank must come to each of these, in the same order. Alone they give back what they got.

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Of several ranks: their tensors (...), of one shape -> (world, ...). Without gradients."""
        tensors = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(tensors, tensor)
        return torch.stack(tensors)

    def broadcast_from_rank0(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) on the first rank alone; its result, which must be picklable, on all. What it raises ends the
        first rank, and torchrun then ends the others."""
        if self.world == 1:
            return function(*args)
        result = [function(*args) if self.first else None]
        dist.broadcast_object_list(result, src=0)
        return result[0]

    def local_rank0_first(self, function: Callable[[], Any]) -> Any:
        """function() on every rank, but on each machine first by one process alone: for downloads."""
        if self.world > 1 and self.local_rank > 0:
            dist.barrier()
        result = function()
        if self.world > 1 and self.local_rank == 0:
            dist.barrier()
        return result

    def average_buffers(self, net: nn.Module) -> None:
        """Give all ranks the mean of their BN running statistics: each has seen its own rows only."""
        if self.world > 1:
            for buffer in net.buffers():
                if buffer.is_floating_point():
                    self.sum(buffer).div_(self.world)


def join(device: torch.device) -> Ranks:
    """The ranks that torchrun started this process among; `Ranks()` for a process that was started alone. NCCL on CUDA
    cards, gloo elsewhere. Raises DivideMixError where the other ranks cannot be reached."""
    rank, world, local_rank = from_environment()
    if world == 1:
        return Ranks()
    if not dist.is_initialized():
        backend, card = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=card)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DivideMixError(f"rank {rank} of {world} cannot reach the others: {reason}") from error
    return Ranks(rank, world, local_rank)


def leave() -> None:
    """At the end of a process that `join`ed others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_this_machine() -> int:
    """How many ranks torchrun started on this machine, 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def from_environment() -> tuple[int, ...]:
    """(rank, world, local rank) as torchrun sets them; (0, 1, 0) without it."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    return tuple(int(os.environ.get(name, alone)) for name, alone in names.items())
