"""One process at a time in a run folder, and a folder out of the way of the next."""

import datetime
import fcntl
import os
from pathlib import Path
from typing import TextIO

from dividemix import DivideMixError, warn


def lock(folder: Path) -> TextIO:
    """The folder's lock file, held until it is closed. Raises DivideMixError where another process holds it."""
    path = folder / ".lock"
    # Unlike open(path, "w"), this empties no file that a link in a folder of unknown origin leads to.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when the last that has it open dies
    except BlockingIOError as error:
        file.close()
        raise DivideMixError(
            f"another process is training in {folder}: wait for it, or give this run another --id"
        ) from error
    except OSError as error:  # some network file systems
        warn(f"{folder} cannot be locked ({error.strerror}): see to it that no other process trains in it")
    if not (path.exists() and os.path.samefile(file.fileno(), path)):  # opened, and locked too late
        file.close()
        raise DivideMixError(f"another process has just moved {folder} aside: give the same command again")
    # Worker processes must not hold it on when this one was killed: they notice only after some seconds.
    os.register_at_fork(after_in_child=file.close)
    return file


def set_aside(folder: Path) -> Path:
    """Rename a folder to <name>.<time>, never deleting anything. -> its new name. Raises DivideMixError for a path
    that ends in no name."""
    if folder.name in ("", ".."):
        raise DivideMixError(f"--fresh cannot move {folder} aside: give --run_dir with the folder's name")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    aside, k = folder.with_name(f"{folder.name}.{stamp}"), 1
    while aside.exists():
        aside, k = folder.with_name(f"{folder.name}.{stamp}-{k}"), k + 1
    folder.rename(aside)
    return aside
