"""The replaced layers compute what nn.BatchNorm2d computes."""

import pytest
import torch
from helpers.nets import CPU, golden_weights, same, snapshot
from torch import nn

from dividemix.runtime.device import Runtime
from dividemix.runtime.layers import GroupedBatchNorm2d
from PreResNet import ResNet18, ResNet50

MERGING = Runtime(CPU, merge=True)


def plain_and_replaced(build=ResNet18) -> tuple[nn.Module, nn.Module]:
    """The same weights in a plain net and in one whose layers are replaced."""
    plain, replaced = (golden_weights(build(5, width=8), seed=0) for _ in range(2))
    return plain, MERGING.prepare(replaced)


def note_rows(net: nn.Module) -> list[int]:
    """From now on: the number of rows in each call of the net."""
    rows = []
    net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


@pytest.mark.parametrize("build", [ResNet18, ResNet50])
def test_four_batches_together_are_four_forwards_one_after_the_other(build):
    """Else guesses have the statistics of all four batches, or running statistics are updated in another order."""
    plain, replaced = plain_and_replaced(build)
    batches = [scale * torch.randn(6, 3, 16, 16) for scale in (1, 2, 3, 4)]
    rows = note_rows(replaced)
    plain.train()
    together = MERGING.forward(replaced.train(), *batches)
    assert rows == [24]
    for logits, batch in zip(together, batches, strict=True):
        torch.testing.assert_close(logits, plain(batch), rtol=1e-3, atol=1e-3)
    for (name, a), b in zip(plain.named_buffers(), replaced.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_eval_batches_together_change_nothing():
    """The peer is frozen: one forward over both views must leave its statistics, and give each view's own logits."""
    plain, replaced = plain_and_replaced()
    batches = [*torch.randn(2, 3, 3, 16, 16), torch.randn(1, 3, 16, 16)]
    before, rows = snapshot(replaced), note_rows(replaced)
    for logits, batch in zip(MERGING.forward(replaced.eval(), *batches), batches, strict=True):
        torch.testing.assert_close(logits, plain.eval()(batch), rtol=1e-4, atol=1e-5)
    assert rows == [7] and same(replaced.state_dict(), before)
    plain.load_state_dict(replaced.state_dict())  # a checkpoint loads into the network of a plain run, and back
    replaced.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("unequal", ["sizes", "layers"])
def test_what_cannot_be_merged_is_not(unequal):
    """Merged, batches of two sizes, or a layer that knows no groups, would mix the statistics of two views."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten())
    if unequal == "layers":
        net.append(nn.BatchNorm1d(4 * 16))
    sizes = [4, 3 if unequal == "sizes" else 4]
    rows = note_rows(MERGING.prepare(net).train())
    MERGING.forward(net, *(torch.randn(n, 3, 4, 4) for n in sizes))
    assert rows == sizes


def test_groups_end_with_the_call():
    """Left behind, they would cut the next training batch into four as well; also after an error."""
    _, net = plain_and_replaced()
    with pytest.raises(RuntimeError):
        MERGING.forward(net.train(), *torch.randn(2, 4, 5, 16, 16))  # five channels
    layers = [module for module in net.modules() if isinstance(module, GroupedBatchNorm2d)]
    assert len(layers) == 17 and {layer.groups for layer in layers} == {1}
