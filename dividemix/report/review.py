"""review.html: the doubtful labels of a run as small images, to decide on each in a browser. The page is one file that
needs no network, and saves decisions.csv: the columns path (index, where there are no files), decision and label."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dividemix.data import BadImage, Boundary
from dividemix.data.images import read_image
from dividemix.files import write_atomically
from dividemix.report.clean_labels import command
from dividemix.report.issues import LabelIssues, warnings
from dividemix.report.page import data_uri, render
from dividemix.run import RunFolder, thumbnail

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
    for k, (name, page) in enumerate(zip(names, pages, strict=True)):
        write_atomically(folder / name, review_page(run, issues, page, images, k * per_page, name, names))
    lines = [f"review: {', '.join(str(folder / name) for name in names)} ({len(shown)} labels)"] if names else []
    if len(shown) < len(rows):
        files = f" or a readable file in {run.data_folder}" if issues.paths else ""
        lines.append(f"review: {len(rows) - len(shown)} labels are left out, without an image in the run folder{files}")
    elif len(rows) < n_doubtful:
        lines[0] += f"; all {n_doubtful}: python -m dividemix report {run.path} --review"
    return lines


def pictures(run: RunFolder, issues: LabelIssues, rows: Sequence[int]) -> list[bytes | None]:
    """A small image of each row of `issues`, from the run folder or made of its file; None where there is neither."""
    stored, root = run.pictures, run.data_folder
    boundary, as_shown = Boundary(root or ""), run.script == "Train_folder.py"

    def picture(row: int) -> bytes | None:
        index = int(issues.index[row])
        if index in stored or not (issues.paths and root):
            return stored.get(index)
        try:
            return thumbnail(read_image(root / issues.paths[row], boundary, as_shown))
        except BadImage:
            return None

    with ThreadPoolExecutor() as pool:
        return [*pool.map(picture, rows)]


def review_page(
    run: RunFolder,
    issues: LabelIssues,
    rows: Sequence[int],
    images: dict[int, bytes],
    begin: int,
    name: str,
    names: Sequence[str],
) -> bytes:
    """The HTML file `name`, one of `names`, of these rows, the first of which is number `begin` of all."""
    items: list[dict[str, Any]] = []
    for row in rows:
        given, suggested = (issues.class_names[of[row]] for of in (issues.given_labels, issues.suggested_labels))
        item = {"id": issues.paths[row] if issues.paths else str(issues.index[row]), "image": data_uri(images[row])}
        item |= {"given": given, "suggested": suggested, "listed": bool(issues.is_issue[row])}
        items.append(item | {"quality": f"{issues.quality[row]:.3f}", "confidence": f"{issues.confidence[row]:.3f}"})
    data = {
        "key": f"dividemix {run.name} {run.labels_digest} {name}",
        "column": "path" if issues.paths else "index",
        "file": name.replace("review", "decisions").replace("html", "csv"),
        "classes": issues.class_names,
        "end": int(issues.is_issue.sum()) - begin,  # of the list, counted from the first item
        "items": items,
    }
    corrections = [*(run.args.get("corrections") or []), data["file"]]
    labels = ["--labels", run.args["labels"]] if run.args.get("labels") else []  # on which the decisions were made
    next_step = command(run, *labels, "--corrections", *corrections) if run.script == "Train_folder.py" else ""
    values = {"run": run, "issues": issues, "data": data, "name": name, "names": names, "next_step": next_step}
    return render("review.html.jinja", {}, warnings=warnings(issues), **values)
