"""A trained run as one network: args.json describes it, best.pt or the last checkpoint has its weights.
`load_ensemble(run, read_description(run))(images)` gives the logits."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dividemix import DivideMixError, networks, warn
from dividemix.files import load_file
from dividemix.networks import load_weights
from dividemix.run import BACKBONE, Description, Preparation, failures, load_last, read_run

WEIGHTS = ("best", "last")


def check_output(path: Path, suffix: str) -> None:
    """Raises DivideMixError for an output file that could not be written; called before the work begins."""
    if path.suffix != suffix or path.is_dir() or not path.absolute().parent.is_dir():
        raise DivideMixError(f"{path}: expected a file name that ends in {suffix}, in a folder that exists")


# ---- The networks as one ----


class Ensemble(nn.Module):
    """Images (B, channels, S, S), float32 in [0, 1] -> the sum of the networks' logits (B, num_class), as the paper
    tests them (Sec. 4.1). S is the preparation's image_size. epochs: the epoch of each network's weights; averaged:
    whether these are averages over the steps up to there. backbone: the frozen network whose features they take, where
    they are heads."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        nets: list[nn.Module],
        preparation: Preparation,
        epochs: Sequence[int] = (),
        backbone: nn.Module | None = None,
        averaged: bool = False,
    ):
        super().__init__()
        self.epochs, self.averaged = list(epochs), averaged
        self.nets, self.backbone = nn.ModuleList(nets), backbone or nn.Identity()
        self.border = preparation.border
        self.register_buffer("mean", torch.tensor(preparation.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preparation.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if self.border:
            images = F.pad(images, [self.border] * 4)
        x = (images.expand(-1, 3, -1, -1) - self.mean) / self.std  # bit for bit as `to_float` in dividemix.data
        features = self.backbone(x)
        return sum(net(features) for net in self.nets)


def epochs_used(weights: str, ensemble: Ensemble) -> str:
    """'weights of the best epoch 17', or 'weights of the best epochs 5 and 7' where the networks' epochs differ."""
    numbers, kind = dict.fromkeys(ensemble.epochs), "averaged weights" if ensemble.averaged else "weights"
    return f"{kind} of the {weights} epoch{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"


def to_images(pixels: Tensor) -> Tensor:
    """Stacked results of `Preparation.view`, uint8 (B, S, S, channels) -> float32 (B, channels, S, S) in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def probabilities(logits: Tensor, nets: int = 2) -> Tensor:
    """Sum of the logits (B, C) of so many networks -> class probabilities, float64 (B, C): the softmax of the mean of
    the logits. The softmax of their sum would be too confident."""
    return (logits.double() / nets).softmax(dim=1)


def load_ensemble(run: Path, description: Description, weights: str = "best") -> Ensemble:
    """The networks of a run folder, in eval mode, on the CPU. weights: 'best' (best.pt, the best epoch of each network)
    or 'last' (the last checkpoint). Warns of a run whose list of labels means nothing. Raises DivideMixError for
    weights that are missing or damaged, or that do not fit the description."""
    if weights not in WEIGHTS:
        raise DivideMixError(f"weights {weights!r}: expected one of {', '.join(WEIGHTS)}")
    path = run / "best.pt"
    if weights == "last":
        state = load_last(run)
        if not state:
            raise DivideMixError(f"{run} has no checkpoint yet: no epoch is finished")
        epochs = [state["records"][-1]["epoch"]] * description.count
    elif path.exists():
        state = load_file(path)
        epochs = state["epochs"]
    else:
        raise DivideMixError(f"{path} is missing: --weights last uses the last checkpoint of the run, if there is one")
    with contextlib.suppress(DivideMixError):  # a file that only the report needs
        if reasons := failures(read_run(run)):
            warn(f"{run}: its predictions may mean nothing, as its list of labels: {'; '.join(reasons)}")
    d = description
    backbone = load_backbone(run, d) if d.num_features else None
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced at once
        heads = (networks.head(d.num_features, d.num_class) for _ in range(d.count))
        nets = [*heads] if d.num_features else [networks.build(d.arch, d.num_class, d.width) for _ in range(d.count)]
    saved = state["averages"][0] if "averages" in state else state["nets"]  # those in best.pt are averages already
    load_weights(nets, saved, str(path) if weights == "best" else f"the last checkpoint of {run}")
    return Ensemble(nets, d.preparation, epochs, backbone, averaged=bool(state["config"].get("ema"))).eval()


def load_backbone(run: Path, description: Description) -> nn.Module:
    """The frozen network of a run with --features. Raises DivideMixError for a run with --feature_file."""
    path = run / BACKBONE
    if not path.exists():
        raise DivideMixError(f"{path} is missing: a run with --feature_file has no network for images")
    backbone = networks.backbone(description.arch, description.width)
    load_weights([backbone], [load_file(path)], str(path))
    return backbone
