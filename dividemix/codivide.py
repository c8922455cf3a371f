"""Co-divide: per-sample losses -> a two-component Gaussian mixture -> labeled and unlabeled set (paper, Sec. 3.1)."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dividemix import Diverged, warn

DIVISIONS = ("global", "per_class")  # one mixture for all samples, as in the paper, or one for each given class
FIT_LIMIT = 1_000_000  # a mixture is fitted to at most so many losses: more take time and change almost nothing
MIN_CLASS_SIZE = 20  # a given class with fewer samples gets no mixture of its own
# Distance of a class's two means, in pooled standard deviations: below it the components differ in width, and none is
# the clean one. Higher limits lose more than they save: real classes with wrong labels have 1.0 to 15 (see RESULTS.md).
MIN_DISTANCE = 1.0

# Stopping early is part of the method. Set here, as `fit_gmm` may run in a thread, where changing filters is not safe.
warnings.filterwarnings("ignore", category=UserWarning, module=r"sklearn\.mixture")


@dataclass(frozen=True)
class Division:
    """How one network's losses divide N samples into a labeled and an unlabeled set.

    clean_probability (N,) float64; labeled (N,) bool, True where clean_probability > threshold; loss (N,) float32, the
    normalised loss that the mixture was fitted to; means, variances, weights (2,) of the mixture, the clean component
    first; auc of clean_probability against the truth, None where the truth is unknown or all labels are of one kind.
    raw_loss (N,) float32: the cross-entropy before normalisation; prediction (N,) int64: the network's class.
    Divided by given class, means, variances and weights are still those of the mixture of all samples, which also
    divides the classes in `fallback`.
    """

    clean_probability: NDArray[np.float64]
    labeled: NDArray[np.bool_]
    loss: NDArray[np.float32]
    means: NDArray[np.float64]
    variances: NDArray[np.float64]
    weights: NDArray[np.float64]
    threshold: float
    auc: float | None
    raw_loss: NDArray[np.float32] | None = None
    prediction: NDArray[np.int64] | None = None
    fallback: tuple[int, ...] = ()

    def precision_recall(self, truly_clean: NDArray[np.bool_]) -> tuple[float | None, float | None]:
        """Of the labeled set, against the truth (N,): the fraction of it whose labels are right, and the fraction of
        all right labels that it contains. None for a fraction of nothing."""
        right = int((self.labeled & truly_clean).sum())
        labeled, clean = int(self.labeled.sum()), int(truly_clean.sum())
        return (right / labeled if labeled else None), (right / clean if clean else None)


def normalise(losses: NDArray) -> NDArray[np.float64]:
    """Min-max to [0, 1] along the last axis, (..., N) -> (..., N).

    Raises Diverged for non-finite losses and for a row whose losses are all equal: nothing could be divided.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if bad := int((~np.isfinite(losses)).sum()):
        raise Diverged(f"{bad} of {losses.size} per-sample losses are not finite: lower --lr")
    low, high = losses.min(axis=-1, keepdims=True), losses.max(axis=-1, keepdims=True)
    if (high <= low).any():
        raise Diverged(
            "all per-sample losses are equal, so clean and wrong labels cannot be told apart: the network has learned "
            "nothing (--lr or --warm_up too small?) or every image is the same"
        )
    return (losses - low) / (high - low)


def smoothed(losses: NDArray, window: int = 1) -> NDArray[np.float64]:
    """The loss that the mixture is fitted to: raw losses (N,) or a history (E, N) -> (N,). Each row is normalised by
    itself, then the last `window` rows (fewer in the first epochs) are averaged. The mean is not normalised again. The
    paper uses 5 at 90 % noise, where the losses of a single epoch vary much."""
    history = np.atleast_2d(np.asarray(losses))[-window:]
    return normalise(history).mean(axis=0)


def fit_gmm(loss: NDArray, random_state: int = 0) -> Any:
    """The authors' mixture of a normalised loss (N,). With so few EM steps, the k-means initialisation is part of the
    method. Unlike theirs, it is fitted to at most FIT_LIMIT losses, drawn without replacement (see RESULTS.md)."""
    from sklearn.mixture import GaussianMixture  # slow to import

    if len(loss) > FIT_LIMIT:
        loss = np.random.default_rng(random_state).choice(loss, FIT_LIMIT, replace=False)
    gmm = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=random_state)
    return gmm.fit(loss.reshape(-1, 1))


def posterior(gmm: Any, loss: NDArray) -> NDArray[np.float64]:
    """Of the component with the smaller mean: loss (N,) -> (N,)."""
    return gmm.predict_proba(loss.reshape(-1, 1))[:, gmm.means_.argmin()]


def distance(gmm: Any) -> float:
    """How far the two means are apart, in pooled standard deviations."""
    pooled = np.sqrt(gmm.weights_ @ gmm.covariances_.ravel())
    return float(np.ptp(gmm.means_) / pooled)


def divide_classes(
    loss: NDArray, labels: NDArray, probability: NDArray, random_state: int = 0
) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    """A mixture for each given class, since classes differ in their losses: hard or rare ones have larger losses, so
    one mixture takes their right labels for wrong ones, and wrong labels of easy classes for right ones.

    loss (N,), as in `smoothed`; labels (N,): the given classes; probability (N,): by one mixture of all samples, which
    stays for classes with fewer than MIN_CLASS_SIZE samples or means closer than MIN_DISTANCE. -> clean probability
    (N,), and these classes
    """
    probability, fallback = probability.copy(), []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        gmm = fit_gmm(loss[rows], random_state) if len(rows) >= MIN_CLASS_SIZE and np.ptp(loss[rows]) > 0 else None
        if gmm and distance(gmm) >= MIN_DISTANCE:
            probability[rows] = posterior(gmm, loss[rows])
        else:
            fallback.append(int(label))
    return probability, tuple(fallback)


def clean_probability(
    losses: ArrayLike, window: int = 1, random_state: int = 0, labels: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Posterior of the component with the smaller mean: losses (N,) or (E, N) of E epochs -> (N,); see `codivide`."""
    return codivide(losses, 0.5, window, random_state=random_state, labels=labels).clean_probability


def codivide(
    losses: ArrayLike,
    threshold: float,
    window: int = 1,
    truly_clean: NDArray[np.bool_] | None = None,
    random_state: int = 0,
    prediction: NDArray[np.int64] | None = None,
    labels: NDArray[np.int64] | None = None,
) -> Division:
    """Divide the N samples of one network's raw losses, (N,) or history (E, N), at clean probability `threshold`.

    labels (N,): with the given labels there is a mixture for each class (`divide_classes`). truly_clean (N,), where it
    is known, is used for the AUC only. Raises Diverged as `normalise`.
    """
    history = np.atleast_2d(np.asarray(losses))
    loss = smoothed(history, window)
    gmm = fit_gmm(loss, random_state)
    order = np.argsort(gmm.means_.ravel())  # the clean component first
    probability, fallback = posterior(gmm, loss), ()
    if labels is not None:
        probability, fallback = divide_classes(loss, labels, probability, random_state)
    return Division(
        clean_probability=probability,
        labeled=probability > threshold,
        loss=loss.astype(np.float32),
        means=gmm.means_.ravel()[order],
        variances=gmm.covariances_.ravel()[order],
        weights=gmm.weights_[order],
        threshold=threshold,
        auc=auc(probability, truly_clean),
        raw_loss=history[-1],
        prediction=prediction,
        fallback=fallback,
    )


def auc(probability: NDArray, truly_clean: NDArray[np.bool_] | None) -> float | None:
    """Area under the ROC curve of clean probability (N,) against the truth; None if unknown or all of one kind."""
    if truly_clean is None or truly_clean.all() or not truly_clean.any():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truly_clean, probability))


class Mixture:
    """One network's mixture through the epochs. It keeps the losses that the window of the next epoch averages."""

    def __init__(
        self,
        threshold: float,
        window: int = 1,
        largest_window: int = 1,
        division: str = "global",
        warned: set[str] | None = None,
    ):
        """threshold and window may change between epochs; largest_window: the largest value that window will have.
        division: one of DIVISIONS. warned: what was warned of, shared by the networks of a run."""
        self.threshold, self.window, self.division = threshold, window, division
        self.warned = set() if warned is None else warned
        self.rows = max(window, largest_window) - 1
        self.history: list[NDArray[np.float32]] = []  # raw losses of the last `rows` divided epochs, (N,) each

    def in_window(self, loss: NDArray[np.float32]) -> NDArray[np.float32]:
        """The losses kept so far, with this epoch's (N,) as the last: (E, N). A run that goes on without damaged images
        has fewer samples than before, and starts again."""
        return np.stack([*(row for row in self.history if len(row) == len(loss)), loss])

    def divide(
        self,
        loss: NDArray[np.float32],
        prediction: NDArray[np.int64] | None = None,
        truly_clean: NDArray[np.bool_] | None = None,
        random_state: int = 0,
        labels: NDArray[np.int64] | None = None,
        name: str = "net",
    ) -> Division | None:
        """Divide by the losses in the window, of which this epoch's (N,) are the last, and keep them for later epochs.
        labels (N,): the given ones, for the division by class. -> None, with a warning, where no sample is clean: the
        network that would learn from it then trains one more warm-up epoch. Raises as `codivide`."""
        losses = self.in_window(loss)
        given = labels if self.division == "per_class" else None
        division = codivide(losses, self.threshold, self.window, truly_clean, random_state, prediction, given)
        self.history = [*losses[-self.rows :]] if self.rows else []
        if division.fallback and "fallback" not in self.warned:
            self.warned.add("fallback")
            shown = ", ".join(map(str, division.fallback[:10])) + (", ..." if len(division.fallback) > 10 else "")
            reason = f"too few samples (under {MIN_CLASS_SIZE}), or no clear second group of losses"
            warn(f"{name}: classes with {reason}: {shown}; the mixture of all samples divides them")
        if not division.labeled.any():
            warn(f"{name} finds no sample clean with p > {self.threshold:g}: its peer gets one more warm-up epoch")
            return None
        if division.labeled.all():
            warn(f"{name} finds every sample clean: no unlabeled images this epoch")
        return division
