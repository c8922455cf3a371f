"""Classes of your images, predicted by a trained run: a run folder and image files in, predictions.csv out.

    dividemix predict RUN DIR                           # all images below DIR
    dividemix predict RUN list.csv --weights last       # the files in the column `path` of a CSV; or one file

A row has path, label, class, confidence (the probability of the class), then the next four classes with theirs."""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dividemix import DivideMixError, warn
from dividemix.data import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    BadImage,
    Boundary,
    describe_changes,
    find_files,
    images_below,
    printable,
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


def find_images(
    source: Path, path_column: str | None = None, skip_bad_images: bool = False
) -> tuple[list[str], list[str], Boundary | None, str]:
    """All images below a folder, or the files that a table names (relative to its folder), or one file. -> their names
    in predictions.csv; their paths; for a folder the boundary that symbolic links may not cross; for a table its
    columns, to print. Raises DivideMixError where there are none, where files of a table are missing, unless
    skip_bad_images, and as `read_table` and `find_files`."""
    if source.is_dir():
        paths = [os.path.join(source, os.fsdecode(name)) for name in images_below(source)[0]]
        if not paths:
            raise DivideMixError(f"no image below {source}: expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        return paths, paths, Boundary(source), ""
    if not source.exists():
        raise DivideMixError(f"{source} does not exist: give a folder, an image, or a .csv with a column `path`")
    if source.suffix.lower() not in TABLE_SUFFIXES:
        return [str(source)], [str(source)], None, ""
    table = read_table(source, path_column, labeled=False)
    names = table.rows["path"]
    paths, exists = zip(*find_files(source, names.str.strip(), [source.parent]), strict=True)
    missing = names[np.logical_not(exists)]
    if len(missing) and not skip_bad_images:
        first = ", ".join(f"line {line} {name!r:.100}" for line, name in missing[:3].items())
        advice = "correct the table, or leave their rows empty by --skip_bad_images"
        if len(missing) == len(names):
            advice = "paths start at the table's folder: move the table, or write absolute paths"
        raise DivideMixError(f"{source}: {len(missing)} of {len(names)} paths lead to no file: {first}: {advice}")
    return names.tolist(), [*paths], None, table.columns


class Classifier:
    """A trained run that classifies images. weights: 'best' or 'last', of which epoch. It computes in float32, as the
    exported program. Warns and raises as `load_ensemble`; raises DivideMixError for a folder that is no run, too."""

    def __init__(self, run: str | Path, weights: str = "best", device: str = "auto"):
        run = Path(run)
        self.description = read_description(run)
        width = self.description.width
        self.runtime = start(device, precision="fp32", width=width, compile=False, graph=False)
        self.ensemble: trained.Ensemble = self.runtime.prepare(trained.load_ensemble(run, self.description, weights))
        self.changes: list[int] = []  # what was changed in the image files that were read: see `describe_changes`
        self.bad: list[str] = []  # why images cannot be read, a line each

    def __repr__(self) -> str:
        return f"Classifier({self.description})"

    def predict(self, images: Any, skip_bad_images: bool = False, **settings: Any) -> pandas.DataFrame:
        """Classes of images: one path (a folder, an image, or a table with a column of paths), a list of paths, or
        arrays (H, W, 3) or (H, W) uint8, also one of (N, H, W, 3). -> path (of arrays their number), label, class,
        confidence, then the next classes; the row of an image that cannot be read is empty. A table with missing files
        is refused, unless skip_bad_images: their rows are then empty. settings: batch_size, workers, strict, as of
        `table`, which says what is raised."""
        if isinstance(images, str | os.PathLike):
            names, paths, boundary, _ = find_images(Path(images), None, skip_bad_images)
            return self.table(names, paths, boundary, **settings)
        if isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] == 3:
            raise DivideMixError(f"images: shape {images.shape} is one image: give a list of images")
        images = list(images)
        for image in images:
            if not isinstance(image, str | os.PathLike | np.ndarray):
                raise DivideMixError(f"images: expected paths or arrays of pixels, got {type(image).__name__}")
        names = [k if isinstance(image, np.ndarray) else os.fspath(image) for k, image in enumerate(images)]
        return self.table(names, images, **settings)

    def table(
        self,
        names: Sequence,
        images: Sequence,
        boundary: Boundary | None = None,
        *,
        batch_size: int = 100,
        workers: int = 0,
        strict: bool = False,
    ) -> pandas.DataFrame:
        """The same of image files or arrays with their names. workers: threads that read, 0 for all cores. Raises
        DivideMixError where no image can be read, with `strict` for one image."""
        self.changes, self.bad = [], []

        def read(image: str | NDArray) -> NDArray | None:
            try:
                if isinstance(image, np.ndarray):
                    return self.description.preparation.view(from_array(image).convert("RGB"))
                opened, change = shown(image, boundary)
                self.changes.append(change)
                return self.description.preparation.view(opened)
            except (BadImage, MemoryError) as error:
                path = printable(str(image)) or "a row without a path"
                problem = f"{path}: {str(error) or type(error).__name__}"
                if strict:
                    raise DivideMixError(f"{problem}: nothing is written; without --strict its row is empty") from error
                self.bad.append(problem)
                return None

        predictions: list[Prediction] = []
        bar = tqdm(total=len(images), desc="images", disable=None)
        with bar, ThreadPoolExecutor(workers or min(16, available_cores())) as pool:
            for first in range(0, len(images), batch_size):
                batch = list(pool.map(read, images[first : first + batch_size]))
                predictions += classify(self.ensemble, self.runtime, batch)
                bar.update(len(batch))
        for problem in self.bad[:_WARNINGS]:
            warn(problem)
        if len(self.bad) > _WARNINGS:
            warn(f"{len(self.bad) - _WARNINGS} more images cannot be read")
        if images and len(self.bad) == len(images):
            raise DivideMixError(f"none of the {len(self.bad)} images can be read; nothing is written: {self.bad[0]}")
        return to_table(names, predictions, self.description)


def from_array(pixels: NDArray, name: str = "images") -> Image.Image:
    """Pixels (H, W, 3) or (H, W) uint8 as an image. Raises DivideMixError, naming `name`, for others."""
    if pixels.dtype != np.uint8 or 0 in pixels.shape or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        problem = f"{pixels.dtype} of shape {pixels.shape}"
        raise DivideMixError(f"{name}: expected pixels (H, W, 3) or (H, W) of type uint8, got {problem}")
    return Image.fromarray(pixels)


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


def to_table(names: Sequence, predictions: Sequence[Prediction], description: Description) -> pandas.DataFrame:
    """predictions.csv, one row an image; only the path where the prediction is empty."""
    columns, classes = ["path", "label", "class", "confidence"], description.classes or range(description.num_class)
    for k in range(2, min(TOP, description.num_class) + 1):
        columns += [f"label_{k}", f"class_{k}", f"probability_{k}"]
    rows = []
    for name, prediction in zip(names, predictions, strict=True):
        cells = [cell for label, p in prediction for cell in (label, classes[label], float(f"{p:.6g}"))]
        rows.append([name, *(cells or [None] * (len(columns) - 1))])
    table = pandas.DataFrame(rows, columns=columns, dtype=object)  # names that are not Unicode stay
    types = {"label": "Int64", "confidence": float, "probability": float}
    return table.astype({name: types[kind] for name in columns if (kind := name.split("_")[0]) in types})


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        prog="dividemix predict",
        usage="%(prog)s RUN DIR [flags]",
        description="Classify images by a trained run.",
        examples=["checkpoint/folder_flowers new-photos", "checkpoint/folder_flowers list.csv --out answers.csv"],
        common=["out", "weights", "path_column", "strict", "device"],
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("images", type=Path, metavar="DIR", help="folder of images, one image, or a .csv with `path`")
    add("--path_column", metavar="NAME", help="column of paths in the .csv, if it is not found by itself")
    add("--out", type=Path, default=Path("predictions.csv"), help="the file to write")
    add("--weights", choices=trained.WEIGHTS, default="best", help="of the best or of the last epoch")
    add("--strict", action="store_true", help="stop at an image that cannot be read")
    add("--skip_bad_images", action="store_true", help="where files of the .csv are missing: leave their rows empty")
    add("--batch_size", type=options.positive_int, default=100, help="images at once; fewer need less memory")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="as in training")
    add("--workers", type=options.processes, default=min(16, available_cores()), help="threads that read images")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    names, paths, boundary, columns = find_images(args.images, args.path_column, args.skip_bad_images)
    trained.check_output(args.out, ".csv")
    if args.out.exists() and args.out.samefile(args.images):
        raise DivideMixError(f"--out {args.out} is also the list of images: choose another name")
    classifier = Classifier(args.run, args.weights, args.device)
    epochs = trained.epochs_used(args.weights, classifier.ensemble)
    if columns:
        print(f"{args.images}: {columns}")
    print(f"{args.run}: {classifier.description}; {epochs}; {classifier.runtime.describe()}")
    settings = {"batch_size": args.batch_size, "workers": max(1, args.workers), "strict": args.strict}
    table = classifier.table(names, paths, boundary, **settings)
    write_atomically(args.out, csv_bytes(table))
    n_bad = len(classifier.bad)
    empty = f", {n_bad} of them cannot be read and have empty rows" if n_bad else ""
    print(*describe_changes(np.array(classifier.changes)), f"{args.out}: {len(table)} images{empty}", sep="\n")
