"""Classes of your images, predicted by a trained run: a run folder and image files in, predictions.csv out.

    python -m dividemix predict RUN DIR                           # all images below DIR
    python -m dividemix predict RUN list.csv --weights last       # the files in the column `path` of a CSV; or one file

A row has path, label, class, confidence (the probability of the class), then the next four classes with theirs."""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dividemix import DivideMixError, warn
from dividemix.data import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    BadImage,
    Boundary,
    describe_changes,
    file_finder,
    images_below,
    read_table,
    shown,
)
from dividemix.deploy import ensemble as trained
from dividemix.files import csv_bytes, write_atomically
from dividemix.run import Description, options, read_description
from dividemix.runtime import Runtime, available_cores, start

TOP = 5  # classes in a row
_WARNINGS = 10  # at most, one an image

Prediction = list[tuple[int, float]]  # (label, probability) of an image's most probable classes, in falling order


def find_images(source: Path, path_column: str | None = None) -> tuple[list[str], list[str], Boundary | None]:
    """All images below a folder, or the files that a table names (relative to its folder), or one file. -> their names
    in predictions.csv; their paths; for a folder the boundary that symbolic links may not cross. Raises DivideMixError
    where there are none, and as `read_table`."""
    if source.is_dir():
        paths = [os.path.join(source, os.fsdecode(name)) for name in images_below(source)[0]]
        if not paths:
            raise DivideMixError(f"no image below {source}: expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        return paths, paths, Boundary(source)
    if not source.exists():
        raise DivideMixError(f"{source} does not exist: give a folder, an image, or a .csv with a column `path`")
    if source.suffix.lower() not in TABLE_SUFFIXES:
        return [str(source)], [str(source)], None
    table = read_table(source, path_column, labeled=False)
    print(f"{source}: {table.columns}")
    names, find = table.rows["path"].tolist(), file_finder([source.parent])
    return names, [find(name.strip())[0][0] for name in names], None


@torch.inference_mode()
def classify(ensemble: trained.Ensemble, runtime: Runtime, images: Sequence[NDArray | None]) -> list[Prediction]:
    """Predictions of images uint8 (S, S, channels); an empty one for None."""
    readable = [image for image in images if image is not None]
    if not readable:
        return [[] for _ in images]
    pixels = torch.from_numpy(np.stack(readable)).to(runtime.device)
    [logits] = runtime.forward(ensemble, trained.to_images(pixels))
    logits = logits.cpu()
    if not logits.isfinite().all():
        raise DivideMixError("the networks' outputs are not finite numbers: weights are damaged, or training diverged")
    # Stable, so that of equal classes the first comes first, as in the argmax that measures the accuracy
    ordered, labels = trained.probabilities(logits, len(ensemble.nets)).sort(dim=1, descending=True, stable=True)
    rows = zip(labels[:, :TOP].tolist(), ordered[:, :TOP].tolist(), strict=True)
    return [[] if image is None else list(zip(*next(rows), strict=True)) for image in images]


def to_table(names: Sequence[str], predictions: Sequence[Prediction], description: Description) -> pandas.DataFrame:
    """predictions.csv, one row an image; only the path where the prediction is empty."""
    columns, classes = ["path", "label", "class", "confidence"], description.classes or range(description.num_class)
    for k in range(2, min(TOP, description.num_class) + 1):
        columns += [f"label_{k}", f"class_{k}", f"probability_{k}"]
    rows = []
    for name, prediction in zip(names, predictions, strict=True):
        cells = [cell for label, p in prediction for cell in (label, classes[label], f"{p:.6g}")]
        rows.append([name, *cells] if cells else [name] + [""] * (len(columns) - 1))
    return pandas.DataFrame(rows, columns=columns, dtype=object)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(prog="python -m dividemix predict", description="Classify images by a trained run.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("images", type=Path, metavar="DIR", help="folder of images, one image, or a .csv with `path`")
    add("--path_column", metavar="NAME", help="column of paths in the .csv, if it is not found by itself")
    add("--out", type=Path, default=Path("predictions.csv"), help="the file to write")
    add("--weights", choices=trained.WEIGHTS, default="best", help="of the best or of the last epoch")
    add("--strict", action="store_true", help="stop at an image that cannot be read")
    add("--batch_size", type=options.positive_int, default=100, help="images at once; fewer need less memory")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="as in training")
    add("--workers", type=options.processes, default=min(16, available_cores()), help="threads that read images")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    names, paths, boundary = find_images(args.images, args.path_column)
    trained.check_output(args.out, ".csv")
    if args.out.exists() and args.out.samefile(args.images):
        raise DivideMixError(f"--out {args.out} is also the list of images: choose another name")
    description = read_description(args.run)
    # In float32, as the exported program
    runtime = start(args.device, precision="fp32", width=description.width, compile=False, graph=False)
    ensemble: trained.Ensemble = runtime.prepare(trained.load_ensemble(args.run, description, args.weights))
    print(f"{args.run}: {description}; {trained.epochs_used(args.weights, ensemble)}; {runtime.describe()}")

    changes: list[int] = []
    bad: list[str] = []

    def read(path: str) -> NDArray | None:
        try:
            image, change = shown(path, boundary)
            changes.append(change)
            return description.preparation.view(image)
        except (BadImage, MemoryError) as error:
            problem = f"{path if path.isprintable() else repr(path)}: {str(error) or type(error).__name__}"
            if args.strict:
                raise DivideMixError(f"{problem}: nothing is written; without --strict its row is empty") from error
            bad.append(problem)
            return None

    predictions: list[Prediction] = []
    bar = tqdm(total=len(paths), desc="images", disable=None)
    with bar, ThreadPoolExecutor(max(1, args.workers)) as pool:
        for first in range(0, len(paths), args.batch_size):
            images = list(pool.map(read, paths[first : first + args.batch_size]))
            predictions += classify(ensemble, runtime, images)
            bar.update(len(images))
    for problem in bad[:_WARNINGS]:
        warn(problem)
    if len(bad) > _WARNINGS:
        warn(f"{len(bad) - _WARNINGS} more images cannot be read")
    if len(bad) == len(predictions):
        raise DivideMixError(f"{args.images}: none of the {len(bad)} images can be read; nothing is written")
    write_atomically(args.out, csv_bytes(to_table(names, predictions, description)))
    empty = f", {len(bad)} of them cannot be read and have empty rows" if bad else ""
    print(*describe_changes(np.array(changes)), f"{args.out}: {len(predictions)} images{empty}", sep="\n")
