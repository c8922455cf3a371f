"""The command: `python -m dividemix report RUN [RUN ...]`."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.pages import refused
from helpers.run_folder import make_run
from helpers.scripts import end_of

from dividemix import DivideMixError, DivideMixWarning
from dividemix.report import figures, report
from dividemix.run import scoring

MADE = {"report.html", "figures", "transition.csv", "label_issues.csv", "suspects.csv", "cleaned_labels.csv"}


@pytest.fixture(autouse=True)
def unrendered(monkeypatch):
    monkeypatch.setattr(figures, "png", lambda draw: b"\x89PNG")


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_run_has_its_report_and_lists_in_its_folder(tmp_path, capsys):
    """Else the user looks for what the command says that it made; a run and its link would be two seeds of spread 0."""
    folder = make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    before = names_in(folder)
    report.main([str(tmp_path / "link"), str(folder)])
    assert names_in(folder) - before == MADE
    out = capsys.readouterr().out
    assert f"report: {folder / 'report.html'}\n" in out and "3 of 4 (75.0%)" in out.splitlines()[1]
    assert "labels: 3 of 12" in out and "recall 75.0%" in out and "2 runs" not in (folder / "report.html").read_text()


def test_a_run_without_any_accuracy_has_a_report(tmp_path):
    """`dividemix issues` measures none: its list would be lost in a KeyError."""
    folder = make_run(tmp_path / "run", command="Train_folder.py", truth=False, data_path="d")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{name: value for name, value in record.items() if "acc" not in name} for record in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    other = make_run(tmp_path / "other", truth=False)
    report.main([str(folder), str(other), "--out", str(tmp_path / "both")])
    page = (folder / "report.html").read_text()
    assert "Nothing is held out" in page and "accuracy (%)" not in page and (folder / "suspects.csv").exists()
    assert not (folder / "figures/accuracy.png").exists() and (tmp_path / "both/figures/accuracy.png").exists()


def test_corrected_labels_of_a_list_that_means_nothing_are_no_success(tmp_path, capsys, monkeypatch):
    """They were asked for by name, but nobody should train on them because the command ended as any other."""
    monkeypatch.setattr(scoring, "_LITTLE_SKILL", 1.0)
    monkeypatch.setattr(scoring, "_FEWEST", 1)
    report.main([str(make_run(tmp_path / "run")), "--export_clean", str(tmp_path / "clean")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("WARNING: ") and "python" not in last and (tmp_path / "clean/cleaned_labels.csv").exists()


def test_another_folder_leaves_the_run_as_it_is(tmp_path):
    """A colleague's run folder cannot be written: else it cannot be looked at. Nor must it be finished."""
    unfinished = make_run(tmp_path / "unfinished", scored=False, histograms=False, thumbnails=False)
    report.main([str(unfinished), "--out", str(tmp_path / "old")])
    assert names_in(tmp_path / "old") == {"report.html", "figures", "transition.csv"}
    folder = make_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    report.main([str(folder), "--out", str(tmp_path / "new" / "place")])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert names_in(tmp_path / "new" / "place") == MADE


def test_several_runs_have_a_report_each_and_one_of_all(tmp_path, capsys, monkeypatch):
    """Else runs cannot be compared, or one in a folder that cannot be written ends the command."""
    monkeypatch.chdir(tmp_path)
    folders = [make_run(tmp_path / f"a_seed{k}", seed=k, accuracy=50.0 + k) for k in range(2)]
    report.main(list(map(str, folders)))
    assert all((folder / "report.html").is_file() for folder in folders)
    assert "2 runs" in (tmp_path / "report" / "report.html").read_text()
    *_, spread, last = capsys.readouterr().out.splitlines()
    assert spread.split()[:5] == ["a", "2", "52.50", "±", "0.71"] and "report/report.html" in last
    new = make_run(tmp_path / "b")
    (new / "figures").touch()  # in the way, also of root
    with pytest.warns(DivideMixWarning, match=str(new)):
        report.main([*map(str, [*folders, new]), "--out", "new"])
    assert "3 runs" in (tmp_path / "new" / "report.html").read_text() and (tmp_path / "new" / "figures").is_dir()


def test_export_clean(tmp_path, capsys):
    """Else the corrected labels of the wrong run are written, or none, without a word."""
    folder, unscored = make_run(tmp_path / "run"), make_run(tmp_path / "unscored", scored=False)
    report.main([str(folder), "--export_clean", str(tmp_path / "clean")])
    assert (tmp_path / "clean" / "cleaned_labels.json").is_file()
    assert str(tmp_path / "clean" / "cleaned_labels.json") in capsys.readouterr().out
    for runs in ([folder, unscored], [unscored]):
        with pytest.raises(DivideMixError, match="--export_clean"):
            report.main([*map(str, runs), "--export_clean", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    """Else --out on a file ends in a stack trace."""
    (tmp_path / "file").touch()
    status = end_of(report, [str(make_run(tmp_path / "run")), "--out", str(tmp_path / "file")], monkeypatch)
    refused((status, *capsys.readouterr()), tmp_path / "file", "--out")


def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch):
    """A run of days is finished and saved: an error in a figure ends it in a stack trace."""

    def broken(*_):
        raise ValueError("no figure")

    monkeypatch.setattr(report, "draw", broken)
    run = SimpleNamespace(folder=tmp_path, ranks=SimpleNamespace(first=True), say=print)
    with pytest.warns(DivideMixWarning, match="no figure"):
        report.of_finished(run)
    run.ranks.first = False  # another rank does not even look
    report.of_finished(run)


@pytest.mark.slow
def test_a_script_does_not_wait_for_what_the_report_needs():
    """Else `--help` and each of many ranks load matplotlib and jinja2 before anything is said."""
    code = "import sys, Train_cifar; print(*{'matplotlib', 'jinja2'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split() == []
