"""The report's figures: what their curves and bars say of runs made by hand."""

import struct
import warnings
from functools import partial

import numpy as np
import pytest
from helpers.run_folder import histogram, make_run
from matplotlib.figure import Figure

from dividemix.report import figures
from dividemix.report import issues as label_issues
from dividemix.run.folder import read_run


@pytest.fixture
def axes():
    return Figure().subplots()


def curves(axes) -> dict[str, list]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


ALWAYS = {"accuracy", "seconds"}
DIVIDED = ALWAYS | {"labeled", "losses_net1", "losses_net2", "transition"}


def test_the_figures_are_pictures_whatever_the_names(tmp_path):
    """Else a class called `$\\frac{$`, or by what is not Unicode or not in the font, fails the report, or warns."""
    classes = ["$\\frac{$", "_x\n\0\ud800", "\u732b" * 40]
    run = read_run(make_run(tmp_path / "_$x_{\udce9", classes=classes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = figures.draw_all(run, label_issues.find(run), tmp_path / "figures")
        figures.png(partial(figures.draw_overlay, groups=[(run.name, [run])], metric=None))
    assert files.keys() == DIVIDED | {"auc", "clean"}
    for path in files.values():
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", content[16:24])) > 500


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"truth": False}, DIVIDED),
        ({"method": "ce"}, ALWAYS | {"transition"}),
        ({"scored": False, "histograms": False, "epochs": 1}, ALWAYS),
        ({"classes": [f"class {c}" for c in range(1001)]}, DIVIDED - {"transition"} | {"auc", "clean"}),
    ],
    ids=["truth unknown", "cross-entropy", "one epoch", "many classes"],
)
def test_every_kind_of_run_has_its_figures(tmp_path, monkeypatch, kind, expected):
    """Else a run of this kind ends with a warning instead of its report."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"\x89PNG"))
    run = read_run(make_run(tmp_path / "run", **kind))
    assert figures.draw_all(run, label_issues.find(run), tmp_path / "figures").keys() == expected
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == expected


def test_accuracy_has_each_net_both_and_the_last_ten(tmp_path, axes):
    """Else a curve carries another's name, "last 10" is drawn over other epochs, or warm-up has a precision of 0."""
    run = read_run(make_run(tmp_path / "run", epochs=12))
    figures.draw_accuracy(axes, run)
    drawn = curves(axes)
    assert drawn["both networks"] == [50.0 + e for e in range(12)]
    assert drawn["net 1"] == [49.0 + e for e in range(12)] and drawn["net 2"] == [48.0 + e for e in range(12)]
    assert drawn["best epoch 11: 61.00"] == [61.0] and drawn["mean of the last 10: 55.50"] == [55.5, 55.5]
    at = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert at["mean of the last 10: 55.50"] == [2, 11] and at["best epoch 11: 61.00"] == [11]
    assert at["end of warm-up"][0] == 0.5 and axes.get_title() == "test accuracy"
    axes = Figure().subplots()
    figures.draw_nets(axes, run, ["clean_precision", "clean_recall"], "title")
    drawn = curves(axes)
    assert drawn.keys() == {f"{m}, net {k}" for m in ("precision", "recall") for k in (1, 2)} | {"end of warm-up"}
    assert np.isnan(drawn["precision, net 1"][0]) and drawn["precision, net 1"][1:] == [0.75] * 11


def test_losses_are_coloured_by_truth_and_are_densities(axes):
    """Else right and wrong labels are exchanged in the figure, or its bars and its curves have different units."""
    figures.draw_losses(axes, histogram(truth=True), "net 1")
    assert {"fitted Gaussian, clean", "fitted Gaussian, noisy", "clean probability = 0.5"} <= curves(axes).keys()
    areas, colors = {}, {}
    for patch in axes.patches:
        values, edges, baseline = patch.get_data()
        areas[patch.get_label()] = ((values - baseline) * np.diff(edges)).sum()
        colors[patch.get_label()] = patch.get_facecolor()[:3]
    assert areas == pytest.approx({"right labels (8)": 8 / 12, "wrong labels (4)": 4 / 12})
    assert colors["right labels (8)"][2] > 0.5 > colors["wrong labels (4)"][2]  # blue, orange


@pytest.mark.parametrize(
    ("truth", "label", "matrix"),
    [
        (True, "true label", [[0, 1, 0], [0, 1, 0], [0, 0, 1]]),
        (False, "corrected label", [[0, 1, 0], [0, 1, 0], [0, 1 / 5, 4 / 5]]),
    ],
)
def test_the_transition_matrix_is_true_where_the_truth_is_known(tmp_path, axes, truth, label, matrix):
    """Else the estimate is shown as the truth. All samples of class 0 were given 1; two of four are corrected."""
    figures.draw_transition(axes, label_issues.find(read_run(make_run(tmp_path / "run", truth=truth))))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "dog", "bird"]
    assert axes.get_ylabel() == label
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), matrix)
