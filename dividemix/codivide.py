"""Co-divide: per-sample losses -> a two-component Gaussian mixture -> labeled and unlabeled set (paper, Sec. 3.1)."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dividemix import Diverged, DivideMixError, warn

FIT_LIMIT = 1_000_000  # losses that a mixture is fitted to at most: more cost time and change next to nothing

# Stopping early is part of the method. Not in `fit_gmm`: it may run in a thread, where catching them is not safe.
warnings.filterwarnings("ignore", category=UserWarning, module=r"sklearn\.mixture")


@dataclass(frozen=True)
class Division:
    """What one network's losses say of N samples.

    clean_probability (N,) float64; labeled (N,) bool, True where clean_probability > threshold; loss (N,) float32, the
    normalised loss that the mixture was fitted to; means, variances, weights (2,) of the mixture, the clean component
    first; auc of clean_probability against the truth, None where it is unknown or undefined (one kind only). raw_loss
    (N,) float32 and prediction (N,) int64: the losses as they were scored, and the class that the network predicts.
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

    def precision_recall(self, truly_clean: NDArray[np.bool_]) -> tuple[float | None, float | None]:
        """Of the labeled set as "these labels are right", against the truth (N,): which part of it is right, and which
        part of the right labels is in it. None where there are none to take a part of."""
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
    """What the mixture is fitted to: (N,) raw losses or an (E, N) history -> (N,). Each row is normalised by itself.
    The last `window` rows (fewer while fewer exist) are averaged, which is not normalised again. The paper uses 5 at
    90 % noise, where a single epoch's losses vary much."""
    history = np.atleast_2d(np.asarray(losses))[-window:]
    return normalise(history).mean(axis=0)


def fit_gmm(loss: NDArray, random_state: int = 0) -> Any:
    """The authors' mixture of a normalised loss (N,). Its few EM steps make the k-means initialisation part of the
    method. Unlike theirs, it is fitted to FIT_LIMIT losses at most, drawn without replacement; `benchmarks/RESULTS.md`
    shows what that changes."""
    from sklearn.mixture import GaussianMixture  # slow to import

    if len(loss) > FIT_LIMIT:
        loss = np.random.default_rng(random_state).choice(loss, FIT_LIMIT, replace=False)
    gmm = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=random_state)
    return gmm.fit(loss.reshape(-1, 1))


def clean_probability(losses: ArrayLike, window: int = 1, random_state: int = 0) -> NDArray[np.float64]:
    """Posterior of the mixture's component with the smaller mean: raw losses (N,) or history (E, N) -> (N,) float64.
    Raises as `codivide`."""
    return codivide(losses, 0.5, window, random_state=random_state).clean_probability


def codivide(
    losses: ArrayLike,
    threshold: float,
    window: int = 1,
    truly_clean: NDArray[np.bool_] | None = None,
    random_state: int = 0,
    prediction: NDArray[np.int64] | None = None,
) -> Division:
    """Divide the N samples of one network's raw losses, (N,) or history (E, N), at clean probability `threshold`.

    truly_clean (N,), where it is known, is used for nothing but the AUC. Raises DivideMixError as `normalise` does, and
    for fewer than two samples.
    """
    history = np.atleast_2d(np.asarray(losses))
    loss = smoothed(history, window)
    if loss.size < 2:
        raise DivideMixError(f"co-divide needs at least 2 training samples, got {loss.size}")
    gmm = fit_gmm(loss, random_state)
    order = np.argsort(gmm.means_.ravel())  # the clean component first
    probability = gmm.predict_proba(loss.reshape(-1, 1))[:, order[0]]
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
    )


def auc(probability: NDArray, truly_clean: NDArray[np.bool_] | None) -> float | None:
    """Area under the ROC curve of clean probability (N,) against the truth; None if unknown or all of one kind."""
    if truly_clean is None or truly_clean.all() or not truly_clean.any():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truly_clean, probability))


class Mixture:
    """One network's mixture through the epochs. It keeps the losses that the next epoch's window averages."""

    def __init__(self, threshold: float, window: int = 1, largest_window: int = 1):
        """threshold and window may be set anew between two epochs; largest_window: the most that `window` will be."""
        self.threshold, self.window = threshold, window
        self.rows = max(window, largest_window) - 1
        self.history: list[NDArray[np.float32]] = []  # raw losses of the last `rows` divided epochs, (N,) each

    def divide(
        self,
        loss: NDArray[np.float32],
        prediction: NDArray[np.int64] | None = None,
        truly_clean: NDArray[np.bool_] | None = None,
        random_state: int = 0,
        name: str = "net",
    ) -> Division | None:
        """The division by the window's losses with this epoch's (N,) as the last, which are kept for the next epochs.
        None, with a warning, where no sample is clean: the network that would learn from it warms up once more. Raises
        as `codivide`."""
        losses = [*self.history, loss]
        division = codivide(np.stack(losses), self.threshold, self.window, truly_clean, random_state, prediction)
        self.history = losses[-self.rows :] if self.rows else []
        if not division.labeled.any():
            warn(f"{name} finds no sample clean with p > {self.threshold:g}: its peer gets one more warm-up epoch")
            return None
        if division.labeled.all():
            warn(f"{name} finds every sample clean: no unlabeled images this epoch")
        return division
