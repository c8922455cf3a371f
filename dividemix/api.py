"""DivideMix from Python: `dividemix.find_label_issues`."""

from functools import partial
from typing import Any

import numpy as np
import pandas
from numpy.typing import ArrayLike, NDArray
from torch import nn

from dividemix import DivideMixError, networks
from dividemix.codivide import Mixture
from dividemix.data.features import FeatureSet, as_views
from dividemix.engine import MeanProbabilities, MixMatch, Phase, co_divide, train_epoch, warmup_epoch
from dividemix.recipes import FEATURES, FeatureRecipe
from dividemix.run import worst_first
from dividemix.run.label_quality import label_quality
from dividemix.runtime import Runtime
from dividemix.runtime.device import pick_device
from dividemix.seeds import PHASES, draws, seeded


def find_label_issues(*, features: ArrayLike, labels: ArrayLike, seed: int = 0) -> pandas.DataFrame:
    """Which of the given labels look wrong, by DivideMix on two small heads, in about half a minute on one core for
    5,000 samples.

    features: numbers (N, D) of each sample, of CLIP, DINOv2 or another frozen network, or (V, N, D) of V views of it,
    the first without augmentation. labels: (N,), whole numbers or names. -> a row for each sample, in order: index,
    given_label, suggested_label, label_quality (0 to 1, small means doubtful), is_label_issue, rank (1 is the most
    doubtful). The same seed gives the same list. Raises DivideMixError for arrays of another shape.
    """
    views, given = as_views(features), np.asarray(labels)
    if given.shape != (views.shape[1],):
        raise DivideMixError(f"labels: expected {views.shape[1]}, one for each sample, got shape {given.shape}")
    classes, numbers = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise DivideMixError(f"labels: all samples are of one class, {classes[0]!r:.100}: nothing to learn")
    data = FeatureSet(views, numbers.astype(np.int64), Runtime(pick_device("auto", 0)))
    _, probabilities = train_heads(data, len(classes), seed)
    quality = label_quality(probabilities, numbers)
    table: dict[str, Any] = {"index": np.arange(len(given)), "given_label": given}
    table |= {"suggested_label": classes[quality.suggested], "label_quality": quality.quality}
    rank = worst_first(quality.quality, quality.is_issue).argsort() + 1
    return pandas.DataFrame(table | {"is_label_issue": quality.is_issue, "rank": rank})


def train_heads(
    data: FeatureSet, num_class: int, seed: int = 0, recipe: FeatureRecipe = FEATURES
) -> tuple[list[nn.Module], NDArray[np.float32]]:
    """Algorithm 1 on two heads. -> them, and their probabilities (N, num_class), averaged over the divided epochs."""
    build = partial(networks.head, data.num_features, num_class)
    nets = [data.runtime.prepare(seeded(seed, k, build)) for k in (0, 1)]
    optimizers = [data.runtime.optimizer(net, recipe.lr, recipe.weight_decay) for net in nets]
    mixtures = [Mixture(0.5, division="per_class") for _ in nets]
    mixmatch = MixMatch(num_class, recipe.batch_size, alpha=recipe.alpha, lambda_u=0, warm_up=recipe.warm_up)
    mean = MeanProbabilities()
    for epoch in range(recipe.num_epochs):

        def phase(name: str, k: int = 0, epoch: int = epoch) -> Phase:
            return Phase(epoch, draws(seed, name, epoch, k)) if name in PHASES else Phase(epoch)

        divisions: Any = [None, None]
        if epoch >= mixmatch.warm_up:
            divisions = co_divide(nets, [data, data], mixtures, phase, mean)
        for k, net in enumerate(nets):
            division, peer = divisions[1 - k], nets[1 - k]
            if division is None:
                warmup_epoch(net, optimizers[k], data, mixmatch, phase("warmup", k))
            else:
                train_epoch(net, peer, optimizers[k], data, division, mixmatch, phase("train", k))
    return nets, mean.mean.float().cpu().numpy()
