"""After the last epoch: what both networks say of every training label, and small copies of the most doubtful images.

One pass over the whole training set, in eval mode and without augmentation, as before a division; then a mixture for
each network, fitted as the next epoch's would be. label_scores.npz and thumbnails.npz are all that the report and
`label_issues` need to name the doubtful labels.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dividemix import warn
from dividemix.checkpoint import write_atomically
from dividemix.codivide import Mixture, clean_probability
from dividemix.engine import DataSet, Phase, evaluate
from dividemix.label_issues import judge, worst_first
from dividemix.runfolder import arrays
from dividemix.seeds import draws

if TYPE_CHECKING:
    from dividemix.run import Run

THUMBNAILS, SIDE = 48, 96  # how many images are kept for the report, and the longer side of each at most
NOTHING = "no list of doubtful labels, but the run is saved, and the same command tries again: {}"


def score_labels(run: "Run", data: DataSet) -> None:
    """Write label_scores.npz and thumbnails.npz of a run that has come to its end, unless they are there already.

    data: the training set, in the order of the index that the run's labels have. Cross-entropy has no clean
    probabilities. Every rank comes here; the first writes. A failure is a warning, since the run is saved and the same
    command does this again; but in the pass over the data of several ranks, which wait for each other, it is raised.
    """
    epochs, ranks = len(run.records), run.ranks
    if ranks.from_first(lambda: is_scored(run.folder, epochs, run.labels["index"])):
        return
    run.say(f"scoring all {len(data)} training labels with the final networks")
    try:
        scores = ensemble_scores(run.nets, data, run.phase("labels"))
    except Exception as error:
        if ranks.world > 1:
            raise
        return warn(NOTHING.format(error))
    if not ranks.first:
        return
    try:
        if run.mixmatch.warm_up != np.inf:
            scores |= clean_probabilities(scores, run.mixtures, run.args.seed, epochs)
        scores |= {"threshold": np.float64(run.mixtures[0].threshold), "epochs": np.int64(epochs)}
        scores |= {"index": run.labels["index"]}
        save_thumbnails(run, data, worst_first(*judge(scores, run.labels["given"]))[:THUMBNAILS])
        save(run.folder / "label_scores.npz", scores)  # last: where it is, nothing is done again
    except Exception as error:
        warn(NOTHING.format(error))


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


def save_thumbnails(run: "Run", data: DataSet, rows: NDArray[np.int64]) -> None:
    try:
        pixels, sizes = thumbnails(data.originals(rows))
        save(run.folder / "thumbnails.npz", {"index": run.labels["index"][rows], "pixels": pixels, "sizes": sizes})
    except Exception as error:  # pictures for people: the scores do not depend on them
        warn(f"the report shows no images: {error}")


def is_scored(folder: Path, epochs: int, index: NDArray) -> bool:
    """Whether the folder has the scores of these samples after so many epochs."""
    scores = arrays(folder / "label_scores.npz")
    return scores.get("epochs") == epochs and np.array_equal(scores.get("index"), index)


def save(path: Path, content: dict[str, NDArray]) -> None:
    file = io.BytesIO()
    np.savez(file, **content)
    write_atomically(path, file.getbuffer())


@torch.no_grad()
def ensemble_scores(nets: Sequence[nn.Module], data: DataSet, phase: Phase | None = None) -> dict[str, NDArray]:
    """Of all N samples, (N,) each: loss_net1, loss_net2, the cross-entropy against the given label, as
    `engine.per_sample_loss` has it; and of both networks together, whose logits are summed, their prediction, its
    probability (confidence) and that of the given label (p_given)."""
    for net in nets:
        net.eval()

    def score(forward: Callable[..., list[Tensor]], x: Tensor, labels: Tensor) -> Tensor:
        logits = [each for net in nets for each in forward(net, x)]
        both = sum(logits)
        p, prediction = both.softmax(dim=1), both.argmax(dim=1, keepdim=True)
        chosen = [p.gather(1, prediction)[:, 0], p.gather(1, labels[:, None])[:, 0]]
        losses = [F.cross_entropy(each, labels, reduction="none") for each in logits]
        return torch.stack([*losses, prediction[:, 0].float(), *chosen])

    names = [*(f"loss_net{k + 1}" for k in range(len(nets))), "prediction", "confidence", "p_given"]
    scores = torch.zeros(len(names), len(data), device=data.runtime.device)
    with phase or Phase() as phase:
        for rows, values in evaluate(score, data, phase.bar):
            scores[:, rows] = values
        table = dict(zip(names, data.runtime.ranks.sum(scores).cpu().numpy(), strict=True))
    return table | {"prediction": table["prediction"].astype(np.int32)}


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
