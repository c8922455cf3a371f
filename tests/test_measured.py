"""What run folders say of progress and time."""

import json

import pytest
from make_run import make_run

from dividemix import measured
from dividemix.measured import DIVIDED, PLAIN


def write(folder, records, **args):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"command": ["Train_cifar.py", "--r", "0.5"], "args": args}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def epoch(e, seconds, phase="train"):
    return {"epoch": e, "phase": phase, "test_acc": 50.0 + e, "seconds_train1": seconds, "seconds_test": 1.0}


def test_a_folder_under_way_is_read_as_far_as_it_is(tmp_path):
    """The status would crash on the half line that is being written just now."""
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "test_')
    found = measured.read(folder)
    assert len(found.records) == 3 and found.best == 52.0 and not found.is_finished(3)
    (folder / "result.json").write_text('{"test_acc": 1}')
    assert measured.read(folder).is_finished(3) and not measured.read(folder).is_finished(4)
    assert found.script == "Train_cifar.py" and found.args["seed"] == 123


@pytest.mark.parametrize("content", ["", "[1, 2]", "null", '{"args": 3, "command": {}}', "\x00", '{"epoch": "a"}'])
def test_damaged_files_count_as_not_there(tmp_path, content):
    """One damaged folder of fifty would end the command."""
    for name in ("args.json", "metrics.jsonl", "result.json"):
        (tmp_path / name).write_text(content)
    found = measured.read(tmp_path)
    assert (found.records, found.args, found.script, found.best) == ([], {}, "", None)
    assert not measured.read(tmp_path / "nowhere").is_finished(0)


def test_seconds_of_an_epoch_by_kind_without_the_first(tmp_path):
    """Compilation, minutes on a card, would be counted 300 times; warm-up, a third of an epoch, as a whole one."""
    records = [epoch(0, 99, "warmup"), epoch(1, 2, "warmup"), epoch(2, 4, "warmup"), epoch(3, 50), epoch(4, 9)]
    found = measured.read(write(tmp_path / "run", records, warm_up=3, method="dividemix"))
    assert measured.epoch_seconds(found) == {PLAIN: 4.0, DIVIDED: 10.0}
    assert measured.time_left(found, 10) == 5 * 10.0
    begun = measured.read(write(tmp_path / "begun", records[:2], warm_up=3, method="dividemix"))
    assert measured.time_left(begun, 3) == 3.0 and measured.time_left(begun, 4) is None
    ce = measured.read(write(tmp_path / "ce", [epoch(0, 1, "ce")], warm_up=3, method="ce"))
    assert measured.time_left(ce, 5) == 4 * 2.0


def test_epochs_that_are_left():
    """A continued run would be announced with all its epochs."""
    assert measured.to_do(300, 10, 0) == {PLAIN: 10, DIVIDED: 290}
    assert measured.to_do(300, 10, 4) == {PLAIN: 6, DIVIDED: 290}
    assert measured.to_do(300, 10, 250) == {PLAIN: 0, DIVIDED: 50}
    assert measured.to_do(5, 10, 0) == {PLAIN: 5, DIVIDED: 0}
    assert measured.to_do(300, None, 1) == {PLAIN: 299, DIVIDED: 0}
    assert measured.to_do(3, 1, 7) == {PLAIN: 0, DIVIDED: 0}
