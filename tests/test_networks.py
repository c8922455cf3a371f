"""The networks by name, and the weights that they start from. Nothing here touches the network."""

import urllib.error

import pytest
import torch
import torchvision
from torch import nn

from dividemix import DivideMixError, networks
from dividemix.ranks import Ranks
from dividemix.seeds import seeded

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
        def local_first(self, function):
            asked.append(function)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        networks.read_weights("imagenet", "resnet50", Asked(1, 2, 1))
    assert asked == [networks.imagenet_file]


def test_weights_of_another_number_of_classes_keep_all_but_the_classifier(tmp_path):
    """Else one's own weights cannot be carried over to a data set of other classes, or half of them are left out."""
    source = networks.build("preresnet18", 10, 4).state_dict()
    torch.save(source, tmp_path / "own.pt")
    state = networks.read_weights(f"{tmp_path}/own.pt", "preresnet18", ALONE)
    other = networks.build("preresnet18", 7, 4, state).state_dict()
    assert other["linear.weight"].shape == (7, 32)
    assert all(torch.equal(other[key], source[key]) for key in source if not key.startswith("linear."))
    same = networks.build("preresnet18", 10, 4, state).state_dict()
    assert all(torch.equal(same[key], source[key]) for key in source)
    headless = {key: value for key, value in state.items() if not key.startswith("linear.")}
    networks.build("preresnet18", 7, 4, headless)


def test_weights_that_do_not_fit_or_cannot_be_read_are_refused_in_one_line(tmp_path, hub):
    """Else a wrong file trains a network that is half random, and nobody knows why it is 5 points short."""
    state = networks.build("preresnet18", 10, 4).state_dict()
    lacking = {key: value for key, value in state.items() if key != "layer2.0.conv1.weight"}
    for bad, width, expected in ((lacking, 4, "layer2.0.conv1.weight"), (state, 8, "conv1.weight"), ({"a": 1}, 4, "")):
        with pytest.raises(DivideMixError, match=f"--weights does not fit --arch preresnet18.*{expected}") as caught:
            networks.build("preresnet18", 10, width, bad)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    with pytest.raises(DivideMixError, match=r"gone\.pt cannot be read: No such file"):
        networks.read_weights(f"{tmp_path}/gone.pt", "preresnet18", ALONE)
    torch.save([print], tmp_path / "code.pt")
    with pytest.raises(DivideMixError, match=r"code\.pt: not a loadable checkpoint"):
        networks.read_weights(f"{tmp_path}/code.pt", "preresnet18", ALONE)
    torch.save({"nets": [state, state]}, tmp_path / "run.pt")
    with pytest.raises(DivideMixError, match="--init_from"):
        networks.read_weights(f"{tmp_path}/run.pt", "preresnet18", ALONE)
    hub.mkdir(parents=True)
    (hub / FILE).write_bytes(b"half a file")
    with pytest.raises(DivideMixError, match=f"{FILE}: not a loadable checkpoint.*delete it"):
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
    assert any(key.startswith(f"{networks.ARCHITECTURES[arch].classifier}.") for key in net.state_dict())
