"""What args.json says of a trained model, for `deploy`, and of where a run came from."""

import re
import subprocess

import pytest
import torch
from helpers.trained import GREY, NAMES, make_trained

from dividemix import DivideMixError
from dividemix.run import description


def test_a_model_is_read_as_it_was_described(tmp_path):
    """Else another network is built for the weights, or images are prepared for other ones."""
    run = make_trained(tmp_path / "run", GREY)
    read = description.read_description(run)
    assert (read.arch, read.num_class, read.width, read.classes) == ("preresnet18", 6, 4, NAMES)
    assert read.preparation == GREY and str(read) == "two preresnet18, width 4, 6 classes, grey images of 14x14"
    with pytest.raises(DivideMixError, match="not a run folder"):
        description.read_description(tmp_path)


def test_where_a_number_comes_from(monkeypatch):
    """Else nobody can tell which code a result is of; outside a git checkout there is no commit, and no error."""
    assert description.versions()["torch"] == torch.__version__ and "scikit-learn" in description.versions()
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", description.commit() or "0" * 40)

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert description.commit() is None
