"""The image benchmark: that both ways do the same work, on sizes so small that its times mean nothing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench_images
from dividemix.data.images import Views
from dividemix.data.stream import Pipeline
from dividemix.runtime.device import Runtime

TINY = "--images 12 --workers 1 --batch_size 4 --resize 40 --image_size 32 --sides 40 60 --width 4 --repeats 2"
CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return bench_images.make_photos(tmp_path_factory.mktemp("photos"), 20, (40, 60))


def test_photos_are_of_the_sizes_asked_for(photos):
    """Smaller photos would be decoded faster than Clothing1M's."""
    sizes = np.array([sorted(Image.open(photos.path(i)).size) for i in range(20)])
    assert sizes[:, 0].min() >= 40 and sizes[:, 0].max() <= 60 and (sizes[:, 1] <= 1.6 * sizes[:, 0] + 1).all()
    assert len(np.unique(sizes, axis=0)) > 10 and np.asarray(Image.open(photos.path(0))).std() > 10


@pytest.mark.parametrize("labeled", [0.3, 0.8])
def test_both_ways_have_the_same_batches(photos, labeled):
    """The ratio would compare different amounts of work."""
    views, division = Views(40, 32), bench_images.divide(20, labeled)
    with Pipeline({"train": photos}, views, bench_images.MEAN, bench_images.STD, CPU, workers=0, keep="host") as made:
        ours, plain = made.images("train", keep=True), bench_images.PlainImages(photos, views, CPU, 0)
        assert bench_images.check(ours, plain, 7).endswith("0.0e+00")
        with pytest.raises(SystemExit, match="check failed"):
            bench_images.check(ours, bench_images.PlainImages(photos, Views(44, 32), CPU, 0), 7)
        expected = list(ours.mixmatch_batches(division, 6, np.random.default_rng(0)).sizes)
        for data in (ours, plain, bench_images.Loaded(20, views, CPU)):
            batches = data.mixmatch_batches(division, 6, np.random.default_rng(0))
            shapes = [[tuple(x.shape) for x in data.mixmatch_views(*batch)] for batch in batches]
            rows = list(batches.sizes)
            if isinstance(data, bench_images.Loaded):  # its unlabeled batches are as large as the labeled ones
                rows = [(n, n) for n, _ in rows]
            image = (3, 32, 32)
            assert shapes == [[(n, *image), (n, *image), (n,), (n,), (m, *image), (m, *image)] for n, m in rows]
            assert [n for n, _ in rows] == [n for n, _ in expected]


@pytest.mark.parametrize("arch", ["none", pytest.param("small", marks=pytest.mark.slow)])
def test_the_command_reports_what_it_promises(tmp_path, capsys, arch):
    """A figure in RESULTS.md that nobody could measure again."""
    file = tmp_path / "out.json"
    report = bench_images.main([*TINY.split(), "--arch", arch, "--json", str(file), "--device", "cpu"])
    assert json.loads(file.read_text())["ratio"] == report["ratio"]
    joint = {"compute", "joint here", "joint plain"} if arch == "small" else set()
    assert report["seconds"].keys() == {"decode here", "decode plain"} | joint
    assert report["images_of_an_epoch"] == 24
    for name, seconds in report["seconds"].items():
        assert report["images_per_second"][name] == pytest.approx(24 / seconds["epoch"])
    ratio = report["ratio"]["decode, epoch"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert "target for decoding: 2.5" in capsys.readouterr().out
