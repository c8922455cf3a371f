"""The exchanged layers compute what nn.BatchNorm2d computes."""

import pytest
import torch
from helpers.nets import golden_weights

from dividemix.runtime.device import Runtime
from dividemix.runtime.layers import GroupedBatchNorm2d
from PreResNet import ResNet18, ResNet50

CPU = torch.device("cpu")


def pair(width: int = 8, build=ResNet18) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights in a plain net and in one whose layers are exchanged, in fp32."""
    plain = golden_weights(build(5, width=width), seed=0)
    exchanged = golden_weights(build(5, width=width), seed=0)
    return plain, Runtime(CPU, merge=True).prepare(exchanged)


@pytest.mark.parametrize("build", [ResNet18, ResNet50])
def test_four_batches_together_are_four_forwards_one_after_the_other(build):
    """Statistics over all four batches, or running statistics updated in another order or only once: the labels that
    are guessed and the networks that are evaluated would be another method's."""
    plain, exchanged = pair(build=build)
    machine = Runtime(CPU, merge=True)
    torch.manual_seed(0)
    batches = [scale * torch.randn(6, 3, 16, 16) for scale in (1, 2, 3, 4)]
    calls = []
    exchanged.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    plain.train()
    together = machine.forward(exchanged.train(), *batches)
    assert calls == [24]
    for logits, batch in zip(together, batches, strict=True):
        torch.testing.assert_close(logits, plain(batch), rtol=1e-3, atol=1e-3)
    for (name, a), b in zip(plain.named_buffers(), exchanged.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert plain.bn1.num_batches_tracked == exchanged.bn1.num_batches_tracked == 4
    swapped = pair(build=build)[1].train()
    machine.forward(swapped, *batches[::-1])  # the order of the updates shows, so the test above sees it
    assert not torch.allclose(swapped.bn1.running_mean, exchanged.bn1.running_mean, rtol=1e-2, atol=1e-3)


def test_eval_batches_together_change_nothing():
    """The peer is frozen: one forward over both views must leave its statistics, and give each view's own logits."""
    plain, exchanged = pair()
    batches = list(torch.randn(2, 3, 3, 16, 16)) + [torch.randn(1, 3, 16, 16)]
    before = {name: value.clone() for name, value in exchanged.state_dict().items()}
    together = Runtime(CPU, merge=True).forward(exchanged.eval(), *batches)
    for logits, batch in zip(together, batches, strict=True):
        torch.testing.assert_close(logits, plain.eval()(batch), rtol=1e-4, atol=1e-5)
    for name, value in exchanged.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("unequal", ["sizes", "layers"])
def test_what_cannot_be_merged_is_not(unequal):
    """The batch at an epoch's end has fewer rows, and a fork's BatchNorm1d knows no groups: merged, both would mix the
    statistics of different views."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    if unequal == "layers":
        net.append(torch.nn.BatchNorm1d(4 * 16))
    machine = Runtime(CPU, merge=True)
    machine.prepare(net).train()
    calls = []
    net.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    machine.forward(net, torch.randn(4, 3, 4, 4), torch.randn(3 if unequal == "sizes" else 4, 3, 4, 4))
    assert calls == [4, 3 if unequal == "sizes" else 4]


def test_groups_end_with_the_call():
    """Left behind, they would cut the next training batch into four as well; also after an error."""
    _, net = pair()
    machine = Runtime(CPU, merge=True)
    with pytest.raises(RuntimeError):
        machine.forward(net.train(), *torch.randn(2, 4, 5, 16, 16))  # five channels
    assert {module.groups for module in net.modules() if isinstance(module, GroupedBatchNorm2d)} == {1}


def test_exchanged_layers_keep_keys_and_load_anywhere():
    """A checkpoint of the fast run must load into the plain network, and the other way round."""
    plain, exchanged = pair()
    assert list(plain.state_dict()) == list(exchanged.state_dict())
    plain.load_state_dict(exchanged.state_dict())
    exchanged.load_state_dict(plain.state_dict())
    assert sum(isinstance(module, GroupedBatchNorm2d) for module in exchanged.modules()) == 17
