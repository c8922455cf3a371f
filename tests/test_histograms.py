"""Loss histograms: what is kept of an epoch's division, and how it is drawn."""

import json
import re

import numpy as np
import pytest
from make_run import histogram

from dividemix import histograms
from dividemix.codivide import Mixture
from dividemix.run import score_arrays


def divided(n: int = 200, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Scores of an epoch in which both nets were divided, and which labels are right."""
    rng = np.random.default_rng(seed)
    clean = rng.random(n) < 0.6
    scores = {}
    for k in range(2):
        loss = np.where(clean, rng.gamma(2, 0.1, n), rng.normal(3, 0.5, n)).astype(np.float32)
        scores |= score_arrays(k, Mixture(0.5).divide(loss, np.zeros(n, np.int64)))
    return scores, clean


def test_counts_are_of_every_sample_and_of_its_own_kind():
    """Else the slider shows bars that are not the losses, or clean and wrong exchanged."""
    scores, clean = divided()
    found = histograms.count(scores, clean)
    assert found.keys() == {"net1", "net2"}
    for k in (1, 2):
        each, loss = found[f"net{k}"], scores[f"loss_net{k}"]
        assert sum(each["clean"]) == clean.sum() and sum(each["wrong"]) == (~clean).sum()
        assert each["wrong"][59] >= 1 and each["clean"][0] >= 1  # the largest loss, 1, and the smallest, 0
        in_bin_30 = (loss >= 30 / 60) & (loss < 31 / 60)
        assert each["clean"][30] + each["wrong"][30] == in_bin_30.sum()
        assert each["means"] == scores[f"means_net{k}"].tolist() and each["threshold"] == 0.5
    assert histograms.is_sound(json.loads(json.dumps({"epoch": 3, **found})))


def test_without_truth_nothing_is_coloured_by_it():
    """Else a run on doubtful labels claims to know which are wrong. So do samples of another number: a network's own
    sample of a large set."""
    scores, clean = divided()
    for truth in (None, clean[:50]):
        for each in histograms.count(scores, truth).values():
            assert "clean" not in each and sum(each["all"]) == 200


def test_an_epoch_without_a_division_has_none():
    """Else the warm-up's epochs are drawn with a mixture that was not fitted."""
    scores, clean = divided()
    assert histograms.count({}, clean) == {}
    assert histograms.count({"raw_loss_net1": scores["raw_loss_net1"]}, clean) == {}
    net2 = {name: value for name, value in scores.items() if name.endswith("net2")}
    assert histograms.count(net2, clean).keys() == {"net2"}


@pytest.mark.parametrize("weights", [(0.6, 0.4), (0.999, 0.001)])
def test_gaussians_integrate_to_their_weights(weights):
    """Else the curves lie beside the histogram, which is a density, and the figure shows a fit that was not made."""
    x = np.linspace(-3, 4, 200_001)
    means, variances = np.array([0.1, 0.7]), np.array([5e-4, 0.09])
    curves = histograms.gaussians(x, {"means": means, "variances": variances, "weights": weights})
    assert curves.shape == (2, len(x))
    np.testing.assert_allclose(np.trapezoid(curves, x, axis=1), weights, rtol=1e-6)
    np.testing.assert_allclose(x[curves.argmax(axis=1)], means, atol=1e-4)  # each at its own mean
    np.testing.assert_allclose(np.trapezoid(curves * (x - means[:, None]) ** 2, x, axis=1), variances * weights, 1e-5)


def test_bars_are_densities_of_all_samples_together():
    """Else bars and curves have different units."""
    parts = histograms.densities(histogram(truth=True))
    assert {name: part.sum() / 60 for name, part in parts.items()} == pytest.approx({"clean": 8 / 12, "wrong": 4 / 12})
    assert histograms.densities(histogram(truth=False))["all"].sum() / 60 == pytest.approx(1)


def test_the_boundary_is_where_the_posterior_is_the_threshold():
    """Else the figure shows the split at a loss where it is not."""
    each = histogram(truth=True)
    [loss] = histograms.boundaries(each)
    clean, noisy = histograms.gaussians(np.array([loss]), each)[:, 0]
    assert clean / (clean + noisy) == pytest.approx(0.5, abs=0.05)


def points(path: str) -> np.ndarray:
    """The corners of an SVG path of straight lines."""
    return np.array(re.findall(r"[\d.]+", path), float).reshape(-1, 2)


def test_the_drawing_has_bars_curves_and_the_threshold_at_their_places():
    """Else the page is broken, or its picture shows other losses than those counted."""
    each = histogram(truth=True)
    paths = {name: points(d) for name, d in histograms.paths(each, histograms.peak([each]))}
    assert paths.keys() == {"bars clean", "bars wrong", "curve clean", "curve wrong", "threshold"}
    left, base, width = 40, 248, 588  # as in the template
    high = paths["bars clean"][paths["bars clean"][:, 1] < base - 1]  # the one bar: bin 3
    assert (high[:, 0].min() - left) / width == pytest.approx(3 / 60, abs=0.005)
    assert (high[:, 0].max() - left) / width == pytest.approx(4 / 60, abs=0.005)
    top = paths["curve clean"][paths["curve clean"][:, 1].argmin()]
    assert (top[0] - left) / width == pytest.approx(0.1, abs=0.01)
    assert (paths["threshold"][0][0] - left) / width == pytest.approx(histograms.boundaries(each)[0], abs=0.005)
    assert all(p[:, 1].min() >= 12 - 1e-6 and p[:, 1].max() <= base + 1e-6 for p in paths.values())


def test_all_epochs_have_one_scale():
    """Else the peak looks as high in every epoch while the slider moves."""
    small, large = histogram(truth=True), histogram(truth=True)
    large["clean"] = [x * 100 for x in large["clean"]]
    top = histograms.peak([small, large])
    assert top == max(histograms.peak([small]), histograms.peak([large])) > histograms.peak([small])
    assert histograms.peak([]) == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"variances": [0.0, 1.0]},
        {"means": [0.1]},
        {"clean": [1] * 59},
        {"wrong": ["1"] * 60},
        {"clean": [-1] * 60},
        {"clean": [0] * 60, "wrong": [0] * 60},
        {"threshold": None},
        {"weights": [float("nan"), 0.5]},
        {"means": [0.1, 10**400]},
        {"all": [1] * 60},
    ],
)
def test_damaged_lines_are_told_from_sound_ones(damage):
    """Else a line that was cut or edited ends the report in a stack trace."""
    assert histograms.is_sound({"epoch": 1, "net2": histogram(truth=True)})
    assert not histograms.is_sound({"epoch": 1, "net1": histogram(truth=True) | damage})
    assert not histograms.is_sound({"epoch": "1", "net1": histogram(truth=True)})
    assert not histograms.is_sound([1]) and not histograms.is_sound({"epoch": 1, "net1": 3})
