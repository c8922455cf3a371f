"""The benchmark's counts and comparisons: on sizes so small that its times mean nothing."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers.scripts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import accuracy_pairs
import bench_cifar

TINY = "--samples 40 --labeled 16 --test_samples 10 --width 4 --batch_size 8 --repeats 2 --warmups 0 --device cpu"


def test_operations_are_those_of_the_design():
    """The floor and the share of the peak stand and fall with the count: 1,132 TFLOP an epoch of CIFAR-10, half of it
    labeled, 355 a warm-up epoch."""
    images, test = np.empty(50000), np.empty(10000)
    work = bench_cifar.Work(images, images, 25000, test, test)
    divided, warmup = work.operations(width=64)
    assert divided == pytest.approx(1132e12, rel=2e-3)
    assert warmup == pytest.approx(355e12, rel=2e-3)
    assert divided / bench_cifar.FLOOR_RATE == pytest.approx(1.43, abs=0.005)


def labeled_sizes(divisions) -> list[int]:
    return [int(division.labeled.sum()) for division in divisions]


def test_divisions_change_from_epoch_to_epoch_within_two_per_cent():
    """Divisions of one size hide what a new size costs; drawn anew in each run, they make two runs different work."""
    work = bench_cifar.Work.random(5000, 2500, 1)
    sizes = [labeled_sizes(work.divisions(epoch)) for epoch in range(10)]
    assert sizes == [labeled_sizes(work.divisions(epoch)) for epoch in range(10)]
    each = [size for pair in sizes for size in pair]
    assert 2450 <= min(each) < 2475 and 2525 < max(each) <= 2550
    assert len({size % 64 for size in each}) > 8  # of the last batch, both nets'
    one, other = work.divisions(3)
    assert not np.array_equal(one.labeled, other.labeled)
    assert np.array_equal(one.clean_probability > one.threshold, one.labeled)


def test_all_that_is_compared_has_the_same_divisions(monkeypatch):
    """A ratio of two epochs of different work says nothing; and a slow epoch that the mean hides is lost."""
    seen = {}

    def run(self, divisions):
        if divisions:
            seen.setdefault(id(self), []).append(labeled_sizes(divisions))
        names = ["loss", "gmm", "train1", "train2", "test"] if divisions else ["warmup1", "warmup2", "test"]
        seconds = dict.fromkeys(names, 1.0)
        return seconds | {"epoch": 9.0 if len(seen.get(id(self), [])) == 4 else 5.0}

    monkeypatch.setattr(bench_cifar.FastEpoch, "run", run)
    monkeypatch.setattr(bench_cifar.PlainEpoch, "run", run)
    flags = "--samples 800 --labeled 400 --test_samples 8 --width 4 --batch_size 8 --device cpu --warmups 1 --repeats 4"
    report = bench_cifar.main([*flags.split(), "--against_plain", "--ablate"])
    assert len(seen) == 2 + len(report["ablation_epoch_seconds"])
    assert all(sizes == report["labeled_sizes"] for sizes in seen.values())
    assert len(report["labeled_sizes"]) == 5 and len({one for one, _ in report["labeled_sizes"]}) > 1
    assert (report["epoch_seconds"], report["mean_epoch_seconds"]) == (5.0, 6.0)
    assert (report["plain_epoch_seconds"], report["mean_plain_epoch_seconds"]) == (5.0, 6.0)
    assert set(report["mean_ablation_epoch_seconds"].values()) == {6.0}
    assert bench_cifar.parse_args([]).repeats >= 8


def test_the_work_is_random_and_the_division_as_asked():
    """Zeros run faster than images do, and another number of labeled images is another amount of work."""
    work = bench_cifar.Work.random(100, 37, 20)
    sizes = [len(work.images), len(work.labels), *labeled_sizes(work.divisions(0)), len(work.test_images)]
    assert sizes == [100, 100, 37, 37, 20]
    assert work.images.std() > 70 and len(np.unique(work.labels)) == 10


def test_every_field_of_the_report(tmp_path, capsys):
    """Scripts read epoch_seconds, plain_epoch_seconds and ratio from the file; people read the table."""
    file = tmp_path / "bench.json"
    report = bench_cifar.main(
        [*TINY.split(), "--against_plain", "--plain_workers", "0", "--ablate", "--json", str(file)]
    )
    assert json.loads(file.read_text()) == report
    assert report["ratio"] == pytest.approx(report["plain_epoch_seconds"] / report["epoch_seconds"])
    assert len(report["all_epoch_seconds"]) == 2
    phases = report["phase_seconds"]
    assert set(phases) == {"loss", "gmm", "train1", "train2", "test", "warmup1", "warmup2"}
    assert min(phases.values()) > 0
    assert set(report["mean_phase_seconds"]) == set(phases) and report["labeled_sizes"] == [[16, 16]] * 2
    assert report["mean_epoch_seconds"] == pytest.approx(sum(report["all_epoch_seconds"]) / 2)
    assert set(report["plain_phase_seconds"]) == {"loss", "gmm", "train1", "train2", "test"}
    assert 0 < report["share_of_peak"] < 1 and report["ratio_to_floor"] > 1
    assert "evaluation in large batches (128)" in report["ablation_epoch_seconds"]
    printed = capsys.readouterr().out
    assert "four steps against the fp32 eager reference" in printed and "epoch (divided)" in printed


def test_a_wrong_engine_fails_the_check(monkeypatch):
    """A fast engine that computes something else must not be timed."""
    machine = bench_cifar.Runtime(torch.device("cpu"))
    assert "cosine of the updates 1.0000" in bench_cifar.check(machine, 4, 8)
    prepare, prepared = bench_cifar.Runtime.prepare, []

    def spoilt(self, net):
        prepared.append(net)
        if len(prepared) > 2:  # the first two are the reference's
            net.linear.weight.data.mul_(-1)
        return prepare(self, net)

    monkeypatch.setattr(bench_cifar.Runtime, "prepare", spoilt)
    with pytest.raises(SystemExit, match="check failed"):
        bench_cifar.check(machine, 4, 8)


def test_each_optimisation_of_a_card_is_ablated():
    """A speed-up that cannot be switched off alone cannot be shown to be one."""
    card = bench_cifar.Runtime(torch.device("cuda"), "bf16", torch.channels_last, merge=True, compile=True, graph=True)
    off = bench_cifar.variants(card, 1000)
    changed = {name: machine for name, (machine, _) in off.items()}
    assert changed["bf16 (fp32 instead)"].precision == "fp32"
    assert changed["channels_last outside compiled code"].memory_format == torch.contiguous_format
    assert not changed["CUDA graphs"].graph and changed["CUDA graphs"].compile
    assert not changed["torch.compile"].compile and changed["torch.compile"].graph
    assert not changed["merged forwards"].merge
    assert changed["overlapped GMM"].background is bench_cifar.runtime.at_once
    assert off["evaluation in large batches (128)"][1] == 128
    assert len({id(machine.steps) for machine in changed.values()} | {id(card.steps)}) == 1 + len(off)


@pytest.mark.parametrize(
    "sizes",
    [("--labeled", "40"), ("--labeled", "0"), ("--repeats", "0"), ("--test_samples", "0"), ("--batch_size", "0")],
)
def test_sizes_without_work_are_refused(sizes):
    """Else it ends in a division by zero after minutes."""
    with pytest.raises(SystemExit):
        bench_cifar.parse_args([*TINY.split(), *sizes])


def test_mean_difference_and_its_standard_error():
    """By hand: differences 1, 3, 2 have mean 2 and standard error 1 / sqrt(3)."""
    pairs = [
        {"fast": {"best_acc": 50 + d, "last10_acc": 40.0}, "reference": {"best_acc": 50.0, "last10_acc": 40 + e}}
        for d, e in zip((1, 3, 2), (-1, 1, 0), strict=True)
    ]
    best, last = accuracy_pairs.summary(pairs).splitlines()
    assert "difference +2.00 +- 0.58" in best and "n = 3" in best and "MORE THAN TWO STANDARD ERRORS" in best
    assert "difference +0.00 +- 0.58" in last and "MORE THAN" not in last
    assert "MORE THAN" not in accuracy_pairs.summary(pairs[:1])


def test_pairs_of_any_two_ways(tmp_path, monkeypatch):
    """Else a comparison runs the first way twice, under other noise in each, or prints the difference turned round."""
    runs = []

    def run(folder, flags):
        runs.append((folder.name, flags))
        return {"best_acc": 60.0 if "blind" in flags else 58.5, "last10_acc": 50.0}

    monkeypatch.setattr(accuracy_pairs, "run", run)
    lines = []
    monkeypatch.setattr(accuracy_pairs, "print", lambda text, **_: lines.append(text), raising=False)
    flags = ["--seeds", "2", "--ways", "blind=--recipe blind", "paper=", "--out_dir", str(tmp_path)]
    accuracy_pairs.main([*flags, "--", "--r", "0.2"])
    assert [name for name, _ in runs] == ["blind_seed1", "paper_seed1", "blind_seed2", "paper_seed2"]
    common = ["--r", "0.2", "--noise_seed", "123", "--seed", "2"]
    assert runs[2][1] == [*common, "--recipe", "blind"] and runs[3][1] == common
    assert "blind 60.00, paper 58.50; difference +1.50" in lines[-1]
    with pytest.raises(SystemExit):
        accuracy_pairs.parse_args(["--ways", "blind", "paper="])
