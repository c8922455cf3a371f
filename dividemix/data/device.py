"""Small image sets that live on the device (the CIFAR family). A phase makes all its draws first, then batches of
indices.

Images are kept as uint8, already padded with zeros. The crops of a batch are one gather by computed indices, without a
Python loop or a host synchronisation. The memory order is channels last, so views are channels_last tensors for free.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dividemix.codivide import Division
from dividemix.data import autoaugment
from dividemix.runtime import ALONE, Batches, Ranks, Runtime

PAD = 4  # black pixels on each side, before normalisation, of images of 28 pixels or more
Batch = tuple[Tensor, ...]


class DeviceImages:
    """N images with labels (the given labels, for training), uint8 on the runtime's device.

    images uint8 (N, H, W, 3); labels int64 (N,); mean and std (3,) of pixel values in [0, 1]; flip: whether half of the
    training views are mirrored; truly_clean bool (N,): which labels are right, where it is known; strong: whether
    `mixmatch_views` gives strong views, too: crop, flip and AutoAugment's policy.
    """

    def __init__(
        self,
        images: NDArray,
        labels: NDArray,
        mean: tuple,
        std: tuple,
        flip: bool,
        runtime: Runtime | None = None,
        truly_clean: NDArray[np.bool_] | None = None,
        strong: bool = False,
    ):
        runtime = runtime or Runtime()
        self.runtime, self.truly_clean, self.flip, self.strong = runtime, truly_clean, flip, strong
        self.pad = min(PAD, min(images.shape[1:3]) // 7)  # a crop of a smaller image would lose too much of it
        self.padded = pad_images(torch.from_numpy(images).to(runtime.device), self.pad)
        self.labels = torch.from_numpy(labels).to(runtime.device)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=runtime.device)
        self.std = torch.tensor(std, dtype=torch.float32, device=runtime.device)

    @property
    def given_labels(self) -> NDArray[np.int64]:
        return self.labels.cpu().numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def warmup_batches(self, batch_size: int, rng: np.random.Generator) -> Batches:
        """One pass over all samples in a new order, with the partial last batch: (index, crops) a batch."""
        index = plan_warmup(len(self), batch_size, rng)
        return self._batches([index], [self._draw(rng, len(rows)) for rows in index])

    def warmup_views(self, index: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
        """One augmented view (B, 3, H, W) and the given labels (B,)."""
        return self._views(index, crops), self.labels[index]

    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> Batches:
        """One pass over the labeled set: (labeled index, unlabeled index, crops, w) a batch; see `plan_mixmatch`. For
        strong views their crops and operations follow, drawn apart: all other draws are those of weak views alone."""
        labeled, unlabeled = plan_mixmatch(division, batch_size, rng)
        crops = [self._draw(rng, 2 * (len(x) + len(u))) for x, u in zip(labeled, unlabeled, strict=True)]
        w = [division.clean_probability[x].astype(np.float32) for x in labeled]
        if not self.strong:
            return self._batches([labeled, unlabeled], crops, w)
        [rng], (height, width) = rng.spawn(1), centre(self.padded, self.pad).shape[1:3]
        strong_crops = [self._draw(rng, len(rows)) for rows in crops]
        operations = [autoaugment.draw(rng, len(rows), height, width) for rows in crops]
        return self._batches([labeled, unlabeled], crops, w, strong_crops, operations)

    def mixmatch_views(
        self, labeled: Tensor, unlabeled: Tensor, crops: Tensor, w: Tensor, *strong: Tensor
    ) -> tuple[Tensor, ...]:
        """x1, x2, labels, w, u1, u2: two independent views of each image, all by one gather. With `strong`, its crops
        and operations, two strong views of each follow: x3, x4, u3, u4."""
        index, sizes = torch.cat([labeled, labeled, unlabeled, unlabeled]), [len(labeled)] * 2 + [len(unlabeled)] * 2
        x1, x2, u1, u2 = self._views(index, crops).split(sizes)
        weak = x1, x2, self.labels[labeled], w, u1, u2
        if not strong:
            return weak
        strong_crops, operations = strong
        views = autoaugment.augment(crop_flip(self.padded, index, strong_crops, self.pad), operations)
        return *weak, *to_float(views, self.mean, self.std).split(sizes)

    def eval_batches(self, batch_size: int) -> Batches:
        """(x, labels) of all images in order, without augmentation, each batch made when it is needed."""
        images, labels = centre(self.padded, self.pad).split(batch_size), self.labels.split(batch_size)
        batches = ((to_float(x, self.mean, self.std), y) for x, y in zip(images, labels, strict=True))
        return Batches([(len(y),) for y in labels], batches)

    def originals(self, rows: NDArray) -> Iterator[NDArray[np.uint8]]:
        """The images `rows` (M,) without padding, uint8 (H, W, 3) each."""
        return iter(centre(self.padded, self.pad)[torch.from_numpy(rows).to(self.runtime.device)].cpu().numpy())

    def _draw(self, rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
        return draw_crops(rng, n, self.flip, self.pad)

    def _views(self, index: Tensor, crops: Tensor) -> Tensor:
        return to_float(crop_flip(self.padded, index, crops, self.pad), self.mean, self.std)

    def _batches(self, indices: list[list[NDArray]], *columns: list[NDArray]) -> Batches:
        """Batches from columns, lists of one array a batch: `indices`, whose rows are counted, then the others."""
        sizes = [tuple(map(len, batch)) for batch in zip(*indices, strict=True)]
        moved = [to_device(column, self.runtime.device) for column in (*indices, *columns)]
        return Batches(sizes, list(zip(*moved, strict=True)))


def to_device(arrays: list[NDArray], device: torch.device) -> tuple[Tensor, ...]:
    """One array per batch -> one tensor per batch on the device, by one transfer."""
    joined = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0)
    return joined.to(device).split([len(array) for array in arrays])


# ---- Views of small images on their device ----


def pad_images(images: Tensor, pad: int = PAD) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, H + 2 * pad, W + 2 * pad, 3), with a black border."""
    return torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))


def draw_crops(rng: np.random.Generator, n: int, flip: bool, pad: int = PAD) -> NDArray[np.uint8]:
    """(n, 3) independent draws: top and left offset, uniform in 0..2 * pad, and flip, 0 or 1 (without `flip` 0)."""
    return rng.integers(0, [2 * pad + 1, 2 * pad + 1, 2 if flip else 1], size=(n, 3), dtype=np.uint8)


def crop_flip(padded: Tensor, index: Tensor, crops: Tensor, pad: int = PAD) -> Tensor:
    """Cuts view b from image index[b]: padded uint8 (N, H', W', 3), index (B,), crops (B, 3) -> uint8 (B, H, W, 3)."""
    height, width = padded.shape[1] - 2 * pad, padded.shape[2] - 2 * pad
    top, left, flip = crops.long().unsqueeze(2).unbind(1)  # (B, 1) each
    rows = top + torch.arange(height, device=padded.device)  # (B, H)
    columns = torch.arange(width, device=padded.device)
    columns = left + torch.where(flip == 1, columns.flip(0), columns)  # (B, W)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def centre(padded: Tensor, pad: int = PAD) -> Tensor:
    """The images without their padding, not copied: (N, H', W', 3) -> (N, H, W, 3)."""
    return padded[:, pad : padded.shape[1] - pad, pad : padded.shape[2] - pad]


def to_float(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), (pixel / 255 - mean) / std with mean, std (3,)."""
    # In place, and over rows of W * 3 numbers instead of 3: a third of the time on a CPU, with the same bits.
    rows, width = images.flatten(2).to(torch.float32), images.shape[2]
    rows.div_(255).sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)


# ---- Which samples are in which batch, of all ranks together ----


def plan_warmup(n: int, batch_size: int, rng: np.random.Generator, ranks: Ranks = ALONE) -> list[NDArray]:
    """One pass over n samples in a new order, with the partial last batch, padded for the ranks."""
    return [ranks.pad_to_world(rows) for rows in in_batches(rng.permutation(n), batch_size)]


def plan_mixmatch(
    division: Division, batch_size: int, rng: np.random.Generator, ranks: Ranks = ALONE
) -> tuple[list[NDArray], list[NDArray]]:
    """One pass over the labeled set: the labeled and the unlabeled index of each batch.

    The unlabeled set runs alongside and is reshuffled when it ends. Both keep their partial last batch, so a short
    unlabeled batch also occurs in mid-epoch. An empty unlabeled set gives empty indices. Batches are padded for the
    ranks.
    """
    labeled = in_batches(rng.permutation(np.flatnonzero(division.labeled)), batch_size)
    unlabeled_set = np.flatnonzero(~division.labeled)
    unlabeled: list[NDArray] = [] if len(unlabeled_set) else [unlabeled_set] * len(labeled)
    while len(unlabeled) < len(labeled):
        unlabeled += in_batches(rng.permutation(unlabeled_set), batch_size)
    return [ranks.pad_to_world(x) for x in labeled], [ranks.pad_to_world(u) for u in unlabeled[: len(labeled)]]


def in_batches(index: NDArray, batch_size: int) -> list[NDArray]:
    """Consecutive batches of an index (N,), the last one partial; no batches of an empty index."""
    return [index[start : start + batch_size] for start in range(0, len(index), batch_size)]
