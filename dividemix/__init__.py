"""DivideMix (Li, Socher, Hoi, ICLR 2020): what the training scripts share.

Reading order: `algorithm` (the equations), `codivide` (loss -> clean probability), `engine` (a step and a phase), then
`Train_cifar.py` (Algorithm 1). Beside them are `recipes` and `blind` (the paper's settings, or those chosen from the
data), `networks`, `seeds` and `files`. Around them one folder each: `noise`, `data`, `runtime`, `run`; after training
`report` and `deploy`; for the paper's tables `reproduction`. Imports go one way: scripts -> run, report, deploy ->
data -> engine -> algorithm, codivide, runtime.
"""

import warnings


class DivideMixError(Exception):
    """Something the user can mend: the message is one line that names the file, flag or value, and what to do."""


class Diverged(DivideMixError):
    """Losses, gradients or weights that nothing can be learnt from; `Run.phase` adds the epoch."""


class DivideMixWarning(UserWarning):
    """Training goes on, but not quite as the user may think. Shown each time, not once."""


def warn(message: str) -> None:
    warnings.warn(message, DivideMixWarning, stacklevel=2)
