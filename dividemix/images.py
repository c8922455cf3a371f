"""From an image file to uint8 views: read it, resize it, cut views. Pixel for pixel as torchvision does with PIL.

    views = Views(resize=256, crop=224)                         # Clothing1M
    views = Views(resize=320, crop=299, kind="resized_crop")    # WebVision
    image = views.resized(read(path, Boundary(root)))           # uint8 (H, W, 3), the short side 256
    views.train(image, seed), views.eval(image)                 # uint8 (224, 224, 3) each

A view follows from the image and one integer alone, so it does not matter which process makes it, nor when. Images are
decoded in full: JPEG's draft mode, which decodes at a half or a quarter of the size, is faster but gives other pixels.
As with torchvision's ImageFolder, an EXIF orientation is not applied.
"""

import contextlib
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dividemix import DivideMixError
from dividemix.filelist import Boundary

MISSING = "missing"
# Pillow knows far more, and for one of them, EPS, starts a program: a file of any name can be one.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_RATIO = 200  # of an image's sides: resized to a short side of 256 pixels, it takes 40 MB
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a resized crop: its share of the area, width to height

# ---- Files ----


class BadImage(Exception):
    """A file that cannot be used; the message says what is wrong with it, not which it is."""


@contextlib.contextmanager
def opened(path: str, boundary: Boundary) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image, not decoded yet, and its file. Whatever is wrong, also while decoding in the block, is a BadImage."""
    try:
        if not boundary.holds(path):
            raise BadImage("a symbolic link that leads out of the data folder")
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a file")
        if status.st_size == 0:
            raise BadImage("empty")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels, more than Pillow takes for harmless")
            if max(image.size) > MAX_RATIO * min(image.size):
                raise BadImage(f"{image.width} x {image.height} pixels, one side over {MAX_RATIO} times the other")
            if image.mode == "F":
                raise BadImage("pixels that are fractions, expected 8 or 16 bits")
            yield image, file
    except (BadImage, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadImage(MISSING) from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except OSError as error:
        raise BadImage(error.strerror or _line(error)) from error
    except Exception as error:  # damage can end in anything: SyntaxError, ValueError, struct.error, bombs ...
        raise BadImage(_line(error)) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read(path: str, boundary: Boundary) -> Image.Image:
    """The decoded image in RGB, as `convert("RGB")` makes it of grey, palette, CMYK or transparent ones; of 16 bits
    the upper eight, where Pillow alone would make almost all of them white.

    Raises BadImage.
    """
    with opened(path, boundary) as (image, _):
        if image.mode.startswith("I"):
            return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
        if image.mode != "RGB":  # else `convert` would copy it
            return image.convert("RGB")
        image.load()
        return image


def _eight_bits(values: NDArray) -> NDArray[np.uint8]:
    """Grey values of 16 bits (H, W) -> their upper eight. Raises BadImage for larger ones."""
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("pixels of more than 16 bits, expected 8 or 16")
    return (values >> 8).astype(np.uint8)


# ---- Views ----


class Box(NamedTuple):
    """Where in a resized image a view lies, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class Views:
    """How views are made. resize: the short side of an image before cutting; crop: the side S of every view; kind: what
    a training view is, a 'crop' of S x S at random, or a 'resized_crop' of random size and shape, resized to S x S.
    Training views are mirrored every other time, with `flip`; the evaluation view is the centre."""

    resize: int
    crop: int
    kind: str = "crop"
    flip: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("crop", "resized_crop"):
            raise ValueError(f"no such kind of view: {self.kind}")
        if not 1 <= self.crop <= self.resize:
            raise DivideMixError(
                f"images are resized to {self.resize} pixels: views of {self.crop} pixels (--image_size) do not fit in"
            )

    def resized(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3): the image with its short side `resize`; bilinear over all pixels below ("antialiased")."""
        short, long = sorted(image.size)
        long = int(self.resize * long / short)  # rounded as torchvision does
        size = (self.resize, long) if image.width <= image.height else (long, self.resize)
        return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BILINEAR))

    def train(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """(S, S, 3): the training view number `seed` of a resized image (H, W, 3)."""
        return self.train_batch([image], np.array([[seed]]))[0, 0]

    def eval(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(S, S, 3): the centre of a resized image (H, W, 3)."""
        return self.cut(image, self.centre(*image.shape[:2]))

    def train_batch(self, images: Iterable[NDArray[np.uint8]], seeds: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(V, n, S, S, 3): V views of each of n images, for seeds (n, V)."""
        views = np.empty((*seeds.T.shape, self.crop, self.crop, 3), np.uint8)
        for k, (image, row) in enumerate(zip(images, seeds.tolist(), strict=True)):
            for v, seed in enumerate(row):
                box = self.draw(*image.shape[:2], seed)
                view, into = self.cut(image, box), views[v, k]
                if not box.flip:
                    into[:] = view
                for channel in range(3 if box.flip else 0):  # all in one go, numpy would copy three bytes at a time
                    into[..., channel] = view[:, ::-1, channel]
        return views

    def eval_batch(self, images: Iterable[NDArray[np.uint8]], n: int) -> NDArray[np.uint8]:
        """(n, S, S, 3): the centre of each of n images."""
        views = np.empty((n, self.crop, self.crop, 3), np.uint8)
        for view, image in zip(views, images, strict=True):
            view[:] = self.eval(image)
        return views

    def centre(self, height: int, width: int) -> Box:
        top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
        return Box(top, left, self.crop, self.crop, False)

    def draw(self, height: int, width: int, seed: int) -> Box:
        rng = np.random.default_rng(seed)
        flip = rng.random() < 0.5 and self.flip
        box = self._resized_box(height, width, rng) if self.kind == "resized_crop" else (self.crop, self.crop)
        if box is None:  # no box of ten fitted in: the middle, as much as the ratio allows
            box_width = min(width, round(height * RATIO[1]))
            box_height = min(height, round(width / RATIO[0]))
            return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width, flip)
        top, left = rng.integers((height - box[0] + 1, width - box[1] + 1)).tolist()
        return Box(top, left, *box, flip)

    @staticmethod
    def _resized_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int] | None:
        """Height and width as torchvision's RandomResizedCrop draws them."""
        for _ in range(10):
            area = height * width * rng.uniform(*SCALE)
            ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < box_height <= height and 0 < box_width <= width:
                return box_height, box_width
        return None

    def cut(self, image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
        """(S, S, 3), not flipped; of the size S x S, a part of the image itself, not a copy."""
        view = image[box.top : box.top + box.height, box.left : box.left + box.width]
        if view.shape[:2] != (self.crop, self.crop):  # cut first: pixels beside the box have no part in its edge
            cut = Image.fromarray(np.ascontiguousarray(view))
            view = np.asarray(cut.resize((self.crop, self.crop), Image.Resampling.BILINEAR))
        return view


# ---- Files for trained networks ----


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes what the networks of a run were evaluated on. The file's part: RGB or (channels 1)
    grey, the short side `resize`, the centre of image_size x image_size. The networks' part, in `deploy.Ensemble`: a
    black `border` of so many pixels around it, three channels, mean and std of values in [0, 1] (3,).

    Sets that live on the device have resize = image_size: files of that size are taken pixel for pixel, others are
    made to fit.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    resize: int
    channels: int = 3
    border: int = 0

    def pixels(self, path: str, boundary: Boundary) -> NDArray[np.uint8]:
        """(image_size, image_size, channels). Raises BadImage."""
        image, views = read(path, boundary), Views(self.resize, self.image_size)
        centre = views.eval(views.resized(image.convert("L") if self.channels == 1 else image))
        return centre.reshape(self.image_size, self.image_size, self.channels)
