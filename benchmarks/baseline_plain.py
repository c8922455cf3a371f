"""The work of one DivideMix epoch done the straightforward way of 2020: what the engine's speed is compared with.

    python benchmarks/baseline_plain.py                                # CIFAR-10's size, half of it labeled
    python benchmarks/baseline_plain.py --samples 1000 --labeled 500 --test_samples 200 --width 16 --repeats 3

PIL transforms in DataLoader workers, data sets and loaders made anew for every phase, fp32 in eager mode and NCHW,
torch's own SGD and precision defaults (so: TF32 in cuDNN's convolutions, none in matrix products), cudnn.benchmark,
every guess its own forward, the losses read by .item() each step, those of the loss pass copied one by one. Nothing
else is there to slow it down. Prints seconds, on random images; of the package only the GMM is used.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dividemix.codivide import Division, codivide
from PreResNet import ResNet18

NORMALISE = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
TRAIN = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *NORMALISE])
EVAL = transforms.Compose(NORMALISE)


class Images(Dataset):
    """One sample: the image in each of `views`, then its entry of each of `columns` (label, index, ...)."""

    def __init__(self, images: NDArray, views: Sequence[Callable], *columns: Sequence):
        self.images, self.views, self.columns = images, views, columns

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        image = Image.fromarray(self.images[i])
        return *(view(image) for view in self.views), *(column[i] for column in self.columns)


def step(
    net: nn.Module, peer: nn.Module, optimizer: Optimizer,
    x1: Tensor, x2: Tensor, labels: Tensor, w: Tensor, u1: Tensor, u2: Tensor,
    *, lam: float, index: Tensor, T: float, lambda_u: float, num_class: int,
) -> tuple[float, float, float, float]:  # fmt: skip
    """One update of `net`, which must be in train mode, `peer` in eval mode. -> loss, Lx, Lu, penalty.

    labels int64 (B,), w (B,); lam: already max(lam, 1 - lam); lambda_u: already ramped; index: permutes all the rows.
    """
    labels = torch.zeros(len(x1), num_class, device=x1.device).scatter_(1, labels.view(-1, 1), 1)
    w = w.view(-1, 1)
    with torch.no_grad():
        q = F.softmax(net(u1), dim=1) + F.softmax(net(u2), dim=1)
        q = (q + F.softmax(peer(u1), dim=1) + F.softmax(peer(u2), dim=1)) / 4
        q = q ** (1 / T)
        targets_u = q / q.sum(dim=1, keepdim=True)
        p = (F.softmax(net(x1), dim=1) + F.softmax(net(x2), dim=1)) / 2
        p = (w * labels + (1 - w) * p) ** (1 / T)
        targets_x = p / p.sum(dim=1, keepdim=True)

    inputs = torch.cat([x1, x2, u1, u2])
    targets = torch.cat([targets_x, targets_x, targets_u, targets_u])
    mixed = lam * inputs + (1 - lam) * inputs[index]
    targets = lam * targets + (1 - lam) * targets[index]

    logits = net(mixed)
    n = 2 * len(x1)
    Lx = -torch.mean(torch.sum(F.log_softmax(logits[:n], dim=1) * targets[:n], dim=1))
    Lu = torch.mean((F.softmax(logits[n:], dim=1) - targets[n:]) ** 2)
    pbar = F.softmax(logits, dim=1).mean(dim=0)
    prior = torch.ones_like(pbar) / num_class
    penalty = torch.sum(prior * torch.log(prior / pbar))
    loss = Lx + lambda_u * Lu + penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), Lx.item(), Lu.item(), penalty.item()  # every step, for the progress line


def division_of(labeled: NDArray[np.bool_]) -> Division:
    """The division in which these samples are labeled. labeled: (N,), some True and some False."""
    p, two = np.where(labeled, 0.9, 0.1), np.ones(2)
    return Division(p, labeled, p.astype(np.float32), two, two, two, 0.5, None)


class PlainEpoch:
    """Two networks and the phases of an epoch. images uint8 (N, 32, 32, 3), labels int64 (N,)."""

    def __init__(
        self, images: NDArray, labels: NDArray, test_images: NDArray, test_labels: NDArray, *,
        device: torch.device | str, width: int = 64, batch_size: int = 64, num_class: int = 10, workers: int = 5,
        lr: float = 0.02, lambda_u: float = 25.0, T: float = 0.5, alpha: float = 4.0, seed: int = 0,
        eval_batch_size: int = 640,
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.images, self.labels = images, labels
        self.test_images, self.test_labels = test_images, test_labels
        self.device, self.workers = torch.device(device), workers
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_class, self.lambda_u, self.T, self.alpha = num_class, lambda_u, T, alpha
        self.nets = [ResNet18(num_class, width).to(self.device) for _ in range(2)]
        self.optimizers = [torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4) for net in self.nets]

    def run(self, divisions: Sequence[Division] | None) -> dict[str, float]:
        """Net k is trained on divisions[k]. -> seconds of 'loss' (both nets), 'gmm' (fitted, and dropped), 'train1',
        'train2', 'test'; without divisions of 'warmup1', 'warmup2', 'test'."""
        seconds, scores = {}, []
        if divisions:
            phases = {
                "loss": lambda: scores.extend([self.losses(0), self.losses(1)]),
                "gmm": lambda: [codivide(losses.numpy(), threshold=0.5) for losses in scores],
                "train1": lambda: self.train(0, divisions[0]),
                "train2": lambda: self.train(1, divisions[1]),
            }
        else:
            phases = {"warmup1": lambda: self.warmup(0), "warmup2": lambda: self.warmup(1)}
        # torch's TF32 default, whatever ran before in this process: the project's own runtime switches it off
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            for name, phase in (phases | {"test": self.test}).items():
                start = self.synchronized_time()
                phase()
                seconds[name] = self.synchronized_time() - start
        return seconds

    def losses(self, k: int) -> Tensor:
        """Cross-entropy of every sample under net k (0 or 1), (N,) on the host."""
        losses = torch.zeros(len(self.images))
        for logits, labels, index in self.evaluate([self.nets[k]], self.images, self.labels):
            loss = F.cross_entropy(logits[0], labels, reduction="none")
            for b in range(len(loss)):
                losses[index[b]] = loss[b]
        return losses

    def test(self) -> float:
        """Accuracy of the summed logits in per cent."""
        correct = 0
        for (logits1, logits2), labels, _ in self.evaluate(self.nets, self.test_images, self.test_labels):
            correct += ((logits1 + logits2).argmax(dim=1) == labels).sum().item()
        return 100 * correct / len(self.test_images)

    def train(self, k: int, division: Division) -> None:
        """One pass of net k over the labeled set, in epoch warm_up + 16: lambda_u has reached its full value."""
        net, peer = self.nets[k].train(), self.nets[1 - k].eval()
        rows = division.labeled
        images, labels, w = (values[rows] for values in (self.images, self.labels, division.clean_probability))
        labeled = self.loader(Images(images, [TRAIN, TRAIN], labels.tolist(), w.tolist()), self.batch_size)
        unlabeled = self.loader(Images(self.images[~rows], [TRAIN, TRAIN]), self.batch_size)
        unlabeled_iter = iter(unlabeled)
        for x1, x2, labels, w in labeled:
            try:
                u1, u2 = next(unlabeled_iter)
            except StopIteration:
                unlabeled_iter = iter(unlabeled)
                u1, u2 = next(unlabeled_iter)
            batch = self.to_device(x1, x2, labels, w.float(), u1, u2)
            lam = float(self.rng.beta(self.alpha, self.alpha))
            index = torch.randperm(2 * (len(x1) + len(u1)), device=self.device)
            step(
                net, peer, self.optimizers[k], *batch, lam=max(lam, 1 - lam), index=index,
                T=self.T, lambda_u=self.lambda_u, num_class=self.num_class,
            )  # fmt: skip

    def warmup(self, k: int) -> None:
        """One pass of net k over all samples: cross-entropy, twice the batch size, one view."""
        net, optimizer = self.nets[k].train(), self.optimizers[k]
        for x, labels in self.loader(Images(self.images, [TRAIN], self.labels.tolist()), 2 * self.batch_size):
            x, labels = self.to_device(x, labels)
            loss = F.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def evaluate(self, nets: list[nn.Module], images: NDArray, labels: NDArray) -> Iterator[tuple]:
        """Logits of each net, labels, and, on the host, the index of every image's row."""
        nets = [net.eval() for net in nets]
        data = Images(images, [EVAL], labels.tolist(), range(len(images)))
        for x, batch_labels, index in self.loader(data, self.eval_batch_size, shuffle=False):
            x, batch_labels = self.to_device(x, batch_labels)
            yield [net(x) for net in nets], batch_labels, index

    def loader(self, data: Dataset, batch_size: int, shuffle: bool = True) -> DataLoader:
        # fork on Linux whatever Python's default is: anything else would send each worker a copy of the images
        fork = "fork" if self.workers and sys.platform == "linux" else None
        options = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        return DataLoader(data, batch_size, shuffle, multiprocessing_context=fork, **options)

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def synchronized_time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"samples": 50000, "labeled": 25000, "test_samples": 10000, "width": 64, "batch_size": 64}
    for name, default in (sizes | {"repeats": 5, "warmups": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="default: 5 on CUDA, as the authors; else the cores, at most 5")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.workers is None:
        args.workers = default_workers(args.device)
    return args


def default_workers(device: str) -> int:
    """5 beside a card, as the authors; on a CPU the cores that this process has, at most 5."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 5 if device.startswith("cuda") else min(cores, 5)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rng, n = np.random.default_rng(0), args.samples
    images = rng.integers(0, 256, (n + args.test_samples, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, len(images))
    labeled = rng.permutation(n) < args.labeled
    options = {name: getattr(args, name) for name in ("device", "width", "batch_size", "workers")}
    plain = PlainEpoch(images[:n], labels[:n], images[n:], labels[n:], **options)
    epochs = [plain.run([division_of(labeled)] * 2) for _ in range(args.warmups + args.repeats)][args.warmups :]
    for name in [*epochs[0], "epoch"]:
        print(f"{name:8}{statistics.median(epoch.get(name, sum(epoch.values())) for epoch in epochs):10.3f} s")
    print(f"medians of {args.repeats} epochs after {args.warmups}; torch {torch.__version__}, {options}")


if __name__ == "__main__":
    main()
