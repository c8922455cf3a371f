"""After the last epoch: what both networks say of every training label, and small copies of the most doubtful images.

One pass over the whole training set, in eval mode and without augmentation, as before a division; then a mixture for
each network, fitted as the next epoch's would be. label_scores.npz and thumbnails.npz are what the report lists from.
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
from dividemix.run.folder import arrays, load
from dividemix.seeds import draws

THUMBNAILS, SIDE = 48, 96  # how many images are kept for the report, and the longer side of each at most


def is_scored(folder: Path, epochs: int, index: NDArray) -> bool:
    """Whether the folder has the scores of these samples after so many epochs."""
    try:
        scores = load(folder / "label_scores.npz", arrays, {})
    except DivideMixError:  # damaged: it is written anew
        return False
    return scores.get("epochs") == epochs and np.array_equal(scores["index"], index)


def clean_probabilities(
    scores: dict[str, NDArray], mixtures: Sequence[Mixture], seed: int, epochs: int
) -> dict[str, NDArray[np.float64]]:
    """p_clean_net1 and, of two networks, p_clean_net2: what a further epoch would divide by."""
    probabilities = {}
    for k, mixture in enumerate(mixtures):
        random_state = int(draws(seed, "divide", epochs, k).integers(2**32))
        losses = np.stack([*mixture.history, scores[f"loss_net{k + 1}"]])
        probabilities[f"p_clean_net{k + 1}"] = clean_probability(losses, mixture.window, random_state)
    return probabilities


def write(folder: Path, data: DataSet, scores: dict[str, NDArray], given: NDArray) -> None:
    """Write label_scores.npz and the images of the worst of the labels `given` (N,) of `data`."""
    rows = worst_first(*label_quality(scores, given))[:THUMBNAILS]
    try:
        pixels, sizes = thumbnails(data.originals(rows))
        write_arrays(folder / "thumbnails.npz", {"index": scores["index"][rows], "pixels": pixels, "sizes": sizes})
    except Exception as error:  # pictures for people: the scores do not depend on them
        warn(f"the report shows no images: {error}")
    write_arrays(folder / "label_scores.npz", scores)  # last: where it is, nothing is done again


@torch.no_grad()
def ensemble_scores(nets: Sequence[nn.Module], data: DataSet, phase: Phase) -> dict[str, NDArray]:
    """Of all N samples, (N,) each: loss_net1, loss_net2, the cross-entropy against the given label, as
    `engine.per_sample_loss` has it; and of both networks together, whose logits are summed, their prediction, its
    probability (confidence) and that of the given label (p_given)."""
    for net in nets:
        net.eval()

    def score(forward: Callable[..., list[Tensor]], x: Tensor, labels: Tensor) -> Tensor:
        logits = [of_net for net in nets for of_net in forward(net, x)]
        both = sum(logits)
        p, prediction = both.softmax(dim=1), both.argmax(dim=1, keepdim=True)
        chosen = [p.gather(1, prediction)[:, 0], p.gather(1, labels[:, None])[:, 0]]
        losses = [F.cross_entropy(of_net, labels, reduction="none") for of_net in logits]
        return torch.stack([*losses, prediction[:, 0].float(), *chosen])

    names = [*(f"loss_net{k + 1}" for k in range(len(nets))), "prediction", "confidence", "p_given"]
    scores = torch.zeros(len(names), len(data), device=data.runtime.device)
    with phase:
        for rows, values in evaluate(score, data, phase.bar):
            scores[:, rows] = values
        table = dict(zip(names, data.runtime.ranks.sum(scores).cpu().numpy(), strict=True))
    return table | {"prediction": table["prediction"].astype(np.int32)}


def label_quality(scores: dict[str, NDArray], given: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Quality, is_issue and mean loss of each label, from the arrays of label_scores.npz. Quality: the mean clean
    probability of the networks; of a cross-entropy run the probability that both together give the label. An issue is
    of a quality below the run's p_threshold, and the networks suggest another class."""
    p_clean, losses = of_nets(scores, "p_clean"), of_nets(scores, "loss")
    quality = sum(p_clean) / len(p_clean) if p_clean else scores["p_given"].astype(np.float64)
    return quality, (quality < scores["threshold"]) & (scores["prediction"] != given), sum(losses) / len(losses)


def of_nets(scores: dict[str, NDArray], name: str) -> list[NDArray]:
    """Net 1's and net 2's arrays, those that are there."""
    return [scores[f"{name}_net{k}"] for k in (1, 2) if f"{name}_net{k}" in scores]


def worst_first(quality: NDArray, is_issue: NDArray, loss: NDArray) -> NDArray[np.int64]:
    """The rows in the order in which they are worth a look: issues before others, then by quality, then by loss."""
    return np.lexsort((-loss, quality, ~is_issue))


def thumbnails(images: Iterable[NDArray[np.uint8]], side: int = SIDE) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Small copies of M images (H, W, 3), `side` pixels at most: pixels (M, h, w, 3), each in the upper left of a black
    rectangle as large as the largest, and sizes (M, 2), height and width. Images that fit are not made larger."""
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
