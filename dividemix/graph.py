"""A step captured once in a CUDA graph: one launch by the host, instead of two thousand, each time it is run again.

A graph replays the kernels that were launched while it was captured, with the addresses and the host's numbers of then.
So all that changes from step to step must come in as `inputs` or be a tensor that is changed in place: weights,
momentum, BN statistics, the learning rate.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # runs before the capture: compilation, choice of algorithms, work spaces


class CapturedStep:
    """`step(*inputs)` -> a tensor, captured with copies of the given inputs; called with others of the same shapes, it
    replays.

    The result is one tensor, overwritten by the next call. The step must not synchronise with the host. It is run a few
    times before the capture; `state` names the tensors that it changes, which afterwards are as before. Raises what the
    capture raises.
    """

    def __init__(self, step: Callable[..., Tensor], inputs: Sequence[Tensor], state: Sequence[Tensor]):
        self.inputs = [tensor.clone() for tensor in inputs]
        with preserved(state):
            self.replay, self.output = capture(lambda: step(*self.inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.replay()
        return self.output


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Run `step` to warm up and capture it on the current card. -> (replay, the output that each replay overwrites)."""
    side = torch.cuda.Stream()  # the default stream cannot be captured
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads (a data loader's, the mixture's) may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=shared_pool(), stream=side, capture_error_mode="thread_local"):
        output = step()
    return graph.replay, output


@functools.cache
def shared_pool():
    """The memory of all graphs: they run in turn, and nobody reads what one left behind but its output."""
    return torch.cuda.graph_pool_handle()


@contextlib.contextmanager
def preserved(state: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens in the block, the tensors hold afterwards what they held before, at the same addresses."""
    before = [tensor.detach().clone() for tensor in state]
    try:
        yield
    finally:
        for tensor, value in zip(state, before, strict=True):
            tensor.detach().copy_(value)
