"""Reading run folders: whole, unfinished and damaged ones."""

import numpy as np
import pytest
from helpers.run_folder import CLASSES, WRONG, make_run

from dividemix import DivideMixError
from dividemix.run.folder import read_run


def test_a_whole_run_folder(tmp_path):
    """Else the report shows another run's numbers, or none."""
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "test_')  # which is being written, or was when the run was killed
    run = read_run(folder)
    assert run.name == "run" and run.class_names == CLASSES and run.divides and run.script == "Train_cifar.py"
    assert run.column("test_acc") == [50.0, 51.0, 52.0] and run.best == 52.0
    assert run.column("auc_net1") == [None, 0.875, 0.875] and run.column("nothing") == [None] * 3
    assert run.numbers("auc_net1") == [0.875] * 2 and [*run.nets] == [1, 2]
    assert [entry["epoch"] for entry in run.histograms] == [1, 2]
    assert (run.labels["given"] != run.labels["true"]).tolist() == WRONG.tolist()
    assert len(run.label_scores["index"]) == 12 and run.result == {}
    ablated = read_run(make_run(tmp_path / "ablated", truth=False, method="ce", ablation="no_cotraining"))
    assert "true" not in ablated.labels and not ablated.divides and [*ablated.nets] == [1]


def test_what_is_no_run_folder_is_named(tmp_path):
    """Else a mistyped path ends in a stack trace, or in a report of nothing."""
    (tmp_path / "file").touch()
    for name, content in (("another", '{"args": {}}'), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(content)
    for name in ("missing", "file", "another", "list"):
        with pytest.raises(DivideMixError, match=f"{name} is not a run folder"):
            read_run(tmp_path / name)
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"epoch": 0')
    with pytest.raises(DivideMixError, match="run has no finished epoch"):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("args.json", b"{"), ("metrics.jsonl", b"{\n"), ("thumbnails.npz", b"PK\x03\x04 cut"), ("label_scores.npz", None)],
)
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    """One file among twenty runs ends their table in a stack trace, or a stranger's folder runs code."""
    folder = make_run(tmp_path / "run")
    if content:
        (folder / name).write_bytes(content)
    else:
        np.savez(folder / name, index=np.array([{"a": 1}], dtype=object))  # a pickle
    with pytest.raises(DivideMixError, match=r"cannot be read .*: delete it") as error:
        read_run(folder)
    message = str(error.value)
    assert str(folder / name) in message and "\n" not in message and "pickle" not in message
