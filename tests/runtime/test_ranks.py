"""The rows of each rank: the same number for all, together the global batch; and what the ranks share."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dividemix.algorithm import prior_penalty
from dividemix.runtime import ranks
from dividemix.runtime.ranks import Ranks

worlds = st.integers(1, 5)


@given(st.integers(0, 40), worlds)
def test_a_batch_is_padded_with_its_own_rows_and_split_evenly(n, world):
    """A rank with fewer rows takes part in fewer steps, and the others wait for it for ever."""
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


def test_the_penalty_of_each_ranks_rows_is_that_of_all_rows(monkeypatch):
    """Of each rank's few rows alone it would push every batch of four images towards all classes at once."""
    logits = (3 * torch.randn(12, 5)).requires_grad_()
    prior_penalty(logits).backward()
    gradient, logits.grad = logits.grad, None
    shards = logits.chunk(3)
    log_pbars = [x.detach().log_softmax(1).logsumexp(0) - np.log(4) for x in shards]
    monkeypatch.setattr(ranks.dist, "all_gather", lambda results, _: torch._foreach_copy_(results, log_pbars))
    penalties = [prior_penalty(x, ranks.Ranks(world=3).log_mean) for x in shards]
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
