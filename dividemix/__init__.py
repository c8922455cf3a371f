"""DivideMix (Li, Socher, Hoi, ICLR 2020): what the training scripts share, each thing in one module.

Reading order: `algorithm` (the equations), `codivide` (loss -> clean probability), `engine` (a step and a phase), then
`Train_cifar.py` (Algorithm 1). Around them: `noise` (`noise_instance`, `noise_human`, `noise_file`),
`data`, `filelist`, `check_data`, `networks`, `recipes`, `blind`, `defaults`, `options`,
`signals`, `run`, `logs`, `checkpoint`; after training `scoring`, `label_issues`,
`clean_labels`, `report` (with `runfolder`, `histograms`, `figures`, `page`, `compare`); for
large images `stream` (the data sets), `workers`, `images`, `imagestore`; for speed `runtime`, `graph`, `layers`; and
for a trained run `deploy`, `predict`, `export`. For the paper's tables (reproduce.py): `rows`, `jobs`, `results`.
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
