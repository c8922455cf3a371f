"""Small image sets that live on the device (the CIFAR family): all of a phase's draws first, then batches of indices.

train = DeviceImages(images, labels, mean, std, flip=True, runtime=runtime)         # an `engine.DataSet`
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dividemix import augment
from dividemix.codivide import Division
from dividemix.ranks import Ranks
from dividemix.runtime import Runtime

ALONE = Ranks()
Batch = tuple[Tensor, ...]


class Batches:
    """The batches of one phase with their sizes: one tuple of row counts per batch."""

    def __init__(self, sizes: list[tuple[int, ...]], batches: Iterable[Batch]):
        self.sizes, self.batches = sizes, batches

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class DeviceImages:
    """N images with labels (the given ones, for training), uint8 on the runtime's device.

    images uint8 (N, H, W, 3), labels int64 (N,), mean and std of pixel values in [0, 1] (3,), flip: whether views are
    flipped; truly_clean bool (N,), where it is known, says which labels are right.
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
    ):
        runtime = runtime or Runtime()
        self.runtime, self.truly_clean = runtime, truly_clean
        self.padded = augment.pad_images(torch.from_numpy(images).to(runtime.device))
        self.labels = torch.from_numpy(labels).to(runtime.device)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=runtime.device)
        self.std = torch.tensor(std, dtype=torch.float32, device=runtime.device)
        self.flip = flip

    def __len__(self) -> int:
        return len(self.labels)

    def warmup_batches(self, batch_size: int, rng: np.random.Generator) -> Batches:
        """One pass over all samples in a new order: (index, crops) a batch, the partial last one kept."""
        index = plan_warmup(len(self), batch_size, rng)
        return self._to_device(index, [self._crops(rng, len(rows)) for rows in index])

    def warmup_views(self, index: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
        """One augmented view (B, 3, H, W) and the given labels (B,)."""
        return self._views(index, crops), self.labels[index]

    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> Batches:
        """One pass over the labeled set: (labeled index, unlabeled index, crops, w) a batch; see `plan_mixmatch`."""
        labeled, unlabeled = plan_mixmatch(division, batch_size, rng)
        crops = [self._crops(rng, 2 * (len(x) + len(u))) for x, u in zip(labeled, unlabeled, strict=True)]
        w = [division.clean_probability[x].astype(np.float32) for x in labeled]
        return self._to_device(labeled, unlabeled, crops, w)

    def mixmatch_views(
        self, labeled: Tensor, unlabeled: Tensor, crops: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x1, x2, labels, w, u1, u2: two independent views of each image, gathered in one go."""
        views = self._views(torch.cat([labeled, labeled, unlabeled, unlabeled]), crops)
        x1, x2, u1, u2 = views.split([len(labeled)] * 2 + [len(unlabeled)] * 2)
        return x1, x2, self.labels[labeled], w, u1, u2

    def eval_batches(self, batch_size: int) -> Batches:
        """(x, labels) of all images in order, without augmentation, made as they are asked for."""
        images, starts = augment.centre(self.padded), range(0, len(self), batch_size)
        rows = [slice(start, min(start + batch_size, len(self))) for start in starts]
        batches = ((augment.to_float(images[part], self.mean, self.std), self.labels[part]) for part in rows)
        return Batches([(part.stop - part.start,) for part in rows], batches)

    def originals(self, rows: NDArray) -> Iterator[NDArray[np.uint8]]:
        """The images `rows` (M,) as they came, (H, W, 3) each."""
        return iter(augment.centre(self.padded)[torch.from_numpy(rows).to(self.runtime.device)].cpu().numpy())

    def _crops(self, rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
        return augment.draw_crops(rng, n, self.flip)

    def _views(self, index: Tensor, crops: Tensor) -> Tensor:
        return augment.to_float(augment.crop_flip(self.padded, index, crops), self.mean, self.std)

    def _to_device(self, *columns: list[NDArray]) -> Batches:
        """Columns of per-batch arrays -> batches of tensors, one transfer a column. The first columns hold indices."""
        moved = []
        for column in columns:
            whole = torch.from_numpy(np.concatenate(column)).to(self.runtime.device)
            moved.append(whole.split([len(part) for part in column]))
        indices = [column for column in columns if column[0].dtype == np.int64]
        sizes = [tuple(map(len, parts)) for parts in zip(*indices, strict=True)]
        return Batches(sizes, list(zip(*moved, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Which samples make up the batches, of all ranks together


def plan_warmup(n: int, batch_size: int, rng: np.random.Generator, ranks: Ranks = ALONE) -> list[NDArray]:
    """One pass over n samples in a new order, the partial last batch kept and filled up for the ranks."""
    return [ranks.fill(rows) for rows in split(rng.permutation(n), batch_size)]


def plan_mixmatch(
    division: Division, batch_size: int, rng: np.random.Generator, ranks: Ranks = ALONE
) -> tuple[list[NDArray], list[NDArray]]:
    """One pass over the labeled set: the labeled and the unlabeled index of each batch.

    The unlabeled set is run through alongside and reshuffled when it ends; both keep their partial last batch, so a
    short unlabeled batch also occurs in mid-epoch. An empty unlabeled set gives empty indices. Partial batches are
    filled up for the ranks.
    """
    labeled = split(rng.permutation(np.flatnonzero(division.labeled)), batch_size)
    unlabeled_set = np.flatnonzero(~division.labeled)
    unlabeled: list[NDArray] = [] if len(unlabeled_set) else [unlabeled_set] * len(labeled)
    while len(unlabeled) < len(labeled):
        unlabeled += split(rng.permutation(unlabeled_set), batch_size)
    return [ranks.fill(x) for x in labeled], [ranks.fill(u) for u in unlabeled[: len(labeled)]]


def split(index: NDArray, batch_size: int) -> list[NDArray]:
    """Consecutive batches of an index (N,), the last one partial; none of an empty index."""
    return [index[start : start + batch_size] for start in range(0, len(index), batch_size)]
