"""What a phase and a step compute (Algorithm 1). How it is run (device, precision, graphs) is the runtime's affair.

A phase draws all that it needs before its first step, and reads its results back once. A step is free of host syncs: no
.item(), no branch on a tensor's value, no shape that depends on data. What changes from step to step is a tensor.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from dividemix import Diverged, DivideMixError, warn
from dividemix.algorithm import co_guess, co_refine, linear_rampup, mixup, neg_entropy, prior_penalty, semi_loss
from dividemix.codivide import Division, Mixture
from dividemix.runtime import Ranks, Runtime, is_out_of_memory
from dividemix.runtime import set_learning_rate as set_learning_rate

# forward(net, *batches) -> the logits of each batch, as one call of net after the other would give them
Forward = Callable[..., list[Tensor]]

ALONE = Ranks()


@dataclass(frozen=True)
class MixMatch:
    """The method's settings. Those that compare are read by the step, and are part of the key under which a step is
    captured; those that act before it do not compare, so that they may change from epoch to epoch."""

    num_class: int
    batch_size: int = 64  # labeled = unlabeled images of a step; twice that in warm-up
    T: float = 0.5  # sharpening temperature
    refine: bool = True  # whether labels of the labeled set are co-refined, or stay as given (Table 5)
    views: int = 2  # M, views of an image in guesses, refinement and the mixed batch (1: Table 5)
    unlabeled_loss: bool = True  # else unlabeled images are mix partners only (Clothing1M, WebVision)
    conf_penalty: bool = False  # confidence penalty in warm-up
    alpha: float = field(default=4, compare=False)  # of mixup's Beta distribution
    lambda_u: float = field(default=25, compare=False)  # weight of the unlabeled loss, ramped up over 16 epochs
    warm_up: float = field(default=10, compare=False)  # epochs before the first division; inf: plain cross-entropy


@dataclass
class Phase:
    """What a phase function is given of its run: the epoch, the generator of all draws, and the progress bar around the
    batches. It is entered for the time that the phase takes. By itself it is silent."""

    epoch: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    bar: Callable[[Iterable], Iterable] = iter

    def __enter__(self) -> "Phase":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def silent(name: str, k: int = 0) -> Phase:
    """The phase `name` of net k (0 or 1), as `Run.phase` gives it, without a run."""
    return Phase()


class Batches(Protocol):
    """The batches of one phase, gone through once. sizes: the rows of each, labeled and (mixmatch) unlabeled."""

    sizes: list[tuple[int, ...]]

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]: ...


class DataSet(Protocol):
    """What the engine asks of N images with their given labels.

    A batch is a tuple of device tensors. `*_views` makes its images: device work without a host sync, the same function
    for all data that may share a captured step. Everything random comes from the host's generator `rng`. batch_size and
    the draws are those of all ranks together; the batches are this rank's rows of them (see `ranks`), and for
    evaluation its share of whole batches.
    """

    runtime: Runtime

    @property
    def truly_clean(self) -> NDArray[np.bool_] | None: ...  # (N,), where the truth is known: for the AUC alone
    @property
    def warmup_views(self) -> Callable[..., tuple[Tensor, ...]]: ...  # (*batch) -> x, labels
    @property
    def mixmatch_views(self) -> Callable[..., tuple[Tensor, ...]]: ...  # (*batch) -> x1, x2, labels, w, u1, u2

    def __len__(self) -> int: ...
    def warmup_batches(self, batch_size: int, rng: np.random.Generator) -> Batches: ...
    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> Batches: ...

    def eval_batches(self, batch_size: int) -> Iterable[tuple[Tensor, ...]]:
        """(x, labels) of all images in order, without augmentation."""

    def originals(self, rows: NDArray) -> Iterable[NDArray[np.uint8]]:
        """These images for people, (H, W, 3), one after the other."""


def plain_forward(net: nn.Module, *batches: Tensor) -> list[Tensor]:
    return [net(x) for x in batches]


class StepTerms(NamedTuple):
    """Detached 0-d tensors of one step."""

    loss: Tensor
    labeled: Tensor  # Lx
    unlabeled: Tensor  # Lu, before its weight
    penalty: Tensor


class PhaseTerms(NamedTuple):
    """Means over a phase's steps."""

    loss: float
    labeled: float
    unlabeled: float
    penalty: float


class Scores(NamedTuple):
    """What a network says of every sample, in eval mode and without augmentation."""

    loss: Tensor  # (N,) float32 cross-entropy against the given label, on the host
    prediction: Tensor  # (N,) int64, on the host


# ---- One step ----


def mixmatch_step(
    net, peer, optimizer, x1, x2, labels, w, u1, u2, *, T: float, num_class: int, unlabeled_loss: bool = True, **draws
) -> StepTerms:
    """`train_step` with its settings one by one. draws: lam, index and lambda_u; forward and ranks."""
    mixmatch = MixMatch(num_class, len(x1), T, unlabeled_loss=unlabeled_loss)
    return train_step(net, peer, optimizer, (x1, x2, labels, w, u1, u2), mixmatch, **draws)


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
) -> StepTerms:
    """Co-refine, co-guess, MixMatch and one update of `net`, with `peer` frozen (Algorithm 1, inner loop).

    batch: x1, x2 (B, ...) two views of the labeled images, labels int64 (B,), w (B,) their clean probability; u1, u2
    (B', ...) two views of the unlabeled ones, B' may be 0. lam: already max(lam, 1 - lam); index: a permutation of all
    2B + 2B' rows; lambda_u: already ramped. unlabeled_loss=False is the Clothing1M / WebVision form: unlabeled images
    are mix partners only, and just the first 2B rows are forwarded. Sets the nets' modes. `ranks`: all come to the same
    step, each with its own rows; the terms are those of these rows, but for the penalty, which is of all.

    Ablations (Table 5). peer None: `net` guesses alone. refine=False: the given labels are the targets, whatever w is;
    all forwards stay, and with them BN's statistics. views=1: x2 and u2 are not looked at, `index` is of B + B' rows.
    """
    net.train()  # also while guessing: each forward's own batch statistics, and four updates of the running ones
    if peer is not None:
        peer.eval()
    x1, x2, labels, w, u1, u2 = batch
    M, T = mixmatch.views, mixmatch.T
    xs, us = [x1, x2][:M], [u1, u2][:M] if len(u1) else []
    with torch.no_grad():
        views = forward(net, *us, *xs)
        logits_u, logits_x = views[:-M], views[-M:]
        if us and peer is not None:
            logits_u = logits_u + forward(peer, *us)
        targets_u = [co_guess(logits_u, T)] * M if us else []
        # one_hot of torch.nn.functional checks the range on the host: a sync
        one_hot = (labels.unsqueeze(1) == torch.arange(mixmatch.num_class, device=labels.device)).to(w.dtype)
        targets_x = [co_refine(one_hot, w, logits_x, T) if mixmatch.refine else one_hot] * M

    inputs, targets = torch.cat([*xs, *us]), torch.cat([*targets_x, *targets_u])
    rows_x = M * len(x1)
    mixed, mixed_targets = mixup(inputs, targets, lam, index if mixmatch.unlabeled_loss else index[:rows_x])

    [logits] = forward(net, mixed)  # all rows in one forward, also where lambda_u is 0: BN and the penalty see them all
    Lx, Lu = semi_loss(logits[:rows_x], mixed_targets[:rows_x], logits[rows_x:], mixed_targets[rows_x:])
    penalty = prior_penalty(logits, ranks.gather if ranks.world > 1 else None)
    loss = Lx + lambda_u * Lu + penalty
    update(optimizer, loss, ranks)
    return StepTerms(loss.detach(), Lx.detach(), Lu.detach(), penalty.detach())


def warmup_step(
    net: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    labels: Tensor,
    *,
    conf_penalty: bool,
    forward: Forward = plain_forward,
    ranks: Ranks = ALONE,
) -> StepTerms:
    """Cross-entropy on the given labels, plus the confidence penalty where it is asked for (Sec. 3.1, Eq. 2)."""
    net.train()
    [logits] = forward(net, x)
    cross_entropy = F.cross_entropy(logits, labels)
    penalty = neg_entropy(logits) if conf_penalty else torch.zeros_like(cross_entropy)
    loss = cross_entropy + penalty
    update(optimizer, loss, ranks)
    return StepTerms(loss.detach(), cross_entropy.detach(), torch.zeros_like(loss), penalty.detach())


def update(optimizer: Optimizer, loss: Tensor, ranks: Ranks = ALONE) -> None:
    """Backward and SGD step. Where the optimizer has a `found_inf` flag (see `Runtime.optimizer`), the first non-finite
    loss or gradient of any rank raises it, on the device, and neither this update nor any later one is applied."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.isfinite(torch.nn.utils.get_total_norm(grads)) & torch.isfinite(loss.detach())
        found_inf.copy_(ranks.maximum(torch.maximum(found_inf, (~finite).to(found_inf.dtype))))
    optimizer.step()


# ---- One phase ----


def warmup_epoch(net: nn.Module, optimizer: Optimizer, data: DataSet, mixmatch: MixMatch, phase: Phase) -> PhaseTerms:
    """One pass of plain cross-entropy over all samples with their given labels, one augmented view each.

    Raises Diverged when a loss or gradient was not finite.
    """
    with phase:
        batch_size, views, ranks = 2 * mixmatch.batch_size, data.warmup_views, data.runtime.ranks
        batches = data.warmup_batches(batch_size, phase.rng)

        def step(forward: Forward, *batch: Tensor) -> StepTerms:  # holds `views`, not `data`: a captured step is kept
            penalty = mixmatch.conf_penalty
            return warmup_step(net, optimizer, *views(*batch), conf_penalty=penalty, forward=forward, ranks=ranks)

        key = ("warmup", net, optimizer, views, mixmatch)
        return run_steps(key, step, batches, [()] * len(batches), batch_size, net, optimizer, data.runtime, phase)


def train_epoch(
    net: nn.Module,
    peer: nn.Module,
    optimizer: Optimizer,
    data: DataSet,
    division: Division,
    mixmatch: MixMatch,
    phase: Phase,
) -> PhaseTerms:
    """Train `net` for one pass over the labeled set of its peer's `division`, with `peer` frozen. A network that is its
    own peer guesses alone (Table 5, without co-training).

    lambda_u is ramped up over 16 epochs from warm_up on. Images and crops are drawn alike in all ablations. Raises
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
        num_iter = int(division.labeled.sum()) // mixmatch.batch_size + 1  # as the authors count: one too many at times
        t = phase.epoch + torch.arange(len(batches), device=device) / num_iter
        ramp: Tensor = linear_rampup(t, mixmatch.warm_up, mixmatch.lambda_u)
        peer = None if peer is net else peer

        def step(forward: Forward, lam: Tensor, index: Tensor, lambda_u: Tensor, *batch: Tensor) -> StepTerms:
            images, draws = views(*batch), (lam, index, lambda_u)
            return train_step(net, peer, optimizer, images, mixmatch, *draws, forward=forward, ranks=ranks)

        key = ("mixmatch", net, peer, optimizer, views, mixmatch)
        draws = [(lam[i], index[i], ramp[i]) for i in range(len(batches))]
        return run_steps(key, step, batches, draws, mixmatch.batch_size, net, optimizer, data.runtime, phase)


@contextlib.contextmanager
def layers_draw_from(rng: np.random.Generator, net: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Within the block, layers that draw (dropout, stochastic depth; p is their probability) do so from torch's global
    stream, seeded by `rng`, on each rank otherwise. Networks without such layers, as the paper's are, draw nothing."""
    if not any(getattr(module, "p", 0) for module in net.modules()):
        yield
        return
    seed = int(rng.integers(2**62)) + runtime.ranks.rank
    with torch.random.fork_rng([runtime.device] if runtime.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def run_steps(
    key: tuple,
    step: Callable[..., StepTerms],
    batches: Batches,
    draws: Sequence[tuple[Tensor, ...]],
    batch_size: int,
    net: nn.Module,
    optimizer: Optimizer,
    runtime: Runtime,
    phase: Phase,
) -> PhaseTerms:
    """step(forward, *draws[i], *batch) for every batch, full ones on the runtime's fast path (see `Runtime.run`); read
    the summed terms and the count of sound steps back once, at the end."""
    found_inf, ranks = getattr(optimizer, "found_inf", None), runtime.ranks
    state, full = partial(changed_by_step, net, optimizer), batch_size // ranks.world

    def packed(forward: Forward, *tensors: Tensor) -> Tensor:  # (5,): the step's terms, and 1 if it was sound
        terms = torch.stack(step(forward, *tensors))
        sound = torch.isfinite(terms).all() if found_inf is None else found_inf == 0
        return torch.cat([terms, sound.to(terms.dtype).reshape(1)])

    sums = torch.zeros(len(StepTerms._fields) + 1, device=runtime.device)
    try:
        with layers_draw_from(phase.rng, net, runtime):
            for batch, drawn, sizes in zip(phase.bar(batches), draws, batches.sizes, strict=True):
                # A partial batch also occurs in mid-epoch, where the unlabeled set ends and is reshuffled.
                if all(size == full for size in sizes):
                    sums = sums + runtime.run(key, packed, (*drawn, *batch), state)
                else:
                    sums = sums + runtime.run_partial(packed, (*drawn, *batch))
            ranks.average_buffers(net)
            *totals, sound = (ranks.sum(sums) / ranks.world).tolist()
    except RuntimeError as error:
        if is_out_of_memory(error):
            smaller = "--no_graph, a smaller --width or a smaller --batch_size"
            raise DivideMixError(f"{runtime.device}: not enough memory to train; try {smaller}") from error
        raise
    steps = len(batches)
    if sound < steps:
        stopped = "" if found_inf is None else ", and no update was applied from there on"
        raise Diverged(
            f"the loss or a gradient was not finite at batch {int(sound) + 1} of {steps}{stopped}. "
            "Likely causes: --lr too high, damaged images, or a weight file that does not fit"
        )
    return PhaseTerms(*(total / steps for total in totals))


def changed_by_step(net: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """All tensors that a step changes in place: weights, BN statistics, momentum, the flag of a non-finite loss."""
    momentum = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    flag = [optimizer.found_inf] if hasattr(optimizer, "found_inf") else []
    return [*net.parameters(), *net.buffers(), *momentum, *flag]


class Divisions(Sequence):
    """Each network's division, None where it found no clean sample. One that is still being fitted is waited for when
    it is read."""

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
) -> Divisions:
    """W = GMM(X, Y, theta): each network scores its set, and a mixture divides it (Sec. 3.1), before any is trained.

    Net 2 comes first, whose division is needed first: on a card each mixture is fitted in a thread while the card goes
    on. Raises Diverged, also when a division is read, for losses that cannot be divided.
    """
    fits: list[Callable[[], Division | None]] = [lambda: None] * len(nets)
    for k in reversed(range(len(nets))):
        scores = per_sample_loss(nets[k], sets[k], phase("loss", k))
        random_state = int(phase("divide", k).rng.integers(2**32))
        known = scores.loss.numpy(), scores.prediction.numpy(), sets[k].truly_clean
        with phase("gmm", k):
            fits[k] = sets[k].runtime.background(mixtures[k].divide, *known, random_state, f"net {k + 1}")
    return Divisions(fits, phase)


@torch.no_grad()
def per_sample_loss(net: nn.Module, data: DataSet, phase: Phase | None = None) -> Scores:
    """Cross-entropy of all N samples against their given labels: eval mode, no augmentation (Sec. 3.1)."""
    net.eval()

    def score(forward: Forward, x: Tensor, labels: Tensor) -> Tensor:
        [logits] = forward(net, x)
        return torch.stack([F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=1).float()])

    scores = torch.zeros(2, len(data), device=data.runtime.device)
    with phase or Phase() as phase:
        for rows, values in evaluate(score, data, phase.bar):
            scores[:, rows] = values
        loss, prediction = data.runtime.ranks.sum(scores).cpu()  # one transfer
    return Scores(loss, prediction.long())


def test(
    nets: Sequence[nn.Module],
    sets: Mapping[str, DataSet],
    phase: Callable[[str], Phase] = silent,
    ks: Sequence[int] = (1,),
) -> dict[str, float]:
    """Accuracies in per cent, by the names of an epoch's record: of the set 'test' test_acc, of the summed logits, and
    test_acc_net1 ... of each network; with k > 1 test_acc_top<k>, of the summed logits, whose label is among the k
    largest."""
    record = {}
    for name, data in sets.items():
        accuracy = top_k_accuracy(nets, data, ks, phase(name))
        record[f"{name}_acc"], *each_net = accuracy[1]
        record |= {f"{name}_acc_net{k}": value for k, value in enumerate(each_net, start=1)}
        record |= {f"{name}_acc_top{k}": accuracy[k][0] for k in ks if k > 1}
    return record


@torch.no_grad()
def top_k_accuracy(
    nets: Sequence[nn.Module], data: DataSet, ks: Sequence[int] = (1,), phase: Phase | None = None
) -> dict[int, list[float]]:
    """For each k the top-k accuracy (%): [of the summed logits, of each net alone]. 100 for a k beyond the number of
    classes."""
    for net in nets:
        net.eval()

    def score(forward: Forward, x: Tensor, labels: Tensor) -> Tensor:
        logits = torch.stack([logits for net in nets for logits in forward(net, x)])  # (nets, B, C)
        logits = torch.cat([logits.sum(dim=0, keepdim=True), logits])  # (1 + nets, B, C)
        hits = []
        for k in ks:
            answers = logits.argmax(dim=2, keepdim=True) if k == 1 else logits.topk(min(k, logits.shape[2]), dim=2)[1]
            hits.append((answers == labels[:, None]).any(dim=2).sum(dim=1))
        return torch.stack(hits)

    correct = torch.zeros(len(ks), 1 + len(nets), dtype=torch.int64, device=data.runtime.device)
    with phase or Phase() as phase:
        for _, hits in evaluate(score, data, phase.bar):
            correct += hits
        counts = data.runtime.ranks.sum(correct).tolist()
    return {k: [100 * count / len(data) for count in row] for k, row in zip(ks, counts, strict=True)}


def evaluate(
    score: Callable[..., Tensor], data: DataSet, bar: Callable[[Iterable], Iterable] = iter
) -> list[tuple[slice, Tensor]]:
    """score(forward, x, labels) of this rank's evaluation batches, each with the samples it is of. Where the memory is
    too small for a batch, its size is halved until it fits, for the rest of the run. Raises DivideMixError where not
    even one image fits, and with several ranks, which must make the same batches."""
    runtime = data.runtime
    while True:
        size = min(runtime.eval_batch_size, len(data))
        try:
            numbers, results = runtime.ranks.shard_batches(-(-len(data) // size)), []
            for k, (x, labels) in zip(numbers, bar(data.eval_batches(size)), strict=True):
                forward = runtime.evaluation_forward if len(x) == size else runtime.forward
                results.append((slice(k * size, k * size + len(x)), score(forward, x, labels)))
            return results
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if runtime.ranks.world > 1 or size == 1:
                smaller = "a smaller --eval_batch_size or --width"
                raise DivideMixError(f"{runtime.device}: no memory to evaluate {size} images; use {smaller}") from error
        runtime.eval_batch_size = size // 2
        x = labels = results = None  # else they stay in memory beside the next try
        torch.cuda.empty_cache()
        warn(f"not enough memory to evaluate {size} images at once: {size // 2} from now on (--eval_batch_size)")
