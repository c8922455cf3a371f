"""Loss histograms: what is kept of an epoch's division, and how it is drawn."""

import json
import re

import numpy as np
import pytest
from helpers.run_folder import histogram

from dividemix.codivide import Mixture
from dividemix.run import histograms


def test_counts_are_of_every_sample_and_of_its_own_kind():
    """Else the slider shows other losses, clean and wrong exchanged, or a truth that nobody knows."""
    rng = np.random.default_rng(0)
    clean = rng.random(200) < 0.6
    raw = np.where(clean, rng.gamma(2, 0.1, 200), rng.normal(3, 0.5, 200)).astype(np.float32)
    division = Mixture(0.5).divide(raw, np.zeros(200, np.int64))
    counted, loss = histograms.count(division, clean), division.loss
    assert sum(counted["clean"]) == clean.sum() and sum(counted["wrong"]) == (~clean).sum()
    assert counted["wrong"][59] >= 1 and counted["clean"][0] >= 1  # the largest loss, 1, and the smallest, 0
    in_bin_30 = (loss >= 30 / 60) & (loss < 31 / 60)
    assert counted["clean"][30] + counted["wrong"][30] == in_bin_30.sum()
    assert counted["means"] == division.means.tolist() and counted["threshold"] == 0.5
    assert json.loads(json.dumps(counted)) == counted
    counted = histograms.count(division)
    assert "clean" not in counted and sum(counted["all"]) == 200


def test_gaussians_are_densities_with_the_mixtures_moments():
    """Else the curves lie beside the histogram, which is a density, and the figure shows a fit that was not made."""
    x, weights = np.linspace(-3, 4, 200_001), (0.6, 0.4)
    means, variances = np.array([0.1, 0.7]), np.array([5e-4, 0.09])
    curves = histograms.gaussians(x, {"means": means, "variances": variances, "weights": weights})
    np.testing.assert_allclose(np.trapezoid(curves, x, axis=1), weights, rtol=1e-6)
    np.testing.assert_allclose(x[curves.argmax(axis=1)], means, atol=1e-4)  # each at its own mean
    np.testing.assert_allclose(np.trapezoid(curves * (x - means[:, None]) ** 2, x, axis=1), variances * weights, 1e-5)


def points(path: str) -> np.ndarray:
    """The corners of an SVG path of straight lines."""
    return np.array(re.findall(r"[\d.]+", path), float).reshape(-1, 2)


def test_the_drawing_has_bars_curves_and_the_threshold_at_their_places():
    """Else bars and curves have different units or scales, or the picture shows other losses than those counted."""
    counted, left, base, width = histogram(truth=True), 40, 248, 588  # the axes, as in the template
    bars = histograms.densities(counted)
    assert {name: bar.sum() / 60 for name, bar in bars.items()} == pytest.approx({"clean": 8 / 12, "wrong": 4 / 12})
    assert histograms.densities(histogram(truth=False))["all"].sum() / 60 == pytest.approx(1)
    [loss] = histograms.boundaries(counted)
    clean, noisy = histograms.gaussians(np.array([loss]), counted)[:, 0]
    assert clean / (clean + noisy) == pytest.approx(0.5, abs=0.05)
    paths = {name: points(d) for name, d in histograms.paths(counted, histograms.peak([counted]))}
    assert paths.keys() == {"bars clean", "bars wrong", "curve clean", "curve wrong", "threshold"}
    bar = paths["bars clean"][paths["bars clean"][:, 1] < base - 1]  # the only one: bin 3
    edges = (bar[:, 0].min() - left) / width, (bar[:, 0].max() - left) / width
    assert edges == pytest.approx((3 / 60, 4 / 60), abs=0.005)
    top = paths["curve clean"][paths["curve clean"][:, 1].argmin()]
    assert (top[0] - left) / width == pytest.approx(0.1, abs=0.01)
    assert (paths["threshold"][0][0] - left) / width == pytest.approx(loss, abs=0.005)
    assert all(p[:, 1].min() >= 12 - 1e-6 and p[:, 1].max() <= base + 1e-6 for p in paths.values())
    higher = counted | {"clean": [x * 100 for x in counted["clean"]]}  # one scale for all epochs of the slider
    assert histograms.peak([counted, higher]) == histograms.peak([higher]) > histograms.peak([counted])
    assert histograms.peak([]) == 1
