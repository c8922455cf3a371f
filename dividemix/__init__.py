"""DivideMix (Li, Socher, Hoi, ICLR 2020): what the training scripts have in common.

Reading order: `algorithm` (the equations), `codivide` (loss -> clean probability), `engine` (a step and a phase), then
`Train_cifar.py` (Algorithm 1). Beside them are `recipes` and `blind` (the paper's settings, or those chosen from the
data), `networks`, `seeds` and `files`. Around them one folder each: `noise`, `data`, `runtime`, `run`; after training
`report` and `deploy`; for the paper's tables `reproduction`. Imports go one way: scripts and `api` -> run, report,
deploy -> data -> engine -> algorithm, codivide, runtime.

For users: `find_label_issues`, `load` (both in `api`), and the command `dividemix`.
"""

import warnings
from typing import Any


class DivideMixError(Exception):
    """An error that the user can correct. Its message is one line: the file, flag or value, and what to do."""


class Diverged(DivideMixError):
    """Losses, gradients or weights are not finite; `Run.phase` adds the epoch to the message."""


class DivideMixWarning(UserWarning):
    """Training continues, but not quite as the user may expect. Shown every time."""


def warn(message: str) -> None:
    warnings.warn(message, DivideMixWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name not in ("find_label_issues", "load"):
        raise AttributeError(f"module 'dividemix' has no attribute {name!r}")
    from dividemix import api  # slow to import: torch, pandas

    return getattr(api, name)
