"""The networks by their `--arch` name, and what they start from (`--weights`).

    state = read_weights(args.weights, args.arch, ranks)                    # once, for both networks
    nets = [seeded(seed, k, lambda: build(args.arch, num_class, args.width, state)) for k in range(2)]

Weights replace all but the classifier, unless theirs has the right number of classes; what they leave is as PyTorch
initialises it, different in each network.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import InceptionResNetV2
import PreResNet
from dividemix import DivideMixError
from dividemix.checkpoint import from_bytes, load_networks
from dividemix.ranks import Ranks
from dividemix.runtime import Runtime, is_out_of_memory
from dividemix.seeds import seeded
from dividemix.state import load_weights


class MeanInFloat32(nn.Module):  # (B, K, H, W) -> (B, K, 1, 1)
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3), keepdim=True)


class LinearInFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def resnet50(num_class: int) -> nn.Module:
    """torchvision's, with its state-dict keys. Images (B, 3, S, S) -> logits (B, num_class), float32 under autocast
    too: as in the other networks, the head is computed in float32."""
    from torchvision.models import resnet50  # slow to import, and the other scripts do without

    net = resnet50(num_classes=num_class)
    net.avgpool, net.fc = MeanInFloat32(), LinearInFloat32(net.fc.in_features, num_class)
    return net


@dataclass(frozen=True)
class Architecture:
    """make: (num_class, width) -> network. classifier: its name in the state dict. min_side: the smallest image, px,
    whose last maps have more than one: BN cannot normalise a batch of one image with one pixel."""

    make: Callable[[int, int], nn.Module]
    classifier: str
    min_side: int
    has_width: bool = False


ARCHITECTURES = {
    "preresnet18": Architecture(PreResNet.ResNet18, "linear", min_side=16, has_width=True),
    "preresnet34": Architecture(PreResNet.ResNet34, "linear", min_side=16, has_width=True),
    "preresnet50": Architecture(PreResNet.ResNet50, "linear", min_side=16, has_width=True),
    "resnet50": Architecture(lambda num_class, width: resnet50(num_class), "fc", min_side=33),
    "inceptionresnetv2": Architecture(
        lambda num_class, width: InceptionResNetV2.InceptionResNetV2(num_class), "last_linear", min_side=107
    ),
}
SMALL_IMAGES = [name for name, architecture in ARCHITECTURES.items() if architecture.has_width]
WIDTH = 64  # of the paper's network, and where --width is not given
# torchvision's IMAGENET1K_V1: not its DEFAULT, which is V2 and gives other results
IMAGENET = "https://download.pytorch.org/models/resnet50-0676ba61.pth"


def check(arch: str, width: int, image_size: int, weights: str) -> None:
    """Raises DivideMixError for flags that do not go together. Reads nothing: for a script's beginning."""
    architecture = ARCHITECTURES[arch]
    if width != WIDTH and not architecture.has_width:
        raise DivideMixError(f"--width {width}: {arch} has one width; leave it out, or take --arch preresnet18")
    if image_size < architecture.min_side:
        raise DivideMixError(f"--image_size {image_size}: {arch} needs {architecture.min_side} pixels or more")
    if weights == "imagenet" and arch != "resnet50":
        raise DivideMixError(
            f"--weights imagenet: there are none for {arch}; take --weights none, --weights PATH or --arch resnet50"
        )


def build(arch: str, num_class: int, width: int = WIDTH, weights: dict[str, Any] | None = None) -> nn.Module:
    """The network, from `weights` (of `read_weights`) where there are any. Raises DivideMixError for weights of another
    network."""
    architecture = ARCHITECTURES[arch]
    net = architecture.make(num_class, width)
    if weights is None:
        return net
    own, weights = net.state_dict(), dict(weights)
    head = [key for key in own if key.startswith(f"{architecture.classifier}.")]
    if any(getattr(weights.get(key), "shape", None) != own[key].shape for key in head):
        weights |= {key: own[key] for key in head}
    try:
        net.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())
        raise DivideMixError(f"--weights does not fit --arch {arch}, --width {width}: {reason:.150}") from error
    return net


def pair(
    arch: str,
    num_class: int,
    width: int,
    weights: str,
    *,
    init_from: str | None,
    seed: int,
    machine: Runtime,
    begun: bool,
) -> list[nn.Module]:
    """The two networks on the device. A run that has `begun` goes on from its checkpoint, and reads no weights."""
    weights = "none" if begun or init_from else weights
    state = read_weights(weights, arch, machine.ranks)
    try:
        nets = [seeded(seed, k, lambda: build(arch, num_class, width, state)) for k in range(2)]
        if init_from and not begun:
            load_weights(nets, load_networks(Path(init_from).expanduser()), init_from)
        return [machine.prepare(net) for net in nets]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DivideMixError(
            f"{machine.device}: not enough memory for two networks of --arch {arch}; is another job using it, or is "
            f"--width {width} too large?"
        ) from error


def read_weights(weights: str, arch: str, ranks: Ranks) -> dict[str, Any] | None:
    """What `--weights` names: 'none' -> None; 'imagenet' -> torchvision's, downloaded by one process of each machine;
    a path -> the state dict in that file. Raises DivideMixError for a file that cannot be fetched or read."""
    if weights == "none":
        return None
    path = ranks.local_first(imagenet_file) if weights == "imagenet" else Path(weights).expanduser()
    try:
        state = from_bytes(path.read_bytes())
    except OSError as error:
        raise DivideMixError(f"weights {path} cannot be read: {error.strerror}") from error
    except DivideMixError as error:
        again = "; delete it, and it is downloaded again" if weights == "imagenet" else ""
        raise DivideMixError(f"weights {path}: {error}{again}") from error
    if isinstance(state.get("nets"), list):
        raise DivideMixError(f"weights {path} hold two networks of a run: give them as --init_from")
    if weights == "imagenet":
        classifier = ARCHITECTURES[arch].classifier
        # Never ImageNet's own classifier, not even for 1000 classes: both networks would be the same to the bit.
        state = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")}
    return state


def imagenet_file() -> Path:
    """Torch hub's copy of the ImageNet weights (TORCH_HOME says where), fetched if it is not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", IMAGENET.rsplit("/", 1)[1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = re.search(r"-([0-9a-f]{8,})\.", path.name)[1]
            torch.hub.download_url_to_file(IMAGENET, str(path), hash_prefix=digest, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # no network, no such page, a full disk; a file that was cut
            raise DivideMixError(
                f"the ImageNet weights could not be downloaded ({error}): fetch {IMAGENET} elsewhere and put it at "
                f"{path}, or give its place as --weights PATH; --weights none starts from random weights"
            ) from error
    return path
