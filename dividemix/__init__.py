"""DivideMix (Li, Socher, Hoi, ICLR 2020): what the training scripts share, each thing in one module.

Reading order: `algorithm` (the equations), `codivide` (loss -> clean probability), `engine` (a step and a phase), then
`Train_cifar.py` (Algorithm 1). Around them: `noise`, `augment`, `data`, `recipes`, `options`, `runtime`, `run`,
`checkpoint`, `report`.
"""


class DivideMixError(Exception):
    """Something the user can mend: the message is one line that names the file, flag or value, and what to do."""
