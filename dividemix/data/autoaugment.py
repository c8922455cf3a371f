"""AutoAugment's policy for CIFAR-10 (Cubuk et al., CVPR 2019), for batches of images on their device.

For each image one of 25 sub-policies is drawn: two operations, each with a probability and a magnitude. Every operation
is computed for the whole batch, then selected by image, so nothing waits for the device and no shape depends on data.
The sub-policies are torchvision's, and so are the results (`torchvision.transforms.AutoAugment` of uint8 tensors),
except for rounding: a change of brightness, contrast, colour or sharpness may differ by 1 level.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The place of an operation is its number. Invert is Solarize from level 0 on.
GEOMETRIC = ("TranslateX", "TranslateY", "ShearY", "Rotate")
BLENDS = ("Brightness", "Contrast", "Color", "Sharpness")
OPERATIONS = ("Identity", *GEOMETRIC, *BLENDS, "Posterize", "Solarize", "AutoContrast", "Equalize")
SIGNED = 1 + len(GEOMETRIC) + len(BLENDS)  # operations before this number go either way


# ---- Draws, on the host ----


def magnitudes(height: int, width: int) -> dict[str, NDArray[np.float64]]:
    """Of the operations that have one, for levels 0 to 9: whole pixels, slope, degrees, change of a factor of 1, bits
    to keep, value from which all are inverted."""
    level = np.arange(10) / 9
    pixels = [np.trunc(150 / 331 * side * level) for side in (width, height)]
    values = dict(zip(GEOMETRIC, [*pixels, 0.3 * level, 30 * level], strict=True)) | dict.fromkeys(BLENDS, 0.9 * level)
    return values | {"Posterize": 8 - np.round(4 * level), "Solarize": 255 - 255 * level}


@cache
def policy(height: int, width: int) -> NDArray[np.float64]:
    """Number, probability and magnitude of both operations of each sub-policy: (3, 25, 2)."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # slow to import

    values, rows = magnitudes(height, width), []
    for name, probability, level in sum(AutoAugment(AutoAugmentPolicy.CIFAR10).policies, ()):
        magnitude = values[name][level] if name in values else 0
        rows.append((OPERATIONS.index(name.replace("Invert", "Solarize")), probability, magnitude))
    return np.array(rows).reshape(-1, 2, 3).transpose(2, 0, 1)


def draw(rng: np.random.Generator, n: int, height: int, width: int) -> NDArray[np.float32]:
    """(n, 2, 2): of each image the number and magnitude of its first operation, then of its second one. A number is 0,
    Identity, where an operation is not applied."""
    row, uniform, sign = choose(rng, n)
    number, probability, magnitude = policy(height, width)[:, row]  # (n, 2) each
    magnitude = np.where((number < SIGNED) & (sign == 0), -magnitude, magnitude)
    return np.stack([np.where(uniform <= probability, number, 0), magnitude], axis=2).astype(np.float32)


def choose(rng: np.random.Generator, n: int) -> tuple[NDArray, NDArray, NDArray]:
    """As torchvision draws it: the sub-policy (n,), and of both operations a uniform number and a sign, 0 for minus
    and 1 for plus, (n, 2) each."""
    return rng.integers(25, size=n), rng.random((n, 2)), rng.integers(2, size=(n, 2))


def augment_one(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """One image (H, W, 3) by torchvision, on the CPU: faster than a batch of one, since it computes two operations
    only."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    auto_augment, (row, uniform, sign) = AutoAugment(AutoAugmentPolicy.CIFAR10), choose(rng, 1)
    auto_augment.get_params = lambda _: (int(row[0]), torch.from_numpy(uniform[0]), torch.from_numpy(sign[0]))
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return auto_augment(pixels).permute(1, 2, 0).numpy()


# ---- Operations, on the device ----


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Both operations of each image: uint8 (B, H, W, 3), draws (B, 2, 2) of `draw` -> uint8 (B, H, W, 3)."""
    for operation in draws.unbind(1):
        images = operate(images, *operation.unbind(1))
    return images


def operate(images: Tensor, number: Tensor, magnitude: Tensor) -> Tensor:
    """One operation of each image: uint8 (B, H, W, 3), its number and magnitude (B,) -> uint8 (B, H, W, 3)."""
    images = move(images, {name: torch.where(chosen(name, number), magnitude, 0) for name in GEOMETRIC})
    # An image has one operation, so it passes unchanged through all the others.
    number, magnitude = number[:, None, None], magnitude[:, None, None]
    pixels = images.flatten(1, 2)  # (B, H * W, 3)
    red, green, blue = pixels.float().split(1, dim=2)
    grey = (0.2989 * red + 0.587 * green + 0.114 * blue).floor()  # (B, H * W, 1)
    values = pixels.long()
    pixels = value_table(values, grey.mean(dim=1, keepdim=True), number, magnitude).gather(1, values)
    for name, degenerate in (("Color", grey), ("Sharpness", smooth(images).flatten(1, 2))):
        pixels = torch.where(chosen(name, number), blend(pixels, degenerate, magnitude), pixels)
    return pixels.to(torch.uint8).view_as(images)


def chosen(name: str, number: Tensor) -> Tensor:
    return number == OPERATIONS.index(name)


def move(images: Tensor, amounts: dict[str, Tensor]) -> Tensor:
    """Translated, sheared or rotated about the centre by the amounts (B,) of GEOMETRIC, 0 for no change. Pixels from
    outside the image are black; others are taken from their nearest source."""
    (height, width), device = images.shape[1:3], images.device
    dx, dy, slope, degrees = (amounts[name][:, None, None] for name in GEOMETRIC)
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    x = torch.arange(width, device=device) - (width - 1) / 2  # from the centre
    y = (torch.arange(height, device=device) - (height - 1) / 2)[:, None]
    columns = (cos * x - sin * y - dx + (width - 1) / 2).round().long()  # (B, H, W)
    rows = (sin * x + cos * y + slope * (x + width / 2) - dy + (height - 1) / 2).round().long()
    is_inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    image = torch.arange(len(images), device=device)[:, None, None]
    return images[image, rows.clamp(0, height - 1), columns.clamp(0, width - 1)] * is_inside[..., None]


def value_table(pixels: Tensor, mean: Tensor, number: Tensor, magnitude: Tensor) -> Tensor:
    """What becomes of each value from 0 to 255 by the operations that change each value for itself, float32
    (B, 256, 3). pixels int64 (B, H * W, 3); mean (B, 1, 1): of the grey image."""
    value = torch.arange(256, device=pixels.device, dtype=torch.float32)[:, None]
    lowest, highest = pixels.amin(dim=1, keepdim=True), pixels.amax(dim=1, keepdim=True)  # (B, 1, 3)
    stretched = ((value - lowest) * (255 / (highest - lowest))).clamp(0, 255)
    counts = torch.zeros(len(pixels), 256, 3, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels))
    darker = counts.cumsum(dim=1) - counts  # pixels below each value
    step = darker.gather(1, highest) // 255
    equalized = ((darker + step // 2) // step.clamp(min=1)).clamp(0, 255).float()
    size = 2 ** (8 - magnitude)
    table = value.expand(counts.shape)
    for name, result in {
        "Brightness": blend(value, torch.zeros_like(mean), magnitude),
        "Contrast": blend(value, mean, magnitude),
        "Posterize": (value / size).floor() * size,
        "Solarize": torch.where(value >= magnitude, 255 - value, value),
        "AutoContrast": torch.where(highest > lowest, stretched, value),
        "Equalize": torch.where(step > 0, equalized, value),
    }.items():
        table = torch.where(chosen(name, number), result, table)
    return table.floor()


def blend(values: Tensor, degenerate: Tensor, magnitude: Tensor) -> Tensor:
    """Values away from (magnitude above 0) or towards (below 0) what they are where nothing is left of a property."""
    return ((1 + magnitude) * values - magnitude * degenerate).clamp(0, 255)


def smooth(images: Tensor) -> Tensor:
    """(B, H, W, 3) -> float32, the mean of 3 x 3 pixels, the middle one counted five times; the border stays."""
    result = images.float()
    middle = result[:, 1:-1, 1:-1]
    rows = result[:, :-2] + result[:, 1:-1] + result[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * middle
    middle.copy_((total / 13).round())
    return result
