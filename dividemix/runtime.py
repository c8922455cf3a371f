"""How the algorithm is run: device, precision, memory format, ranks. What is computed stands in `engine`."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dividemix import DivideMixError, warn


@dataclass(frozen=True)
class Runtime:
    """device; precision 'fp32' (the reference: no TF32) or 'bf16' (autocast, head and losses in float32)."""

    device: torch.device
    precision: str = "fp32"
    memory_format: torch.memory_format = torch.channels_last

    def prepare(self, net: nn.Module) -> nn.Module:
        """Move a network to the device and into the memory format."""
        return net.to(self.device, memory_format=self.memory_format)

    def forward(self, net: nn.Module, x: Tensor) -> Tensor:
        """Logits in float32. One autocast block for each forward: autocast caches the cast weights of a block, and a
        cache filled before an update, or without gradients, would serve the later forward."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return net(x.contiguous(memory_format=self.memory_format)).float()

    def optimizer(self, net: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9) -> torch.optim.SGD:
        """SGD without Nesterov, weight decay on every parameter, BN and biases included.

        Its `found_inf` is the device-side flag that `engine.update` sets at the first non-finite loss or gradient:
        from then on fused SGD leaves weights and momentum as they are.
        """
        fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum, weight_decay=weight_decay, fused=fused)
        if fused:
            optimizer.found_inf = torch.zeros((), device=self.device)
        return optimizer

    def describe(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{self.device.type}, {torch.get_num_threads()} threads"
        arithmetic = "fp32, TF32 off" if self.precision == "fp32" else "bf16 autocast, losses in fp32"
        return f"{name}; {arithmetic}; torch {torch.__version__}"


def load_optimizer(optimizer: torch.optim.SGD, state: dict[str, Any]) -> None:
    """Restore an optimizer from its state dict, also one that another device wrote: momentum takes its parameter's
    memory layout, and which SGD kernel runs stays this machine's choice."""
    fused = [group["fused"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = own
        for parameter in group["params"]:
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def start(
    device: str = "auto", gpuid: int = 0, precision: str = "auto", deterministic: bool = False, width: int = 64
) -> Runtime:
    """The runtime for these flags; `width`: channels of the network's first stage.

    Raises DivideMixError for a device that is not there; warns of a card that torch cannot use.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DivideMixError("more than one rank is not supported yet: start the script with python, not torchrun")
    chosen = pick_device(device, gpuid)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    native = computes_bf16(chosen)
    if precision == "bf16" and chosen.type == "mps":
        raise DivideMixError("--precision bf16 is not supported on mps: use fp32")
    if precision == "bf16" and not native:
        warn(f"--precision bf16: {chosen.type} here has no bf16 units, fp32 would be faster")
    # On a CPU, channels_last is vectorised over channels: fewer than 16 leave its vector units half empty.
    narrow = chosen.type == "cpu" and width < 16
    memory_format = torch.contiguous_format if narrow else torch.channels_last
    return Runtime(chosen, ("bf16" if native else "fp32") if precision == "auto" else precision, memory_format)


def pick_device(device: str, gpuid: int) -> torch.device:
    """auto: CUDA card `gpuid`, else mps, else the CPU."""
    if device in ("auto", "cuda"):
        if torch.cuda.is_available():
            if gpuid >= torch.cuda.device_count():
                raise DivideMixError(
                    f"--gpuid {gpuid}: this machine has {torch.cuda.device_count()} CUDA cards, 0 is the first"
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


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 runs on the device's own units: CUDA sm80 and later, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
