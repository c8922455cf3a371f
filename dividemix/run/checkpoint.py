"""The checkpoints of a run.

A checkpoint is written to a file of its own, then the small last.json is set to name it; the previous checkpoint stays.
So last.json names a complete file at every moment. If that is damaged later, the previous one is used.
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

FORMAT = 2  # version number of a checkpoint's content


def save_last(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write `epoch-NNN.pt`, set last.json to name it, and delete all checkpoints but this and the previous one."""
    pointer, path = folder / "last.json", folder / f"epoch-{epoch:03d}.pt"
    before = json.loads(files.read_file(pointer)) if pointer.exists() else None
    entry = {"file": path.name, "sha256": files.write_state(path, state), "epoch": epoch}
    was_damaged = before and before["epoch"] == epoch  # the run went on from the one before, and wrote it again
    previous = before["previous"] if was_damaged else before and {name: before[name] for name in entry}
    files.write_atomically(pointer, json.dumps(entry | {"previous": previous}, indent=1).encode())
    keep = {path.name, previous and previous["file"]}
    for old in folder.glob("epoch-*.pt"):
        if re.fullmatch(r"epoch-\d+\.pt", old.name) and old.name not in keep:  # other names are copies by the user
            old.unlink()


def load_last(folder: Path) -> dict[str, Any]:
    """The state of the last checkpoint, {} if there is none yet. A damaged one, or one of another version, is skipped
    with a warning. Raises DivideMixError if there are checkpoints but none can be read."""
    pointer, remedy = folder / "last.json", "--fresh renames the folder and starts a new run"
    if not pointer.exists():
        # The file of epoch 0 alone is no error: the process ended before it wrote last.json.
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
            warn(f"{path} is skipped: another version of this project wrote it")
        except DivideMixError as error:
            warn(f"{error}: it is skipped")
    raise DivideMixError(f"no checkpoint in {folder} can be read: {remedy}")


def to_host(value: Any, buffer: Any = None) -> Any:
    """A deep copy of a state, with its tensors in host memory: it can be written while training goes on.

    `buffer`: an earlier copy that is no longer needed. Tensors of equal shape are copied into its memory, since new
    memory of this size takes longer than the copy. From a CUDA card into pinned memory, which is several times faster.
    """
    if isinstance(value, Tensor):
        layout = value.shape, value.dtype, value.stride()
        if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != layout:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffer.copy_(value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the metadata of a state dict
        copied.update({key: to_host(item, (buffer or {}).get(key)) for key, item in value.items()})
        return copied
    if isinstance(value, list):
        return [to_host(item, earlier) for item, earlier in zip(value, chain(buffer or [], repeat(None)), strict=False)]
    return value
