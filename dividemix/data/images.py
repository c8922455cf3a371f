"""From an image file to uint8 views, with the same pixels as torchvision on PIL images: read, resize, cut views.

Clothing1M and WebVision keep the published pixels (`read`). Own images and the images for `predict` are read as a
viewer shows them (`shown`). JPEG's draft mode is faster, but gives other pixels.
"""

import contextlib
import math
import os
import stat
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from dividemix import DivideMixError
from dividemix.data import autoaugment
from dividemix.data.lists import Boundary

MISSING = "missing"
_MEANING = {FileNotFoundError: MISSING, NotADirectoryError: MISSING, UnidentifiedImageError: "not an image"}
# Pillow reads more formats, but starts a program for one of them, EPS, whatever the file's name is.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_RATIO = 200  # of an image's sides: resized to a short side of 256 pixels, it takes 40 MB
AUGMENTED = 64  # views that are augmented together: a view of 224 px needs about 7 MB meanwhile
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a resized crop: its share of the area, width / height

# Pillow's warnings about metadata (what it cannot read is an exception). Set once: catching warnings around each read
# would swallow those of other threads.
warnings.filterwarnings("ignore", module=r"PIL\b")

# ---- Files ----


class BadImage(Exception):
    """A file that cannot be used. The message says what is wrong, without the file's name."""


@contextlib.contextmanager
def opened(path: str | os.PathLike, boundary: Boundary | None) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image, not decoded yet, and its file. Without a boundary, symbolic links may lead anywhere. Raises BadImage
    for whatever is wrong, also while the image is decoded in the block."""
    try:
        if boundary is not None and not boundary.holds(path):
            raise BadImage("a symbolic link that leads out of the data folder")
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a file")
        if status.st_size == 0:
            raise BadImage("empty")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels, more than Pillow allows")
            if max(image.size) > MAX_RATIO * min(image.size):
                raise BadImage(f"{image.width} x {image.height} pixels, one side over {MAX_RATIO} times the other")
            if image.mode == "F":
                raise BadImage("pixels that are fractions, expected 8 or 16 bits")
            yield image, file
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # damage raises OSError, SyntaxError, ValueError, struct.error ...
        text = _MEANING.get(type(error)) or getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise BadImage(text or type(error).__name__) from error


def read(path: str | os.PathLike, boundary: Boundary | None) -> Image.Image:
    """The published pixels: the decoded image in RGB by `convert("RGB")`, not turned. Of 16 bits the upper eight are
    taken: Pillow's conversion would make almost all of them white. Raises BadImage."""
    with opened(path, boundary) as (image, _):
        if image.mode.startswith("I"):
            image = Image.fromarray((_sixteen_bits(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def _sixteen_bits(image: Image.Image) -> NDArray[np.int64]:
    """Grey values (H, W). Raises BadImage for larger ones."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("pixels of more than 16 bits, or below zero: expected 8 or 16 bits")
    return values


# ---- As a viewer shows them ----

TURNED, COMPOSITED, SCALED = 1, 2, 4  # what was done to an image
READING = (  # what `shown` does, for the description of an exported file
    "the first frame, turned and mirrored as its EXIF orientation (or the TIFF tag Orientation) says",
    "16-bit grey (L): round(255 * L / (2**bits - 1)), at most 255, where bits are those that the file names, if no "
    "visible value is larger (sBIT of PNG, BitsPerSample below 16 of TIFF; a PGM is scaled by its maximum, if that is "
    "not 65535), else the largest visible value rounded up to 8, 10, 12, 14 or 16 bits; other 16-bit channels as "
    "Pillow reads them, in eight bits",
    "transparency composited on white, in 8 bits: round((value * alpha + 255 * (255 - alpha)) / 255)",
)
_ONE_COLOUR = ("1", "L", "RGB", "I", "I;16")  # modes in which what is transparent is a colour
_WHITE = {"1": 1, "L;2": 3, "L;4": 15}  # white in the file, for the raw modes that Pillow stretches to 8 bits
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CHANGES = {
    TURNED: "turned as their EXIF orientation says",
    COMPOSITED: "with transparency, on a white background",
    SCALED: "of 16-bit grey scaled to 8 bits, each by the bits that its file names, or by its largest value rounded up "
    "to 8, 10, 12, 14 or 16 bits",
}


class Shown(NamedTuple):
    image: Image.Image  # RGB
    changes: int = 0  # of TURNED, COMPOSITED and SCALED those that apply, added up


def shown(path: str | os.PathLike, boundary: Boundary | None = None) -> Shown:
    """The image as a viewer shows it (`READING`), of any mode and depth that Pillow opens in `FORMATS`. Raises
    BadImage, also for fractions and for values of more than 16 bits or below zero, whose white is unknown."""
    with opened(path, boundary) as (image, file):
        is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)  # Pillow turns it while decoding
        codec, _, _, raw_mode = image.tile[0] if image.tile else ("", None, 0, "")
        if not is_tiff:
            image.load()  # first: PNG may have its EXIF after the pixels
        turn = _turn(image)
        image.load()
        raw_mode = raw_mode if image.format == "PNG" else ""
        rgb, changes = _to_rgb(image, file, raw_mode, scaled=codec.startswith("ppm"))  # Pillow's decoders of PGM scale
        if turn is None:
            return Shown(rgb, changes)
        return Shown(rgb if is_tiff else rgb.transpose(turn), changes | TURNED)


def load(path: str | os.PathLike, boundary: Boundary | None, as_shown: bool) -> Shown:
    """An image of a list: `shown`, or the published pixels. Raises BadImage."""
    return shown(path, boundary) if as_shown else Shown(read(path, boundary))


def read_image(path: str | os.PathLike, boundary: Boundary | None = None, as_shown: bool = True) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of `load`. Raises BadImage."""
    return np.asarray(load(path, boundary, as_shown).image)


def describe_changes(changes: NDArray[np.uint8]) -> list[str]:
    """A line that counts the `Shown.changes` of images (N,); no line where there are none."""
    counts = {bit: int(np.count_nonzero(changes & bit)) for bit in _CHANGES}
    texts = [f"{count} {_CHANGES[bit]}" for bit, count in counts.items() if count]
    return [f"images read: {len(changes)}, of which {'; '.join(texts)}"] if texts else []


def _turn(image: Image.Image) -> Image.Transpose | None:
    """None where there is nothing to turn, or where the EXIF data are damaged but the pixels are sound."""
    try:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            return _TURNS.get(image.tag_v2.get(ExifTags.Base.Orientation))
        exif = Image.Exif()
        exif.load(image.info.get("exif"))
        return _TURNS.get(exif.get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises many kinds
        return None


def _to_rgb(image: Image.Image, file: BinaryIO, raw_mode: str, scaled: bool) -> Shown:
    """A decoded image on white, not turned. raw_mode: a PNG's; scaled: whether 16-bit grey is scaled already."""
    key = image.info.get("transparency") if image.mode in _ONE_COLOUR else None
    if image.mode == "RGB" and key is None:
        return Shown(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return Shown(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "L" and 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise BadImage("8-bit pixels with a sign, expected 8 or 16 bits without")
    changes, alpha = 0, None
    if image.mode.startswith("I") or raw_mode == "LA;16B":
        if raw_mode == "LA;16B":  # Pillow gives the upper eight bits of grey, too
            upper, lower, alpha, _ = np.moveaxis(_decoded_again(file, "RGBA"), 2, 0)
            values = upper.astype(np.int64) << 8 | lower
        else:
            values = _sixteen_bits(image)
            alpha = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
        in_tag = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]  # 16 is the room, not the bits in use
        named = 16 if scaled else _significant_bits(file) if raw_mode else in_tag if in_tag < 16 else 0
        grey = _eight_bits(values, values if alpha is None else values[alpha > 0], named)
        white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # Pillow ignores it at 16 bits
        image, changes = Image.fromarray(255 - grey if white_is_zero else grey), SCALED
    elif raw_mode == "RGB;16B" and key is not None:  # Pillow gives the upper eight bits here, too
        pixels = np.asarray(image).astype(np.uint16) << 8 | _decoded_again(file, "RGB;16L")
        alpha = np.where((pixels == key).all(axis=2), 0, 255).astype(np.uint8)
    elif raw_mode in _WHITE and key is not None:  # Pillow does not stretch the transparent colour
        image.info["transparency"] = (key & _WHITE[raw_mode]) * 255 // _WHITE[raw_mode]
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    if not image.has_transparency_data:
        return Shown(image.convert("RGB"), changes)
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if rgba.getextrema()[3][0] == 255:  # nothing to see through
        return Shown(rgba.convert("RGB"), changes)
    on_white = Image.new("RGB", rgba.size, "white")
    on_white.paste(rgba, mask=rgba)
    return Shown(on_white, changes | COMPOSITED)


def _eight_bits(values: NDArray[np.int64], visible: NDArray[np.int64], named: int) -> NDArray[np.uint8]:
    """16-bit grey values, scaled by the bits that the file names, else by the bits of the largest `visible` value. A
    file may name its bits and still hold values stretched to 16 bits, as PNG's specification asks."""
    largest = int(visible.max(initial=0))
    bits = named if named and largest < 1 << named else next(k for k in (8, 10, 12, 14, 16) if largest < 1 << k)
    white = (1 << bits) - 1
    return ((2 * 255 * np.minimum(values, white) + white) // (2 * white)).astype(np.uint8)


def _decoded_again(file: BinaryIO, raw_mode: str) -> NDArray[np.uint8]:
    """A PNG's pixels, its bytes read as another raw mode of the same size: RGB;16L gives the lower eight bits."""
    file.seek(0)
    image = Image.open(file, formats=("PNG",))
    image.tile = [(codec, box, at, raw_mode) for codec, box, at, _ in image.tile]
    return np.asarray(image)


def _significant_bits(file: BinaryIO) -> int:
    """The significant bits of a PNG's first channel (its chunk sBIT); 0 where the file does not name them."""
    kind, at = b"", 8
    while kind not in (b"sBIT", b"IDAT"):
        file.seek(at)
        length, kind, first = struct.unpack(">I4sB", file.read(9))
        at += 12 + length
    return first if kind == b"sBIT" and first <= 16 else 0


# ---- Views ----


class Box(NamedTuple):
    """Where a view lies in a resized image, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class Views:
    """How views are made. resize: the short side of an image before cutting. crop: the side S of every view. kind: a
    training view is a random 'crop' of S x S, or a 'resized_crop' of random size and shape, resized to S x S. With
    `flip`, half of the training views are mirrored. The evaluation view is the centre. strong: whether an image's third
    and fourth view get AutoAugment's policy."""

    resize: int
    crop: int
    kind: str = "crop"
    flip: bool = True
    strong: bool = field(default=False, repr=False)  # files of features have a name that `repr` makes

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            problem = f"views of {self.crop} pixels (--image_size) do not fit in"
            raise DivideMixError(f"images are resized to {self.resize} pixels: {problem}")

    def resized(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3): the image with its short side `resize`, bilinear, antialiased."""
        from torchvision.transforms import functional as TF  # slow to import

        return np.asarray(TF.resize(image, self.resize))

    def train(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """(S, S, 3): the training view number `seed` of a resized image (H, W, 3)."""
        return self.cut(image, self.draw(*image.shape[:2], seed))

    def eval(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(S, S, 3): the centre of a resized image (H, W, 3)."""
        return self.cut(image, self.draw(*image.shape[:2], None))

    def batch(self, images: Sequence[NDArray[np.uint8] | Tensor], seeds: NDArray[np.int64] | None) -> Tensor:
        """uint8 (V, n, S, S, 3): V training views of each of n resized images, for seeds (n, V); without seeds the
        centres, V = 1. Views of tensors stay on their device; only a 'crop' can be cut from tensors. Strong views of
        tensors may differ from others by rounding (see `autoaugment`)."""
        columns = [[None] * len(images)] if seeds is None else seeds.T.tolist()
        rows = [pair for column in columns for pair in zip(images, column, strict=True)]
        rows = [(image, self.draw(*image.shape[:2], seed)) for image, seed in rows]
        first = 2 * len(images)  # strong view
        rngs = [np.random.default_rng([seed, 1]) for column in columns[2:] for seed in column] if self.strong else []
        if isinstance(images[0], Tensor):  # one kernel for all views, and one for all mirror images
            views = torch.stack([self.cut(image, box._replace(flip=False)) for image, box in rows])
            is_mirrored = torch.tensor([box.flip for _, box in rows]).to(views.device, non_blocking=True)
            views = torch.where(is_mirrored[:, None, None, None], views.flip(2), views)
            if rngs:
                operations = np.concatenate([autoaugment.draw(rng, 1, self.crop, self.crop) for rng in rngs])
                operations = torch.from_numpy(operations).to(views.device, non_blocking=True)
                for strong, drawn in zip(views[first:].split(AUGMENTED), operations.split(AUGMENTED), strict=True):
                    strong.copy_(autoaugment.augment(strong, drawn))
        else:
            views = np.stack([self.cut(image, box) for image, box in rows])
            for k, rng in enumerate(rngs, start=first):
                views[k] = autoaugment.augment_one(views[k], rng)
            views = torch.from_numpy(views)
        return views.unflatten(0, (len(columns), len(images)))

    def draw(self, height: int, width: int, seed: int | None) -> Box:
        """The box of the training view number `seed` of a resized image of this size; without a seed, or with one
        below 0, the centre."""
        if seed is None or seed < 0:
            top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
            return Box(top, left, self.crop, self.crop, False)
        rng = np.random.default_rng(seed)
        flip = rng.random() < 0.5 and self.flip
        for box_height, box_width in self._sides(height * width, rng):
            if 0 < box_height <= height and 0 < box_width <= width:
                top, left = rng.integers((height - box_height + 1, width - box_width + 1)).tolist()
                return Box(top, left, box_height, box_width, flip)
        # none of ten fits in: the middle, as large as the ratio allows
        box_height, box_width = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
        return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width, flip)

    def _sides(self, area: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Heights and widths to try; for resized crops drawn as torchvision's RandomResizedCrop does."""
        if self.kind == "crop":
            yield self.crop, self.crop
        for _ in range(10):
            box_area = area * rng.uniform(*SCALE)
            ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            yield round(math.sqrt(box_area / ratio)), round(math.sqrt(box_area * ratio))

    def cut(self, image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
        """The view (S, S, 3) of a resized image (H, W, 3)."""
        view = image[box.top : box.top + box.height, box.left : box.left + box.width]
        if view.shape[:2] != (self.crop, self.crop):  # cut first: pixels beside the box must not reach its edge
            from torchvision.transforms import functional as TF

            view = np.asarray(TF.resize(Image.fromarray(np.ascontiguousarray(view)), [self.crop, self.crop]))
        if not box.flip:
            return view
        return np.stack([view[:, ::-1, k] for k in range(3)], axis=2)  # else numpy copies three bytes at a time
