"""DivideMix on WebVision 1.0, its first 50 classes: photos from web search (Sec. 4.2, Table 4 of the paper).

    python Train_webvision.py --data_path ./dataset/                                # the authors' single-GPU setting
    python Train_webvision.py --data_path ./dataset/ --num_epochs 100 --lr_drop 50  # the paper's: 77.32 (91.64)
    python Train_webvision.py --data_path ./dataset/ --cache_dir /fast/disk         # each image is decoded once
    torchrun --nproc_per_node=2 Train_webvision.py --data_path ./dataset/           # the same batch on two GPUs
    python Train_webvision.py --data_path ./dataset/ --check_data                   # is everything there?

The same command again continues the run. Every epoch ends with top-1 and top-5 accuracy on WebVision's and on
ILSVRC12's validation images, then both networks score and divide the training set for the next one. `main` reads from
top to bottom: data, two networks, Algorithm 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import dataloader_webvision
from dividemix import check_data, deploy, logs, networks, options, recipes, report
from dividemix.codivide import CoDivide
from dividemix.engine import (
    ensemble_accuracy,
    per_sample_loss,
    set_learning_rate,
    top_k_accuracy,
    train_epoch,
    warmup_epoch,
)
from dividemix.images import Preparation, Views
from dividemix.run import Run, folder_for, score_arrays
from dividemix.scoring import score_labels
from dividemix.seeds import draws, hold_out
from dividemix.state import restore, state_of, still_in
from dividemix.stream import Pipeline

PAPER = recipes.WEBVISION


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(prog="Train_webvision.py", description="DivideMix on WebVision 1.0.")
    options.add_method(parser, **PAPER.method)
    options.add_images(parser, **PAPER.images, data_path="./dataset/", cache_dir=True)
    options.add_run(parser, save_scores=False, eval_batch_size=200)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue. -> the last epoch's metrics with `run_dir` and the paper's, paper_<name of the metric>. After
    --check_data: {}."""
    args = parse_args(argv)
    notes = options.resolve_images(args, PAPER)
    if args.check_data:
        found = dataloader_webvision.find(args.data_path, args.num_class)
        check_data.run_check(found, full=args.check_data == "full", skip=bool(args.skip_bad_images))
        return {}
    machine = options.machine(args)
    data = dataloader_webvision.load(args.data_path, args.num_class)
    suffixes = [f"seed{args.seed}" if args.seed != 123 else "", args.id]
    folder = folder_for(args.out_dir, args.run_dir, "webvision", *suffixes)
    views = Views(PAPER.resize_for(args.image_size), args.image_size, "resized_crop")
    preparation = Preparation(data.mean, data.std, views.crop, views.resize)
    streams = {"workers": args.workers, "ranks": machine.ranks, "cache_dir": args.cache_dir}

    with Run(folder, vars(args), args.fresh, machine.ranks, logs.WEBVISION) as run:
        lists = {"train": data.train, "val": data.val, "imagenet": data.imagenet}
        digests = {name: images.digest() for name, images in lists.items()}
        run.pin(
            "images_sha256", digests, f"the lists of images in {args.data_path} are not those that {folder} began with"
        )
        usable, lines = check_data.usable(lists, args.skip_bad_images, folder / "skipped.json", machine.ranks)
        index, held_out = hold_out(np.arange(len(data.train)), args.val_fraction, args.seed)
        index, held_out = (rows[np.isin(rows, usable["train"])] for rows in (index, held_out))
        lists = {name: images.select(usable[name]) for name, images in lists.items()}  # a cache holds all of a list
        with Pipeline(lists, views, data.mean, data.std, machine.device, **streams) as pipeline:
            if args.cache_dir:
                with run.phase("cache") as bar:
                    pipeline.build_cache(bar)
            where = (np.searchsorted(usable["train"], rows) for rows in (index, held_out))
            train, validation = (pipeline.images("train", rows) for rows in where)
            webvision, imagenet = pipeline.images("val"), pipeline.images("imagenet")
            start = {"init_from": args.init_from, "seed": args.seed, "machine": machine, "begun": bool(run.state)}
            nets = networks.pair(args.arch, args.num_class, args.width, args.weights, **start)
            optimizers = [machine.optimizer(net, args.lr, PAPER.weight_decay) for net in nets]
            codivide = [CoDivide(args.p_threshold) for _ in nets]
            restore(run.state, nets, optimizers, codivide)
            if run.state:  # images that are left out from now on are no longer in the divisions
                for part in codivide:
                    part.select(still_in(run.state["index"], index))
            divisions = [part.division for part in codivide]
            about = {"classes": data.class_names, **{name: len(images) for name, images in lists.items()}}
            run.start(
                {
                    "command": ["Train_webvision.py", *(sys.argv[1:] if argv is None else argv)],
                    "args": vars(args),
                    "data": about,
                    "model": deploy.describe(args.arch, args.width, args.num_class, data.class_names, preparation),
                    "machine": machine.describe(),
                }
            )
            whole = {"list_given": data.train.labels, "list_path": data.train.names()}
            run.save_labels(index=index, given=train.labels, **whole)
            if len(held_out):
                lines.append(f"{len(held_out)} training images held out with their labels to select the best epoch")
            run.say(machine.describe(), *lines, *notes, f"run folder {folder}")

            warmup = {"batch_size": 2 * args.batch_size, "conf_penalty": PAPER.conf_penalty, "machine": machine}
            mixmatch = {name: getattr(args, name) for name in ("batch_size", "warm_up", "alpha", "T", "num_class")}
            mixmatch |= {"lambda_u": 0.0, "unlabeled_loss": False, "machine": machine}
            evaluation = {"batch_size": args.eval_batch_size, "machine": machine}

            for epoch in run.epochs(args.num_epochs):
                lr = args.lr if epoch < args.lr_drop else args.lr / 10
                set_learning_rate(optimizers, lr)

                # Co-divide: net 1 learns from the division that net 2 made at the end of the last epoch, then net 2
                # from net 1's with the updated net 1 as its peer.
                terms = []
                for k, (net, peer) in enumerate([nets, nets[::-1]]):
                    if divisions[1 - k] is None:
                        with run.phase(f"warmup{k + 1}") as bar:
                            rng = draws(args.seed, "warmup", epoch, k)
                            terms.append(warmup_epoch(net, optimizers[k], train, rng=rng, bar=bar, **warmup))
                    else:
                        with run.phase(f"train{k + 1}") as bar:
                            step = {"epoch": epoch, "rng": draws(args.seed, "train", epoch, k), "bar": bar, **mixmatch}
                            terms.append(train_epoch(net, peer, optimizers[k], train, divisions[1 - k], **step))

                metrics = {"phase": "train" if any(divisions) else "warmup", "lr": lr}
                for name, images in (("test", webvision), ("imagenet", imagenet)):
                    with run.phase(name) as bar:
                        accuracy = top_k_accuracy(nets, images, (1, 5), bar=bar, **evaluation)
                    metrics |= {f"{name}_acc": accuracy[1][0], f"{name}_acc_top5": accuracy[5][0]}
                    metrics |= {f"{name}_acc_net{k + 1}": accuracy[1][1 + k] for k in range(2)}
                if len(held_out):
                    with run.phase("val") as bar:
                        accuracy = ensemble_accuracy(nets, validation, bar=bar, **evaluation)
                    metrics |= dict(zip(("val_acc", "val_acc_net1", "val_acc_net2"), accuracy, strict=True))
                metrics |= logs.training(divisions, terms)

                # W = GMM(X, Y, theta) for the next epoch. Net 2 first: on a GPU its mixture is fitted while the card
                # scores for net 1.
                scored, dividing, scores = [None, None], [None, None], {}
                for k in (1, 0):
                    with run.phase("loss") as bar:
                        scored[k] = per_sample_loss(nets[k], train, bar=bar, **evaluation)
                    if epoch + 1 >= args.warm_up:
                        with run.phase("gmm"):
                            random_state = int(draws(args.seed, "divide", epoch + 1, k).integers(2**32))
                            fit = (scored[k].loss, None, random_state, f"net {k + 1}")
                            dividing[k] = machine.background(codivide[k].divide, *fit)
                for k in range(2):
                    is_new = True  # or, where no sample was clean, the division before is kept
                    if dividing[k]:
                        with run.phase("gmm"):
                            divisions[k], is_new = dividing[k]()
                    scores |= score_arrays(k, scored[k], divisions[k] if is_new else None)
                state = state_of(nets, optimizers, codivide) | {"index": torch.from_numpy(index)}
                run.end_epoch(metrics, state, scores, keep_scores=True)

            score = partial(score_labels, nets, train, codivide, seed=args.seed, **evaluation)
            return finish(run, args, None if args.no_label_scores else score)


def finish(run: Run, args: argparse.Namespace, score: Callable[[Run], None] | None) -> dict[str, Any]:
    """Print the best epoch beside the paper's results, score the labels, and return the final metrics."""
    final = {**run.records[-1], "run_dir": str(run.folder)}
    final |= {f"paper_{name}": value for name, value in PAPER.results.items()}
    best, paper = run.records[run.best_epochs[0]], PAPER.results

    def line(of: dict[str, float]) -> str:
        webvision = f"WebVision {of['test_acc']:.2f} ({of['test_acc_top5']:.2f})"
        return f"{webvision}, ILSVRC12 {of['imagenet_acc']:.2f} ({of['imagenet_acc_top5']:.2f})"

    last10 = f"mean of the last 10 {final['last10_acc']:.2f}"
    run.say(f"best epoch {best['epoch']}: {line(best)}; {last10}; paper: {line(paper)}{options.but(args, PAPER)}")
    final = run.finish(final, score)
    report.of_finished(run)
    return final


if __name__ == "__main__":
    options.command_line(main)
