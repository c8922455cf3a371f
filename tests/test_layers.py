"""The exchanged layers compute what nn.BatchNorm2d and nn.Conv2d compute."""

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_weights
from hypothesis import given
from hypothesis import strategies as st

from dividemix import layers
from dividemix.layers import GroupedBatchNorm2d, MatrixConvolution, SmallMapConv2d
from dividemix.runtime import Runtime
from PreResNet import ResNet18, ResNet50

CPU = torch.device("cpu")


def pair(width: int = 8, build=ResNet18) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights in a plain net and in one whose layers are exchanged, in fp32."""
    plain = golden_weights(build(5, width=width), seed=0)
    exchanged = golden_weights(build(5, width=width), seed=0)
    return plain, Runtime(CPU, merge=True).prepare(exchanged)


# ---- Merged forwards ----


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


# ---- Convolutions as products of matrices ----


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 2]),
)
def test_matrix_convolution_and_its_gradients_are_those_of_conv2d(rows, channels, out, height, width, stride):
    """A wrong gradient trains, only worse."""
    torch.manual_seed(0)
    x = torch.randn(rows, channels, height, width, dtype=torch.double, requires_grad=True)
    weight = torch.randn(out, channels, 3, 3, dtype=torch.double, requires_grad=True)
    ours, theirs = MatrixConvolution.apply(x, weight, stride), F.conv2d(x, weight, None, stride, 1)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), direction) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_only_convolutions_that_it_computes_are_exchanged():
    """A bias or a dilation that is dropped without a word."""
    plain = {"kernel_size": 3, "padding": 1, "bias": False}
    assert SmallMapConv2d.replaces(torch.nn.Conv2d(4, 4, **plain))
    assert SmallMapConv2d.replaces(torch.nn.Conv2d(4, 4, stride=2, **plain))
    for changed in (
        {"kernel_size": 1}, {"kernel_size": 5}, {"padding": 0}, {"bias": True}, {"dilation": 2}, {"groups": 2},
        {"padding_mode": "reflect"}, {"stride": 3}, {"stride": (1, 2)}, {"padding": "same"},
    ):  # fmt: skip
        assert not SmallMapConv2d.replaces(torch.nn.Conv2d(4, 4, **{**plain, **changed})), changed
    assert not SmallMapConv2d.replaces(torch.nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False))


def test_small_maps_take_the_matrix_way_and_the_net_computes_the_same(monkeypatch):
    """The exchange must change speed alone: bf16 logits and gradients as with oneDNN's convolutions."""
    calls = []
    apply = MatrixConvolution.apply
    monkeypatch.setattr(layers.MatrixConvolution, "apply", lambda *a: calls.append(tuple(a[1].shape)) or apply(*a))
    torch.manual_seed(0)
    x, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 5, (16,))
    results = []
    for small_convs in (False, True):
        machine = Runtime(CPU, "bf16", small_convs=small_convs)
        net = machine.prepare(golden_weights(ResNet18(5, width=8), seed=0)).train()
        [logits] = machine.forward(net, x)
        F.cross_entropy(logits, labels).backward()
        results.append((logits.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])))
    assert calls == [(64, 32, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3)]  # the 4x4 maps of the last stage
    (logits, gradient), (fast_logits, fast_gradient) = results
    torch.testing.assert_close(fast_logits, logits, rtol=0.05, atol=0.05)
    assert F.cosine_similarity(gradient, fast_gradient, dim=0) > 0.97
    with torch.no_grad():  # in fp32 the net stays the reference
        calls.clear()
        net(x)
    assert calls == []
