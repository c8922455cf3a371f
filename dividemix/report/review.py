"""review.html: the doubtful labels of a run as small images, to decide on each in a browser. The page is one file that
needs no network, and saves decisions.csv: the columns path (index, where there are no files), decision and label."""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dividemix.data import some
from dividemix.files import write_atomically
from dividemix.report.clean_labels import command
from dividemix.report.issues import LabelIssues, warnings
from dividemix.report.page import data_uri, pictures, render
from dividemix.run import RunFolder, options

PAGE, PER_PAGE = "review.html", 2_000


def write(run: RunFolder, issues: LabelIssues, folder: Path, per_page: int, num_pages: int | None = None) -> list[str]:
    """Write review.html and, where there are more than `per_page` labels, review-2.html and so on, at most `num_pages`
    of them. Labels without a small image in the run folder, or a file that can be read, are left out. -> lines for the
    terminal"""
    rows = issues.doubtful.tolist()
    n_doubtful = len(rows)
    rows = rows[: num_pages and num_pages * per_page]
    images = dict(zip(rows, pictures(run, issues, rows), strict=True))
    shown = [row for row in rows if images[row]]
    pages = [shown[begin : begin + per_page] for begin in range(0, len(shown), per_page)]
    names = [PAGE.replace(".", f"-{k}." if k > 1 else ".") for k in range(1, len(pages) + 1)]
    for old in {*folder.glob("review*.html")} - {folder / name for name in names}:
        old.unlink()
    earlier = {Path(file).name for file in run.args.get("corrections") or []}
    numbered = (f"decisions-{k}.csv" if k > 1 else "decisions.csv" for k in itertools.count(1))
    free = (file for file in numbered if file not in earlier)
    decisions = dict(zip(names, free, strict=False))
    for k, (name, page) in enumerate(zip(names, pages, strict=True)):
        write_atomically(folder / name, review_page(run, issues, page, images, k * per_page, name, decisions))
    lines = [f"review: {', '.join(str(folder / name) for name in names)} ({len(shown)} labels)"] if names else []
    if len(shown) < len(rows):
        files = f" or a readable file in {run.data_folder}" if issues.paths else ""
        lines.append(f"review: {len(rows) - len(shown)} labels are left out, without an image in the run folder{files}")
    elif len(rows) < n_doubtful:
        command_line = shlex.join([*options.interface().split(), "report", str(run.path), "--review"])
        lines[0] += f"; all {n_doubtful}: {command_line}"
    return lines


def review_page(
    run: RunFolder,
    issues: LabelIssues,
    rows: Sequence[int],
    images: dict[int, bytes],
    begin: int,
    name: str,
    decisions: dict[str, str],
) -> bytes:
    """The HTML file `name` of these rows, the first of which is number `begin` of all. decisions: the file that each
    page saves, by the page's name."""
    ids = issues.paths or [*map(str, issues.index)]
    equal = {row: [ids[k] for k in rows if k != row] for rows in issues.conflicts.values() for row in rows}
    items: list[dict[str, Any]] = []
    for row in rows:
        given, suggested = (issues.class_names[of[row]] for of in (issues.given_labels, issues.suggested_labels))
        item = {"id": ids[row], "image": data_uri(images[row]), "listed": bool(issues.is_issue[row])}
        item |= {"given": given, "suggested": suggested, "equal": some(equal[row]) if row in equal else ""}
        items.append(item | {"quality": f"{issues.quality[row]:.3f}", "confidence": f"{issues.confidence[row]:.3f}"})
    data = {
        "key": f"dividemix {run.name} {run.labels_digest} {name}",
        "column": "path" if issues.paths else "index",
        "file": decisions[name],
        "classes": issues.class_names,
        "end": int(issues.is_issue.sum()) - begin,  # of the list, counted from the first item
        "items": items,
    }
    corrections = [*(run.args.get("corrections") or []), *decisions.values()]
    labels = ["--labels", run.args["labels"]] if run.args.get("labels") else []  # on which the decisions were made
    flags = *labels, "--corrections", *corrections
    has_files = run.script == "Train_folder.py" and run.data_folder.is_dir()  # not of data in memory
    next_step = command(run, "", *flags) if has_files else ""
    values = {"run": run, "issues": issues, "data": data, "name": name, "names": [*decisions], "next_step": next_step}
    return render("review.html.jinja", {}, warnings=warnings(issues), **values)
