"""From files to views: the pixels are those of torchvision's PIL transforms, whatever kind of image it is."""

import io
import os
import pickle
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from scipy.stats import chisquare, ks_2samp
from torchvision import transforms
from torchvision.transforms import functional as TF

from dividemix import DivideMixError
from dividemix.data import images
from dividemix.data.check import problem
from dividemix.data.images import BadImage, Views, describe_changes, read_image, shown
from dividemix.data.lists import Boundary

CROP, RESIZED = Views(64, 56), Views(80, 60, "resized_crop")


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


# ---- Views, against torchvision ----


@given(st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=30)
def test_evaluation_views_are_torchvisions(width, height):
    """Accuracies would not compare with those of any other code; nor would published weights do as well."""
    image = photo(width, height)
    expected = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(image)
    np.testing.assert_array_equal(CROP.eval(CROP.resized(image)), np.asarray(expected))


@pytest.mark.parametrize("views", [CROP, RESIZED], ids=lambda views: views.kind)
@pytest.mark.parametrize("size", [(63, 170), (64, 64), (500, 30)])
def test_training_views_are_torchvisions_for_the_same_box(views, size):
    """Training would see pixels that are resized or cut otherwise than in the paper."""
    image, unpickled = photo(*size), pickle.loads(pickle.dumps(views))
    resized, array = transforms.Resize(views.resize)(image), views.resized(image)
    without_flips = Views(views.resize, views.crop, views.kind, flip=False)
    flips = []
    for seed in range(20):
        top, left, height, width, flip = box = views.draw(*array.shape[:2], seed)
        flips.append(flip)
        assert without_flips.draw(*array.shape[:2], seed) == box._replace(flip=False)
        if views.kind == "crop":
            assert (height, width) == (56, 56)
            expected = TF.crop(resized, top, left, height, width)
        else:
            expected = TF.resized_crop(resized, top, left, height, width, [60, 60])
        expected = TF.hflip(expected) if flip else expected
        np.testing.assert_array_equal(unpickled.train(array, seed), np.asarray(expected))
    assert 0 < sum(flips) < 20


def test_crops_are_spread_evenly():
    """An edge that is never cut out, or views that are hardly ever mirrored."""
    boxes = np.array([CROP.draw(64, 70, seed) for seed in range(4000)])
    for column, values in ((0, 9), (1, 15), (4, 2)):
        counts = np.bincount(boxes[:, column], minlength=values)
        assert len(counts) == values and chisquare(counts).pvalue > 1e-4


def test_resized_crops_are_spread_as_torchvisions():
    """Near and far views would be mixed otherwise than the paper's, or narrow images be distorted."""
    draw = transforms.RandomResizedCrop.get_params
    boxes = np.array([RESIZED.draw(80, 120, seed)[:4] for seed in range(2500)], float)
    expected = np.array([draw(torch.empty(3, 80, 120), images.SCALE, images.RATIO) for _ in boxes], float)
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert ks_2samp(quantity(boxes), quantity(expected)).pvalue > 1e-4
    for shape in ((10, 400), (400, 10)):
        expected = draw(torch.empty(3, *shape), images.SCALE, images.RATIO)
        assert all(RESIZED.draw(*shape, seed)[:4] == expected for seed in range(20))


@pytest.mark.parametrize("crop", [33, 0])
def test_views_that_do_not_fit_in_are_refused(crop):
    """It would end in the middle of a run, with an error of numpy's."""
    with pytest.raises(DivideMixError, match="--image_size"):
        Views(32, crop)
    assert Views(32, 32).crop == 32 and Views(1, 1).crop == 1


# ---- Files: the published pixels ----


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "P", {"transparency": bytes(range(0, 256, 2))}),
        ("JPEG", "RGB", {"exif": exif_of(6)}),  # lying on its side
    ],
)
def test_published_pixels(tmp_path, kind, mode, options):
    """Clothing1M and WebVision would be other pixels than the paper's, or a run would end at the first grey photo."""
    path = tmp_path / "photo.jpg"
    photo(30, 20).convert(mode).save(path, kind, **options)
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(read_image(path, Boundary(tmp_path), as_shown=False), expected)


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", ">u2"), ("PPM", np.int32)])
def test_published_pixels_of_16_bits(tmp_path, kind, dtype):
    """They would be white all over: Pillow takes every value over 255 for 255."""
    values = np.arange(0, 65536, 41).astype(dtype)[:1560].reshape(39, 40)
    Image.fromarray(values).save(tmp_path / "scan.jpg", kind)
    pixels = read_image(tmp_path / "scan.jpg", Boundary(tmp_path), as_shown=False)
    np.testing.assert_array_equal(pixels, np.repeat((values >> 8)[..., None], 3, axis=2))


# ---- Files: as a viewer shows them ----


def png(depth: int, colour: int, row: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row. colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"\0" + row)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def tiff(photometric: int, bits: list[int], row: bytes, width: int, order: str = "<", **tags: list[int]) -> bytes:
    """A TIFF of one row, not compressed. tags: t<number>=values of 16 bits."""
    entries = {256: [width], 257: [1], 258: bits, 259: [1], 262: [photometric], 273: [0], 277: [len(bits)], 278: [1]}
    entries |= {279: [len(row)], **{int(name[1:]): values for name, values in tags.items()}}
    end = 8 + 2 + 12 * len(entries) + 4
    directory, more = struct.pack(order + "H", len(entries)), b""
    entries[273] = [end + sum(2 * len(values) for values in entries.values() if len(values) > 2)]
    for tag, values in sorted(entries.items()):
        data = struct.pack(f"{order}{len(values)}H", *values)
        if len(data) > 4:
            data, more = struct.pack(order + "I", end + len(more)), more + data
        directory += struct.pack(order + "HHI", tag, 3, len(values)) + data.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return start + directory + bytes(4) + more + row


def saved(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def of(values: list, mode: str) -> Image.Image:
    """An image of one row of pixels."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def palette(image: Image.Image, colours: list[int]) -> Image.Image:
    image.putpalette(colours)
    return image


def u16(*values: int, order: str = ">") -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


RAMP = [65535 * i // 255 for i in range(256)] * 3  # a TIFF's palette, of greys
KEY = b"tRNS"
# name: (file, what its row of pixels shows: grey values, or RGB)
SHOWN = {
    # modes without transparency
    "RGB PNG": (saved(of([(1, 2, 3), (250, 0, 9)], "RGB"), "PNG"), [(1, 2, 3), (250, 0, 9)]),
    "L TIFF, white is zero": (tiff(0, [8], bytes([0, 7, 255]), 3), [255, 248, 0]),
    "P TIFF": (tiff(3, [8], bytes([0, 9]), 2, t320=RAMP), [0, 9]),
    "CMYK TIFF": (saved(of([(255, 0, 0, 0), (0, 0, 0, 255)], "CMYK"), "TIFF"), [(0, 255, 255), (0, 0, 0)]),
    "first frame": (saved(of([0, 255], "L"), "GIF", save_all=True, append_images=[of([255, 0], "L")]), [0, 255]),
    # transparency, on white
    "RGBA PNG": (saved(of([(0, 0, 0, 0), (200, 100, 0, 51)], "RGBA"), "PNG"), [255, (244, 224, 204)]),
    "RGBa TIFF": (tiff(2, [8] * 4, bytes([40, 20, 0, 51, 0, 0, 0, 0]), 2, t338=[1]), [(244, 224, 204), 255]),
    "La TIFF": (tiff(1, [8, 8], bytes([0, 0, 20, 51]), 2, t338=[1]), [255, 224]),
    "PA TIFF": (tiff(3, [8, 8], bytes([0, 0, 100, 51]), 2, t338=[2], t320=RAMP), [255, 224]),
    "P PNG, one colour": (saved(palette(of([0, 1], "P"), [0, 0, 0, 1, 2, 3]), "PNG", transparency=0), [255, (1, 2, 3)]),
    "P PNG, a table": (
        png(8, 3, bytes([0, 1, 2]), 3, (b"PLTE", bytes([0, 0, 0, 100, 100, 100, 9, 9, 9])), (KEY, bytes([0, 51]))),
        [255, 224, 9],
    ),
    "1 PNG, white": (png(1, 0, b"\x40", 2, (KEY, u16(1))), [0, 255]),
    "L PNG of 2 bits, a colour": (png(2, 0, bytes([0b00011011]), 4, (KEY, u16(1))), [0, 255, 170, 255]),
    "RGB PNG, a colour": (png(8, 2, bytes([0, 0, 0, 0, 0, 1]), 2, (KEY, u16(0, 0, 0))), [255, (0, 0, 1)]),
    "RGB PNG of 16 bits, a colour": (
        png(16, 2, u16(256, 512, 768, 256, 512, 769), 2, (KEY, u16(256, 512, 768))),
        [255, (1, 2, 3)],
    ),
    # 16-bit grey: by its largest value
    "8 bits in 16": (png(16, 0, u16(0, 100, 255), 3), [0, 100, 255]),
    "9 bits in 16": (png(16, 0, u16(0, 256, 511), 3), [0, 64, 127]),
    "12 bits in 16": (png(16, 0, u16(0, 1024, 4095), 3), [0, 64, 255]),
    "14 bits in 16": (png(16, 0, u16(0, 4097, 16383), 3), [0, 64, 255]),
    "12 bits in a TIFF": (tiff(1, [16], u16(0, 1024, 4095, order="<"), 3), [0, 64, 255]),
    "12 bits in a TIFF, white is zero": (tiff(0, [16], u16(0, 1024, 4095, order="<"), 3), [255, 191, 0]),
    "12 bits in a PGM": (b"P5 3 1 65535\n" + u16(0, 1024, 4095), [0, 64, 255]),
    "12 bits with a transparent colour": (png(16, 0, u16(65535, 1024, 4095), 3, (KEY, u16(65535))), [255, 64, 255]),
    "12 bits with alpha": (png(16, 4, u16(65535, 0, 1024, 65535, 4095, 65535, 1024, 51 << 8), 4), [255, 64, 255, 217]),
    # 16-bit grey: by the bits that the file names
    "10 bits, sBIT 12": (png(16, 0, u16(0, 1023), 2, (b"sBIT", b"\x0c")), [0, 64]),
    "10 bits, sBIT 9": (png(16, 0, u16(0, 600), 2, (b"sBIT", b"\x09")), [0, 150]),
    "12 bits stretched to 16, sBIT 12": (png(16, 0, u16(0, 0x1010, 0xFFF0), 3, (b"sBIT", b"\x0c")), [0, 16, 255]),
    "senseless sBIT": (png(16, 0, u16(0, 1023), 2, (b"sBIT", b"\xff")), [0, 255]),
    "10 bits in a TIFF of 12": (tiff(1, [12], bytes([0x00, 0x03, 0xFF]), 2), [0, 64]),
    "a PGM of up to 1023": (b"P5 2 1 1023\n" + u16(100, 200), [25, 50]),
}


@pytest.mark.parametrize(("content", "expected"), SHOWN.values(), ids=SHOWN)
def test_images_are_read_as_a_viewer_shows_them(tmp_path, content, expected):
    """A black drawing on a transparent ground would be black all over, a scan of 12 bits all but black."""
    (tmp_path / "x.png").write_bytes(content)
    pixels = read_image(tmp_path / "x.png")
    values = [(value,) * 3 if isinstance(value, int) else value for value in expected]
    assert pixels.dtype == np.uint8 and pixels.shape == (1, len(expected), 3)
    assert pixels[0].tolist() == [list(value) for value in values]


def test_lab_is_shown_in_its_colours(tmp_path):
    """Scans in L*a*b* would end the run, or be shown in other colours than in any viewer."""
    lab = [(0, 0, 0), (100, 0, 0), (53.6, 0, 0), (54.3, 80.8, 69.9)]  # black, white, grey and red of sRGB, at D50
    row = b"".join(struct.pack("Bbb", round(2.55 * light), round(a), round(b)) for light, a, b in lab)
    (tmp_path / "x.tif").write_bytes(tiff(8, [8] * 3, row, 4))
    expected = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0)]
    assert np.abs(read_image(tmp_path / "x.tif")[0].astype(int) - expected).max() <= 8  # rounded to whole a and b


UPRIGHT = np.array([[10, 60, 110], [160, 210, 250]], np.uint8)
LYING = {  # how the file holds UPRIGHT: orientation k's definition says where its first row and column are
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: UPRIGHT.T[::-1],
    7: UPRIGHT.T[::-1, ::-1],
    8: UPRIGHT.T[:, ::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "PNG of 16 bits", "TIFF of 16 bits"])
def test_orientations(tmp_path, kind):
    """Photos from a phone would be trained on lying on their side."""
    for orientation, stored in LYING.items():
        stored = np.ascontiguousarray(stored)
        image = Image.fromarray(stored.astype(np.uint16) * 257 if "16" in kind else stored)
        if kind == "JPEG":  # blocks of one colour: it would blur single pixels
            image = Image.fromarray(stored.repeat(16, 0).repeat(16, 1))
        image.save(tmp_path / "x", kind.split()[0], exif=exif_of(orientation))
        image, changes = shown(tmp_path / "x")
        assert changes & images.TURNED == (images.TURNED if orientation > 1 else 0)
        pixels = np.asarray(image)[8::16, 8::16] if kind == "JPEG" else np.asarray(image)
        assert pixels.shape == (2, 3, 3)
        assert np.abs(pixels.astype(int) - UPRIGHT[..., None]).max() <= (2 if kind == "JPEG" else 0)


def test_exif_after_the_pixels_and_damaged_exif(tmp_path):
    """PNG allows EXIF there: such photos would stay on their side; damaged EXIF data would end the run."""
    content = saved(Image.fromarray(np.ascontiguousarray(LYING[6])), "PNG", exif=exif_of(6))
    at = content.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(content[at : at + 4], "big")
    (tmp_path / "x.png").write_bytes(content[:at] + content[end:-12] + content[at:end] + content[-12:])
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[..., 0], UPRIGHT)
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", exif_of(9)):
        Image.fromarray(UPRIGHT).save(tmp_path / "x.png", exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / "x.png")[..., 0], UPRIGHT)


def test_what_was_done_is_counted(tmp_path):
    """The user would not hear that photos were turned, or would hear of every screenshot's alpha channel."""
    turned, composited, scaled = images.TURNED, images.COMPOSITED, images.SCALED
    [line] = describe_changes(np.array([0, 0, turned, turned | composited, scaled, turned], np.uint8))
    assert re.findall(r"\d+ \w+", line)[:3] == ["3 turned", "1 with", "1 of"]
    assert describe_changes(np.zeros(9, np.uint8)) == describe_changes(np.array([], np.uint8)) == []
    for alpha, expected in ((255, 0), (254, composited)):
        of([(1, 2, 3, alpha)], "RGBA").save(tmp_path / "x.png")
        assert shown(tmp_path / "x.png").changes == expected


# ---- Bad files ----


def huge_jpeg(side: int) -> bytes:
    """A JPEG whose header claims side x side pixels, with the data of few."""
    frame = b"\xff\xc0\x00\x0b\x08" + side.to_bytes(2, "big") * 2 + b"\x01\x01\x11\x00"
    return b"\xff\xd8" + frame + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + b"\0" * 20 + b"\xff\xd9"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD = {  # name: (its bytes, or how it is made, what is wrong with it)
    "missing": (lambda path: None, "missing"),
    "empty": (b"", "empty"),
    "text": (b"<html>404 not found</html>", "not an image"),
    "truncated": (saved(photo(60, 50), "JPEG")[:-40], "truncated"),
    "truncated PNG": (saved(photo(60, 50), "PNG")[:-40], "truncated"),
    "a pipe, which would be waited for": (os.mkfifo, "not a file"),
    "a link to itself": (lambda path: path.symlink_to(path), "levels of symbolic links"),
    "a link that leads out": (lambda path: path.symlink_to("../outside.jpg"), "leads out"),
    "a program, which Pillow would start": (EPS, "not an image"),
    "a JPEG of 90 million pixels in 100 bytes": (huge_jpeg(9_600), "pixels"),
    "resized to a short side of 256, it takes 295 MB": (saved(Image.new("RGB", (2, 3000)), "JPEG"), "2 x 3000 pixels"),
    "fractions, of which none is white": (saved(Image.new("F", (8, 8), 0.5), "TIFF"), "fractions"),
    "more than 16 bits": (saved(Image.new("I", (8, 8), 70_000), "TIFF"), "more than 16"),
    "below zero": (saved(Image.new("I", (8, 8), -1), "TIFF"), "below zero"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said(tmp_path, content, reason):
    """The user would see a traceback of Pillow's, or a file from elsewhere fill the memory or be run."""
    (tmp_path / "data").mkdir()
    photo(60, 50).save(tmp_path / "outside.jpg")
    path, boundary = tmp_path / "data/photo.jpg", Boundary(tmp_path / "data")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    for as_shown in (False, True):
        with pytest.raises(BadImage, match=reason) as caught:
            read_image(path, boundary, as_shown)
        assert str(path) not in str(caught.value)
        for full in (False, True):  # --check_data says it in the same words
            assert problem(str(path), boundary, full, as_shown) == str(caught.value)


def test_8_bits_with_a_sign_are_refused(tmp_path):
    """Pillow takes -1 for 255: what is darkest would be white."""
    (tmp_path / "x.tif").write_bytes(tiff(1, [8], bytes([255, 1]), 2, t339=[2]))
    with pytest.raises(BadImage, match="sign"):
        read_image(tmp_path / "x.tif")
