"""What the benchmarks report: on sizes so small that their times mean nothing."""

import json
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest

from benchmarks import bench_checkpoint, bench_images, bench_jobs, bench_scale

IMAGES = "--images 12 --workers 1 --batch_size 4 --resize 40 --image_size 32 --sides 40 60 --width 4 --repeats 2"
JOBS = "--samples 60 --labeled 30 --test_samples 20 --width 4 --batch_size 16 --repeats 2 --warmups 0 --jobs 1 2"


@pytest.mark.parametrize(
    ("module", "flags", "keys"),
    [
        (bench_checkpoint, "--device cpu --width 4 --samples 50 --repeats 2 --epoch_seconds 0.1", {"bytes"}),
        (bench_images, f"--device cpu {IMAGES} --arch none", {"ratio", "images_per_second"}),
        pytest.param(bench_images, f"--device cpu {IMAGES} --arch small", {"ratio"}, marks=pytest.mark.slow),
        pytest.param(bench_jobs, f"--device cpu {JOBS}", {"jobs"}, marks=pytest.mark.slow),
        (bench_scale, "--sizes 400 3000 --fit_limit 1000 --batch_size 8", {"sizes"}),
    ],
)
def test_what_is_reported_is_written(tmp_path, monkeypatch, module, flags, keys):
    """RESULTS.md is made from the file; and `make gpu` would end in an error on the one machine that has a card."""
    monkeypatch.setattr(bench_scale.codivide, "FIT_LIMIT", bench_scale.codivide.FIT_LIMIT)  # restored at the end
    context = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))  # starts faster
    monkeypatch.setattr(bench_scale, "multiprocessing", context)
    monkeypatch.chdir(tmp_path)
    report = module.main([*flags.split(), "--json", "out.json"])
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(report)) and keys <= report.keys()
    assert all(seconds > 0 for seconds in report.get("part_seconds", {}).values())


def test_the_bytes_are_those_of_a_real_checkpoint(tmp_path):
    """With momentum, and the file of the best epoch without."""
    flags = ["--width", "4", "--samples", "50", "--repeats", "1", "--device", "cpu", "--folder", str(tmp_path)]
    sizes = bench_checkpoint.main([*flags, "--json", str(tmp_path / "out.json")])["bytes"]
    assert 1.5 < sizes["checkpoint"] / sizes["best"] < 2.5
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
