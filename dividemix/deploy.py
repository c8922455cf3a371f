"""A trained run as one network: what `predict` and `export` need of a run folder.

    description = read_description(Path("checkpoint/cifar10_0.5_sym"))       # args.json, "model"
    ensemble = load_ensemble(Path("checkpoint/cifar10_0.5_sym"), description, "best")
    logits = ensemble(images)                                                # (B, channels, S, S) in [0, 1] -> (B, C)

A training script writes the description (`describe`) at every start. The run folder may come from anywhere: the
description is checked, weights are read as tensors and plain values only, and nothing is built that does not fit them.
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dividemix import DivideMixError, networks, runtime
from dividemix.checkpoint import load_file, load_last, read_file
from dividemix.images import READING, Preparation
from dividemix.state import load_weights

WEIGHTS = ("best", "last")
_LARGEST = 4096  # pixels of a side; what asks for more is damaged
_MEND = "its training command, given again, mends it"


@dataclass(frozen=True)
class Description:
    """What was trained: the networks of `networks.build`, the names of the classes if they have any, and what is made
    of an image before."""

    arch: str
    width: int
    num_class: int
    classes: list[str] | None
    preparation: Preparation
    count: int = 2  # networks; an ablation may have one

    def name(self, label: int) -> str:
        """Of a class; its number, where classes have no names."""
        return self.classes[label] if self.classes else str(label)

    def __str__(self) -> str:
        width = f", width {self.width}" if self.width != networks.WIDTH else ""
        side = f"{self.preparation.image_size}x{self.preparation.image_size}"
        colour = "grey" if self.preparation.channels == 1 else "colour"
        count = ("one", "two")[self.count - 1]
        return f"{count} {self.arch}{width}, {self.num_class} classes, {colour} images of {side}"


# ---- In args.json ----


def describe(
    arch: str, width: int, num_class: int, classes: list[str] | None, preparation: Preparation, count: int = 2
) -> dict[str, Any]:
    """The entry "model" of args.json, which `read_description` reads."""
    preprocessing = {"reading": list(READING), **asdict(preparation), "interpolation": "bilinear"}
    return {
        "arch": arch,
        "count": count,
        "width": width,
        "num_class": num_class,
        "classes": classes,
        "preprocessing": preprocessing | {name: list(preprocessing[name]) for name in ("mean", "std")},
    }


def read_description(run: Path) -> Description:
    """Raises DivideMixError for what is no run folder, for a run of before descriptions, and for a damaged one."""
    path = run / "args.json"
    try:
        about = json.loads(read_file(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DivideMixError(f"{run} is not a run folder: it has no args.json") from error
    except OSError as error:
        raise DivideMixError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DivideMixError(f"{path} is damaged ({_short(error)}): {_MEND}") from error
    if not isinstance(about, dict) or "model" not in about:
        raise DivideMixError(
            f'{path} has no entry "model", the run is of an earlier version: {_MEND}, and trains nothing where the run '
            f"is finished{_command(about)}"
        )
    try:
        return _checked(about["model"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DivideMixError(f'{path}: "model" is damaged ({_short(error)}): {_MEND}{_command(about)}') from error


def _checked(model: dict[str, Any]) -> Description:
    """Raises KeyError, TypeError or ValueError for what `describe` does not write."""
    classes, given = model["classes"], model["preprocessing"]
    num_class = _whole(model, "num_class", 2, 10**6)
    if classes is not None and not (
        isinstance(classes, list) and len(classes) == num_class and all(isinstance(name, str) for name in classes)
    ):
        raise ValueError(f"classes are not {num_class} names")
    if not isinstance(model["arch"], str):
        raise ValueError("arch is not a name")
    if given["interpolation"] != "bilinear":
        raise ValueError("interpolation is not bilinear")
    mean, std = (tuple(map(float, given[name])) for name in ("mean", "std"))
    if (len(mean), len(std)) != (3, 3) or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError("mean and std are not those of three channels")
    resize = _whole(given, "resize", 1, _LARGEST)
    image_size = _whole(given, "image_size", 1, resize)
    border = _whole(given, "border", 0, image_size)
    channels = _whole(given, "channels", 1, 3)
    if channels == 2:
        raise ValueError("channels are neither 1 nor 3")
    preparation = Preparation(mean, std, image_size, resize, channels, border)
    width, count = _whole(model, "width", 1, 2**20), _whole({"count": 2, **model}, "count", 1, 2)
    return Description(model["arch"], width, num_class, classes, preparation, count)


def _whole(entry: dict[str, Any], name: str, least: int, most: int) -> int:
    value = entry[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is not a whole number from {least} to {most}")
    return value


def _command(about: Any) -> str:
    """The run's own command, to be added to a message; nothing where it is not known."""
    command = about.get("command") if isinstance(about, dict) else None
    if not isinstance(command, list) or not all(isinstance(word, str) and word.isprintable() for word in command):
        return ""
    return f" (python {shlex.join(command)})"


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]


# ---- The networks as one ----


class Ensemble(nn.Module):
    """Images (B, channels, S, S), float32 in [0, 1] -> the sum of the networks' logits (B, num_class): what the paper
    tests, and `engine.ensemble_accuracy` counts. S is the preparation's image_size. epochs: after which one the weights
    of each network were saved."""

    def __init__(self, nets: list[nn.Module], preparation: Preparation, epochs: Sequence[int] = ()):
        super().__init__()
        self.epochs = list(epochs)
        self.nets = nn.ModuleList(nets)
        self.border = preparation.border
        self.register_buffer("mean", torch.tensor(preparation.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preparation.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if self.border:
            images = F.pad(images, [self.border] * 4)
        x = (images.expand(-1, 3, -1, -1) - self.mean) / self.std  # bit for bit as `augment.to_float`
        first, *others = [net(x) for net in self.nets]
        return sum(others, first)


def epochs_used(weights: str, epochs: Sequence[int]) -> str:
    """What `predict` and `export` say of the weights of each network: 'weights of the best epoch 17'."""
    numbers = epochs if len(set(epochs)) > 1 else epochs[:1]
    return f"weights of the {weights} epoch{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"


def to_images(pixels: Tensor) -> Tensor:
    """uint8 (B, S, S, channels), as `Preparation.pixels` stacked -> float32 (B, channels, S, S) in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def probabilities(logits: Tensor, nets: int = 2) -> Tensor:
    """Of the classes, float64 (B, C), from the sum of the logits of so many networks: the softmax of their mean.

    Its order is that of the sum, whose own softmax would take two networks that agree for twice as sure.
    """
    return (logits.double() / nets).softmax(dim=1)


def load_ensemble(run: Path, description: Description, weights: str = "best") -> Ensemble:
    """In eval mode, on the host. weights: of the 'best' epoch of each network (best.pt) or of the 'last' checkpoint.

    Raises DivideMixError where they are missing, damaged, or not of the networks that are described.
    """
    if weights == "last":
        state = load_last(run)
        if state is None:
            raise DivideMixError(f"{run} has no checkpoint yet: not one epoch is finished")
        source = f"the last checkpoint of {run}"
        epochs = [record["epoch"] for record in state["records"][-1:]] * description.count
    else:
        path = run / "best.pt"
        if not path.exists():
            raise DivideMixError(f"{path} is missing: --weights last takes the run's last checkpoint, if it has one")
        source, state = str(path), load_file(path)
        epochs = state.get("epochs", [])
    states = state.get("nets")
    shapes = _shapes(description)
    count = description.count
    if not isinstance(states, list) or len(states) != count or not all(_fits(state, shapes) for state in states):
        raise DivideMixError(f"{source} does not hold what {run / 'args.json'} describes: {description}")
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced at once
        nets = [_build(description) for _ in range(count)]
    load_weights(nets, states, source)
    return Ensemble(nets, description.preparation, epochs).eval()


def _shapes(description: Description) -> dict[str, torch.Size]:
    """Of the network's state dict. On no device: a width from a strange args.json may be anything."""
    net = networks.skeleton(lambda: _build(description))
    return {name: value.shape for name, value in net.state_dict().items()}


def _build(description: Description) -> nn.Module:
    try:
        return networks.build(description.arch, description.num_class, description.width)
    except DivideMixError as error:  # it speaks of the flag, which nobody gave
        known = str(error).removeprefix("--arch ")
        raise DivideMixError(f"args.json names the network {known}") from error
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        raise DivideMixError(f"not enough memory for {description}") from error


def _fits(state: Any, shapes: dict[str, torch.Size]) -> bool:
    return (
        isinstance(state, dict)
        and state.keys() == shapes.keys()
        and all(getattr(state[name], "shape", None) == shape for name, shape in shapes.items())
    )
