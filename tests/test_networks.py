"""The networks by name, and the weights that they start from. Nothing here uses the internet."""

import os
import re
import urllib.error

import pytest
import torch
import torchvision
from helpers.nets import CPU
from torch import nn
from torchvision import models

from dividemix import DivideMixError, networks
from dividemix.runtime import ALONE, Ranks, Runtime

FILE = "resnet50-0676ba61.pth"
SQUEEZENET = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch hub's folder of this test, empty; every download fails."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


# ---- Weights ----


def test_resnet50_is_torchvisions():
    """Else ImageNet's weights load into another network, or are torchvision's newer set, not the paper's."""
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url == networks.IMAGENET
    net, reference = networks.build("resnet50", 14).eval(), torchvision.models.resnet50(num_classes=14).eval()
    net.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), reference(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.float32


@pytest.mark.parametrize("num_class", [14, 1000])
def test_both_networks_start_from_imagenet_and_differ_in_the_classifier(hub, num_class):
    """Else the nets start from other weights, or as one network twice, which confirms its errors."""
    published = models.squeezenet1_1().state_dict()
    torch.save(published, hub / SQUEEZENET.rsplit("/", 1)[1])
    options = {"init_from": None, "seed": 1, "runtime": Runtime(CPU), "begun": False}
    pair = networks.pair("squeezenet1_1", num_class, 64, "imagenet", **options)
    first, second = (net.state_dict() for net in pair)
    for key, value in published.items():
        if not key.startswith("classifier."):
            assert torch.equal(first[key], value) and torch.equal(second[key], value), key
    classifiers = [state["classifier.1.weight"] for state in (first, second, published)]
    assert len(classifiers[0]) == num_class and not torch.equal(*classifiers[:2])
    assert num_class != 1000 or not torch.equal(classifiers[0], classifiers[2])


def test_a_failed_download_says_what_to_fetch_and_where_to_put_it(hub):
    """Clusters' nodes have no internet: else the user is left with a stack trace of urllib."""
    for arch, url in (("resnet50", networks.IMAGENET), ("squeezenet1_1", SQUEEZENET)):
        with pytest.raises(DivideMixError, match="--weights PATH") as caught:
            networks.read_weights("imagenet", arch, ALONE)
        assert url in str(caught.value) and str(hub / url.rsplit("/", 1)[1]) in str(caught.value)


def test_a_download_is_checked_and_read_and_one_process_of_a_machine_makes_it(hub, monkeypatch):
    """Else a download that was cut is taken for the weights, or eight processes write the same file at once."""
    downloads, calls = [], []

    def download(url, path, hash_prefix, progress):
        downloads.append((url, hash_prefix))
        torch.save({"layer1.weight": torch.ones(2)}, path)

    class Noting(Ranks):
        def local_rank0_first(self, function):
            calls.append(len(downloads))
            return function()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert "layer1.weight" in networks.read_weights("imagenet", "resnet50", Noting())
    assert downloads == [(networks.IMAGENET, "0676ba61")] and calls == [0, 1]


def test_weights_replace_all_but_the_classifier(tmp_path):
    """Else one's own weights cannot be carried over to a data set of other classes, or half of them are left out."""
    source = networks.build("preresnet18", 10, 4).state_dict()
    torch.save(source, tmp_path / "own.pt")
    state = networks.read_weights(f"{tmp_path}/own.pt", "preresnet18", ALONE)
    fewer = networks.build("preresnet18", 7, 4, state).state_dict()
    assert fewer["linear.weight"].shape == (7, 32)
    assert all(torch.equal(fewer[key], source[key]) for key in source if not key.startswith("linear."))
    missing = ("linear.weight", "linear.bias", "num_batches_tracked")  # published files may lack the last
    networks.build("preresnet18", 7, 4, {key: value for key, value in state.items() if not key.endswith(missing)})


def test_weights_that_do_not_fit_or_cannot_be_read_are_refused_in_one_line(tmp_path, hub):
    """Else a wrong file trains a network that is half random, and nobody knows why it is 5 points short."""
    state = networks.build("preresnet18", 10, 4).state_dict()
    lacking = {key: value for key, value in state.items() if key != "layer2.0.conv1.weight"}
    for bad, width in ((lacking, 4), (state, 8), ({"a": 1}, 4)):
        with pytest.raises(DivideMixError, match=r"--weights .*preresnet18") as caught:
            networks.build("preresnet18", 10, width, bad)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    os.mkfifo(tmp_path / "pipe.pt")  # would be waited for
    torch.save([print], tmp_path / "code.pt")
    torch.save({"nets": [state, state]}, tmp_path / "run.pt")
    (hub / FILE).write_bytes(b"half a file")
    for name, words in (("gone", "gone.pt"), ("pipe", "pipe.pt"), ("code", "code.pt"), ("run", "--init_from")):
        with pytest.raises(DivideMixError, match=words):
            networks.read_weights(f"{tmp_path}/{name}.pt", "resnet50", ALONE)
    with pytest.raises(DivideMixError, match=FILE):
        networks.read_weights("imagenet", "resnet50", ALONE)


# ---- Flags ----


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("inceptionresnetv2", 64, 106, "none"), "--image_size 106: .*107"),
        (("resnet50", 32, 224, "none"), "--width 32"),
        (("inceptionresnetv2", 64, 299, "imagenet"), "--weights imagenet"),
        (("shufflenet_v2_x0_5", 64, 32, "none"), "--image_size 32: .*; it takes 64"),
        (("resnet_18", 64, 64, "none"), "--arch 'resnet_18'.*resnet18"),
    ],
)
def test_flags_that_do_not_go_together(flags, expected):
    """Else the run ends in a stack trace of a convolution, or --width is silently without effect."""
    with pytest.raises(DivideMixError, match=expected):
        networks.check(*flags)


@pytest.mark.parametrize("arch", networks.ARCHITECTURES)
def test_every_architecture_trains_at_its_smallest_image(arch):
    """Else --image_size is accepted and the first step crashes, or a branch is built that never learns."""
    net = networks.build(arch, 5, 4 if networks.ARCHITECTURES[arch].has_width else networks.WIDTH)
    side = networks.ARCHITECTURES[arch].min_side
    logits = net(torch.randn(1, 3, side, side))
    assert logits.shape == (1, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.state_dict()[f"{networks.classifier_of(net)}.weight"].shape[0] == 5


# ---- torchvision's, by name ----

SMALL = ["squeezenet1_1", "shufflenet_v2_x0_5"]  # quick to build
LARGE = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_y_400mf resnet18 swin_t swin_v2_t vgg11_bn vit_b_32"
)


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE.split())])
def test_torchvisions_networks(name):
    """Else a network has another head, gives more than logits in training, or computes something else."""
    net = networks.build(name, 5)
    side = next(side for side in (32, 64, 96, 224) if not networks.refusal(name, side))
    x = torch.randn(2, 3, side, side)
    logits = net(x)  # in train mode
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    inception = {"aux_logits": False, "transform_input": True, "init_weights": False}
    options = inception if name in ("googlenet", "inception_v3") else {}
    reference = models.get_model(name, num_classes=5, **options)
    state = {key: value.clone() for key, value in net.state_dict().items()}  # a plain dict, as in a checkpoint
    nn.Module.load_state_dict(reference, net.state_dict())  # mnasnet's needs the version beside the tensors
    again = networks.build(name, 5)
    again.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert again(x).dtype == torch.float32


@pytest.mark.slow
def test_published_weights_have_the_keys_that_the_networks_have():
    """Else --weights imagenet is refused: files are older than the code, or have auxiliary classifiers."""
    for name in ("googlenet", "inception_v3"):
        reference = models.get_model(name, transform_input=True, init_weights=False).eval()  # auxiliary ones too
        net = networks.build(name, 1000, 64, reference.state_dict()).eval()
        net.fc = reference.fc  # the classifier is not taken over
        x = torch.randn(1, 3, 96, 96)
        with torch.no_grad():
            torch.testing.assert_close(net(x), reference(x), rtol=1e-4, atol=1e-5)
    current = models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in current.items()}
    assert old.keys() != current.keys()
    state = networks.build("densenet121", 1000, 64, old).state_dict()
    assert [key for key in current if not torch.equal(state[key], current[key])] == ["classifier.weight"]  # bias: 0


def test_looking_at_a_network_draws_nothing():
    """Else a run gets other first weights in a process that has looked at its network already."""
    networks._skeleton.cache_clear()
    before = torch.get_rng_state()
    networks.refusal("shufflenet_v2_x0_5", 64)
    assert torch.equal(torch.get_rng_state(), before)
