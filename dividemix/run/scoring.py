"""After the last epoch: score every training label with both networks, and copy the most doubtful images.

One pass over the training set, in eval mode and without augmentation, as before a division; then a mixture is fitted
for each network, as in a further epoch. The probabilities of the samples are those that `co_divide` averaged. Samples
that were held out, and all samples where nothing was averaged, have those of the final networks. The report reads the
results, label_scores.npz and thumbnails.npz.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dividemix import DivideMixError, warn
from dividemix.codivide import Mixture, clean_probability
from dividemix.data import HALF_FROM, FeatureSet
from dividemix.engine import DataSet, Phase
from dividemix.files import write_arrays
from dividemix.run.folder import RunFolder, load, parse_arrays
from dividemix.run.label_quality import LabelQuality, label_quality, list_equal_images
from dividemix.runtime import evaluate_rows
from dividemix.seeds import draws

THUMBNAILS, SIDE = 2_000, 96  # small images in the run folder; their longer side in pixels, at most
BORDER = 12  # labels on each side of the end of the list that count as borderline
# A list means nothing where accuracy is no more than this share of the way from guessing the largest class to 1, or
# where the networks' divisions agree by less than this (Cohen's kappa). Measured: see RESULTS.md. With
# fewer samples than _FEWEST these are chance.
_LITTLE_SKILL, _LITTLE_AGREEMENT, _FEWEST = 0.1, 0.25, 50
# Nor where the nearest neighbours of the features, or networks without a validation set, agree with the given labels by
# less than this (kappa), or by no more than two standard errors of random labels. Neighbours of 200 to 1,797 digits:
# random labels or features within 0.06 of 0; with 50 % of the labels drawn anew 0.3 to 0.5, with 80 % 0 to 0.14.
_LITTLE_LABELS, _CHECKED = 0.05, 5_000  # kappa; samples of the check by neighbours: it takes about a second


@dataclass
class MeanProbabilities:
    """The probabilities of N samples, averaged over all scoring passes of both networks so far. The label list is made
    from them: what single networks have memorised counts less."""

    mean: Tensor | None = None  # (N, C) on the device, float16 above 1 GB; None before the first pass
    count: int = 0  # passes in it

    def add(self, probability: Tensor) -> None:
        if self.mean is None or self.mean.shape != probability.shape:  # the run goes on without damaged images
            self.count = 0
            dtype = torch.float16 if probability.nbytes > HALF_FROM else torch.float32
            self.mean = torch.zeros_like(probability, dtype=dtype)
        self.count += 1
        self.mean += (probability - self.mean) / self.count


def is_scored(folder: Path, epochs: int, index: NDArray) -> bool:
    """Whether the folder has the scores of the samples `index` (N,), in any order, after so many epochs."""
    try:
        scores = load(folder / "label_scores.npz", parse_arrays, {})
    except DivideMixError:  # damaged: it is written again
        return False
    return scores.get("epochs") == epochs and np.array_equal(scores["index"], np.sort(index))


@torch.no_grad()
def ensemble_scores(nets: Sequence[nn.Module], data: DataSet, phase: Phase) -> dict[str, NDArray]:
    """Scores of all N samples. loss_net1, loss_net2 (N,): the cross-entropy with the given label, as in
    `engine.per_sample_loss`; probabilities (N, C): from the sum of both networks' logits."""
    for net in nets:
        net.eval()

    def score(forward: Callable[..., list[Tensor]], x: Tensor, labels: Tensor) -> Tensor:
        logits = torch.stack([net_logits for net in nets for net_logits in forward(net, x)])  # (nets, B, C)
        losses = [F.cross_entropy(net_logits, labels, reduction="none") for net_logits in logits]
        return torch.cat([torch.stack(losses, dim=1), logits.sum(dim=0).softmax(dim=1)], dim=1)

    with phase:
        scores = evaluate_rows(score, data, phase.bar).cpu().numpy()
    losses = {f"loss_net{k + 1}": scores[:, k] for k in range(len(nets))}
    return losses | {"probabilities": scores[:, len(nets) :]}


def clean_probabilities(
    scores: dict[str, NDArray],
    mixtures: Sequence[Mixture],
    seed: int,
    epochs: int,
    given_labels: NDArray,
    averaged: bool = False,
) -> dict[str, NDArray[np.float64]]:
    """p_clean_net1 and p_clean_net2 (N,): the clean probabilities by which a further epoch would divide. averaged:
    whether the scores are of averaged weights; their losses are not mixed with those of earlier epochs, which are of
    the trained networks."""
    probabilities = {}
    for k, mixture in enumerate(mixtures):
        random_state = int(draws(seed, "divide", epochs, k).integers(2**32))
        loss = scores[f"loss_net{k + 1}"]
        losses = loss if averaged else mixture.in_window(loss)
        labels = given_labels if mixture.division == "per_class" else None
        probabilities[f"p_clean_net{k + 1}"] = clean_probability(losses, mixture.window, random_state, labels)
    return probabilities


def write(
    folder: Path,
    epochs: int,
    sets: Mapping[str, DataSet],
    scores: Sequence[dict],
    labels: dict,
    first_equal: NDArray | None = None,
) -> None:
    """Write label_scores.npz, its samples by rising index, and thumbnails.npz, the images with the worst labels and
    with the borderline ones.

    sets: the data sets to list, each under the name of its index in `labels` (see `Run.save_labels`): "index" and, if
    there are any, "held_out". scores: the arrays of each set; what the second lacks is NaN.
    first_equal (N,): `duplicates.first_equal` of the samples by rising index.
    """
    index = np.concatenate([labels[name] for name in sets])
    order = np.argsort(index)
    table = {"index": index[order], "held_out": np.repeat([*sets], [*map(len, sets.values())])[order] == "held_out"}
    for name in scores[0]:
        columns = [arrays.get(name, np.full(len(arrays["loss_net1"]), np.nan)) for arrays in scores]
        table[name] = np.concatenate(columns)[order]
    if first_equal is not None:
        table["duplicate_of"] = np.where(first_equal >= 0, table["index"][first_equal], -1)
    listed = quality_by_split(table, labels["list_given"])
    order = worst_first(listed.quality, listed.is_issue, table["held_out"])
    worst = doubtful(order, listed.is_issue)[:THUMBNAILS], borderline(order, listed.is_issue)
    worst = table["index"][np.concatenate(worst)]
    train, scalars = sets["index"], {"epochs": np.int64(epochs)}
    if not isinstance(train, FeatureSet) or train.images:  # else the report reads image files
        try:
            rows = {name: np.flatnonzero(np.isin(labels[name], worst)) for name in sets}
            files = [thumbnail(image) for name, data in sets.items() for image in data.originals(rows[name])]
            shown = np.concatenate([labels[name][rows[name]] for name in sets])
            content, ends = np.frombuffer(b"".join(files), np.uint8), np.cumsum([*map(len, files)])
            write_arrays(folder / "thumbnails.npz", {"index": shown, "content": content, "ends": ends})
        except Exception as error:  # the scores do not depend on the images
            warn(f"the report shows no images: {error}")
    if isinstance(train, FeatureSet):
        given = labels["list_given"][labels["index"]]
        scalars["neighbour_kappa"] = neighbour_kappa(train.features[0].float().cpu().numpy(), given)
    # Last, since `is_scored` asks for it
    write_arrays(folder / "label_scores.npz", table | scalars)


def neighbour_kappa(features: NDArray[np.float32], labels: NDArray[np.integer]) -> float:
    """How well labels (N,) agree with predictions by the nearest neighbours of the features (N, D): Cohen's kappa.
    Networks memorise random labels, too; a sample's neighbours show that they are random."""
    from sklearn.model_selection import KFold, cross_val_predict  # slow to import
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = np.random.default_rng(0).permutation(len(labels))[:_CHECKED]
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(min(10, len(rows) // 2)))
    folds = KFold(min(10, len(rows)), shuffle=True, random_state=0)
    return cohen_kappa(cross_val_predict(neighbours, features[rows], labels[rows], cv=folds), labels[rows])


def cohen_kappa(first: NDArray[np.integer], second: NDArray[np.integer]) -> float:
    """How far two classifications (N,) agree: 1 wholly, 0 as by chance."""
    num_class = int(max(first.max(), second.max())) + 1
    counts1, counts2 = np.bincount(first, minlength=num_class), np.bincount(second, minlength=num_class)
    by_chance = float(counts1 @ counts2) / len(first) ** 2
    return (float((first == second).mean()) - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0


def failures(run: RunFolder) -> list[str]:
    """Why a run's list of labels means nothing; [] for a usable one, and where there is none yet. Without a test and a
    validation set, networks that have memorised random labels are noticed by their features only."""
    scores = run.label_scores
    if not (scores and run.labels):
        return []
    given, reasons = run.labels["list_given"][scores["index"]], []
    probabilities, p_clean = scores["probabilities"], net_arrays(scores, "p_clean")
    by_chance = max(_LITTLE_LABELS, 2 / np.sqrt(min(len(given), _CHECKED) * (probabilities.shape[1] - 1)))  # kappa
    if name := run.measured:
        name, accuracy = name.removesuffix("_acc"), run.last_record[name] / 100
        largest = np.bincount(given).max() / len(given)
        if accuracy - largest <= _LITTLE_SKILL * (1 - largest) and run.data.get(name, _FEWEST) >= _FEWEST:
            better = f"the {name} accuracy, {accuracy:.1%}, is hardly better than that of guessing the largest class"
            reasons.append(f"the networks have not learned to tell the classes apart ({better}, {largest:.1%})")
    elif (kappa := cohen_kappa(probabilities.argmax(axis=1), given)) < by_chance:
        reasons.append(f"the networks agree with the labels hardly more than by chance (Cohen's kappa {kappa:.2f})")
    if (kappa := float(scores.get("neighbour_kappa", 1))) < by_chance:
        agree = f"predictions by the nearest neighbours agree with the labels hardly more than by chance ({kappa:.2f})"
        reasons.append(f"features and labels have little to do with each other; are they in the same order? {agree}")
    if len(p_clean) == 2:
        clean = [(p[~np.isnan(p)] > 0.5).astype(int) for p in p_clean]
        if (kappa := cohen_kappa(*clean)) < _LITTLE_AGREEMENT and len(clean[0]) >= _FEWEST:
            agree = f"they agree on {(clean[0] == clean[1]).mean():.1%} of the labels, Cohen's kappa {kappa:.2f}"
            reasons.append(f"the two networks hardly agree on which labels are clean ({agree})")
    return reasons


def quality_by_split(scores: dict[str, NDArray], list_given: NDArray) -> LabelQuality:
    """`label_quality` of all N samples of label_scores.npz, with the given labels of the whole list, and
    `list_equal_images`. Held-out samples are listed apart: the networks have not learned their labels, so their
    probabilities are of another kind."""
    labels, held_out = list_given[scores["index"]], scores["held_out"]
    n, columns, shares = len(labels), (np.zeros(len(labels)), np.zeros(len(labels), bool), labels.copy()), []
    for rows in (~held_out, held_out):
        if rows.any():
            *values, share, error = label_quality(scores["probabilities"][rows], labels[rows])
            for column, value in zip(columns, values, strict=True):
                column[rows] = value
            shares.append((rows.sum() / n * share, rows.sum() / n * error))
    if "duplicate_of" in scores:
        list_equal_images(*columns, scores["probabilities"], labels, scores["duplicate_of"])
    wrong_share, errors = np.sum(shares, axis=0)[0], [error for _, error in shares]
    return LabelQuality(*columns, float(wrong_share), float(np.linalg.norm(errors)))


def net_arrays(scores: dict[str, NDArray], name: str) -> list[NDArray]:
    """Net 1's and net 2's arrays <name>_net1, <name>_net2; only those that are in `scores`."""
    return [scores[f"{name}_net{k}"] for k in (1, 2) if f"{name}_net{k}" in scores]


def worst_first(quality: NDArray, is_issue: NDArray, held_out: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """The rows, most doubtful first: issues before others, then by rising quality. The quality of held-out samples is
    of another kind: with them, the worst tenth of each split comes first, and so on; but equal images with different
    labels, of quality 0, come first."""
    if held_out is not None:
        rank = rank_by_split(quality, is_issue, held_out) / np.where(held_out, held_out.sum(), (~held_out).sum())
        return np.lexsort((rank, quality > 0, ~is_issue))
    return np.lexsort((quality, ~is_issue))


def rank_by_split(quality: NDArray, is_issue: NDArray, held_out: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The place of each label (N,) among those of its split: 1 for the most doubtful."""
    rank = np.empty(len(quality), np.int64)
    for rows in map(np.flatnonzero, (~held_out, held_out)):
        rank[rows[worst_first(quality[rows], is_issue[rows])]] = np.arange(1, len(rows) + 1)
    return rank


def doubtful(order: NDArray[np.int64], is_issue: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rows to look at, of all rows with the most doubtful first: the issues, and a quarter as many, at least 50,
    that come next."""
    n = int(is_issue.sum())
    return order[: n + max(50, n // 4)]


def borderline(order: NDArray[np.int64], is_issue: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The last rows that are issues, and the first that are not."""
    n = int(is_issue.sum())
    return order[max(n - BORDER, 0) : n + BORDER]


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A small copy of an image (H, W, 3), at most SIDE pixels long, never enlarged, as a file: PNG where it is tiny,
    else JPEG."""
    image, content = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(content, "png" if max(image.size) <= SIDE // 2 else "jpeg", quality=80)
    return content.getvalue()
