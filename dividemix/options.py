"""The command line: flag types with their ranges, the groups that all scripts share, and the paper's setting by
default."""

import argparse
import dataclasses
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from dividemix import (
    DivideMixError,
    DivideMixWarning,
    blind,
    networks,
    noise,
    noise_human,
    ranks,
    recipes,
    runtime,
    signals,
)
from dividemix.engine import MixMatch
from dividemix.noise_file import NoiseSpec, wrong_share
from dividemix.runtime import Runtime, available_cores

if TYPE_CHECKING:
    from dataloader_cifar import ImageData

NOISE_MODES = (*noise.MODES, "idn", "human")
NOISE_RATE = 0.5


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default once, and none where there is nothing to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "") or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action) or "(default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and that takes no abbreviated flags: a run's flags stay readable."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{speaker()}{self.prog}: error: {message} (--help lists all flags)\n")


# ---------------------------------------------------------------------------------------------------------------------
# Types: a text from the command line -> a value in its range, or one line that says what was expected


def number(kind: type, expected: str, accept: Callable[[Any], bool]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
            sound = (kind is int or math.isfinite(value)) and accept(value)  # isfinite fails for a very long int
        except ValueError:
            sound = False
        if not sound:
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
        return value

    return convert


positive_int = number(int, "a whole number of 1 or more", lambda v: 1 <= v < 2**31)
count = number(int, "a whole number of 0 or more", lambda v: 0 <= v < 2**31)
processes = number(int, "a whole number from 0 to 256", lambda v: 0 <= v <= 256)  # thousands stop the machine
seed = number(int, "a whole number from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
positive = number(float, "a number above 0", lambda v: v > 0)
non_negative = number(float, "a number of 0 or more", lambda v: v >= 0)
rate = number(float, "a rate from 0 to 1", lambda v: 0 <= v <= 1)
open_unit = number(float, "a number between 0 and 1, both excluded", lambda v: 0 < v < 1)
part = number(float, "a part of at least 0 and less than 1", lambda v: 0 <= v < 1)


def run_id(text: str) -> str:
    """A suffix of the run folder's name, or (Clothing1M) the name itself."""
    if text in (".", "..") or not all(c.isalnum() or c in "._-" for c in text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, '.', '_' and '-', got '{text}'")
    return text


def architecture(text: str) -> str:
    """A network's name, the project's or torchvision's."""
    try:
        networks.architecture(text)
    except DivideMixError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--arch ")) from error
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def add_method(
    parser: Parser,
    *,
    batch_size: int | None,
    lr: float | None,
    alpha: float | None,
    num_epochs: int | None,
    lr_drop: int | None,
    lambda_u: float | None = None,
    p_threshold: float | None = None,
    warm_up: int | None = None,
    source: str = "the paper's",
) -> None:
    """The method's hyper-parameters, names as the authors'. A default of None comes from `resolve_recipe`, or wherever
    `source` says; lambda_u has one of its own only where it has no effect."""
    group = parser.add_argument_group("method")

    def add(name: str, kind: Callable[[str], Any], default: Any, text: str, *other_names: str) -> None:
        text += f" (default: {source})" if default is None else ""
        group.add_argument(name, *other_names, type=kind, default=default, help=text)

    add("--batch_size", positive_int, batch_size, "labeled = unlabeled images a step; twice that in warm-up")
    add("--lr", positive, lr, "learning rate", "--learning_rate")
    add("--lr_drop", positive_int, lr_drop, "epoch from which the learning rate is a tenth")
    add("--num_epochs", positive_int, num_epochs, "epochs in all, warm-up included")
    add("--warm_up", count, warm_up, "epochs of plain cross-entropy before the first division")
    add("--alpha", positive, alpha, "parameter of mixup's Beta distribution")
    group.add_argument("--T", type=positive, default=0.5, help="sharpening temperature")
    group.add_argument(
        "--lambda_u",
        type=non_negative,
        default=lambda_u,
        help=f"weight of the unlabeled loss (default: {source})"
        if lambda_u is None
        else "accepted and without effect: there is no unlabeled loss, unlabeled images are mixed in",
    )
    add("--p_threshold", open_unit, p_threshold, "clean probability above which a sample is labeled")


def add_small_images(parser: Parser) -> None:
    """Data, network and variants of Train_cifar.py."""
    group = parser.add_argument_group("data")
    names = ["cifar10", "cifar100", "fashionmnist", "digits"]
    group.add_argument("--dataset", choices=names, default="cifar10", help="digits come with scikit-learn")
    group.add_argument("--data_path", default="./cifar-10", help="folder of the data set's files; digits needs none")
    group.add_argument("--download", action="store_true", help="fetch and verify the data set if it is not there")
    contradicts = "refused when it contradicts the data (default: from the data)"
    group.add_argument("--num_class", type=positive_int, help=contradicts)
    subset = "train on a seeded subset of N samples"
    group.add_argument("--limit_train", type=positive_int, metavar="N", help=subset)
    add_noise(parser)
    group = parser.add_argument_group("network and variants")
    group.add_argument("--arch", choices=networks.SMALL_IMAGES, default="preresnet18", help="both networks")
    group.add_argument("--width", type=positive_int, default=networks.WIDTH, help="channels of the first stage")
    add_baseline(group)
    part = "leave a part of the method out, as in the paper's Table 5"
    group.add_argument("--ablation", choices=list(recipes.ABLATIONS), default="none", help=part)
    group.add_argument(
        "--recipe",
        choices=["paper", "blind"],
        default="paper",
        help="lambda_u, p_threshold, loss_window and conf_penalty: the paper's for r and noise_mode, or blind to both",
    )
    window = "epochs of loss averaged before the mixture is fitted (default: the paper's)"
    group.add_argument("--loss_window", type=positive_int, help=window)
    penalty = "confidence penalty in warm-up; auto: by the recipe"
    group.add_argument("--conf_penalty", choices=["auto", "on", "off"], default="auto", help=penalty)


def add_baseline(group: argparse._ArgumentGroup) -> None:
    plain = "ce: plain cross-entropy, the same nets and schedule"
    group.add_argument("--method", choices=["dividemix", "ce"], default="dividemix", help=plain)


def add_noise(parser: Parser) -> None:
    """The noise flags of Train_cifar.py."""
    group = parser.add_argument_group("noise")
    group.add_argument(
        "--noise_mode",
        choices=NOISE_MODES,
        default="sym",
        help="symmetric, asymmetric or instance-dependent noise, or CIFAR-10N's and CIFAR-100N's labels from people",
    )
    group.add_argument(
        "--r",
        type=rate,
        help="noise rate: the part of the training samples that is drawn, for idn the mean flip rate; not with human "
        f"(default: {NOISE_RATE})",
    )
    group.add_argument(
        "--noise_definition",
        choices=noise.DEFINITIONS,
        help="what a drawn label becomes, with sym: any class, or any other class (default: with_self, the paper's)",
    )
    group.add_argument(
        "--noise_file",
        help="JSON list of noisy labels (default: <r>_<noise_mode>.json with the data); with human the published .pt "
        "file (default: CIFAR-10_human.pt or CIFAR-100_human.pt with the data)",
    )
    group.add_argument("--noise_key", choices=noise_human.KEYS, help="with human: which of the file's labels")
    group.add_argument("--noise_seed", type=seed, help="seed of the noise, where no file exists (default: --seed)")


def add_images(
    parser: Parser,
    *,
    arch: str | None,
    weights: str | None,
    image_size: int | None,
    num_class: int | None,
    num_batches: int | None = None,
    data_path: str | None,
    keep_images: bool = False,
    cache_dir: bool = False,
) -> None:
    """Network and data of the scripts for large images. num_batches: the epoch's size, where an epoch is a sample;
    keep_images, cache_dir: whether there is such a flag. Of own images, for which the data tell them, arch, weights,
    image_size, num_class (then no flag) and data_path (then asked for) are None."""
    group = parser.add_argument_group("network and images")
    if data_path is None:
        own = "folder of class folders, or a CSV file with the columns path and label"
        group.add_argument("--data_path", required=True, help=own)
    else:
        group.add_argument("--data_path", default=data_path, help="folder of the lists and images")
    if arch is None:
        any_arch = f"both networks: {', '.join(networks.ARCHITECTURES)}, or any of torchvision's for classification"
        group.add_argument("--arch", type=architecture, help=f"{any_arch} (default: from the data)")
    else:
        group.add_argument("--arch", choices=list(networks.ARCHITECTURES), default=arch, help="both networks")
    group.add_argument(
        "--width", type=positive_int, default=networks.WIDTH, help="channels of a preresnet's first stage"
    )
    own_weights = "imagenet for networks that have them, none for others"
    theirs = own_weights if arch is None else f"{weights} for {arch}, none for another --arch"
    group.add_argument(
        "--weights",
        metavar="imagenet|none|PATH",
        help="what both networks, but for the classifiers, start from: torchvision's ImageNet weights, nothing, or a "
        f"state dict's (default: {theirs})",
    )
    from_data = " (default: from the data)" if image_size is None else ""
    group.add_argument(
        "--image_size",
        type=positive_int,
        default=image_size,
        help=f"side of the crop; images are resized in proportion{from_data}",
    )
    if num_class:
        group.add_argument("--num_class", type=positive_int, default=num_class, help="classes")
    if num_batches:
        group.add_argument(
            "--num_batches", type=positive_int, default=num_batches, help="size of an epoch's sample, in batches"
        )
    depths = {"nargs": "?", "choices": ["quick", "full"], "const": "quick"}
    group.add_argument(
        "--check_data", **depths, help="say what is wrong with the data folder, and end; full decodes every image"
    )
    group.add_argument(
        "--skip_bad_images", **depths, help="leave damaged images out; full decodes every image to find them"
    )
    if keep_images:
        group.add_argument(
            "--keep_images",
            choices=["auto", "device", "host", "no"],
            default="auto",
            help="where the images scored for a division stay until they are trained on; auto: where there is room",
        )
    if cache_dir:
        group.add_argument("--cache_dir", help="folder for resized images, so that each is decoded once")


def add_own_images(parser: Parser) -> None:
    """What Train_folder.py has beside the flags for images."""
    group = parser.add_argument_group("own images")
    group.add_argument("--labels", metavar="FILE.csv", help="training labels, instead of those in --data_path")
    group.add_argument(
        "--val_fraction",
        type=part,
        help="part of the training images held out, with their labels, to select the best epoch (default: 0.1 where "
        "there is no validation and no test part, else 0)",
    )
    group.add_argument("--no_flip", action="store_true", help="never mirror images: for digits, text, left and right")
    group.add_argument(
        "--data_mode",
        choices=["auto", "device", "stream"],
        default="auto",
        help="images as pixels on the device, cropped after padding; or read by workers; auto: by size",
    )
    add_baseline(group)
    group.add_argument("--conf_penalty", choices=["on", "off"], default="off", help="confidence penalty in warm-up")


def add_run(
    parser: Parser,
    *,
    id: str = "",
    val_fraction: bool = True,
    save_scores: bool = True,
    eval_batch_size: int | None = 1000,
) -> None:
    """Where and how it runs: the same flags for every script, but --val_fraction, which a script with a validation set
    of its own lacks, and --save_scores, which one lacks that always does. eval_batch_size: None where the images' size
    tells it."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=seed, default=123, help="every random draw derives from it")
    group.add_argument("--id", type=run_id, default=id, help="suffix of the run folder's name")
    group.add_argument("--out_dir", default="./checkpoint", help="holds the run folders")
    group.add_argument("--run_dir", help="the run folder itself, instead of a name under --out_dir")
    group.add_argument("--fresh", action="store_true", help="start anew: move an existing run folder aside")
    group.add_argument("--init_from", metavar="FILE", help="checkpoint that both networks start from (weights only)")
    if val_fraction:
        group.add_argument(
            "--val_fraction",
            type=part,
            default=0.0,
            help="part of the (noisy) training set held out to select the best epoch",
        )
    group.add_argument(
        "--no_label_scores",
        action="store_true",
        help="leave out the pass over all training labels at the end, and with it label_issues.csv",
    )
    if save_scores:
        group.add_argument(
            "--save_scores",
            action="store_true",
            help="keep every epoch's loss, clean probability and prediction of each sample that was scored",
        )
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: a CUDA card, else mps, else cpu"
    )
    group.add_argument("--gpuid", type=count, default=0, help="which CUDA card")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bf16 where the device has units for it",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="deterministic kernels only: bit-equal reruns on one GPU model"
    )
    group.add_argument("--no_compile", action="store_true", help="on a GPU: do not fuse operators (torch.compile)")
    group.add_argument("--no_graph", action="store_true", help="on a GPU: do not capture steps in CUDA graphs")
    group.add_argument(
        "--eval_batch_size",
        type=positive_int,
        default=eval_batch_size,
        help="batch of loss passes and tests" + (" (default: from the data)" if eval_batch_size is None else ""),
    )
    group.add_argument(
        "--workers",
        type=processes,
        default=min(16, max(1, available_cores() // ranks.on_this_machine())),
        help="image-loading processes of each rank, 16 at most unless given; small sets read once by them",
    )


@dataclass(frozen=True)
class SmallSetting:
    """What the flags of Train_cifar.py come to, with the data: the run's folder and noise, the variant of the method,
    and lines that say where each value comes from."""

    folder: Path
    noise: NoiseSpec
    ablation: recipes.Ablation
    blind: bool  # whether lambda_u, p_threshold and loss_window are chosen while it trains
    conf_penalty: bool
    lines: list[str]


def resolve_small(args: argparse.Namespace, data: "ImageData") -> SmallSetting:
    """Fill what was not given. Raises DivideMixError for flags that contradict the data."""
    if args.num_class not in (None, data.num_class):
        raise DivideMixError(f"--num_class {args.num_class}: {args.dataset} has {data.num_class} classes; leave it out")
    args.num_class = data.num_class
    if args.limit_train and args.limit_train > len(data.train_labels):
        raise DivideMixError(f"--limit_train {args.limit_train}: there are {len(data.train_labels)} training samples")
    divides, ablation = args.method == "dividemix", recipes.ABLATIONS[args.ablation]
    variant = args.ablation if args.ablation != "none" else "" if divides else "ce"
    spec = noise_spec(args)
    folder = folder_for(args, args.dataset, *spec.folder_parts, variant)
    wrong = wrong_share(data.train_labels, spec, data.folder, folder, args.noise_file)
    lines = resolve_recipe(args, wrong)
    if args.ablation != "none":
        lines.insert(0, f"ablation {args.ablation}: {ablation.reading} ({ablation.paper_name})")
    by_recipe = divides and (blind.CONF_PENALTY if args.recipe == "blind" else args.noise_mode == "asym")
    conf_penalty = by_recipe if args.conf_penalty == "auto" else args.conf_penalty == "on"
    return SmallSetting(folder, spec, ablation, divides and args.recipe == "blind", conf_penalty, lines)


def folder_for(args: argparse.Namespace, *parts: str) -> Path:
    """--run_dir, or --out_dir / the non-empty parts, the seed where it is not the default, and --id, joined by '_'."""
    parts = *parts, f"seed{args.seed}" if args.seed != 123 else "", args.id
    return Path(args.run_dir) if args.run_dir else Path(args.out_dir) / "_".join(part for part in parts if part)


def resolve_noise(parser: Parser, args: argparse.Namespace) -> None:
    """Fill what was not given, and refuse flags that have no meaning together. r is None for human, noise_definition
    None but for sym; noise_file becomes a Path."""
    mode, choices = args.noise_mode, ", ".join(noise_human.keys(args.dataset))
    if mode == "human" and args.noise_key is None:
        parser.error(f"--noise_mode human needs --noise_key: choose one of {choices}")
    if mode == "human" and args.r is not None:
        parser.error(f"--r {args.r:g}: --noise_mode human has the rate of its labels; leave --r out")
    if mode != "human" and args.noise_key is not None:
        parser.error(f"--noise_key {args.noise_key}: only with --noise_mode human, one of {choices}; leave it out")
    args.noise_file = Path(args.noise_file) if args.noise_file else None
    if mode != "human" and args.noise_file and args.noise_file.suffix == ".pt":
        parser.error(f"--noise_file {args.noise_file}: a .pt file needs --noise_mode human and --noise_key")
    if mode != "sym" and args.noise_definition is not None:
        parser.error(f"--noise_definition {args.noise_definition}: only with --noise_mode sym; leave it out")
    if mode != "human" and args.r is None:
        args.r = NOISE_RATE
    if mode == "sym" and args.noise_definition is None:
        args.noise_definition = "with_self"
    if args.noise_seed is None:
        args.noise_seed = args.seed


def noise_spec(args: argparse.Namespace) -> NoiseSpec:
    """The noise that resolved flags ask for. args.num_class is the data's by then."""
    asym, _ = noise.asym_transition(args.num_class, args.dataset)
    asked = args.dataset, args.noise_mode, args.r, args.noise_seed, args.num_class, asym
    return NoiseSpec(*asked, args.noise_definition or "with_self", args.noise_key)


def resolve_recipe(args: argparse.Namespace, wrong: float | None = None) -> list[str]:
    """Fill lambda_u, p_threshold, loss_window and warm_up that were not given. `wrong`: see `recipes.nearest`. -> lines
    that say where each value comes from, of which cross-entropy has none, and how the run differs from the paper's."""
    lines = resolve_blind(args) if args.recipe == "blind" else resolve_paper(args, wrong)
    setting, _ = recipes.in_paper("Train_cifar.py", vars(args))
    return [*(lines if args.method == "dividemix" else []), *differs(args, setting)]


def resolve_paper(args: argparse.Namespace, wrong: float | None) -> list[str]:
    """The same for `--recipe paper`. -> lines"""
    row, exact = recipes.nearest(args.dataset, args.noise_mode, args.r, wrong)
    by = "" if wrong is None else f" by {wrong:.1%} wrong labels"
    source = f"paper, Table 7: {row.name}" if exact else f"not in the paper; nearest row{by}, Table 7: {row.name}"
    found = {
        "lambda_u": (row.lambda_u, source),
        "p_threshold": (row.p_threshold, source),
        "loss_window": (row.loss_window, source),
        "warm_up": (
            recipes.warm_up(args.dataset),
            "paper, Sec. 4.2" if args.dataset.startswith("cifar") else "as CIFAR-10",
        ),
    }
    lines = []
    for name, (value, origin) in found.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        else:
            origin = f"given; {row.name} has {value:g}"
        lines.append(f"{name} {getattr(args, name):g} ({origin})")
    penalty = "on" if args.noise_mode == "asym" else "off"
    origin = (
        "the authors', by the kind of noise" if args.conf_penalty == "auto" else f"given; the authors have {penalty}"
    )
    lines.append(f"conf_penalty {penalty if args.conf_penalty == 'auto' else args.conf_penalty} ({origin}, in warm-up)")
    return lines


def resolve_blind(args: argparse.Namespace) -> list[str]:
    """The same for `--recipe blind`, which leaves what `blind` chooses as None: fill warm_up. Cross-entropy has no
    divisions to choose by, so that it has what holds before the first. -> lines."""
    source = "given"
    if args.warm_up is None:
        args.warm_up, source = recipes.warm_up(args.dataset), "as the paper's for this data set, whatever the noise"
    by_data = "chosen in each divided epoch by the divisions so far"
    chosen = {name: getattr(args, name) for name in blind.NAMES}
    if args.method == "ce":
        vars(args).update(blind.setting(None, chosen))
    always = f"{'on' if blind.CONF_PENALTY else 'off'} (in warm-up, whatever the noise)"
    penalty = always if args.conf_penalty == "auto" else f"{args.conf_penalty} (given)"
    return [
        "recipe blind: r, noise_mode and the true labels are used to make the noise and to report, not to train",
        *(f"{name} {by_data if value is None else f'{value:g} (given)'}" for name, value in chosen.items()),
        f"conf_penalty {penalty}",
        f"warm_up {args.warm_up} ({source})",
    ]


def mixmatch(args: argparse.Namespace, *, conf_penalty: bool, **settings: Any) -> MixMatch:
    """The method's settings: those flags that are fields of `MixMatch`, and `settings`, which win. The flag of
    conf_penalty is a word."""
    settings["conf_penalty"] = conf_penalty
    fields = {field.name for field in dataclasses.fields(MixMatch)}
    return MixMatch(**{name: value for name, value in vars(args).items() if name in fields} | settings)


def refuse_ranks(script: str) -> None:
    """Raises DivideMixError under torchrun."""
    if ranks.from_environment()[1] > 1:
        raise DivideMixError(f"{script} trains on one card: start it without torchrun, once for each seed or setting")


def machine(args: argparse.Namespace) -> Runtime:
    """The runtime that the flags of `add_run` ask for."""
    return runtime.start(
        args.device,
        args.gpuid,
        args.precision,
        args.deterministic,
        args.width,
        batch_size=args.batch_size,
        eval_batch_size=args.eval_batch_size,
        compile=not args.no_compile,
        graph=not args.no_graph,
    )


def resolve_images(args: argparse.Namespace, paper: recipes.ImageRecipe) -> list[str]:
    """Fill --weights where it was not given: the paper's for its network, none for others. -> what a user should know
    of the flags. Raises DivideMixError for flags that do not go together."""
    if args.weights is None:
        args.weights = paper.images["weights"] if args.arch == paper.images["arch"] else "none"
    networks.check(args.arch, args.width, args.image_size, args.weights)
    notes = []
    if args.lambda_u > 0:
        notes = [f"--lambda_u {args.lambda_u:g}: accepted, has no effect; unlabeled images are mix partners only"]
    return [*notes, *differs(args, paper.setting)]


def differs(args: argparse.Namespace, paper: Mapping[str, Any]) -> list[str]:
    """What a run says at its start of how it differs from the paper's setting."""
    other = recipes.setting_differences(vars(args), paper)
    return [f"differs from the paper's setting: {', '.join(other)}"] if other else []


def but(args: argparse.Namespace, paper: Mapping[str, Any], *more: str) -> str:
    """The same at its end, behind the paper's result. more: other differences than of flags."""
    other = [*recipes.setting_differences(vars(args), paper), *more]
    return f" (but this run: {', '.join(other)})" if other else ""


def small_result(
    args: argparse.Namespace, records: Sequence[dict[str, Any]], best: int, official: bool
) -> tuple[str, dict[str, float]]:
    """The last line of Train_cifar.py, best (of epoch `best`) and last beside the paper's, and the paper's results by
    their names in result.json."""
    setting, paper = recipes.in_paper("Train_cifar.py", vars(args))
    final = records[-1]
    line = f"best {final['best_acc']:.2f} (epoch {best}), mean of the last 10 {final['last10_acc']:.2f}"
    if args.method == "ce":
        line += f"; net 1 alone: best {max(record['test_acc_net1'] for record in records):.2f}"
    if paper:
        whose = f"paper's {recipes.ABLATIONS[args.ablation].paper_name} (Table 5): best {paper['best']}"
        if args.method == "ce":
            whose = f"paper's cross-entropy, one net: best {paper['best']}"
        elif args.ablation == "none":
            whose = f"paper: {paper['best']} / {paper['last']}"
        line += "; " + whose + but(args, setting, *([] if official else [f"not the official {args.dataset}"]))
    return line, {f"paper_{name}": value for name, value in paper.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A script's end


def command_line(
    main: Callable[[Sequence[str] | None], Any],
    stopped_means: str = "the same command continues after the last finished epoch",
) -> NoReturn:
    """Run a script's main: errors that people can mend are one line and exit status 1, Ctrl-C is 130, SIGTERM 143.
    Among several ranks (torchrun) each line says whose it is, and a rank that fails ends at once, so that torchrun ends
    the others."""
    who = speaker()
    sys.stdout.reconfigure(errors="backslashreplace")  # a path that is not UTF-8 can be printed
    warnings.formatwarning = lambda message, *_, **__: f"{who}warning: {message}\n"
    # Of the ranks on one machine all would say the same.
    warnings.simplefilter("always" if ranks.from_environment()[2] == 0 else "ignore", DivideMixWarning)
    try:
        with signals.stoppable():
            main(None)
        ranks.leave()
    except DivideMixError as error:
        end(f"{who}error: {error}")
    except OSError as error:  # a full disk, a folder that went away
        # filename2: of two, the one that the user knows, not the temporary one
        end(f"{who}error: {error.filename2 or error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt as stopped:
        how = getattr(stopped, "__notes__", [stopped_means])
        end(f"\n{who}interrupted: {'; '.join(how)}", getattr(stopped, "status", 130))
    except Exception as error:
        if runtime.is_out_of_memory(error):
            end(f"{who}error: not enough memory ({str(error).splitlines()[0][:120] if str(error) else 'of the host'})")
        if not who:
            raise
        if lost_the_others(error):
            end(f"{who}error: another rank ended or cannot be reached: its own line, if there is one, says why")
        end(who + traceback.format_exc().rstrip())
    end("", 0)


def speaker() -> str:
    """What a line on stderr begins with: the rank, where there are several."""
    rank, world, _ = ranks.from_environment()
    return f"rank {rank}: " if world > 1 else ""


def end(message: str, status: int = 1) -> NoReturn:
    """Say why, and end the process. Among several ranks without the interpreter's clean-up: it frees memory of the
    card, and would wait there for a collective that the others never come to; and a thread of gloo that lets go of a
    tensor meanwhile aborts the process (torch.distributed.nn keeps the process group alive until then)."""
    if message:
        print(message, file=sys.stderr)
    if speaker():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def lost_the_others(error: Exception) -> bool:
    """Whether a collective failed because of another rank. gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
