"""One run, from its flags to its folder. `options` has the flags, `defaults` chooses those that own images tell, `run`
is the open run folder, with its `logs`, `checkpoint`, `histograms` and the `scoring` of the labels; `splits` says which
images it trains on, `description` what was trained, and `folder` reads a run folder again. `signals` and `provenance`
serve them."""

from dividemix.run import defaults, description, histograms, logs, options, splits
from dividemix.run.checkpoint import load_last, to_host
from dividemix.run.description import Description, Preparation, describe, read_description
from dividemix.run.folder import RunFolder, read_run
from dividemix.run.histograms import Histogram
from dividemix.run.options import Parser, command_line
from dividemix.run.provenance import commit, versions
from dividemix.run.run import FREE_FLAGS, Run
from dividemix.run.scoring import label_quality, of_nets
from dividemix.run.splits import Split

__all__ = [
    "FREE_FLAGS",
    "Description",
    "Histogram",
    "Parser",
    "Preparation",
    "Run",
    "RunFolder",
    "Split",
    "command_line",
    "commit",
    "defaults",
    "describe",
    "description",
    "histograms",
    "label_quality",
    "load_last",
    "logs",
    "of_nets",
    "options",
    "read_description",
    "read_run",
    "splits",
    "to_host",
    "versions",
]
