"""Reading run folders: whole, old, unfinished and damaged ones."""

import json

import numpy as np
import pytest
from helpers.run_folder import CLASSES, WRONG, make_run

from dividemix import DivideMixError
from dividemix.run.folder import read_run


def test_a_whole_run_folder(tmp_path):
    """Else the report shows another run's numbers, or none."""
    run = read_run(make_run(tmp_path / "run"))
    assert run.name == "run" and run.class_names == CLASSES and run.divides
    assert run.column("test_acc") == [50.0, 51.0, 52.0] and run.best == 52.0
    assert run.column("auc_net1") == [None, 0.875, 0.875] and run.column("nothing") == [None] * 3
    assert [entry["epoch"] for entry in run.histograms] == [1, 2]
    assert (run.labels["given"] != run.labels["true"]).tolist() == WRONG.tolist()
    assert len(run.label_scores["index"]) == 12 and run.result == {}
    assert "true" not in read_run(make_run(tmp_path / "b", truth=False, method="ce")).labels


def test_what_is_no_run_folder_is_named(tmp_path):
    """Else a mistyped path ends in a stack trace, or in a report of nothing."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, content in (("another", '{"args": {}}'), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(content)
    for name in ("missing", "empty", "file", "another", "list"):
        with pytest.raises(DivideMixError, match=f"{name} is not a run folder"):
            read_run(tmp_path / name)
    folder = make_run(tmp_path / "run")
    for content in ("", '{"epoch": 0'):
        (folder / "metrics.jsonl").write_text(content)
        with pytest.raises(DivideMixError, match="run has no finished epoch"):
            read_run(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("args.json", b"{"), ("metrics.jsonl", b"{\n"), ("histograms.jsonl", b"[\n"), ("result.json", b"")],
        *[("labels.npz", b"text"), ("label_scores.npz", b"PK\x03\x04 cut"), ("thumbnails.npz", b"")],
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    """A copy that was cut, one among twenty: the table of all ends in a stack trace that does not say which it is."""
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(DivideMixError, match=r"cannot be read .*: delete it") as error:
        read_run(folder)
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def test_arrays_that_would_run_code_are_refused(tmp_path):
    """A run folder from somebody else is a pickle's way in: reading it must not be trusting it, nor advise to."""
    folder = make_run(tmp_path / "run")
    np.savez(folder / "label_scores.npz", index=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DivideMixError, match=r"label_scores\.npz cannot be read") as error:
        read_run(folder)
    assert "trust" not in str(error.value) and "allow_pickle" not in str(error.value)


def test_the_result_is_that_of_a_finished_run(tmp_path):
    """Clothing1M's test accuracy stands in the result alone. Else its report has none."""
    folder = make_run(tmp_path / "run")
    records = [{"epoch": e, "val_acc": 60.0 + e} for e in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert (read_run(folder).measured, read_run(folder).best) == ("val_acc", None)
    (folder / "result.json").write_text(json.dumps({"test_acc": 74.76}))
    assert read_run(folder).best == 74.76


def test_half_a_line_is_left_out(tmp_path):
    """Killed while it wrote a line, or watched while it does: a run has no report until it is started again."""
    folder = make_run(tmp_path / "run")
    whole = read_run(folder).records
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "test_')
    assert read_run(folder).records == whole
