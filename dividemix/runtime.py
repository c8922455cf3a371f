"""How the algorithm is run: device, precision, memory format, compiled, captured. What is computed: see `engine`."""

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dividemix import DivideMixError, warn
from dividemix.graph import CapturedStep, Place, preserved
from dividemix.layers import GroupedBatchNorm2d, can_merge, grouped
from dividemix.ranks import Ranks, from_environment, join


@dataclass
class Runtime:
    """One device and how it is used. Without more than a device it is the reference: eager, fp32, each forward apart.

    precision: 'fp32' (no TF32) or 'bf16' (autocast; head and losses in float32). merge: several batches of one size
    go through a network together. compile: torch.compile fuses what stands between the convolutions. graph: training
    steps are captured in CUDA graphs. Compile and graph are for steady shapes, the full batches: see `run_partial` for
    others. Where either fails, that is said once and the run goes on without it. ranks: the processes that train
    together; each forward with gradients averages them over these.
    """

    device: torch.device
    precision: str = "fp32"
    memory_format: torch.memory_format = torch.contiguous_format
    merge: bool = False
    compile: bool = False
    graph: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    eval_batch_size: int = 1000  # of loss passes and tests; halved where the memory is too small for it
    steps: dict[tuple, Callable[..., Tensor]] = field(default_factory=dict, repr=False)  # compiled, captured
    parallel: dict[nn.Module, DistributedDataParallel] = field(default_factory=dict, repr=False)  # with several ranks

    def prepare(self, net: nn.Module) -> nn.Module:
        """Move a network to the device and into the memory format, and exchange its layers for those that this runtime
        needs; keys, parameters and values stay."""
        for module in net.modules():
            if self.merge and type(module) is nn.BatchNorm2d:
                module.__class__, module.groups = GroupedBatchNorm2d, 1  # its own 1: torch.compile guards on it
        net = net.to(self.device, memory_format=self.memory_format)
        if self.ranks.world > 1:
            # Running statistics are each rank's own during a phase; `Ranks.average_buffers` ends it.
            with warnings.catch_warnings():  # the flag has a new name from torch 2.14 on, 2.11 knows this one
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                warnings.filterwarnings("ignore", "`broadcast_buffers`", DeprecationWarning)
                self.parallel[net] = DistributedDataParallel(net, broadcast_buffers=False)
        return net

    def forward(self, net: nn.Module, *batches: Tensor) -> list[Tensor]:
        """The logits of each batch, float32, as from one call of `net` after the other.

        In train mode each batch has its own statistics, also where they go through the network together. Autocast keeps
        no cast weights: such a cache, filled before an update or without gradients, would serve the later forward.
        """
        return self._forward(call, net, batches)

    def compiled_forward(self, net: nn.Module, *batches: Tensor) -> list[Tensor]:
        """The same through torch.compile: for shapes that come again and again."""
        return self._forward(self._compiled, net, batches)

    def evaluation_forward(self, net: nn.Module, *batches: Tensor) -> list[Tensor]:
        """Compiled where this runtime compiles, for full evaluation batches: they change nothing, so a compilation that
        fails can be left out on the spot."""
        if self.compile:
            try:
                return self.compiled_forward(net, *batches)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._give_up("compile", error)
        return self.forward(net, *batches)

    def _forward(self, function: Callable[..., Tensor], net: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
        if net.training and torch.is_grad_enabled():
            net = self.parallel.get(net, net)

        def logits(x: Tensor) -> Tensor:
            x = x.contiguous(memory_format=self.memory_format)
            bf16 = self.precision == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                return function(net, x).float()

        sizes = [len(x) for x in batches]
        if self.merge and len(batches) > 1:
            if not net.training:
                return list(logits(torch.cat(batches)).split(sizes))
            if len(set(sizes)) == 1 and can_merge(net):
                with grouped(net, len(batches)):
                    return list(logits(torch.cat(batches)).split(sizes))
        return [logits(x) for x in batches]

    @cached_property
    def _compiled(self) -> Callable[..., Tensor]:
        torch._dynamo.config.recompile_limit = 64  # nets, modes, batch sizes; beyond it torch goes eager silently
        return torch.compile(call, dynamic=False)  # its own CUDA graphs off: two nets would overwrite each other's

    def run(
        self, key: tuple, step: Callable[..., Tensor], inputs: Sequence[Tensor], state: Callable[[], list[Tensor]]
    ) -> Tensor:
        """step(forward, *inputs) -> one tensor, valid until the next run; for inputs of steady shapes.

        `key` says what the step is, by all that it was made from but the inputs. Its first run compiles and captures,
        later ones replay. `state` lists the tensors that the step changes in place.
        """
        if not (self.compile or self.graph):
            return step(self.forward, *inputs)
        if key not in self.steps:
            self.steps[key] = self._steady(step, inputs, state())
        return self.steps[key](*inputs)

    def run_partial(self, step: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """step(forward, *inputs) for a batch whose size may never come again: eager and without cuDNN's autotuning,
        which tries many kernels for every convolution of a new size (2.4 s for one batch on an H200)."""
        with without_autotuning():
            return step(self.forward, *inputs)

    def _steady(self, step, inputs: Sequence[Tensor], state: list[Tensor]) -> Callable[..., Tensor]:
        """Compile and capture, as far as this runtime does; the step is not applied."""
        if self.compile:
            try:
                with preserved(state):
                    step(self.compiled_forward, *inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._give_up("compile", error)
        run = partial(step, self.compiled_forward if self.compile else self.forward)
        if self.graph:
            try:
                return CapturedStep(run, inputs, state, self._place)
            except RuntimeError as error:  # out of memory among them
                self._give_up("graph", error)
                self.steps.clear()  # the graphs' memory: the run needs it now
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return run

    @cached_property
    def _place(self) -> Place:
        return Place()

    def _give_up(self, what: str, error: BaseException) -> None:
        setattr(self, what, False)
        if what == "graph" and error.__context__ is not None:
            error = error.__context__  # a capture that fails ends with a second error, which says less
        name = {"compile": "torch.compile", "graph": "the CUDA graph"}[what]
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warn(f"{name} failed, the run goes on without it, slower ({reason}); --no_{what} leaves it out from the start")

    def background(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Start host work that a card need not wait for. -> a function that waits and gives its result. On a CPU, whose
        cores have other work, it is done at once. Of several ranks the first does it, and all get its result."""
        if self.ranks.world > 1:  # at once: what is shared in a thread could cross what the ranks share meanwhile
            return at_once(self.ranks.from_first, function, *args)
        if self.device.type == "cuda":
            return self._worker.submit(function, *args).result
        return at_once(function, *args)

    @cached_property
    def _worker(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    def optimizer(self, net: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9) -> torch.optim.SGD:
        """SGD without Nesterov, weight decay on every parameter, BN and biases included.

        Its `found_inf` is the device-side flag that `engine.update` sets at the first non-finite loss or gradient:
        from then on fused SGD leaves weights and momentum as they are. On a card the learning rate is a tensor, for
        graphs; the momentum is there, 0, before the first step, since `run` preserves what is there.
        """
        fused = self.device.type in ("cuda", "cpu")
        rate = torch.tensor(lr, device=self.device) if self.graph or self.device.type == "cuda" else lr
        optimizer = torch.optim.SGD(net.parameters(), rate, momentum, weight_decay=weight_decay, fused=fused)
        if fused:
            optimizer.found_inf = torch.zeros((), device=self.device)
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def describe(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{self.device.type}, {torch.get_num_threads()} threads"
        if self.ranks.world > 1:
            name = f"{self.ranks.world} ranks, each: {name}"
        arithmetic = "fp32, TF32 off" if self.precision == "fp32" else "bf16 autocast, losses in fp32"
        faster = "".join(f", {text}" for text, on in (("compiled", self.compile), ("CUDA graphs", self.graph)) if on)
        return f"{name}; {arithmetic}{faster}; torch {torch.__version__}"


PLAIN = Runtime(torch.device("cpu"))  # the reference


def call(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


@contextlib.contextmanager
def without_autotuning() -> Iterator[None]:
    """cuDNN takes the kernel that its heuristic names. The flag is the process's: it holds for autograd's thread too.
    torch.backends.cudnn.flags would set all others to its own defaults."""
    tuned = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tuned


def at_once(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """`Runtime.background` without a background."""
    result = function(*args)
    return lambda: result


def load_optimizer(optimizer: torch.optim.SGD, state: dict[str, Any]) -> None:
    """Restore an optimizer from its state dict, also one that another device wrote: momentum takes its parameter's
    memory layout; which SGD kernel runs, and whether the learning rate is a tensor, stay this machine's choice. Raises
    DivideMixError for a state that is not one of this optimizer."""
    own = [(group["fused"], group["lr"]) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for group, (fused, lr) in zip(optimizer.param_groups, own, strict=True):
            saved, group["fused"], group["lr"] = float(group["lr"]), fused, lr
            set_learning_rate(group, saved)
            for parameter in group["params"]:
                momentum = optimizer.state[parameter]["momentum_buffer"]
                if momentum.shape != parameter.shape:
                    raise ValueError("momentum of another shape")
                optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise DivideMixError("the last checkpoint's optimizer is not that of this network") from error


def set_learning_rate(group: dict[str, Any], lr: float) -> None:
    """Of one parameter group, in place where it is a tensor: a captured step reads it there."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def start(
    device: str = "auto",
    gpuid: int = 0,
    precision: str = "auto",
    deterministic: bool = False,
    width: int = 64,
    *,
    batch_size: int = 1,
    eval_batch_size: int = 1000,
    compile: bool = True,
    graph: bool = True,
) -> Runtime:
    """The runtime for these flags; `width`: channels of the network's first stage. compile and graph act on a CUDA card
    only (on a CPU compiled steps measured no faster); deterministic leaves compile out. Under torchrun each rank takes
    the card of its local rank, steps run eagerly, and `batch_size`, that of all ranks together, must divide.

    Raises DivideMixError for a device that is not there and for a batch that does not divide; warns of a card that
    torch cannot use.
    """
    _, world, local_rank = from_environment()
    if batch_size % world:
        raise DivideMixError(
            f"--batch_size {batch_size} is that of all ranks together: {world} ranks do not divide it; "
            f"the next that they do is {-(-batch_size // world) * world}"
        )
    chosen = pick_device(device, local_rank if world > 1 else gpuid, "local rank" if world > 1 else "--gpuid")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if world > 1 and chosen.type == "mps":
        raise DivideMixError("--device mps has no way to train with several ranks: use --device cpu")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    native = computes_bf16(chosen)
    if precision == "bf16" and chosen.type == "mps":
        raise DivideMixError("--precision bf16 is not supported on mps: use fp32")
    if precision == "bf16" and not native:
        warn(f"--precision bf16: {chosen.type} here has no bf16 units, fp32 would be faster")
    precision = ("bf16" if native else "fp32") if precision == "auto" else precision
    ranks = join(chosen)
    on_card, on_cpu = chosen.type == "cuda", chosen.type == "cpu"
    if on_cpu:
        use_cores()
    alone = on_card and ranks.world == 1  # graphs and compiled steps have not been tried with several ranks
    compile, graph = compile and alone and not deterministic, graph and alone
    return Runtime(
        chosen,
        precision,
        # On a CPU, channels_last is vectorised over channels: fewer than 16 leave its vector units half empty. With
        # fewer than 8, the backward pass of strided 1x1 convolutions writes out of bounds on AVX2 (torch 2.14.1).
        torch.contiguous_format if on_cpu and width < 16 else torch.channels_last,
        merge=compile or graph,  # on a CPU it measured no faster
        compile=compile,
        graph=graph,
        ranks=ranks,
        eval_batch_size=eval_batch_size,
    )


def available_cores(group: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use, also inside a container that has a share of the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = group.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or 'max': no limit
        pass
    return max(cores, 1)


def use_cores(group: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """No more threads than this process has cores: torch counts the machine's. OMP_NUM_THREADS wins."""
    cores = available_cores(group)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def pick_device(device: str, gpuid: int, source: str = "--gpuid") -> torch.device:
    """auto: CUDA card `gpuid`, else mps, else the CPU. source: what gave the number, for messages."""
    if device in ("auto", "cuda"):
        if torch.cuda.is_available():
            if gpuid >= torch.cuda.device_count():
                raise DivideMixError(
                    f"{source} {gpuid}: this machine has {torch.cuda.device_count()} CUDA cards, 0 is the first"
                )
            return torch.device("cuda", gpuid)
        problem = unusable_card()
        if device == "cuda":
            raise DivideMixError(
                f"--device cuda: {problem or 'no CUDA card here'}; use --device cpu to run without one"
            )
        if problem:
            warn(f"A GPU IS HERE BUT NOT USED, TRAINING WILL BE SLOW: {problem}")
    mps = torch.backends.mps.is_available()
    if device == "mps" and not mps:
        raise DivideMixError("--device mps: not available here; use --device cpu")
    return torch.device("mps" if mps and device in ("auto", "mps") else "cpu")


def unusable_card(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Why torch cannot use the NVIDIA card whose driver is installed, None where there is no such driver."""
    if not proc.exists() and not shutil.which("nvidia-smi"):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build: install the CUDA build of torch"
    words = proc.read_text().split() if proc.exists() else []
    driver = next((word for word in words if word[:1].isdigit() and "." in word), "version unknown")
    return (
        f"an NVIDIA driver ({driver}) is installed, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds no "
        "usable card: update the driver, install a torch built for an older CUDA, or look at CUDA_VISIBLE_DEVICES"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Of a card, or of the host, whose allocator in torch has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 runs on the device's own units: CUDA sm80 and later, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
