"""After the last epoch: score every training label with both networks, and copy the most doubtful images.

One pass over the training set, in eval mode and without augmentation, as before a division; then a mixture is fitted
for each network, as in a further epoch. The report reads the results, label_scores.npz and thumbnails.npz.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dividemix import DivideMixError, warn
from dividemix.codivide import Mixture, clean_probability
from dividemix.engine import DataSet, Phase, evaluate
from dividemix.files import write_arrays
from dividemix.run.folder import load, parse_arrays
from dividemix.seeds import draws

THUMBNAILS, SIDE = 48, 96  # number of images for the report; their longer side in pixels, at most


def is_scored(folder: Path, epochs: int, index: NDArray) -> bool:
    """Whether the folder has the scores of the samples `index` (N,) after so many epochs."""
    try:
        scores = load(folder / "label_scores.npz", parse_arrays, {})
    except DivideMixError:  # damaged: it is written again
        return False
    return scores.get("epochs") == epochs and np.array_equal(scores["index"], index)


def clean_probabilities(
    scores: dict[str, NDArray], mixtures: Sequence[Mixture], seed: int, epochs: int, given_labels: NDArray
) -> dict[str, NDArray[np.float64]]:
    """p_clean_net1 and p_clean_net2 (N,): the clean probabilities by which a further epoch would divide."""
    probabilities = {}
    for k, mixture in enumerate(mixtures):
        random_state = int(draws(seed, "divide", epochs, k).integers(2**32))
        losses = np.stack([*mixture.history, scores[f"loss_net{k + 1}"]])
        labels = given_labels if mixture.division == "per_class" else None
        probabilities[f"p_clean_net{k + 1}"] = clean_probability(losses, mixture.window, random_state, labels)
    return probabilities


def write(folder: Path, data: DataSet, scores: dict[str, NDArray], given_labels: NDArray) -> None:
    """Write label_scores.npz and thumbnails.npz, the images of `data` with the worst of the given labels (N,)."""
    rows = worst_first(*label_quality(scores, given_labels))[:THUMBNAILS]
    try:
        pixels, sizes = thumbnails(data.originals(rows))
        write_arrays(folder / "thumbnails.npz", {"index": scores["index"][rows], "pixels": pixels, "sizes": sizes})
    except Exception as error:  # the scores do not depend on the images
        warn(f"the report shows no images: {error}")
    write_arrays(folder / "label_scores.npz", scores)  # last, since `is_scored` asks for it


@torch.no_grad()
def ensemble_scores(nets: Sequence[nn.Module], data: DataSet, phase: Phase) -> dict[str, NDArray]:
    """Scores of all N samples, (N,) each. loss_net1, loss_net2: the cross-entropy with the given label, as in
    `engine.per_sample_loss`. From the sum of both networks' logits: prediction, its probability (confidence), and the
    probability of the given label (p_given)."""
    for net in nets:
        net.eval()

    def score(forward: Callable[..., list[Tensor]], x: Tensor, labels: Tensor) -> Tensor:
        logits = [net_logits for net in nets for net_logits in forward(net, x)]
        ensemble = sum(logits)
        p, prediction = ensemble.softmax(dim=1), ensemble.argmax(dim=1, keepdim=True)
        confidence, p_given = p.gather(1, prediction)[:, 0], p.gather(1, labels[:, None])[:, 0]
        losses = [F.cross_entropy(net_logits, labels, reduction="none") for net_logits in logits]
        return torch.stack([*losses, prediction[:, 0].float(), confidence, p_given])

    names = [*(f"loss_net{k + 1}" for k in range(len(nets))), "prediction", "confidence", "p_given"]
    scores = torch.zeros(len(names), len(data), device=data.runtime.device)
    with phase:
        for rows, values in evaluate(score, data, phase.bar):
            scores[:, rows] = values
        table = dict(zip(names, data.runtime.ranks.sum(scores).cpu().numpy(), strict=True))
    return table | {"prediction": table["prediction"].astype(np.int32)}


def label_quality(scores: dict[str, NDArray], given_labels: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Quality, is_issue and mean loss of each of the given labels (N,), from the arrays of label_scores.npz. Quality:
    the networks' mean clean probability; after plain cross-entropy the label's probability (p_given). A label is an
    issue if its quality is below the run's p_threshold and the networks predict another class."""
    p_clean, losses = net_arrays(scores, "p_clean"), net_arrays(scores, "loss")
    quality = sum(p_clean) / len(p_clean) if p_clean else scores["p_given"].astype(np.float64)
    return quality, (quality < scores["threshold"]) & (scores["prediction"] != given_labels), sum(losses) / len(losses)


def net_arrays(scores: dict[str, NDArray], name: str) -> list[NDArray]:
    """Net 1's and net 2's arrays <name>_net1, <name>_net2; only those that are in `scores`."""
    return [scores[f"{name}_net{k}"] for k in (1, 2) if f"{name}_net{k}" in scores]


def worst_first(quality: NDArray, is_issue: NDArray, loss: NDArray) -> NDArray[np.int64]:
    """The rows, most doubtful first: issues before others, then by rising quality, then by falling loss."""
    return np.lexsort((-loss, quality, ~is_issue))


def thumbnails(images: Iterable[NDArray[np.uint8]], side: int = SIDE) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Small copies of M images (H, W, 3), at most `side` pixels long; never enlarged. -> pixels (M, h, w, 3), each copy
    in the upper left corner, the rest black; sizes (M, 2), their heights and widths"""
    small = []
    for pixels in images:
        image = Image.fromarray(pixels)
        image.thumbnail((side, side))
        small.append(np.asarray(image))
    sizes = np.array([image.shape[:2] for image in small], np.int32).reshape(-1, 2)
    frames = np.zeros((len(small), *sizes.max(axis=0, initial=1), 3), np.uint8)
    for frame, image in zip(frames, small, strict=True):
        frame[: image.shape[0], : image.shape[1]] = image
    return frames, sizes
