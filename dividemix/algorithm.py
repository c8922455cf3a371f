"""The equations of DivideMix as pure functions: tensors in, tensors out.

No state, no device, no random draw, no host synchronisation. Notation is the paper's (Sec. 3): p predictions, q
guesses, w clean probabilities, T sharpening temperature. Shapes: B rows, C classes.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def sharpen(p: Tensor, T: float) -> Tensor:
    """p^(1/T) / sum_c p^(1/T), rows of probabilities (B, C) -> (B, C).  (Eq. 4)

    Each row is first divided by its maximum, which cancels: no row can underflow to 0/0, however small T is.
    """
    p = (p / p.amax(dim=1, keepdim=True)) ** (1 / T)
    return p / p.sum(dim=1, keepdim=True)


def mean_prediction(logits: list[Tensor]) -> Tensor:
    """Mean of the softmax over views or networks: list of (B, C) -> (B, C)."""
    return torch.stack([F.softmax(view, dim=1) for view in logits]).mean(dim=0)


def co_refine(labels: Tensor, w: Tensor, logits: list[Tensor], T: float) -> Tensor:
    """Targets of labeled images: w * given label + (1 - w) * the network's own prediction, sharpened.  (Eq. 3, 4)

    labels: one-hot (B, C); w: clean probability (B,); logits: of the network in training, (B, C) for each view. ->
    (B, C).
    """
    w = w.unsqueeze(1)  # (B, 1)
    return sharpen(w * labels + (1 - w) * mean_prediction(logits), T)


def co_guess(logits: list[Tensor], T: float) -> Tensor:
    """Targets of unlabeled images: the sharpened mean prediction over networks and views. list of (B, C) -> (B, C)."""
    return sharpen(mean_prediction(logits), T)


def mixup(inputs: Tensor, targets: Tensor, lam: Tensor | float, index: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each row with a partner row: lam * row + (1 - lam) * row[index].  (Eq. 7, 8; lam is Eq. 5, 6)

    inputs (B, ...), targets (B, C), index a permutation of the B rows; with lam >= 0.5 a mixed row stays nearer to its
    own row than to its partner. A shorter index mixes only the first rows.
    """
    n = len(index)
    return lam * inputs[:n] + (1 - lam) * inputs[index], lam * targets[:n] + (1 - lam) * targets[index]


def semi_loss(logits_x: Tensor, targets_x: Tensor, logits_u: Tensor, targets_u: Tensor) -> tuple[Tensor, Tensor]:
    """(Lx, Lu): cross-entropy of labeled rows, squared error of unlabeled rows.  (Eq. 9, 10)

    Lx is a mean over rows, Lu a mean over rows and classes (as in MixMatch). Without unlabeled rows Lu is 0.
    """
    Lx = -(targets_x * F.log_softmax(logits_x, dim=1)).sum(dim=1).mean()
    Lu = (F.softmax(logits_u, dim=1) - targets_u).square().sum() / max(targets_u.numel(), 1)
    return Lx, Lu


def linear_rampup(t: Tensor | float, warm_up: float, lambda_u: float, rampup_length: int = 16) -> Tensor | float:
    """lambda_u * clip((t - warm_up) / rampup_length, 0, 1); t is the epoch with its fraction, a number or a tensor."""
    ramp = (t - warm_up) / rampup_length
    ramp = ramp.clamp(0, 1) if isinstance(ramp, Tensor) else min(max(ramp, 0.0), 1.0)
    return lambda_u * ramp


def prior_penalty(logits: Tensor, over_ranks: Callable[[Tensor], Tensor] = lambda log_pbar: log_pbar) -> Tensor:
    """Divergence of the mean prediction from a uniform prior, (B, C) -> scalar.  (Eq. 11)

    sum_c 1/C * log((1/C) / pbar_c), with log pbar taken by logsumexp, so a class that no row predicts stays finite.
    over_ranks: log pbar of these rows -> log pbar of the whole batch, where the rows are a part of it.
    """
    rows, classes = logits.shape
    log_pbar = F.log_softmax(logits, dim=1).logsumexp(dim=0) - math.log(rows)  # (C,)
    return -math.log(classes) - over_ranks(log_pbar).mean()


def neg_entropy(logits: Tensor) -> Tensor:
    """Mean over rows of sum_c p log p, (B, C) -> scalar <= 0: the confidence penalty added in warm-up.  (Eq. 2)"""
    log_p = F.log_softmax(logits, dim=1)
    return (log_p.exp() * log_p).sum(dim=1).mean()
