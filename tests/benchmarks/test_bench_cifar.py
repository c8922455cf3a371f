"""The benchmark's counts and comparisons: on sizes so small that its times mean nothing."""

import json

import numpy as np
import pytest
import torch

from benchmarks import bench_cifar

PHASES = ["loss", "gmm", "train1", "train2", "test"]


def labeled_sizes(divisions) -> list[int]:
    return [int(division.labeled.sum()) for division in divisions]


def test_operations_are_those_of_the_design():
    """The floor and the share of the peak stand and fall with the count: 1,132 TFLOP an epoch of CIFAR-10, half of it
    labeled, 355 a warm-up epoch."""
    images, test = np.empty(50000), np.empty(10000)
    divided, warmup = bench_cifar.Work(images, images, 25000, test, test).operations(width=64)
    assert divided == pytest.approx(1132e12, rel=2e-3)
    assert warmup == pytest.approx(355e12, rel=2e-3)
    assert divided / bench_cifar.FLOOR_RATE == pytest.approx(1.43, abs=0.005)


def test_work_is_random_and_its_divisions_change_within_two_per_cent():
    """Zeros run faster than images; divisions of one size hide what a new size costs; drawn anew in each run, they make
    two runs different work."""
    work = bench_cifar.Work.random(5000, 2500, 20)
    sizes = [labeled_sizes(work.divisions(epoch)) for epoch in range(10)]
    assert sizes == [labeled_sizes(work.divisions(epoch)) for epoch in range(10)]
    both = [size for pair in sizes for size in pair]
    assert 2450 <= min(both) < 2475 and 2525 < max(both) <= 2550
    assert len({size % 64 for size in both}) > 8  # of the last batch, both nets'
    first, second = work.divisions(3)
    assert not np.array_equal(first.labeled, second.labeled)
    assert np.array_equal(first.clean_probability > first.threshold, first.labeled)
    assert [len(work.images), len(work.labels), len(work.test_images)] == [5000, 5000, 20]
    assert work.images.std() > 70 and len(np.unique(work.labels)) == 10


def test_all_that_is_compared_has_the_same_divisions(monkeypatch):
    """A ratio of two epochs of different work says nothing; and a slow epoch that the mean hides is lost."""
    timed = {}

    def run(self, divisions):
        if divisions:
            timed.setdefault(id(self), []).append(labeled_sizes(divisions))
        seconds = dict.fromkeys(PHASES if divisions else ["warmup1", "warmup2", "test"], 1.0)
        return seconds | {"epoch": 9.0 if len(timed.get(id(self), [])) == 4 else 5.0}

    monkeypatch.setattr(bench_cifar, "check", lambda *_: "sound")
    monkeypatch.setattr(bench_cifar, "measured_peak", lambda _: 1e12)
    monkeypatch.setattr(bench_cifar.FastEpoch, "run", run)
    monkeypatch.setattr(bench_cifar.PlainEpoch, "run", run)
    flags = "--samples 800 --labeled 400 --test_samples 8 --width 4 --batch_size 8 --device cpu --warmups 1 --repeats 4"
    report = bench_cifar.main([*flags.split(), "--against_plain", "--ablate"])
    assert len(timed) == 2 + len(report["ablation_epoch_seconds"])
    assert all(sizes == report["labeled_sizes"] for sizes in timed.values())
    assert len(report["labeled_sizes"]) == 5 and len({size for size, _ in report["labeled_sizes"]}) > 1
    assert (report["epoch_seconds"], report["mean_epoch_seconds"]) == (5.0, 6.0)
    assert (report["plain_epoch_seconds"], report["mean_plain_epoch_seconds"]) == (5.0, 6.0)
    assert set(report["mean_ablation_epoch_seconds"].values()) == {6.0}
    assert bench_cifar.parse_args([]).repeats >= 8


def test_every_field_of_the_report(tmp_path, capsys):
    """Scripts read epoch_seconds, plain_epoch_seconds and ratio from the file; people read the table."""
    file = tmp_path / "bench.json"
    flags = "--samples 40 --labeled 16 --test_samples 10 --width 4 --batch_size 8 --repeats 2 --warmups 0 --device cpu"
    report = bench_cifar.main([*flags.split(), "--against_plain", "--plain_workers", "0", "--json", str(file)])
    assert json.loads(file.read_text()) == report
    assert report["ratio"] == pytest.approx(report["plain_epoch_seconds"] / report["epoch_seconds"])
    assert len(report["all_epoch_seconds"]) == 2
    phases = report["phase_seconds"]
    assert set(phases) == {*PHASES, "warmup1", "warmup2"} and min(phases.values()) > 0
    assert set(report["mean_phase_seconds"]) == set(phases) and report["labeled_sizes"] == [[16, 16]] * 2
    assert report["mean_epoch_seconds"] == pytest.approx(sum(report["all_epoch_seconds"]) / 2)
    assert set(report["plain_phase_seconds"]) == set(PHASES)
    assert 0 < report["share_of_peak"] < 1 and report["ratio_to_floor"] > 1
    printed = capsys.readouterr().out
    assert "cosine of the updates 1.0000" in printed and "epoch (divided)" in printed


def test_what_is_stopped_leaves_what_it_measured(tmp_path, monkeypatch):
    """On a card that is lent for minutes, a benchmark that writes at its end alone leaves nothing."""
    file, run, calls = tmp_path / "bench.json", bench_cifar.FastEpoch.run, []

    def stopped(self, divisions):
        calls.append(divisions)
        if len(calls) == 7:  # after three warm-up epochs
            raise KeyboardInterrupt
        return run(self, divisions)

    monkeypatch.setattr(bench_cifar.FastEpoch, "run", stopped)
    flags = "--samples 40 --labeled 16 --test_samples 10 --width 4 --batch_size 8 --repeats 2 --warmups 1 --device cpu"
    with pytest.raises(KeyboardInterrupt):
        bench_cifar.main([*flags.split(), "--ablate", "evaluation", "--json", str(file)])
    report = json.loads(file.read_text())
    assert len(report["all_epoch_seconds"]) == 1 and report["epoch_seconds"] == report["all_epoch_seconds"][0]
    assert list(report["ablation_epoch_seconds"]) == ["evaluation batch 64 (1000 instead)"]


@pytest.mark.slow
def test_a_real_run_is_timed_beside_bare_epochs_of_the_same_sizes(tmp_path, capfd):
    """A benchmark of phases alone hid 2 s an epoch that runs took; a ratio of unequal work would show others."""
    flags = (
        "--samples 400 --labeled 200 --test_samples 20 --width 8 --batch_size 16 --repeats 1 --warmups 0 --device cpu"
    )
    report = bench_cifar.main([*flags.split(), "--end_to_end", "2", "--json", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    result = report["end_to_end"]
    assert len(result["epoch_seconds"]) == len(result["bare_epoch_seconds"]) == len(result["labeled_sizes"]) == 2
    assert result["mean_epoch_seconds"] == pytest.approx(sum(result["epoch_seconds"]) / 2)
    assert result["ratio_to_bare"] == pytest.approx(result["mean_epoch_seconds"] / result["bare_mean_epoch_seconds"])
    assert 0 < sum(result["mean_phase_seconds"].values()) < 1.1 * result["mean_epoch_seconds"]
    assert all(0 < size < 400 for pair in result["labeled_sizes"] for size in pair)
    assert "epoch 3/3" in capfd.readouterr().out


def test_words_choose_what_is_ablated(capsys):
    """One speed-up against the rest, within the minutes of a lent card; a word that fits none must not time nothing."""
    assert bench_cifar.parse_args([]).ablate is None and bench_cifar.parse_args(["--ablate"]).ablate == []
    flags = "--samples 40 --labeled 16 --test_samples 10 --width 4 --batch_size 8 --device cpu --ablate gues"
    with pytest.raises(SystemExit, match="gues"):
        bench_cifar.main(flags.split())


def test_a_wrong_engine_fails_the_check(monkeypatch):
    """A fast engine that computes something else must not be timed."""
    prepare, prepared = bench_cifar.Runtime.prepare, []

    def spoilt(self, net):
        prepared.append(net)
        if len(prepared) > 2:  # the first two are the reference's
            net.linear.weight.data.mul_(-1)
        return prepare(self, net)

    monkeypatch.setattr(bench_cifar.Runtime, "prepare", spoilt)
    with pytest.raises(SystemExit, match="check failed"):
        bench_cifar.check(bench_cifar.Runtime(torch.device("cpu")), 4, 8)


def test_each_optimisation_of_a_card_is_ablated():
    """A speed-up that cannot be switched off alone cannot be shown to be one."""
    card = bench_cifar.Runtime(torch.device("cuda"), "bf16", torch.channels_last, merge=True, compile=True, graph=True)
    changed = bench_cifar.variants(card)
    assert changed["bf16 (fp32 instead)"].precision == "fp32"
    assert changed["channels_last outside compiled code"].memory_format == torch.contiguous_format
    assert not changed["CUDA graphs"].graph and changed["CUDA graphs"].compile
    assert not changed["torch.compile"].compile and changed["torch.compile"].graph
    assert not changed["merged forwards"].merge
    assert changed["overlapped GMM"].background is bench_cifar.at_once
    assert changed["evaluation batch 1000 (128 instead)"].eval_batch_size == 128
    assert len({id(runtime.steps) for runtime in changed.values()} | {id(card.steps)}) == 1 + len(changed)
