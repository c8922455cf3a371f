"""A run folder read back: its two networks as one, and nothing that does not fit or is not sound."""

import os
import pickle
import runpy
import sys
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.data import Call
from helpers.errors import assert_refused
from helpers.trained import COLOUR, GREY, NAMES, draw_photos, lively, make_trained, nets_of

from dividemix import DivideMixWarning
from dividemix.data import device
from dividemix.deploy import ensemble as deploy
from dividemix.deploy.ensemble import load_ensemble, probabilities, to_images
from dividemix.run.description import Description, read_description


def refused(call, *arguments) -> str:
    return assert_refused(lambda: call(*arguments))


@pytest.mark.parametrize("preparation", [COLOUR, GREY], ids=["colour", "grey"])
def test_the_ensemble_is_what_the_test_counts(tmp_path, preparation):
    """Else the program is not the network whose accuracy the run reports."""
    names = [*NAMES[:-1], "\udcff"]
    run = make_trained(tmp_path / "run", preparation, names)
    side, channels, border = preparation.image_size, preparation.channels, preparation.border
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, channels), dtype=np.uint8)
    description = read_description(run)
    assert description == Description("preresnet18", 6, 4, names, preparation)
    framed = np.pad(np.repeat(pixels, 3 // channels, axis=3), ((0, 0), (border, border), (border, border), (0, 0)))
    x = device.to_float(torch.from_numpy(framed), torch.tensor(preparation.mean), torch.tensor(preparation.std))
    images = to_images(torch.from_numpy(pixels))
    assert torch.equal(deploy.Ensemble([torch.nn.Identity()], preparation)(images), x)
    first, second = nets_of(run)
    with torch.no_grad():
        expected = first(x) + second(x)
        torch.testing.assert_close(load_ensemble(run, description)(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(dim=0).min() > 0.01  # or any other image would do as well


def test_probabilities_are_those_of_the_mean_logits():
    """Else confidence doubles because there are two networks, or the likeliest class is not the ensemble's."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -500.0, 500.0], [1e4, 1e4, 0.0]])
    p = probabilities(2 * logits)  # two networks that agree
    torch.testing.assert_close(p, logits.double().softmax(dim=1))
    assert p.dtype == torch.float64 and p.argmax(dim=1).tolist() == logits.argmax(dim=1).tolist()


def test_networks_of_a_list_that_means_nothing_are_warned_of(tmp_path, monkeypatch):
    """Whoever predicts with them, or exports them, does not see the run's own warning."""
    run = make_trained(tmp_path / "run")
    monkeypatch.setattr(deploy, "read_run", lambda path: path)
    monkeypatch.setattr(deploy, "failures", lambda run: ["they guess"])
    with pytest.warns(DivideMixWarning, match="they guess"):
        load_ensemble(run, read_description(run))


def test_best_and_last_are_different_networks(tmp_path):
    """Else the last epoch's networks pass for the best, or loading changes a notebook's next seeded step."""
    run = make_trained(tmp_path / "run")
    for weights, epoch, seed in (("best", 1, 0), ("last", 2, 10)):
        state = torch.get_rng_state()
        ensemble = load_ensemble(run, read_description(run), weights)
        assert torch.equal(torch.get_rng_state(), state)
        assert ensemble.epochs == [epoch, epoch] and not ensemble.training
        for k, net in enumerate(ensemble.nets):
            expected = lively("preresnet18", 6, 4, seed + k).state_dict()
            assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    ensemble.epochs = [17, 17]
    assert deploy.epochs_used("best", ensemble) == "weights of the best epoch 17"
    ensemble.epochs, ensemble.averaged = [5, 7], True
    assert deploy.epochs_used("best", ensemble) == "averaged weights of the best epochs 5 and 7"  # as Clothing1M's


def test_a_malicious_checkpoint_is_not_run(tmp_path):
    """Else to try a stranger's run folder is to run the stranger's code."""
    run, marker = make_trained(tmp_path / "run"), tmp_path / "marker"
    torch.save({"nets": [Call(os.mkdir, str(marker))] * 2}, run / "best.pt")
    for content in ((run / "best.pt").read_bytes(), pickle.dumps(Call(os.mkdir, str(marker)), protocol=2)):
        (run / "best.pt").write_bytes(content)
        assert str(run / "best.pt") in refused(load_ensemble, run, read_description(run))
    assert not marker.exists()


@pytest.mark.parametrize(
    "change", [{}, {"width": 5}, {"num_class": 7}, {"arch": "resnet1001"}], ids=lambda change: str([*change])
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change):
    """Else half a network answers, at random, or the error is a traceback."""
    run = make_trained(tmp_path / "run", last=False)
    path, description = run / "best.pt", replace(read_description(run), **change)
    if change:
        assert change.get("arch", str(path)) in refused(load_ensemble, run, description)
        return
    content, state = path.read_bytes(), torch.load(path, weights_only=True)
    path.write_bytes(content[:-100])
    assert str(path) in refused(load_ensemble, run, description)
    torch.save(state | {"nets": state["nets"][:1]}, path)
    assert str(path) in refused(load_ensemble, run, description)
    path.unlink()
    assert str(path) in refused(load_ensemble, run, description)
    assert str(run) in refused(load_ensemble, run, description, "last")  # it has no checkpoint


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_ctrl_c_says_that_nothing_is_written(tmp_path, monkeypatch, capsys):
    """Else a user who stops `python -m dividemix predict` is told that the same command continues a training."""
    monkeypatch.setattr("dividemix.deploy.ensemble.load_ensemble", mock.Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `command_line` sets it
    photo = draw_photos(tmp_path / "photos", 1)[0]
    monkeypatch.setattr(sys, "argv", ["dividemix", "predict", str(make_trained(tmp_path / "run")), str(photo)])
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        runpy.run_module("dividemix", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().err) == (130, "\ninterrupted: nothing is written\n")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "photos"}
