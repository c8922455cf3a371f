"""DivideMix on your own images, some of whose labels may be wrong: a folder of class folders, or a CSV table.

    python Train_folder.py --data_path ./flowers                        # flowers/<class>/*.jpg, or flowers/labels.csv
    python Train_folder.py --data_path ./flowers/labels.csv             # columns path,label; paths beside it
    python Train_folder.py --data_path ./flowers --arch efficientnet_b0 # any of torchvision's networks
    python Train_folder.py --data_path ./digits --width 16 --no_flip    # small images, minutes on a CPU
    python Train_folder.py --data_path ./flowers --method ce            # plain cross-entropy, to compare
    python Train_folder.py --data_path ./flowers --check_data           # is everything there?
    torchrun --nproc_per_node=2 Train_folder.py --data_path ./flowers   # the same batch on two GPUs

The same command again continues the run. What is not given is chosen from the data (`dividemix/defaults.py`) and
printed. No true labels are needed: without a test part, accuracies are against labels that may be wrong themselves.
`main` reads from top to bottom: data, two networks, Algorithm 1.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import dataloader_folder
from dataloader_folder import IMAGENET_MEAN, IMAGENET_STD, Folder, balance, mean_std
from dividemix import DivideMixError, check_data, defaults, deploy, logs, networks, options, report, warn
from dividemix.codivide import CoDivide
from dividemix.data import DeviceImages
from dividemix.engine import ensemble_accuracy, per_sample_loss, set_learning_rate, train_epoch, warmup_epoch
from dividemix.filelist import some
from dividemix.images import Preparation, Views
from dividemix.run import Run, folder_for, score_arrays
from dividemix.runtime import Runtime, is_out_of_memory
from dividemix.scoring import score_labels
from dividemix.seeds import draws, hold_out
from dividemix.state import restore, state_of, still_in
from dividemix.stream import Pipeline


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(prog="Train_folder.py", description="DivideMix on your own images.")
    from_data = dict.fromkeys(("batch_size", "lr", "alpha", "num_epochs", "lr_drop"))
    options.add_method(parser, **from_data, source="from the data")
    from_data = dict.fromkeys(("arch", "weights", "image_size", "num_class", "data_path"))
    options.add_images(parser, **from_data, keep_images=True, cache_dir=True)
    group = parser.add_argument_group("own images")
    group.add_argument("--labels", metavar="FILE.csv", help="training labels, instead of those in --data_path")
    group.add_argument(
        "--val_fraction",
        type=options.part,
        help="part of the training images held out, with their labels, to select the best epoch (default: 0.1 where "
        "there is no validation and no test part, else 0)",
    )
    group.add_argument("--no_flip", action="store_true", help="never mirror images: for digits, text, left and right")
    group.add_argument(
        "--data_mode",
        choices=["auto", "device", "stream"],
        default="auto",
        help="images as pixels on the device, cropped after padding; or read by workers; auto: by size",
    )
    group.add_argument(
        "--method",
        choices=["dividemix", "ce"],
        default="dividemix",
        help="ce: plain cross-entropy, the same nets and schedule",
    )
    group.add_argument("--conf_penalty", choices=["on", "off"], default="off", help="confidence penalty in warm-up")
    options.add_run(parser, val_fraction=False, eval_batch_size=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue. -> the last epoch's metrics with `run_dir`. After --check_data: {}."""
    args = parse_args(argv)
    if args.check_data:
        lists, problems, lines = dataloader_folder.find(args.data_path, args.labels)
        check_data.run_check(
            (lists, problems), full=args.check_data == "full", skip=bool(args.skip_bad_images), about=lines
        )
        return {}
    data = dataloader_folder.load(args.data_path, args.labels)
    look = dataloader_folder.survey(data.train)
    recipe, chosen = defaults.choose(args, len(data.train), look.side, data.lists)
    args.num_class = data.num_class
    machine = options.machine(args)
    suffixes = ["ce" if args.method == "ce" else "", f"seed{args.seed}" if args.seed != 123 else "", args.id]
    folder = folder_for(args.out_dir, args.run_dir, "folder", data.name, *suffixes)
    views = Views(defaults.resize(args.data_mode, args.image_size), args.image_size, flip=not args.no_flip)
    streams = {"workers": args.workers, "ranks": machine.ranks, "keep": args.keep_images, "cache_dir": args.cache_dir}

    with Run(folder, vars(args), args.fresh, machine.ranks, logs.FOLDER, logs.by_own_images) as run:
        index, parts, lists, lines = split(args, data, run, machine)
        with Pipeline(lists, views, IMAGENET_MEAN, IMAGENET_STD, machine.device, **streams) as pipeline:
            sets, mean, std = read(args, parts, run, pipeline)
            start = {"init_from": args.init_from, "seed": args.seed, "machine": machine, "begun": bool(run.state)}
            nets = networks.pair(args.arch, args.num_class, args.width, args.weights, **start)
            optimizers = [machine.optimizer(net, args.lr, recipe.weight_decay) for net in nets]
            codivide = [CoDivide(args.p_threshold) for _ in nets]
            restore(run.state, nets, optimizers, codivide)
            if run.state:  # images that are left out from now on are no longer in the divisions
                for part in codivide:
                    part.select(still_in(run.state["index"], index))
            divisions = [part.division for part in codivide]
            about = {"classes": data.class_names, **{name: len(images) for name, images in sets.items()}}
            about |= {"mean": mean, "std": std, "resize": views.resize, "crop": views.crop}
            run.start(
                {
                    "command": ["Train_folder.py", *(sys.argv[1:] if argv is None else argv)],
                    "args": vars(args),
                    "data": about,
                    "model": deploy.describe(
                        args.arch,
                        args.width,
                        args.num_class,
                        data.class_names,
                        Preparation(tuple(mean), tuple(std), views.crop, views.resize),
                    ),
                    "machine": machine.describe(),
                }
            )
            whole = {"list_given": data.train.labels, "list_path": data.train.names()}
            run.save_labels(index=index, given=data.train.labels[index], **whole)
            chosen.append(f"flip {'off (given)' if args.no_flip else 'on (--no_flip leaves it out)'}")
            whose = "ImageNet's" if mean is IMAGENET_MEAN else "of the training images"
            chosen.append("mean {:.3f} {:.3f} {:.3f}, std {:.3f} {:.3f} {:.3f} ".format(*mean, *std) + f"({whose})")
            lines += pipeline.said()
            run.say(machine.describe(), *data.lines, str(look), *lines, *chosen, f"run folder {folder}")

            warmup = {"batch_size": 2 * args.batch_size, "conf_penalty": args.conf_penalty == "on", "machine": machine}
            mixmatch = {name: getattr(args, name) for name in ("batch_size", "warm_up", "alpha", "T", "num_class")}
            mixmatch |= {"lambda_u": args.lambda_u, "unlabeled_loss": recipe.unlabeled_loss or args.lambda_u > 0}
            mixmatch["machine"] = machine
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
                            terms.append(warmup_epoch(net, optimizers[k], sets["train"], rng=rng, bar=bar, **warmup))
                    else:
                        with run.phase(f"train{k + 1}") as bar:
                            step = {"epoch": epoch, "rng": draws(args.seed, "train", epoch, k), "bar": bar, **mixmatch}
                            terms.append(train_epoch(net, peer, optimizers[k], sets["train"], divisions[1 - k], **step))
                phase = "ce" if args.method == "ce" else "train" if any(divisions) else "warmup"
                metrics = {"phase": phase, "lr": lr}
                for name in [part for part in ("val", "test") if part in sets]:
                    with run.phase(name) as bar:
                        accuracy = ensemble_accuracy(nets, sets[name], bar=bar, **evaluation)
                    metrics |= dict(zip((f"{name}_acc", f"{name}_acc_net1", f"{name}_acc_net2"), accuracy, strict=True))
                metrics |= logs.training(divisions, terms)

                # W = GMM(X, Y, theta) for the next epoch; after the last one it says which labels are wrong. Net 2
                # first: on a GPU its mixture is fitted while the card scores for net 1.
                scored, dividing, scores = [None, None], [None, None], {}
                divide = args.method == "dividemix" and epoch + 1 >= args.warm_up
                for k in (1, 0):
                    if divide or args.save_scores or epoch + 1 == args.num_epochs:
                        with run.phase("loss") as bar:
                            scored[k] = per_sample_loss(nets[k], sets["train"], bar=bar, **evaluation)
                    if divide:
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
                state = state_of(nets, optimizers, codivide)
                state |= {"index": torch.from_numpy(index), "mean_std": torch.tensor([mean, std], dtype=torch.float64)}
                for line in pipeline.said():  # of images that are read in each pass
                    run.say(line)
                run.end_epoch(metrics, state, scores, args.save_scores)

            divide = args.method == "dividemix"
            score = partial(score_labels, nets, sets["train"], codivide, seed=args.seed, divide=divide, **evaluation)
            return finish(run, sets, None if args.no_label_scores else score)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of main


def split(args: argparse.Namespace, data: Folder, run: Run, machine: Runtime):
    """Which images are for what. -> (index of the training images in their list, ascending; part -> (list, rows) for
    train, val and test as far as there are such; the lists of usable images that the rows are of; what to say of it)"""
    digests = {name: images.digest() for name, images in data.lists.items()}
    digests["classes"] = hashlib.sha256(json.dumps(data.class_names).encode()).hexdigest()
    run.pin("images_sha256", digests, f"the images or labels in {args.data_path} are not those {run.folder} began with")
    usable, lines = check_data.usable(data.lists, args.skip_bad_images, run.folder / "skipped.json", machine.ranks)
    index, held_out = hold_out(np.arange(len(data.train)), args.val_fraction, args.seed, data.train.labels)
    index, held_out = (rows[np.isin(rows, usable["train"])] for rows in (index, held_out))
    lists = {name: images.select(usable[name]) for name, images in data.lists.items()}  # a cache holds all of a list

    parts = {name: (name, np.arange(len(images))) for name, images in lists.items()}
    parts["train"] = ("train", np.searchsorted(usable["train"], index))
    if len(held_out):
        parts["val"] = ("train", np.searchsorted(usable["train"], held_out))
        how = f"drawn by seed {args.seed}, to select the best epoch"
        lines.append(f"{len(held_out)} training images held out with their labels, {how}")
    if parts.keys() == {"train"}:
        raise DivideMixError("no image is left to select the best epoch by: a larger --val_fraction, or a val part")
    if "test" not in parts:
        lines.append("no test part: accuracies are against the validation images' own labels, which may be wrong too")
    line, warning = balance(data.train.labels[index], data.class_names, defaults.IMBALANCE)
    if warning:
        warn(warning)
    classes = f"{data.num_class} classes: {some(data.class_names)}"
    return index, parts, lists, [f"{len(index)} images to train on, {classes}", line, *lines]


def read(args: argparse.Namespace, parts: dict[str, tuple[str, NDArray]], run: Run, pipeline: Pipeline):
    """The parts' images, as the engine takes them: on the device, or read when they are needed. -> (part -> data set,
    mean, std)"""
    if args.data_mode == "stream":
        if args.cache_dir:
            with run.phase("cache") as bar:
                pipeline.build_cache(bar)
        sets = {part: pipeline.images(*rows, keep=not args.cache_dir) for part, rows in parts.items()}
        return sets, IMAGENET_MEAN, IMAGENET_STD
    sets, mean, std = {}, IMAGENET_MEAN, IMAGENET_STD
    try:
        for part, (name, rows) in parts.items():  # the training images first
            with run.phase(f"read {part}") as bar:
                pixels = pipeline.pixels(name, rows, bar)
            if part == "train" and args.weights == "none":  # a run goes on with the values that it began with
                mean, std = run.state["mean_std"].tolist() if run.state else mean_std(pixels)
            labels = pipeline.lists[name].labels[rows]
            sets[part] = DeviceImages(pixels, labels, mean, std, not args.no_flip, pipeline.device, pipeline.ranks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DivideMixError(f"{pipeline.device}: no memory for {len(rows)} images; try --data_mode stream") from error
    pipeline.close()
    return sets, mean, std


def finish(run: Run, sets: dict[str, Any], score: Callable[[Run], None] | None) -> dict[str, Any]:
    """Print the best epoch, score the labels, and return the final metrics."""
    final = {**run.records[-1], "run_dir": str(run.folder)}
    best = run.records[run.best_epochs[0]]
    found = [
        f"{name} {best[f'{part}_acc']:.2f}" for part, name in (("val", "validation"), ("test", "test")) if part in sets
    ]
    chosen = "the test set" if "val" not in sets else "the validation images"
    run.say(f"best epoch {best['epoch']}, chosen on {chosen}: {', '.join(found)}")
    final = run.finish(final, score)
    report.of_finished(run)
    return final


if __name__ == "__main__":
    options.command_line(main)
