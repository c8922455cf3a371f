"""Tables of image files, as spreadsheets write them: commas, semicolons or tabs, UTF-8 or UTF-16, many column names."""

import csv
import functools
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas

from dividemix import DivideMixError
from dividemix.data.lists import bad_line, is_image, read_text, some

TABLE_SUFFIXES = (".csv", ".tsv")
_NAMES = {  # of columns, without case, spaces, _ and -; the first one wins over the others
    "path": "path filepath file filename relativepath image imagepath imagefile imagefilename imagename img imgpath",
    "label": "label class category target labelname classname categoryname",
    "split": "split",
}


class Table(NamedTuple):
    """rows: one an image, as written; columns path, label and, if the file has it, split; the index is the line in
    which a row begins. columns: where they come from, to print."""

    rows: pandas.DataFrame
    columns: str


def read_table(
    path: Path, path_column: str | None = None, label_column: str | None = None, labeled: bool = True
) -> Table:
    """The first line names the columns; others than these are ignored. If it has an image instead, or path_column is a
    number that it does not have, it is a row, and the columns are 1, 2, ... Not `labeled`: only the paths are read.
    Raises DivideMixError that names the line: no text, no table, a column that is not there or not the only one, no
    row."""
    wanted = {"path": path_column, "label": label_column}
    cells = read_cells(path, wanted)
    names = [name.strip() for name in cells.iloc[0]]
    found, images = {kind: _find(kind, names, wanted) for kind in _NAMES}, _images(names)
    has_names = bool(found["path"]) or not (images or (path_column or "").strip().isdecimal())
    if not has_names:
        names = [str(k) for k in cells.columns]
        found = {kind: _find(kind, names, wanted) for kind in _NAMES}
        found["path"] = found["path"] if path_column else images
        others = [k for k in cells.columns if k not in images + found["path"]]
        found["label"] = found["label"] if label_column else others
    if labeled and len(found["split"]) > 1:
        raise DivideMixError(f"{path}, line {cells.index[0]}: several columns of splits: rename all but one")
    for kind in ("path", "label") if labeled else ("path",):
        if len(found[kind]) != 1:
            problem = f"{'several columns' if found[kind] else 'no column'} of {kind}s"
            columns = f"the columns are {some(names)}" + ("" if has_names else ", since no line names them")
            flags = "--path_column and --label_column" if labeled else "--path_column"
            flags += "" if len(names) > 1 else ", or remove the line if it is a title"
            raise DivideMixError(f"{path}, line {cells.index[0]}: {problem}; {columns}: choose by {flags}")
    if labeled and found["path"] == found["label"]:
        raise DivideMixError(f"{path}: --path_column and --label_column name the same column: give two")
    columns = {kind: found[kind][0] for kind in _NAMES if found[kind] and (labeled or kind == "path")}
    rows = pandas.DataFrame({kind: cells[k] for kind, k in columns.items()}).iloc[int(has_names) :]
    if rows.empty:
        raise DivideMixError(f"{path}: not one row with an image below its first line: use a good copy")
    line = "" if has_names else "no line of column names, "
    return Table(rows, f"{line}columns {', '.join(names[k - 1] for k in columns.values())}")


def read_cells(path: Path, wanted: dict[str, str | None]) -> pandas.DataFrame:
    """The cells of all rows that are not blank, as written; columns 1, 2, ... The first line alone tells how many there
    are, and what is between them: what makes known names or images of its cells."""
    content = read_text(path)
    if declared := re.match(rb"\s*sep=.(?=[\r\n])", content):  # Excel's first line
        content = content[: declared.start()] + content[declared.end() :]
    text = content.decode()
    first = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
    try:
        heads = {mark: next(csv.reader([first], delimiter=mark, skipinitialspace=True), []) for mark in ",;\t"}
        known = {mark: [_find(kind, head, wanted) for kind in wanted] + _images(head) for mark, head in heads.items()}
        delimiter = max(heads, key=lambda mark: (sum(map(bool, known[mark])), len(heads[mark])))
        width = len(heads[delimiter])
        form = {"dtype": str, "keep_default_na": False, "na_filter": False, "index_col": False, "sep": delimiter}
        form |= {"header": None, "skip_blank_lines": False, "names": range(1, width + 2)}  # the last: a cell too many
        form |= {"skipinitialspace": True}
        if b'"' in content:
            refuse_open_quotes(path, text, delimiter)  # pandas takes the rows up to the next quote for one cell
        cells = pandas.read_csv(io.BytesIO(content), **form)
    except (ValueError, csv.Error) as error:
        record = re.search(r"(line|row) (\d+)", str(error)) or ["", "", "1"]
        reason = " ".join(str(error).split())
        raise bad_line(path, int(record[2]) + (record[1] == "row"), f"not a row of a CSV file ({reason})") from error
    cells.index += 1  # the numbers of lines
    if b'"' in content:  # a cell may have several
        breaks = cells.apply(lambda column: column.str.count("\r\n|\r|\n")).sum(axis=1)
        cells.index += breaks.cumsum() - breaks
    is_filled = cells.apply(lambda column: column.str.strip()).ne("")
    if is_filled[width + 1].any():
        problem = f"more cells than line {cells.index[0]}, which has {width} and should name the columns"
        raise bad_line(path, cells.index[is_filled[width + 1]][0], problem)
    if not is_filled.any(axis=None):
        raise DivideMixError(f"{path}: not one row with an image: use a good copy")
    return cells.loc[is_filled.any(axis=1), :width]


def refuse_open_quotes(path: Path, text: str, delimiter: str) -> None:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for _ in rows:
            pass
    except csv.Error as error:
        problem = f"not a row of a CSV file ({error}); is a quote left open, or not doubled in its cell?"
        raise bad_line(path, rows.line_num, problem) from error


def has_splits(path: Path) -> bool:
    """Whether a table has the column `split`."""
    return bool(_find("split", read_cells(path, {}).iloc[0], {}))


def _find(kind: str, names: Sequence[str], wanted: dict[str, str | None]) -> list[int]:
    """Which columns can be this one, counted from 1. A name with the flag's own case wins over others."""
    if flag := wanted.get(kind):
        words, own = [name.strip() for name in names], flag.strip()
        return _places(words, own) or _places([name.lower() for name in words], own.lower())
    plain = [re.sub(r"[\s_-]", "", name.lower()) for name in names]
    first, *others = _NAMES[kind].split()
    return _places(plain, first) or [k for name in others for k in _places(plain, name)]


def _places(names: Sequence[str], wanted: str) -> list[int]:
    return [k for k, name in enumerate(names, 1) if name == wanted]


def _images(names: Sequence[str]) -> list[int]:
    return [k for k, name in enumerate(names, 1) if is_image(re.split(r"[/\\]", name.strip())[-1])]


# ---- The files that paths in a table mean ----


def find_files(source: Path, paths: pandas.Series, bases: Sequence[Path]) -> list[tuple[str, bool]]:
    r"""For each path in the table `source`, whose line is its index: the file that it means, which starts at one of the
    folders `bases`, and True; `a\b.jpg` is also a/b.jpg. If there is none: the first place to look, and False; of an
    empty path ''. Each folder is listed once, which takes less time than to ask for each file. Raises DivideMixError
    for a path that can mean two files."""
    starts = [*dict.fromkeys(map(str, bases))]

    @functools.cache
    def names(folder: str) -> frozenset[str]:
        try:
            with os.scandir(folder) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except OSError:
            return frozenset()

    def is_file(place: str) -> bool:
        folder, _, name = place.rpartition(os.sep)
        return name in names(folder) or os.path.isfile(place)  # where case does not matter, the list has another name

    found = []
    for line, path in paths.items():
        forms = [path.replace("\\", "/"), path] if "\\" in path else [path]
        places = [os.path.normpath(os.path.join(start, form)) for form in forms for start in starts] if path else [""]
        files = [*dict.fromkeys(place for place in places if is_file(place))]
        if len(files) > 1 and not all(os.path.samefile(files[0], file) for file in files):
            raise bad_line(source, int(line), f"{path!r:.100} can be {files[0]} and {files[1]}, expected one file")
        found.append((files[0], True) if files else (places[0], False))
    return found
