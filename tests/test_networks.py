"""The networks by name, and the weights that they start from. Nothing here touches the network."""

import functools
import os
import re
import urllib.error

import pytest
import torch
import torchvision
from helpers.nets import half
from torch import nn
from torchvision import models

from dividemix import DivideMixError, engine, networks
from dividemix.data.device import DeviceImages
from dividemix.runtime.device import Runtime
from dividemix.runtime.loops import layers_draw_from
from dividemix.runtime.ranks import Ranks
from dividemix.seeds import draws, seeded

ALONE = Ranks()
FILE = "resnet50-0676ba61.pth"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch hub's folder of this test, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def published() -> dict:
    """A ResNet-50 of ImageNet's classes; like the published file, without BN's counts of batches."""
    state = torchvision.models.resnet50().state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.fixture
def offline(monkeypatch):
    def refused(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)


def test_resnet50_is_torchvisions():
    """Else ImageNet's weights load into a network that computes something else with them, or are other weights than the
    paper's: torchvision has a newer set."""
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url == networks.IMAGENET
    ours, theirs = networks.build("resnet50", 14).eval(), torchvision.models.resnet50(num_classes=14).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == torch.float32


def test_both_networks_start_from_imagenet_and_differ_in_the_classifier(hub, published, offline):
    """Else the nets start from random weights, or as one network twice, which confirms its own errors."""
    hub.mkdir(parents=True)
    torch.save(published, hub / FILE)
    for num_class in (14, 1000):
        state = networks.read_weights("imagenet", "resnet50", ALONE)
        nets = [seeded(123, k, lambda n=num_class, s=state: networks.build("resnet50", n, 64, s)) for k in (0, 1)]
        states = [net.state_dict() for net in nets]
        for key, value in published.items():
            if not key.startswith("fc."):
                assert torch.equal(states[0][key], value) and torch.equal(states[1][key], value), key
        assert states[0]["fc.weight"].shape == (num_class, 2048)
        assert not torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])
        assert num_class != 1000 or not torch.equal(states[0]["fc.weight"], published["fc.weight"])


def test_a_failed_download_says_what_to_fetch_and_where_to_put_it(hub, offline):
    """Clusters' nodes have no internet: else the user is left with a stack trace of urllib."""
    with pytest.raises(DivideMixError) as caught:
        networks.read_weights("imagenet", "resnet50", ALONE)
    message = str(caught.value)
    assert f"https://download.pytorch.org/models/{FILE}" in message and str(hub / FILE) in message
    assert "--weights PATH" in message and "Name or service not known" in message and "\n" not in message


def test_a_download_is_checked_and_read(hub, published, monkeypatch):
    """Else a download that was cut is taken for the weights."""
    calls = []

    def download(url, path, hash_prefix, progress):
        calls.append((url, hash_prefix))
        torch.save(published, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert "layer1.0.conv1.weight" in networks.read_weights("imagenet", "resnet50", ALONE)
    assert calls == [(f"https://download.pytorch.org/models/{FILE}", "0676ba61")]


def test_one_process_of_a_machine_downloads():
    """Else eight processes write the same file at once."""
    asked = []

    class Asked(Ranks):
        def local_rank0_first(self, function):
            asked.append(function)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        networks.read_weights("imagenet", "resnet50", Asked(1, 2, 1))
    assert isinstance(asked[0], functools.partial) and asked[0].func is networks.imagenet_file


def test_weights_replace_all_but_the_classifier(tmp_path):
    """Else one's own weights cannot be carried over to a data set of other classes, or half of them are left out; or,
    of as many classes, both networks are one to the bit."""
    source = networks.build("preresnet18", 10, 4).state_dict()
    torch.save(source, tmp_path / "own.pt")
    state = networks.read_weights(f"{tmp_path}/own.pt", "preresnet18", ALONE)
    other = networks.build("preresnet18", 7, 4, state).state_dict()
    assert other["linear.weight"].shape == (7, 32)
    assert all(torch.equal(other[key], source[key]) for key in source if not key.startswith("linear."))
    same = networks.build("preresnet18", 10, 4, state).state_dict()
    assert [key for key in source if not torch.equal(same[key], source[key])] == ["linear.weight", "linear.bias"]
    headless = {key: value for key, value in state.items() if not key.startswith("linear.")}
    networks.build("preresnet18", 7, 4, headless)


def test_a_pair_from_imagenet_has_two_classifiers_of_its_own(hub):
    """With ImageNet's, which fit 1,000 classes, both networks would be one network to the bit."""
    hub.mkdir(parents=True)
    published = models.squeezenet1_1().state_dict()
    torch.save(published, hub / models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    start = {"init_from": None, "seed": 1, "runtime": Runtime(torch.device("cpu")), "begun": False}
    first, second = (net.state_dict() for net in networks.pair("squeezenet1_1", 1000, 64, "imagenet", **start))
    key = "classifier.1.weight"
    assert torch.equal(first["features.0.weight"], published["features.0.weight"])
    assert not any(torch.equal(*two) for two in ((first[key], second[key]), (first[key], published[key])))


def test_weights_that_do_not_fit_or_cannot_be_read_are_refused_in_one_line(tmp_path, hub):
    """Else a wrong file trains a network that is half random, and nobody knows why it is 5 points short."""
    state = networks.build("preresnet18", 10, 4).state_dict()
    lacking = {key: value for key, value in state.items() if key != "layer2.0.conv1.weight"}
    for bad, width, expected in ((lacking, 4, "layer2.0.conv1.weight"), (state, 8, "conv1.weight"), ({"a": 1}, 4, "")):
        with pytest.raises(DivideMixError, match=f"--weights does not fit --arch preresnet18.*{expected}") as caught:
            networks.build("preresnet18", 10, width, bad)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    with pytest.raises(DivideMixError, match=r"gone\.pt cannot be read .No such file"):
        networks.read_weights(f"{tmp_path}/gone.pt", "preresnet18", ALONE)
    os.mkfifo(tmp_path / "pipe.pt")  # would be waited for
    with pytest.raises(DivideMixError, match=r"pipe\.pt cannot be read .not a file"):
        networks.read_weights(f"{tmp_path}/pipe.pt", "preresnet18", ALONE)
    torch.save([print], tmp_path / "code.pt")
    with pytest.raises(DivideMixError, match=r"code\.pt cannot be read"):
        networks.read_weights(f"{tmp_path}/code.pt", "preresnet18", ALONE)
    torch.save({"nets": [state, state]}, tmp_path / "run.pt")
    with pytest.raises(DivideMixError, match="--init_from"):
        networks.read_weights(f"{tmp_path}/run.pt", "preresnet18", ALONE)
    hub.mkdir(parents=True)
    (hub / FILE).write_bytes(b"half a file")
    with pytest.raises(DivideMixError, match=f"{FILE} cannot be read"):
        networks.read_weights("imagenet", "resnet50", ALONE)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("inceptionresnetv2", 64, 106, "none"), "--image_size 106: inceptionresnetv2 needs 107 pixels"),
        (("preresnet18", 16, 15, "none"), "--image_size 15"),
        (("resnet50", 32, 224, "none"), "--width 32: resnet50 has one width"),
        (("inceptionresnetv2", 64, 299, "imagenet"), "--weights none.*--arch resnet50"),
    ],
)
def test_flags_that_do_not_go_together(flags, expected):
    """Else a run ends in a stack trace of a convolution, or --width is silently without effect."""
    with pytest.raises(DivideMixError, match=expected):
        networks.check(*flags)


def test_flags_that_go_together():
    """Else the defaults of the scripts are refused."""
    for flags in (
        ("resnet50", 64, 224, "imagenet"),
        ("inceptionresnetv2", 64, 107, "none"),
        ("preresnet18", 8, 16, "w.pt"),
    ):
        networks.check(*flags)


@pytest.mark.parametrize("arch", networks.ARCHITECTURES)
def test_every_architecture_works_at_its_smallest_image(arch):
    """Else --image_size is accepted and the first step crashes. Two images: BN needs more than one value a channel."""
    net = networks.build(arch, 5, 4 if networks.ARCHITECTURES[arch].has_width else networks.WIDTH)
    side = networks.ARCHITECTURES[arch].min_side
    assert isinstance(net, nn.Module) and net(torch.randn(2, 3, side, side)).shape == (2, 5)
    assert net.state_dict()[f"{networks.classifier_of(net)}.weight"].shape[0] == 5


# ---- torchvision's, by name ----

SMALL = ["squeezenet1_1", "shufflenet_v2_x0_5"]  # quick to build
SLOW = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"]
SLOW += [
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
]
FAMILIES = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvisions_networks(name):
    """A network of another kind than its name says, with a head of ImageNet's 1000 classes, one that gives more than
    logits while it trains, or one that no checkpoint can be loaded into: a continued run would end in a traceback."""
    net = networks.build(name, 5)
    side = next(side for side in (32, 64, 96, 224) if not networks.refusal(name, side))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    logits = net(x)  # in train mode
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    head = networks.classifier_of(net)
    for key, value in net.state_dict().items():
        assert not key.startswith(f"{head}.") or value.shape[0] == 5, key

    state = {key: value.clone() for key, value in net.state_dict().items()}  # a plain dict, as in a checkpoint
    again = networks.build(name, 5)
    again.load_state_dict(state)
    more = {"aux_logits": False, "transform_input": True, "init_weights": False}
    theirs = models.get_model(name, num_classes=5, **(more if name in ("googlenet", "inception_v3") else {}))
    nn.Module.load_state_dict(theirs, net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert again(x).dtype == torch.float32
    other = networks.build(name, 7, 64, state).state_dict()
    assert all(torch.equal(other[key], value) for key, value in state.items() if not key.startswith(f"{head}."))


@pytest.mark.slow
def test_published_weights_have_the_keys_that_the_networks_have():
    """densenet's files are older than its code, googlenet's and inception_v3's have auxiliary classifiers: --weights
    imagenet would be refused for them."""
    for name, more in (("googlenet", {"init_weights": False}), ("inception_v3", {"init_weights": False})):
        theirs = models.get_model(name, transform_input=True, **more).eval()  # as with weights: auxiliary ones too
        ours = networks.build(name, 1000, 64, theirs.state_dict()).eval()
        ours.fc = theirs.fc  # the classifier is not taken over
        x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    theirs = models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in theirs.items()}
    assert old.keys() != theirs.keys()
    ours = networks.build("densenet121", 1000, 64, old).state_dict()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == ["classifier.weight"]  # its bias is 0


@pytest.mark.slow
def test_every_name_of_torchvisions():
    """A family that a newer torchvision brings may make its logits by another layer, or publish weights without the
    digest that a download is checked by."""
    without = {"regnet_y_128gf", "vit_h_14"}  # theirs are not free for all uses, and not IMAGENET1K_V1
    for name in set(models.list_models(module=models)) - {"regnet_y_128gf"}:  # 2.6 GB of weights
        found = networks.architecture(name)
        if name != "resnet50":
            net = networks._skeleton(name)
            assert net.state_dict()[f"{networks.classifier_of(net)}.weight"].shape[0] == 2, name
        assert name in without or re.search(r"-([0-9a-f]{8,})\.pth$", found.imagenet), name
        assert not networks.refusal(name, 224), name
    assert networks.architecture("vit_h_14").imagenet is None


def test_imagenets_weights_of_another_network(hub, offline):
    """Else --arch resnet18 starts from the file of resnet50, or both networks from one classifier."""
    url = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    with pytest.raises(DivideMixError, match=f"fetch {url} elsewhere"):
        networks.read_weights("imagenet", "squeezenet1_1", ALONE)
    hub.mkdir(parents=True, exist_ok=True)
    published = models.squeezenet1_1().state_dict()
    torch.save(published, hub / url.rsplit("/", 1)[1])
    state = networks.read_weights("imagenet", "squeezenet1_1", ALONE)
    net = networks.build("squeezenet1_1", 1000, 64, state).state_dict()
    other = [key for key, value in published.items() if not torch.equal(net[key], value)]
    assert other == ["classifier.1.weight"]  # its bias is 0 in both


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("squeezenet1_1", 64, 8, "none"), "--image_size 8: squeezenet1_1 cannot take such images .*; it takes 64"),
        (("shufflenet_v2_x0_5", 64, 32, "none"), "more than 1 value per channel.*; it takes 64"),
        (("squeezenet1_1", 16, 64, "none"), "--width 16: squeezenet1_1 has one width"),
        (("resnet_18", 64, 64, "none"), "--arch 'resnet_18': no such network; did you mean resnet18"),
    ],
)
def test_flags_that_torchvisions_networks_cannot_take(flags, expected):
    """Else the run ends in a stack trace of a pooling layer, at the first batch or at the last one."""
    with pytest.raises(DivideMixError, match=expected):
        networks.check(*flags)


def test_initial_weights_do_not_depend_on_what_was_built_before():
    """Else a run gets other first weights in a process that has looked at its network already."""
    first = [seeded(1, 0, lambda: networks.build("squeezenet1_1", 3)).state_dict()]
    networks._skeleton.cache_clear()
    networks.architecture.cache_clear()
    first.append(seeded(1, 0, lambda: networks.build("squeezenet1_1", 3)).state_dict())
    assert all(torch.equal(value, first[1][key]) for key, value in first[0].items())


# ---- Layers that draw ----


def dropped(seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights after a warm-up pass and a pass over a labeled set of a network with dropout."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=rng).numpy()
    data = DeviceImages(pixels, torch.arange(12).numpy() % 3, (0.5,) * 3, (0.25,) * 3, False)
    machine = Runtime(torch.device("cpu"))

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 14 * 14, 3))

    net, peer = (seeded(5, k, build) for k in range(2))
    optimizer = machine.optimizer(net, 0.01, 5e-4)
    settings = engine.MixMatch(num_class=3, batch_size=2, lambda_u=1, warm_up=1)
    engine.warmup_epoch(net, optimizer, data, settings, engine.Phase(1, draws(seed, "warmup")))
    engine.train_epoch(net, peer, optimizer, data, half(12), settings, engine.Phase(1, draws(seed, "train")))
    return net.state_dict()


def test_dropout_follows_from_the_phase_s_generator():
    """Dropout draws from torch's global stream: a continued run of a network that has it would end elsewhere than the
    uninterrupted one, and all ranks of a run would leave out the same places."""
    torch.manual_seed(3)
    first, stream = dropped(), torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), stream), "the global stream is not as it was"
    again = dropped()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(dropped(seed=2)["3.weight"], first["3.weight"])
    drawn = []
    for rank in (0, 1):
        machine = Runtime(torch.device("cpu"), ranks=Ranks(rank, 2))
        with layers_draw_from(draws(1, "train"), nn.Dropout(0.5), machine):
            drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)


def test_networks_without_such_layers_draw_nothing():
    """Else all results of the paper's networks change."""
    machine = Runtime(torch.device("cpu"))
    net = networks.build("preresnet18", 3, 4)
    rng = draws(1, "warmup")
    with layers_draw_from(rng, net, machine):
        assert rng.random() == draws(1, "warmup").random()
    with layers_draw_from(rng, nn.Dropout(0.0), machine):  # as in a vision transformer
        pass
    other = draws(1, "warmup")
    other.random()
    assert rng.random() == other.random()
