"""What people decided on labels, as the review page of a run saves it: CSV files with the columns path, decision (keep,
suggestion, other or drop) and label, the class that the image is to have. See docs/own-images.md."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from dividemix import DivideMixError
from dividemix.data.lists import ImageList, some
from dividemix.data.tables import read_cells

_COLUMNS = ["path", "decision", "label"]
_DECISIONS = ["keep", "suggestion", "other", "drop"]


def correct(images: ImageList, classes: Sequence[str], files: Sequence[str | Path]) -> tuple[ImageList, str]:
    """The training images with the decisions of `files`, of which a later one wins. classes: their names, by label. ->
    the list without what was dropped, and a line that counts. Raises DivideMixError for a file that cannot be read, an
    image that is not in the list, an unknown decision or class, a class of which no image is left, and for a file that
    is given twice."""
    if twice := [
        str(file) for k, file in enumerate(files) if Path(file).resolve() in map(Path.resolve, map(Path, files[:k]))
    ]:
        raise DivideMixError(f"--corrections: {some(twice)}: given twice: is one of them a file of another page?")
    table = pd.concat([read_decisions(file) for file in files], ignore_index=True)
    table["row"] = pd.Index(np.char.decode(images.names())).get_indexer(table["path"])
    table["number"] = pd.Index(classes, dtype=object).get_indexer(table["label"])
    is_kept_as_given = (table["decision"] == "keep") & (table["label"] == "")
    takes_label = (table["decision"] != "drop") & ~is_kept_as_given
    for wrong, column, problem in (
        (~table["decision"].isin(_DECISIONS), "decision", f"no decision, expected one of {', '.join(_DECISIONS)}"),
        (table["row"] < 0, "path", f"no training image of {images.source}"),
        (takes_label & (table["number"] < 0), "label", f"no class of the training images ({some(classes)})"),
    ):
        if wrong.any():
            file = table.loc[wrong, "file"].iloc[0]
            names = some([repr(name) for name in table.loc[wrong & (table["file"] == file), column]])
            raise DivideMixError(f"--corrections {file}: {names}: {problem}: correct or remove these lines")
    latest = table.drop_duplicates("row", keep="last")
    labels, takes_label = images.labels.copy(), takes_label[latest.index]
    labels[latest["row"][takes_label]] = latest["number"][takes_label]
    remaining = np.delete(np.arange(len(images)), latest["row"][latest["decision"] == "drop"])
    left = np.bincount(labels[remaining], minlength=len(classes))
    if empty := [classes[c] for c in np.flatnonzero(left == 0)]:
        raise DivideMixError(f"--corrections: no image of {some(empty)} is left: keep some, or remove the class before")
    n_dropped, n_changed = len(images) - len(remaining), int((labels != images.labels)[remaining].sum())
    again = f" ({len(table) - len(latest)} replaced by later ones)" if len(table) > len(latest) else ""
    counts = f"{n_changed} labels changed, {n_dropped} images dropped, {len(latest) - n_changed - n_dropped} kept"
    return replace(images, labels=labels).select(remaining), f"corrections: {len(table)} decisions{again}: {counts}"


def read_decisions(file: str | Path) -> pd.DataFrame:
    """The rows of a file as text, with the column `file`; spreadsheet programs may have saved it, see `read_cells`."""
    cells = read_cells(Path(file), {"path": None, "label": None})
    names = cells.iloc[0].str.strip().str.lower()
    if any([*names].count(column) != 1 for column in _COLUMNS):
        problem = f"columns {','.join(names)!r:.100}, expected {','.join(_COLUMNS)}"
        raise DivideMixError(f"--corrections {file}: {problem}: give a file that a review page has saved")
    table = cells.iloc[1:].set_axis(names, axis=1)[_COLUMNS]
    return table.assign(decision=table["decision"].str.strip().str.lower(), file=str(file))
