"""The report of a run: report.html, figures, lists of labels that look wrong, and review.html to decide on them, in its
run folder.

dividemix report RUN                              # RUN/report.html, figures/, *.csv
dividemix report RUN RUN RUN --out seeds          # the same for each run, and seeds/report.html of all runs
dividemix report RUN --review                     # RUN/review.html with all doubtful labels
dividemix report RUN --export_clean my-labels     # a corrected copy of the labels
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dividemix import DivideMixError, warn
from dividemix.files import csv_bytes, write_atomically
from dividemix.report import clean_labels, compare, review
from dividemix.report import issues as label_issues
from dividemix.report.page import run_page
from dividemix.run import Parser, Run, RunFolder, options, read_run

PAGE = "report.html"


def of_finished(run: Run) -> None:
    """Write the report of a run that has just ended. An error here is a warning only: the run is saved."""
    if run.ranks.first:
        try:
            run.say(*draw(run.folder, None, review.PER_PAGE, 1))
        except Exception as error:
            warn(f"the report could not be written: {error}")


def draw(path: Path, out: Path | None = None, per_page: int | None = None, num_pages: int | None = None) -> list[str]:
    """Write the report of the run folder `path` into `out`, by default the run folder; with `per_page` also the review
    pages, at most `num_pages`. -> lines for the terminal"""
    from dividemix.report import figures  # imports matplotlib, which a training script need not wait for

    run, out = read_run(path), out or path
    out.mkdir(parents=True, exist_ok=True)
    issues = label_issues.find(run)
    drawn = figures.draw_all(run, issues, out / "figures")
    transition = label_issues.transition_table(run)
    if transition is not None:
        write_atomically(out / "transition.csv", csv_bytes(transition))
    lines = []
    if issues is not None:
        files = label_issues.write(issues, out)
        lines += [*label_issues.summary(issues), f"  {', '.join(map(str, files))}"]
    if per_page:
        no_scores = ["review: not made, this run has no scores of its labels"]
        lines += review.write(run, issues, out, per_page, num_pages) if issues else no_scores
    write_atomically(out / PAGE, run_page(run, issues, drawn, (out / review.PAGE).exists()))
    lines.append(f"report: {out / PAGE}")
    return lines + ([f"WARNING: {line}" for line in label_issues.warnings(issues)] if issues else [])  # the last words


def draw_comparison(runs: Sequence[RunFolder], lists: compare.Lists, out: Path) -> list[str]:
    """Write the page of several runs into `out`. -> lines for the terminal"""
    from dividemix.report import figures

    out.mkdir(parents=True, exist_ok=True)
    groups = compare.group_by_setting(runs)
    drawn = figures.draw_comparison(groups, out / "figures")
    write_atomically(out / PAGE, compare.comparison_page(groups, lists, drawn))
    has_seeds = any(len(group) > 1 for _, group in groups)
    lines = ["", compare.console_table(compare.spread_table(groups, lists))] if has_seeds else []
    lines += [f"WARNING: {line}"] if (line := compare.other_validation(groups)) else []
    return [*lines, f"all runs: {out / PAGE}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="dividemix report",
        usage="%(prog)s RUN [RUN ...] [flags]",
        description="Write report.html of each run, and one of several.",
        examples=["checkpoint/folder_flowers --export_clean flowers-clean", "checkpoint/a checkpoint/b --out both"],
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    out_help = "write the report here, not into the run folder; for several runs, the page of all (default: ./report)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    review_help = "write review.html, a page to decide on the doubtful labels, with up to N of them; more follow in "
    review_help += f"review-2.html and so on (default of N: {review.PER_PAGE})"
    per_page: dict[str, Any] = {"nargs": "?", "const": review.PER_PAGE, "metavar": "N", "type": options.positive_int}
    parser.add_argument("--review", **per_page, help=review_help)
    clean_help = "write a corrected copy of the run's labels into a new folder"
    parser.add_argument("--export_clean", type=Path, metavar="DIR", help=clean_help)
    args = parser.parse_args(argv)
    if args.export_clean and len(args.runs) > 1:
        raise DivideMixError("--export_clean takes one run: start the command once for each run")
    runs = [read_run(path) for path in {path.resolve(): path for path in args.runs}.values()]  # each once
    lists = {run.path: label_issues.find(run) for run in runs}
    print(compare.console_table(compare.run_table(runs, lists)))
    several = len(runs) > 1
    try:
        for run in runs:
            try:
                print("", run.path, *draw(run.path, None if several else args.out, args.review), sep="\n")
            except OSError as error:
                if not several:
                    raise
                warn(f"{run.path}: the report of this run cannot be written there ({error.strerror})")
        if several:
            print(*draw_comparison(runs, lists, args.out or Path("report")), sep="\n")
    except OSError as error:
        problem = f"cannot be written ({error.strerror}); choose another folder with --out"
        raise DivideMixError(f"{error.filename or args.out}: {problem}") from error
    if args.export_clean:
        issues = lists[runs[0].path]
        if issues is None:
            raise DivideMixError(
                f"--export_clean: {runs[0].path} has no scores of its labels yet: finish it with the same training "
                "command, without --no_label_scores"
            )
        print(*clean_labels.export(runs[0], issues, args.export_clean), sep="\n")
