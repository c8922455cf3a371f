"""The benchmark of saving: on a network so small that its times mean nothing."""

import hashlib
import json
from pathlib import Path

import pytest

from benchmarks import bench_checkpoint


def test_every_field_of_the_report(tmp_path):
    """RESULTS.md is made from the file; the bytes must be those of a real checkpoint, momentum included."""
    flags = ["--width", "4", "--samples", "50", "--repeats", "2", "--epoch_seconds", "0.1", "--device", "cpu"]
    report = bench_checkpoint.main([*flags, "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert min(report["part_seconds"].values()) > 0
    assert report["save_seconds"] < sum(report["part_seconds"].values())
    assert report["share_of_epoch"] == report["waited_seconds"] / 0.1
    assert 1.5 < report["bytes"]["checkpoint"] / report["bytes"]["best"] < 2.5
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="needs Linux")
def test_a_thread_that_holds_the_gil_is_told_from_one_that_does_not():
    """Else the benchmark says that saving is free while the loss pass beside it stands still."""
    text, data = "x" * 20_000_000, bytes(200_000_000)
    holding = bench_checkpoint.kept_waiting(lambda: [text.upper() for _ in range(5)], 3)
    free = bench_checkpoint.kept_waiting(lambda: hashlib.sha256(data).hexdigest(), 3)
    assert holding > 0.05 and free < holding / 2
