"""The two loops over batches: the steps of a training phase, and evaluation.

They choose the fast path for full batches, say what to do where memory is short, stop training at the first loss that
is not finite, and read results back from the device once, at the end. What a step computes: see `engine`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dividemix import Diverged, DivideMixError, warn
from dividemix.runtime.device import Runtime, is_out_of_memory
from dividemix.runtime.ranks import ALONE, Ranks

# forward(net, *batches) -> the logits of each batch, as separate calls of net, one after the other, would give them
Forward = Callable[..., list[Tensor]]
Bar = Callable[[Iterable], Iterable]  # a progress bar around batches; `iter` shows nothing


@dataclass
class Batches:
    """The batches of one phase. sizes: the row counts of each batch, labeled and (mixmatch) unlabeled."""

    sizes: list[tuple[int, ...]]
    batches: Iterable[tuple[Tensor, ...]]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self.batches)


class EvaluationSet(Protocol):
    """What `evaluate` needs of a data set (see `engine.DataSet`)."""

    runtime: Runtime

    def __len__(self) -> int: ...
    def eval_batches(self, batch_size: int) -> Iterable[tuple[Tensor, ...]]: ...


# ---- Training ----


def update(optimizer: Optimizer, loss: Tensor, ranks: Ranks = ALONE) -> None:
    """Backward pass and SGD step. If the optimizer has a `found_inf` flag (see `Runtime.optimizer`), the first
    non-finite loss or gradient of any rank sets it, on the device; neither this update nor any later one is applied.

    In fp16 (`grad_scale`) the loss is scaled for the backward pass. A non-finite gradient of a finite loss halves the
    scale, and only this update is left out, down to a scale of 1; 2000 finite steps double it (torch's GradScaler). A
    non-finite loss, which no scale mends, has also made BN's running statistics so: it stops all updates, as above."""
    optimizer.zero_grad(set_to_none=True)
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    (loss if scale is None else loss * scale).backward()
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.isfinite(torch.stack([loss.detach(), torch.nn.utils.get_total_norm(grads)]))
        not_finite = ranks.maximum((~finite).to(found_inf.dtype))  # loss, gradient
        found_inf.copy_(torch.maximum(found_inf, not_finite.max()))
    optimizer.step()
    if found_inf is not None and scale is not None:
        torch._amp_update_scale_(scale, optimizer.param_groups[0]["growth"], found_inf, 2.0, 0.5, 2000)
        scale.mul_(1 - not_finite[0])
        found_inf.copy_(scale < 1)


def changed_by_step(net: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """All tensors that a step changes in place: weights, BN statistics, momentum, the flag of a non-finite loss, the
    scale of the loss."""
    momentum = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    flag = [optimizer.found_inf] if hasattr(optimizer, "found_inf") else []
    scale = [group[name] for group in optimizer.param_groups for name in ("grad_scale", "growth") if name in group]
    return [*net.parameters(), *net.buffers(), *momentum, *flag, *scale]


@contextlib.contextmanager
def layers_draw_from(rng: np.random.Generator, net: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Within the block, layers that draw random numbers (dropout, stochastic depth; p is their probability) take them
    from torch's global stream, seeded by `rng`, with another seed on each rank. For networks without such layers, as
    the paper's are, nothing is drawn from `rng`."""
    if not any(getattr(module, "p", 0) for module in net.modules()):
        yield
        return
    seed = int(rng.integers(2**62)) + runtime.ranks.rank
    with torch.random.fork_rng([runtime.device] if runtime.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def run_steps(
    key: tuple,
    step: Callable[..., Sequence[Tensor]],
    batches: Batches,
    draws: Sequence[tuple[Tensor, ...]],
    batch_size: int,
    net: nn.Module,
    optimizer: Optimizer,
    runtime: Runtime,
    rng: np.random.Generator,
    bar: Bar = iter,
) -> list[float]:
    """Run step(forward, *draws[i], *batch), which gives 0-d tensors, for every batch. -> their means over the steps.

    Full batches take the runtime's fast path under `key` (see `Runtime.run`). `rng` seeds the layers that draw. Raises
    Diverged for a loss or gradient that is not finite, DivideMixError where the memory is too small.
    """
    found_inf, ranks = getattr(optimizer, "found_inf", None), runtime.ranks
    average = runtime.averages.get(net)
    state, full = partial(changed_by_step, net, optimizer), batch_size // ranks.world

    def packed(forward: Forward, *tensors: Tensor) -> Tensor:  # the step's terms, then 1 if all is finite, else 0
        terms = torch.stack(tuple(step(forward, *tensors)))
        finite = torch.isfinite(terms).all() if found_inf is None else found_inf == 0
        return torch.cat([terms, finite.to(terms.dtype).reshape(1)])

    sums = torch.zeros((), device=runtime.device)
    try:
        with layers_draw_from(rng, net, runtime):
            for batch, drawn, sizes in zip(bar(batches), draws, batches.sizes, strict=True):
                # A partial batch also occurs in mid-epoch, where the unlabeled set ends and is reshuffled.
                if all(size == full for size in sizes):
                    sums = sums + runtime.run(key, packed, (*drawn, *batch), state)
                else:
                    sums = sums + runtime.run_partial(packed, (*drawn, *batch))
                if average:
                    average.update()
            ranks.average_buffers(net)
            if average:
                ranks.average_buffers(average.net)
            *totals, finite_steps = (ranks.sum(sums) / ranks.world).tolist()
    except RuntimeError as error:
        if is_out_of_memory(error):
            remedy = "try --no_graph, a smaller --width or a smaller --batch_size"
            raise DivideMixError(f"{runtime.device}: not enough memory to train; {remedy}") from error
        raise
    steps = len(batches)
    if finite_steps < steps:
        stopped = "" if found_inf is None else ", and no update was applied from there on"
        fp16 = ", or values too large for fp16 (--precision fp32)" if runtime.precision == "fp16" else ""
        raise Diverged(
            f"the loss or a gradient was not finite at batch {int(finite_steps) + 1} of {steps}{stopped}. "
            f"Likely causes: --lr too high, damaged images, a weight file that does not fit{fp16}"
        )
    return [total / steps for total in totals]


# ---- Evaluation ----


def evaluate(score: Callable[..., Tensor], data: EvaluationSet, bar: Bar = iter) -> list[tuple[slice, Tensor]]:
    """score(forward, x, labels) of this rank's evaluation batches, each with the slice of its samples.

    Where a batch does not fit into memory, the batch size is halved until it fits, for the rest of the run. Raises
    DivideMixError where not even one image fits, and with several ranks, which must make the same batches.
    """
    runtime = data.runtime
    while True:
        size = min(runtime.eval_batch_size, len(data))
        try:
            numbers, results = runtime.ranks.shard_batches(-(-len(data) // size)), []
            for k, (x, labels) in zip(numbers, bar(data.eval_batches(size)), strict=True):
                forward = runtime.evaluation_forward if len(x) == size else runtime.forward
                results.append((slice(k * size, k * size + len(x)), score(forward, x, labels)))
            return results
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if runtime.ranks.world > 1 or size == 1:
                remedy = "use a smaller --eval_batch_size or --width"
                raise DivideMixError(f"{runtime.device}: no memory to evaluate {size} images; {remedy}") from error
        runtime.eval_batch_size = size // 2
        x = labels = results = None  # otherwise they stay in memory during the next attempt
        torch.cuda.empty_cache()
        warn(f"not enough memory to evaluate {size} images at once: {size // 2} from now on (--eval_batch_size)")


def evaluate_rows(score: Callable[..., Tensor], data: EvaluationSet, bar: Bar = iter) -> Tensor:
    """score(forward, x, labels) -> (B, K) float32, of all N samples: (N, K) on the device, the same on all ranks."""
    results, ranks = evaluate(score, data, bar), data.runtime.ranks
    width = ranks.broadcast_from_rank0(lambda: results[0][1].shape[1])  # a rank may have no batch
    table = torch.zeros(len(data), width, device=data.runtime.device)
    for rows, values in results:
        table[rows] = values
    return ranks.sum(table)
