"""From files to views: the pixels are those of torchvision's PIL transforms, whatever kind of image it is."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_image_trees import Artist
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

from dividemix import DivideMixError
from dividemix.filelist import Boundary
from dividemix.images import RATIO, SCALE, BadImage, Preparation, Views, read

CROP, RESIZED = Views(64, 56), Views(80, 60, "resized_crop")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


# ---- Against torchvision ----


@given(st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=60)
def test_evaluation_views_are_torchvisions(width, height):
    """Accuracies would not compare with those of any other code; nor would published weights do as well."""
    image = photo(width, height)
    expected = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(image)
    np.testing.assert_array_equal(CROP.eval(CROP.resized(image)), np.asarray(expected))


@pytest.mark.parametrize("views", [CROP, RESIZED], ids=lambda views: views.kind)
@pytest.mark.parametrize("size", [(200, 150), (63, 170), (80, 80), (64, 64), (500, 30)])
def test_training_views_are_torchvisions_for_the_same_box(views, size):
    """Training on pixels that are resized or cut otherwise than in the paper, at the edges first of all."""
    image = photo(*size)
    resized = transforms.Resize(views.resize)(image)
    array = views.resized(image)
    np.testing.assert_array_equal(array, np.asarray(resized))
    for seed in range(30):
        top, left, height, width, flip = views.draw(*array.shape[:2], seed)
        if views.kind == "crop":
            assert (height, width) == (56, 56)
            expected = TF.crop(resized, top, left, height, width)
        else:
            expected = TF.resized_crop(resized, top, left, height, width, [60, 60])
        expected = TF.hflip(expected) if flip else expected
        np.testing.assert_array_equal(views.train(array, seed), np.asarray(expected))


def test_crops_are_spread_evenly():
    """An edge that is never cut out, or views that are hardly ever mirrored."""
    boxes = np.array([CROP.draw(64, 70, seed) for seed in range(4000)])
    for column, values in ((0, 9), (1, 15), (4, 2)):
        counts = np.bincount(boxes[:, column], minlength=values)
        assert len(counts) == values
        expected = len(boxes) / values
        assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("kind", ["crop", "resized_crop"])
def test_without_flips_the_boxes_are_the_same(kind):
    """Mirrored digits are other digits; and two runs that differ in this alone should differ in nothing else."""
    boxes = [[Views(64, 56, kind, flip).draw(64, 70, seed) for seed in range(50)] for flip in (True, False)]
    assert any(box.flip for box in boxes[0]) and not any(box.flip for box in boxes[1])
    assert [box[:4] for box in boxes[0]] == [box[:4] for box in boxes[1]]


def test_resized_crops_are_spread_as_torchvisions():
    """Another mixture of near and far views than the paper's: another augmentation under its name."""
    n, (height, width) = 4000, (80, 120)
    own = np.array([RESIZED.draw(height, width, seed)[:4] for seed in range(n)], float)
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    theirs = np.array([transforms.RandomResizedCrop.get_params(blank, SCALE, RATIO) for _ in range(n)], float)
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = quantity(own), quantity(theirs)
        assert abs(a.mean() - b.mean()) < 5 * np.sqrt((a.var() + b.var()) / n)
        assert abs(a.std() / b.std() - 1) < 0.08


@pytest.mark.parametrize("shape", [(10, 400), (400, 10)])
def test_no_box_fits_in(shape):
    """A narrow image would end the run, or give a view distorted beyond what torchvision makes of it."""
    expected = transforms.RandomResizedCrop.get_params(torch.empty(3, *shape), SCALE, RATIO)
    for seed in range(20):
        assert RESIZED.draw(*shape, seed)[:4] == expected


def test_a_view_follows_from_its_seed():
    """A run that is continued would train on other views than the uninterrupted one."""
    image = CROP.resized(photo(90, 70))
    np.random.seed(0)  # noqa: NPY002
    first = CROP.train(image, 7)
    np.testing.assert_array_equal(first, pickle.loads(pickle.dumps(CROP)).train(image, 7))
    assert any((CROP.train(image, seed) != first).any() for seed in range(5))


@pytest.mark.parametrize(("resize", "crop"), [(32, 33), (32, 0)])
def test_views_that_do_not_fit_in_are_refused(resize, crop):
    """It would end in the middle of a run, with an error of numpy's."""
    with pytest.raises(DivideMixError, match="--image_size"):
        Views(resize, crop)


# ---- Files ----

KINDS = {
    "RGB JPEG": ("JPEG", "RGB", {}),
    "grey JPEG": ("JPEG", "L", {}),
    "CMYK JPEG": ("JPEG", "CMYK", {}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
    "palette PNG": ("PNG", "P", {}),
    "palette PNG, one colour transparent": ("PNG", "P", {"transparency": 3}),
    "palette PNG, colours half transparent": ("PNG", "P", {"transparency": bytes(range(0, 256, 2))}),
    "GIF": ("GIF", "P", {}),
    "grey PNG with transparency": ("PNG", "LA", {}),
    "RGBA PNG": ("PNG", "RGBA", {}),
    "black and white PNG": ("PNG", "1", {}),
    "WebP": ("WEBP", "RGB", {}),
}


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS.values(), ids=KINDS)
def test_kinds_of_images(tmp_path, kind, mode, options):
    """A run would end at the first grey photo, or see it in other colours than everyone else."""
    path = tmp_path / "photo.jpg"
    image = Artist(0).image(13)
    image.convert(mode).save(path, kind, **options)
    with warnings.catch_warnings(), Image.open(path) as opened:
        warnings.simplefilter("ignore")
        expected = np.asarray(opened.convert("RGB"))
        found = read(str(path), Boundary(tmp_path))
    np.testing.assert_array_equal(np.asarray(found), expected)


DEEP = {"PNG": np.uint16, "TIFF": np.uint16, "TIFF, big endian": ">u2", "TIFF of 32 bits": np.int32, "PPM": np.int32}


@pytest.mark.parametrize(("kind", "dtype"), DEEP.items(), ids=DEEP)
def test_grey_images_of_16_bits(tmp_path, kind, dtype):
    """Scans and X-rays would be white all over: Pillow takes every value over 255 for 255."""
    values = np.arange(0, 65536, 41).astype(dtype)[:1560].reshape(39, 40)
    image = Image.fromarray(values)
    assert image.mode.startswith("I")
    image.save(tmp_path / "scan.jpg", kind.split(",")[0].split()[0])
    found = read(str(tmp_path / "scan.jpg"), Boundary(tmp_path))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.repeat((values >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize(("value", "said"), [(0.5, "fractions"), (70_000, "more than 16"), (-1, "more than 16")])
def test_pixels_of_other_numbers_are_refused(tmp_path, value, said):
    """There is no telling what is white: they would be black or white all over."""
    Image.fromarray(np.full((8, 8), value, np.float32 if value == 0.5 else np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(BadImage, match=said):
        read(str(tmp_path / "x.tif"), Boundary(tmp_path))


def damage(path: Path, how: str) -> None:
    photo(60, 50).save(path)
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404 not found</html>")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-400])
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "outside":
        path.rename(path.parent.parent / "outside.jpg")
        path.symlink_to("../outside.jpg")


BAD = {
    "missing": "missing",
    "empty": "empty",
    "text": "not an image",
    "truncated": "truncated",
    "a folder": "not a file",
    "outside": "leads out",
}


@pytest.mark.parametrize(("how", "what"), BAD.items(), ids=BAD)
def test_what_is_wrong_is_said(tmp_path, how, what):
    """A traceback of Pillow's that does not tell which file to mend."""
    folder = tmp_path / "data"
    folder.mkdir()
    damage(folder / "photo.jpg", how)
    with pytest.raises(BadImage, match=what):
        read(str(folder / "photo.jpg"), Boundary(folder))


def test_images_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    """A small file that decodes to gigabytes would take down a worker, or the machine."""
    photo(60, 50).save(tmp_path / "photo.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings(), pytest.raises(BadImage, match="60 x 50 pixels"):
        warnings.simplefilter("ignore")
        read(str(tmp_path / "photo.jpg"), Boundary(tmp_path))


# ---- Files for trained networks ----


@pytest.mark.parametrize("size", [(200, 150), (40, 90), (64, 64), (9, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_prepared_file_is_torchvisions_evaluation_view(tmp_path, size, channels):
    """A trained network would be asked about other pixels than those it was evaluated on."""
    path, preparation = tmp_path / "photo.png", Preparation((0.5,) * 3, (0.5,) * 3, 56, 64, channels)
    photo(*size).save(path)
    image = photo(*size).convert("L") if channels == 1 else photo(*size)
    expected = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(image)
    found = preparation.pixels(str(path), Boundary(tmp_path))
    np.testing.assert_array_equal(found, np.asarray(expected).reshape(56, 56, channels))


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS.values(), ids=KINDS)
def test_any_kind_of_image_is_prepared_in_grey(tmp_path, kind, mode, options):
    """A network of grey images would end at the first file in colours, or with transparency."""
    path, levels = tmp_path / "photo.png", np.arange(600, dtype=np.uint16).reshape(20, 30)
    image = Image.fromarray(levels) if mode == "I;16" else photo(30, 20).convert("L").convert(mode)
    image.save(path, kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Preparation((0.5,) * 3, (0.5,) * 3, 20, 20, channels=1).pixels(str(path), Boundary(tmp_path))
        with Image.open(path) as opened:
            expected = np.asarray(opened.convert("RGB").convert("L"))[:, 5:25, None]
    np.testing.assert_array_equal(found, expected)
