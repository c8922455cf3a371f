"""The expected time of a run."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import begin, opened

from dividemix.engine import MixMatch
from dividemix.run import progress
from dividemix.runtime import Batches


@pytest.mark.parametrize(
    ("warm_up", "num_epochs", "unlabeled_loss", "expected"),
    [
        (2, 4, True, "18 minutes"),  # 2 networks, 20 steps of 2 s: 80 s an epoch of warm-up, 5.58 times that after it
        (2, 4, False, "14 minutes"),  # 4.08 times
        (math.inf, 100, True, "2.2 hours"),
    ],
)
def test_the_expected_time_is_said_once_at_the_start(
    tmp_path, monkeypatch, capsys, warm_up, num_epochs, unlabeled_loss, expected
):
    """Who waits does not know whether for minutes or for days. The first steps, which compile, would mislead."""
    seconds = itertools.chain([0, 50], itertools.count(100, 2))
    run_ = opened(tmp_path / "run")
    begin(run_)
    run_.mixmatch = MixMatch(2, warm_up=warm_up, unlabeled_loss=unlabeled_loss)
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    lines = []
    for epoch in run_.epochs(num_epochs):
        with run_.phase("warmup", 0) as phase:
            batches = []
            for batch in phase.bar(Batches([(4,)] * 20, range(20))):
                batches.append(batch)
                clock[0] = next(seconds)
        assert batches == [*range(20)]  # none is lost or comes twice
        lines += [line for line in capsys.readouterr().out.splitlines() if "expected time" in line]
        if epoch == 1:
            break
    [line] = lines
    assert f"about {expected} for {num_epochs} epochs" in line


@pytest.mark.parametrize(("number", "told"), [(0, []), (4, []), (5, [5]), (6, [6])])
def test_too_few_steps_to_time_are_passed_on_and_nothing_is_said(number, told):
    """The first steps are slow: a time by them would be wrong by far."""
    sizes = []
    batches = Batches([(4,)] * number, range(number))
    passed = [*progress.timed(iter, torch.device("cpu"), lambda _, size: sizes.append(size), batches)]
    assert passed == [*range(number)] and sizes == told
