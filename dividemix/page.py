"""report.html: what the page of a run says, for report.html.jinja, which says how. The page is one file that needs no
network and no other file. `compare` has the values of the page of several runs."""

import base64
import hashlib
import io
import shlex
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dividemix import blind, histograms, recipes
from dividemix.label_issues import IN_SAMPLE, Agreement, LabelIssues, against_truth, by_class, lost_classes, percent
from dividemix.runfolder import RunFolder

NO_SCORES = (
    "The run has no scores of its labels. They are made when it has come to its end, unless by --no_label_scores; of a "
    "finished run, the same training command without this flag makes them."
)
MEASURES = {  # the paper's name of a result -> (its name on the page, the run's own name of it)
    "best": ("best", "best_acc"),
    "last": ("mean of the last 10", "last10_acc"),
    "test_acc": ("test accuracy", "test_acc"),
    "test_acc_top5": ("top-5", "test_acc_top5"),
    "imagenet_acc": ("ILSVRC12", "imagenet_acc"),
    "imagenet_acc_top5": ("ILSVRC12, top-5", "imagenet_acc_top5"),
}


def render(figures: dict[str, Path], **values: Any) -> bytes:
    """The HTML file, in which all `values` are text. figures: PNG files by name. A content security policy admits the
    template's own script alone."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"percent": percent, "sha256": digest}
    images = {name: data_uri(path.read_bytes(), "png") for name, path in figures.items()}
    content = page.get_template("report.html.jinja").render(images=images, **values)
    return content.encode("utf-8", "backslashreplace")


def digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(pixels: NDArray[np.uint8]) -> str:
    """The data URI of an image (H, W, 3): PNG where it is tiny, else JPEG."""
    kind = "png" if max(pixels.shape) <= 48 else "jpeg"
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return data_uri(content.getvalue(), kind)


def number(value: Any, form: str = ".2f") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


# ---------------------------------------------------------------------------------------------------------------------
# The page of a run


def run_page(run: RunFolder, issues: LabelIssues | None, figures: dict[str, Path]) -> bytes:
    """The whole HTML file. figures: the PNG files that `figures.draw_all` wrote, by name."""
    agreement = against_truth(issues) if issues else None
    lines, command = run.data.get("lines"), run.about.get("command")
    setting, results = recipes.in_paper(run.script, run.args)
    nets = [entry[name] for entry in run.histograms for name in ("net1", "net2") if name in entry]
    classes = by_class(issues) if issues else []
    return render(
        figures,
        **{"run": run, "issues": issues, "agreement": agreement, "name_of_all": run.name},
        lines=lines if isinstance(lines, list) else [],
        cards=cards(run, issues, agreement),
        accuracies=accuracies(run),
        paper=paper_rows(run, results),
        paper_name="paper" if run.ablation is recipes.ABLATIONS["none"] else f"paper, {run.ablation.paper_name}",
        differences=recipes.setting_differences(run.args, setting),
        chosen=chosen(run),
        frames=frames(run, histograms.peak(nets)),
        truth_is_known=any("clean" in histogram for histogram in nets),
        **{"no_scores": NO_SCORES, "in_sample": IN_SAMPLE},
        classes=[(issues.class_name(c), few, many, percent(few / many)) for c, few, many in classes],
        lost_classes=lost_classes(issues) if issues else [],
        thumbnails=thumbnails(run, issues) if issues else [],
        command=shlex.join(map(str, command)) if isinstance(command, list) else "",
        settings=provenance(run),
    )


def cards(run: RunFolder, issues: LabelIssues | None, agreement: Agreement | None) -> list[tuple[str, str]]:
    """(name, value) of the first numbers of the page."""
    last = run.records[-1]
    if run.measured == "test_acc":
        best = "test accuracy, %, of the epoch that validation chose" if "val_acc" in last else "best test accuracy, %"
        values = [(best, number(run.best)), ("mean of the last 10, %", number(last.get("last10_acc")))]
    else:
        values = [("test accuracy, %", number(run.best))] if run.best is not None else []
        values.append(("peak validation accuracy, %", number(max(run.numbers("val_acc"), default=None))))
    values.append(("last epoch, %", number(last.get(run.measured))))
    if last.get("auc_net1") is not None or last.get("auc_net2") is not None:
        both = "/".join(number(last.get(f"auc_net{k}"), ".3f") for k in run.nets)
        values.append((f"AUC, net {'/'.join(map(str, run.nets))}", both))
    if issues is not None:
        values.append((f"of {len(issues)} labels look wrong", str(int(issues.is_issue.sum()))))
    if agreement is not None:
        values.append(("precision of that list", percent(agreement.precision)))
        values.append(("recall of that list", percent(agreement.recall)))
    return values


def accuracies(run: RunFolder) -> list[tuple[str, ...]]:
    """A head and rows: both networks together and each by itself, or the one network."""
    kind = "test" if run.measured == "test_acc" else "validation"
    rows = [(f"{kind} accuracy, %", "peak", "last 10", "last")]
    nets = [("both networks", ""), *((f"net {k}", f"_net{k}") for k in run.nets)]
    for name, suffix in nets if len(run.nets) > 1 else [("the network", "")]:
        if values := run.numbers(f"{run.measured}{suffix}"):
            rows.append((name, *map(number, (max(values), statistics.fmean(values[-10:]), values[-1]))))
    return rows


def paper_rows(run: RunFolder, results: dict[str, float]) -> list[tuple[str, str, str]]:
    """(what, this run's, the paper's)"""
    values = {**run.records[-1], **run.result}
    return [
        (f"{MEASURES[name][0]}, %", number(values.get(MEASURES[name][1])), number(value, "g"))
        for name, value in results.items()
    ]


def chosen(run: RunFolder) -> dict[str, Any] | None:
    """What --recipe blind has come to."""
    values = [run.records[-1].get(name) for name in blind.FIELDS]
    if not all(isinstance(value, int | float) for value in values):
        return None
    used = [f"{name} {value:g}" for name, value in zip(blind.NAMES, values[2:], strict=True)]
    return {"rate": values[0], "concentration": values[1], "used": used}


def frames(run: RunFolder, top: float) -> list[tuple[int, list[tuple[str, list[tuple[str, str]]]]]]:
    """(epoch, (title, paths) of each network) of the divided epochs. top: of the axis that they share."""
    return [
        (
            entry["epoch"],
            [
                (f"net {k}, epoch {entry['epoch']}", histograms.paths(entry[f"net{k}"], top))
                for k in (1, 2)
                if f"net{k}" in entry
            ],
        )
        for entry in run.histograms
    ]


def thumbnails(run: RunFolder, issues: LabelIssues) -> list[tuple[int, str]]:
    """(row of `issues`, data URI) of the small images that the run has kept, the worst label first."""
    files = run.thumbnails
    if not {"index", "pixels", "sizes"} <= files.keys() or files["pixels"].ndim != 4:
        return []
    shown = []
    for index, pixels, (height, width) in zip(files["index"], files["pixels"], files["sizes"], strict=False):
        [row] = np.flatnonzero(issues.index == index)[:1].tolist() or [None]
        if row is not None and 0 < height <= pixels.shape[0] and 0 < width <= pixels.shape[1]:
            shown.append((row, picture(pixels[:height, :width])))
    return shown


def provenance(run: RunFolder) -> dict[str, Any]:
    items = {"machine": run.about.get("machine"), "commit": run.about.get("commit")}
    versions = run.about.get("versions")
    items |= versions if isinstance(versions, dict) else {}
    items |= {f"images to {name}": run.data[name] for name in ("train", "val", "test") if name in run.data}
    return {name: value for name, value in items.items() if value}
