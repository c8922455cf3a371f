"""The noise flags of Train_cifar.py, and which of them go together."""

import argparse
from pathlib import Path

from dividemix import noise, noise_human, options
from dividemix.noise_file import NoiseSpec

MODES = (*noise.MODES, "idn", "human")
RATE = 0.5


def add(parser: options.Parser) -> None:
    group = parser.add_argument_group("noise")
    group.add_argument(
        "--noise_mode",
        choices=MODES,
        default="sym",
        help="symmetric, asymmetric or instance-dependent noise, or CIFAR-10N's and CIFAR-100N's labels from people",
    )
    group.add_argument(
        "--r",
        type=options.rate,
        help="noise rate: the part of the training samples that is drawn, for idn the mean flip rate; not with human "
        f"(default: {RATE})",
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
    group.add_argument(
        "--noise_seed", type=options.seed, help="seed of the noise, where no file exists (default: --seed)"
    )


def resolve(parser: options.Parser, args: argparse.Namespace) -> None:
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
        args.r = RATE
    if mode == "sym" and args.noise_definition is None:
        args.noise_definition = "with_self"
    if args.noise_seed is None:
        args.noise_seed = args.seed


def spec(args: argparse.Namespace) -> NoiseSpec:
    """The noise that resolved flags ask for. args.num_class is the data's by then."""
    asym, _ = noise.asym_transition(args.num_class, args.dataset)
    asked = args.dataset, args.noise_mode, args.r, args.noise_seed, args.num_class, asym
    return NoiseSpec(*asked, args.noise_definition or "with_self", args.noise_key)
