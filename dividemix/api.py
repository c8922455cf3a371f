"""DivideMix from Python, `dividemix.find_label_issues` and `dividemix.load`, and the command `dividemix issues`:

    dividemix issues ./flowers                # a folder of class folders -> suspects.csv, label_issues.csv, report.html
    dividemix issues ./flowers/labels.csv     # a table with the columns path and label

Both train as Train_folder.py, hold nothing out, and take the last epoch: every label gets a score.
"""

import contextlib
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dividemix import DivideMixError, warn
from dividemix.data import ImageList
from dividemix.data.features import as_views
from dividemix.deploy.predict import Classifier, from_array
from dividemix.report import issues as label_issues
from dividemix.run import defaults, read_run
from dividemix.run.options import HOLD_NOTHING_OUT


def find_label_issues(
    source: Any = None,
    labels: Any = None,
    *,
    images: ArrayLike | None = None,
    features: ArrayLike | None = None,
    seed: int = 0,
    verbose: bool = False,
    **flags: Any,
) -> pandas.DataFrame:
    """Which labels look wrong, by DivideMix.

    Give one of these. source: a folder of class folders or a CSV table, as in `--data_path` (`labels`: another table),
    or a torch Dataset of items (image, label), each image a Pillow image, (H, W, 3) uint8, or a tensor (3, H, W) of
    uint8 or of values in [0, 1]. images: (N, H, W, 3) or (N, H, W) uint8. features: (N, D) numbers of CLIP, DINOv2 or
    another frozen network, or (V, N, D) of V views, the first without augmentation: about half a minute on one core for
    5,000 samples. labels (N,): whole numbers or names; with a Dataset they replace its own.

    On a CPU, images become the features of a frozen network, on a card whole networks are trained; `verbose` prints
    which and why, and the training. flags: those of Train_folder.py, such as num_epochs=20 or features=True; run_dir
    or out_dir keeps the run, for `load`. The same seed gives the same list.

    -> a row for each sample, in order: index, for files path, given_label, suggested_label, label_quality (0 to 1,
    small means doubtful), is_label_issue, rank (1 is the most doubtful). Raises DivideMixError for data that cannot be
    used. Warns where the list means nothing; of a few dozen samples, or where most labels are wrong, that cannot
    be told.
    """
    if sum(value is not None for value in (source, images, features)) != 1:
        raise DivideMixError("give one of these: a folder, a CSV file or a Dataset, or images=, or features=")
    with tempfile.TemporaryDirectory(prefix="dividemix-") as temporary:
        folder, data, classes = Path(temporary), None, None
        of_files = () if isinstance(source, str | os.PathLike) else ("corrections", "path_column", "label_column")
        if refused := {"data_path", "feature_file", "check_data", "help", "no_label_scores", *of_files} & {*flags}:
            raise DivideMixError(f"{', '.join(sorted(refused))}: no argument here, or not with these data")
        own_folder = [] if {"run_dir", "out_dir", "id"} & {*flags} else ["--run_dir", str(folder / "run")]
        words = ["--seed", str(seed), *own_folder, *as_words(flags)]
        if isinstance(source, str | os.PathLike):
            if not isinstance(labels, str | os.PathLike | None):
                raise DivideMixError("labels: of a folder or table, expected the path of another table")
            words += ["--data_path", os.fspath(source)] + ([] if labels is None else ["--labels", os.fspath(labels)])
        elif features is not None:
            views = as_views(features)
            np.save(folder / "features.npy", views)
            words += ["--data_path", temporary, "--feature_file", str(folder / "features.npy")]
            data, classes = in_memory(folder, [f"{k:08d}" for k in range(views.shape[1])], labels)
        else:
            words += ["--data_path", temporary]
            names, own_labels = write_images(folder, images, source)
            data, classes = in_memory(folder, names, own_labels if labels is None else labels)
        args = parsed(words)
        silent = contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO())
        with silent:
            final = train(args, words, data, with_report=False)
        issues = label_issues.find(read_run(Path(final["run_dir"])))
    if issues is None:
        raise DivideMixError("the labels could not be scored: the warning above says why")
    for line in label_issues.warnings(issues):
        warn(line)
    classes = np.array(issues.class_names, object) if classes is None else classes
    table: dict[str, Any] = {"index": issues.index} | ({"path": issues.paths} if data is None else {})
    table |= {"given_label": classes[issues.given_labels], "suggested_label": classes[issues.suggested_labels]}
    table |= {"label_quality": issues.quality, "is_label_issue": issues.is_issue, "rank": issues.rank}
    return pandas.DataFrame(table)


def load(run: str | Path, weights: str = "best", device: str = "auto") -> Classifier:
    """A trained run, for `.predict(paths or arrays)`. weights: of the 'best' or the 'last' epoch. Raises DivideMixError
    for a folder that is no run, and for a run with --feature_file, which has no network for images."""
    return Classifier(run, weights, device)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """`dividemix issues DATA [flags]`."""
    import Train_folder

    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    given = words if words[0].startswith("-") else ["--data_path", *words]
    if not {"--data_path", "--help", "-h"} & {*given}:
        raise DivideMixError("dividemix issues DATA [flags]: DATA, a folder or a table, comes first")
    if given is not words and any(word.partition("=")[0] == "--data_path" for word in words):
        raise DivideMixError(f"{words[0]} and --data_path: give the folder of the images as DATA, a table as --labels")
    args = Train_folder.parse_args(
        [*HOLD_NOTHING_OUT, *given],
        prog="dividemix issues",
        usage="%(prog)s DATA [flags]",
        description="Which labels look wrong: DATA is a folder of class folders, or a CSV with the columns path,label.",
        examples=["./flowers", "./flowers --labels corrected.csv --id corrected"],
        common=["labels", "features", "weights", "seed", "id"],
    )
    return train(args, given)


def train(args: Any, words: Sequence[str], data: Any = None, with_report: bool = True) -> dict[str, Any]:
    """Train_folder.py with these flags, which are `words` of a command line, with nothing held out, and with --features
    where `defaults.choose_features` says so. data: the image lists, if they are not to be read from --data_path."""
    import dataloader_folder
    import Train_folder

    words = [*HOLD_NOTHING_OUT, *words]
    if args.check_data:
        return Train_folder.main(words)
    data = data or Train_folder.load(args)
    if not args.feature_file:
        survey = dataloader_folder.survey(data.train)
        args.features, line = defaults.choose_features(args, survey.side, survey.grey)
        data.lines.append(line)
        words += ["--features"] * args.features
    return Train_folder.train(args, data, words, with_report)


# ---- Data in memory ----

_PNG = ("L", "LA", "RGB", "RGBA", "I", "I;16")  # Pillow's modes that PNG keeps; it is read as files are


def as_words(flags: dict[str, Any]) -> list[str]:
    """Keyword arguments as flags: num_epochs=3 -> --num_epochs 3; corrections=["a", "b"] -> --corrections a b;
    no_flip=True -> --no_flip; None and False -> none."""
    words = []
    for name, value in flags.items():
        is_switch = isinstance(value, bool | np.bool_)
        if value is None or (is_switch and not value):
            continue
        values = [] if is_switch else value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def in_memory(folder: Path, names: Sequence[str], labels: Any) -> tuple[Any, NDArray]:
    """The image lists of samples with these names, which are files in `folder` if there are images, and their classes
    in order. Raises DivideMixError for labels that do not fit."""
    import dataloader_folder

    if labels is None:
        raise DivideMixError("labels: missing: give labels=, one for each sample")
    given = as_labels(labels)
    if given.shape != (len(names),):
        raise DivideMixError(f"labels: expected {len(names)}, one for each sample, got shape {given.shape}")
    classes, numbers = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise DivideMixError(f"labels: all samples are of one class, {classes[0]!r:.100}: nothing to learn")
    where, paths = str(folder), np.array([name.encode() for name in names])
    images = ImageList(where, where, "", paths, numbers, len(classes), as_shown=True)
    return dataloader_folder.Folder("memory", {"train": images}, list(map(str, classes)), []), classes


def write_images(folder: Path, images: Any, dataset: Any) -> tuple[list[str], list | None]:
    """Write the images, or those of a Dataset, as PNG files, which lose nothing. -> their names, the Dataset's labels.
    A name has a hash of the pixels, so that no run goes on with other images. Raises DivideMixError for what is no
    image, and for items without a label."""
    if dataset is None:
        items: Any = ((image, None) for image in images)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        items = (dataset[k] for k in range(len(dataset)))
    else:
        raise DivideMixError(f"expected a folder, a CSV file, or a Dataset with a length, got {type(dataset).__name__}")
    names, labels = [], []
    for k, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DivideMixError(f"item {k} of the Dataset: expected (image, label), got {type(item).__name__}")
        image, label, *_ = item
        image = as_image(image, f"image {k}")
        names.append(f"{k:08d}_{hashlib.sha256(image.tobytes()).hexdigest()[:8]}.png")
        image.save(folder / names[-1], compress_level=1)
        labels.append(label.item() if hasattr(label, "item") else label)
    return names, labels if dataset is not None else None


def as_image(image: Any, name: str) -> Image.Image:
    """A Pillow image, an array of pixels, or a tensor (3, H, W) or (1, H, W) of uint8 or of values in [0, 1]."""
    if isinstance(image, Image.Image):
        if image.mode == "F":
            raise DivideMixError(f"{name}: pixels that are fractions, expected 8 or 16 bits")
        return image if image.mode in _PNG else image.convert("RGBA" if image.has_transparency_data else "RGB")
    pixels = np.asarray(image)
    if hasattr(image, "is_floating_point"):  # a tensor
        pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels
        pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
        if image.is_floating_point():
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise DivideMixError(f"{name}: values outside [0, 1]: give the Dataset without its Normalize")
            pixels = np.round(255 * pixels).astype(np.uint8)
    return from_array(np.ascontiguousarray(pixels), name)


def parsed(words: Sequence[str]) -> Any:
    """Flags of Train_folder.py. Raises DivideMixError where its parser would end the process."""
    import Train_folder

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return Train_folder.parse_args([*HOLD_NOTHING_OUT, *words])
    except SystemExit as ended:
        raise DivideMixError(said.getvalue().partition("error: ")[2].strip()) from ended


def as_labels(labels: Any) -> NDArray:
    """Labels of any type as an array. Raises DivideMixError for what numpy cannot read, and for missing values."""
    try:
        given, missing = np.asarray(labels), pandas.isna(np.asarray(labels, object))  # numpy would make a name of NaN
        np.unique(given[~missing])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise DivideMixError(f"labels: expected (N,) whole numbers or names, of one type: {reason}") from error
    if missing.any():
        raise DivideMixError(f"labels: {missing.sum()} of {missing.size} are missing: leave these samples out")
    return given
