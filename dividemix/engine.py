"""What a phase and a step compute (Algorithm 1). How it is run (device, precision, graphs, loops) is in `runtime`.

A phase draws all its random numbers before the first step, and reads its results back once, after the last. A step
never waits for the device: no .item(), no branch on a tensor's value, no shape that depends on data. What changes from
step to step is a tensor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from dividemix.algorithm import co_guess, co_refine, linear_rampup, mixup, neg_entropy, prior_penalty, semi_loss
from dividemix.codivide import Division, Mixture
from dividemix.runtime import ALONE, Batches, Forward, Ranks, Runtime, evaluate, evaluate_rows, run_steps, update


@dataclass(frozen=True)
class MixMatch:
    """The method's settings.

    The fields that a step reads are part of the key under which it is captured. Those with compare=False act before
    the step: they may change from epoch to epoch without a new capture.
    """

    num_class: int
    batch_size: int = 64  # labeled, and as many unlabeled, images of a step; twice that in warm-up
    T: float = 0.5  # sharpening temperature
    refine: bool = True  # co-refine the labels of the labeled set (False: keep the given labels; Table 5)
    views: int = 2  # M, views of an image in guesses, refinement and the mixed batch (1: Table 5)
    unlabeled_loss: bool = True  # False: unlabeled images are mixup partners only (Clothing1M, WebVision)
    conf_penalty: bool = False  # confidence penalty in warm-up
    alpha: float = field(default=4, compare=False)  # of mixup's Beta distribution
    lambda_u: float = field(default=25, compare=False)  # weight of the unlabeled loss, ramped up over 16 epochs
    warm_up: float = field(default=10, compare=False)  # epochs before the first division; inf: plain cross-entropy


@dataclass
class Phase:
    """What a phase takes from its run: the epoch, the generator of all its random draws, and the progress bar around
    its batches. A phase function enters it (`with phase`) while it works. This one shows and measures nothing;
    `Run.phase` gives one that does."""

    epoch: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    bar: Callable[[Iterable], Iterable] = iter

    def __enter__(self) -> "Phase":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def silent(name: str, k: int = 0) -> Phase:
    """Stands in for `Run.phase` where there is no run: the phase `name` of net k (0 or 1)."""
    return Phase()


class DataSet(Protocol):
    """What the engine needs of N images with their given labels.

    A batch is a tuple of device tensors, which `warmup_views` or `mixmatch_views` turns into images, on the device and
    without waiting for it; data sets that share a captured step must have the same function there. All random numbers
    come from the host's generator `rng`. With several ranks, batch_size and the draws are those of all ranks together;
    a training batch holds this rank's rows, and evaluation gives each rank whole batches (see `runtime.ranks`).
    """

    runtime: Runtime

    @property
    def given_labels(self) -> NDArray[np.int64]: ...  # (N,), of all ranks
    @property
    def truly_clean(self) -> NDArray[np.bool_] | None: ...  # (N,), None where the truth is unknown; for the AUC only
    @property
    def warmup_views(self) -> Callable[..., tuple[Tensor, ...]]: ...  # (*batch) -> x, labels
    @property
    def mixmatch_views(self) -> Callable[..., tuple[Tensor, ...]]: ...  # (*batch) -> `train_step`'s batch

    def __len__(self) -> int: ...
    def warmup_batches(self, batch_size: int, rng: np.random.Generator) -> Batches: ...
    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> Batches: ...

    def eval_batches(self, batch_size: int) -> Iterable[tuple[Tensor, ...]]:
        """(x, labels) of all images in order, without augmentation."""

    def originals(self, rows: NDArray) -> Iterable[NDArray[np.uint8]]:
        """The images of these rows for people to look at, (H, W, 3) each."""


def plain_forward(net: nn.Module, *batches: Tensor) -> list[Tensor]:
    """The simplest `Forward`: one call after the other, in the precision of the weights."""
    return [net(x) for x in batches]


class Terms(NamedTuple):
    """The terms of the loss: of one step detached 0-d tensors, of a phase their means, as numbers."""

    loss: Any
    labeled: Any  # Lx
    unlabeled: Any  # Lu, before its weight
    penalty: Any


class Scores(NamedTuple):
    """One network's results for all N samples, in eval mode and without augmentation."""

    loss: Tensor  # (N,) float32 cross-entropy against the given label, on the host
    prediction: Tensor  # (N,) int64, on the host
    probability: Tensor | None = None  # (N, C) float32, on the device, if asked for


# ---- One step ----


def mixmatch_step(
    net, peer, optimizer, x1, x2, labels, w, u1, u2, *, T: float, num_class: int, unlabeled_loss: bool = True,
    strong: Sequence[Tensor] = (), **draws,
) -> Terms:  # fmt: skip
    """`train_step` with its settings as separate arguments. draws: lam, index, lambda_u; optional: strong, which is x3,
    x4, u3, u4; forward, ranks."""
    mixmatch = MixMatch(num_class, len(x1), T, unlabeled_loss=unlabeled_loss)
    return train_step(net, peer, optimizer, (x1, x2, labels, w, u1, u2, *strong), mixmatch, **draws)


def train_step(
    net: nn.Module,
    peer: nn.Module | None,
    optimizer: Optimizer,
    batch: tuple[Tensor, ...],
    mixmatch: MixMatch,
    lam: Tensor | float,
    index: Tensor,
    lambda_u: Tensor | float,
    *,
    forward: Forward = plain_forward,
    ranks: Ranks = ALONE,
) -> Terms:
    """Co-refine, co-guess, MixMatch and one update of `net`, with `peer` frozen (Algorithm 1, inner loop).

    batch: x1, x2 (B, ...) two views of the labeled images, labels int64 (B,), w (B,) their clean probability; u1, u2
    (B', ...) two views of the unlabeled images, B' may be 0. lam: already max(lam, 1 - lam); index: a permutation of
    all 2B + 2B' rows; lambda_u: already ramped up. Sets the modes of both networks. With unlabeled_loss=False
    (Clothing1M, WebVision) unlabeled images are mixup partners only, and just the first 2B rows are forwarded.

    Strong views, not in the paper (Nishi et al., CVPR 2021): where x3, x4, u3, u4 follow in the batch, the mixed batch
    is made of them, with the targets found on x1, x2, u1, u2.

    Ablations (Table 5). peer None: `net` guesses alone. refine=False: the given labels are the targets, whatever w is;
    all forward passes stay, and with them BN's statistics. views=1: x2 and u2 are not used, `index` is of B + B' rows.

    Several ranks run the same step, each on its own rows. The losses that are returned are those of this rank's rows;
    the penalty is that of all rows.
    """
    net.train()  # also while guessing: each forward uses its own batch statistics and updates the running ones
    if peer is not None:
        peer.eval()
    x1, x2, labels, w, u1, u2, *strong = batch
    M, T = mixmatch.views, mixmatch.T
    xs, us = [x1, x2][:M], [u1, u2][:M] if len(u1) else []
    with torch.no_grad():
        logits = forward(net, *us, *xs)  # u first, as published: the order moves BN's statistics
        logits_u, logits_x = logits[: len(us)], logits[len(us) :]
        if us and peer is not None:
            logits_u = logits_u + forward(peer, *us)
        q = co_guess(logits_u, T) if us else None
        # torch.nn.functional.one_hot would check the range on the host: a sync
        one_hot = (labels.unsqueeze(1) == torch.arange(mixmatch.num_class, device=labels.device)).to(w.dtype)
        p = co_refine(one_hot, w, logits_x, T) if mixmatch.refine else one_hot

    if strong:
        xs, us = strong[:2][:M], strong[2:][: len(us)]
    inputs, targets = torch.cat([*xs, *us]), torch.cat([p] * len(xs) + [q] * len(us))
    rows_x = M * len(x1)
    mixed, mixed_targets = mixup(inputs, targets, lam, index if mixmatch.unlabeled_loss else index[:rows_x])

    [logits] = forward(net, mixed)  # all rows in one forward, also where lambda_u is 0: BN and the penalty see them all
    Lx, Lu = semi_loss(logits[:rows_x], mixed_targets[:rows_x], logits[rows_x:], mixed_targets[rows_x:])
    penalty = prior_penalty(logits, ranks.log_mean)
    loss = Lx + lambda_u * Lu + penalty
    update(optimizer, loss, ranks)
    return Terms(loss.detach(), Lx.detach(), Lu.detach(), penalty.detach())


def warmup_step(
    net: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    labels: Tensor,
    *,
    conf_penalty: bool,
    forward: Forward = plain_forward,
    ranks: Ranks = ALONE,
) -> Terms:
    """Cross-entropy of images x (B, ...) on their given labels (B,), plus the confidence penalty if wanted (Eq. 2)."""
    net.train()
    [logits] = forward(net, x)
    cross_entropy = F.cross_entropy(logits, labels)
    penalty = neg_entropy(logits) if conf_penalty else torch.zeros_like(cross_entropy)
    loss = cross_entropy + penalty
    update(optimizer, loss, ranks)
    return Terms(loss.detach(), cross_entropy.detach(), torch.zeros_like(loss), penalty.detach())


# ---- One phase ----


def warmup_epoch(net: nn.Module, optimizer: Optimizer, data: DataSet, mixmatch: MixMatch, phase: Phase) -> Terms:
    """One pass of plain cross-entropy over all samples with their given labels, one augmented view each.

    Raises Diverged when a loss or gradient was not finite.
    """
    with phase:
        batch_size, views, ranks = 2 * mixmatch.batch_size, data.warmup_views, data.runtime.ranks
        batches = data.warmup_batches(batch_size, phase.rng)

        def step(forward: Forward, *batch: Tensor) -> Terms:  # a captured step is kept: it must not hold `data`
            penalty = mixmatch.conf_penalty
            return warmup_step(net, optimizer, *views(*batch), conf_penalty=penalty, forward=forward, ranks=ranks)

        key = ("warmup", net, optimizer, views, mixmatch)
        draws = [()] * len(batches)
        terms = run_steps(key, step, batches, draws, batch_size, net, optimizer, data.runtime, phase.rng, phase.bar)
        return Terms(*terms)


def train_epoch(
    net: nn.Module,
    peer: nn.Module,
    optimizer: Optimizer,
    data: DataSet,
    division: Division,
    mixmatch: MixMatch,
    phase: Phase,
) -> Terms:
    """Train `net` for one pass over the labeled set of its peer's `division`, with `peer` frozen. If `peer` is `net`
    itself, it guesses alone (Table 5, without co-training).

    lambda_u is ramped up over the 16 epochs after warm-up. All ablations draw the same images and crops. Raises
    Diverged when a loss or gradient was not finite.
    """
    with phase:
        rng, views = phase.rng, data.mixmatch_views
        batches = data.mixmatch_batches(division, mixmatch.batch_size, rng)
        device, ranks = data.runtime.device, data.runtime.ranks
        lam = rng.beta(mixmatch.alpha, mixmatch.alpha, size=len(batches))
        lam = torch.from_numpy(np.maximum(lam, 1 - lam)).float().to(device)
        rows = [mixmatch.views * sum(size) for size in batches.sizes]
        index = [[rng.permutation(n) for _ in range(ranks.world)][ranks.rank] for n in rows]
        index = torch.from_numpy(np.concatenate(index)).to(device).split(rows)
        num_iter = int(division.labeled.sum()) // mixmatch.batch_size + 1  # the authors' count: at times one too many
        t = phase.epoch + torch.arange(len(batches), device=device) / num_iter
        ramp: Tensor = linear_rampup(t, mixmatch.warm_up, mixmatch.lambda_u)
        peer = None if peer is net else peer

        def step(forward: Forward, lam: Tensor, index: Tensor, lambda_u: Tensor, *batch: Tensor) -> Terms:
            images, draws = views(*batch), (lam, index, lambda_u)
            return train_step(net, peer, optimizer, images, mixmatch, *draws, forward=forward, ranks=ranks)

        key = ("mixmatch", net, peer, optimizer, views, mixmatch)
        draws = [(lam[i], index[i], ramp[i]) for i in range(len(batches))]
        batch_size = mixmatch.batch_size
        terms = run_steps(key, step, batches, draws, batch_size, net, optimizer, data.runtime, rng, phase.bar)
        return Terms(*terms)


class Divisions(Sequence):
    """Each network's division, None where it found no clean sample. Reading one that is still being fitted waits."""

    def __init__(self, fits: list[Callable[[], Division | None]], phase: Callable[[str, int], Phase]):
        self._fits, self._phase = fits, phase

    def __len__(self) -> int:
        return len(self._fits)

    def __getitem__(self, k: int) -> Division | None:
        with self._phase("gmm", k):
            return self._fits[k]()


def co_divide(
    nets: Sequence[nn.Module],
    sets: Sequence[DataSet],
    mixtures: Sequence[Mixture],
    phase: Callable[[str, int], Phase] = silent,
    keep_probabilities: Callable[[Tensor], None] | None = None,
) -> Divisions:
    """W = GMM(X, Y, theta): network k scores sets[k], and mixtures[k] divides it (Sec. 3.1), before any is trained.

    Net 2 comes first, because net 1 is trained first and learns from its division. On a card each mixture is fitted in
    a thread while the card goes on. keep_probabilities gets each network's probabilities (N, C). Raises Diverged, here
    or when a division is read, for losses that are not finite or all equal.
    """
    fits: list[Callable[[], Division | None]] = [lambda: None] * len(nets)
    for k in reversed(range(len(nets))):
        scores = per_sample_loss(nets[k], sets[k], phase("loss", k), with_probability=keep_probabilities is not None)
        random_state = int(phase("divide", k).rng.integers(2**32))
        arguments = scores.loss.numpy(), scores.prediction.numpy(), sets[k].truly_clean, random_state
        if scores.probability is not None:
            keep_probabilities(scores.probability)
        with phase("gmm", k):
            fits[k] = sets[k].runtime.background(mixtures[k].divide, *arguments, sets[k].given_labels, f"net {k + 1}")
    return Divisions(fits, phase)


@torch.no_grad()
def per_sample_loss(
    net: nn.Module, data: DataSet, phase: Phase | None = None, with_probability: bool = False
) -> Scores:
    """Cross-entropy of all N samples against their given labels: eval mode, no augmentation (Sec. 3.1)."""
    net.eval()

    def score(forward: Forward, x: Tensor, labels: Tensor) -> Tensor:
        [logits] = forward(net, x)
        loss = F.cross_entropy(logits, labels, reduction="none")
        columns = [loss[:, None], logits.argmax(dim=1, keepdim=True)]
        return torch.cat([*columns, logits.softmax(dim=1)] if with_probability else columns, dim=1)

    with phase or Phase() as phase:
        scores = evaluate_rows(score, data, phase.bar)
        loss, prediction = scores[:, :2].T.contiguous().cpu()  # one transfer
    return Scores(loss, prediction.long(), scores[:, 2:] if with_probability else None)


def test(
    nets: Sequence[nn.Module],
    sets: Mapping[str, DataSet],
    phase: Callable[[str], Phase] = silent,
    ks: Sequence[int] = (1,),
) -> dict[str, float]:
    """Accuracies in per cent under their names in metrics.jsonl. For a set named 'test': test_acc of the summed logits,
    test_acc_net1, test_acc_net2 of each network, for k > 1 in `ks` test_acc_top<k> of the summed logits, and, where
    weights are averaged, test_acc_ema of the averages' summed logits."""
    record = {}
    for name, data in sets.items():
        accuracy = top_k_accuracy(nets, data, ks, phase(name))
        record[f"{name}_acc"], *each_net = accuracy[1]
        record |= {f"{name}_acc_net{k}": value for k, value in enumerate(each_net, start=1)}
        record |= {f"{name}_acc_top{k}": accuracy[k][0] for k in ks if k > 1}
        if data.runtime.averages:
            record[f"{name}_acc_ema"] = top_k_accuracy(data.runtime.averaged(nets), data, phase=phase(name))[1][0]
    return record


@torch.no_grad()
def top_k_accuracy(
    nets: Sequence[nn.Module], data: DataSet, ks: Sequence[int] = (1,), phase: Phase | None = None
) -> dict[int, list[float]]:
    """For each k in `ks` the top-k accuracy (%): [of the summed logits, of each net]. 100 for k > number of classes."""
    for net in nets:
        net.eval()

    def score(forward: Forward, x: Tensor, labels: Tensor) -> Tensor:
        logits = torch.stack([logits for net in nets for logits in forward(net, x)])  # (nets, B, C)
        logits = torch.cat([logits.sum(dim=0, keepdim=True), logits])  # (1 + nets, B, C)
        hits = []
        for k in ks:
            predicted = logits.argmax(dim=2, keepdim=True) if k == 1 else logits.topk(min(k, logits.shape[2]), dim=2)[1]
            hits.append((predicted == labels[:, None]).any(dim=2).sum(dim=1))
        return torch.stack(hits)

    correct = torch.zeros(len(ks), 1 + len(nets), dtype=torch.int64, device=data.runtime.device)
    with phase or Phase() as phase:
        for _, hits in evaluate(score, data, phase.bar):
            correct += hits
        counts = data.runtime.ranks.sum(correct).tolist()
    return {k: [100 * count / len(data) for count in row] for k, row in zip(ks, counts, strict=True)}
