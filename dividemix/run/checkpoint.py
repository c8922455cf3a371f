"""The checkpoints of a run.

A checkpoint is written under a new name, then the small last.json is pointed at it; the one before is kept. Whatever
moment the machine dies at, last.json names a file that is whole. Should it be damaged later, the one before is used.
"""

import copy
import json
import re
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dividemix import DivideMixError, files, warn

FORMAT = 1  # of a checkpoint's state


def save_last(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write `epoch-NNN.pt`, point last.json at it, and delete all but it and the one before."""
    pointer, path = folder / "last.json", folder / f"epoch-{epoch:03d}.pt"
    before = json.loads(files.read_file(pointer)) if pointer.exists() else None
    entry = {"file": path.name, "sha256": files.write_state(path, state), "epoch": epoch}
    was_damaged = before and before["epoch"] == epoch  # and so the run goes on from the one before it
    previous = before["previous"] if was_damaged else before and {name: before[name] for name in entry}
    files.write_atomically(pointer, json.dumps(entry | {"previous": previous}, indent=1).encode())
    kept = {path.name, previous and previous["file"]}
    for old in folder.glob("epoch-*.pt"):
        if re.fullmatch(r"epoch-\d+\.pt", old.name) and old.name not in kept:  # other names are the user's copies
            old.unlink()


def load_last(folder: Path) -> dict[str, Any]:
    """The state of the last checkpoint, {} where there is none yet. One that is not what was written, or of another
    version, is passed over with a warning. Raises DivideMixError where there are checkpoints but none that loads."""
    pointer, remedy = folder / "last.json", "--fresh moves the folder aside and starts anew"
    if not pointer.exists():
        # The first epoch's file alone: the machine died before last.json was there.
        if any(re.fullmatch(r"epoch-0*[1-9]\d*\.pt", path.name) for path in folder.glob("epoch-*.pt")):
            raise DivideMixError(f"{pointer} is missing: put it back, or {remedy}")
        return {}
    try:
        last = json.loads(files.read_file(pointer))
        entries = [(folder / entry["file"], entry["sha256"]) for entry in (last, last["previous"]) if entry]
    except Exception as error:
        raise DivideMixError(f"{pointer} is damaged: {remedy}") from error
    for path, sha256 in entries:
        try:
            state = files.load_file(path, sha256)
            if state.get("format") == FORMAT:
                return state
            warn(f"{path} is passed over: another version of the project wrote it")
        except DivideMixError as error:
            warn(f"{error}: it is passed over")
    raise DivideMixError(f"no checkpoint in {folder} can be read: {remedy}")


def to_host(value: Any, room: Any = None) -> Any:
    """A copy of `value` to be written while training goes on: its tensors in host memory, its lists and dicts its own.

    `room`: an earlier copy that nobody reads any more; its tensors are written anew where they fit. New memory of this
    size takes the system longer than the copying. For a CUDA card the memory is pinned, several times faster.
    """
    if isinstance(value, Tensor):
        kind = value.shape, value.dtype, value.stride()
        if room is None or (room.shape, room.dtype, room.stride()) != kind:
            room = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return room.copy_(value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with a state dict's metadata
        copied.update({key: to_host(item, (room or {}).get(key)) for key, item in value.items()})
        return copied
    if isinstance(value, list):
        return [to_host(item, earlier) for item, earlier in zip(value, chain(room or [], repeat(None)), strict=False)]
    return value
