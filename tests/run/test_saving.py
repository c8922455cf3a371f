"""Saving beside training: what is written is the state as it was, and nothing that fails is passed over."""

import copy
import errno
import hashlib
import io
import os
import threading
import tracemalloc

import pytest
import torch
from helpers.runs import assert_equal, begin, end_epoch, opened, read_records, validated

from dividemix import DivideMixError, files
from dividemix.run import checkpoint
from dividemix.run.checkpoint import to_host


def state_of_a_net() -> dict:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {"nets": [net.state_dict()], "optimizers": [optimizer.state_dict()], "divisions": [None, 1.5, "text"]}


def written(state: dict) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def test_the_copy_is_the_state_and_shares_nothing_with_it():
    """Else the next epoch's first steps get into the checkpoint of this one: a run that goes on from it is another."""
    state = state_of_a_net()
    copied = to_host(state)
    before = copy.deepcopy(state)
    assert written(copied) == written(state)  # memory layout and a state dict's metadata too
    for tensor in state["nets"][0].values():
        tensor.zero_()
    state["optimizers"][0]["param_groups"][0]["lr"] = 7.0
    state["divisions"].append(3)
    assert_equal(copied, before)


def test_a_copy_is_made_in_the_memory_of_the_one_before():
    """New memory for each epoch's copy costs more time than the copying; another shape must not be pressed into it."""
    first = to_host({"a": torch.ones(3, 4), "b": [torch.ones(2)], "c": torch.ones(4)})
    second = to_host({"a": torch.zeros(3, 4), "b": [torch.zeros(5), torch.zeros(2)], "c": torch.zeros(4).long()}, first)
    assert second["a"] is first["a"] and not second["a"].any()
    assert [len(tensor) for tensor in second["b"]] == [5, 2] and second["c"].dtype == torch.int64
    assert first["b"][0].all() and first["c"].all()


def test_a_state_is_written_without_a_copy_of_it_in_python_s_memory(tmp_path):
    """Such a copy is made under the GIL: the loss pass beside it launches nothing, and the card idles."""
    state = {"nets": [{str(i): torch.randn(50_000) for i in range(20)}]}  # 4 MB
    path = tmp_path / "epoch-000.pt"
    files.write_state(path, state)  # imports
    tracemalloc.start()
    try:
        sha256 = files.write_state(path, state)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_equal(files.load_file(path), state)
    assert path.read_bytes() == written(state)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' full disk")
def test_a_disk_that_fills_up_in_the_middle_of_a_state_is_an_error_of_the_system(tmp_path, monkeypatch):
    """torch's own error, or the end of the process, says nothing of room; and the old file must stay."""
    path = tmp_path / "best.pt"
    path.write_bytes(b"old")
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(files.tempfile, "mkstemp", lambda **_: (full, str(tmp_path / "temporary")))
    with pytest.raises(OSError) as error:
        files.write_state(path, {"w": torch.zeros(100_000)})
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"


def test_training_goes_on_while_an_epoch_is_written(tmp_path, monkeypatch):
    """Else the card idles at each epoch's end; or what is written is a mixture of two epochs; or the logs are ahead of
    the weights."""
    go, saved, folder = threading.Event(), checkpoint.save_last, tmp_path / "run"
    monkeypatch.setattr(checkpoint, "save_last", lambda *rest: go.wait(60) and saved(*rest))
    with opened(folder) as this:
        begin(this)
        for epoch in this.epochs(2):
            # The weights change in place, as by a step; in epoch 1 nothing of epoch 0 is written yet.
            assert checkpoint.load_last(folder) == {} and (folder / "metrics.jsonl").read_text() == ""
            if epoch == 1:
                go.set()
            end_epoch(this, validated(60.0, 60.0))
    states = [files.load_file(folder / f"epoch-00{epoch}.pt") for epoch in range(2)]
    assert [state["nets"][0]["w"].tolist() for state in states] == [[0, 1], [1, 1]]
    assert [len(state["records"]) for state in states] == [1, 2]
    assert [record["epoch"] for record in read_records(folder)] == [0, 1]


def test_what_could_not_be_written_is_said_at_the_next_epoch_s_end(tmp_path, monkeypatch):
    """Else a run goes on for days on a full disk, and nothing of it is kept."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_last", full)
    said = pytest.raises(DivideMixError, match=r"epoch 0 could not be written .*No space left")
    with said, opened(tmp_path / "run") as this:
        begin(this)
        for epoch in this.epochs(9):
            assert epoch < 2
            end_epoch(this, validated(60.0, 60.0))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
