"""The command line: flag types with their ranges, the groups that all scripts share, and the paper's setting by
default."""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dividemix import DivideMixError, DivideMixWarning, recipes


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
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


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
seed = number(int, "a whole number from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
positive = number(float, "a number above 0", lambda v: v > 0)
non_negative = number(float, "a number of 0 or more", lambda v: v >= 0)
rate = number(float, "a rate from 0 to 1", lambda v: 0 <= v <= 1)
open_unit = number(float, "a number between 0 and 1, both excluded", lambda v: 0 < v < 1)
part = number(float, "a part of at least 0 and less than 1", lambda v: 0 <= v < 1)


def run_id(text: str) -> str:
    """A suffix of the run folder's name."""
    if not all(c.isalnum() or c in "._-" for c in text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, '.', '_' and '-', got '{text}'")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def add_method(parser: Parser, *, batch_size: int, lr: float, alpha: float, num_epochs: int, lr_drop: int) -> None:
    """The method's hyper-parameters, names as the authors'. Defaults of None come from `recipes`."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=batch_size,
        help="labeled = unlabeled images a step; twice that in warm-up",
    )
    group.add_argument("--lr", "--learning_rate", type=positive, default=lr, help="learning rate")
    group.add_argument(
        "--lr_drop", type=positive_int, default=lr_drop, help="epoch from which the learning rate is a tenth"
    )
    group.add_argument("--num_epochs", type=positive_int, default=num_epochs, help="epochs in all, warm-up included")
    group.add_argument(
        "--warm_up", type=count, help="epochs of plain cross-entropy before the first division (default: the paper's)"
    )
    group.add_argument("--alpha", type=positive, default=alpha, help="parameter of mixup's Beta distribution")
    group.add_argument("--T", type=positive, default=0.5, help="sharpening temperature")
    group.add_argument(
        "--lambda_u", type=non_negative, help="weight of the unlabeled loss (default: the paper's for the setting)"
    )
    group.add_argument(
        "--p_threshold", type=open_unit, help="clean probability above which a sample is labeled (default: the paper's)"
    )


def add_run(parser: Parser) -> None:
    """Where and how it runs: the same flags for every script."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=seed, default=123, help="every random draw derives from it")
    group.add_argument("--id", type=run_id, default="", help="suffix of the run folder's name")
    group.add_argument("--out_dir", default="./checkpoint", help="holds the run folders")
    group.add_argument("--run_dir", help="the run folder itself, instead of a name under --out_dir")
    group.add_argument("--fresh", action="store_true", help="start anew: move an existing run folder aside")
    group.add_argument("--init_from", metavar="FILE", help="checkpoint that both networks start from (weights only)")
    group.add_argument(
        "--val_fraction",
        type=part,
        default=0.0,
        help="part of the (noisy) training set held out to select the best epoch",
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
    group.add_argument("--eval_batch_size", type=positive_int, default=1000, help="batch of loss passes and tests")
    group.add_argument(
        "--workers", type=count, default=4, help="image-loading processes; sets that live on the device start none"
    )


def resolve_recipe(args: argparse.Namespace) -> tuple[recipes.Recipe | None, list[str]]:
    """Fill lambda_u, p_threshold, loss_window and warm_up that were not given. -> (the paper's row if there is one
    for this setting, lines that say where each value comes from)."""
    row, exact = recipes.nearest(args.dataset, args.noise_mode, args.r)
    source = f"paper, Table 7: {row.name}" if exact else f"not in the paper; nearest row, Table 7: {row.name}"
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
    return (row if exact else None), lines


def command_line(main: Callable[[Sequence[str] | None], Any]) -> NoReturn:
    """Run a script's main: errors that people can mend are one line and exit status 1, Ctrl-C is 130."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    warnings.simplefilter("always", DivideMixWarning)
    try:
        main(None)
    except DivideMixError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that went away
        sys.exit(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues after the last finished epoch", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
