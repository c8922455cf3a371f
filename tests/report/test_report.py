"""The command: `python -m dividemix report RUN [RUN ...]`."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.run_folder import make_run

from dividemix import DivideMixError, DivideMixWarning
from dividemix.report import figures, report
from dividemix.run import command_line

MADE = {"report.html", "figures", "transition.csv", "label_issues.csv", "cleaned_labels.csv"}


@pytest.fixture(autouse=True)
def unrendered(monkeypatch):
    monkeypatch.setattr(figures, "png", lambda draw: b"\x89PNG")


def test_one_run_has_its_report_and_lists_in_its_folder(tmp_path, capsys):
    """Else the user looks for what the command says that it made."""
    folder = make_run(tmp_path / "run")
    before = {path.name for path in folder.iterdir()}
    report.main([str(folder)])
    made = {path.name for path in folder.iterdir()} - before
    assert made == MADE
    out = capsys.readouterr().out
    assert "labels: 3 of 12 look wrong (25.0%); scores are in-sample" in out and "recall 75.0%" in out
    assert f"report: {folder / 'report.html'}\n" in out and "3 of 4 (75.0%)" in out.splitlines()[1]


def test_another_folder_leaves_the_run_as_it_is(tmp_path):
    """A colleague's run folder cannot be written: else it cannot be looked at."""
    folder = make_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    report.main([str(folder), "--out", str(tmp_path / "new" / "place")])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    made = {path.name for path in (tmp_path / "new" / "place").iterdir()}
    assert made == MADE


def test_an_older_or_unfinished_run_has_a_report(tmp_path, capsys):
    """Else the folders of runs that took days cannot be looked at any more."""
    folder = make_run(tmp_path / "run", scored=False, histograms=False, thumbnails=False)
    report.main([str(folder)])
    assert (folder / "report.html").is_file() and not (folder / "label_issues.csv").exists()
    assert "labels:" not in capsys.readouterr().out


def test_several_runs_have_a_report_each_and_one_of_all(tmp_path, capsys, monkeypatch):
    """Else runs cannot be set side by side, or the page of all lies over that of one."""
    monkeypatch.chdir(tmp_path)
    folders = [make_run(tmp_path / name, seed=k, accuracy=50.0 + k) for k, name in enumerate(("a_seed0", "a_seed1"))]
    report.main(list(map(str, folders)))
    assert all((folder / "report.html").is_file() for folder in folders)
    assert "2 runs" in (tmp_path / "report" / "report.html").read_text()
    out = capsys.readouterr().out
    assert out.splitlines()[-2].split()[:5] == ["a", "2", "52.50", "±", "0.71"] and out.endswith(
        "all runs: report/report.html\n"
    )
    report.main([*map(str, folders), "--out", "seeds"])
    assert (tmp_path / "seeds" / "report.html").is_file() and (tmp_path / "seeds" / "figures").is_dir()


def test_export_clean(tmp_path, capsys):
    """Else the corrected labels of the wrong run are written, or none, without a word."""
    folder = make_run(tmp_path / "run")
    report.main([str(folder), "--export_clean", str(tmp_path / "clean")])
    assert (tmp_path / "clean" / "cleaned_labels.json").is_file()
    assert f"corrected labels: {tmp_path / 'clean' / 'cleaned_labels.json'}" in capsys.readouterr().out
    with pytest.raises(DivideMixError, match="--export_clean: expected one run"):
        report.main([str(folder), str(folder), "--export_clean", str(tmp_path / "other")])
    older = make_run(tmp_path / "older", scored=False)
    with pytest.raises(DivideMixError, match="has no scores of its labels yet: finish it"):
        report.main([str(older), "--export_clean", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_what_is_no_run_folder_is_one_line(tmp_path, capsys, monkeypatch):
    """Else a mistyped path ends in a stack trace."""
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command_line(report.main)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """The same for --out."""
    (tmp_path / "file").touch()
    with pytest.raises(DivideMixError, match=r"file.*cannot be written"):
        report.main([str(make_run(tmp_path / "run")), "--out", str(tmp_path / "file")])


def test_a_run_that_is_named_twice_is_one_run(tmp_path, capsys):
    """A pattern of the shell that matches a run and its link: else it counts as two seeds, with a spread of 0."""
    folder = make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    report.main([str(folder), str(tmp_path / "link"), f"{folder}/", "--out", str(tmp_path / "new")])
    assert f"report: {tmp_path / 'new' / 'report.html'}" in capsys.readouterr().out
    assert "2 runs" not in (tmp_path / "new" / "report.html").read_text()


def test_runs_of_others_can_be_compared(tmp_path):
    """Folders that cannot be written: else there is no page of all, and no flag that would help."""
    folders = [make_run(tmp_path / name, seed=k) for k, name in enumerate(("a_seed0", "a_seed1"))]
    (folders[0] / "figures").touch()  # in the way, also of root
    with pytest.warns(DivideMixWarning, match="a_seed0: no report of its own is written there"):
        report.main([*map(str, folders), "--out", str(tmp_path / "new")])
    assert (folders[1] / "report.html").is_file() and "2 runs" in (tmp_path / "new" / "report.html").read_text()


def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch):
    """A run of days is finished and saved: an error in a figure ends it in a stack trace."""

    def broken(*_):
        raise ValueError("no figure")

    monkeypatch.setattr(report, "draw", broken)
    run = SimpleNamespace(folder=tmp_path, ranks=SimpleNamespace(first=True), say=print)
    with pytest.warns(DivideMixWarning, match="no report: no figure"):
        report.of_finished(run)
    run.ranks.first = False  # another rank does not even look
    report.of_finished(run)


def test_a_script_does_not_wait_for_what_the_report_needs():
    """Else `--help` and each of many ranks load matplotlib and jinja2 before anything is said."""
    code = "import sys, Train_cifar; print(*{'matplotlib', 'jinja2'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split() == []
