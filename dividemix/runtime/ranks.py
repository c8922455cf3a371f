"""Several processes that train one pair of networks together (torchrun): which rows each one takes, what they share.

All ranks draw the same random numbers. Then rank r of K takes the rows r, r + K, ... of a global batch, which is first
padded with its own first rows until K divides it. In evaluation each rank takes whole batches, the same as in a single
process, so the losses are the same to the bit.
"""

import datetime
import math
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

# How long a rank waits for the others: the first rank may be checking a million images. A rank that dies is noticed at
# once, by its closed connection or by torchrun; this limit is for a machine that is cut off.
TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes: `rank` counts all, `local_rank` those on this machine. Default: alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def pad_to_world(self, rows: NDArray) -> NDArray:
        """The rows (n, ...) of a global batch, the first ones repeated at the end until `world` divides n; 0 stay 0."""
        n = len(rows)
        return rows[np.arange(-(-n // self.world) * self.world) % n] if n and n % self.world else rows

    def shard_rows(self, rows: NDArray) -> NDArray:
        """This rank's rows of a padded global batch."""
        return rows[self.rank :: self.world]

    def shard_batches(self, n: int) -> range:
        """The numbers of this rank's evaluation batches, of n."""
        return range(self.rank, n, self.world)

    # Collectives: every rank must call each of these, in the same order. A process alone gets back what it gives.

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The maximum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def log_mean(self, log_p: Tensor) -> Tensor:
        """log of the mean of p over the ranks, from log p of equal shares of a batch. The gradient is scaled so that
        its mean over the ranks is that of the whole batch."""
        if self.world == 1:
            return log_p
        gathered = [torch.empty_like(log_p) for _ in range(self.world)]
        dist.all_gather(gathered, log_p.detach())
        log_mean = torch.stack(gathered).logsumexp(dim=0) - math.log(self.world)
        ratio = (log_p - log_mean).exp()  # of this rank's p to the mean; its gradient is that of log p
        return log_mean + ratio - ratio.detach()

    def broadcast_from_rank0(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call function(*args) on the first rank only and return its result, which must be picklable, on all. An
        exception ends the first rank, and torchrun then ends the others."""
        if self.world == 1:
            return function(*args)
        result = [function(*args) if self.first else None]
        dist.broadcast_object_list(result, src=0)
        return result[0]

    def local_rank0_first(self, function: Callable[[], Any]) -> Any:
        """Call function() on every rank, but on each machine first in one process alone: for downloads."""
        if self.world > 1 and self.local_rank > 0:
            dist.barrier()
        result = function()
        if self.world > 1 and self.local_rank == 0:
            dist.barrier()
        return result

    def average_buffers(self, net: nn.Module) -> None:
        """Give all ranks the mean of their BN running statistics, as each has seen only its own rows."""
        if self.world > 1:
            for buffer in net.buffers():
                if buffer.is_floating_point():
                    self.sum(buffer).div_(self.world)


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """Join the ranks that torchrun started; `ALONE` for a process that was started without it. NCCL on CUDA cards, gloo
    elsewhere. Raises DivideMixError where the other ranks cannot be reached."""
    ranks = from_environment()
    if ranks.world == 1:
        return ALONE
    if not dist.is_initialized():
        backend, card = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=card)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DivideMixError(f"rank {ranks.rank} of {ranks.world} cannot reach the others: {reason}") from error
    return ranks


def leave() -> None:
    """Undo `join`, at the end of the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_this_machine() -> int:
    """How many ranks torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def from_environment() -> Ranks:
    """This process by torchrun's environment variables, before `join`; equal to `ALONE` without it."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    return Ranks(*(int(os.environ.get(name, default)) for name, default in defaults.items()))
