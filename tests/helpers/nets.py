"""Networks with known weights, divisions, and what is compared of them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dividemix import engine
from dividemix.codivide import Division
from dividemix.data.device import DeviceImages
from dividemix.engine import MixMatch
from dividemix.runtime.device import Runtime
from helpers.data import colour_digits
from PreResNet import ResNet18

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = MixMatch(num_class=3, batch_size=4, lambda_u=8.0, warm_up=1)

# ---- The ablations of the paper's Table 5 ----

# What each switches off, typed from docs/reproduce.md and not from recipes.py: number of networks, refinement, views
ABLATED = {
    "none": (2, True, 2),
    "no_cotraining": (1, True, 2),
    "no_refinement": (2, False, 2),
    "one_view": (2, True, 1),
    "divide_mixmatch": (1, False, 2),
}
ALONE = ("no_cotraining", "divide_mixmatch")  # those with one network
# The numbers of the paper's Table 5 that have a source (CIFAR-10, best; sym 20, 50, 80, 90 %, asym 40 %)
TABLE5 = dict.fromkeys(("no_cotraining", "no_refinement", "one_view"), (None,) * 5)
TABLE5["divide_mixmatch"] = (94.1, None, None, None, 86.5)


# ---- Networks ----


def golden_weights(net: nn.Module, seed: int) -> nn.Module:
    """Fill a network by the rule of the golden files: numpy draws in the order of the sorted state-dict keys."""
    rs = np.random.RandomState(seed)
    state = net.state_dict()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue
        value = state[key]
        z = rs.standard_normal(value.numel()).reshape(value.shape)
        if key.endswith("running_var"):
            z = 1 + 0.1 * np.abs(z)
        elif value.ndim > 1:
            z = z * np.sqrt(2 / np.prod(value.shape[1:]))
        elif key.endswith("weight"):
            z = 1 + 0.1 * z
        else:
            z = 0.1 * z
        value.copy_(torch.from_numpy(z.astype(np.float32)))
    return net


def small_net(num_class: int = 3) -> nn.Module:
    """Two convolutions with BN and a classifier: for tests of steps, where a larger network would show nothing more."""
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 6, 3, stride=2, bias=False)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_class)]
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(6), nn.ReLU(), *pool)


class Linear(nn.Module):
    """Logits W x + b of flattened images in float64; notes its mode and input at each call."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.layer = nn.Linear(inputs, classes).double()
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled(), x.detach().clone()))
        return self.layer(x.flatten(1))


def digits_batch(n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = colour_digits(n)
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25, torch.from_numpy(labels)


def gradients(precision: str, device: torch.device = CPU, layout=torch.channels_last) -> dict[str, torch.Tensor | None]:
    """Of one step as `mixmatch_step` makes it: a forward without gradients, then the one that is trained on."""
    runtime = Runtime(device, precision, layout)
    net = runtime.prepare(golden_weights(ResNet18(10, 8), seed=0)).train()
    x, labels = (tensor.to(device) for tensor in digits_batch())
    with torch.no_grad():
        runtime.forward(net, x)
    F.cross_entropy(runtime.forward(net, x)[0], labels).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def golden_step(name: str, num_class: int, lr: float, weight_decay: float, runtime: Runtime | None = None, **kwargs):
    """Run the golden file's step. -> (file, net after it, its terms)."""
    golden, runtime = np.load(GOLDEN / f"step_{name}.npz"), runtime or Runtime()
    rs = np.random.RandomState(5)

    def draw(*shape):
        return torch.from_numpy(rs.standard_normal(shape).astype(np.float32))

    x1, x2 = draw(8, 3, 32, 32), draw(8, 3, 32, 32)
    labels = torch.from_numpy(rs.randint(0, num_class, 8))
    w = torch.from_numpy(rs.uniform(0.5, 1, 8).astype(np.float32))
    u1, u2 = draw(8, 3, 32, 32), draw(8, 3, 32, 32)
    net, peer = (runtime.prepare(golden_weights(ResNet18(num_class), seed)) for seed in (2, 3))
    beta = float(golden["beta"][0])
    optimizer = runtime.optimizer(net, lr, weight_decay)
    batch = [tensor.to(runtime.device) for tensor in (x1, x2, labels, w, u1, u2)]
    terms = engine.mixmatch_step(
        net, peer, optimizer, *batch, lam=torch.tensor(max(beta, 1 - beta), device=runtime.device),
        index=torch.from_numpy(golden["perm0"]).to(runtime.device), T=0.5, lambda_u=25 * 2 / 16, num_class=num_class,
        forward=runtime.forward, **kwargs,
    )  # fmt: skip
    return golden, net, terms


# ---- Data ----


def placed(runtime: Runtime, images: DeviceImages) -> DeviceImages:
    """The same data set on another runtime."""
    raw, labels = np.stack([*images.originals(np.arange(len(images)))]), images.labels.cpu().numpy().copy()
    return DeviceImages(raw, labels, images.mean.tolist(), images.std.tolist(), images.flip, runtime)


def half(n, labeled=None):
    """A division of n samples: `labeled` (default: the first half) with clean probability 0.9."""
    mask = np.zeros(n, bool)
    mask[: n // 2 if labeled is None else labeled] = True
    p = np.where(mask, 0.9, 0.1)
    return Division(p, mask, p.astype(np.float32), np.array([0.1, 0.9]), np.ones(2), np.ones(2) / 2, 0.5, None)


# ---- Comparing ----


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def same(state: dict, reference: dict) -> bool:
    return state.keys() == reference.keys() and all(torch.equal(state[key], reference[key]) for key in state)


def reference_logits(net, paths, resize: int, crop: int, mean: tuple, std: tuple) -> torch.Tensor:
    """A network's answers to image files as torchvision would prepare them: by other code than the project's."""
    from torchvision import transforms as T

    prepare = T.Compose([T.Resize(resize), T.CenterCrop(crop), T.ToTensor(), T.Normalize(mean, std)])
    with torch.no_grad():
        return net.eval()(torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths]))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


class NoSync(TorchDispatchMode):
    """Fails on whatever reads a tensor's value on the host, or makes a shape depend on it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} synchronises with the host"
        return func(*args, **(kwargs or {}))
