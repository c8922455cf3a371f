"""The benchmark of several runs at once: on a network so small that its times mean nothing."""

import json

import pytest

from benchmarks import bench_jobs


@pytest.mark.slow
def test_every_field_of_the_report(tmp_path, capsys):
    """`make gpu` would end in an error on the one machine that has a card."""
    flags = "--samples 60 --labeled 30 --test_samples 20 --width 4 --batch_size 16 --repeats 2 --warmups 0 --jobs 1 2"
    report = bench_jobs.main([*flags.split(), "--device", "cpu", "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert [level["jobs"] for level in report["jobs"]] == [1, 2] and report["device"].startswith("cpu")
    for level in report["jobs"]:
        assert level["epoch_seconds"] > 0 and level["memory"] is None
        assert level["epochs_an_hour"] == pytest.approx(3600 * level["jobs"] / level["epoch_seconds"])
    assert "epochs an hour" in capsys.readouterr().out
