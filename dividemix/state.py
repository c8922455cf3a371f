"""What a run goes on from: taken from its networks, optimizers and divisions, checked, and put back."""

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dividemix import DivideMixError, histograms, runtime
from dividemix.codivide import Division


def state_of(nets, optimizers, codivide) -> dict[str, Any]:
    """What the next epoch depends on, beside the flags."""
    return {
        "nets": [net.state_dict() for net in nets],
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "codivide": [part.state() for part in codivide],
    }


def restore(state: dict[str, Any], nets, optimizers, codivide, samples: int | None = None) -> None:
    """The inverse of `state_of`, in place; an empty state leaves everything as it is. samples: how many are divided,
    where these are the same in every epoch. Raises DivideMixError for a state of other networks or samples."""
    if not state:
        return
    load_weights(nets, state["nets"], "the last checkpoint")
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        runtime.load_optimizer(optimizer, saved)
    for part, saved in zip(codivide, state["codivide"], strict=True):
        part.load_state(saved)
        divided = [*part.history, *([part.division.loss] if part.division else [])]
        if samples and any(len(loss) != samples for loss in divided):
            raise DivideMixError(f"the last checkpoint does not divide the {samples} samples of the data")


def load_weights(nets, states, source: str) -> None:
    """Raises DivideMixError, naming `source`, for states that are not those of such networks."""
    if len(states) != len(nets):
        raise DivideMixError(f"{source} holds another number of networks: {len(states)}, not {len(nets)}")
    for net, state in zip(nets, states, strict=True):
        try:
            net.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise DivideMixError(f"{source} does not fit this network: another --arch, --width or data set?") from error


def still_in(divided: Tensor, index: NDArray) -> NDArray[np.bool_]:
    """Which of the samples that were divided are still trained on. Raises DivideMixError where one is new."""
    rows = np.isin(divided, index)
    if rows.sum() != len(index):
        raise DivideMixError("the last checkpoint does not divide all samples of the data")
    return rows


def check(state: dict[str, Any]) -> None:
    """Raises DivideMixError where a state that was read lacks what a run needs of it, or has it of another kind.

    Whether it fits this run's networks and data is seen where it is put back.
    """

    def expect(sound: bool, what: str) -> None:
        if not sound:
            raise DivideMixError(f"not the state of a run ({what})")

    records = state.get("records")
    expect(is_list(records, dict) and bool(records), "records")
    for epoch, record in enumerate(records):
        plain = all(isinstance(k, str) and isinstance(v, str | int | float | None) for k, v in record.items())
        expect(plain and is_count(record.get("epoch")) and record["epoch"] == epoch, f"record {epoch}")
        estimate = [record.get(name) for name in ("noise_rate_estimate", "concentration")]  # see `blind`
        expect(all(isinstance(value, float | None) for value in estimate), f"record {epoch}")
    nets = state.get("nets")
    expect(is_list(nets, dict) and len(nets) in (1, 2), "nets")  # one: of an ablation
    best = state.get("best_epochs", [state.get("best_epoch")] * 2)  # one for both: of earlier versions
    expect(is_list(best, int, len(nets)), "best epochs")
    expect(all(is_count(epoch) and epoch < len(records) for epoch in best), "best epochs")
    expect(is_list(state.get("histograms", []), dict), "histograms")
    expect(all(map(histograms.is_sound, state.get("histograms", []))), "histograms")
    for name in ("config", "pins"):
        expect(is_named(state.get(name)), name)
    for name in ("optimizers", "codivide"):
        expect(is_list(state.get(name), dict, len(nets)), name)
    for net, optimizer, part in zip(nets, state["optimizers"], state["codivide"], strict=True):
        expect(is_named(net) and all(isinstance(value, Tensor) for value in net.values()), "weights")
        momenta = optimizer.get("state")
        expect(isinstance(momenta, dict) and is_list(optimizer.get("param_groups"), dict, 1), "optimizer")
        expect(all(isinstance(momentum, dict) for momentum in momenta.values()), "momentum")
        history, division = part.get("history"), part.get("division")
        expect(isinstance(history, list) and all(is_array(loss, torch.float32) for loss in history), "losses")
        expect(len({len(loss) for loss in history}) <= 1, "losses")
        expect(division is None or is_division(division), "division")
    # The samples that were divided, where not all are: of each network (Clothing1M), or of both (WebVision)
    samples = state.get("samples", [state.get("index")] * len(nets))
    expect(isinstance(samples, list) and len(samples) == len(nets), "samples")
    for sample, part in zip(samples, state["codivide"], strict=True):
        expect(sample is None or is_array(sample, torch.int64), "samples")
        both = sample is not None and part["division"] is not None
        expect(not both or len(sample) == len(part["division"]["loss"]), "samples and division")


def is_division(state: Any) -> bool:
    """Whether `Division.from_state` makes a division of it."""
    if not isinstance(state, dict) or state.keys() != {field.name for field in dataclasses.fields(Division)}:
        return False
    of_sample = {"clean_probability": torch.float64, "labeled": torch.bool, "loss": torch.float32}
    of_mixture = ("means", "variances", "weights")
    return (
        all(is_array(state[name], kind) for name, kind in of_sample.items())
        and len({len(state[name]) for name in of_sample}) == 1
        and bool(state["labeled"].any())
        and all(is_array(state[name], torch.float64) and len(state[name]) == 2 for name in of_mixture)
        and isinstance(state["threshold"], float | int)
        and isinstance(state["auc"], float | None)
    )


def is_array(value: Any, kind: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.dtype == kind


def is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_list(value: Any, kind: type, length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(item, kind) for item in value)
        and (length is None or len(value) == length)
    )


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
