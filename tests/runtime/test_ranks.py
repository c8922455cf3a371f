"""The rows of each rank: the same number for all, together the global batch; and what the ranks share."""

import numpy as np
import pytest
import torch
from helpers.nets import half
from helpers.torchrun_driver import RankImages
from hypothesis import given, settings
from hypothesis import strategies as st

from dividemix.algorithm import prior_penalty
from dividemix.runtime import ranks
from dividemix.runtime.device import Runtime
from dividemix.runtime.ranks import Ranks

worlds = st.integers(1, 5)


@given(st.integers(0, 40), worlds)
def test_a_batch_is_padded_with_its_own_rows_and_split_evenly(n, world):
    """A rank with fewer rows takes part in fewer steps, and the others wait for it for ever; a row of another batch
    would be trained on twice as often as the rest."""
    rows = np.arange(n) + 100
    padded = Ranks(world=world).pad_to_world(rows)
    shards = [Ranks(r, world).shard_rows(padded) for r in range(world)]
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(np.concatenate(shards)) == sorted(padded)
    assert padded[:n].tolist() == rows.tolist()
    assert padded[n:].tolist() == rows[: len(padded) - n].tolist() if n >= world else set(padded) == set(rows)
    assert len(padded) - n < world


@given(st.integers(0, 40), worlds)
def test_each_evaluation_batch_belongs_to_one_rank(n, world):
    """A batch that no rank takes leaves losses of 0, which would be divided as clean."""
    assert sorted(k for r in range(world) for k in Ranks(r, world).shard_batches(n)) == list(range(n))


def images(world, rank):
    """23 images of one grey value each."""
    pixels = np.broadcast_to(np.arange(1, 24, dtype=np.uint8)[:, None, None, None], (23, 16, 16, 3)).copy()
    runtime = Runtime(torch.device("cpu"), ranks=Ranks(rank, world))
    return RankImages(pixels, np.arange(23), (0.0,) * 3, (1 / 255,) * 3, True, runtime)


@given(worlds, st.integers(1, 4), st.integers(1, 22), st.integers(0, 99))
@settings(max_examples=30)
def test_the_views_of_all_ranks_together_are_those_of_one_process(world, rows_of_rank, labeled, seed):
    """Other draws on one rank, or rows out of step with their weights: every rank would train on something else than
    the one batch that all are meant to share."""
    division = half(23, labeled)
    division.clean_probability[:] = np.linspace(0.1, 0.9, 23)
    batch_size = world * rows_of_rank

    def full_batches(rank, world):
        data = images(world, rank)
        batches = data.mixmatch_batches(division, batch_size, np.random.default_rng(seed))
        full = [all(n == batch_size // world for n in sizes) for sizes in batches.sizes]
        assert [(len(x), len(u)) for x, u, *_ in batches] == batches.sizes
        return [data.mixmatch_views(*b) for b, keep in zip(batches, full, strict=True) if keep], batches.sizes

    batches, sizes = full_batches(0, 1)
    of_ranks = [full_batches(r, world) for r in range(world)]
    assert all(rank_sizes == of_ranks[0][1] for _, rank_sizes in of_ranks)
    assert all(min(size) >= 1 for size in of_ranks[0][1])
    if len(sizes) != len(batches):  # a padded batch: the generator makes other draws than for one process
        return
    for i, batch in enumerate(batches):
        for k, expected in enumerate(batch):
            joined = torch.empty_like(expected)
            for r in range(world):
                joined[r::world] = of_ranks[r][0][i][k]
            assert torch.equal(joined, expected)


def test_the_penalty_of_each_ranks_rows_is_that_of_all_rows():
    """Of each rank's few rows alone it would push every batch of four images towards all classes at once."""
    logits = (3 * torch.randn(12, 5)).requires_grad_()
    prior_penalty(logits).backward()
    gradient, logits.grad = logits.grad, None
    shards = logits.chunk(3)
    gathered = torch.stack([x.detach().log_softmax(1).logsumexp(0) - np.log(4) for x in shards])
    penalties = [prior_penalty(x, lambda _: gathered) for x in shards]
    for penalty in penalties:
        torch.testing.assert_close(penalty, prior_penalty(logits))
    torch.stack(penalties).mean().backward()  # as DistributedDataParallel averages
    torch.testing.assert_close(logits.grad, gradient)


def test_a_rank_that_cannot_reach_the_others_ends(monkeypatch):
    """A wrong address must end in a line that names it, not in a traceback or in waiting for ever."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "TIMEOUT", ranks.datetime.timedelta(seconds=1))
    with pytest.raises(ranks.DivideMixError, match="rank 1 of 2"):
        ranks.join(torch.device("cpu"))
