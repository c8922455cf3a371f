"""One run, from its flags to its folder. `options` has the flags, `defaults` the values of those that were not given,
`splits` the choice of training images. `run` writes the run folder, with `logs`, `checkpoint`, `histograms`, `scoring`
and `label_quality` (of the labels) and `description` (of the model); `progress` is what it shows meanwhile; `folder`
reads it. `signals` is how a script ends."""

from dividemix.run import defaults, description, histograms, logs, options, splits
from dividemix.run.checkpoint import load_last, to_host
from dividemix.run.description import BACKBONE, Description, Preparation, commit, read_description, versions
from dividemix.run.folder import RunFolder, read_run
from dividemix.run.histograms import Histogram
from dividemix.run.options import Parser
from dividemix.run.run import FREE_FLAGS, Run
from dividemix.run.scoring import (
    borderline,
    doubtful,
    failures,
    net_arrays,
    quality_by_split,
    rank_by_split,
    thumbnail,
    worst_first,
)
from dividemix.run.signals import command_line
from dividemix.run.splits import Split
