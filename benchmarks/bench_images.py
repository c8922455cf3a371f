"""Large images: how many a second are decoded, and an epoch of Clothing1M's shape, against the plain way.

    python benchmarks/bench_images.py                                    # 1,000 photos of short side 256 to 600
    python benchmarks/bench_images.py --arch none --repeats 5 --json out.json                # decoding alone
    python benchmarks/bench_images.py --images 32000 --workers 16 --device cuda --arch resnet50

An epoch scores all images and then trains on them: two views of each labeled one, and two of as many unlabeled ones.
The plain way does it with PIL and torchvision as scripts of 2020 do: one decode and one resize per view to train and
another to score, normalised in the workers, data sets and loaders (one for the labeled, one for the unlabeled images,
--workers each) made anew for every phase. Here images are decoded once, by --workers processes that stay, and kept in
host memory. Both do the same work, on the same cores, in turn, in one run; both are first checked to score the same
pixels. "decode" goes through all batches without a net, "compute" is the net alone on batches that are there, "joint"
is both. Images a second counts every image scored and every image trained on once, whatever is made of it.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from bench_cifar import medians, synchronized_time, timed
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataloader_clothing1M import MEAN, STD
from dividemix import engine
from dividemix.codivide import Division
from dividemix.data import ImageList, Pipeline, Views
from dividemix.runtime import Batches, Runtime, available_cores
from dividemix.runtime import start as start_runtime
from PreResNet import ResNet18

NUM_CLASS = 14
TARGET = 2.5  # times the plain way's images a second, decoding


def make_photos(folder: Path, n: int, sides: tuple[int, int], seed: int = 0) -> ImageList:
    """n JPEGs cut from scikit-learn's two photos: short side between `sides`, up to 1.6 times as long as wide."""
    rng, photos = np.random.default_rng(seed), [Image.fromarray(photo) for photo in load_sample_images().images]
    names = []
    for i in range(n):
        photo = photos[rng.integers(len(photos))]
        side, ratio = int(rng.integers(sides[0], sides[1] + 1)), rng.uniform(1, 1.6)
        width, height = (side, round(side * ratio)) if rng.random() < 0.5 else (round(side * ratio), side)
        scale = rng.uniform(0.5, 1) * min(photo.width / width, photo.height / height)  # of the photo, what is cut out
        x, y = rng.uniform(0, photo.width - scale * width), rng.uniform(0, photo.height - scale * height)
        box = (x, y, x + scale * width, y + scale * height)
        names.append(f"{i:07}.jpg")
        photo.resize((width, height), Image.Resampling.BICUBIC, box).save(folder / names[-1], quality=85)
    labels = np.arange(n) % NUM_CLASS
    return ImageList("photos", folder, "", [name.encode() for name in names], labels, NUM_CLASS)


def divide(n: int, labeled: float) -> Division:
    mask = np.random.default_rng(1).permutation(n) < round(labeled * n)
    p, two = np.where(mask, 0.9, 0.1), np.ones(2)
    return Division(p, mask, p.astype(np.float32), two, two, two, 0.5, None)


# ---- The plain way ----


class PlainDataset(Dataset):
    """One sample: the image through `transform`, `views` times, each time from the file; then its label."""

    def __init__(self, paths: list[str], labels: np.ndarray, transform: Callable, views: int):
        self.paths, self.labels, self.transform, self.views = paths, labels, transform, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        views = [self.transform(Image.open(self.paths[i]).convert("RGB")) for _ in range(self.views)]
        return *views, int(self.labels[i])


class PlainImages:
    """An `engine.DataSet`, the plain way."""

    truly_clean = None

    def __init__(self, images: ImageList, views: Views, runtime: Runtime, workers: int):
        self.images, self.runtime, self.device, self.workers = images, runtime, runtime.device, workers
        last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        first = transforms.Resize(views.resize)
        self.eval_transform = transforms.Compose([first, transforms.CenterCrop(views.crop), *last])
        mirrored = transforms.RandomHorizontalFlip()
        self.train_transform = transforms.Compose([first, transforms.RandomCrop(views.crop), mirrored, *last])

    def __len__(self) -> int:
        return len(self.images)

    def _loader(self, index: np.ndarray, transform: Callable, views: int, batch_size: int) -> DataLoader:
        dataset = PlainDataset([self.images.path(i) for i in index], self.images.labels[index], transform, views)
        pin = self.device.type == "cuda"
        return DataLoader(dataset, batch_size, shuffle=views > 1, num_workers=self.workers, pin_memory=pin)

    def eval_batches(self, batch_size: int) -> Batches:
        loader = self._loader(np.arange(len(self)), self.eval_transform, 1, batch_size)
        sizes = [(min(batch_size, len(self) - start),) for start in range(0, len(self), batch_size)]
        return Batches(sizes, ([tensor.to(self.device) for tensor in batch] for batch in loader))

    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> Batches:
        labeled, unlabeled = np.flatnonzero(division.labeled), np.flatnonzero(~division.labeled)
        steps = -(-len(labeled) // batch_size)

        def sizes(n: int) -> list[int]:
            return [min(batch_size, n - start) for start in range(0, n, batch_size)]

        def batches() -> Iterator[tuple]:
            labeled_loader, unlabeled_loader = (
                self._loader(index, self.train_transform, 2, batch_size) for index in (labeled, unlabeled)
            )
            again = iter(unlabeled_loader)
            for x1, x2, labels in labeled_loader:
                try:
                    u1, u2, _ = next(again)
                except StopIteration:
                    again = iter(unlabeled_loader)
                    u1, u2, _ = next(again)
                w = torch.full((len(x1),), 0.9)
                yield tuple(tensor.to(self.device) for tensor in (x1, x2, labels, w, u1, u2))

        pairs = zip(sizes(len(labeled)), sizes(len(unlabeled)) * steps, strict=False)
        return Batches(list(pairs), batches())

    @staticmethod
    def mixmatch_views(*batch: torch.Tensor) -> tuple:
        return batch


# ---- What is timed ----


class Loaded:
    """Batches that are there: for the net alone. Made from one batch, over and over."""

    truly_clean = None

    def __init__(self, n: int, views: Views, runtime: Runtime):
        self.n, self.runtime, self.device, self.side = n, runtime, runtime.device, views.crop
        self.labels = torch.arange(n, device=self.device) % NUM_CLASS

    def __len__(self) -> int:
        return self.n

    def _pixels(self, n: int) -> torch.Tensor:
        return torch.zeros(n, 3, self.side, self.side, device=self.device).normal_()

    def eval_batches(self, batch_size: int) -> Batches:
        x, starts = self._pixels(min(batch_size, self.n)), range(0, self.n, batch_size)
        batches = [(x[: self.n - start], self.labels[start : start + batch_size]) for start in starts]
        return Batches([(len(x),) for x, _ in batches], batches)

    def mixmatch_batches(self, division: Division, batch_size: int, rng: np.random.Generator) -> Batches:
        x, n = self._pixels(batch_size), int(division.labeled.sum())
        sizes = [(min(batch_size, n - start),) * 2 for start in range(0, n, batch_size)]
        w = torch.ones(batch_size, device=self.device)
        batches = ((x[:k], x[:k], self.labels[:k], w[:k], x[:k], x[:k]) for k, _ in sizes)
        return Batches(sizes, batches)

    mixmatch_views = staticmethod(PlainImages.mixmatch_views)


class Epoch:
    """Scores the images and trains on them: with nets, or going through the batches alone. data: called anew each time,
    as each epoch of Clothing1M draws new images."""

    def __init__(
        self, data: Callable[[], Any], division: Division, runtime: Runtime, args: argparse.Namespace, nets: bool
    ):
        self.data, self.division, self.runtime, self.args = data, division, runtime, args
        self.nets = [runtime.prepare(make_net(args)) for _ in range(2)] if nets else []
        self.optimizer = runtime.optimizer(self.nets[0], 0.002, 1e-3) if nets else None

    def run(self, _: None = None) -> dict[str, float]:
        begin = synchronized_time(self.runtime.device)
        data = self.data()
        self.score(data)
        middle = synchronized_time(self.runtime.device)
        self.train(data)
        end = synchronized_time(self.runtime.device)
        return {"score": middle - begin, "train": end - middle}

    def score(self, data: Any) -> None:
        if self.nets:
            engine.per_sample_loss(self.nets[0], data)
        else:
            for _ in data.eval_batches(self.args.eval_batch_size):
                pass

    def train(self, data: Any) -> None:
        rng = np.random.default_rng(0)
        if self.nets:
            settings = engine.MixMatch(NUM_CLASS, self.args.batch_size, unlabeled_loss=False, alpha=0.5, lambda_u=0)
            engine.train_epoch(*self.nets, self.optimizer, data, self.division, settings, engine.Phase(2, rng))
        else:
            for batch in data.mixmatch_batches(self.division, self.args.batch_size, rng):
                data.mixmatch_views(*batch)


def make_net(args: argparse.Namespace) -> nn.Module:
    if args.arch == "resnet50":
        return torchvision.models.resnet50(num_classes=NUM_CLASS)
    return nn.Sequential(nn.AdaptiveAvgPool2d(32), ResNet18(NUM_CLASS, args.width))


def check(ours: Any, plain: PlainImages, batch_size: int) -> str:
    """Exit if the two do not score the same pixels."""
    worst = 0.0
    for (x, labels), (y, plain_labels) in zip(
        ours.eval_batches(batch_size), plain.eval_batches(batch_size), strict=True
    ):
        worst = max(worst, float((x - y).abs().max()), float((labels != plain_labels).any()))
    line = f"pixels to score, here and the plain way: largest difference {worst:.1e}"
    if worst > 1e-4:
        sys.exit(f"check failed: {line}")
    return line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"images": 1000, "workers": available_cores(), "batch_size": 32, "eval_batch_size": 64, "resize": 256}
    for name, default in (sizes | {"image_size": 224, "width": 8, "repeats": 3, "warmups": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sides", type=int, nargs=2, default=(256, 600), help="range of the photos' short side")
    parser.add_argument("--labeled", type=float, default=0.5, help="part of the images")
    parser.add_argument(
        "--arch", default="small", choices=["small", "resnet50", "none"], help="small: PreAct ResNet-18"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if not 0 < args.labeled < 1 or not 0 < round(args.labeled * args.images) < args.images or args.repeats < 1:
        parser.error("expected some labeled and some unlabeled images, and 1 repeat or more")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    runtime = start_runtime(
        args.device,
        width=args.width if args.arch == "small" else 64,
        eval_batch_size=args.eval_batch_size,
        compile=False,
        graph=False,
    )
    division, views = divide(args.images, args.labeled), Views(args.resize, args.image_size)
    print(f"{runtime.describe()}; {available_cores()} cores; Pillow {PIL.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        photos = make_photos(Path(folder), args.images, tuple(args.sides))
        options = {"workers": args.workers, "keep": "host"}
        with Pipeline({"train": photos}, views, MEAN, STD, runtime, **options) as pipeline:

            def ours():
                return pipeline.images("train", keep=True)

            def plain():
                return PlainImages(photos, views, runtime, args.workers)

            print(check(ours(), plain(), args.eval_batch_size), flush=True)
            epochs = {f"decode {name}": Epoch(data, division, runtime, args, False) for name, data in ways(ours, plain)}
            if args.arch != "none":
                loaded = Loaded(args.images, views, runtime)
                epochs["compute"] = Epoch(lambda: loaded, division, runtime, args, True)
                epochs |= {
                    f"joint {name}": Epoch(data, division, runtime, args, True) for name, data in ways(ours, plain)
                }
            results = timed(epochs, args.warmups + args.repeats, lambda number: None)
    report = summary(results, division, args)
    report |= {"device": runtime.describe(), "date": datetime.date.today().isoformat(), "flags": vars(args)}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    print_table(report, args)
    return report


def ways(ours: Callable, plain: Callable) -> tuple[tuple[str, Callable], ...]:
    return ("here", ours), ("plain", plain)


def summary(results: dict[str, list[dict[str, float]]], division: Division, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of the repeats; ratios of the plain way's time to ours, repeat by repeat."""
    count = args.images + 2 * int(division.labeled.sum())  # scored, and labeled and unlabeled ones trained on
    report: dict[str, Any] = {"images_of_an_epoch": count, "cores": available_cores(), "n": args.repeats}
    report["seconds"] = {name: medians(result, args.warmups) for name, result in results.items()}
    report["images_per_second"] = {name: count / seconds["epoch"] for name, seconds in report["seconds"].items()}
    report["ratio"] = {}
    for work in ("decode", "joint"):
        if f"{work} here" in results:
            pairs = list(zip(results[f"{work} plain"], results[f"{work} here"], strict=True))[args.warmups :]
            for phase in ("score", "train", "epoch"):
                ratios = [plain[phase] / ours[phase] for plain, ours in pairs]
                spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
                report["ratio"][f"{work}, {phase}"] = spread
    return report


def print_table(report: dict[str, Any], args: argparse.Namespace) -> None:
    columns = f"{'score':>9}{'train':>9}{'epoch s':>9}{'images/s':>10}{'per core':>10}"
    print(f"\n{'medians of ' + str(report['n']):<16}{columns}")
    for name, seconds in report["seconds"].items():
        rate = report["images_per_second"][name]
        columns = "".join(f"{seconds[phase]:>9.2f}" for phase in ("score", "train", "epoch"))
        print(f"{name:<16}{columns}{rate:>10.1f}{rate / report['cores']:>10.1f}")
    print(f"\n{'plain / here':<16}{'median':>9}{'min':>9}{'max':>9}")
    for name, ratio in report["ratio"].items():
        print(f"{name:<16}" + "".join(f"{value:>9.2f}" for value in ratio.values()))
    print(f"target for decoding: {TARGET}; {args.images} images, {args.labeled:.0%} labeled, {args.workers} workers")


if __name__ == "__main__":
    main()
