"""The command line: flag types with their ranges, the flags that scripts share, the paper's setting by default."""

import argparse
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from dividemix import DivideMixError, DivideMixWarning, blind, networks, noise, recipes, runtime
from dividemix.engine import MixMatch
from dividemix.noise import NoiseSpec, wrong_share
from dividemix.run.signals import stoppable
from dividemix.runtime import Runtime, available_cores, ranks

NOISE_RATE = 0.5


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default once, and none where there is nothing to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "") or action.default is False or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and that takes no abbreviated flags: a run's flags stay readable."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{rank_prefix()}{self.prog}: error: {message} (--help lists all flags)\n")


# ---------------------------------------------------------------------------------------------------------------------
# Types: a text from the command line -> a value in its range, or one line that says what was expected


def number(kind: type, expected: str, accept: Callable[[Any], bool]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
            if accept(value) and math.isfinite(value):
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


def add_method(parser: Parser, source: str = "the paper's", **defaults: float) -> None:
    """The method's hyper-parameters, names as the authors'. A flag without a default gets its value later, from
    `source`; lambda_u has a default only where it has no effect."""
    group = parser.add_argument_group("method")
    defaults = {"T": 0.5} | defaults

    def add(name: str, kind: Callable[[str], Any], text: str, *other_names: str) -> None:
        text += "" if name in defaults else f" (default: {source})"
        group.add_argument(f"--{name}", *other_names, type=kind, default=defaults.get(name), help=text)

    add("batch_size", positive_int, "labeled = unlabeled images a step; twice that in warm-up")
    add("lr", positive, "learning rate", "--learning_rate")
    add("lr_drop", positive_int, "epoch from which the learning rate is a tenth")
    add("num_epochs", positive_int, "epochs in all, warm-up included")
    add("warm_up", count, "epochs of plain cross-entropy before the first division")
    add("alpha", positive, "parameter of mixup's Beta distribution")
    add("T", positive, "sharpening temperature")
    without_effect = "accepted and without effect: unlabeled images are mixed in, and have no loss of their own"
    add("lambda_u", non_negative, without_effect if "lambda_u" in defaults else "weight of the unlabeled loss")
    add("p_threshold", open_unit, "clean probability above which a sample is labeled")


def add_small_images(parser: Parser) -> None:
    """Data, noise, network and variants of Train_cifar.py."""
    add = parser.add_argument_group("data").add_argument
    names = ["cifar10", "cifar100", "fashionmnist", "digits"]
    add("--dataset", choices=names, default="cifar10", help="digits come with scikit-learn")
    add("--data_path", default="./cifar-10", help="folder of the data set's files; digits needs none")
    add("--download", action="store_true", help="fetch and verify the data set if it is not there")
    add("--num_class", type=positive_int, help="refused when it contradicts the data (default: from the data)")
    add("--limit_train", type=positive_int, metavar="N", help="train on a seeded subset of N samples")

    add = parser.add_argument_group("noise").add_argument
    text = "symmetric, asymmetric, instance-dependent, or human: CIFAR-10N's and CIFAR-100N's labels"
    add("--noise_mode", choices=[*noise.MODES, "idn", "human"], default="sym", help=text)
    text = f"share of the samples that is drawn, for idn mean flip rate; not with human (default: {NOISE_RATE})"
    add("--r", type=rate, help=text)
    text = "what a drawn label becomes, with sym: any class, or any other class (default: with_self, the paper's)"
    add("--noise_definition", choices=noise.DEFINITIONS, help=text)
    text = "JSON list of noisy labels, with human the published .pt file (default, beside the data: "
    text += "<r>_<noise_mode>.json, CIFAR-10_human.pt or CIFAR-100_human.pt)"
    add("--noise_file", help=text)
    add("--noise_key", choices=noise.human.KEYS, help="with human: which of the file's labels")
    add("--noise_seed", type=seed, help="seed of the noise, where no file exists (default: --seed)")

    add = parser.add_argument_group("network and variants").add_argument
    add("--arch", choices=networks.SMALL_IMAGES, default="preresnet18", help="both networks")
    add("--width", type=positive_int, default=networks.WIDTH, help="channels of the first stage")
    add("--method", choices=["dividemix", "ce"], default="dividemix", help="ce: plain cross-entropy, else the same")
    add("--ablation", choices=list(recipes.ABLATIONS), default="none", help="leave out a part, as the paper's Table 5")
    text = "lambda_u, p_threshold, loss_window, conf_penalty: the paper's for r and noise_mode, or blind to both"
    add("--recipe", choices=["paper", "blind"], default="paper", help=text)
    add("--loss_window", type=positive_int, help="epochs of loss averaged for a division (default: the paper's)")
    text = "confidence penalty in warm-up; auto: by the recipe"
    add("--conf_penalty", choices=["auto", "on", "off"], default="auto", help=text)


def add_images(
    parser: Parser, data_path: str | None = None, *, keep_images: bool = False, cache_dir: bool = False, **paper: Any
) -> None:
    """Network and data of the scripts for large images. paper: defaults as in `ImageRecipe.images`; none for own
    images, whose data tell them. keep_images, cache_dir: whether there is such a flag."""
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
    text = f"ImageNet weights, none, or a file's, for both networks but their classifiers (default: {weights})"
    add("--weights", metavar="imagenet|none|PATH", help=text)
    text = f"side of the crop; images are resized in proportion{from_data}"
    add("--image_size", type=positive_int, default=paper.get("image_size"), help=text)
    if "num_class" in paper:
        add("--num_class", type=positive_int, default=paper["num_class"], help="classes")
    if "num_batches" in paper:
        add("--num_batches", type=positive_int, default=paper["num_batches"], help="batches of an epoch's sample")
    depth: dict[str, Any] = {"nargs": "?", "choices": ["quick", "full"], "const": "quick"}
    add("--check_data", **depth, help="say what is wrong with the data folder, and end; full decodes every image")
    add("--skip_bad_images", **depth, help="leave damaged images out; full decodes every image to find them")
    if keep_images:
        text = "where images scored for a division stay until they are trained on; auto: where there is room"
        add("--keep_images", choices=["auto", "device", "host", "no"], default="auto", help=text)
    if cache_dir:
        add("--cache_dir", help="folder for resized images, so that each is decoded once")


def add_own_images(parser: Parser) -> None:
    """What Train_folder.py has beside the flags for images."""
    add = parser.add_argument_group("own images").add_argument
    add("--labels", metavar="FILE.csv", help="training labels, instead of those in --data_path")
    text = "part of the training images held out to select the best epoch (default: 0.1 without a val and a test part)"
    add("--val_fraction", type=part, help=text)
    add("--no_flip", action="store_true", help="never mirror images: for digits, text, left and right")
    text = "images as pixels on the device, cropped after padding; or read by workers; auto: by size"
    add("--data_mode", choices=["auto", "device", "stream"], default="auto", help=text)
    add("--method", choices=["dividemix", "ce"], default="dividemix", help="ce: plain cross-entropy, else the same")
    add("--conf_penalty", choices=["on", "off"], default="off", help="confidence penalty in warm-up")


def add_run(
    parser: Parser,
    id: str = "",
    val_fraction: bool = True,
    save_scores: bool = True,
    eval_batch_size: int | None = 1000,
) -> None:
    """Where and how it runs. val_fraction, save_scores: whether there is such a flag, which a script lacks that has a
    validation set of its own, or always saves. eval_batch_size: None where the images' size tells it."""
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=seed, default=123, help="every random draw derives from it")
    add("--id", type=run_id, default=id, help="suffix of the run folder's name")
    add("--out_dir", default="./checkpoint", help="holds the run folders")
    add("--run_dir", help="the run folder itself, instead of a name under --out_dir")
    add("--fresh", action="store_true", help="start anew: move an existing run folder aside")
    add("--init_from", metavar="FILE", help="checkpoint that both networks start from (weights only)")
    if val_fraction:
        text = "part of the (noisy) training set held out to select the best epoch"
        add("--val_fraction", type=part, default=0.0, help=text)
    text = "leave out the pass over all training labels at the end, and with it label_issues.csv"
    add("--no_label_scores", action="store_true", help=text)
    if save_scores:
        text = "keep every epoch's loss, clean probability and prediction of each sample that was scored"
        add("--save_scores", action="store_true", help=text)

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: CUDA card, else mps, else cpu")
    add("--gpuid", type=count, default=0, help="which CUDA card")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where the device has it")
    add("--deterministic", action="store_true", help="deterministic kernels only: bit-equal reruns on one GPU model")
    add("--no_compile", action="store_true", help="on a GPU: do not fuse operators (torch.compile)")
    add("--no_graph", action="store_true", help="on a GPU: do not capture steps in CUDA graphs")
    text = f"batch of loss passes and tests{'' if eval_batch_size else ' (default: from the data)'}"
    add("--eval_batch_size", type=positive_int, default=eval_batch_size, help=text)
    workers = min(16, max(1, available_cores() // ranks.on_this_machine()))
    add("--workers", type=processes, default=workers, help="image-loading processes of each rank")


# ---------------------------------------------------------------------------------------------------------------------
# What the flags come to


class SmallSetting(NamedTuple):
    """What the flags of Train_cifar.py come to, with the data. lines: where each value comes from."""

    folder: Path
    noise: NoiseSpec
    ablation: recipes.Ablation
    blind: bool  # whether lambda_u, p_threshold and loss_window are chosen while it trains
    conf_penalty: bool
    lines: list[str]


def resolve_small(
    args: argparse.Namespace, labels: NDArray[np.int64], num_class: int, data_folder: Path | None
) -> SmallSetting:
    """Fill what was not given; labels: the true ones (N,). Raises DivideMixError for flags that contradict the data."""
    if args.num_class not in (None, num_class):
        raise DivideMixError(f"--num_class {args.num_class}: {args.dataset} has {num_class} classes; leave it out")
    args.num_class = num_class
    if args.limit_train and args.limit_train > len(labels):
        raise DivideMixError(f"--limit_train {args.limit_train}: there are {len(labels)} training samples")
    transition, _ = noise.asym_transition(num_class, args.dataset)
    asked = args.dataset, args.noise_mode, args.r, args.noise_seed, num_class, transition
    spec = NoiseSpec(*asked, args.noise_definition or "with_self", args.noise_key)
    variant = "ce" if args.method == "ce" else "" if args.ablation == "none" else args.ablation
    folder = folder_for(args, args.dataset, *spec.folder_parts, variant)
    lines = resolve_recipe(args, wrong_share(labels, spec, data_folder, folder, args.noise_file))
    ablation = recipes.ABLATIONS[args.ablation]
    if args.ablation != "none":
        lines.insert(0, f"ablation {args.ablation}: {ablation.reading} ({ablation.paper_name})")
    is_blind = args.recipe == "blind" and args.method == "dividemix"
    return SmallSetting(folder, spec, ablation, is_blind, uses_conf_penalty(args), lines)


def folder_for(args: argparse.Namespace, *parts: str) -> Path:
    """--run_dir, or --out_dir / the non-empty parts, the seed where it is not the default, and --id, joined by '_'."""
    parts = *parts, f"seed{args.seed}" if args.seed != 123 else "", args.id
    return Path(args.run_dir) if args.run_dir else Path(args.out_dir) / "_".join(filter(None, parts))


def resolve_noise(parser: Parser, args: argparse.Namespace) -> None:
    """Fill what was not given, and refuse flags that have no meaning together. r is None for human, noise_definition
    None but for sym; noise_file becomes a Path."""
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


def set_default(args: argparse.Namespace, name: str, value: Any, source: str, given: str = "given") -> str:
    """Fill the flag `name` unless it was given. -> the line that says its value and where it comes from"""
    if getattr(args, name) is None:
        setattr(args, name, value)
    else:
        source = given
    return f"{name} {recipes.flag_text(getattr(args, name))} ({source})"


def resolve_recipe(args: argparse.Namespace, wrong: float | None = None) -> list[str]:
    """Fill lambda_u, p_threshold, loss_window and warm_up that were not given, but for what `--recipe blind` chooses
    while it trains. `wrong`: see `recipes.nearest`. -> lines that say where each value comes from, of which
    cross-entropy has none, and how the run differs from the paper's."""
    warm_up = recipes.warm_up(args.dataset)
    if args.recipe == "blind":
        lines = ["recipe blind: r, noise_mode and the true labels are used to make and report the noise, not to train"]
        flags = {name: getattr(args, name) for name in blind.NAMES}
        chosen = "chosen in each divided epoch by the divisions so far"
        lines += [f"{name} {chosen if value is None else f'{value:g} (given)'}" for name, value in flags.items()]
        if args.method == "ce":  # without a division to choose by
            vars(args).update(blind.setting(None, flags))
        lines.append(set_default(args, "warm_up", warm_up, "the paper's for this data set, whatever the noise"))
        rule = f"blind: {'on' if blind.CONF_PENALTY else 'off'} whatever the noise"
    else:
        row, exact = recipes.nearest(args.dataset, args.noise_mode, args.r, wrong)
        by = "" if wrong is None else f" by {wrong:.1%} wrong labels"
        source = f"paper, Table 7: {row.name}" if exact else f"not in the paper; nearest row{by}, Table 7: {row.name}"

        def from_row(name: str, value: float, source: str) -> str:
            return set_default(args, name, value, source, f"given; {row.name} has {value:g}")

        lines = [from_row(name, getattr(row, name), source) for name in blind.NAMES]
        lines.append(
            from_row("warm_up", warm_up, "paper, Sec. 4.1" if args.dataset.startswith("cifar") else "as CIFAR-10")
        )
        rule = "paper: only for asymmetric noise"
    rule = rule if args.conf_penalty == "auto" else f"given; {rule}"
    lines.append(f"confidence penalty in warm-up: {'on' if uses_conf_penalty(args) else 'off'} ({rule})")
    setting, _ = recipes.in_paper("Train_cifar.py", vars(args))
    return [*(lines if args.method == "dividemix" else []), *differs(args, setting)]


def uses_conf_penalty(args: argparse.Namespace) -> bool:
    """Whether Train_cifar.py's warm-up has the confidence penalty."""
    if args.conf_penalty == "auto" and args.method == "dividemix":
        return blind.CONF_PENALTY if args.recipe == "blind" else args.noise_mode == "asym"
    return args.conf_penalty == "on"


def mixmatch(args: argparse.Namespace, *, conf_penalty: bool, **settings: Any) -> MixMatch:
    """The method's settings: those flags that are fields of `MixMatch`, and `settings`, which win. The flag of
    conf_penalty is a word."""
    flags = {name: value for name, value in vars(args).items() if name in MixMatch.__dataclass_fields__}
    return MixMatch(**flags | {"conf_penalty": conf_penalty} | settings)


def build_networks(args: argparse.Namespace, runtime: Runtime, begun: bool, count: int = 2) -> list[nn.Module]:
    """The networks that the flags ask for, on the device. begun: whether the run continues from a checkpoint; then no
    weights are read. Raises DivideMixError for weights that do not fit."""
    shape = args.arch, args.num_class, args.width
    weights = getattr(args, "weights", "none")  # Train_cifar.py has no such flag
    start = {"init_from": args.init_from, "seed": args.seed, "runtime": runtime, "begun": begun}
    return networks.pair(*shape, weights, **start, count=count)


def refuse_ranks(script: str) -> None:
    """Raises DivideMixError under torchrun."""
    if ranks.from_environment()[1] > 1:
        raise DivideMixError(f"{script} trains on one card: start it without torchrun, once for each seed or setting")


def start_runtime(args: argparse.Namespace) -> Runtime:
    """The runtime that the flags of `add_run` ask for."""
    sizes = {"batch_size": args.batch_size, "eval_batch_size": args.eval_batch_size}
    device = args.device, args.gpuid, args.precision, args.deterministic, args.width
    return runtime.start(*device, **sizes, compile=not args.no_compile, graph=not args.no_graph)


def resolve_images(args: argparse.Namespace, paper: recipes.ImageRecipe) -> list[str]:
    """Fill --weights where it was not given: the paper's for its network, none for others. -> what a user should know
    of the flags. Raises DivideMixError for flags that do not go together."""
    if args.weights is None:
        args.weights = paper.images["weights"] if args.arch == paper.images["arch"] else "none"
    networks.check(args.arch, args.width, args.image_size, args.weights)
    notes = differs(args, paper.setting)
    if args.lambda_u > 0:
        why = "accepted, has no effect; unlabeled images are mix partners only"
        notes.insert(0, f"--lambda_u {args.lambda_u:g}: {why}")
    return notes


def differs(args: argparse.Namespace, paper: Mapping[str, Any]) -> list[str]:
    """What a run says at its start of how it differs from the paper's setting."""
    differences = recipes.setting_differences(vars(args), paper)
    return [f"differs from the paper's setting: {', '.join(differences)}"] if differences else []


def but(args: argparse.Namespace, paper: Mapping[str, Any], *more: str) -> str:
    """The same at its end, behind the paper's result. more: other differences than of flags."""
    differences = [*recipes.setting_differences(vars(args), paper), *more]
    return f" (but this run: {', '.join(differences)})" if differences else ""


def small_result(
    args: argparse.Namespace, records: Sequence[dict[str, Any]], best: int, official: bool
) -> tuple[str, dict[str, float]]:
    """The last line of Train_cifar.py, best (of epoch `best`) and last beside the paper's, and the paper's results by
    their names in result.json."""
    setting, paper = recipes.in_paper("Train_cifar.py", vars(args))
    final = records[-1]
    line = f"best {final['best_acc']:.2f} (epoch {best}), mean of the last 10 {final['last10_acc']:.2f}"
    title = "paper:"
    if args.method == "ce":
        line += f"; net 1 alone: best {max(record['test_acc_net1'] for record in records):.2f}"
        title = "paper's cross-entropy, one net: best"
    elif args.ablation != "none":
        title = f"paper's {recipes.ABLATIONS[args.ablation].paper_name} (Table 5): best"
    if paper:
        results = " / ".join(map(str, paper.values()))
        line += f"; {title} {results}{but(args, setting, *([] if official else [f'not the official {args.dataset}']))}"
    return line, {f"paper_{name}": value for name, value in paper.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A script's end


def command_line(
    main: Callable[[Sequence[str] | None], Any],
    stopped_means: str = "the same command continues after the last finished epoch",
) -> NoReturn:
    """Run a script's main: errors that people can mend are one line and exit status 1, Ctrl-C is 130, SIGTERM 143.
    Where nobody reads the output any more (`| head`), it ends quietly with 141. Among several ranks (torchrun) each
    line says whose it is, and a rank that fails ends at once, so that torchrun ends the others."""
    who = rank_prefix()
    sys.stdout.reconfigure(errors="backslashreplace")  # a path that is not UTF-8 can be printed
    warnings.formatwarning = lambda message, *_, **__: f"{who}warning: {message}\n"
    # Of the ranks on one machine all would say the same.
    warnings.simplefilter("always" if ranks.from_environment()[2] == 0 else "ignore", DivideMixWarning)
    try:
        with stoppable():
            main(None)
        sys.stdout.flush()
        ranks.leave()
    except DivideMixError as error:
        end(f"{who}error: {error}")
    except OSError as error:  # a full disk, a folder that went away
        try:
            if isinstance(error, BrokenPipeError):
                print(flush=True)
        except BrokenPipeError:  # nobody reads the output any more, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end("", 141)  # as a program that SIGPIPE ends
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
        # A collective failed because of another rank; gloo has no error class of its own.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            end(f"{who}error: another rank ended or cannot be reached: its own line, if there is one, says why")
        end(who + traceback.format_exc().rstrip())
    end("", 0)


def rank_prefix() -> str:
    """What a line on stderr begins with: the rank, where there are several."""
    rank, world, _ = ranks.from_environment()
    return f"rank {rank}: " if world > 1 else ""


def end(message: str, status: int = 1) -> NoReturn:
    """Say why, and end the process. Among several ranks without the interpreter's clean-up: it frees memory of the
    card, and would wait there for a collective that the others never come to; and a thread of gloo that lets go of a
    tensor meanwhile aborts the process (torch.distributed.nn keeps the process group alive until then)."""
    if message:
        print(message, file=sys.stderr)
    if rank_prefix():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
