"""From an image file to uint8 views: read it, resize it, cut views. Pixel for pixel as torchvision does with PIL.

    views = Views(resize=256, crop=224)                         # Clothing1M
    views = Views(resize=320, crop=299, kind="resized_crop")    # WebVision
    image = views.resized(read(path, Boundary(root)))           # uint8 (H, W, 3), the short side 256
    views.train(image, seed), views.eval(image)                 # uint8 (224, 224, 3) each
    read_image("photo.jpg")                                     # uint8 (H, W, 3), as a viewer shows it

Clothing1M and WebVision keep the published pixels (`read`). Own images, and all that `predict` is given, are read as
a viewer shows them (`read_image`; `shown` for Pillow). A view follows from the image and one integer alone, so it does
not matter which process makes it, nor when. Images are decoded in full: JPEG's draft mode, which decodes at a half or
a quarter of the size, is faster but gives other pixels.
"""

import contextlib
import io
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

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
def opened(path: str | os.PathLike, boundary: Boundary | None) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image, not decoded yet, and its file; without a boundary, symbolic links may lead anywhere. Whatever is
    wrong, also while decoding in the block, is a BadImage."""
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
    """The published pixels: the decoded image in RGB, as `convert("RGB")` makes it of grey, palette, CMYK or
    transparent ones, not turned; of 16 bits the upper eight, where Pillow alone would make almost all of them white.

    Raises BadImage.
    """
    with opened(path, boundary) as (image, _):
        if image.mode.startswith("I"):
            return Image.fromarray((_sixteen_bits(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode != "RGB":  # else `convert` would copy it
            return image.convert("RGB")
        image.load()
        return image


def _sixteen_bits(image: Image.Image) -> NDArray[np.int64]:
    """Grey values (H, W). Raises BadImage for larger ones."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("pixels of more than 16 bits, or below zero: expected 8 or 16 bits")
    return values


# ---- As a viewer shows them ----

TURNED, COMPOSITED, SCALED = 1, 2, 4  # what was done to an image
READING = (  # what `read_image` does, for those who have an exported file alone
    "the first frame, turned and mirrored as its EXIF orientation (or the TIFF tag Orientation) says",
    "16-bit grey (L): round(255 * L / (2**bits - 1)), at most 255, where bits are those that the file names, if no "
    "visible value is larger (sBIT of PNG, BitsPerSample below 16 of TIFF; a PGM is scaled by its maximum, if that is "
    "not 65535), else the largest visible value rounded up to 8, 10, 12, 14 or 16 bits; other 16-bit channels as "
    "Pillow reads them, in eight bits",
    "transparency composited on white, in 8 bits: round((value * alpha + 255 * (255 - alpha)) / 255)",
)
_BITS = (8, 10, 12, 14, 16)
_ONE_COLOUR = ("1", "L", "RGB", "I", "I;16")  # modes in which what is transparent is a colour
_GREY_ALPHA, _RGB_ALPHA = 4, 6  # PNG's colour types
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Shown(NamedTuple):
    image: Image.Image  # RGB
    changes: int = 0  # of TURNED, COMPOSITED and SCALED those that apply, added up


def read_image(path: str | os.PathLike, boundary: Boundary | None = None) -> NDArray[np.uint8]:
    """The image as a viewer shows it (`READING`), (H, W, 3), of every mode and depth that Pillow opens in `FORMATS`.

    Raises BadImage for a bad file, and for what cannot be shown faithfully: fractions, values of more than 16 bits or
    below zero.
    """
    return np.asarray(shown(path, boundary).image)


def shown(path: str | os.PathLike, boundary: Boundary | None = None) -> Shown:
    """As `read_image`, for Pillow, and what was done to the image. Raises BadImage."""
    with opened(path, boundary) as (image, file):
        is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)  # which Pillow turns itself, while it decodes
        maximum_applied = bool(image.tile) and image.tile[0][0].startswith("ppm")  # Pillow's decoders of these scale
        if not is_tiff:
            image.load()  # first: PNG may have its EXIF after the pixels
        turn = _TURNS.get(_orientation(image))
        image.load()
        rgb, changes = _to_rgb(image, file, 16 if maximum_applied else 0)
        if turn is None:
            return Shown(rgb, changes)
        return Shown(rgb if is_tiff else rgb.transpose(turn), changes | TURNED)


def load(path: str, boundary: Boundary, as_shown: bool) -> Shown:
    """An image of a list: `shown`, or the published pixels. Raises BadImage."""
    return shown(path, boundary) if as_shown else Shown(read(path, boundary))


def said(changes: NDArray[np.uint8]) -> list[str]:
    """A line on what was done to images (N,), none where nothing was."""
    turned, composited, scaled = (int(np.count_nonzero(changes & bit)) for bit in (TURNED, COMPOSITED, SCALED))
    parts = [f"{turned} turned as their EXIF orientation says"] * (turned > 0)
    parts += [f"{composited} with transparency put on white"] * (composited > 0)
    parts += [
        f"{scaled} of 16-bit grey scaled to 8 bits, each by the bits that its file names, or by its largest value "
        "rounded up to 8, 10, 12, 14 or 16 bits"
    ] * (scaled > 0)
    return [f"images read: {len(changes)}, of which {'; '.join(parts)}"] if parts else []


def _orientation(image: Image.Image) -> int | None:
    """None where there is none, or where the EXIF data are damaged: the pixels are sound."""
    try:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            return image.tag_v2.get(ExifTags.Base.Orientation)
        exif = Image.Exif()
        exif.load(image.info.get("exif"))
        value = exif.get(ExifTags.Base.Orientation)
        return value if isinstance(value, int) else None
    except Exception:  # Pillow raises many kinds
        return None


def _to_rgb(image: Image.Image, file: BinaryIO, bits: int) -> Shown:
    """A decoded image on white, not turned. bits: those of 16-bit grey values, 0 where Pillow has not scaled them."""
    key = image.info.pop("transparency", None) if image.mode in _ONE_COLOUR else None
    if image.mode == "RGB" and key is None:
        return Shown(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return Shown(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    depth, colour, significant = _png_header(file) if image.format == "PNG" else (8, 0, 0)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "L" and 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise BadImage("8-bit pixels with a sign, expected 8 or 16 bits without")
    changes, alpha = 0, None
    if image.mode.startswith("I") or (depth, colour) == (16, _GREY_ALPHA):
        if colour == _GREY_ALPHA:
            values, alpha = _grey_alpha(file)
        else:
            values = _sixteen_bits(image)
            alpha = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
        in_tag = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]  # 16 is the place, not what is in it
        named = bits or significant or (in_tag if in_tag < 16 else 0)
        grey = _eight_bits(values, values if alpha is None else values[alpha > 0], named)
        white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # at 16 bits Pillow passes it over
        image, changes = Image.fromarray(255 - grey if white_is_zero else grey), SCALED
    elif key is not None:
        alpha = np.where(_is_key(image, file, key, depth), 0, 255).astype(np.uint8)
        image = image.convert("RGB")
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
    """16-bit grey values, scaled by the bits that are named, else by those of the largest `visible` one. A file may
    name them and have stretched the values to 16 bits, as PNG's specification asks for."""
    largest = int(visible.max(initial=0))
    bits = named if named and largest < 1 << named else next(bits for bits in _BITS if largest < 1 << bits)
    white = (1 << bits) - 1
    return ((2 * 255 * np.minimum(values, white) + white) // (2 * white)).astype(np.uint8)


def _is_key(image: Image.Image, file: BinaryIO, key: int | tuple[int, ...], depth: int) -> NDArray[np.bool_]:
    """Which pixels (H, W) have the transparent colour. depth: bits of a sample in the file."""
    if image.mode == "RGB":
        pixels = np.asarray(image)
        if depth == 16:  # of which Pillow gives the upper eight bits
            file.seek(0)
            lower = Image.open(file, formats=("PNG",))
            lower.tile = [(codec, box, at, "RGB;16L") for codec, box, at, _ in lower.tile]
            pixels = pixels.astype(np.uint16) << 8 | np.asarray(lower)
        return (pixels == np.array(key) % (1 << depth)).all(axis=2)
    largest = (1 << depth) - 1  # Pillow stretches values of 1, 2 and 4 bits to 8, but not the key
    return np.asarray(image.convert("L")) == (key & largest) * 255 // largest


def _png_header(file: BinaryIO) -> tuple[int, int, int]:
    """Bits of a sample, colour type, and the significant bits of the first channel (sBIT), 0 where it is not there."""
    chunks, at = {}, 8
    while b"IDAT" not in chunks:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        chunks[kind] = file.read(min(length, 10))
        at += 12 + length
    significant = chunks.get(b"sBIT") or b"\0"
    return *chunks[b"IHDR"][8:10], significant[0] if significant[0] <= 16 else 0


def _grey_alpha(file: BinaryIO) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Of a PNG of 16-bit grey with alpha: grey values, and the upper eight bits of alpha, (H, W) each. Pillow gives the
    upper eight of grey, too; but a file that says it has four channels of 8 bits has the same bytes."""
    file.seek(0)
    content = bytearray(file.read())
    content[24:26] = 8, _RGB_ALPHA
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    pixels = np.asarray(Image.open(io.BytesIO(content), formats=("PNG",))).astype(np.int64)
    return pixels[..., 0] << 8 | pixels[..., 1], pixels[..., 2].astype(np.uint8)


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
    """How an image file becomes what the networks of a run were evaluated on. The file's part: as a viewer shows it
    (`read_image`, whatever the networks were trained on), RGB or (channels 1) grey, the short side `resize`, the centre
    of image_size x image_size. The networks' part, in `deploy.Ensemble`: a black `border` of so many pixels around it,
    three channels, mean and std of values in [0, 1] (3,).

    Sets that live on the device have resize = image_size: files of that size are taken pixel for pixel, others are
    made to fit.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    resize: int
    channels: int = 3
    border: int = 0

    def pixels(self, path: str, boundary: Boundary | None = None) -> NDArray[np.uint8]:
        """(image_size, image_size, channels). Raises BadImage."""
        return self.view(shown(path, boundary).image)

    def view(self, image: Image.Image) -> NDArray[np.uint8]:
        """(image_size, image_size, channels) of an image in RGB."""
        views = Views(self.resize, self.image_size)
        centre = views.eval(views.resized(image.convert("L") if self.channels == 1 else image))
        return centre.reshape(self.image_size, self.image_size, self.channels)
