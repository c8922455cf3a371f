"""The benchmark of the bookkeeping: on sizes so small that its times mean nothing."""

import json
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest

from benchmarks import bench_scale

PARTS = ["read one list with labels", "pack it (ImageList)", "Clothing1M: keys and labels joined"]
PARTS += ["balanced sample of 32,000", "balanced sample of a quarter", "that quarter as a list", "co-divide, one net"]
PARTS += ["AUC", "co-divide fitted to all", "plan of batches of 8"]


def test_every_part_at_two_sizes(tmp_path, capsys, monkeypatch):
    """A part that is not measured can become slow unnoticed; people read the table, scripts the file."""
    monkeypatch.setattr(bench_scale.codivide, "FIT_LIMIT", bench_scale.codivide.FIT_LIMIT)  # restored at the end
    context = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))  # starts faster
    monkeypatch.setattr(bench_scale, "multiprocessing", context)
    flags = "--sizes 400 3000 --fit_limit 1000 --batch_size 8 --json"
    report = bench_scale.main([*flags.split(), str(tmp_path / "scale.json")])
    assert json.loads((tmp_path / "scale.json").read_text()) == report
    few, many = report["sizes"]
    assert list(many["seconds"]) == list(many["peak_mb"]) == PARTS and min(many["seconds"].values()) > 0
    assert [part for part in PARTS if part not in few["seconds"]] == ["co-divide fitted to all"]
    assert many["subsample_or_all"]["change_sides"] < 30 and many["subsample_or_all"]["max_dp"] > 0
    assert "subsample_or_all" not in few
    printed = capsys.readouterr().out
    assert all(part in printed for part in PARTS) and "3,000, two subsamples: " in printed


def test_a_list_holds_no_object_per_image():
    """The figure of the report would be that of the machine's noise: a list of 20,000 images, and a few objects."""
    figures = bench_scale.lists(bench_scale.Meter(), 20_000)
    assert figures["list_objects"] < 200
    assert figures["list_bytes_per_sample"] == pytest.approx(figures["path_bytes"] + 16, abs=0.01)
