"""A trained run as one network: what `predict` and `export` need of a run folder.

    description = read_description(Path("checkpoint/cifar10_0.5_sym"))       # args.json, "model"
    ensemble = load_ensemble(Path("checkpoint/cifar10_0.5_sym"), description, "best")
    logits = ensemble(images)                                                # (B, channels, S, S) in [0, 1] -> (B, C)

A training script writes the description (`describe`) at every start. Weights are read as tensors and plain values
only.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dividemix import DivideMixError, networks
from dividemix.checkpoint import load_file, load_last, load_weights, read_file
from dividemix.images import READING, Preparation

WEIGHTS = ("best", "last")


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
    arch: str, num_class: int, width: int, classes: list[str] | None, preparation: Preparation, count: int = 2
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
    """Raises DivideMixError for what is no run folder, and for an args.json that `describe` did not write."""
    path = run / "args.json"
    try:
        model = json.loads(read_file(path))["model"]
        given = model["preprocessing"]
        sizes = (given[name] for name in ("image_size", "resize", "channels", "border"))
        preparation = Preparation(tuple(given["mean"]), tuple(given["std"]), *sizes)
        of_networks = (model[name] for name in ("arch", "width", "num_class", "classes"))
        return Description(*of_networks, preparation, model["count"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DivideMixError(f"{run} is not a run folder: it has no args.json") from error
    except OSError as error:
        raise DivideMixError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DivideMixError(
            f"{path} does not describe the run ({error!r:.100}): its training command, given again, writes it anew"
        ) from error


# ---- The networks as one ----


class Ensemble(nn.Module):
    """Images (B, channels, S, S), float32 in [0, 1] -> the sum of the networks' logits (B, num_class): what the paper
    tests, and `engine.test` counts. S is the preparation's image_size. epochs: after which one the weights
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
        x = (images.expand(-1, 3, -1, -1) - self.mean) / self.std  # bit for bit as `data.to_float`
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
        if not state:
            raise DivideMixError(f"{run} has no checkpoint yet: not one epoch is finished")
        source = f"the last checkpoint of {run}"
        epochs = [record["epoch"] for record in state["records"][-1:]] * description.count
    else:
        path = run / "best.pt"
        if not path.exists():
            raise DivideMixError(f"{path} is missing: --weights last takes the run's last checkpoint, if it has one")
        source, state = str(path), load_file(path)
        epochs = state["epochs"]
    states = state["nets"]
    about = description.arch, description.num_class, description.width
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced at once
        nets = [networks.build(*about) for _ in range(description.count)]
    load_weights(nets, states, source)
    return Ensemble(nets, description.preparation, epochs).eval()
