"""What Train_folder.py chooses for own images where a flag is not given: from their number, their size, the parts.

No paper has a row for one's own data: these are the values of the nearest of its sets (`recipes`), with as many epochs
as the number of images allows. lambda_u is 0, the paper's for 20 % and for asymmetric noise: real labels are seldom
wrong by the half."""

import argparse
from collections.abc import Collection
from typing import Any

from dividemix import DivideMixError, networks, recipes
from dividemix.data import PAD
from dividemix.recipes import OwnRecipe
from dividemix.run.options import set_default
from dividemix.runtime import ranks

SMALL = 64  # px: up to this side images are small
DEVICE_LIMIT = 4 << 30  # bytes of small images that are put on the device
SHORT = 10_000  # training images below which a run is short
SHORT_EPOCHS = 8  # after warm-up, of a short run
MOST_WARM_UP = 10  # epochs: later, networks begin to learn wrong labels by heart
IMBALANCE = 10  # largest class to smallest, from which on it is warned of


def choose(args: argparse.Namespace, n: int, side: int, parts: Collection[str]) -> tuple[OwnRecipe, list[str]]:
    """Fill the flags that were not given. n: images of the training list; side: their median short side, px; parts: of
    'train', 'val', 'test' those that there are. Raises DivideMixError for flags that do not go together."""
    lines: list[str] = []

    def default(name: str, value: Any, source: str) -> None:
        lines.append(set_default(args, name, value, source))

    if "val" in parts and args.val_fraction:
        raise DivideMixError(f"--val_fraction {args.val_fraction:g}: the data have a validation part; leave it out")
    alone = "val" not in parts and "test" not in parts
    default("val_fraction", 0.1 if alone else 0.0, "no validation or test part" if alone else "there is another part")
    n = max(n - round(args.val_fraction * n), 1)

    if (args.image_size or side) <= SMALL:
        default("arch", "preresnet18", f"images of at most {SMALL} px")
    else:
        default("arch", "resnet50", f"images of over {SMALL} px")
    if networks.architecture(args.arch).imagenet:
        default("weights", "imagenet", "torchvision's")
    else:
        default("weights", "none", "there are none for it")
    default("image_size", image_size(args.arch, side), f"the median short side is {side}")
    networks.check(args.arch, args.width, args.image_size, args.weights)
    lines.append(set_data_mode(args, n))

    recipe = recipes.OWN_SMALL if args.image_size <= SMALL else recipes.OWN_SCRATCH
    recipe = recipe if args.weights == "none" else recipes.OWN_PRETRAINED
    default("batch_size", batch_size(recipe, n), recipe.name if n >= 20 * recipe.batch_size else f"for {n} images")
    default("lr", recipe.lr, recipe.name)
    default("alpha", recipe.alpha, recipe.name)
    default("warm_up", min(max(-(-recipe.warm_up_images // n), 1), MOST_WARM_UP), f"{n} images to train on")
    # The drop stays where it is when another number of epochs is given: a run is continued by a higher one.
    divided = divided_epochs(recipe, n, args.warm_up)
    default("num_epochs", args.warm_up + divided, f"{n} images to train on")
    default("lr_drop", args.warm_up + divided * 3 // 4, f"after three quarters of {divided} epochs after warm-up")
    default("lambda_u", 0.0, "as for 20 % and asymmetric noise; about 25 where half of the labels are wrong")
    default("p_threshold", 0.5, "the paper's below 90 % noise")
    args.eval_batch_size = args.eval_batch_size or (1000 if args.image_size <= SMALL else 200)
    return recipe, lines


def set_data_mode(args: argparse.Namespace, n: int) -> str:
    """Where the images are while training. -> the line that says so"""
    size = n * (args.image_size + 2 * PAD) ** 2 * 3
    fits = args.image_size <= SMALL and size <= DEVICE_LIMIT
    limits = (
        f"at most {SMALL} px and {DEVICE_LIMIT >> 30} GB" if fits else f"over {SMALL} px or {DEVICE_LIMIT >> 30} GB"
    )
    source = "given" if args.data_mode != "auto" else f"{size / 1e6:.0f} MB, {limits}"
    if ranks.from_environment()[1] > 1:
        if args.data_mode == "device":
            raise DivideMixError("--data_mode device trains on one card: leave it out, or start without torchrun")
        fits, source = False, "several ranks"
    if args.data_mode == "auto":
        args.data_mode = "device" if fits else "stream"
    return f"data_mode {args.data_mode} ({source})"


def image_size(arch: str, side: int) -> int:
    """For images whose median short side is `side` px. Small ones: that, in eights; others: the same in steps of 32
    between 128 and 224, or what the network takes."""
    if arch in networks.SMALL_IMAGES:
        return min(max(-(-side // 8) * 8, 32), SMALL)
    if arch == "inceptionresnetv2":
        return recipes.WEBVISION.images["image_size"]
    fitting = min(max(-(-side // 32) * 32, 128), 224)
    return next((size for size in (fitting, 224, 299) if not networks.refusal(arch, size)), 224)


def resize(data_mode: str, image_size: int) -> int:
    """The short side of images before views are cut: on the device the crop comes from padding, else, as for
    Clothing1M, from an eighth more."""
    return image_size if data_mode == "device" else recipes.CLOTHING1M.resize_for(image_size)


def batch_size(recipe: OwnRecipe, n: int) -> int:
    """The recipe's, halved while an epoch has fewer than 20 batches, but 8 at least."""
    size = recipe.batch_size
    while size > 8 and size * 20 > n:
        size //= 2
    return size


def divided_epochs(recipe: OwnRecipe, n: int, warm_up: int) -> int:
    """Short for small sets: minutes of a CPU at --width 16. For others about as many images as the nearest set's runs
    go through."""
    epochs = 0 if n < SHORT else min(recipe.train_images // n, recipe.max_epochs)
    return max(epochs - warm_up, SHORT_EPOCHS)
