"""Run folders, made by hand in a moment or by the real scripts, and the commands that use a trained run."""

import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dataloader_cifar
import dataloader_folder
import Train_cifar
from dividemix import DivideMixWarning, networks
from dividemix.data.device import to_float
from dividemix.data.images import Views
from dividemix.run import checkpoint, description
from dividemix.run.description import Preparation
from helpers.data import make_cifar10, make_fashionmnist
from helpers.nets import golden_weights
from helpers.scripts import CLOTHING1M, FOLDER, WEBVISION, end_of, small_run, tiny
from helpers.trees import make_folder

COLOUR = Preparation((0.5, 0.45, 0.4), (0.25, 0.2, 0.3), image_size=16, resize=20)
GREY = Preparation((0.3,) * 3, (0.35,) * 3, image_size=14, resize=14, channels=1, border=2)
NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]


def make_trained(
    folder: Path,
    preparation: Preparation = COLOUR,
    classes: list[str] | None = NAMES,
    num_class: int = 6,
    arch: str = "preresnet18",
    width: int = 4,
    last: bool = True,
) -> Path:
    """A run folder with what `deploy` reads, and nets whose answers differ from image to image. The last checkpoint, if
    there is one, holds other nets than best.pt."""
    folder.mkdir(parents=True)
    model = description.Description(arch, num_class, width, classes, preparation).as_dict()
    args = {"command": ["Train_cifar.py", "--r", "0.5", "--id", "a b"], "args": {"warm_up": 1}, "model": model}
    (folder / "args.json").write_text(json.dumps(args))
    torch.save({**pair(arch, num_class, width, 0), "epochs": [1, 1], "config": {}}, folder / "best.pt")
    if last:
        state = {"records": [{"epoch": 2}], "format": checkpoint.FORMAT, "config": {}}
        checkpoint.save_last(folder, 2, pair(arch, num_class, width, 10) | state)
    return folder


@functools.cache
def pair(arch: str, num_class: int, width: int, seed: int) -> dict:
    return {"nets": [lively(arch, num_class, width, seed + k).state_dict() for k in range(2)]}


def lively(arch: str, num_class: int, width: int, seed: int, images: torch.Tensor | None = None) -> torch.nn.Module:
    """A network that nobody trained, whose class changes from image to image: its running statistics and the mean of
    its logits are those of `images` (N, 3, S, S), normalised ones, by default coarse noise."""
    if images is None:
        coarse = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        side = max(16, networks.architecture(arch).min_side or 64)
        images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    net = golden_weights(networks.build(arch, num_class, width), seed).train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # so one pass gives the statistics of `images`
    with torch.no_grad():
        net(images)
        bias = net.get_parameter(f"{networks.classifier_of(net)}.bias")
        bias.sub_(net.eval()(images).mean(dim=0))
    return net


def draw_photos(folder: Path, n: int = 7, seed: int = 0, sides: tuple[int, int] = (12, 40)) -> list[Path]:
    """PNGs of random size and content: photo_00.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, paths = np.random.default_rng(seed), []
    for i in range(n):
        width, height = rng.integers(*sides, 2).tolist()
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        paths.append(folder / f"photo_{i:02d}.png")
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def command(module, folder: Path, monkeypatch, capsys, *flags: str) -> Callable[..., tuple[int, str, str]]:
    """A module's `main`, started in `folder` with its arguments and these flags. -> (exit status, stdout, stderr)"""
    monkeypatch.chdir(folder)

    def start(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            status = end_of(module, [*map(str, arguments), *flags], monkeypatch)
        out, error = capsys.readouterr()
        shown = [warning.message for warning in caught if warning.category is DivideMixWarning]
        return status, out, "".join(f"warning: {message}\n" for message in shown) + error

    return start


# ---- By the scripts ----


@dataclass(frozen=True)
class Trained:
    """A run, its test images as files, their labels, and its accuracy on them: of the best epoch, of the last one."""

    folder: Path
    images: list[Path]
    labels: list[int]
    best: float
    last: float | None  # None where the last epoch is not tested


SMALL = ("fashionmnist", "digits", "cifar10")
TORCHVISION = "shufflenet_v2_x0_5"
LARGE = {  # the script, and flags of own images: the side first
    "clothing1M": (CLOTHING1M, []),
    "webvision": (WEBVISION, []),
    "folder": (FOLDER, ["--image_size", "24", "--data_mode", "device"]),
    "folder_stream": (FOLDER, ["--image_size", "24", "--data_mode", "stream"]),
    "folder_torchvision": (FOLDER, ["--image_size", "64", "--arch", TORCHVISION, "--width", "64", "--weights", "none"]),
}
KINDS = (*SMALL, *LARGE)
QUICK = ("fashionmnist", "folder")  # of these kinds


def train(kind: str, root: Path) -> Trained:
    """Run the script of this kind, tiny, in `root`, in float32; two epochs, which change little: the networks start
    with answers that differ from image to image, which so few steps would not teach them."""
    run, images, labels, x = (_small if kind in SMALL else _large)(kind, root)
    num_class = 10 if kind in SMALL else LARGE[kind][0].num_class
    nets = [lively(TORCHVISION if "torchvision" in kind else "preresnet18", num_class, 4, k, x) for k in range(2)]
    torch.save({"nets": [net.state_dict() for net in nets]}, root / "start.pt")
    final = run("--init_from", str(root / "start.pt"), "--lr", "0.001")
    best = final["test_acc"] if kind == "clothing1M" else final["best_acc"]
    return Trained(Path(final["run_dir"]), images, labels, best, None if kind == "clothing1M" else final["test_acc"])


def _small(kind: str, root: Path):
    """-> the script, test images as files, their labels, and the images as the networks see them."""
    if kind != "digits":
        {"cifar10": make_cifar10, "fashionmnist": make_fashionmnist}[kind](root / "data")
    data = dataloader_cifar.load(kind, root / "data")
    pixels = data.test_images
    if kind == "fashionmnist":
        pixels = pixels[:, 2:-2, 2:-2, 0]  # as published: grey, without a border
    elif kind == "digits":
        pixels = pixels[..., 0]
    paths = [root / "test" / f"{i:04d}.png" for i in range(len(pixels))]
    (root / "test").mkdir()
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(np.ascontiguousarray(image)).save(path)

    def run(*flags: str) -> dict:
        return Train_cifar.main(tiny(root / "out", "--dataset", kind, "--data_path", str(root / "data"), *flags))

    x = to_float(torch.from_numpy(data.test_images[:60]), torch.tensor(data.mean), torch.tensor(data.std))
    return run, paths, data.test_labels.tolist(), x


def _large(kind: str, root: Path):
    script, own_images = LARGE[kind]
    if script is FOLDER:
        make_folder(root / "data", splits=("train", "test"), sides=(16, 40))
        side = resize = int(own_images[1])
        mean_std = dataloader_folder.IMAGENET_MEAN, dataloader_folder.IMAGENET_STD
    else:
        script.make(root / "data", sides=(16, 32))
        side, resize, mean_std = 16, script.resize, script.mean_std
    images, views = script.read(root / "data")["test"], Views(resize, side)
    paths = [Path(images.path(i)) for i in range(len(images))]
    pixels = [views.eval(views.resized(Image.open(path))) for path in paths]
    x = to_float(torch.from_numpy(np.stack(pixels)), *map(torch.tensor, mean_std))

    def run(*flags: str) -> dict:
        return script.main.main(small_run(script, root / "data", root / "out", *own_images, *flags))

    return run, paths, images.labels.tolist(), x


def nets_of(folder: Path, arch: str = "preresnet18", num_class: int = 6, width: int = 4) -> list[torch.nn.Module]:
    """The two networks of best.pt, by as little of the project's code as can be."""
    nets = []
    for state in torch.load(folder / "best.pt", weights_only=True)["nets"]:
        net = networks.build(arch, num_class, width)
        net.load_state_dict(state)
        nets.append(net.eval())
    return nets
