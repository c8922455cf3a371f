"""The report's figures: what their curves and bars say of runs made by hand."""

import json
import struct
import warnings

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


@pytest.fixture
def unrendered(monkeypatch):
    """Everything is drawn, but no text set and no pixel made, which takes most of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"\x89PNG"))


def png_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


ALWAYS = {"accuracy", "seconds"}
DIVIDED = ALWAYS | {"labeled", "losses_net1", "losses_net2", "transition"}


def test_the_figures_of_a_whole_run_are_pictures(tmp_path):
    """Else the page shows broken images."""
    run = read_run(make_run(tmp_path / "run"))
    files = figures.draw_all(run, label_issues.find(run), tmp_path / "figures")
    assert files.keys() == DIVIDED | {"auc", "clean"}
    assert all(min(png_size(path)) > 500 for path in files.values())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"truth": False}, DIVIDED),
        ({"method": "ce"}, ALWAYS | {"transition"}),
        ({"scored": False, "histograms": False, "epochs": 1}, ALWAYS),
    ],
    ids=["truth unknown", "cross-entropy", "one epoch"],
)
def test_every_kind_of_run_has_its_figures(tmp_path, unrendered, kind, expected):
    """Else the run ends with a warning instead of its report, for a kind of run that nobody had tried."""
    run = read_run(make_run(tmp_path / "run", **kind))
    files = figures.draw_all(run, label_issues.find(run), tmp_path / "figures")
    assert files.keys() == expected
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {f"{name}.png" for name in expected}


def test_accuracy_has_each_net_both_and_the_last_ten(tmp_path, axes):
    """Else a curve carries another's name, or the paper's second number is drawn over other epochs."""
    figures.draw_accuracy(axes, read_run(make_run(tmp_path / "run", epochs=12)))
    found = curves(axes)
    assert found["both networks"] == [50.0 + e for e in range(12)]
    assert found["net 1"] == [49.0 + e for e in range(12)] and found["net 2"] == [48.0 + e for e in range(12)]
    assert found["peak 61.00"] == [61.0] and found["mean of the last 10: 55.50"] == [55.5, 55.5]
    last = next(line for line in axes.get_lines() if line.get_label().startswith("mean of"))
    assert list(last.get_xdata()) == [2, 11]
    warm_up = next(line for line in axes.get_lines() if line.get_label() == "end of warm-up")
    assert warm_up.get_xdata()[0] == 0.5 and axes.get_title() == "test accuracy"


def test_a_run_that_is_validated_only(tmp_path, axes):
    """Clothing1M's epochs have no test accuracy: else what chose the epoch is called a test."""
    folder = make_run(tmp_path / "run")
    records = [{"epoch": e, "val_acc": 60.0 + v, "val_acc_net1": 59.0} for e, v in enumerate((0, 4, 2))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures.draw_accuracy(axes, read_run(folder))
    assert axes.get_title() == "validation accuracy"
    assert curves(axes)["both networks"] == [60, 64, 62] and curves(axes)["net 1"] == [59] * 3
    assert "net 2" not in curves(axes) and "peak 64.00" in curves(axes)


def test_a_run_on_two_validation_sets(tmp_path, axes):
    """Else WebVision's figure lacks ImageNet, half of what the paper reports of it, or the held-out part by which the
    epoch was chosen."""
    folder = make_run(tmp_path / "run")
    known = {"imagenet_acc": 65.0, "best_acc": 70.0, "val_acc": 60.0}
    records = [{"epoch": e, "test_acc": 70.0 + e, **known} for e in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures.draw_accuracy(axes, read_run(folder))
    assert curves(axes)["both, ImageNet"] == [65] * 3 and curves(axes)["held-out part"] == [60] * 3


def test_metrics_of_both_nets_have_gaps_where_they_have_no_value(tmp_path, axes):
    """Else the warm-up's epochs are drawn as an AUC of 0."""
    run = read_run(make_run(tmp_path / "run"))
    figures.draw_nets(axes, run, ["clean_precision", "clean_recall"], "title")
    found = curves(axes)
    assert found.keys() == {f"{m}, net {k}" for m in ("precision", "recall") for k in (1, 2)} | {"end of warm-up"}
    assert np.isnan(found["precision, net 1"][0]) and found["precision, net 1"][1:] == [0.75, 0.75]


def test_losses_are_coloured_by_truth_and_are_densities(axes):
    """Else clean and wrong are exchanged in the figure, or its bars and its curves have different units."""
    figures.draw_losses(axes, histogram(truth=True), "net 1")
    handles, names = axes.get_legend_handles_labels()
    legend = dict(zip(names, handles, strict=True))
    assert {"label truly clean (8)", "label truly wrong (4)"} <= legend.keys()
    assert {"fitted Gaussian, clean", "fitted Gaussian, noisy", "clean probability = 0.5"} <= legend.keys()
    areas = {}
    for patch in axes.patches:
        values, edges, baseline = patch.get_data()
        areas[patch.get_label()] = ((values - baseline) * np.diff(edges)).sum()
    assert areas == pytest.approx({"label truly clean (8)": 8 / 12, "label truly wrong (4)": 4 / 12})
    unknown = Figure().subplots()
    figures.draw_losses(unknown, histogram(truth=False), "net 1")
    names = unknown.get_legend_handles_labels()[1]
    assert "samples (12)" in names and not any("truly" in name for name in names)


@pytest.mark.parametrize(
    ("truth", "label", "matrix"),
    [
        (True, "true label", [[0, 1, 0], [0, 1, 0], [0, 0, 1]]),
        (False, "corrected label", [[0, 1, 0], [0, 1, 0], [0, 1 / 5, 4 / 5]]),
    ],
)
def test_the_transition_matrix_is_true_where_the_truth_is_known(tmp_path, axes, truth, label, matrix):
    """Else the estimate is shown as the truth. Here all samples of class 0 were given 1; two of four are corrected."""
    figures.draw_transition(axes, label_issues.find(read_run(make_run(tmp_path / "run", truth=truth))))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "dog", "bird"]
    assert axes.get_ylabel() == label
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), matrix)


def test_time_is_stacked_and_complete(tmp_path, axes):
    """Else a phase's time is missing from the figure, also that of a phase that it does not know."""
    folder = make_run(tmp_path / "run")
    seconds = {"seconds_warmup1": 1.0, "seconds_warmup2": 2.0, "seconds_new": 4.0, "seconds_save": 8.0}
    records = [{"epoch": e, "test_acc": 1.0, "best_acc": 1.0, **seconds} for e in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures.draw_seconds(axes, read_run(folder))
    heights = {bars.get_label(): bars.patches[0].get_height() for bars in axes.containers}
    assert heights == {"warm-up": 3.0, "save": 8.0, "new": 4.0}
    assert max(bar.get_y() + bar.get_height() for bar in axes.patches) == 15.0


def test_runs_of_one_group_share_a_colour_and_a_name(tmp_path, axes, unrendered):
    """Else seeds look like settings, or a curve carries another run's name."""
    runs = [read_run(make_run(tmp_path / f"a{s}", seed=s, accuracy=50.0 + s)) for s in range(2)]
    other = read_run(make_run(tmp_path / "_ce", method="ce", accuracy=20.0))
    figures.overlay(axes, [("a", runs), ("_ce", [other])], None)
    lines = axes.get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[50, 51, 52], [51, 52, 53], [20, 21, 22]]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a (2 seeds)", " _ce"]
    drawn = figures.draw_comparison([("a", runs), ("_ce", [other])], tmp_path / "figures")
    assert drawn.keys() == {"accuracy", "auc", "labeled", "clean_precision", "clean_recall"}


def test_names_from_the_data_are_text(tmp_path):
    """A class or folder called `$\\frac{$` is no formula, and a name that is no text cannot be drawn: else the figure,
    and with it the report, fails. Nor does a script that the font lacks print a page of warnings."""
    classes = ["$\\frac{$", "_x\n\0\ud800", "\u732b" * 40]
    folder = make_run(tmp_path / "_$x_{\udce9", classes=classes, histograms=False)
    run = read_run(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = figures.draw_all(run, label_issues.find(run), tmp_path / "figures")
        figures.draw_comparison([(run.name, [run])], tmp_path / "more")
    assert "transition" in files
    assert figures.shorter("\u732b" * 40) == "\u732b" * 13 + "…"


def test_many_classes_are_drawn_without_their_names(tmp_path, axes):
    """A hundred names on one axis are a black bar."""
    run = read_run(make_run(tmp_path / "run", classes=[f"class number {c}" for c in range(100)]))
    figures.draw_transition(axes, label_issues.find(run))
    assert axes.images[0].get_array().shape == (100, 100)
    assert not any("class" in label.get_text() for label in axes.get_xticklabels()) and not axes.texts
