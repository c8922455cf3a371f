"""The report: what the figure and the table say of a run, on run folders made by hand."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dividemix import DivideMixError, report

N = 12
WRONG = np.arange(N) % 3 == 0  # 4 of 12


def make_run(
    folder: Path, *, divided: tuple[int, ...] = (1, 2), truth: bool = True, epochs: int = 3, warm_up: int = 1
) -> Path:
    """A run folder as Train_cifar.py leaves it: 12 samples, of which 0, 3, 6, 9 are wrong. divided: the nets that
    have a division in the last epoch; where one is missing, it found nothing clean."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": {"warm_up": 1}}))
    labels = {"index": np.arange(N), "given": np.arange(N) % 10}
    if truth:
        labels["true"] = np.where(WRONG, (labels["given"] + 1) % 10, labels["given"])
    np.savez(folder / "labels.npz", **labels)
    auc = {f"auc_net{k}": 0.875 if k in divided and truth else None for k in (1, 2)}
    lines = []
    for epoch in range(epochs):
        record = {"epoch": epoch, "test_acc": 50.0 + epoch, "best_acc": 50.0 + epoch, "last10_acc": 50 + epoch / 2}
        lines.append(json.dumps(record | auc) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if divided:
        (folder / "scores").mkdir()
        np.savez(folder / "scores" / "epoch_001.npz", loss_net1=np.zeros(1))  # an older epoch's: must not be read
        np.savez(folder / "scores" / "epoch_002.npz", **scores(divided))
    return folder


def scores(nets: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Samples 0, 3, 6 look wrong to both nets, 9 does not; 1 looks wrong to both though it is clean. The nets disagree
    on 2 (net 1: 0.9, net 2: 0.3, mean 0.6) and on 4 (0.45 and 0.55, mean 0.5)."""
    arrays = {}
    for k in nets:
        p = np.full(N, 0.95)
        p[[0, 3, 6, 1]] = 0.1
        p[2], p[4] = (0.9, 0.45) if k == 1 else (0.3, 0.55)
        values = {
            "clean_probability": p,
            "loss": (1 - p).astype(np.float32),
            "means": np.array([0.1, 0.8]),
            "variances": np.array([0.001, 0.04]),
            "weights": np.array([0.6, 0.4]),
            "threshold": np.float64(0.5),
        }
        arrays |= {f"{name}_net{k}": value for name, value in values.items()}
    return arrays


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("weights", [(0.6, 0.4), (0.999, 0.001)])
def test_drawn_gaussians_integrate_to_their_weights(weights):
    """Else the curves lie beside the histogram, which is a density, and the figure shows a fit that was not made."""
    x = np.linspace(-3, 4, 200_001)
    means, variances = np.array([0.1, 0.7]), np.array([5e-4, 0.09])
    curves = report.gaussians(x, means, variances, np.array(weights))
    assert curves.shape == (2, len(x))
    np.testing.assert_allclose(np.trapezoid(curves, x, axis=1), weights, rtol=1e-6)
    np.testing.assert_allclose(x[curves.argmax(axis=1)], means, atol=1e-4)  # each at its own mean
    np.testing.assert_allclose(np.trapezoid(curves * (x - means[:, None]) ** 2, x, axis=1), variances * weights, 1e-5)


def test_found_wrong_counts_by_both_networks_mean(tmp_path):
    """Else the number that the user reads first, how many wrong labels were found, is not true. Flagged here: 0, 3, 6
    (wrong) and 1 (clean), not 2, which one net alone takes for wrong, and not 4, whose mean is the threshold."""
    run = report.read_run(make_run(tmp_path / "run"))
    mean = (run.scores["clean_probability_net1"] + run.scores["clean_probability_net2"]) / 2
    assert mean[4] == pytest.approx(0.5)  # exactly at the threshold: not below it
    assert report.found_wrong(run) == {"flagged": 4, "found": 3, "wrong": 4}


def test_found_wrong_is_unknown_without_truth_or_division(tmp_path):
    """Else a run on the user's own data, or the CE baseline, reports invented counts."""
    assert report.found_wrong(report.read_run(make_run(tmp_path / "a", truth=False))) is None
    assert report.found_wrong(report.read_run(make_run(tmp_path / "b", divided=()))) is None


def test_table_has_one_line_a_run_with_its_numbers(tmp_path):
    """Else `make demo` ends with a table that shows another run's numbers, or crashes on the CE run beside it."""
    runs = [
        report.read_run(make_run(tmp_path / name, divided=(1, 2) if name == "ours" else ())) for name in ("ce", "ours")
    ]
    header, ce, ours = report.table(runs).splitlines()
    assert header.split()[0] == "run"
    assert ce.split() == ["ce", "3", "52.00", "52.00", "51.00", "-", "-", "-"]
    assert ours.split("  ")[0] == "ours"
    for cell in ("52.00", "51.00", "0.875/0.875", "3 of 4 (75.0%)", "3 of 4 (75.0%)"):
        assert cell in ours
    starts = [line.index(cell) for line, cell in ((header, "AUC"), (ours, "0.875"))]
    assert starts[0] == starts[1]  # aligned


@pytest.mark.parametrize(
    ("kind", "panels"),
    [({}, 3), ({"truth": False}, 3), ({"divided": ()}, 1), ({"epochs": 1, "divided": ()}, 1)],
    ids=["truth known", "truth unknown", "cross-entropy", "one epoch"],
)
def test_draw_makes_the_figure_of_every_kind_of_run(tmp_path, kind, panels):
    """Else the run ends with a warning instead of its figure, for a kind of run that nobody had tried."""
    folder = make_run(tmp_path / "run", **kind)
    assert report.draw(folder) == [folder / "report.png"]
    width, height = png_size(folder / "report.png")
    assert width == pytest.approx(panels * 5.2 * 130, abs=3) and height > 400


def make_image_run(folder: Path, accuracy: list[dict]) -> Path:
    """A run folder as the scripts for large images leave it: no truth, no AUC, each net's own sample."""
    make_run(folder, truth=False)
    (folder / "labels.npz").unlink()
    common = {"loss_x": 1.0, "labeled_net1": 7, "unlabeled_net1": 5}
    lines = [json.dumps({"epoch": epoch} | common | record) + "\n" for epoch, record in enumerate(accuracy)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    shorter = {name: value[:9] if np.ndim(value) and len(value) == N else value for name, value in scores((1,)).items()}
    index = {"index_net1": np.arange(9) * 100, "index_net2": np.arange(N)}
    np.savez(folder / "scores" / "epoch_002.npz", **(scores((1, 2)) | shorter | index))
    return folder


def test_a_run_that_is_validated_only(tmp_path):
    """Clothing1M's epochs have no test accuracy. Else its run ends without a figure, and a table with it in ends in a
    stack trace, or calls an accuracy that chose the epoch a test."""
    epochs = [{"val_acc": 60.0 + e, "best_val_acc_net1": 59.0 + e, "best_val_acc_net2": 58.0 + e} for e in (0, 4, 2)]
    folder = make_image_run(tmp_path / "clothing1m", epochs)
    assert report.draw(folder) == [folder / "report.png"]
    run = report.read_run(folder)
    assert report.table([run]).splitlines()[1].split() == ["clothing1m", "3", *["-"] * 6]
    axes = Figure().subplots()
    report.draw_accuracy(axes, [run])
    assert axes.get_title() == "validation accuracy (both networks)"
    assert list(axes.get_lines()[0].get_ydata()) == [60, 64, 62]
    assert axes.get_lines()[0].get_label() == "clothing1m (validation, best 64.0, last 62.0)"
    (folder / "result.json").write_text(json.dumps({"test_acc": 74.76}))
    assert report.table([report.read_run(folder)]).splitlines()[1].split()[:4] == ["clothing1m", "3", "74.76", "-"]


def test_a_run_on_two_validation_sets(tmp_path):
    """Else WebVision's figure lacks ImageNet, half of what the paper reports of it."""
    epochs = [{"test_acc": 70.0 + e, "imagenet_acc": 65.0, "best_acc": 70.0 + e, "last10_acc": 70.0} for e in range(3)]
    folder = make_image_run(tmp_path / "webvision", epochs)
    assert report.draw(folder) == [folder / "report.png"]
    axes = Figure().subplots()
    report.draw_accuracy(axes, [report.read_run(folder)])
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert curves["webvision (best 72.0, last 72.0)"] == [70, 71, 72]
    assert curves["webvision, ImageNet"] == [65, 65, 65]
    assert report.table([report.read_run(folder)]).splitlines()[1].split() == [
        *("webvision", "3", "72.00", "72.00", "70.00", "-", "-", "-")
    ]


@pytest.mark.parametrize("net", [1, 2])
def test_a_run_with_one_division(tmp_path, net):
    """A net that finds nothing clean has no division yet. Else such a run ends without a figure, and the report of all
    runs beside it stops with a stack trace."""
    folder = make_run(tmp_path / "run", divided=(net,))
    report.draw(folder)
    assert png_size(folder / "report.png")
    run = report.read_run(folder)
    assert report.found_wrong(run) is None  # what both nets say is not known
    assert ("0.875/-" if net == 1 else "-/0.875") in report.table([run])


def test_histogram_is_coloured_by_truth_and_normalised(tmp_path):
    """Else clean and wrong are exchanged in the figure, or its bars and its curves have different units."""
    axes = Figure().subplots()
    run = report.read_run(make_run(tmp_path / "run"))
    report.draw_losses(axes, run, 1)
    handles, names = axes.get_legend_handles_labels()
    legend = dict(zip(names, handles, strict=True))
    areas = {}
    for bar in axes.patches:
        areas[bar.get_facecolor()] = areas.get(bar.get_facecolor(), 0) + bar.get_width() * bar.get_height()
    for name, share in (("label truly clean (8)", 8 / 12), ("label truly wrong (4)", 4 / 12)):
        assert areas[legend[name].get_facecolor()] == pytest.approx(share)
    assert {"fitted Gaussian, clean", "fitted Gaussian, noisy"} <= legend.keys()
    assert "AUC 0.875" in axes.get_title() and "12 training samples" in axes.get_title()


def test_threshold_line_is_where_the_posterior_is_the_threshold(tmp_path):
    """Else the figure shows the split at a loss where it is not."""
    axes = Figure().subplots()
    report.draw_losses(axes, report.read_run(make_run(tmp_path / "run")), 1)
    lines = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert len(lines) == 1 and lines[0].get_label() == "clean probability = 0.5"
    at = np.array([lines[0].get_xdata()[0]])
    clean, noisy = report.gaussians(at, np.array([0.1, 0.8]), np.array([0.001, 0.04]), np.array([0.6, 0.4]))[:, 0]
    assert clean / (clean + noisy) == pytest.approx(0.5, abs=0.05)


def test_histogram_without_truth_shows_no_colours_of_truth(tmp_path):
    """Else a run on doubtful labels claims to know which are wrong."""
    axes = Figure().subplots()
    report.draw_losses(axes, report.read_run(make_run(tmp_path / "run", truth=False)), 2)
    names = axes.get_legend_handles_labels()[1]
    assert "samples" in names and not any("truly" in name for name in names)
    assert "AUC" not in axes.get_title()


def test_several_runs_share_one_accuracy_panel(tmp_path, capsys, monkeypatch):
    """Else the demo's figure lacks the baseline it is to be compared with, or a curve carries another run's name."""
    folders = [make_run(tmp_path / "ce", divided=(), epochs=5), make_run(tmp_path / "ours")]
    axes = Figure().subplots()
    report.draw_accuracy(axes, [report.read_run(folder) for folder in folders])
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert list(curves["ce (best 54.0, last 54.0)"].get_ydata()) == [50, 51, 52, 53, 54]
    assert list(curves["ours (best 52.0, last 52.0)"].get_ydata()) == [50, 51, 52]
    assert curves["end of warm-up"].get_xdata()[0] == 0.5

    drawn = []
    monkeypatch.setattr(report, "draw_accuracy", lambda axes, runs: drawn.append([run.name for run in runs]))
    report.main([str(folder) for folder in folders])
    assert drawn == [["ours", "ce"], ["ce", "ours"]]  # each run's own figure has its curve last, on top
    shown = capsys.readouterr().out
    assert all(f"figure: {folder / 'report.png'}" in shown for folder in folders)
    assert all(png_size(folder / "report.png") for folder in folders)


@pytest.mark.parametrize("damage", ["missing", "empty", "no args", "broken json", "no epoch"])
def test_what_is_no_run_folder_is_named(tmp_path, damage, capsys, monkeypatch):
    """Else a mistyped path ends in a stack trace, or in a figure of nothing."""
    folder = tmp_path / "run"
    if damage == "empty":
        folder.mkdir()
    elif damage != "missing":
        make_run(folder)
    if damage == "no args":
        (folder / "args.json").write_text("{}")
    elif damage == "broken json":
        (folder / "metrics.jsonl").write_text('{"epoch": 0, "tes\n')
    elif damage == "no epoch":
        (folder / "metrics.jsonl").write_text("")
    expected = "no finished epoch" if damage == "no epoch" else "is not a run folder"
    with pytest.raises(DivideMixError, match=expected) as caught:
        report.read_run(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    with pytest.raises(SystemExit) as exit_:
        report.command_line(report.main)
    assert exit_.value.code == 1 and capsys.readouterr().err.startswith("error: ")


# ---- Damaged run folders ----


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("args.json", text) for text in (b"[]", b"null", b"[" * 10**5, b'{"args": 3}', b'{"args": {}}', b"\xff")],
        *[("metrics.jsonl", text) for text in (b"[]\n", b"3\n", b"{}\n", b'{"epoch": 0, "test_acc": "x"}\n', b"{\n")],
        *[("labels.npz", text) for text in (b"", b"PK\3\4junk", b"\x93NUMPY")],
        *[("scores/epoch_002.npz", text) for text in (b"", b"text")],
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    """One bad folder among twenty ends the table of all in a stack trace that does not say which."""
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(DivideMixError, match=str(folder / name) if name.endswith("npz") else str(folder)) as error:
        report.read_run(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"3", b"[" * 10**5, b"{"])
def test_a_damaged_result_is_as_none(tmp_path, content):
    """The epochs are all there."""
    folder = make_run(tmp_path / "run")
    (folder / "result.json").write_bytes(content)
    assert report.read_run(folder).result == {} and len(report.read_run(folder).records) == 3


def test_half_a_line_is_left_out(tmp_path):
    """Killed while it wrote a line, or watched while it does: a run has no report until it is started again."""
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "test_')
    assert [record["epoch"] for record in report.read_run(folder).records] == [0, 1, 2]


def test_the_figure_is_written_over_no_other_file(tmp_path):
    """A link in a run folder from somebody else: its user's own file is overwritten."""
    folder = make_run(tmp_path / "run")
    (tmp_path / "thesis").write_text("precious")
    (folder / "report.png").symlink_to(tmp_path / "thesis")
    [file] = report.draw(folder)
    assert (tmp_path / "thesis").read_text() == "precious" and file.read_bytes()[:4] == b"\x89PNG"
