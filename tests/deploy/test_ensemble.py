"""A run folder read back: its description, its two networks as one, and nothing that does not fit or is not sound."""

import json
import os
import pickle
import runpy
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.trained import COLOUR, GREY, NAMES, draw_photos, lively, make_trained, nets_of

from dividemix import DivideMixError
from dividemix.data import device
from dividemix.deploy import ensemble as deploy
from dividemix.deploy.ensemble import load_ensemble, probabilities, to_images
from dividemix.run.description import Description, read_description


def edit(run: Path, change) -> None:
    about = json.loads((run / "args.json").read_text())
    change(about)
    (run / "args.json").write_text(json.dumps(about))


def refused(call, *arguments) -> str:
    """One line that says what to do."""
    with pytest.raises(DivideMixError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    return message


# ---- The description ----


@pytest.mark.parametrize("preparation", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("classes", [NAMES, None, ["", "<b>", "a,b", '"', "\n", "\udcff"]])
def test_a_description_is_read_as_it_was_written(tmp_path, preparation, classes):
    """Else a run's predictions have other names, sizes or colours than its training had."""
    run = make_trained(tmp_path / "run", preparation, classes)
    assert read_description(run) == Description("preresnet18", 6, 4, classes, preparation)


def test_what_is_no_run_folder_is_said(tmp_path):
    """Else a mistyped folder, or a file instead of one, ends in a traceback."""
    assert f"{tmp_path} is not a run folder" in refused(read_description, tmp_path)
    (tmp_path / "a file").touch()
    refused(read_description, tmp_path / "a file")
    (tmp_path / "args.json").write_text('{"of": "another program"}')
    assert f"{tmp_path} is not a run folder" in refused(read_description, tmp_path)


@pytest.mark.parametrize(
    ("out", "said"),
    [("nowhere/a.csv", "nowhere"), ("folder.csv", "folder.csv"), ("a.png", ".csv"), ("a.CSV", ".csv")],
)
def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch, out, said):
    """Else it is noticed after an hour of work; or a photo is overwritten by a table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    assert said in refused(deploy.check_output, Path(out), ".csv")
    deploy.check_output(Path("a.csv"), ".csv")


# ---- The networks ----


@pytest.mark.parametrize("preparation", [COLOUR, GREY], ids=["colour", "grey"])
def test_the_ensemble_is_what_the_test_counts(tmp_path, preparation):
    """The images as training normalises them, to the bit, grey ones in three channels in their black border; and the
    sum of both networks' logits. Else the program is not the network whose accuracy the run reports."""
    run = make_trained(tmp_path / "run", preparation)
    side, channels, border = preparation.image_size, preparation.channels, preparation.border
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, channels), dtype=np.uint8)
    ensemble = load_ensemble(run, read_description(run))
    whole = np.pad(np.repeat(pixels, 3 // channels, axis=3), ((0, 0), (border, border), (border, border), (0, 0)))
    x = device.to_float(torch.from_numpy(whole), torch.tensor(preparation.mean), torch.tensor(preparation.std))
    images = to_images(torch.from_numpy(pixels))
    assert torch.equal(deploy.Ensemble([torch.nn.Identity()], preparation)(images), x)
    first, second = nets_of(run)
    with torch.no_grad():
        expected = first(x) + second(x)
        torch.testing.assert_close(ensemble(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(dim=0).min() > 0.01  # or any other image would do as well


def test_probabilities_are_those_of_the_mean_logits():
    """Else confidence doubles because there are two networks, or the likeliest class is not the ensemble's."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -500.0, 500.0], [1e4, 1e4, 0.0]])
    p = probabilities(2 * logits)  # two networks that agree
    torch.testing.assert_close(p, logits.double().softmax(dim=1))
    assert p.dtype == torch.float64 and p.argmax(dim=1).tolist() == logits.argmax(dim=1).tolist()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_best_and_last_are_different_networks(tmp_path):
    """Else --weights has no effect, and the last epoch's networks pass for the best."""
    run = make_trained(tmp_path / "run")
    description = read_description(run)
    best, last = (load_ensemble(run, description, weights) for weights in deploy.WEIGHTS)
    assert (best.epochs, last.epochs) == ([1, 1], [2, 2])
    for ensemble, seed in ((best, 0), (last, 10)):
        for k, net in enumerate(ensemble.nets):
            expected = lively("preresnet18", 6, 4, seed + k).state_dict()
            assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
        assert not ensemble.training


@pytest.mark.parametrize(
    ("epochs", "expected"), [([17, 17], "best epoch 17"), ([5, 7], "best epochs 5 and 7"), ([3], "best epoch 3")]
)
def test_which_epochs_are_used_is_said(epochs, expected):
    """Else nobody sees that the networks are of an early epoch, or of two, as Clothing1M's are."""
    assert deploy.epochs_used("best", epochs) == f"weights of the {expected}"


def test_loading_draws_nothing_from_the_global_stream(tmp_path):
    """Else a notebook that loads a run between two seeded steps changes the second one."""
    run = make_trained(tmp_path / "run")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_ensemble(run, read_description(run))
    assert torch.equal(torch.rand(3), expected)


def test_missing_weights_are_said(tmp_path):
    """Else a run that was stopped in its first epoch ends in a traceback."""
    run = make_trained(tmp_path / "run", last=False)
    (run / "best.pt").unlink()
    description = read_description(run)
    assert "--weights last" in refused(load_ensemble, run, description)
    assert "not one epoch is finished" in refused(load_ensemble, run, description, "last")


class Payload:
    """Pickled, it makes a file when it is read by Python's own unpickler."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_checkpoint_is_not_run(tmp_path):
    """Else to try a stranger's run folder is to run the stranger's code."""
    run = make_trained(tmp_path / "run")
    torch.save({"nets": [Payload(tmp_path / "owned")] * 2}, run / "best.pt")
    message = refused(load_ensemble, run, read_description(run))
    assert str(run / "best.pt") in message and not (tmp_path / "owned").exists()
    (run / "best.pt").write_bytes(pickle.dumps(Payload(tmp_path / "owned"), protocol=2))
    refused(load_ensemble, run, read_description(run))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["truncated", "one net", "other width", "other classes"])
def test_weights_that_do_not_fit_are_refused(tmp_path, damage):
    """Else half a network answers, at random."""
    run = make_trained(tmp_path / "run")
    path, description = run / "best.pt", read_description(run)
    state = torch.load(path, weights_only=True)
    if damage == "one net":
        state["nets"] = state["nets"][:1]
    elif damage == "other width":
        description = replace(description, width=5)
    elif damage == "other classes":
        description = replace(description, num_class=7)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[: -100 if damage == "truncated" else None])
    assert str(path) in refused(load_ensemble, run, description)


def test_an_unknown_network_is_said(tmp_path):
    """Else a run of a later version ends in a KeyError."""
    run = make_trained(tmp_path / "run")
    edit(run, lambda about: about["model"].update(arch="resnet1001"))
    message = refused(load_ensemble, run, read_description(run))
    assert "resnet1001" in message


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", ["predict", "export"])
def test_ctrl_c_says_that_nothing_is_written(tmp_path, module, monkeypatch, capsys):
    """Else a user who stops it is told that the same command continues a training."""
    monkeypatch.setattr(f"dividemix.deploy.{module}.load_ensemble", mock.Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `command_line` sets it
    last = draw_photos(tmp_path / "photos", 1)[0] if module == "predict" else tmp_path / "model.pt2"
    monkeypatch.setattr(sys, "argv", ["dividemix", module, str(make_trained(tmp_path / "run")), str(last)])
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        runpy.run_module("dividemix", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().err) == (130, "\ninterrupted: nothing is written\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "photos"}
