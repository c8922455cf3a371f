"""The image benchmark: that both ways do the same work, on sizes so small that its times mean nothing."""

import numpy as np
import pytest
import torch

from benchmarks import bench_images
from dividemix.data.images import Views
from dividemix.data.stream import Pipeline
from dividemix.runtime.device import Runtime

CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return bench_images.make_photos(tmp_path_factory.mktemp("photos"), 20, (40, 60))


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
