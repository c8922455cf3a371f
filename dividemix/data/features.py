"""Features in place of images: what a frozen network says of each image, stored once. Heads are trained on them."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dividemix import DivideMixError
from dividemix.data.device import DeviceImages
from dividemix.runtime import Batches, Runtime


class FeatureSet(DeviceImages):
    """N samples with labels (the given labels, for training) and V stored views of each, on the runtime's device.

    features (V, N, D) float32 or float16; labels int64 (N,); truly_clean bool (N,), where it is known. A training view
    is one of the V, drawn for each sample and step; evaluation takes the first.
    """

    def __init__(
        self,
        features: NDArray[np.floating],
        labels: NDArray[np.int64],
        runtime: Runtime | None = None,
        truly_clean: NDArray[np.bool_] | None = None,
    ):
        self.runtime, self.truly_clean = runtime or Runtime(), truly_clean
        self.features = torch.from_numpy(features).to(self.runtime.device)
        self.labels = torch.from_numpy(labels).to(self.runtime.device)

    @property
    def num_features(self) -> int:
        return self.features.shape[2]

    def eval_batches(self, batch_size: int) -> Batches:
        """(x, labels) of all samples in order, of their first views: x float32 (B, D)."""
        labels = self.labels.split(batch_size)
        batches = ((x.float(), y) for x, y in zip(self.features[0].split(batch_size), labels, strict=True))
        return Batches([(len(y),) for y in labels], batches)

    def originals(self, rows: NDArray) -> Iterator[NDArray[np.uint8]]:
        raise DivideMixError("features have no pixels")

    def _draw(self, rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
        return rng.integers(0, len(self.features), size=n, dtype=np.uint8)

    def _views(self, index: Tensor, view: Tensor) -> Tensor:
        return self.features[view.long(), index].float()


def as_views(features: NDArray) -> NDArray[np.floating]:
    """Features (N, D) or (V, N, D) of any real type -> (V, N, D), float32 or float16. Raises DivideMixError for another
    shape, for values that are not finite, and for more than 255 views."""
    features = np.asarray(features)
    if features.ndim not in (2, 3) or 0 in features.shape or features.dtype.kind not in "fiu":
        problem = f"{features.dtype} of shape {features.shape}"
        raise DivideMixError(f"features: expected numbers of shape (N, D) or (V, N, D), got {problem}")
    features = features if features.ndim == 3 else features[None]
    if len(features) > 255:
        raise DivideMixError(f"features: {len(features)} views, expected at most 255: (views, samples, features)")
    features = np.ascontiguousarray(features, None if features.dtype == np.float16 else np.float32)
    if not np.isfinite(features).all():
        raise DivideMixError("features: some are not finite numbers")
    return features
