"""DivideMix from Python: `dividemix.find_label_issues`."""

from functools import partial
from typing import Any

import numpy as np
import pandas
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from dividemix import DivideMixError, networks, warn
from dividemix.codivide import Mixture
from dividemix.data.features import FeatureSet, as_views
from dividemix.engine import MeanProbabilities, MixMatch, Phase, co_divide, train_epoch, warmup_epoch
from dividemix.recipes import FEATURES, OWN_DIVISION, FeatureRecipe
from dividemix.run import worst_first
from dividemix.run.label_quality import label_quality
from dividemix.runtime import Runtime
from dividemix.runtime.device import pick_device
from dividemix.seeds import PHASES, draws, seeded

# A list means nothing where predictions agree with the given labels by less than this (Cohen's kappa), or by no more
# than two standard errors of random labels. Nearest neighbours on 200 to 1,797 digits: random labels or features within
# 0.06 of 0; with 50 % of the labels drawn anew 0.3 to 0.5, with 80 % 0 to 0.14.
_LITTLE_AGREEMENT = 0.05
_CHECKED = 5_000  # samples of the check by neighbours: it takes about a second


def find_label_issues(*, features: ArrayLike, labels: ArrayLike, seed: int = 0) -> pandas.DataFrame:
    """Which of the given labels look wrong, by DivideMix on two small heads, in about half a minute on one core for
    5,000 samples.

    features: numbers (N, D) of each sample, of CLIP, DINOv2 or another frozen network, or (V, N, D) of V views of it,
    the first without augmentation. labels: (N,), whole numbers or names. -> a row for each sample, in order: index,
    given_label, suggested_label, label_quality (0 to 1, small means doubtful), is_label_issue, rank (1 is the most
    doubtful). The same seed gives the same list. Raises DivideMixError for arrays of another shape and for missing
    labels. Warns where the list means nothing, because features and labels have nothing to do with each other; of
    a few dozen samples, or where most labels are wrong, that cannot be told reliably.
    """
    views, given = as_views(features), as_labels(labels)
    if given.shape != (views.shape[1],):
        raise DivideMixError(f"labels: expected {views.shape[1]}, one for each sample, got shape {given.shape}")
    classes, numbers = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise DivideMixError(f"labels: all samples are of one class, {classes[0]!r:.100}: nothing to learn")
    data = FeatureSet(views, numbers.astype(np.int64), Runtime(pick_device("auto", 0)))
    _, probabilities = train_heads(data, len(classes), seed)
    if problem := failure(views[0], numbers, probabilities):
        warn(f"THIS LIST MEANS NOTHING: {problem}")
    quality = label_quality(probabilities, numbers)
    table: dict[str, Any] = {"index": np.arange(len(given)), "given_label": given}
    table |= {"suggested_label": classes[quality.suggested], "label_quality": quality.quality}
    rank = worst_first(quality.quality, quality.is_issue).argsort() + 1
    return pandas.DataFrame(table | {"is_label_issue": quality.is_issue, "rank": rank})


def as_labels(labels: ArrayLike) -> NDArray:
    """Labels of any type as an array. Raises DivideMixError for what numpy cannot read, and for missing values."""
    try:
        given, missing = np.asarray(labels), pandas.isna(np.asarray(labels, object))  # numpy would make a name of NaN
        np.unique(given[~missing])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise DivideMixError(f"labels: expected (N,) whole numbers or names, of one type: {reason}") from error
    if missing.any():
        raise DivideMixError(f"labels: {missing.sum()} of {missing.size} are missing: leave these samples out")
    return given


def failure(features: NDArray[np.floating], labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> str:
    """Why a list of N labels means nothing, or ''. features (N, D); labels (N,), 0 to C - 1; probabilities (N, C): the
    networks'. Networks memorise random labels, too; a sample's nearest neighbours show that they are random."""
    n, num_class = probabilities.shape
    rows = np.random.default_rng(0).permutation(n)[:_CHECKED]
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(min(10, len(rows) // 2)))
    folds = KFold(min(10, len(rows)), shuffle=True, random_state=0)
    nearest = cross_val_predict(neighbours, features[rows].astype(np.float32), labels[rows], cv=folds)
    for name, prediction, given in (
        ("the networks", probabilities.argmax(axis=1), labels),
        ("predictions by the nearest neighbours of each sample", nearest, labels[rows]),
    ):
        kappa = cohen_kappa_score(prediction, given)
        if kappa < max(_LITTLE_AGREEMENT, 2 / np.sqrt(len(given) * (num_class - 1))):
            advice = "are features and labels in the same order?"
            return f"{name} agree with the labels hardly more than chance (Cohen's kappa {kappa:.2f}); {advice}"
    return ""


def train_heads(
    data: FeatureSet, num_class: int, seed: int = 0, recipe: FeatureRecipe = FEATURES
) -> tuple[list[nn.Module], NDArray[np.float32]]:
    """Algorithm 1 on two heads. -> them, and their probabilities (N, num_class), averaged over the divided epochs."""
    build = partial(networks.head, data.num_features, num_class)
    nets = [data.runtime.prepare(seeded(seed, k, build)) for k in (0, 1)]
    optimizers = [data.runtime.optimizer(net, recipe.lr, recipe.weight_decay) for net in nets]
    own = OWN_DIVISION
    mixtures = [Mixture(own["p_threshold"], own["loss_window"], division=own["division"]) for _ in nets]
    settings = {"alpha": recipe.alpha, "lambda_u": own["lambda_u"], "warm_up": recipe.warm_up}
    mixmatch = MixMatch(num_class, recipe.batch_size, **settings)
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
