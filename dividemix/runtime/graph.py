"""Steps captured in a CUDA graph."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class GraphPool:
    """One stream and one memory pool for several graphs: the blocks of a pool are used again on the same stream only.
    Keep all graphs that were captured here until none is needed any more: the pool ends with its last graph."""

    def __init__(self):
        self.stream = torch.cuda.Stream()  # the default stream cannot be captured
        self.pool = torch.cuda.graph_pool_handle()


class CapturedStep:
    """`step(*inputs)` -> a tensor, captured with copies of these inputs. A call with other inputs of the same shapes
    replays it, in one launch by the host instead of two thousand.

    A replay uses the addresses and the Python numbers of the capture: whatever changes must come in as `inputs` or be
    a tensor that is changed in place. The next call overwrites the result. `state` lists the tensors that the step
    changes; the capture, which runs the step a few times, leaves them as they were. Steps that share a `pool` never run
    at the same time. Raises what the capture raises; ValueError for a call with other shapes.
    """

    def __init__(self, step: Callable[..., Tensor], inputs: Sequence[Tensor], state: Sequence[Tensor], pool: GraphPool):
        self.inputs = [tensor.clone() for tensor in inputs]
        with preserved(state):
            self.replay, self.output = capture(lambda: step(*self.inputs), pool)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if [x.shape for x in inputs] != [x.shape for x in self.inputs]:  # a copy would broadcast
            raise ValueError("a captured step was called with inputs of other shapes")
        torch._foreach_copy_(self.inputs, list(inputs))
        self.replay()
        return self.output


def capture(step: Callable[[], Tensor], pool: GraphPool) -> tuple[Callable[[], None], Tensor]:
    """Run `step` to warm up and capture it on the current card. -> (replay, the output that each replay overwrites)."""
    graph = torch.cuda.CUDAGraph()
    pool.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(pool.stream):  # also ends where a capture fails
        for _ in range(3):  # compilation, choice of algorithms, work spaces
            step()
        # Other threads (a data loader's, the mixture's) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool.pool, pool.stream, capture_error_mode="thread_local"):
            output = step()
    torch.cuda.current_stream().wait_stream(pool.stream)
    return graph.replay, output


@contextlib.contextmanager
def preserved(state: Sequence[Tensor]) -> Iterator[None]:
    """After the block, also after an error, the tensors hold the same values as before, at the same addresses, and
    torch's random streams go on as if nothing had been drawn: else dropout would depend on when a step is captured."""
    before = [tensor.detach().clone() for tensor in state]
    try:
        with torch.random.fork_rng({tensor.device for tensor in state if tensor.is_cuda}):
            yield
    finally:
        for tensor, value in zip(state, before, strict=True):
            tensor.detach().copy_(value)
