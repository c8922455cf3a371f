"""The state of a run is looked at before anything goes on from it."""

import pytest
import torch
from conftest import end_of, tiny
from test_fuzz import tiny_state

import Train_cifar
from dividemix import DivideMixError, checkpoint
from dividemix.codivide import CoDivide
from dividemix.run import Run
from dividemix.runtime import Runtime
from dividemix.state import check, restore, still_in

NAN = float("nan")


def changed(*path, to=None, state: dict | None = None) -> dict:
    """A sound state with one value changed; a `to` that is a function gets what was there."""
    whole = at = state or tiny_state()
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to(at[path[-1]]) if callable(to) else to
    return whole


def without(*path) -> dict:
    state = at = tiny_state()
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return state


UNSOUND = {
    **{f"no {name}": lambda name=name: without(name) for name in ("records", "config", "pins", "nets", "codivide")},
    "no epochs": lambda: changed("records", to=[]),
    "a record that is a number": lambda: changed("records", 0, to=3),
    "a record of another epoch": lambda: changed("records", 0, "epoch", to=7),
    "a record with a tensor": lambda: changed("records", 0, "test_acc", to=torch.zeros(3)),
    "an estimate that is a text": lambda: changed("records", 0, "concentration", to="0.5"),
    "best epochs past the end": lambda: changed("best_epochs", to=[0, 1]),
    "best epochs as texts": lambda: changed("best_epochs", to=["0", "0"]),
    "three best epochs": lambda: changed("best_epochs", to=[0, 0, 0]),
    "a config that is a list": lambda: changed("config", to=["r"]),
    "pins that are a number": lambda: changed("pins", to=1),
    "one network": lambda: changed("nets", to=lambda nets: nets[:1]),
    "weights that are numbers": lambda: changed("nets", 0, "weight", to=1.0),
    "an optimizer without groups": lambda: without("optimizers", 0, "param_groups"),
    "momentum that is a number": lambda: changed("optimizers", 1, "state", 0, to=1.0),
    "history in float64": lambda: changed("codivide", 0, "history", to=[torch.zeros(5, dtype=torch.float64)]),
    "history of two lengths": lambda: changed("codivide", 0, "history", to=[torch.zeros(5), torch.zeros(4)]),
    "half a division": lambda: without("codivide", 0, "division", "loss"),
    "a short division": lambda: changed("codivide", 0, "division", "loss", to=lambda loss: loss[:3]),
    "a division with no labeled sample": lambda: changed("codivide", 0, "division", "labeled", to=torch.zeros_like),
    "a mixture of three": lambda: changed("codivide", 1, "division", "means", to=torch.zeros(3, dtype=torch.float64)),
    "a threshold that is a text": lambda: changed("codivide", 1, "division", "threshold", to="0.5"),
    "samples that are no list": lambda: tiny_state() | {"samples": 3},
    "a sample too few": lambda: tiny_state() | {"samples": [torch.arange(4), None]},
    "histograms that are a number": lambda: tiny_state() | {"histograms": 3},
    "a histogram of nothing": lambda: tiny_state() | {"histograms": [{"epoch": 0, "net1": {"all": []}}]},
    "an index of floats": lambda: tiny_state() | {"index": torch.zeros(5)},
}


@pytest.mark.parametrize("make", UNSOUND.values(), ids=UNSOUND.keys())
def test_a_state_that_is_not_one_is_passed_over(make, tmp_path):
    """Its file is whole and its sum is right: a run goes on from half a state, or dies of a traceback for good."""
    checkpoint.save_last(tmp_path, 0, tiny_state())
    checkpoint.save_last(tmp_path, 1, make())
    with pytest.warns(UserWarning, match=r"epoch-001.pt is passed over: not the state of a run"):
        state = checkpoint.load_last(tmp_path, check)
    assert state["records"] == tiny_state()["records"]
    checkpoint.save_last(tmp_path, 2, make())  # and none is left
    (tmp_path / "epoch-001.pt").unlink()
    with pytest.warns(UserWarning), pytest.raises(DivideMixError, match=r"no checkpoint in .* can be read: --fresh"):
        checkpoint.load_last(tmp_path, check)


def test_states_of_all_scripts_pass():
    """Clothing1M's samples, WebVision's index, one best epoch of an earlier version, a run still in warm-up."""
    check(tiny_state())
    check(tiny_state() | {"samples": [torch.arange(5), None]})
    check(tiny_state() | {"index": torch.arange(5)})
    earlier = tiny_state() | {"best_epoch": 0}
    del earlier["best_epochs"]
    check(earlier)
    check(changed("codivide", 0, to={"history": [], "division": None}))


@pytest.mark.parametrize(
    "record", [{"epoch": 0, "phase": "warmup"}, {"epoch": 0, "test_acc": "90"}, {"epoch": 0, "test_acc": NAN}]
)
def test_records_that_the_logs_cannot_show_are_passed_over(tmp_path, record):
    """Another script's run in this folder: the logs would fail after the next epoch has been trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint.save_last(folder, 0, changed("records", to=[record]))
    with (
        pytest.warns(UserWarning, match=r"record 0 is not one of this script"),
        pytest.raises(DivideMixError, match="--fresh"),
    ):
        Run(folder, {})
    (folder / "epoch-000.pt").unlink()
    (folder / "last.json").unlink()
    with Run(folder, {}) as run:  # the refused one does not hold the lock
        assert run.records == []


def parts():
    nets = [torch.nn.Linear(2, 2) for _ in range(2)]
    optimizers = [Runtime(torch.device("cpu")).optimizer(net, 0.1, 0.0) for net in nets]
    return nets, optimizers, [CoDivide(0.5, 2) for _ in nets]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (lambda: changed("nets", 0, "weight", to=torch.zeros(3, 2)), "does not fit this network"),
        (lambda: changed("optimizers", 0, "state", 0, "momentum_buffer", to=torch.zeros(1)), "optimizer"),
        (lambda: changed("optimizers", 0, "state", to={}), "optimizer"),
        (lambda: changed("optimizers", 0, "param_groups", 0, "params", to=[0]), "optimizer"),
        (lambda: changed("optimizers", 0, "param_groups", 0, "lr", to="fast"), "optimizer"),
    ],
)
def test_a_state_of_another_network_is_refused(state, said):
    """Momentum of one number is spread over a whole layer without a word."""
    with pytest.raises(DivideMixError, match=said):
        restore(state(), *parts())


def test_a_state_of_other_samples_is_refused():
    """A division of 5 samples for 6: the last is never trained on."""
    restore(tiny_state(), *parts(), samples=5)
    with pytest.raises(DivideMixError, match="does not divide the 6 samples"):
        restore(tiny_state(), *parts(), samples=6)
    assert still_in(torch.tensor([1, 2, 5]), [1, 5]).tolist() == [True, False, True]
    with pytest.raises(DivideMixError, match="does not divide all samples"):
        still_in(torch.tensor([1, 2, 5]), [1, 3])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_anywhere_is_one_line(tmp_path, monkeypatch, capsys, error):
    """Memory ends where nobody thought of it: a traceback tells a user that the program is broken."""

    def full(*_, **__):
        raise error

    monkeypatch.setattr(Train_cifar, "prepare_data", full)
    assert end_of(Train_cifar, tiny(tmp_path), monkeypatch) == 1
    err = capsys.readouterr().err
    assert "error: not enough memory" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
