"""What args.json says of a trained model, for those who use it later: its networks, its classes, and what is made of an
image before."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dividemix import networks
from dividemix.data import READING, Views
from dividemix.run.folder import read_about


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes what the networks of a run were evaluated on. The file's part: as a viewer shows it
    (`shown`, whatever the networks were trained on), RGB or (channels 1) grey, the short side `resize`, the centre of
    image_size x image_size. The networks' part, in `deploy.Ensemble`: a black `border` of so many pixels around it,
    three channels, mean and std of values in [0, 1] (3,). Sets that live on the device have resize = image_size."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    resize: int
    channels: int = 3
    border: int = 0

    def view(self, image: Image.Image) -> NDArray[np.uint8]:
        """(image_size, image_size, channels) of an image in RGB."""
        views = Views(self.resize, self.image_size)
        centre = views.eval(views.resized(image.convert("L") if self.channels == 1 else image))
        return centre.reshape(self.image_size, self.image_size, self.channels)


@dataclass(frozen=True)
class Description:
    """What was trained: the networks of `networks.build`, the names of the classes if they have any, and what is made
    of an image before."""

    arch: str
    num_class: int
    width: int
    classes: list[str] | None
    preparation: Preparation
    count: int = 2  # networks; an ablation may have one

    def __str__(self) -> str:
        width = f", width {self.width}" if self.width != networks.WIDTH else ""
        side = f"{self.preparation.image_size}x{self.preparation.image_size}"
        colour = "grey" if self.preparation.channels == 1 else "colour"
        count = ("one", "two")[self.count - 1]
        return f"{count} {self.arch}{width}, {self.num_class} classes, {colour} images of {side}"


def describe(
    arch: str, num_class: int, width: int, classes: list[str] | None, preparation: Preparation, count: int = 2
) -> dict[str, Any]:
    """The entry "model" of args.json, which `read_description` reads."""
    preprocessing = {"reading": list(READING), **asdict(preparation), "interpolation": "bilinear"}
    of_networks = {"arch": arch, "count": count, "width": width, "num_class": num_class}
    return of_networks | {"classes": classes, "preprocessing": preprocessing}


def read_description(run: Path) -> Description:
    """Raises DivideMixError for what is no run folder."""
    model = read_about(run)["model"]
    preprocessing = model.pop("preprocessing")
    values = {field.name: preprocessing[field.name] for field in fields(Preparation)}
    values |= {name: tuple(values[name]) for name in ("mean", "std")}
    return Description(**model, preparation=Preparation(**values))
