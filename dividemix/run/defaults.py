"""The values of flags that were not given, each with a line that says where it comes from; and how the flags of a run
differ from the paper's setting.

The paper has no setting for one's own images. These get the values of its most similar data set (`recipes`), and as
many epochs as their number allows. lambda_u is 0, as in the paper for 20 % and for asymmetric noise: in real data
rarely half of the labels are wrong."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dividemix import DivideMixError, blind, networks, noise, recipes
from dividemix.data import PAD
from dividemix.noise import NoiseSpec, wrong_share
from dividemix.recipes import FeatureRecipe, OwnRecipe
from dividemix.run.options import NOISE_RATE, SMALL, Parser, refuse_ranks, run_folder
from dividemix.runtime import ranks
from dividemix.runtime.device import pick_device

# For one's own images
DEVICE_LIMIT = 4 << 30  # bytes: up to this size a set of small images is kept on the device
SHORT = 10_000  # training images: with fewer a run is short
SHORT_STEPS = 1_000  # of a short run, after warm-up
FEWEST_EPOCHS = 8  # after warm-up
MOST_WARM_UP = 10  # epochs: after more, networks begin to memorise wrong labels
FEATURE_ARCH = "efficientnet_b0"  # on a CPU three times as fast as ResNet-50, and by torchvision's tests as accurate
EPOCH_STEPS = 150  # of the labeled batch size: a smaller set gets smaller batches


# ---- The paper's settings ----


class SmallImageSetting(NamedTuple):
    """What follows from the flags of Train_cifar.py and the data. lines: where each value comes from."""

    folder: Path
    noise: NoiseSpec
    ablation: recipes.Ablation
    conf_penalty: bool
    lines: list[str]


def resolve_small_images(
    args: argparse.Namespace, labels: NDArray[np.int64], num_class: int, data_folder: Path | None
) -> SmallImageSetting:
    """Fill the flags that were not given. labels: true ones (N,). Raises DivideMixError for flags against the data."""
    if args.num_class not in (None, num_class):
        raise DivideMixError(f"--num_class {args.num_class}: {args.dataset} has {num_class} classes; leave it out")
    args.num_class = num_class
    if args.limit_train and args.limit_train > len(labels):
        raise DivideMixError(f"--limit_train {args.limit_train}: there are {len(labels)} training samples")
    transition, _ = noise.asym_transition(num_class, args.dataset)
    definition = args.noise_definition or "with_self", args.noise_key
    spec = NoiseSpec(args.dataset, args.noise_mode, args.r, args.noise_seed, num_class, transition, *definition)
    variant = "ce" if args.method == "ce" else "" if args.ablation == "none" else args.ablation
    folder = run_folder(args, args.dataset, *spec.folder_parts, variant)
    lines = resolve_recipe(args, wrong_share(labels, spec, data_folder, folder, args.noise_file))
    lines += beyond_paper_lines(args)
    ablation = recipes.ABLATIONS[args.ablation]
    if args.ablation != "none":
        lines.insert(0, f"ablation {args.ablation}: {ablation.reading} ({ablation.paper_name})")
    return SmallImageSetting(folder, spec, ablation, uses_conf_penalty(args), lines)


def resolve_noise(parser: Parser, args: argparse.Namespace) -> None:
    """Fill the flags of the noise that were not given, and refuse those that have no meaning together. Afterwards r is
    None for human, noise_definition None except for sym, noise_file a Path."""
    mode, human = args.noise_mode, args.noise_mode == "human"
    choices = ", ".join(noise.human.keys(args.dataset))
    args.noise_file = Path(args.noise_file) if args.noise_file else None
    if human and args.noise_key is None:
        parser.error(f"--noise_mode human needs --noise_key: choose one of {choices}")
    if human and args.r is not None:
        parser.error(f"--r {args.r:g}: --noise_mode human has the rate of its labels; leave --r out")
    if not human and args.noise_key is not None:
        parser.error(f"--noise_key {args.noise_key}: only with --noise_mode human, one of {choices}; leave it out")
    if not human and args.noise_file and args.noise_file.suffix == ".pt":
        parser.error(f"--noise_file {args.noise_file}: a .pt file needs --noise_mode human and --noise_key")
    if mode != "sym" and args.noise_definition is not None:
        parser.error(f"--noise_definition {args.noise_definition}: only with --noise_mode sym; leave it out")
    if args.r is None and not human:
        args.r = NOISE_RATE
    if args.noise_definition is None and mode == "sym":
        args.noise_definition = "with_self"
    if args.noise_seed is None:
        args.noise_seed = args.seed


def resolve_recipe(args: argparse.Namespace, wrong: float | None = None) -> list[str]:
    """Fill lambda_u, p_threshold, loss_window and warm_up if they were not given; `--recipe blind` chooses the first
    three while it trains. `wrong`: see `recipes.nearest`. -> a line for each value with its source (none for
    cross-entropy), and how the run differs from the paper's setting"""
    warm_up = recipes.warm_up(args.dataset)
    lines: list[str] = []
    default = partial(set_default, args, lines)
    if args.recipe == "blind":
        lines.append("recipe blind: training does not use --r, --noise_mode or the true labels")
        lines += blind_lines(args)
        default("warm_up", warm_up, "the paper's for this data set, whatever the noise")
        rule = f"blind: {'on' if blind.CONF_PENALTY else 'off'} whatever the noise"
    else:
        row, exact = recipes.nearest(args.dataset, args.noise_mode, args.r, wrong)
        by = "" if wrong is None else f" by {wrong:.1%} wrong labels"
        source = f"paper, Table 7: {row.name}" if exact else f"not in the paper; nearest row{by}, Table 7: {row.name}"
        values = {name: (getattr(row, name), source) for name in blind.NAMES}
        values["warm_up"] = warm_up, "paper, Sec. 4.1" if args.dataset.startswith("cifar") else "as CIFAR-10"
        for name, (value, source) in values.items():
            default(name, value, source, f"given; {row.name} has {value:g}")
        rule = "paper: only for asymmetric noise"
    rule = rule if args.conf_penalty == "auto" else f"given; {rule}"
    lines.append(f"confidence penalty in warm-up: {'on' if uses_conf_penalty(args) else 'off'} ({rule})")
    setting, _ = recipes.in_paper("Train_cifar.py", vars(args))
    return [*(lines if args.method == "dividemix" else []), *difference_lines(args, setting)]


def uses_conf_penalty(args: argparse.Namespace) -> bool:
    """Whether the warm-up of Train_cifar.py has the confidence penalty."""
    if args.conf_penalty == "auto" and args.method == "dividemix":
        return blind.CONF_PENALTY if args.recipe == "blind" else args.noise_mode == "asym"
    return args.conf_penalty == "on"


def resolve_images(args: argparse.Namespace, paper: recipes.ImageRecipe) -> list[str]:
    """Fill --weights if it was not given: the paper's for its network, else none. -> lines on flags without effect and
    differences from the paper's setting. Raises DivideMixError for flags that do not go together."""
    if args.weights is None:
        args.weights = paper.images["weights"] if args.arch == paper.images["arch"] else "none"
    networks.check(args.arch, args.width, args.image_size, args.weights)
    lines = difference_lines(args, paper.setting)
    if args.lambda_u > 0:
        lines.insert(0, f"--lambda_u {args.lambda_u:g} has no effect: unlabeled images have no loss of their own")
    return lines


def difference_lines(args: argparse.Namespace, setting: Mapping[str, Any]) -> list[str]:
    """For a run's start: how it differs from the paper's `setting`; [] if it does not."""
    differences = recipes.setting_differences(vars(args), setting)
    return [f"differs from the paper's setting: {', '.join(differences)}"] if differences else []


def difference_note(args: argparse.Namespace, setting: Mapping[str, Any], *of_data: str) -> str:
    """For a run's end, behind the paper's result: the same differences in brackets, and those `of_data`; or ''."""
    differences = [*recipes.setting_differences(vars(args), setting), *of_data]
    return f" (but this run: {', '.join(differences)})" if differences else ""


def compare_with_paper(
    args: argparse.Namespace, records: Sequence[dict[str, Any]], best_epoch: int, official: bool
) -> tuple[str, dict[str, float]]:
    """The end of Train_cifar.py. official: whether the data are the published ones. -> the last line, with best and
    last accuracy (%) beside the paper's, and the paper's results by their names in result.json"""
    setting, paper = recipes.in_paper("Train_cifar.py", vars(args))

    def reached(suffix: str, epoch: str) -> str:
        best, last = (records[-1][f"{name}_acc{suffix}"] for name in ("best", "last10"))
        return f"best {best:.2f}{epoch}, mean of the last {min(len(records), 10)} {last:.2f}"

    epoch = f" (epoch {best_epoch})"
    line = reached("", epoch)
    if args.ema:  # best_epoch is that of the averaged weights
        line = f"{reached('', '')}; averaged weights: {reached('_ema', epoch)}"
    title = "paper:"
    if args.method == "ce":
        line += f"; net 1 alone: best {max(record['test_acc_net1'] for record in records):.2f}"
        title = "paper's cross-entropy, one net: best"
    elif args.ablation != "none":
        title = f"paper's {recipes.ABLATIONS[args.ablation].paper_name} (Table 5): best"
    if paper:
        results = " / ".join(map(str, paper.values()))
        of_data = [] if official else [f"not the official {args.dataset}"]
        line += f"; {title} {results}{difference_note(args, setting, *of_data)}"
    return line, {f"paper_{name}": value for name, value in paper.items()}


# ---- One's own images ----


def choose(
    args: argparse.Namespace, n: int, side: int, lists: Collection[str]
) -> tuple[OwnRecipe | FeatureRecipe, list[str]]:
    """Fill the flags that were not given. n: number of training images; side: their median short side, pixels; lists:
    the names of the image lists, of 'train', 'val', 'test'. -> the recipe, and a line for each value with its source.
    Raises DivideMixError for flags that do not go together."""
    lines = beyond_paper_lines(args)
    default = partial(set_default, args, lines)
    if "val" in lists and args.val_fraction:
        raise DivideMixError(f"--val_fraction {args.val_fraction:g}: the data have validation images; leave it out")
    alone = "val" not in lists and "test" not in lists
    default("val_fraction", 0.1 if alone else 0.0, f"the data have {'no ' if alone else ''}validation or test images")
    n = max(n - round(args.val_fraction * n), 1)

    if args.features or args.feature_file:
        return recipes.FEATURES, lines + choose_for_features(args, side)
    if (args.image_size or side) <= SMALL:
        default("arch", "preresnet18", f"images of at most {SMALL} px")
    else:
        default("arch", "resnet50", f"images of over {SMALL} px")
    if networks.architecture(args.arch).imagenet:
        default("weights", "imagenet", "torchvision's")
    else:
        default("weights", "none", f"none for {args.arch}")
    default("image_size", image_size(args.arch, side), f"the median short side is {side}")
    networks.check(args.arch, args.width, args.image_size, args.weights)
    lines.append(set_data_mode(args, n))

    recipe = recipes.OWN_SMALL if args.image_size <= SMALL else recipes.OWN_SCRATCH
    recipe = recipe if args.weights == "none" else recipes.OWN_PRETRAINED
    source = recipe.name if n >= EPOCH_STEPS * recipe.batch_size else f"for {n} images"
    default("batch_size", batch_size(recipe, n), source)
    default("lr", recipe.lr, recipe.name)
    default("alpha", recipe.alpha, recipe.name)
    steps = -(-n // (2 * args.batch_size))
    warm_up = min(max(round(recipe.warm_up_steps / steps), 1), MOST_WARM_UP)
    source = f"{warm_up * steps} steps; aim: {recipe.warm_up_steps} {recipe.name}, limit: {MOST_WARM_UP} epochs"
    default("warm_up", warm_up, source)
    # lr_drop does not follow from --num_epochs: a higher number must be able to continue the run.
    divided = divided_epochs(recipe, n, args.batch_size, args.warm_up)
    default("num_epochs", args.warm_up + divided, f"at most {divided * n // args.batch_size} steps after warm-up")
    drop, source = args.warm_up + divided * 3 // 4, f"after three quarters of {divided} epochs after warm-up"
    default("lr_drop", drop, source + "; not reached in this run" * (drop >= args.num_epochs))
    return recipe, lines + choose_division(args)


def choose_features(args: argparse.Namespace, side: int, grey: bool) -> tuple[bool, str]:
    """For `dividemix issues`: whether to train heads on frozen features, and the line that says so and why. On a card
    whole networks are trained. On a CPU they take hours, except for grey images of at most 64 px, of which a network
    trained on photos knows little. side: the median short side in pixels; grey: whether all images are."""
    device = pick_device(args.device, args.gpuid).type
    if args.features or args.feature_file:
        return True, "frozen features (given)"
    if args.weights == "none" or (args.arch and not networks.architecture(args.arch).imagenet):
        return False, "whole networks are trained (the given network has no weights)"
    if args.width != networks.WIDTH or args.data_mode == "device" or args.augment == "strong":
        return False, "whole networks are trained (--width, --data_mode device and --augment strong are for them)"
    if device != "cpu":
        return False, f"whole networks are trained: there is a card ({device}); --features is faster"
    if grey and side <= SMALL:
        return False, "no card, but the images are grey and small: whole networks are trained"
    instead = "whole networks (--weights none) take much longer"
    return True, f"no card: heads on frozen features are trained, in minutes; {instead}"


def choose_division(args: argparse.Namespace) -> list[str]:
    """The flags of the division and of the unlabeled loss, which depend on no image."""
    values = recipes.OWN_DIVISION
    lines: list[str] = []
    default = partial(set_default, args, lines)
    if args.recipe == "blind":
        lines += blind_lines(args)
    else:
        source = "as for 20 % and asymmetric noise; about 25 where half of the labels are wrong"
        default("lambda_u", values["lambda_u"], source)
        for name in ("p_threshold", "loss_window"):
            default(name, values[name], "the paper's below 90 % noise")
    default("division", values["division"], "classes differ in their losses; the paper: global")
    return lines


def choose_for_features(args: argparse.Namespace, side: int) -> list[str]:
    """The rest of `choose` for heads on features, which are those of --arch or in --feature_file."""
    recipe = recipes.FEATURES
    lines: list[str] = []
    default = partial(set_default, args, lines)
    refuse_ranks("--features")
    if args.data_mode == "device":
        raise DivideMixError("--data_mode device: with features each image is read once; leave it out")
    if args.augment == "strong":
        raise DivideMixError("--augment strong: with features no network sees the images; leave it out")
    args.data_mode = "stream"
    if args.feature_file:
        for flag in ("arch", "weights", "image_size", "skip_bad_images"):
            if getattr(args, flag):
                raise DivideMixError(f"--{flag}: with --feature_file no network sees the images; leave it out")
        args.features, args.arch, args.weights, args.image_size = True, "head", "none", side
    else:
        default("arch", FEATURE_ARCH, "features: small, and accurate for its size")
        weights = "imagenet" if networks.architecture(args.arch).imagenet else "none"
        default("weights", weights, "torchvision's")
        if args.weights == "none":
            raise DivideMixError(f"--features: --arch {args.arch} has no weights, and its features would be random")
        default("image_size", image_size(args.arch, side), f"the median short side is {side}")
        networks.check(args.arch, args.width, args.image_size, args.weights)
    for name in ("batch_size", "lr", "alpha", "warm_up", "num_epochs"):
        default(name, getattr(recipe, name), recipe.name)
    default("lr_drop", recipe.num_epochs, "no drop")
    return lines + choose_division(args)


def hint(args: argparse.Namespace, device: torch.device) -> list[str]:
    """At most one line, for who trains whole networks on photos without a GPU."""
    if device.type != "cpu" or args.image_size <= SMALL or args.features:
        return []
    return ["on a CPU this takes hours: --features trains two heads on a frozen network instead, in minutes"]


def set_data_mode(args: argparse.Namespace, n: int) -> str:
    """Choose where the images are while training: on the device, or read by workers. -> the line that says so"""
    size = n * (args.image_size + 2 * PAD) ** 2 * 3
    fits = args.image_size <= SMALL and size <= DEVICE_LIMIT
    gigabytes = DEVICE_LIMIT >> 30
    limits = f"at most {SMALL} px and {gigabytes} GB" if fits else f"over {SMALL} px or {gigabytes} GB"
    source = "given" if args.data_mode != "auto" else f"{size / 1e6:.0f} MB, {limits}"
    if ranks.from_environment().world > 1:
        if args.data_mode == "device":
            raise DivideMixError("--data_mode device trains on one card: leave it out, or start without torchrun")
        fits, source = False, "several ranks"
    if args.data_mode == "auto":
        args.data_mode = "device" if fits else "stream"
    return f"data_mode {args.data_mode} ({source})"


def image_size(arch: str, side: int) -> int:
    """The crop's side for images whose median short side is `side` pixels. Small images: the next multiple of 8;
    others: the next multiple of 32 from 128 to 224, or a size that the network takes."""
    if arch in networks.SMALL_IMAGES:
        return min(max(-(-side // 8) * 8, 32), SMALL)
    if arch == "inceptionresnetv2":
        return recipes.WEBVISION.images["image_size"]
    fitting = min(max(-(-side // 32) * 32, 128), 224)
    return next((size for size in (fitting, 224, 299) if not networks.refusal(arch, size)), 224)


def resize(data_mode: str, image_size: int) -> int:
    """The short side of images before they are cropped: on the device the crop's side, since images are padded; else
    a seventh more, as for Clothing1M."""
    return image_size if data_mode == "device" else recipes.CLOTHING1M.resize_for(image_size)


def batch_size(recipe: OwnRecipe, n: int) -> int:
    """The recipe's batch size, halved while an epoch has fewer than EPOCH_STEPS batches, but at least 16; at least 8
    where 16 gives fewer than 20."""
    size = recipe.batch_size
    while (size > 16 and size * EPOCH_STEPS > n) or (size > 8 and size * 20 > n):
        size //= 2
    return size


def divided_epochs(recipe: OwnRecipe, n: int, batch_size: int, warm_up: int) -> int:
    """Epochs after warm-up. A small set gets few steps: minutes on a CPU at --width 16. Else they are about as many as
    on the paper's most similar set."""
    epochs = (SHORT_STEPS if n < SHORT else recipe.divided_steps) * batch_size // n
    return max(min(epochs, recipe.max_epochs - warm_up), FEWEST_EPOCHS)


# ---- Shared by both ----


def set_default(
    args: argparse.Namespace, lines: list[str], name: str, value: Any, source: str, source_if_given: str = "given"
) -> None:
    """Fill the flag `name` unless it was given, and add the line with its value and where that comes from."""
    if getattr(args, name) is None:
        setattr(args, name, value)
    else:
        source = source_if_given
    lines.append(f"{name} {recipes.flag_text(getattr(args, name))} ({source})")


def blind_lines(args: argparse.Namespace) -> list[str]:
    """With `--recipe blind`: a line for each flag that is chosen while it trains. Cross-entropy, without a division to
    choose by, gets fixed values."""
    flags = {name: getattr(args, name) for name in blind.NAMES}
    if args.method == "ce":
        vars(args).update(blind.setting(None, flags))
    chosen = "chosen during training"
    return [f"{name} {chosen if value is None else f'{value:g} (given)'}" for name, value in flags.items()]


def beyond_paper_lines(args: argparse.Namespace) -> list[str]:
    """A line for each flag of `add_beyond_paper` that is on. Raises DivideMixError for one without effect."""
    lines = []
    if args.augment == "strong":
        if args.method == "ce":
            raise DivideMixError("--augment strong: --method ce has no mixed batch to make of strong views; drop one")
        lines.append("augment strong: guesses on weak views, the mixed batch of strong ones (not in the paper)")
    if args.ema:
        lines.append(
            f"ema {args.ema:g}: averaged weights are tested beside the trained ones, and are those of best.pt, export, "
            "predict and the label list (not in the paper)"
        )
    return lines
