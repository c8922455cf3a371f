"""The networks by their `--arch` name: the project's own, or any of torchvision's for classification. `--weights` says
what they start from. It replaces all layers except the classifier, which is new and different in each network.
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
import torch.nn.functional as F
from torch import Tensor, nn

import InceptionResNetV2
import PreResNet
from dividemix import DivideMixError
from dividemix.files import load_file, write_state
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


HIDDEN = 256  # units of a head for stored features


class BatchNorm1d(nn.BatchNorm1d):
    """A row that is a batch alone, as a pass may end with, is normalised by the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def head(num_features: int, num_class: int) -> nn.Module:
    """The network for stored features: (B, num_features) -> logits (B, num_class), computed in float32. Dropout on the
    features stands in for the augmentation of images."""
    hidden = [nn.Dropout(0.5), nn.Linear(num_features, HIDDEN), BatchNorm1d(HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Dropout(0.5), LinearInFloat32(HIDDEN, num_class))


def resnet50(num_class: int) -> nn.Module:
    """torchvision's ResNet-50, with its state-dict keys. Images (B, 3, S, S) -> logits (B, num_class). As in the other
    networks, the head is computed in float32, under autocast too."""
    from torchvision.models import resnet50  # slow to import, and not every script needs it

    net = resnet50(num_classes=num_class)
    net.avgpool, net.fc = MeanInFloat32(), LinearInFloat32(net.fc.in_features, num_class)
    return net


def from_torchvision(name: str, num_class: int) -> nn.Module:
    """A network of torchvision, with its state-dict keys and initialisation; the classifier is computed in float32."""
    net = torchvision_network(name, num_class)
    layer = net.get_submodule(classifier_of(net))
    layer.__class__ = LinearInFloat32 if isinstance(layer, nn.Linear) else Conv2dInFloat32
    return net


def torchvision_network(name: str, num_class: int) -> nn.Module:
    """The network as torchvision builds it. googlenet and inception_v3 come without their auxiliary classifiers, and
    always expect images normalised as ImageNet's, like their published weights."""
    from torchvision import models

    inception = {"aux_logits": False, "transform_input": True, "init_weights": False}
    options = inception if name in ("googlenet", "inception_v3") else {}
    net = models.get_model(name, weights=None, num_classes=num_class, **options)
    if type(net)._load_from_state_dict is not nn.Module._load_from_state_dict:
        # MNASNet's converts files from before 2019. It needs a version number, which a checkpoint's dict does not have.
        plain = {"_load_from_state_dict": nn.Module._load_from_state_dict}
        net.__class__ = type(type(net).__name__, (type(net),), plain)
    return net


def classifier_of(net: nn.Module) -> str:
    """The name of the layer that computes the logits: the last linear layer or (squeezenet) convolution."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


@dataclass(frozen=True)
class Architecture:
    """make: (num_class, width) -> network. min_side: the smallest image side (px) whose last feature map has more than
    one pixel, as BN cannot normalise one image of one pixel; None: `refusal` tries it. imagenet: their address."""

    make: Callable[[int, int], nn.Module]
    min_side: int | None
    has_width: bool = False
    imagenet: str | None = None


# torchvision's IMAGENET1K_V1, not its DEFAULT (V2), which gives other results
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
WIDTH = 64  # of the paper's network; the default of --width


@functools.cache
def architecture(name: str) -> Architecture:
    """The project's own network of this name, else torchvision's. Raises DivideMixError for an unknown name."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        similar = difflib.get_close_matches(name, [*ARCHITECTURES, *names])
        expected = f"expected one of {', '.join(ARCHITECTURES)}, or a name of torchvision's"
        hint = f"did you mean {' or '.join(similar)}?" if similar else expected
        raise DivideMixError(f"--arch {name!r:.50}: no such network; {hint}")
    weights = models.get_model_weights(name).__members__.get("IMAGENET1K_V1")
    url = weights.url if weights else None
    return Architecture(lambda num_class, width: from_torchvision(name, num_class), min_side=None, imagenet=url)


@functools.cache
def _skeleton(name: str) -> nn.Module:
    """torchvision's network on the meta device, without memory for its weights: to try image sizes."""
    with torch.random.fork_rng(devices=[]):
        return torchvision_network(name, 2).to("meta")


def refusal(arch: str, image_size: int) -> str:
    """Why a network cannot take images of this size; '' where it can. Networks of torchvision are tried, in train mode
    on the meta device, with one image, the smallest possible batch."""
    if min_side := architecture(arch).min_side:
        return f"needs {min_side} pixels or more" if image_size < min_side else ""
    try:
        with torch.no_grad():
            _skeleton(arch).train()(torch.empty(1, 3, image_size, image_size, device="meta"))
    except Exception as error:  # differs by network: AssertionError, RuntimeError, ValueError ...
        return f"cannot take such images ({' '.join(str(error).split())[:100] or type(error).__name__})"
    return ""


def check(arch: str, width: int, image_size: int, weights: str) -> None:
    """Raises DivideMixError for flags that do not fit together. Reads no file: scripts call it first."""
    network = architecture(arch)
    if width != WIDTH and not network.has_width:
        raise DivideMixError(f"--width {width}: {arch} has one width; leave it out, or take --arch preresnet18")
    if reason := refusal(arch, image_size):
        size = next((f"; it takes {side}" for side in (64, 96, 128, 224, 299) if not refusal(arch, side)), "")
        raise DivideMixError(f"--image_size {image_size}: {arch} {reason}{size}")
    if weights == "imagenet" and not network.imagenet:
        instead = "take --weights none, --weights PATH or --arch resnet50"
        raise DivideMixError(f"--weights imagenet: there are none for {arch}; {instead}")


def build(arch: str, num_class: int, width: int = WIDTH, weights: dict[str, Any] | None = None) -> nn.Module:
    """The network. With `weights` (from `read_weights`), all layers except the classifier are loaded from them. Raises
    DivideMixError for weights of another network."""
    net = architecture(arch).make(num_class, width)
    if weights is None:
        return net
    head = f"{classifier_of(net)}."
    state = {key: value for key, value in with_current_keys(weights).items() if not key.startswith(head)}
    state |= {key: value for key, value in net.state_dict().items() if key.startswith(head)}
    try:
        net.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())
        raise DivideMixError(f"--weights does not fit --arch {arch}, --width {width}: {reason:.150}") from error
    return net


def backbone(arch: str, width: int = WIDTH, weights: dict[str, Any] | None = None) -> nn.Module:
    """The network without its classifier, in eval mode: images (B, 3, S, S) -> features (B, D). D is its attribute
    num_features. Raises as `build`."""
    with torch.random.fork_rng(devices=[]):  # the classifier's initial weights are not used
        net = build(arch, 2, width, weights)
    name = classifier_of(net)
    layer = net.get_submodule(name)
    net.num_features = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    net.set_submodule(name, nn.Identity())
    return net.eval()


def with_current_keys(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of a file of torchvision's with the keys that its networks have today: densenet's `norm.1` is now
    `norm1`; auxiliary classifiers are left out."""
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
    num_features: int = 0,
) -> list[nn.Module]:
    """The two networks on the device, or only the first if `count` is 1; heads, if there are `num_features`. A run that
    has `begun` continues from its checkpoint and reads no weights."""
    state = read_weights("none" if begun or init_from or num_features else weights, arch, runtime.ranks)

    def make() -> nn.Module:
        return head(num_features, num_class) if num_features else build(arch, num_class, width, state)

    try:
        nets = [seeded(seed, k, make) for k in range(count)]
        if init_from and not begun:
            states = load_file(Path(init_from).expanduser()).get("nets")
            if not isinstance(states, list) or len(states) < count:
                raise DivideMixError(f"--init_from {init_from}: expected a checkpoint with {count} networks in 'nets'")
            load_weights(nets, states[:count], init_from)
        return [runtime.prepare(net) for net in nets]
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            problem = f"{runtime.device}: not enough memory for two networks of --arch {arch}"
            raise DivideMixError(f"{problem}; is another job using it, or is --width {width} too large?") from error
        raise


def frozen(arch: str, width: int, weights: str, path: Path, runtime: Runtime, begun: bool) -> nn.Module:
    """The `backbone` with the weights for `--weights`, on the device. Its state is in the file `path`, from which a run
    that has `begun` reads it. Raises DivideMixError for weights that do not fit."""
    net = backbone(arch, width, None if begun else read_weights(weights, arch, runtime.ranks))
    if begun:
        load_weights([net], [load_file(path)], str(path))
    else:
        write_state(path, net.state_dict())
    return runtime.prepare(net)


def read_weights(weights: str, arch: str, ranks: Ranks) -> dict[str, Any] | None:
    """The state dict for `--weights`: 'none' -> None; 'imagenet' -> torchvision's file, downloaded by one process of
    each machine; a path -> that file. Raises DivideMixError for a file that cannot be downloaded or read."""
    if weights == "none":
        return None
    download = functools.partial(imagenet_file, architecture(arch).imagenet)
    path = ranks.local_rank0_first(download) if weights == "imagenet" else Path(weights).expanduser()
    state = load_file(path)
    if isinstance(state.get("nets"), list):
        raise DivideMixError(f"weights {path} hold two networks of a run: give them as --init_from")
    return state


def imagenet_file(url: str = IMAGENET) -> Path:
    """The file of ImageNet weights in torch hub's folder (see TORCH_HOME), downloaded if it is not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = re.search(r"-([0-9a-f]{8,})\.", path.name)[1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # no network, no such page, a full disk, an incomplete file
            instead = f"fetch {url} elsewhere and put it at {path}, or give its place as --weights PATH; or train from "
            instead += "scratch (--weights none, without --features), or, on own images, give --feature_file"
            raise DivideMixError(f"the ImageNet weights could not be downloaded ({error}): {instead}") from error
    return path


def load_weights(nets: Sequence[nn.Module], states: Sequence[dict[str, Any]], source: str) -> None:
    """Load each network's state dict. Raises DivideMixError, naming `source`, where they do not fit."""
    try:
        for net, state in zip(nets, states, strict=True):
            net.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise DivideMixError(f"{source} does not fit these networks: another --arch, --width or data set?") from error
