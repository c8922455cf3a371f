"""The comparison of label lists measures what its columns say."""

import json

import numpy as np
import pytest
from helpers.data import make_cifar10

from benchmarks import bench_issues


@pytest.fixture
def flags(tmp_path):
    """200 images whose features tell the classes apart, and their truth: no network is needed."""
    folder = make_cifar10(tmp_path, n_train=200, n_test=50)
    data = bench_issues.load("cifar10", str(folder))
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((10, 20))
    arrays = {"index": np.arange(200), "test_index": np.arange(50)}
    arrays["features"] = (centres[data.train_labels] + rng.standard_normal((4, 200, 20))).astype(np.float16)
    arrays["test"] = (centres[data.test_labels] + rng.standard_normal((50, 20))).astype(np.float16)
    np.savez(tmp_path / "cifar10_200_50.npz", **arrays)
    sizes = ["--images", "200", "--test_images", "50", "--seeds", "1"]
    return ["--cifar10", str(folder), "--cache", str(tmp_path), "--out", str(tmp_path / "out.jsonl"), *sizes]


def test_every_method_beats_chance_where_it_is_easy(flags, tmp_path, capsys):
    """Else a method is compared with its labels or classes in another order; or what was measured is measured again."""
    bench_issues.main([*flags, "--settings", "sym 30"])
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 8
    for record in records:
        assert record["wrong"] == 60 and record["AP"] > 0.8 and record["accuracy"] > 0.8, record
    before = (tmp_path / "out.jsonl").read_text()
    bench_issues.main([*flags, "--settings", "sym 30"])
    assert (tmp_path / "out.jsonl").read_text() == before
    assert "DivideMix" in capsys.readouterr().out


@pytest.mark.slow
def test_from_scratch_every_method_trains_the_same_network(tmp_path, monkeypatch):
    """Else Train_folder.py gets other images, labels or settings than the methods that it is compared with."""
    monkeypatch.setattr("dividemix.run.defaults.SHORT_STEPS", 0)
    monkeypatch.setattr("dividemix.run.defaults.MOST_WARM_UP", 6)
    monkeypatch.setattr("dividemix.run.defaults.FEWEST_EPOCHS", 1)
    sizes = ["--images", "100", "--test_images", "50", "--seeds", "1", "--cache", str(tmp_path)]
    bench_issues.main(["--digits", "--settings", "scratch digits", *sizes, "--out", str(tmp_path / "out.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["function"] for record in records].count("dividemix") == 1 and len(records) == 5
    assert {record["wrong"] for record in records} == {50}
    assert all(0 <= record["accuracy"] <= 1 for record in records)
