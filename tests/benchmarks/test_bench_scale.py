"""The benchmark of the bookkeeping: on sizes so small that its times mean nothing."""

import json
import sys

import pytest
from helpers.scripts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_scale

PARTS = [
    "read one list with labels",
    "pack it (ImageList)",
    "Clothing1M: keys and labels joined",
    "balanced sample of 32,000",
    "balanced sample of a quarter",
    "that quarter as a list",
    "co-divide, one net",
    "AUC",
    "co-divide fitted to all",
    "plan of batches of 8",
]


def test_every_part_at_two_sizes(tmp_path, capsys):
    """A part that is not measured can become slow unnoticed; people read the table, scripts the file."""
    file = tmp_path / "scale.json"
    report = bench_scale.main(
        ["--sizes", "400", "3000", "--fit_limit", "1000", "--batch_size", "8", "--json", str(file)]
    )
    assert json.loads(file.read_text()) == report
    small, large = report["sizes"]
    assert list(large["seconds"]) == list(large["peak_mb"]) == PARTS and min(large["seconds"].values()) > 0
    assert [part for part in PARTS if part not in small["seconds"]] == ["co-divide fitted to all"]
    assert large["subsample_or_all"]["change_sides"] < 30 and large["subsample_or_all"]["max_dp"] > 0
    assert "subsample_or_all" not in small
    printed = capsys.readouterr().out
    assert all(part in printed for part in PARTS) and "3,000, two subsamples: " in printed
    assert "one run of each" in printed


def test_a_list_holds_no_object_per_image():
    """The figure of the report would be that of the machine's noise: a list of 20,000 images, and a few objects."""
    parts = bench_scale.Parts()
    figures = bench_scale.lists(parts, 20_000)
    assert figures["list_objects"] < 200
    assert figures["list_bytes_per_sample"] == pytest.approx(figures["path_bytes"] + 16, abs=0.01)


def test_losses_are_like_real_ones():
    """Losses that no mixture could mistake, or that it could not divide at all, would hide what a subsample changes."""
    losses, clean = bench_scale.random_losses(20_000)
    division = bench_scale.codivide.codivide(losses, 0.5, truly_clean=clean)
    assert 0.55 < division.labeled.mean() < 0.65 and 0.98 < division.auc < 1
    assert 0.01 < ((division.clean_probability > 0.01) & (division.clean_probability < 0.99)).mean() < 0.5


@pytest.mark.parametrize("flags", [["--sizes", "10"], ["--fit_limit", "1"], ["--batch_size", "0"]])
def test_sizes_without_work_are_refused(flags):
    """Else it ends in a traceback in another process."""
    with pytest.raises(SystemExit):
        bench_scale.parse_args(flags)
