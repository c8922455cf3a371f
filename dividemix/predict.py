"""What a trained run says of your images: the networks of a run folder, and files in, predictions.csv out.

    python -m dividemix.predict RUN DIR                           # all images below DIR
    python -m dividemix.predict RUN photo.jpg --out photo.csv     # one image
    python -m dividemix.predict RUN list.csv --weights last       # the files in the column `path` of a CSV

A row for each image: path, label, class, confidence (the class's probability), then label_2, class_2, probability_2 ...
of the five likeliest classes. Both networks' logits are averaged: the class is that of their sum, which the paper
tests. Images are read as a viewer shows them (`images.shown`), whatever the run was trained on, and else prepared
as the run's test images were. In float32, as in the exported program (`export`).
"""

import argparse
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dividemix import DivideMixError, deploy, options, runtime, warn
from dividemix.checkpoint import csv_bytes, read_file, write_atomically
from dividemix.filelist import IMAGE_SUFFIXES, Boundary
from dividemix.images import BadImage, said, shown
from dividemix.runtime import Runtime, available_cores

TOP = 5  # classes in a row
_SHOWN = 10  # images that are warned of


class Files(NamedTuple):
    """Image files: as predictions.csv names them, where they are, and what symbolic links may not lead out of; None for
    files that are named one by one, where a symbolic link is as good as a file."""

    names: list[str]
    paths: list[str]
    boundary: Boundary | None


# ---- Which images ----


def find_images(source: Path) -> Files:
    """All images below a folder, or the files in the column `path` of a .csv (relative ones start at its folder), or
    one file. Raises DivideMixError where there are none."""
    if source.is_dir():
        found = list(_below(str(source)))
        if not found:
            raise DivideMixError(f"no image below {source}: expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        return Files(found, found, Boundary(source))
    if not source.exists():
        raise DivideMixError(f"{source} does not exist: give a folder, an image, or a .csv with a column `path`")
    if source.suffix.lower() != ".csv":
        return Files([str(source)], [str(source)], None)
    names = _listed(source)
    return Files(names, [os.path.join(source.parent, name.strip()) for name in names], None)


def _below(root: str) -> Iterator[str]:
    """Image files in the order of their names, hidden files and folders left out; each folder once, however many links
    lead to it."""

    def refuse(error: OSError) -> None:
        raise error

    seen = {os.path.realpath(root)}

    def is_new(folder: str) -> bool:
        real = os.path.realpath(folder)
        if real in seen:
            return False
        seen.add(real)
        return True

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        inner = (name for name in sorted(folders) if not name.startswith("."))
        folders[:] = [name for name in inner if is_new(os.path.join(folder, name))]
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(folder, name)


def _listed(source: Path) -> list[str]:
    import pandas

    try:
        with warnings.catch_warnings(action="ignore", category=pandas.errors.ParserWarning):  # cells past the head
            text = io.BytesIO(read_file(source))
            table = pandas.read_csv(text, dtype=str, na_filter=False, index_col=False, encoding="utf-8-sig")
    except pandas.errors.EmptyDataError:
        table = pandas.DataFrame()
    except ValueError as error:  # of pandas' parser, or not UTF-8
        raise DivideMixError(
            f"{source} is not a CSV in UTF-8 ({' '.join(str(error).split())}): save it as one"
        ) from error
    columns = {str(name).strip().lower(): name for name in reversed(table.columns)}  # as in `read_table`
    if "path" not in columns:
        raise DivideMixError(f"{source} has no column `path` in its first line: add it")
    if table.empty:
        raise DivideMixError(f"{source} names no image: expected a line for each below `path`")
    return table[columns["path"]].tolist()


# ---- What the networks say of them ----


def classify(
    ensemble: deploy.Ensemble,
    machine: Runtime,
    read: Callable[[str], NDArray],
    paths: Sequence[str],
    batch_size: int,
    workers: int,
) -> Iterator[tuple[NDArray, NDArray] | str]:
    """For each file, in order, the labels and probabilities of its likeliest classes (both (TOP,), or of all where
    there are fewer), or why it cannot be read. `workers` threads read the next batch meanwhile."""

    def attempt(path: str) -> NDArray | str:
        try:
            return read(path)
        except (BadImage, MemoryError) as error:
            return str(error) or type(error).__name__

    for batch in _ahead(attempt, paths, batch_size, workers):
        sound = [item for item in batch if not isinstance(item, str)]
        answers = zip(*_likeliest(ensemble, machine, torch.from_numpy(np.stack(sound)))) if sound else iter(())  # noqa: B905
        for item in batch:
            yield item if isinstance(item, str) else next(answers)


def _ahead(function: Callable[[str], Any], items: Sequence[str], size: int, workers: int) -> Iterator[list[Any]]:
    """function(item) of `size` items at a time, in order; the next batch is begun before one is given."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: Iterable[Any] = ()
        for start in range(0, len(items), size):
            begun = pool.map(function, items[start : start + size])
            if start:
                yield list(waiting)
            waiting = begun
        yield list(waiting)


@torch.inference_mode()
def _likeliest(ensemble: deploy.Ensemble, machine: Runtime, pixels: Tensor) -> tuple[NDArray, NDArray]:
    """uint8 (B, S, S, channels) -> labels and probabilities (B, TOP), likeliest first."""
    try:
        [logits] = machine.forward(ensemble, deploy.to_images(pixels.to(machine.device)))
    except RuntimeError as error:
        if not runtime.is_out_of_memory(error):
            raise
        raise DivideMixError(f"{machine.device}: no memory for {len(pixels)} images: a smaller --batch_size") from error
    logits = logits.cpu()
    if not logits.isfinite().all():
        raise DivideMixError("the networks' outputs are not finite numbers: their weights are damaged or diverged")
    # A stable order: of equals the first, as argmax, which counts the ensemble's accuracy, takes it
    ordered, labels = deploy.probabilities(logits, len(ensemble.nets)).sort(dim=1, descending=True, stable=True)
    return labels[:, :TOP].numpy(), ordered[:, :TOP].numpy()


# ---- predictions.csv ----


def header(num_class: int) -> list[str]:
    more = [f"{name}_{k}" for k in range(2, min(TOP, num_class) + 1) for name in ("label", "class", "probability")]
    return ["path", "label", "class", "confidence", *more]


def row(name: str, answer: tuple[NDArray, NDArray] | str, description: deploy.Description) -> list[str]:
    """Empty but for the path, where the image could not be read. Bytes of a path that are no UTF-8 stand as \\x.."""
    shown = os.fsencode(name).decode(errors="backslashreplace")
    if isinstance(answer, str):
        return [shown] + [""] * (len(header(description.num_class)) - 1)
    cells = [shown]
    for label, probability in zip(*(part.tolist() for part in answer), strict=True):
        cells += [str(label), description.name(label), f"{probability:.6g}"]
    return cells


def check_out(out: Path, source: Path) -> None:
    """Before hours of work, not after them."""
    if out.suffix.lower() != ".csv":
        raise DivideMixError(f"--out {out}: expected a name that ends in .csv")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise DivideMixError(f"--out {out}: expected a file in a folder that exists")
    if out.exists() and out.samefile(source):
        raise DivideMixError(f"--out {out} is the list that is read: give another name")


# ---- The command ----


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(prog="python -m dividemix.predict", description="Classify images by a trained run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("images", type=Path, metavar="DIR", help="folder of images, one image, or a .csv with `path`")
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"), help="the file to write")
    parser.add_argument(
        "--weights", choices=deploy.WEIGHTS, default="best", help="of the best epoch, or of the last one"
    )
    parser.add_argument("--strict", action="store_true", help="an image that cannot be read is an error")
    parser.add_argument("--batch_size", type=options.positive_int, default=100, help="images at once")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="as in training")
    parser.add_argument(
        "--workers", type=options.processes, default=min(16, available_cores()), help="threads that read images"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    import pandas

    args = parse_args(argv)
    files = find_images(args.images)
    check_out(args.out, args.images)
    description = deploy.read_description(args.run)
    ensemble = deploy.load_ensemble(args.run, description, args.weights)
    machine = runtime.start(args.device, precision="fp32", width=description.width, compile=False, graph=False)
    print(f"{args.run}: {description}; {deploy.epochs_used(args.weights, ensemble.epochs)}; {machine.describe()}")

    changes: list[int] = []

    def read(path: str) -> NDArray:
        image, change = shown(path, files.boundary)
        changes.append(change)
        return description.preparation.view(image)

    rows, bad = [], 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")  # remarks on metadata; what cannot be read is an exception
        answers = classify(machine.prepare(ensemble), machine, read, files.paths, args.batch_size, args.workers)
        for name, answer in zip(files.names, tqdm(answers, "images", len(files.names), disable=None), strict=True):
            if isinstance(answer, str):
                bad += 1
                what = f"{name!r}: {answer}" if not name.isprintable() else f"{name}: {answer}"
                if args.strict:
                    raise DivideMixError(f"{what}: nothing is written; without --strict it is left empty")
                if bad <= _SHOWN:
                    warn(what)
            rows.append(row(name, answer, description))
    if bad > _SHOWN:
        warn(f"{bad - _SHOWN} more images cannot be read")
    if bad == len(files.names):
        raise DivideMixError(f"{args.images}: not one of {bad} images can be read; nothing is written")
    table = pandas.DataFrame(rows, columns=header(description.num_class), dtype=object)
    write_atomically(args.out, csv_bytes(table))
    left = f", of which {bad} cannot be read and are left empty" if bad else ""
    print(*said(np.array(changes)), f"{args.out}: {len(files.names)} images{left}", sep="\n")


if __name__ == "__main__":
    options.command_line(main, "nothing is written")
