"""The command line: flags, their types, and what scripts make of them (run folder, runtime, networks, mixtures,
settings)."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from dividemix import DivideMixError, blind, networks, noise, recipes, runtime
from dividemix.codivide import DIVISIONS, Mixture
from dividemix.engine import DataSet, MixMatch
from dividemix.run.run import Run
from dividemix.run.signals import rank_prefix
from dividemix.runtime import Average, Runtime, available_cores, ranks

COMMAND = "dividemix ", "python -m dividemix "  # how a command's name begins, in sys.argv[0]


def interface() -> str:
    """`dividemix` as this process was started."""
    return COMMAND[0 if sys.argv[0].startswith(COMMAND[0]) else 1].strip()


NOISE_RATE = 0.5  # of --r
SMALL = 64  # pixels: images up to this side are small
HOLD_NOTHING_OUT = "--val_fraction", "0"  # what `dividemix issues` puts before its flags
METHOD_HELP = "ce: plain cross-entropy, everything else the same"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default once, and none where the help text names it or there is nothing to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "") or action.default is False or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line. It takes no abbreviated flags, so that a run's command stays readable.

    --help begins with two examples and the flags that people use. prog: the script's file; called by `dividemix`, the
    name is that of the command (`sys.argv[0]`). examples: flags behind it. common: names of flags."""

    def __init__(self, prog: str, description: str, examples: Sequence[str], common: Sequence[str] = (), **more: Any):
        prog = sys.argv[0] if sys.argv[0].startswith(COMMAND) else prog
        program = f"python {prog}" if prog.endswith(".py") else prog
        description += "\n\nexamples:\n" + "\n".join(f"  {program} {example}" for example in examples)
        more = {"usage": "%(prog)s [flags]"} | more
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=Help, **more)
        self.common = common

    def format_help(self) -> str:
        most_used = [action for name in self.common for action in self._actions if action.dest == name]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        groups = [(group.title, group._group_actions) for group in self._action_groups]
        for title, actions in [("most used", most_used), *groups]:
            formatter.start_section(title)
            formatter.add_arguments([a for a in actions if a not in most_used or title == "most used"])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{rank_prefix()}{self.prog}: error: {message} (--help lists all flags)\n")


# ---- Types of flags: a text -> a value in its range, or one line that says what was expected ----


def number(kind: type, expected: str, in_range: Callable[[Any], bool]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
            if in_range(value) and math.isfinite(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")

    return convert


positive_int = number(int, "a whole number of 1 or more", lambda v: 1 <= v < 2**31)
count = number(int, "a whole number of 0 or more", lambda v: 0 <= v < 2**31)
processes = number(int, "a whole number from 0 to 256", lambda v: 0 <= v <= 256)  # thousands stop the machine
seed = number(int, "a whole number from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
positive = number(float, "a number above 0", lambda v: v > 0)
non_negative = number(float, "a number of 0 or more", lambda v: v >= 0)
rate = number(float, "a rate from 0 to 1", lambda v: 0 <= v <= 1)
open_unit = number(float, "a number between 0 and 1, both excluded", lambda v: 0 < v < 1)
fraction = number(float, "a number of 0 or more and below 1", lambda v: 0 <= v < 1)


def run_id(text: str) -> str:
    """The end of the run folder's name; for Clothing1M the whole name."""
    if text in (".", "..") or not all(c.isalnum() or c in "._-" for c in text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, '.', '_' and '-', got '{text}'")
    return text


def architecture(text: str) -> str:
    """The name of a network of this project or of torchvision."""
    try:
        networks.architecture(text)
    except DivideMixError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--arch ")) from error
    return text


# ---- Groups of flags ----


def add_method(parser: Parser, source: str = "the paper's", **defaults: Any) -> None:
    """The method's hyper-parameters, with the authors' names. A flag without a default gets its value later, and --help
    names the `source` of that value. lambda_u has a default only where it has no effect."""
    group = parser.add_argument_group("method")
    defaults = {"T": 0.5} | defaults

    def add(name: str, kind: Callable[[str], Any], text: str, *other_names: str, **more: Any) -> None:
        text += "" if name in defaults else f" (default: {source})"
        group.add_argument(f"--{name}", *other_names, type=kind, default=defaults.get(name), help=text, **more)

    add("batch_size", positive_int, "labeled images a step, and as many unlabeled ones; twice that in warm-up")
    add("lr", positive, "learning rate", "--learning_rate")
    add("lr_drop", positive_int, "epoch from which the learning rate is divided by 10")
    add("num_epochs", positive_int, "epochs in all, warm-up included")
    add("warm_up", count, "epochs of plain cross-entropy before the first division")
    add("alpha", positive, "parameter of mixup's Beta distribution")
    add("T", positive, "sharpening temperature")
    without_effect = "no effect here: unlabeled images have no loss of their own"
    add("lambda_u", non_negative, without_effect if "lambda_u" in defaults else "weight of the unlabeled loss")
    add("p_threshold", open_unit, "clean probability above which a sample is labeled")
    text = "one mixture for all samples, or one for each given class"
    add("division", str, text, choices=DIVISIONS)


def add_small_images(parser: Parser) -> None:
    """Train_cifar.py: data, noise, network, variants of the method."""
    add = parser.add_argument_group("data").add_argument
    names = ["cifar10", "cifar100", "fashionmnist", "digits"]
    add("--dataset", choices=names, default="cifar10", help="digits: comes with scikit-learn")
    add("--data_path", default="./cifar-10", help="folder with the files of the data set; not used for digits")
    add("--download", action="store_true", help="download and verify the data set if it is not there")
    add("--num_class", type=positive_int, help="number of classes; must agree with the data (default: from the data)")
    add("--limit_train", type=positive_int, metavar="N", help="train on N randomly chosen samples")

    add = parser.add_argument_group("noise").add_argument
    text = "symmetric, asymmetric, instance-dependent, or human: CIFAR-10N's and CIFAR-100N's labels"
    add("--noise_mode", choices=[*noise.MODES, "idn", "human"], default="sym", help=text)
    text = "noise rate: fraction of samples whose label is drawn anew; idn: mean fraction of wrong labels; human: none "
    text += f"(default: {NOISE_RATE})"
    add("--r", type=rate, help=text)
    text = "sym: a drawn label becomes any class, or any other class (default: with_self, as in the paper)"
    add("--noise_definition", choices=noise.DEFINITIONS, help=text)
    text = "JSON list or .npy array of noisy labels; human: the published .pt file (default, beside the data: "
    text += "<r>_<noise_mode>.json, CIFAR-10_human.pt or CIFAR-100_human.pt)"
    add("--noise_file", help=text)
    add("--noise_key", choices=noise.human.KEYS, help="human: which labels of the file")
    add("--noise_seed", type=seed, help="seed of the noise if there is no file yet (default: --seed)")

    add = parser.add_argument_group("network and variants").add_argument
    add("--arch", choices=networks.SMALL_IMAGES, default="preresnet18", help="both networks")
    add("--width", type=positive_int, default=networks.WIDTH, help="channels of the first stage")
    add("--method", choices=["dividemix", "ce"], default="dividemix", help=METHOD_HELP)
    add("--ablation", choices=list(recipes.ABLATIONS), default="none", help="leave a component out, as in Table 5")
    text = "paper: the paper's values for this noise; blind: chosen during training, without knowing the noise"
    add("--recipe", choices=["paper", "blind"], default="paper", help=text)
    add("--loss_window", type=positive_int, help="epochs of loss averaged for a division (default: the paper's)")
    text = "confidence penalty in warm-up; auto: by the recipe"
    add("--conf_penalty", choices=["auto", "on", "off"], default="auto", help=text)
    add_beyond_paper(parser)


def add_beyond_paper(parser: Parser) -> None:
    """What the paper does not have; for Train_cifar.py and Train_folder.py."""
    add = parser.add_argument_group("beyond the paper").add_argument
    text = "augmentation of the mixed images; weak: crop and flip; strong: also AutoAugment's CIFAR-10 policy"
    add("--augment", choices=["weak", "strong"], default="weak", help=text)
    text = "also test and keep a moving average of the weights; each step keeps DECAY of it, for example 0.999"
    add("--ema", type=open_unit, metavar="DECAY", help=text)


def add_images(
    parser: Parser, data_path: str | None = None, *, keep_images: bool = False, cache_dir: bool = False, **paper: Any
) -> None:
    """Network and data of the scripts for large images. paper: defaults as in `ImageRecipe.images`; none for own
    images, where they follow from the data. keep_images, cache_dir: whether the script has this flag."""
    add = parser.add_argument_group("network and images").add_argument
    from_data = "" if paper else " (default: from the data)"
    if paper:
        add("--data_path", default=data_path, help="folder of the lists and images")
        add("--arch", choices=list(networks.ARCHITECTURES), default=paper["arch"], help="both networks")
        weights = f"{paper['weights']} for {paper['arch']}, none for another --arch"
    else:
        add("--data_path", required=True, help="folder of class folders, or CSV file with the columns path and label")
        names = f"{', '.join(networks.ARCHITECTURES)}, or any of torchvision's for classification"
        add("--arch", type=architecture, help=f"both networks: {names}{from_data}")
        weights = "imagenet for networks that have them, none for others"
    add("--width", type=positive_int, default=networks.WIDTH, help="channels of a preresnet's first stage")
    text = f"initial weights of both networks, except their classifiers (default: {weights})"
    add("--weights", metavar="imagenet|none|PATH", help=text)
    text = f"side of the crop in pixels; images are resized in proportion{from_data}"
    add("--image_size", type=positive_int, default=paper.get("image_size"), help=text)
    if "num_class" in paper:
        add("--num_class", type=positive_int, default=paper["num_class"], help="number of classes")
    if "num_batches" in paper:
        add("--num_batches", type=positive_int, default=paper["num_batches"], help="batches in the sample of an epoch")
    depth: dict[str, Any] = {"nargs": "?", "choices": ["quick", "full"], "const": "quick"}
    add("--check_data", **depth, help="only say what is wrong with the data folder; full decodes every image")
    add("--skip_bad_images", **depth, help="train without damaged images; full decodes every image to find them")
    if keep_images:
        text = "where images of a division are kept until they are trained on; auto: where there is room"
        add("--keep_images", choices=["auto", "device", "host", "no"], default="auto", help=text)
    if cache_dir:
        add("--cache_dir", help="folder for resized images, so that each image is decoded only once")


def add_own_images(parser: Parser) -> None:
    """Flags of Train_folder.py alone."""
    add = parser.add_argument_group("own images").add_argument
    add("--labels", metavar="FILE.csv", help="training labels, instead of those in --data_path")
    add("--path_column", metavar="NAME", help="column of paths in tables, if it is not found by itself")
    add("--label_column", metavar="NAME", help="column of labels in tables, if it is not found by itself")
    text = "decisions saved by a review page, applied to the training labels; a later file wins"
    add("--corrections", nargs="+", action="extend", metavar="FILE.csv", help=text)
    text = "fraction of the training images held out to select the best epoch (default: 0.1 without val or test images)"
    add("--val_fraction", type=fraction, help=text)
    add("--no_flip", action="store_true", help="never mirror images, for example digits or text")
    text = "device: all images in device memory; stream: read from disk; auto: by size"
    add("--data_mode", choices=["auto", "device", "stream"], default="auto", help=text)
    add("--method", choices=["dividemix", "ce"], default="dividemix", help=METHOD_HELP)
    add("--conf_penalty", choices=["on", "off"], default="off", help="confidence penalty in warm-up")
    text = "own: fixed values for own images; blind: lambda_u, p_threshold, loss_window are chosen during training"
    add("--recipe", choices=["own", "blind"], default="own", help=text)
    add("--loss_window", type=positive_int, help="epochs of loss averaged for a division (default: from the data)")
    add_beyond_paper(parser)

    add = parser.add_argument_group("frozen features").add_argument
    text = "fast on a CPU: train two small classifiers on the features of a pretrained network (--arch)"
    add("--features", action="store_true", help=text)
    text = "--features: views of an image: the centre, mirrored, and random crops"
    views = number(int, "a whole number from 1 to 255", lambda v: 1 <= v <= 255)
    add("--feature_views", type=views, default=4, metavar="V", help=text)
    text = "train heads on these features, (N, D) or (V, N, D), instead; N: the images of train, val and test, in order"
    add("--feature_file", metavar="FILE.npy", help=text)


def add_run(
    parser: Parser,
    id: str = "",
    val_fraction: bool = True,
    save_scores: bool = True,
) -> None:
    """Where and how a script runs. val_fraction, save_scores: whether the script has this flag; not where there is a
    validation set, or where scores are always saved."""
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=seed, default=123, help="seed of every random draw")
    add("--id", type=run_id, default=id, help="end of the run folder's name")
    add("--out_dir", default="./checkpoint", help="folder of the run folders")
    add("--run_dir", help="the run folder itself, instead of a name in --out_dir")
    add("--fresh", action="store_true", help="start a new run; an existing run folder is renamed")
    add("--verbose", action="store_true", help="epoch lines with every number, and the seconds of each phase")
    add("--init_from", metavar="FILE", help="checkpoint with the initial weights of both networks")
    if val_fraction:
        text = "fraction of the (noisy) training set held out to select the best epoch"
        add("--val_fraction", type=fraction, default=0.0, help=text)
    text = "do not score all training labels at the end; then there is no label_issues.csv"
    add("--no_label_scores", action="store_true", help=text)
    if save_scores:
        text = "keep loss, clean probability and prediction of each scored sample of every epoch"
        add("--save_scores", action="store_true", help=text)

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, else mps, else cpu")
    add("--gpuid", type=count, default=0, help="which CUDA card")
    text = "auto: bf16 if the device has it, else fp32; fp16 (with a loss scale): for GPUs without bf16"
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help=text)
    add("--deterministic", action="store_true", help="exactly repeatable on one GPU model; slower")
    add("--no_compile", action="store_true", help="on a GPU: do not fuse operators (torch.compile)")
    add("--no_graph", action="store_true", help="on a GPU: do not capture steps in CUDA graphs")
    text = f"batch size of loss passes and tests (default: 1000, above {SMALL} px 200, on a CPU 64)"
    add("--eval_batch_size", type=positive_int, help=text)
    workers = min(16, max(1, available_cores() // ranks.on_this_machine()))
    add("--workers", type=processes, default=workers, help="processes of each rank that load images")


# ---- What the flags ask for ----


def tables(args: argparse.Namespace) -> dict[str, Any]:
    """How the tables of own images are read, as arguments of dataloader_folder.load."""
    columns = {"path_column": args.path_column, "label_column": args.label_column}
    return columns | {"corrections": args.corrections, "skip_bad": bool(args.skip_bad_images)}


def run_folder(args: argparse.Namespace, *names: str) -> Path:
    """--run_dir, or a folder in --out_dir named by `names`, the seed if it is not the default, and --id, with '_'."""
    names = *names, f"seed{args.seed}" if args.seed != 123 else "", args.id
    return Path(args.run_dir) if args.run_dir else Path(args.out_dir) / "_".join(filter(None, names))


def refuse_ranks(script: str) -> None:
    """Raises DivideMixError under torchrun."""
    if ranks.from_environment().world > 1:
        raise DivideMixError(f"{script} trains on one card: start it without torchrun, once for each seed or setting")


def start_runtime(args: argparse.Namespace) -> Runtime:
    """The runtime as in the flags of `add_run`; fills --eval_batch_size."""
    sizes = {"batch_size": args.batch_size, "eval_batch_size": args.eval_batch_size}
    device = args.device, args.gpuid, args.precision, args.deterministic, args.width
    large = vars(args).get("image_size", 0) > SMALL
    flags = {"large_images": large, "compile": not args.no_compile, "graph": not args.no_graph}
    started = runtime.start(*device, **sizes, **flags)
    args.eval_batch_size = started.eval_batch_size
    return started


def build_networks(
    args: argparse.Namespace, runtime: Runtime, begun: bool, count: int = 2, num_features: int = 0
) -> list[nn.Module]:
    """The networks that the flags ask for, on the device; heads, if there are `num_features`. begun: whether the run
    continues from a checkpoint; then no weights are read. Raises DivideMixError for weights that do not fit."""
    shape = args.arch, args.num_class, args.width
    weights = getattr(args, "weights", "none")  # Train_cifar.py has no such flag
    start = {"init_from": args.init_from, "seed": args.seed, "runtime": runtime, "begun": begun}
    nets = networks.pair(*shape, weights, **start, count=count, num_features=num_features)
    if decay := getattr(args, "ema", None):  # two scripts have no such flag
        runtime.averages = {net: Average(net, decay) for net in nets}
    return nets


def is_blind(args: argparse.Namespace) -> bool:
    return bool(args.recipe == "blind" and args.method == "dividemix")


def mixtures(args: argparse.Namespace, count: int = 2) -> list[Mixture]:
    """Each network's mixture, as in the flags; for Train_cifar.py and Train_folder.py."""
    largest_window = blind.HISTORY if is_blind(args) else 1
    values, warned = (args.p_threshold, args.loss_window or 1, largest_window, args.division), set()
    return [Mixture(*values, warned) for _ in range(count)]


def blind_choice(args: argparse.Namespace, run: Run, mixtures: Sequence[Mixture], data: DataSet) -> blind.Choice | None:
    """What chooses lambda_u, p_threshold and loss_window while it trains; None without `--recipe blind`."""
    if not is_blind(args):
        return None
    flags = {name: getattr(args, name) for name in blind.NAMES}
    return blind.Choice(run.records, mixtures, data.given_labels, args.num_class, flags, run.say)


def mixmatch(args: argparse.Namespace, *, conf_penalty: bool, **settings: Any) -> MixMatch:
    """The method's settings: the flags that are fields of `MixMatch`, then `settings`, which win. conf_penalty is an
    argument, since its flag is a word and no bool."""
    flags = {name: value for name, value in vars(args).items() if name in MixMatch.__dataclass_fields__}
    return MixMatch(**flags | {"conf_penalty": conf_penalty} | settings)
