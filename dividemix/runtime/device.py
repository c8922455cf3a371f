"""How the algorithm is run: device, precision, memory format, compiled, captured. What is computed: see `engine`."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count as available_cores  # in a container: the cores that it may use
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dividemix import DivideMixError, warn
from dividemix.runtime.average import Average
from dividemix.runtime.graph import CapturedStep, GraphPool, preserved
from dividemix.runtime.layers import GroupedBatchNorm2d, can_merge, grouped
from dividemix.runtime.ranks import Ranks, from_environment, join

FIRST_SCALE = 2.0**12  # of the loss in fp16


@dataclass
class Runtime:
    """One device and how it is used. The defaults are the reference: eager, fp32, each batch in its own forward pass.

    precision: 'fp32' (no TF32), 'bf16' or 'fp16' (autocast; head and losses in float32; fp16 with a scaled loss, see
    `loops.update`). merge: several batches of one size go through a network together. compile: torch.compile fuses the
    layers between convolutions. graph: training steps are captured in CUDA graphs. If either fails, there is one
    warning and the run goes on without it. ranks: the processes that train together; gradients are averaged over them.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    memory_format: torch.memory_format = torch.contiguous_format
    merge: bool = False
    compile: bool = False
    graph: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    eval_batch_size: int = 1000  # in loss passes and tests; halved if it does not fit into memory
    steps: dict[tuple, Callable[..., Tensor]] = field(default_factory=dict, repr=False)  # by key: compiled, captured
    parallel: dict[nn.Module, DistributedDataParallel] = field(default_factory=dict, repr=False)  # with several ranks
    averages: dict[nn.Module, Average] = field(default_factory=dict, repr=False)  # with --ema, of each network

    def averaged(self, nets: Sequence[nn.Module]) -> list[nn.Module]:
        """The average of each network that has one; else the network itself."""
        return [self.averages[net].net if net in self.averages else net for net in nets]

    def prepare(self, net: nn.Module) -> nn.Module:
        """Move a network to the device and into the memory format. Where batches are merged, its BN layers change their
        class; keys, parameters and values stay."""
        for module in net.modules():
            if self.merge and type(module) is nn.BatchNorm2d:
                module.__class__, module.groups = GroupedBatchNorm2d, 1  # on the instance: torch.compile guards on it
        net = net.to(self.device, memory_format=self.memory_format)
        if self.ranks.world > 1:
            # During a phase each rank has its own running statistics; `Ranks.average_buffers` ends it.
            with warnings.catch_warnings(action="ignore"):  # torch 2.14 has renamed the flag
                self.parallel[net] = DistributedDataParallel(net, broadcast_buffers=False)
        return net

    def forward(self, net: nn.Module, *batches: Tensor) -> list[Tensor]:
        """The logits of each batch, float32, as from separate calls of `net`, one after the other: in train mode each
        batch has its own statistics, also where all go through the network together."""
        return self._forward(call, net, batches)

    def compiled_forward(self, net: nn.Module, *batches: Tensor) -> list[Tensor]:
        """The same through torch.compile: for shapes that occur again and again."""
        return self._forward(self._compiled, net, batches)

    def evaluation_forward(self, net: nn.Module, *batches: Tensor) -> list[Tensor]:
        """For full evaluation batches: compiled, if this runtime compiles. They change no state, so where compilation
        fails the same batch is simply computed without it."""
        if self.compile:
            with self._optional("compile"):
                return self.compiled_forward(net, *batches)
        return self.forward(net, *batches)

    def _forward(self, function: Callable[..., Tensor], net: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
        if net.training and torch.is_grad_enabled():
            net = self.parallel.get(net, net)

        def logits(x: Tensor) -> Tensor:
            x = x.contiguous(memory_format=self.memory_format) if x.ndim == 4 else x  # features have no such format
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
            # No cache of cast weights: a later forward would get those from before an update, or without gradients.
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
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
        """step(forward, *inputs) -> one tensor, valid until the next run; for inputs whose shapes never change. `key`:
        all that the step depends on except the inputs. The first run of a key compiles and captures, later ones replay.
        `state` lists the tensors that the step changes in place."""
        if not (self.compile or self.graph):
            return step(self.forward, *inputs)
        if key not in self.steps:
            self.steps[key] = self._compile_and_capture(step, inputs, state())
        return self.steps[key](*inputs)

    def run_partial(self, step: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """step(forward, *inputs) for a batch whose size may not occur again: eager and without cuDNN's autotuning,
        which tries many kernels for every convolution of a new size (2.4 s for one batch on an H200)."""
        autotune = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False  # for autograd's thread too; the context manager `flags` would set more
        try:
            return step(self.forward, *inputs)
        finally:
            torch.backends.cudnn.benchmark = autotune

    def _compile_and_capture(self, step, inputs: Sequence[Tensor], state: list[Tensor]) -> Callable[..., Tensor]:
        """Whichever of the two this runtime does. The state stays as it was: the step is not applied."""
        if self.compile:
            with self._optional("compile"), preserved(state):
                step(self.compiled_forward, *inputs)
        run = partial(step, self.compiled_forward if self.compile else self.forward)
        if self.graph:
            with self._optional("graph"):
                return CapturedStep(run, inputs, state, self._graph_pool)
            self.steps.clear()  # the graphs' memory: the run needs it now
            torch.cuda.empty_cache()
        return run

    _graph_pool = cached_property(lambda self: GraphPool())

    @contextlib.contextmanager
    def _optional(self, feature: str) -> Iterator[None]:
        """The block tries 'compile' or 'graph': if it fails, the runtime warns and goes on without it from then on."""
        try:
            yield
        except Exception as error:
            if feature == "compile" and is_out_of_memory(error):
                raise
            setattr(self, feature, False)
            if feature == "graph" and error.__context__ is not None:
                error = error.__context__  # a capture that fails ends with a second error, which says less
            name = {"compile": "torch.compile", "graph": "the CUDA graph"}[feature]
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            warn(f"{name} failed, the run goes on without it, slower ({reason}); --no_{feature} leaves it out")

    def background(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Start host work for which a card need not wait. -> a function that waits and returns its result. On a CPU,
        whose cores are busy, it runs at once. With several ranks the first one does it, and all get its result."""
        if self.ranks.world > 1:  # at once: a collective in a thread could mix with those of the main thread
            return at_once(self.ranks.broadcast_from_rank0, function, *args)
        if self.device.type == "cuda":
            return self._worker.submit(function, *args).result
        return at_once(function, *args)

    _worker = cached_property(lambda self: ThreadPoolExecutor(1))

    def optimizer(self, net: nn.Module, lr: float, weight_decay: float) -> torch.optim.SGD:
        """SGD without Nesterov, weight decay on every parameter, BN and biases included. Once `loops.update` has set
        its flag `found_inf`, on the device, fused SGD leaves weights and momentum unchanged. For CUDA graphs, the
        learning rate is a tensor on a card, and the momentum exists, as 0, before the first step. In fp16 SGD divides
        the gradients by `grad_scale`; this and `growth`, the finite steps since it last changed, are tensors of the
        only group, so that the state dict has them."""
        fused = self.device.type in ("cuda", "cpu")
        rate = torch.tensor(lr, device=self.device) if self.graph or self.device.type == "cuda" else lr
        optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=weight_decay, fused=fused)
        if fused:
            optimizer.found_inf = torch.zeros((), device=self.device)
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if self.precision == "fp16":
            optimizer.grad_scale = torch.tensor(FIRST_SCALE, device=self.device)
            growth = torch.zeros((), dtype=torch.int32, device=self.device)
            optimizer.param_groups[0] |= {"grad_scale": optimizer.grad_scale, "growth": growth}
        return optimizer

    def describe(self) -> str:
        on_card = self.device.type == "cuda"
        threads = f"{self.device.type}, {torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(self.device) if on_card else threads
        ranks = f"{self.ranks.world} ranks, each: " if self.ranks.world > 1 else ""
        arithmetic = "fp32, TF32 off" if self.precision == "fp32" else f"{self.precision} autocast, losses in fp32"
        faster = "".join(f", {text}" for text, on in (("compiled", self.compile), ("CUDA graphs", self.graph)) if on)
        return f"{ranks}{name}; {arithmetic}{faster}; torch {torch.__version__}"


def call(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def at_once(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """`Runtime.background` without a thread: call the function now, return its result later."""
    result = function(*args)
    return lambda: result


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer from its state dict, also from one of another device: momentum takes the memory layout of
    its parameter; the SGD kernel, and whether the learning rate is a tensor, stay as this runtime has them."""
    [kept] = optimizer.param_groups
    optimizer.load_state_dict(state)
    [group] = optimizer.param_groups
    saved, group["fused"], group["lr"] = float(group["lr"]), kept["fused"], kept["lr"]
    set_learning_rate([optimizer], saved)
    for name in kept.keys() & {"grad_scale", "growth"}:  # in place: a captured step reads them there
        group[name] = kept[name].copy_(group[name])
    for parameter in group["params"]:
        momentum = optimizer.state[parameter]["momentum_buffer"]
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> float:
    """Set it, in place where it is a tensor, because a captured step reads it there. -> lr"""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


# ---- The runtime for the flags and this machine ----


def start(
    device: str = "auto",
    gpuid: int = 0,
    precision: str = "auto",
    deterministic: bool = False,
    width: int = 64,
    *,
    batch_size: int = 1,
    eval_batch_size: int | None = None,
    large_images: bool = False,
    compile: bool = True,
    graph: bool = True,
) -> Runtime:
    """The runtime for these flags; `width`: channels of the network's first stage. compile and graph act on a CUDA card
    only (on a CPU, compiled steps were no faster); deterministic switches compile off. Under torchrun each rank takes
    the card with the number of its local rank, and steps run eagerly. eval_batch_size: by default 1,000, of
    large images 200; on a CPU 64, whose activations stay in its cache.

    Raises DivideMixError for a device that is not there, and for a batch_size (of all ranks together) that the number
    of ranks does not divide; warns of a card that torch cannot use."""
    ranks = from_environment()
    world = ranks.world
    if batch_size % world:
        problem = f"is that of all ranks together: {world} ranks do not divide it"
        raise DivideMixError(f"--batch_size {batch_size} {problem}; take {-(-batch_size // world) * world}")
    chosen = pick_device(device, ranks.local_rank if world > 1 else gpuid)
    on_card, on_cpu, native = chosen.type == "cuda", chosen.type == "cpu", computes_bf16(chosen)
    if chosen.type == "mps" and (world > 1 or precision in ("bf16", "fp16")):
        problem = f"--precision {precision} is not supported" if world == 1 else "several ranks are not supported"
        raise DivideMixError(f"--device mps: {problem}: use --device cpu")
    if (precision == "bf16" and not native) or (precision == "fp16" and not on_card):
        warn(f"--precision {precision}: on this {chosen.type} fp32 is usually faster")
    if on_card:
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    cores = available_cores()
    if on_cpu and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)  # torch counts all cores of the machine
    ranks = join(chosen)
    fast = on_card and ranks.world == 1  # graphs and compiled steps have not been tried with several ranks
    compile, graph = compile and fast and not deterministic, graph and fast
    return Runtime(
        chosen,
        ("bf16" if native else "fp32") if precision == "auto" else precision,
        # On a CPU, channels_last is vectorised over channels: fewer than 16 leave its vector units half empty. With
        # fewer than 8, the backward pass of strided 1x1 convolutions writes out of bounds on AVX2 (torch 2.14.1).
        torch.contiguous_format if on_cpu and width < 16 else torch.channels_last,
        merge=compile or graph,  # on a CPU it was no faster
        compile=compile,
        graph=graph,
        ranks=ranks,
        eval_batch_size=eval_batch_size or (64 if on_cpu else 200 if large_images else 1000),
    )


def pick_device(device: str, gpuid: int) -> torch.device:
    """auto: CUDA card `gpuid`, else mps, else the CPU."""
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise DivideMixError(f"--device {device}: expected auto, cpu, cuda or mps")
    if device in ("auto", "cuda"):
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            if gpuid >= count:
                cards = f"this machine has {count} CUDA cards, 0 is the first"
                raise DivideMixError(f"--gpuid {gpuid}: {cards}; torchrun gives each of its ranks here one")
            return torch.device("cuda", gpuid)
        problem = unusable_card()
        if device == "cuda":
            raise DivideMixError(f"--device cuda: {problem or 'no CUDA card here'}; use --device cpu to run without")
        if problem:
            warn(f"A GPU IS HERE BUT NOT USED, TRAINING WILL BE SLOW: {problem}")
    mps = torch.backends.mps.is_available()
    if device == "mps" and not mps:
        raise DivideMixError("--device mps: not available here; use --device cpu")
    return torch.device("mps" if mps and device in ("auto", "mps") else "cpu")


def unusable_card(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Why torch cannot use the NVIDIA card whose driver is installed; None without such a driver."""
    if not proc.exists() and not shutil.which("nvidia-smi"):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build: install the CUDA build of torch"
    return (
        f"an NVIDIA driver is installed, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable "
        "card: update the driver, install a torch built for an older CUDA, or look at CUDA_VISIBLE_DEVICES"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a card or the host had no memory left; torch's host allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has hardware for bf16: CUDA sm80 and later, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
