"""What a phase and a step compute (Algorithm 1). How it is run (device, precision, graphs) is the `machine`'s affair.

A phase function takes a data set as `dividemix.data` describes it and a numpy generator; all of the phase's draws are
made from it before the first step. `mixmatch_step` and `warmup_step` are free of host synchronisation: no .item(), no
branch on a tensor's value, no shape that depends on data. What changes from step to step is a tensor: a machine may
capture one step and replay it for all others of its shapes. A phase reads its results back once, at its end.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dividemix import Diverged, DivideMixError, runtime, warn
from dividemix.algorithm import co_guess, co_refine, linear_rampup, mixup, neg_entropy, prior_penalty, semi_loss
from dividemix.codivide import Division
from dividemix.data import Batches
from dividemix.ranks import Ranks
from dividemix.runtime import Runtime

# forward(net, *batches) -> the logits of each batch, as one call of net after the other would give them
Forward = Callable[..., list[Tensor]]

PLAIN = Runtime(torch.device("cpu"))
ALONE = Ranks()


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


# ---------------------------------------------------------------------------------------------------------------------
# One step


def mixmatch_step(
    net: nn.Module,
    peer: nn.Module | None,
    optimizer: Optimizer,
    x1: Tensor,
    x2: Tensor,
    labels: Tensor,
    w: Tensor,
    u1: Tensor,
    u2: Tensor,
    *,
    lam: Tensor | float,
    index: Tensor,
    T: float,
    lambda_u: Tensor | float,
    num_class: int,
    unlabeled_loss: bool = True,
    refine: bool = True,
    M: int = 2,
    forward: Forward = plain_forward,
    ranks: Ranks = ALONE,
) -> StepTerms:
    """Co-refine, co-guess, MixMatch and one update of `net`, with `peer` frozen (Algorithm 1, inner loop).

    x1, x2 (B, ...) two views of the labeled images, labels int64 (B,), w (B,) their clean probability; u1, u2 (B',
    ...) two views of the unlabeled ones, B' may be 0. lam: already max(lam, 1 - lam); index: a permutation of all 2B
    + 2B' rows; lambda_u: already ramped. unlabeled_loss=False is the Clothing1M / WebVision form: unlabeled images
    are mix partners only, and just the first 2B rows are forwarded. Sets the nets' modes. `ranks`: all come to the same
    step, each with its own rows; the terms are those of these rows, but for the penalty, which is of all.

    Ablations (Table 5). peer None: `net` guesses alone. refine=False: the given labels are the targets, whatever w is;
    all forwards stay, and with them BN's statistics. M=1, views of an image: x2 and u2 are not looked at, `index` is of
    B + B' rows.
    """
    net.train()  # also while guessing: each forward's own batch statistics, and four updates of the running ones
    if peer is not None:
        peer.eval()
    xs, us = [x1, x2][:M], [u1, u2][:M]
    with torch.no_grad():
        if len(u1):
            own = forward(net, *us, *xs)
            own_u, own_x = own[:M], own[M:]
            theirs = [] if peer is None else forward(peer, *us)
            targets_u = co_guess([*own_u, *theirs], T)
        else:
            own_x = forward(net, *xs)
            targets_u = w.new_zeros(0, num_class)
        # one_hot of torch.nn.functional checks the range on the host: a sync
        one_hot = (labels.unsqueeze(1) == torch.arange(num_class, device=labels.device)).to(w.dtype)
        targets_x = co_refine(one_hot, w, own_x, T) if refine else one_hot

    inputs = torch.cat([*xs, *us])
    targets = torch.cat([targets_x] * M + [targets_u] * M)
    rows_x = M * len(x1)
    mixed, mixed_targets = mixup(inputs, targets, lam, index if unlabeled_loss else index[:rows_x])

    [logits] = forward(net, mixed)  # all rows in one forward, also where lambda_u is 0: BN and the penalty see them all
    Lx, Lu = semi_loss(logits[:rows_x], mixed_targets[:rows_x], logits[rows_x:], mixed_targets[rows_x:])
    penalty = prior_penalty(logits, ranks.gather)
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
    """Backward and SGD step. Where the optimizer carries a `found_inf` flag (see `runtime.Runtime.optimizer`), the
    first non-finite loss or gradient of any rank raises it, on the device, and neither this update nor any later one is
    applied."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.isfinite(torch.nn.utils.get_total_norm(grads)) & torch.isfinite(loss.detach())
        found_inf.copy_(ranks.maximum(torch.maximum(found_inf, (~finite).to(found_inf.dtype))))
    optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# One phase


def warmup_epoch(
    net: nn.Module,
    optimizer: Optimizer,
    data,
    *,
    batch_size: int,
    rng: np.random.Generator,
    conf_penalty: bool = False,
    machine: Runtime = PLAIN,
    bar: Callable[[Iterable], Iterable] = iter,
) -> PhaseTerms:
    """One pass of plain cross-entropy over all samples with their given labels, one augmented view each.

    Raises DivideMixError when a loss or gradient was not finite.
    """
    batches = data.warmup_batches(batch_size, rng)
    views = data.warmup_views  # not `data`: what a machine keeps of a step must not hold on to images

    def step(forward: Forward, *batch: Tensor) -> StepTerms:
        return warmup_step(
            net, optimizer, *views(*batch), conf_penalty=conf_penalty, forward=forward, ranks=machine.ranks
        )

    key = ("warmup", net, optimizer, views, batch_size, conf_penalty)
    with layers_draw_from(rng, net, machine):
        return run_steps(key, step, batches, [()] * len(batches), batch_size, net, optimizer, machine, bar)


def train_epoch(
    net: nn.Module,
    peer: nn.Module | None,
    optimizer: Optimizer,
    data,
    division: Division,
    *,
    epoch: int,
    warm_up: int,
    batch_size: int,
    alpha: float,
    T: float,
    lambda_u: float,
    num_class: int,
    rng: np.random.Generator,
    unlabeled_loss: bool = True,
    refine: bool = True,
    M: int = 2,
    machine: Runtime = PLAIN,
    bar: Callable[[Iterable], Iterable] = iter,
) -> PhaseTerms:
    """Train `net` for one pass over the labeled set of its peer's `division`, with `peer` frozen.

    lambda_u is ramped up over 16 epochs from `warm_up` on. peer None, refine, M: see `mixmatch_step`; images and
    crops are drawn alike in all cases. Raises DivideMixError when a loss or gradient was not finite.
    """
    batches = data.mixmatch_batches(division, batch_size, rng)
    views = data.mixmatch_views
    device, ranks = data.device, machine.ranks
    lam = rng.beta(alpha, alpha, size=len(batches))
    lam = torch.from_numpy(np.maximum(lam, 1 - lam)).float().to(device)
    rows = [M * sum(size) for size in batches.sizes]
    index = [[rng.permutation(n) for _ in range(ranks.world)][ranks.rank] for n in rows]
    index = torch.from_numpy(np.concatenate(index)).to(device).split(rows)
    num_iter = int(division.labeled.sum()) // batch_size + 1  # as the authors count: one too many when it divides
    t = epoch + torch.arange(len(batches), device=device) / num_iter
    ramp = linear_rampup(t, warm_up, lambda_u)

    def step(forward: Forward, lam: Tensor, index: Tensor, lambda_u: Tensor, *batch: Tensor) -> StepTerms:
        return mixmatch_step(
            net,
            peer,
            optimizer,
            *views(*batch),
            lam=lam,
            index=index,
            T=T,
            lambda_u=lambda_u,
            num_class=num_class,
            unlabeled_loss=unlabeled_loss,
            refine=refine,
            M=M,
            forward=forward,
            ranks=ranks,
        )

    key = ("mixmatch", net, peer, optimizer, views, batch_size, T, num_class, unlabeled_loss, refine, M)
    draws = [(lam[i], index[i], ramp[i]) for i in range(len(batches))]
    with layers_draw_from(rng, net, machine):
        return run_steps(key, step, batches, draws, batch_size, net, optimizer, machine, bar)


@contextlib.contextmanager
def layers_draw_from(rng: np.random.Generator, net: nn.Module, machine: Runtime) -> Iterator[None]:
    """Within the block, layers that draw (dropout, stochastic depth; p is their probability) do so by a seed from
    `rng`, each rank by one of its own: they know torch's global stream alone. Nothing is drawn for networks without
    such layers, as the paper's are."""
    if not any(getattr(module, "p", 0) for module in net.modules()):
        yield
        return
    seed = int(rng.integers(2**62)) + machine.ranks.rank
    with torch.random.fork_rng([machine.device] if machine.device.type == "cuda" else []):
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
    machine: Runtime,
    bar: Callable[[Iterable], Iterable],
) -> PhaseTerms:
    """step(forward, *draws[i], *batch) for every batch, full ones on the machine's fast path (see `Runtime.run`); read
    the summed terms and the count of sound steps back once, at the end."""
    found_inf = getattr(optimizer, "found_inf", None)
    state = partial(changed_by_step, net, optimizer)
    ranks = machine.ranks
    full = batch_size // ranks.world

    def packed(forward: Forward, *tensors: Tensor) -> Tensor:  # (5,): the step's terms, and 1 if it was sound
        terms = torch.stack(step(forward, *tensors))
        sound = torch.isfinite(terms).all() if found_inf is None else found_inf == 0
        return torch.cat([terms, sound.to(terms.dtype).reshape(1)])

    sums = torch.zeros(len(StepTerms._fields) + 1, device=machine.device)
    try:
        for batch, drawn, sizes in zip(bar(batches), draws, batches.sizes, strict=True):
            # A partial batch also occurs in mid-epoch, where the unlabeled set ends and is reshuffled.
            if all(size == full for size in sizes):
                sums = sums + machine.run(key, packed, (*drawn, *batch), state)
            else:
                sums = sums + machine.run_partial(packed, (*drawn, *batch))
        ranks.average_buffers(net)
        *totals, sound = (ranks.sum(sums) / ranks.world).tolist()
    except RuntimeError as error:
        if not runtime.is_out_of_memory(error):
            raise
        smaller = "--no_graph, a smaller --width or a smaller --batch_size"
        raise DivideMixError(f"{machine.device}: not enough memory to train; try {smaller}") from error
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


@torch.no_grad()
def per_sample_loss(
    net: nn.Module,
    data,
    *,
    batch_size: int = 1000,
    machine: Runtime = PLAIN,
    bar: Callable[[Iterable], Iterable] = iter,
) -> Scores:
    """Cross-entropy of all N samples against their given labels: eval mode, no augmentation (Sec. 3.1)."""
    net.eval()

    def score(forward: Forward, x: Tensor, labels: Tensor) -> Tensor:
        [logits] = forward(net, x)
        return torch.stack([F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=1).float()])

    scores = torch.zeros(2, len(data), device=machine.device)
    for rows, found in evaluate(score, data, batch_size, machine, bar):
        scores[:, rows] = found
    loss, prediction = machine.ranks.sum(scores).cpu()  # one transfer
    return Scores(loss, prediction.long())


def ensemble_accuracy(
    nets: list[nn.Module],
    data,
    *,
    batch_size: int = 1000,
    machine: Runtime = PLAIN,
    bar: Callable[[Iterable], Iterable] = iter,
) -> list[float]:
    """Top-1 accuracy in per cent: [of the summed logits, of each net alone]."""
    return top_k_accuracy(nets, data, (1,), batch_size=batch_size, machine=machine, bar=bar)[1]


@torch.no_grad()
def top_k_accuracy(
    nets: list[nn.Module],
    data,
    ks: Sequence[int],
    *,
    batch_size: int = 1000,
    machine: Runtime = PLAIN,
    bar: Callable[[Iterable], Iterable] = iter,
) -> dict[int, list[float]]:
    """For each k the part of the samples, in per cent, whose label is among the k largest logits: [of the summed
    logits, of each net alone]. All of a k beyond the number of classes."""
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

    correct = torch.zeros(len(ks), 1 + len(nets), dtype=torch.int64, device=machine.device)
    for _, hits in evaluate(score, data, batch_size, machine, bar):
        correct += hits
    counts = machine.ranks.sum(correct).tolist()
    return {k: [100 * count / len(data) for count in row] for k, row in zip(ks, counts, strict=True)}


def evaluate(
    score: Callable[..., Tensor], data, batch_size: int, machine: Runtime, bar: Callable[[Iterable], Iterable]
) -> list[tuple[slice, Tensor]]:
    """score(forward, x, labels) of this rank's evaluation batches, each with the samples it is of.

    Where the memory is too small for a batch, its size is halved until it fits, for the rest of the run. Raises
    DivideMixError where not even one image fits, and with several ranks, which must make the same batches.
    """
    while True:
        size = min(batch_size, len(data), machine.eval_limit or batch_size)
        try:
            mine = machine.ranks.deal(-(-len(data) // size))
            batches = zip(mine, bar(data.eval_batches(size)), strict=True)
            return [
                (
                    slice(k * size, k * size + len(x)),
                    score(machine.evaluation_forward if len(x) == size else machine.forward, x, labels),
                )
                for k, (x, labels) in batches
            ]
        except RuntimeError as error:
            if not runtime.is_out_of_memory(error):
                raise
            short = f"{machine.device}: no memory for "
            if machine.ranks.world > 1:
                raise DivideMixError(f"{short}{size} images at once; use a smaller --eval_batch_size") from error
            if size == 1:
                raise DivideMixError(f"{short}even one image; use a smaller --width") from error
        machine.eval_limit = size // 2
        torch.cuda.empty_cache()
        warn(f"not enough memory to evaluate {size} images at once: {size // 2} from now on (--eval_batch_size)")


def set_learning_rate(optimizers: Iterable[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            runtime.set_learning_rate(group, lr)
