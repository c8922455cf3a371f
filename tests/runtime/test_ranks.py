"""Rows dealt out to ranks: every rank the same number, together the global batch; and what they share."""

import numpy as np
import pytest
import torch
from helpers.nets import half
from helpers.torchrun_driver import DealtImages
from hypothesis import given, settings
from hypothesis import strategies as st

from dividemix.algorithm import prior_penalty
from dividemix.runtime import ranks
from dividemix.runtime.device import Runtime
from dividemix.runtime.ranks import Ranks

worlds = st.integers(1, 5)


@given(st.integers(0, 40), worlds)
def test_a_batch_is_filled_with_its_own_rows_and_dealt_out_evenly(n, world):
    """A rank with fewer rows takes part in fewer steps, and the others wait for it for ever; a row of another batch
    would be trained on twice as often as the rest."""
    rows = np.arange(n) + 100
    filled = Ranks(world=world).pad_to_world(rows)
    shares = [Ranks(r, world).shard_rows(filled) for r in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(np.concatenate(shares)) == sorted(filled)
    assert filled[:n].tolist() == rows.tolist()
    assert filled[n:].tolist() == rows[: len(filled) - n].tolist() if n >= world else set(filled) == set(rows)
    assert len(filled) - n < world


@given(st.integers(0, 40), worlds)
def test_evaluation_batches_are_dealt_out_once_each(n, world):
    """A batch that no rank takes leaves losses of 0, which would be divided as clean."""
    assert sorted(k for r in range(world) for k in Ranks(r, world).shard_batches(n)) == list(range(n))


def images(world, rank, n=23):
    """n images of one grey value each."""
    pixels = np.broadcast_to(np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None], (n, 16, 16, 3)).copy()
    runtime = Runtime(torch.device("cpu"), ranks=Ranks(rank, world))
    return DealtImages(pixels, np.arange(n), (0.0,) * 3, (1 / 255,) * 3, True, runtime)


@given(worlds, st.integers(1, 4), st.integers(1, 22), st.integers(0, 99))
@settings(max_examples=30)
def test_the_ranks_views_together_are_one_process_es(world, each, labeled, seed):
    """Other draws on one rank, or rows out of step with their weights: every rank would train on something else than
    the one batch that all are meant to share."""
    division = half(23, labeled)
    division.clean_probability[:] = np.linspace(0.1, 0.9, 23)
    batch_size = world * each

    def views(rank, world, full_only):
        data = images(world, rank)
        batches = data.mixmatch_batches(division, batch_size, np.random.default_rng(seed))
        full = [all(n == batch_size // world for n in sizes) for sizes in batches.sizes]
        assert [(len(x), len(u)) for x, u, *_ in batches] == batches.sizes
        return [data.mixmatch_views(*b) for b, keep in zip(batches, full, strict=True) if keep], batches.sizes

    whole, sizes = views(0, 1, True)
    parts = [views(r, world, True) for r in range(world)]
    assert all(part_sizes == parts[0][1] for _, part_sizes in parts)
    assert all(min(size) >= 1 for size in parts[0][1])
    if len(sizes) == len(whole):  # no filled batch: the generator makes the same draws for one process and for several
        for i, one in enumerate(whole):
            for part in range(6):
                dealt = torch.empty_like(one[part])
                for r in range(world):
                    dealt[r::world] = parts[r][0][i][part]
                assert torch.equal(dealt, one[part])


def test_the_penalty_of_shares_is_that_of_all_rows():
    """Of each rank's few rows alone it would push every batch of four images towards all classes at once."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(12, 5)).requires_grad_()
    prior_penalty(logits).backward()
    gradient, logits.grad = logits.grad, None
    shares = logits.chunk(3)

    def own(x):
        return x.log_softmax(1).logsumexp(0) - np.log(4)

    gathered = torch.stack([own(x.detach()) for x in shares])
    penalties = [prior_penalty(x, lambda _: gathered) for x in shares]
    for penalty in penalties:
        torch.testing.assert_close(penalty, prior_penalty(logits))
    torch.stack(penalties).mean().backward()  # as DistributedDataParallel averages
    torch.testing.assert_close(logits.grad, gradient)


def test_alone_everything_is_given_back():
    """One process must run as if there were no ranks: the same numbers, no process group."""
    one, tensor = Ranks(), torch.arange(3.0)
    assert one.sum(tensor) is tensor
    assert one.maximum(tensor) is tensor
    assert one.broadcast_from_rank0(lambda a: a + 1, 1) == one.local_rank0_first(lambda: 2) == 2
    net = torch.nn.BatchNorm2d(2)
    one.average_buffers(net)
    assert torch.equal(net.running_var, torch.ones(2))
    assert ranks.join(torch.device("cpu")) == one


def test_a_rank_that_cannot_reach_the_others_says_so(monkeypatch):
    """A wrong address must end in a line that names it, not in a traceback or in waiting for ever."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "TIMEOUT", ranks.datetime.timedelta(seconds=1))
    with pytest.raises(ranks.DivideMixError, match="rank 1 of 2 cannot reach the others"):
        ranks.join(torch.device("cpu"))
