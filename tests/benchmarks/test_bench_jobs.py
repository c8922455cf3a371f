"""The benchmark of several runs at once: on a network so small that its times mean nothing."""

import json
import sys

import pytest
from helpers.scripts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_jobs

TINY = ["--samples", "60", "--labeled", "30", "--test_samples", "20", "--width", "4", "--batch_size", "16"]


@pytest.mark.slow
def test_every_field_of_the_report(tmp_path, capsys):
    """`make gpu` would end in an error on the one machine that has a card."""
    flags = [*TINY, "--repeats", "2", "--warmups", "0", "--jobs", "1", "2", "--device", "cpu"]
    report = bench_jobs.main([*flags, "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert [each["jobs"] for each in report["jobs"]] == [1, 2] and report["device"].startswith("cpu")
    for each in report["jobs"]:
        assert each["epoch_seconds"] > 0 and each["memory"] is None
        assert each["epochs_an_hour"] == pytest.approx(3600 * each["jobs"] / each["epoch_seconds"])
    assert "epochs an hour" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--jobs", "0"), ("--labeled", "60"), ("--repeats", "0")])
def test_sizes_without_work_are_refused(flags):
    """Else it ends in a stack trace, or waits for processes that do not come."""
    with pytest.raises(SystemExit):
        bench_jobs.parse_args([*TINY, *flags])
