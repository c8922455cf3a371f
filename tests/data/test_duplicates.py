"""Images that are there more than once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from dividemix import DivideMixWarning
from dividemix.data import ImageList, Views
from dividemix.data.duplicates import describe, equal_images, first_equal
from dividemix.data.stream import Pipeline
from dividemix.runtime import Runtime


def lists_of(root: Path, **labels: list[int]) -> dict[str, ImageList]:
    return {
        name: ImageList(root, root, name, [b"%d.png" % i for i in range(len(of))], of, 3, as_shown=True)
        for name, of in labels.items()
    }


@pytest.fixture
def lists(tmp_path):
    """train: 0 = 2 (turned by its EXIF) = 4 (another format), 1 = 5, 3; val: 0 = train's 1, 1."""
    rng = np.random.default_rng(0)
    a, b, c, d = rng.integers(0, 256, (4, 12, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for name, images in {"train": (a, b, a[::-1, ::-1], c, a, b), "val": (b, d)}.items():
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(images):
            turned = {"exif": exif} if (name, i) == ("train", 2) else {}
            kind = "BMP" if (name, i) == ("train", 4) else "PNG"
            Image.fromarray(pixels.copy()).save(tmp_path / name / f"{i}.png", kind, **turned)
    return lists_of(tmp_path, train=[0, 1, 0, 2, 2, 1], val=[1, 0])


@pytest.mark.parametrize("cached", [False, True])
def test_equal_pixels_are_noticed_while_images_are_read(lists, tmp_path, cached):
    """The same image under two labels would look like two images; a copy of another format or orientation, too."""
    for _ in range(1 + cached):  # the second time from the cache alone
        folder = tmp_path / "cache" if cached else None
        options = {"workers": 0, "cache_dir": folder}
        with Pipeline(lists, Views(8, 8), (0.5,) * 3, (0.5,) * 3, Runtime(), **options) as pipeline:
            if cached:
                pipeline.build_cache()
            if not pipeline.checksums["train"].any():  # nothing was read yet
                assert all((of == -1).all() for of in pipeline.equal_images().values())
                assert pipeline.describe_images(np.array([])) == []
            for name in lists:
                pipeline.pixels(name, np.arange(len(lists[name])))
            groups = pipeline.equal_images()
            with pytest.warns(DivideMixWarning, match="val: 1 of 2 images are training images, too"):
                lines = pipeline.describe_images(np.array([]))
            assert pipeline.describe_images(np.array([])) == [] and len(lines) == 3  # 1: images that were turned
    assert first_equal(groups["train"]).tolist() == [0, 1, 0, -1, 0, 1]
    assert groups["val"].tolist() == [groups["train"][1], -1]


def test_a_checksum_alone_makes_no_equal_images(lists):
    """Two of a million images share a checksum by chance: their labels would be called wrong."""
    Path(lists["train"].path(5)).unlink()  # gone since it was read
    groups = equal_images(lists, np.array([7] * 6 + [0, 7]))
    assert groups["train"][[0, 2, 4]].tolist() == [groups["train"][0]] * 3 and groups["train"][0] >= 0
    assert groups["train"][[1, 3, 5]].tolist() == [-1] * 3 and groups["val"].tolist() == [-1, -1]
    assert all((of == -1).all() for of in equal_images(lists, np.arange(8)).values())


def test_what_is_said(lists, recwarn):
    """A leak between splits makes every accuracy too good; nothing is removed silently."""
    groups = {"train": np.array([0, 1, 0, -1, 0, 1]), "val": np.array([1, -1])}
    copies, conflict = describe(lists, groups, held_out=np.array([2]))
    assert copies.endswith(": 1") and "different labels: 1;" in conflict and "duplicate_of" in conflict
    of_val, of_held_out = (str(warning.message) for warning in recwarn)
    assert of_val.startswith("val: 1 of 2 ") and "(0.png is 1.png)" in of_val
    assert of_held_out.startswith("held out: 1 of 1 ") and "(2.png is 0.png)" in of_held_out
    assert describe(lists, {name: np.full_like(of, -1) for name, of in groups.items()}, np.array([2])) == []
    assert len(recwarn) == 2
