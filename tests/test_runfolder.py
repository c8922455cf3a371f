"""Reading run folders: whole, old, unfinished and damaged ones."""

import json

import numpy as np
import pytest
from make_run import CLASSES, WRONG, make_run

from dividemix import DivideMixError
from dividemix.runfolder import read_run


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


@pytest.mark.parametrize("damage", ["missing", "empty", "no args", "no flags", "broken json", "no epoch", "other json"])
def test_what_is_no_run_folder_is_named(tmp_path, damage):
    """Else a mistyped path ends in a stack trace, or in a report of nothing."""
    folder = tmp_path / "run"
    if damage == "empty":
        folder.mkdir()
    elif damage != "missing":
        make_run(folder)
    content = {"no args": "{}", "no flags": '{"args": 3}', "broken json": '{"epoch": 0\n', "other json": "[1]\n"}
    if damage in ("no args", "no flags"):
        (folder / "args.json").write_text(content[damage])
    elif damage in ("broken json", "other json", "no epoch"):
        (folder / "metrics.jsonl").write_text(content.get(damage, ""))
    expected = "no finished epoch" if damage == "no epoch" else "is not a run folder"
    with pytest.raises(DivideMixError, match=expected) as caught:
        read_run(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["labels.npz", "label_scores.npz", "thumbnails.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00", b"text"])
def test_damaged_arrays_count_as_missing(tmp_path, name, content):
    """A copy that was cut: else all the rest of the report is lost with it."""
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.warns(UserWarning, match=f"{name} cannot be read and is left out"):
        run = read_run(folder)
    assert getattr(run, name.removesuffix(".npz")) == {}


def test_numbers_that_are_none_are_gaps(tmp_path):
    """A value edited by hand, or of another program: else the figure's axis ends the report in a stack trace."""
    folder = make_run(tmp_path / "run", lr=float("inf"))
    lines = (folder / "metrics.jsonl").read_text().replace('"test_acc_net1": 51.0', '"test_acc_net1": NaN')
    (folder / "metrics.jsonl").write_text(lines.replace('"auc_net1": 0.875', '"auc_net1": 1' + "0" * 400))
    run = read_run(folder)
    assert run.column("test_acc_net1") == [49.0, 50.0, None] and run.column("auc_net1") == [None] * 3
    assert run.args["lr"] is None
    about = json.loads((folder / "args.json").read_text())
    assert run.script == "Train_cifar.py"
    (folder / "args.json").write_text(json.dumps(about | {"command": 3}))
    assert read_run(folder).script == ""


def test_arrays_that_would_run_code_are_refused(tmp_path):
    """A run folder from somebody else is a pickle's way in: reading it must not be trusting it, nor advise to."""
    folder = make_run(tmp_path / "run")
    np.savez(folder / "label_scores.npz", index=np.array([{"a": 1}], dtype=object))
    with pytest.warns(UserWarning, match=r"label_scores\.npz cannot be read") as warned:
        assert read_run(folder).label_scores == {}
    (folder / "label_scores.npz").write_bytes(b"text")
    with pytest.warns(UserWarning, match=r"left out \(not an archive of plain arrays\)") as again:
        assert read_run(folder).label_scores == {}
    assert not any("trust" in str(each.message) or "allow_pickle" in str(each.message) for each in [*warned, *again])


def test_damaged_histograms_are_left_out_one_by_one(tmp_path):
    """Else one line that was cut takes the slider away."""
    folder = make_run(tmp_path / "run", epochs=4)
    lines = (folder / "histograms.jsonl").read_text().splitlines()
    (folder / "histograms.jsonl").write_text("\n".join([lines[0], '{"epoch": 2}', "[]", lines[2][:50]]))
    with pytest.warns(UserWarning, match=r"histograms\.jsonl: 2 of 4 lines are damaged, left out"):
        assert [entry["epoch"] for entry in read_run(folder).histograms] == [1, 2]


def test_the_result_is_that_of_a_finished_run(tmp_path):
    """Clothing1M's test accuracy stands in the result alone. Else its report has none."""
    folder = make_run(tmp_path / "run")
    records = [{"epoch": e, "val_acc": 60.0 + e} for e in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert (read_run(folder).measured, read_run(folder).best) == ("val_acc", None)
    (folder / "result.json").write_text(json.dumps({"test_acc": 74.76}))
    assert read_run(folder).best == 74.76
    (folder / "result.json").write_text("[" * 100_000)
    assert read_run(folder).result == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("args.json", text) for text in (b"[]", b"null", b"[" * 10**5, b'{"args": 3}', b'{"args": {}}', b"\xff")],
        *[("metrics.jsonl", text) for text in (b"[]\n", b"3\n", b"{}\n", b'{"epoch": 0, "test_acc": "x"}\n', b"{\n")],
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    """One bad folder among twenty ends the table of all in a stack trace that does not say which."""
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(DivideMixError, match=str(folder)) as error:
        read_run(folder)
    assert "\n" not in str(error.value)


def test_half_a_line_is_left_out(tmp_path):
    """Killed while it wrote a line, or watched while it does: a run has no report until it is started again."""
    folder = make_run(tmp_path / "run")
    whole = read_run(folder).records
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "test_')
    assert read_run(folder).records == whole
