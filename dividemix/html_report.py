"""What the page of a run says: its numbers, figures, loss histograms, doubtful labels and settings. What the run folder
lacks is left out with a sentence. `compare` has the page of several runs."""

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dividemix import blind, histograms, recipes
from dividemix.label_issues import IN_SAMPLE, Agreement, LabelIssues, against_truth, by_class, lost_classes, percent
from dividemix.page import cards, page, paragraph, picture, png_figure, section, table, text
from dividemix.runfolder import RunFolder

_CLASSES = 20  # rows of the table of classes
NO_SCORES = (
    "The run has no scores of its labels. They are made when it has come to its end, unless by --no_label_scores; of a "
    "finished run, the same training command without this flag makes them."
)
NO_DIVISIONS = "Plain cross-entropy divides nothing."


def run_page(run: RunFolder, issues: LabelIssues | None, figures: dict[str, Path]) -> str:
    """The whole HTML file. figures: the PNG files that `figures.draw_all` wrote, by name."""
    found = against_truth(issues) if issues else None
    images = {name: path.read_bytes() for name, path in figures.items()}
    body = [
        head(run, issues, found),
        section("Accuracy and time", accuracies(run), paper(run), panels(images, ["accuracy", "seconds"], run.name)),
        section("Labeled and unlabeled sets", divisions(run, images)),
        section("Loss histograms", loss_histograms(run)),
        section("Labels that look wrong", labels(run, issues, found, images)),
        section("The most doubtful labels", pictures(run, issues)),
        section("Settings", settings(run)),
    ]
    return page(f"{run.name}: DivideMix report", "\n".join(body))


def head(run: RunFolder, issues: LabelIssues | None, found: Agreement | None) -> str:
    last, lines = run.records[-1], run.data.get("lines")
    done = "finished" if run.result else "not finished"
    parts = [f"<h1>{text(run.name)}</h1>", paragraph(f"{len(run.records)} epochs, {done}", dim=True)]
    parts += [paragraph(text(line)) for line in (lines if isinstance(lines, list) else [])]
    if isinstance(matrix := run.data.get("matrix"), list):
        parts.append(f'<pre class="matrix">{text(chr(10).join(map(str, matrix)))}</pre>')
    if run.measured == "test_acc":
        best = "test accuracy, %, of the epoch that validation chose" if "val_acc" in last else "best test accuracy, %"
        values = [(best, number(run.best)), ("mean of the last 10, %", number(last.get("last10_acc")))]
    else:
        values = [("test accuracy, %", number(run.best))] if run.best is not None else []
        values.append(("peak validation accuracy, %", number(max(numbers(run, "val_acc"), default=None))))
    values.append(("last epoch, %", number(last.get(run.measured))))
    if last.get("auc_net1") is not None or last.get("auc_net2") is not None:
        both = "/".join(number(last.get(f"auc_net{k}"), ".3f") for k in run.nets)
        values.append((f"AUC, net {'/'.join(map(str, run.nets))}", both))
    if issues is not None:
        values.append((f"of {len(issues)} labels look wrong", str(int(issues.is_issue.sum()))))
    if found is not None:
        values += [("precision of that list", percent(found.precision)), ("recall of that list", percent(found.recall))]
    return "\n".join([*parts, cards(values)])


def number(value: Any, form: str = ".2f") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def numbers(run: RunFolder, name: str) -> list[float]:
    """A metric over the epochs, those without a value left out."""
    return [value for value in run.column(name) if isinstance(value, int | float)]


def panels(images: dict[str, bytes], names: Sequence[str], run_name: str) -> str:
    """The figures side by side, '' where there are none."""
    found = [png_figure(images[name], f"{name.replace('_', ' ')} of {run_name}") for name in names if name in images]
    return f'<div class="figures">{"".join(found)}</div>' if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def accuracies(run: RunFolder) -> str:
    """Both networks together and each by itself, or the one network: the largest, the mean of the last 10 epochs, the
    last."""
    kind = "test" if run.measured == "test_acc" else "validation"
    rows = [(f"{kind} accuracy, %", "peak", "last 10", "last")]
    nets = [("both networks", ""), *((f"net {k}", f"_net{k}") for k in run.nets)]
    for name, suffix in nets if len(run.nets) > 1 else [("the network", "")]:
        if values := numbers(run, f"{run.measured}{suffix}"):
            rows.append((name, *map(number, (max(values), statistics.fmean(values[-10:]), values[-1]))))
    note = 'All numbers of each epoch: <a href="metrics.csv">metrics.csv</a>.'
    if kind == "validation" and run.script == "Train_folder.py":
        note = f"There is no test part: this is against the validation images' own labels, which may be wrong. {note}"
    return table(rows) + paragraph(note, dim=True)


def paper(run: RunFolder) -> str:
    """The run's numbers beside the paper's."""
    rows = paper_rows(run)
    if not rows:
        return paragraph("The paper has no result for this setting.", dim=True)
    notes = departures(run)
    note = paragraph(f"But this run: {text(', '.join(notes))}.", dim=True) if notes else ""
    whose = "paper" if run.ablation is recipes.ABLATIONS["none"] else f"paper, {run.ablation.paper_name}"
    return table([("", "this run", whose), *rows]) + note


def paper_rows(run: RunFolder) -> list[tuple[str, str, str]]:
    """(what, this run's, the paper's), from result.json; of an unfinished run, from the recipes."""
    own = {**run.records[-1], **run.result}
    papers = {name.removeprefix("paper_"): value for name, value in run.result.items() if name.startswith("paper_")}
    if not run.result:
        setting = [run.args.get(name) for name in ("dataset", "noise_mode", "r")]
        row, exact = recipes.nearest(*setting) if isinstance(setting[2], int | float) else (None, False)
        if exact:
            method = "dividemix" if run.divides else "ce"
            papers = recipes.paper_results(row, method, str(run.args.get("ablation", "none")))
    names = {"best": "best", "last": "mean of the last 10", "test_acc": "test accuracy", "test_acc_top5": "top-5"}
    names |= {"imagenet_acc": "ILSVRC12", "imagenet_acc_top5": "ILSVRC12, top-5"}
    keys = {"best": "best_acc", "last": "last10_acc"}
    return [
        (f"{names.get(name, name)}, %", number(own.get(keys.get(name, name))), number(value, "g"))
        for name, value in papers.items()
    ]


def departures(run: RunFolder) -> list[str]:
    """Flags in which a run of the small sets is not what the paper's results were made with."""
    if "noise_mode" not in run.args:
        return []
    return recipes.departures(run.args, recipes.CIFAR_SETTING)


def divisions(run: RunFolder, images: dict[str, bytes]) -> str:
    shown = panels(images, ["auc", "labeled", "clean"], run.name)
    if not shown:
        return paragraph("The run has divided nothing yet." if run.divides else NO_DIVISIONS, dim=True)
    if "clean" in images:
        explained = (
            "AUC: of each network's clean probability against the truth. Precision: the part of the labeled set whose "
            "labels are right; recall: the part of all right labels that is in the labeled set."
        )
    else:
        explained = "The true labels are not known, so how good the labeled set is cannot be said."
    return paragraph(explained, dim=True) + chosen(run) + shown


def chosen(run: RunFolder) -> str:
    """What --recipe blind has come to."""
    last = run.records[-1]
    found = [last.get(name) for name in blind.FIELDS]
    if not all(isinstance(value, int | float) for value in found):
        return ""
    rate, concentration, *values = found
    used = ", ".join(f"{name} {value:g}" for name, value in zip(blind.NAMES, values, strict=True))
    return paragraph(
        f"Chosen from the divisions (--recipe blind), in the last epoch: {used}. It seemed that {rate:.1%} of the "
        f"labels are wrong, with a concentration of {concentration:.2f}."
    )


def loss_histograms(run: RunFolder) -> str:
    """A frame for each divided epoch; the script's slider turns them over, without it the last one is shown."""
    if not run.histograms:
        return paragraph("No division is in the run folder." if run.divides else NO_DIVISIONS, dim=True)
    nets = [entry[name] for entry in run.histograms for name in ("net1", "net2") if name in entry]
    top, frames = histograms.peak(nets), []
    for i, entry in enumerate(run.histograms):
        drawn = []
        for k in (1, 2):
            if each := entry.get(f"net{k}"):
                title = f"net {k}, epoch {entry['epoch']}"
                drawn.append(f"<figure>{histograms.svg(each, top, title)}<figcaption>{title}</figcaption></figure>")
        hidden = "" if i == len(run.histograms) - 1 else " hidden"
        frame = f'<div class="frame figures" data-epoch="{entry["epoch"]}"{hidden}>{"".join(drawn)}</div>'
        frames.append(frame)
    known = any("clean" in each for each in nets)
    keys = [("#0072b2", "label truly clean"), ("#d55e00", "label truly wrong")] if known else [("#999999", "samples")]
    legend = "".join(f'<i class="key" style="background:{color}"></i>{name}' for color, name in keys)
    explained = (
        f"{legend}. Lines: the fitted mixture, blue the clean component, orange the noisy one; dashed: where the clean "
        "probability is the threshold."
    )
    slider = (
        '<div class="slider" hidden><input type="range" min="0" step="1" aria-label="epoch"><output></output></div>'
    )
    return f'{paragraph(explained)}<div class="frames">{slider}{"".join(frames)}</div>'


def labels(run: RunFolder, issues: LabelIssues | None, found: Agreement | None, images: dict[str, bytes]) -> str:
    if issues is None:
        return paragraph(NO_SCORES, dim=True)
    listed = int(issues.is_issue.sum())
    of_nets = ("the network's clean probability", "the mean clean probability of the two networks")
    quality = (
        of_nets[len(issues.p_clean) - 1]
        if issues.p_clean
        else ("the probability that both networks together give the label (cross-entropy has no clean probability)")
    )
    parts = [
        paragraph(
            f"{listed} of {len(issues)} labels ({listed / len(issues):.1%}) look wrong: their quality, {quality}, is "
            f"below {issues.threshold:g}, and the networks suggest another class. As of the end of epoch "
            f"{issues.epochs - 1}. "
            f'<b>Note: {IN_SAMPLE}.</b> All samples: <a href="label_issues.csv">label_issues.csv</a>; the labels with '
            'the suggestions taken: <a href="cleaned_labels.csv">cleaned_labels.csv</a>.'
        )
    ]
    if found is not None:
        by_loss = (found.wrong, found.by_loss, *[percent(found.by_loss / found.wrong if found.wrong else None)] * 2)
        ours = (found.listed, found.found, percent(found.precision), percent(found.recall))
        names = ("labels", "of them wrong", "precision", "recall")
        rows = [("against the truth", "this list", "by loss alone*"), *zip(names, ours, by_loss, strict=True)]
        before, after = percent(found.wrong / found.n), percent(found.wrong_after / found.n)
        parts += [
            table(rows),
            paragraph("* The largest losses, as many as there are wrong labels.", dim=True),
            paragraph(f"Wrong labels: {before} as given, {after} after the suggestions."),
        ]
    classes = by_class(issues)
    rows = [(issues.class_name(c), few, many, percent(few / many)) for c, few, many in classes[:_CLASSES]]
    parts += [table([("given class", "look wrong", "of", "part"), *rows])]
    if len(classes) > _CLASSES:
        parts.append(paragraph(f"{len(classes) - _CLASSES} more classes in the CSV.", dim=True))
    parts += [paragraph(line) for line in lost_classes(issues)[:_CLASSES]]
    explained = "Noise: of the samples of each class, which part has which given label."
    parts.append(paragraph(f"{explained} Estimated: the classes are those after the suggestions.", dim=True))
    return "\n".join([*parts, panels(images, ["transition", "transition_true"], run.name)])


def pictures(run: RunFolder, issues: LabelIssues | None) -> str:
    """Thumbnails, the worst label first, each with what is given, what is suggested and how clean it is."""
    thumbs = run.thumbnails
    whole = {"index", "pixels", "sizes"} <= thumbs.keys() and thumbs["pixels"].ndim == 4
    if issues is None or not whole or not len(thumbs["index"]):
        return paragraph("The run folder has no images of them." if issues else NO_SCORES, dim=True)
    shown = []
    for index, pixels, (height, width) in zip(thumbs["index"], thumbs["pixels"], thumbs["sizes"], strict=False):
        [row] = np.flatnonzero(issues.index == index)[:1].tolist() or [None]
        if row is not None and 0 < height <= pixels.shape[0] and 0 < width <= pixels.shape[1]:
            shown.append(thumbnail(issues, row, picture(pixels[:height, :width])))
    return f'<div class="thumbs">{"".join(shown)}</div>'


def thumbnail(issues: LabelIssues, row: int, image: str) -> str:
    given, suggested = (text(issues.class_name(int(each[row]))) for each in (issues.given, issues.suggested))
    name = text(issues.paths[row]) if issues.paths is not None else f"sample {issues.index[row]}"
    truth = ""
    if issues.true is not None:
        true, wrong = text(issues.class_name(int(issues.true[row]))), issues.true[row] != issues.given[row]
        truth = (
            f'<br><span class="{"right" if wrong else "mistaken"}">{"truly" if wrong else "is right:"} {true}</span>'
        )
    kind = "clean" if issues.p_clean else "quality"
    caption = f"given <b>{given}</b><br>suggested <b>{suggested}</b><br>{kind} {issues.quality[row]:.3f}{truth}"
    about = f"{name}: given {given}, suggested {suggested}"
    return f'<figure title="{name}"><img src="{image}" alt="{about}"><figcaption>{caption}</figcaption></figure>'


def settings(run: RunFolder) -> str:
    command = run.about.get("command")
    parts = []
    if isinstance(command, list):
        parts.append(f"<pre>python {text(shlex.join(map(str, command)))}</pre>")
    items = {"machine": run.about.get("machine"), "commit": run.about.get("commit")}
    versions = run.about.get("versions")
    items |= versions if isinstance(versions, dict) else {}
    items |= {f"images to {name}": run.data[name] for name in ("train", "val", "test") if name in run.data}
    parts.append(listing({k: v for k, v in items.items() if v}))
    parts.append(f"<details><summary>all flags</summary>{listing(run.args)}</details>")
    return "\n".join(parts)


def listing(items: dict[str, Any]) -> str:
    return f'<ul class="settings">{"".join(f"<li>{text(k)} <b>{text(v)}</b></li>" for k, v in items.items())}</ul>'
