"""What args.json says of a trained model: its networks and classes and how images are prepared for it, the versions of
the libraries, the project's commit."""

import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dividemix import networks
from dividemix.data import READING, Views
from dividemix.run.folder import read_args_json

BACKBONE = "backbone.pt"  # in the run folder: the frozen network whose features the heads take


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes an input of the networks, as in a run's tests.

    `view` prepares the file: RGB or grey (channels = 1), turned as a viewer shows it, the short side `resize` pixels,
    the centre of image_size x image_size. `deploy.Ensemble` does the rest: a black `border` of so many pixels, three
    channels, mean and std of values in [0, 1]. Sets that are kept on the device have resize = image_size."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    resize: int
    channels: int = 3
    border: int = 0

    def view(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB image -> (image_size, image_size, channels)."""
        views = Views(self.resize, self.image_size)
        centre = views.eval(views.resized(image.convert("L") if self.channels == 1 else image))
        return centre.reshape(self.image_size, self.image_size, self.channels)


@dataclass(frozen=True)
class Description:
    """What was trained: the networks (as in `networks.build`), the classes, and how images are prepared."""

    arch: str
    num_class: int
    width: int
    classes: list[str] | None  # their names, if they have any
    preparation: Preparation
    count: int = 2  # number of networks; an ablation may have one
    num_features: int = 0  # of the frozen network `arch`, if the trained networks are heads on it

    def __str__(self) -> str:
        width = f", width {self.width}" if self.width != networks.WIDTH else ""
        side = f"{self.preparation.image_size}x{self.preparation.image_size}"
        colour = "grey" if self.preparation.channels == 1 else "colour"
        count = ("one", "two")[self.count - 1]
        heads = "heads on a frozen " if self.num_features else ""
        return f"{count} {heads}{self.arch}{width}, {self.num_class} classes, {colour} images of {side}"

    def as_dict(self) -> dict[str, Any]:
        """The entry "model" of args.json."""
        values = asdict(self)
        if not self.num_features:
            del values["num_features"]
        preprocessing = {"reading": list(READING), **values.pop("preparation"), "interpolation": "bilinear"}
        return values | {"preprocessing": preprocessing}


def read_description(run: Path) -> Description:
    """Of the run folder `run`. Raises DivideMixError if it is none."""
    model = read_args_json(run)["model"]
    preprocessing = model.pop("preprocessing")
    values = {field.name: preprocessing[field.name] for field in fields(Preparation)}
    values |= {name: tuple(values[name]) for name in ("mean", "std")}
    return Description(**model, preparation=Preparation(**values))


def versions() -> dict[str, str]:
    """Of Python and the libraries that results depend on."""
    interpreter = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return interpreter | {name: metadata.version(name) for name in ("torchvision", "numpy", "scikit-learn")}


def commit() -> str | None:
    """The project's git commit, with '+changes' where the working tree differs; None outside a git checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
