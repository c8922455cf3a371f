"""The networks by their `--arch` name, the project's own or any of torchvision's for classification, and what they
start from (`--weights`): that replaces all but the classifier, which is new, and so different in each network.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import InceptionResNetV2
import PreResNet
from dividemix import DivideMixError
from dividemix.files import load_file
from dividemix.runtime import Ranks, Runtime, is_out_of_memory
from dividemix.seeds import seeded


class MeanInFloat32(nn.Module):  # (B, K, H, W) -> (B, K, 1, 1)
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3), keepdim=True)


class InFloat32:
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class LinearInFloat32(InFloat32, nn.Linear):
    pass


class Conv2dInFloat32(InFloat32, nn.Conv2d):
    pass


def resnet50(num_class: int) -> nn.Module:
    """torchvision's, with its state-dict keys. Images (B, 3, S, S) -> logits (B, num_class). As in the other networks
    the head is computed in float32, under autocast too."""
    from torchvision.models import resnet50  # slow to import, and the other scripts do without

    net = resnet50(num_classes=num_class)
    net.avgpool, net.fc = MeanInFloat32(), LinearInFloat32(net.fc.in_features, num_class)
    return net


def from_torchvision(name: str, num_class: int) -> nn.Module:
    """One of torchvision's, with its state-dict keys and initialisation; the classifier is computed in float32."""
    net = torchvisions_own(name, num_class)
    layer = net.get_submodule(classifier_of(net))
    layer.__class__ = LinearInFloat32 if isinstance(layer, nn.Linear) else Conv2dInFloat32
    return net


def torchvisions_own(name: str, num_class: int) -> nn.Module:
    """As torchvision makes it. googlenet and inception_v3 come without their auxiliary classifiers, and always take
    images normalised as ImageNet's, as their published weights do."""
    from torchvision import models

    inception = {"aux_logits": False, "transform_input": True, "init_weights": False}
    more = inception if name in ("googlenet", "inception_v3") else {}
    net = models.get_model(name, weights=None, num_classes=num_class, **more)
    if type(net)._load_from_state_dict is not nn.Module._load_from_state_dict:
        # MNASNet's converts files of before 2019, and wants a version number, which a checkpoint's plain dict lacks.
        plain = {"_load_from_state_dict": nn.Module._load_from_state_dict}
        net.__class__ = type(type(net).__name__, (type(net),), plain)
    return net


def classifier_of(net: nn.Module) -> str:
    """The name of the layer that makes the logits: in all networks the last linear one or (squeezenet) convolution."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


@dataclass(frozen=True)
class Architecture:
    """make: (num_class, width) -> network. min_side: the smallest image, px, whose last maps have more than one: BN
    cannot normalise a batch of one image with one pixel; None where only a try tells (`refusal`). imagenet: where its
    ImageNet weights are."""

    make: Callable[[int, int], nn.Module]
    min_side: int | None
    has_width: bool = False
    imagenet: str | None = None


# torchvision's IMAGENET1K_V1: not its DEFAULT, which is V2 and gives other results
IMAGENET = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
ARCHITECTURES = {
    "preresnet18": Architecture(PreResNet.ResNet18, min_side=16, has_width=True),
    "preresnet34": Architecture(PreResNet.ResNet34, min_side=16, has_width=True),
    "preresnet50": Architecture(PreResNet.ResNet50, min_side=16, has_width=True),
    "resnet50": Architecture(lambda num_class, width: resnet50(num_class), min_side=33, imagenet=IMAGENET),
    "inceptionresnetv2": Architecture(
        lambda num_class, width: InceptionResNetV2.InceptionResNetV2(num_class), min_side=107
    ),
}
SMALL_IMAGES = [name for name, architecture in ARCHITECTURES.items() if architecture.has_width]
WIDTH = 64  # of the paper's network, and where --width is not given


@functools.cache
def architecture(name: str) -> Architecture:
    """The project's own, or else torchvision's of that name. Raises DivideMixError for a name that neither has."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, [*ARCHITECTURES, *known])
        names = f"one of {', '.join(ARCHITECTURES)}, or of torchvision's"
        guess = f"did you mean {' or '.join(close)}?" if close else f"expected {names}"
        raise DivideMixError(f"--arch {name!r:.50}: no such network; {guess}")
    weights = models.get_model_weights(name).__members__.get("IMAGENET1K_V1")
    url = weights.url if weights else None
    return Architecture(lambda num_class, width: from_torchvision(name, num_class), min_side=None, imagenet=url)


@functools.cache
def _skeleton(name: str) -> nn.Module:
    """torchvision's network without memory for its weights, for a dry forward."""
    with torch.random.fork_rng(devices=[]):
        return torchvisions_own(name, 2).to("meta")


def refusal(arch: str, image_size: int) -> str:
    """Why a network cannot take images of this size, '' where it can: for torchvision's by a dry forward in train mode
    of one image, the smallest batch there can be."""
    if min_side := architecture(arch).min_side:
        return f"needs {min_side} pixels or more" if image_size < min_side else ""
    try:
        with torch.no_grad():
            _skeleton(arch).train()(torch.empty(1, 3, image_size, image_size, device="meta"))
    except Exception as error:  # each network has its own: AssertionError, RuntimeError, ValueError ...
        return f"cannot take such images ({' '.join(str(error).split())[:100] or type(error).__name__})"
    return ""


def check(arch: str, width: int, image_size: int, weights: str) -> None:
    """Raises DivideMixError for flags that do not go together. Reads nothing: for a script's beginning."""
    found = architecture(arch)
    if width != WIDTH and not found.has_width:
        raise DivideMixError(f"--width {width}: {arch} has one width; leave it out, or take --arch preresnet18")
    if why := refusal(arch, image_size):
        size = next((f"; it takes {side}" for side in (64, 96, 128, 224, 299) if not refusal(arch, side)), "")
        raise DivideMixError(f"--image_size {image_size}: {arch} {why}{size}")
    if weights == "imagenet" and not found.imagenet:
        instead = "take --weights none, --weights PATH or --arch resnet50"
        raise DivideMixError(f"--weights imagenet: there are none for {arch}; {instead}")


def build(arch: str, num_class: int, width: int = WIDTH, weights: dict[str, Any] | None = None) -> nn.Module:
    """The network, and all but its classifier from `weights` (of `read_weights`) where there are any. Raises
    DivideMixError for weights of another network."""
    net = architecture(arch).make(num_class, width)
    if weights is None:
        return net
    head = f"{classifier_of(net)}."
    state = {key: value for key, value in published(weights).items() if not key.startswith(head)}
    state |= {key: value for key, value in net.state_dict().items() if key.startswith(head)}
    try:
        net.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())
        raise DivideMixError(f"--weights does not fit --arch {arch}, --width {width}: {reason:.150}") from error
    return net


def published(state: dict[str, Any]) -> dict[str, Any]:
    """The keys of torchvision's files as its networks have them now: densenet's `norm.1` is `norm1`; auxiliary
    classifiers are left out."""
    renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", str(key)): state[key] for key in state}
    return {key: value for key, value in renamed.items() if not re.match(r"(aux\d|AuxLogits)\.", key)}


def pair(
    arch: str,
    num_class: int,
    width: int,
    weights: str,
    *,
    init_from: str | None,
    seed: int,
    runtime: Runtime,
    begun: bool,
    count: int = 2,
) -> list[nn.Module]:
    """The two networks on the device, or the first alone where `count` is 1. A run that has `begun` goes on from its
    checkpoint, and reads no weights."""
    state = read_weights("none" if begun or init_from else weights, arch, runtime.ranks)
    try:
        nets = [seeded(seed, k, lambda: build(arch, num_class, width, state)) for k in range(count)]
        if init_from and not begun:
            states = load_file(Path(init_from).expanduser()).get("nets")
            if not isinstance(states, list) or len(states) < count:
                raise DivideMixError(f"--init_from {init_from}: expected a checkpoint with {count} networks in 'nets'")
            load_weights(nets, states[:count], init_from)
        return [runtime.prepare(net) for net in nets]
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            short = f"{runtime.device}: not enough memory for two networks of --arch {arch}"
            raise DivideMixError(f"{short}; is another job using it, or is --width {width} too large?") from error
        raise


def read_weights(weights: str, arch: str, ranks: Ranks) -> dict[str, Any] | None:
    """What `--weights` names: 'none' -> None; 'imagenet' -> torchvision's, downloaded by one process of each machine;
    a path -> the state dict in that file. Raises DivideMixError for a file that cannot be fetched or read."""
    if weights == "none":
        return None
    from_hub = functools.partial(imagenet_file, architecture(arch).imagenet)
    path = ranks.local_rank0_first(from_hub) if weights == "imagenet" else Path(weights).expanduser()
    state = load_file(path)
    if isinstance(state.get("nets"), list):
        raise DivideMixError(f"weights {path} hold two networks of a run: give them as --init_from")
    return state


def imagenet_file(url: str = IMAGENET) -> Path:
    """Torch hub's copy of ImageNet weights (TORCH_HOME says where), fetched if it is not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = re.search(r"-([0-9a-f]{8,})\.", path.name)[1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # no network, no such page, a full disk; a file that was cut
            instead = f"fetch {url} elsewhere and put it at {path}, or give its place as --weights PATH"
            raise DivideMixError(f"the ImageNet weights could not be downloaded ({error}): {instead}") from error
    return path


def load_weights(nets: Sequence[nn.Module], states: Sequence[dict[str, Any]], source: str) -> None:
    """Raises DivideMixError, naming `source`, for states that are not those of such networks."""
    try:
        for net, state in zip(nets, states, strict=True):
            net.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise DivideMixError(f"{source} does not fit these networks: another --arch, --width or data set?") from error
