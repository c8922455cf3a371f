"""report.html of one run: the values for report.html.jinja. The page is one file that contains its images and needs no
network. `compare` has the values for the page of several runs."""

import base64
import hashlib
import shlex
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dividemix import blind, recipes
from dividemix.data import BadImage, Boundary
from dividemix.data.images import read_image
from dividemix.report.clean_labels import started_by
from dividemix.report.issues import (
    IN_SAMPLE,
    LabelIssues,
    against_truth,
    by_class,
    equal_images,
    estimate,
    percent,
    warnings,
)
from dividemix.run import RunFolder, histograms, logs, thumbnail

RESULT_NAMES = {  # of the paper's results, on the page
    **{"best": "best", "last": "mean of the last 10", "test_acc": "test accuracy", "test_acc_top5": "top-5"},
    **{"imagenet_acc": "ILSVRC12", "imagenet_acc_top5": "ILSVRC12, top-5"},
}
_SUREST = 24  # of the small images on the page, those of the most doubtful labels
DATA_NAMES = {"train": "training images", "val": "validation images", "test": "test images"}


def render(template: str, figures: dict[str, Path], /, **values: Any) -> bytes:
    """The HTML file; all `values` are escaped. figures: PNG files by name. The page's content security policy allows no
    script but the template's."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"number": number, "percent": percent, "sha256": digest}
    images = {name: data_uri(path.read_bytes()) for name, path in figures.items()}
    content = page.get_template(template).render(images=images, **values)
    return content.encode("utf-8", "backslashreplace")


def digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def data_uri(content: bytes) -> str:
    """Of a PNG or JPEG file."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def auc_of_nets(run: RunFolder) -> str:
    """'0.995/0.996', of the last epoch; '-' where no network has an AUC."""
    values = [run.records[-1].get(f"auc_net{k}") for k in run.nets]
    return "/".join(number(value, ".3f") for value in values) if set(values) != {None} else "-"


def beside_paper(run: RunFolder) -> tuple[dict[str, float], list[str]]:
    """The paper's results for the run's data and noise, and the setting differences."""
    setting, results = recipes.in_paper(run.script, run.args)
    return results, recipes.setting_differences(run.args, setting)


def run_page(run: RunFolder, issues: LabelIssues | None, figures: dict[str, Path], has_review: bool = False) -> bytes:
    """The HTML file of one run. figures: the PNG files of `figures.draw_all`, by name. has_review: whether the review
    page lies beside it."""
    results, differences = beside_paper(run)
    values = logs.of_averages(run.records[-1] | run.result)
    values |= {"best": values.get("best_acc"), "last": values.get("last10_acc")}
    data = {title: run.data[name] for name, title in DATA_NAMES.items() if name in run.data}
    return render(
        "report.html.jinja",
        figures,
        **{"run": run, "issues": issues, "agreement": against_truth(issues), "title": run.name},
        **{"auc": auc_of_nets(run), "accuracies": accuracies(run), "differences": differences},
        paper=[(RESULT_NAMES[name], number(values.get(name)), f"{result:g}") for name, result in results.items()],
        paper_name="paper" if run.ablation is recipes.ABLATIONS["none"] else f"paper, {run.ablation.paper_name}",
        chosen_by_blind=blind.NAMES,
        svg_paths=histograms.paths,
        top=histograms.peak(entry[name] for entry in run.histograms for name in ("net1", "net2") if name in entry),
        in_sample=IN_SAMPLE,
        classes=[(*row, percent(row[1] / row[2])) for row in by_class(issues)] if issues else [],
        warnings=warnings(issues) if issues else [],
        estimate=estimate(issues) if issues and not issues.failures else "",
        equal_images=equal_images(issues) if issues else [],
        thumbnails=thumbnails(run, issues) if issues else {},
        has_review=has_review,
        command=shlex.join(started_by(run)),
        settings={key: run.args_json[key] or "-" for key in ("machine", "commit")} | run.args_json["versions"] | data,
    )


def accuracies(run: RunFolder) -> list[tuple[str, ...]]:
    """Rows (name, best, mean of the last 10 epochs, last epoch) of both networks together, of each network and, with
    --ema, of the averaged weights."""
    nets = {f"net {k}": f"_net{k}" for k in run.nets}
    names = {"both networks": "", **nets} if len(nets) > 1 else {"the network": ""}
    names = names | {"averaged weights": "_ema"} if run.measured else {}
    columns = {name: run.numbers(f"{run.measured}{suffix}") for name, suffix in names.items()}
    return [
        (name, *map(number, (max(values), statistics.fmean(values[-10:]), values[-1])))
        for name, values in columns.items()
        if values
    ]


def thumbnails(run: RunFolder, issues: LabelIssues) -> dict[str, list[tuple[int, str]]]:
    """(row of `issues`, data URI) of small images in the run folder: of the labels that surely look wrong, and of those
    on both sides of the end of the list."""
    surest = issues.worst[: min(_SUREST, int(issues.is_issue.sum()))]
    borderline = issues.borderline[~np.isin(issues.borderline, surest)]
    groups = {"surest": surest.tolist(), "borderline": borderline.tolist()}
    return {
        name: [(row, data_uri(image)) for row, image in zip(rows, pictures(run, issues, rows), strict=True) if image]
        for name, rows in groups.items()
    }


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
