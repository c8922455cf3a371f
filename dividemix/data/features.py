"""Features in place of images: numbers that a frozen network computes from V views of each image, once, and on which
heads train."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dividemix import DivideMixError, warn
from dividemix.data import store
from dividemix.data.device import DeviceImages
from dividemix.data.lists import ImageList
from dividemix.data.stream import Pipeline, StreamedImages
from dividemix.files import atomic_file
from dividemix.runtime import Batches, Runtime, is_out_of_memory

_FORMAT = 2  # of the files; another number makes another file
_BATCH = 50  # images that go through the network at once
HALF_FROM = 2**30  # bytes: larger sets of features, or of probabilities, are float16


class FeatureSet(DeviceImages):
    """N samples with labels (the given labels, for training) and V stored views of each, on the runtime's device.

    features (V, N, D) float32 or float16; labels int64 (N,); images: what `originals` shows. A training view is one of
    the V, drawn for each sample and step. Evaluation takes the first.
    Raises DivideMixError where the device has no memory for them.
    """

    def __init__(
        self,
        features: NDArray[np.floating],
        labels: NDArray[np.int64],
        runtime: Runtime | None = None,
        images: StreamedImages | None = None,
    ):
        self.runtime, self.images = runtime or Runtime(), images
        self.truly_clean, self.strong = None, False
        try:
            self.features = torch.from_numpy(features).to(self.runtime.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = f"{features.nbytes / 1e9:.1f} GB of shape {features.shape} on {self.runtime.device}"
            problem = f"not enough memory for the features: {size}; use fewer views or another device"
            raise DivideMixError(problem) from error
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
        """As `StreamedImages.originals`. Raises DivideMixError where there are no images."""
        if self.images is None:
            raise DivideMixError("these features come without images")
        return self.images.originals(rows)

    def _draw(self, rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
        return rng.integers(0, len(self.features), size=n, dtype=np.uint8)

    def _views(self, index: Tensor, view: Tensor) -> Tensor:
        return self.features[view.long(), index].float()


def of_images(features: Mapping[str, NDArray[np.floating]], images: StreamedImages) -> FeatureSet:
    """The set of these images, with the features (V, N, D) of each list. Their files need not be there."""
    rows, first = features[images.name][:, images.index], images.pipeline.lists[images.name].path(0)
    return FeatureSet(rows, images.labels, images.runtime, images if os.path.exists(first) else None)


# ---- Features of others ----


def as_views(features: ArrayLike, name: str = "features") -> NDArray[np.floating]:
    """Features (N, D) or (V, N, D) of any real type -> (V, N, D), float32 or float16. Raises DivideMixError, naming
    `name`, for what numpy cannot read, another shape, values that are not finite, and more than 255 views."""
    try:
        features = np.asarray(features)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; bfloat16, a gradient, a card's tensor
        problem = f"{name}: expected numbers that numpy can read as an array: {str(error).splitlines()[0]}"
        raise DivideMixError(problem) from error
    if features.ndim not in (2, 3) or 0 in features.shape or features.dtype.kind not in "fiu":
        problem = f"{features.dtype} of shape {features.shape}"
        raise DivideMixError(f"{name}: expected numbers of shape (N, D) or (V, N, D), got {problem}")
    features = features if features.ndim == 3 else features[None]
    if len(features) > 255:
        raise DivideMixError(f"{name}: {len(features)} views, expected at most 255 of the shape (V, N, D)")
    features = np.require(features, None if features.dtype == np.float16 else np.float32, ["C", "W"])  # as torch wants
    if not np.isfinite(features).all():
        raise DivideMixError(f"{name}: some values are not finite numbers, or larger than float32 can hold")
    return features


def read_file(
    path: str | Path, lists: Mapping[str, ImageList], order: Mapping[str, ImageList]
) -> dict[str, NDArray[np.floating]]:
    """The features (V, N, D) of each list from a .npy file, which has them in the order of the images in `order`.
    Raises DivideMixError for a file that cannot be read or has another number of samples, and for an image that is not
    in `order`."""
    name = f"--feature_file {path}"
    try:
        content = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DivideMixError(f"{name} cannot be read as a .npy file ({error})") from error
    if not isinstance(content, np.ndarray):
        raise DivideMixError(f"{name} holds several arrays: expected a .npy file with one")
    features = as_views(content, name)
    if features.shape[1] != sum(map(len, order.values())):
        expected = ", then ".join(f"{len(images)} of {list_name}" for list_name, images in order.items())
        raise DivideMixError(f"{name} has features of {features.shape[1]} images, expected {expected}")
    row_of = {path: row for row, path in enumerate(np.concatenate([images.names() for images in order.values()]))}
    arrays = {}
    for list_name, images in lists.items():
        rows = [row_of.get(path, -1) for path in images.names()]
        if -1 in rows:
            raise DivideMixError(f"{images.where(rows.index(-1))}: {name} has no features of this image")
        arrays[list_name] = features[:, rows]
    return arrays


def digest(features: Mapping[str, NDArray[np.floating]]) -> str:
    """The SHA-256 of the features of all lists."""
    key = hashlib.sha256()
    for array in features.values():
        key.update(np.ascontiguousarray(array))
    return key.hexdigest()


# ---- Features of a network ----


def of_network(
    net: nn.Module, pipeline: Pipeline, folder: str | Path, num_views: int, say: Callable[[str], None]
) -> dict[str, NDArray[np.floating]]:
    """The features (V, N, D) of each list of a pipeline, from `folder` if they are there, else made and written there.
    The names of the files depend on the images, the network and the views. `say` gets a line for each list. Raises
    DivideMixError for a bad image, for features that are not finite, and where the disk refuses."""
    folder = Path(folder).expanduser()
    with store.writing("the features", folder):
        folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: _stored(net, pipeline.images(name), folder, num_views, say) for name in pipeline.lists}
    pipeline.close()
    return arrays


def _stored(
    net: nn.Module, images: StreamedImages, folder: Path, num_views: int, say: Callable[[str], None]
) -> NDArray[np.floating]:
    path = _path(folder, net, images, num_views)
    try:
        with open(path, "rb") as file:  # the checksums of the images stand behind the features
            features, checksums = (np.load(file, allow_pickle=False) for _ in range(2))
        images.pipeline.checksums[images.name][:] = checksums
        say(f"features of {images.name}: {path}")
        return features
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        warn(f"{path} cannot be read ({error}): the features are made again")
    say(f"features of {images.name}: {num_views} views of {len(images)} images are made, for {path}")
    begin = time.perf_counter()
    features = as_views(make(net, images, num_views), f"the network's features of {images.name}")
    seconds = time.perf_counter() - begin
    if features.nbytes > HALF_FROM:
        features = as_views(features.astype(np.float16), f"the network's features of {images.name} in float16")
    with store.writing("the features", path), atomic_file(path) as file:
        np.save(file, features)
        np.save(file, images.pipeline.checksums[images.name])
    rate = f"{seconds:.0f} s, {len(images) / seconds:.3g} images a second"
    say(f"features of {images.name}: {len(images)} images, {len(features)} views, {rate}")
    return features


@torch.no_grad()
def make(net: nn.Module, images: StreamedImages, num_views: int) -> NDArray[np.float32]:
    """The numbers that `net` computes from V views of each image, (V, N, D): the centre, the centre mirrored (where the
    pipeline's views are), and random crops, the same in every call. A progress bar counts the images."""
    runtime, normalise, n = images.runtime, images.pipeline.normalise, len(images)
    mirror = images.pipeline.views.flip and num_views > 1
    crops = np.random.default_rng(0).integers(0, 2**63 - 1, (n, num_views - 1 - mirror))
    features = []
    with tqdm(total=n, desc=f"features of {images.name}", unit=" images", disable=None) as bar:
        for pixels in images.views(np.column_stack([np.full(n, -1), crops]), _BATCH):
            views = [normalise(view) for view in pixels]
            if mirror:
                views.insert(1, views[0].flip(3))
            features.append(torch.stack([runtime.forward(net, view)[0] for view in views]).cpu())
            bar.update(len(views[0]))
    return torch.cat(features, dim=1).numpy()


def _path(folder: Path, net: nn.Module, images: StreamedImages, num_views: int) -> Path:
    pipeline = images.pipeline
    normalise = pipeline.normalise.mean.tolist(), pipeline.normalise.std.tolist()
    key = hashlib.sha256(f"{_FORMAT} {pipeline.views} {num_views} {normalise} {images.runtime.precision}".encode())
    for name, tensor in net.state_dict().items():
        key.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    name = store.cache_path(folder, images.name, pipeline.lists[images.name], pipeline.views.resize)
    return Path(f"{name}-features-{key.hexdigest()[:16]}.npy")
