"""A trained run as one file that needs only PyTorch: both networks, and metadata that say how to prepare an image.

    dividemix export RUN model.pt2                  # --weights last: of the last epoch, not of the best one

Its program takes images, float32 (B, channels, S, S) in [0, 1], for any B, and gives the sum of the networks' logits
(B, num_class).
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from dividemix import DivideMixError
from dividemix.data import READING
from dividemix.deploy.ensemble import WEIGHTS, Ensemble, check_output, epochs_used, load_ensemble
from dividemix.files import write_atomically
from dividemix.run import Description, Preparation, commit, options, read_description, versions

METADATA = "metadata.json"  # the name among the extra files of the .pt2 file
TOLERANCE = 1e-4  # largest allowed difference from the networks, relative to their largest |logit|
_BATCH_SIZES = (1, 2, 5)  # for the comparison; the program is traced with 2


def export(ensemble: Ensemble, preparation: Preparation, usage: dict[str, Any]) -> bytes:
    """The content of a .pt2 file: the ensemble for batches of any size, with `usage` as its metadata. Raises
    DivideMixError for networks that torch.export cannot trace."""
    content, batch = io.BytesIO(), {"images": {0: Dim("batch", min=1)}}
    try:
        with torch.no_grad():
            program = torch.export.export(ensemble, (random_images(2, preparation),), dynamic_shapes=batch)
            program = program.run_decompositions({})  # removes the no-autocast regions, which name the device
            torch.export.save(program, content, extra_files={METADATA: json.dumps(usage, indent=1)})
    except Exception as error:  # torch's tracer has no error class of its own
        reason = " ".join(str(error).split())[:200]
        raise DivideMixError(f"torch.export cannot trace this network ({type(error).__name__}: {reason})") from error
    return content.getvalue()


def metadata(run: Path, weights: str, ensemble: Ensemble, description: Description) -> dict[str, Any]:
    """How to use the exported file without this project: input, preprocessing, output, classes, and its origin."""
    p, side = description.preparation, description.preparation.image_size
    steps = [
        *READING,
        "RGB" if p.channels == 3 else "RGB, then grey (Pillow's mode L)",
        f"resize in proportion, so that the short side has {p.resize} pixels and the long one int({p.resize} * long / "
        "short); bilinear, antialiased (Pillow's BILINEAR)",
        f"the centre of {side}x{side}: from row round((height - {side}) / 2) and column round((width - {side}) / 2)",
        f"values / 255, float32 ({p.channels}, {side}, {side})",
    ]
    if description.count == 1:
        nets, logits, mean = "one network", "logits", "logits"
    else:
        nets, logits, mean = "two networks trained together", "sum of the two networks' logits", "logits / 2"
    networks = description.as_dict()
    preprocessing = networks.pop("preprocessing") | {"steps": steps, "in_the_program": ["border", "mean", "std"]}
    meaning = f"{logits}: argmax is the class, softmax({mean}) the probabilities"
    return {
        "program": f"DivideMix: {nets}",
        "input": {"name": "images", "dtype": "float32", "shape": ["batch", p.channels, side, side], "range": [0, 1]},
        "preprocessing": preprocessing,
        "output": {"name": "logits", "shape": ["batch", description.num_class], "meaning": meaning},
        "classes": networks.pop("classes"),
        "networks": networks,
        "run": {
            "name": run.resolve().name,
            "weights": weights,
            "epochs": ensemble.epochs,
            "averaged": ensemble.averaged,
        },
        "versions": versions(),
        "commit": commit(),
    }


@torch.no_grad()
def relative_difference(content: bytes, ensemble: Ensemble, preparation: Preparation) -> float:
    """The largest difference between the outputs of a .pt2 file and of the ensemble, relative to the largest |logit|,
    over batches of several sizes. NaN where an output is not finite."""
    program = torch.export.load(io.BytesIO(content)).module()
    batches = [random_images(n, preparation) for n in _BATCH_SIZES]
    exported, expected = (torch.cat([net(x) for x in batches]) for net in (program, ensemble))
    return float((exported - expected).abs().max() / expected.abs().max())


def random_images(n: int, preparation: Preparation) -> Tensor:
    """Float32 (n, channels, S, S) in [0, 1], the same in every call."""
    shape = (n, preparation.channels, preparation.image_size, preparation.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(n))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        prog="dividemix export",
        usage="%(prog)s RUN FILE.pt2 [flags]",
        description="Write a trained run as one .pt2 file, which needs only PyTorch.",
        examples=["checkpoint/folder_flowers flowers.pt2", "checkpoint/folder_flowers flowers.pt2 --weights last"],
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("file", type=Path, metavar="FILE", help="the file to write, for example model.pt2")
    add("--weights", choices=WEIGHTS, default="best", help="of the best or of the last epoch")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_output(args.file, ".pt2")
    description = read_description(args.run)
    preparation = description.preparation
    ensemble = load_ensemble(args.run, description, args.weights)
    usage = metadata(args.run, args.weights, ensemble, description)
    content = export(ensemble, preparation, usage)
    difference = relative_difference(content, ensemble, preparation)
    if not difference <= TOLERANCE:
        raise DivideMixError(
            f"{args.file}: not written, the exported program differs from the networks by {difference:.1e} of their "
            f"largest |logit| (allowed: {TOLERANCE:.0e}); are the weights finite?"
        )
    write_atomically(args.file, content)
    epochs = epochs_used(args.weights, ensemble)
    print(
        f"{args.file}: {description}; {epochs}; {len(content) / 1e6:.1f} MB\n"
        f"compared with the networks, for batches of {', '.join(map(str, _BATCH_SIZES))} images: largest difference "
        f"{difference:.1e} of the largest |logit| (allowed: {TOLERANCE:.0e})\n"
        f"input: images float32 {usage['input']['shape']} in [0, 1]; {METADATA} in the file says how to prepare them"
    )
