"""Checkpoints: the last one that is sound is the one that a run goes on from."""

import copy
import io
import os
import shutil
import warnings

import pytest
import torch
from helpers.runs import assert_equal

from dividemix import DivideMixError
from dividemix.run import checkpoint
from dividemix.run.checkpoint import to_host


def save(folder, epoch, **more) -> None:
    state = {"epoch": epoch, "w": torch.full((64,), float(epoch)), "format": checkpoint.FORMAT}
    checkpoint.save_last(folder, epoch, state | more)


def load(folder) -> int:
    return checkpoint.load_last(folder)["epoch"]


def skipped(name: str):
    return pytest.warns(UserWarning, match=rf"{name}.* skipped")


@pytest.fixture
def folder(tmp_path):
    """Of two epochs."""
    for epoch in (0, 1):
        save(tmp_path, epoch)
    return tmp_path


def test_two_checkpoints_are_kept_and_copies_of_the_user(folder):
    """All would fill the disk; a user's copy is not ours to delete; no clock decides which is the last."""
    shutil.copy(folder / "epoch-001.pt", folder / "epoch-001-mine.pt")
    for epoch in (2, 3):
        save(folder, epoch)
    os.utime(folder / "epoch-003.pt", (1, 1))
    left = {"epoch-001-mine.pt", "epoch-002.pt", "epoch-003.pt", "last.json"}
    assert {file.name for file in folder.iterdir()} == left and load(folder) == 3


@pytest.mark.parametrize("damage", ["cut", "one bit", "gone", "another format"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(folder, damage):
    """Hours of training would end with an error, or go on from damaged weights, at once or when written again."""
    file = folder / "epoch-001.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "another format":
        save(folder, 1, format=checkpoint.FORMAT + 1)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "one bit" else content[:-1])
    with skipped(r"epoch-001\.pt"):
        assert load(folder) == 0
    save(folder, 1)
    file.unlink()
    with skipped(r"epoch-001\.pt"):
        assert load(folder) == 0


@pytest.mark.parametrize("name", ["epoch-001.pt", "epoch-100.pt"])
def test_a_lost_pointer_is_no_new_start(folder, name):
    """The run would begin again, and delete its checkpoints; but only epoch 0's is of a run that died before it."""
    (folder / "last.json").unlink()
    (folder / "epoch-001.pt").rename(folder / name)
    with pytest.raises(DivideMixError, match=r"last\.json is missing"):
        load(folder)
    (folder / name).unlink()
    assert checkpoint.load_last(folder) == {}


@pytest.mark.parametrize("content", ["", '{"file": "a"}', "pipe", "of damaged files"])
def test_what_cannot_be_read_is_one_line(folder, content):
    """Else a stack trace, a new start over what could still be saved, or, of a pipe, a job that waits for ever."""
    pointer = folder / "last.json"
    if content == "of damaged files":
        for file in folder.glob("epoch-*.pt"):
            file.write_bytes(b"")
    else:
        pointer.unlink()
        os.mkfifo(pointer) if content == "pipe" else pointer.write_text(content)
    with pytest.raises(DivideMixError, match="--fresh") as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


# ---- The copy that is written while training goes on ----


def written(state: dict) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def test_the_copy_is_the_state_and_shares_nothing_with_it():
    """Else the next epoch's first steps get into the checkpoint of this one: a run that goes on from it is another."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = {"nets": [net.state_dict()], "optimizers": [optimizer.state_dict()], "values": [None, 1.5, "text"]}
    copied, before = to_host(state), copy.deepcopy(state)
    assert written(copied) == written(state)  # memory layout and a state dict's metadata too
    for tensor in state["nets"][0].values():
        tensor.zero_()
    state["optimizers"][0]["param_groups"][0]["lr"] = 7.0
    state["values"].append(3)
    assert_equal(copied, before)


def test_a_copy_is_made_in_the_memory_of_the_one_before():
    """New memory for each epoch's copy costs more time than the copying; another shape must not be pressed into it."""
    first = to_host({"a": torch.ones(3, 4), "b": [torch.ones(2)], "c": torch.ones(4)})
    second = to_host({"a": torch.zeros(3, 4), "b": [torch.zeros(5), torch.zeros(2)], "c": torch.zeros(4).long()}, first)
    assert second["a"] is first["a"] and not second["a"].any()
    assert [len(tensor) for tensor in second["b"]] == [5, 2] and second["c"].dtype == torch.int64
    assert first["b"][0].all() and first["c"].all()
