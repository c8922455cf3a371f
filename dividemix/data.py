"""Small image sets that live on the device (the CIFAR family): all of a phase's draws first, then batches of indices.

The engine asks a data set for its length, its `device` and these, and a streaming data set can answer as well:

    warmup_batches(batch_size, rng)              -> batches;  warmup_views(*batch)   -> x, labels
    mixmatch_batches(division, batch_size, rng)  -> batches;  mixmatch_views(*batch) -> x1, x2, labels, w, u1, u2
    eval_batches(batch_size)                     -> (x, labels) in the order of the samples

A batch is a tuple of device tensors whose first members are the index of the labeled rows and (mixmatch) of the
unlabeled. `*_views` is pure device work without a host synchronisation. Everything random comes from the host's numpy
generator `rng`, so the draws do not depend on the device.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dividemix import augment
from dividemix.codivide import Division

Batch = tuple[Tensor, ...]


class DeviceImages:
    """N images with labels (the given ones, for training), uint8 on `device`.

    images uint8 (N, H, W, 3), labels int64 (N,), mean and std of pixel values in [0, 1] (3,), flip: whether views are
    flipped.
    """

    def __init__(
        self, images: NDArray, labels: NDArray, mean: tuple, std: tuple, flip: bool, device: torch.device | str = "cpu"
    ):
        self.device = torch.device(device)
        self.padded = augment.pad_images(torch.from_numpy(images).to(self.device))
        self.labels = torch.from_numpy(labels).to(self.device)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device)
        self.std = torch.tensor(std, dtype=torch.float32, device=self.device)
        self.flip = flip

    def __len__(self) -> int:
        return len(self.labels)

    def warmup_batches(self, batch_size: int, rng: np.random.Generator) -> list[Batch]:
        """One pass over all samples in a new order: (index, crops) a batch, the partial last one kept."""
        index = split(rng.permutation(len(self)), batch_size)
        return self._to_device(index, [augment.draw_crops(rng, len(rows), self.flip) for rows in index])

    def warmup_views(self, index: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
        """One augmented view (B, 3, H, W) and the given labels (B,)."""
        return self._views(index, crops), self.labels[index]

    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> list[Batch]:
        """One pass over the labeled set: (labeled index, unlabeled index, crops, w) a batch.

        The unlabeled set is run through alongside and reshuffled when it ends; both keep their partial last batch, so a
        short unlabeled batch also occurs in mid-epoch. An empty unlabeled set gives empty indices.
        """
        labeled = split(rng.permutation(np.flatnonzero(division.labeled)), batch_size)
        unlabeled_set = np.flatnonzero(~division.labeled)
        unlabeled: list[NDArray] = [] if len(unlabeled_set) else [unlabeled_set] * len(labeled)
        while len(unlabeled) < len(labeled):
            unlabeled += split(rng.permutation(unlabeled_set), batch_size)
        unlabeled = unlabeled[: len(labeled)]
        rows = [2 * (len(x) + len(u)) for x, u in zip(labeled, unlabeled, strict=True)]  # two views of each
        crops = [augment.draw_crops(rng, n, self.flip) for n in rows]
        w = [division.clean_probability[x].astype(np.float32) for x in labeled]
        return self._to_device(labeled, unlabeled, crops, w)

    def mixmatch_views(
        self, labeled: Tensor, unlabeled: Tensor, crops: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x1, x2, labels, w, u1, u2: two independent views of each image, gathered in one go."""
        views = self._views(torch.cat([labeled, labeled, unlabeled, unlabeled]), crops)
        x1, x2, u1, u2 = views.split([len(labeled)] * 2 + [len(unlabeled)] * 2)
        return x1, x2, self.labels[labeled], w, u1, u2

    def eval_batches(self, batch_size: int) -> "EvalBatches":
        """All images in order, without augmentation."""
        return EvalBatches(self, batch_size)

    def _views(self, index: Tensor, crops: Tensor) -> Tensor:
        return augment.to_float(augment.crop_flip(self.padded, index, crops), self.mean, self.std)

    def _to_device(self, *columns: list[NDArray]) -> list[Batch]:
        """Columns of per-batch arrays -> batches of tensors, one transfer a column."""
        moved = []
        for column in columns:
            whole = torch.from_numpy(np.concatenate(column)).to(self.device)
            moved.append(whole.split([len(part) for part in column]))
        return list(zip(*moved, strict=True))


class EvalBatches:
    """(x, labels) slices of a `DeviceImages`, made as they are asked for."""

    def __init__(self, data: DeviceImages, batch_size: int):
        self.data, self.batch_size = data, batch_size

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __iter__(self):
        images = augment.centre(self.data.padded)
        for x, labels in zip(images.split(self.batch_size), self.data.labels.split(self.batch_size), strict=True):
            yield augment.to_float(x, self.data.mean, self.data.std), labels


def split(index: NDArray, batch_size: int) -> list[NDArray]:
    """Consecutive batches of an index (N,), the last one partial; none of an empty index."""
    return [index[start : start + batch_size] for start in range(0, len(index), batch_size)]
