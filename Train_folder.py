"""DivideMix on your own images, some of whose labels may be wrong: a folder of class folders, or a CSV table.

    python Train_folder.py --data_path ./flowers                        # flowers/<class>/*.jpg, or flowers/labels.csv
    python Train_folder.py --data_path ./flowers/labels.csv             # columns path,label; paths beside it
    python Train_folder.py --data_path ./flowers --method ce            # plain cross-entropy, to compare
    python Train_folder.py --data_path ./flowers --check_data           # is everything there?
    python Train_folder.py --data_path ./flowers --features             # heads on a frozen network: minutes on a CPU
    torchrun --nproc_per_node=2 Train_folder.py --data_path ./flowers   # the same batch on two GPUs

The same command again continues the run. Flags that are not given are chosen from the data and printed
(`dividemix/run/defaults.py`). Without a test split, accuracies are measured on labels that may be wrong.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import dataloader_folder
from dataloader_folder import IMAGENET_MEAN, IMAGENET_STD, Folder, mean_std
from dividemix import DivideMixError, report
from dividemix.data import DeviceImages, FeatureSet, Pipeline, StreamedImages, Views, check, duplicates, features
from dividemix.engine import DataSet, co_divide, test, train_epoch, warmup_epoch
from dividemix.run import Description, Preparation, Run, Split, command_line, defaults, logs, options, splits
from dividemix.runtime import is_out_of_memory, set_learning_rate

Images = DeviceImages | StreamedImages


def parse_args(argv: Sequence[str] | None = None, **about: Any) -> argparse.Namespace:
    """about: arguments of the parser, for `dividemix issues`."""
    examples = "--data_path ./flowers", "--data_path ./flowers --features"
    script = {"prog": "Train_folder.py", "description": "DivideMix on your own images.", "examples": examples}
    script |= {"common": ("data_path", "labels", "features", "num_epochs", "id")}
    parser = options.Parser(**script | about)
    options.add_method(parser, source="from the data")
    options.add_images(parser, keep_images=True, cache_dir=True)
    options.add_own_images(parser)
    options.add_run(parser, val_fraction=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue a run. Returns the last epoch's metrics with `run_dir`; {} after --check_data."""
    args = parse_args(argv)
    if args.check_data:
        lists_and_problems = dataloader_folder.find(args.data_path, args.labels, **options.tables(args))
        check.run_check(*lists_and_problems, full=args.check_data == "full", skip=bool(args.skip_bad_images))
        return {}
    return train(args, load(args), argv)


def load(args: argparse.Namespace) -> Folder:
    return dataloader_folder.load(args.data_path, args.labels, **options.tables(args))


def train(
    args: argparse.Namespace, data: Folder, argv: Sequence[str] | None = None, with_report: bool = True
) -> dict[str, Any]:
    """`main` for image lists that are read already. argv: the flags, for args.json."""
    survey = [] if args.feature_file else [dataloader_folder.survey(data.train)]  # else no network sees the images
    recipe, lines = defaults.choose(args, len(data.train), survey[0].side if survey else 224, data.lists)
    args.num_class = data.num_class
    runtime = options.start_runtime(args)
    folder = options.run_folder(args, "folder", data.name, "features" * args.features, "ce" * (args.method == "ce"))
    strong, resize = args.augment == "strong", defaults.resize(args.data_mode, args.image_size)
    views = Views(resize, args.image_size, flip=not args.no_flip, strong=strong)

    with Run(folder, args, runtime, logs.FOLDER) as run:
        digests = {"classes": hashlib.sha256(json.dumps(data.class_names).encode()).hexdigest()}
        hold_out = {"val_fraction": args.val_fraction, "by_class": True}
        split = splits.split(data.lists, run, args.skip_bad_images, **hold_out, digests=digests)
        run.say(*data.lines, *map(str, survey), *split.lines, *lines, *defaults.hint(args, runtime.device))
        reading = {"workers": args.workers, "keep": args.keep_images, "cache_dir": args.cache_dir}
        with Pipeline(split.lists, views, IMAGENET_MEAN, IMAGENET_STD, runtime, **reading) as pipeline:
            train, tests, mean, std = read(args, split, run, pipeline)
            num_features = train.num_features if isinstance(train, FeatureSet) else 0
            nets = options.build_networks(args, runtime, run.begun, num_features=num_features)
            optimizers = [runtime.optimizer(net, args.lr, recipe.weight_decay) for net in nets]
            mixtures = options.mixtures(args)
            uses_unlabeled = recipe.unlabeled_loss or args.lambda_u != 0  # None: chosen while it trains
            loss_terms = {"unlabeled_loss": uses_unlabeled, "conf_penalty": args.conf_penalty == "on"}
            mixmatch = options.mixmatch(args, warm_up=math.inf if args.method == "ce" else args.warm_up, **loss_terms)
            summary = {"classes": data.class_names, "train": len(train)} | {name: len(tests[name]) for name in tests}
            summary |= {"mean": mean, "std": std, "resize": views.resize, "crop": views.crop}
            preparation = Preparation(tuple(mean), tuple(std), views.crop, views.resize)
            shape = args.arch, args.num_class, args.width
            model = Description(*shape, data.class_names, preparation, num_features=num_features).as_dict()
            lines = dataloader_folder.describe(data, data.train.labels[split.index], tests, mean, std, views.flip)
            # Of streamed images: see below
            lines += pipeline.describe_images(split.held_out) if args.data_mode == "device" else []
            run.start(argv, nets, optimizers, mixtures, mixmatch, data=summary, model=model, lines=lines)
            choice = options.blind_choice(args, run, mixtures, train)

            for epoch in run.epochs(args.num_epochs):
                lr = set_learning_rate(optimizers, args.lr if epoch < args.lr_drop else args.lr / 10)

                # W = GMM(X, Y, theta): both networks divide the samples before either is trained.
                divisions = [None, None]
                if epoch >= mixmatch.warm_up:
                    divisions = co_divide(nets, [train, train], mixtures, run.phase, run.probabilities.add)
                    if choice:
                        mixmatch = choice.update(divisions, mixmatch)

                # Net 1 learns from net 2's division, then net 2 from net 1's with the updated net 1 as its peer.
                losses = []
                for k, net in enumerate(nets):
                    division, peer = divisions[1 - k], nets[1 - k]
                    if division is None:  # warm-up, or the other network found no clean sample
                        losses.append(warmup_epoch(net, optimizers[k], train, mixmatch, run.phase("warmup", k)))
                    else:
                        phase = run.phase("train", k)
                        losses.append(train_epoch(net, peer, optimizers[k], train, division, mixmatch, phase))

                accuracy = test(nets, tests, run.phase) | (choice.record if choice else {})
                run.say(*pipeline.describe_images(split.held_out))  # what was seen while streamed images were read
                run.end_epoch(lr, divisions, losses, accuracy)

            final = finish(run, train, tests, tests["val"] if len(split.held_out) else None, pipeline)
            if with_report:
                report.of_finished(run)
            return final


def read(
    args: argparse.Namespace, split: Split, run: Run, pipeline: Pipeline
) -> tuple[Images, dict[str, Images], Any, Any]:
    """The data sets, on the device or streamed. Returns the training set, the sets to evaluate on ("val" and "test",
    those that there are), mean and std. Raises DivideMixError where there is no memory."""
    sets: dict[str, Images] = {}
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if args.features:
        order = dataloader_folder.feature_order(args.data_path, args.labels, split.lists, **options.tables(args))
        stored = splits.read_features(args, split, run, pipeline, order)
        sets = {name: features.of_images(stored, pipeline.images(*source)) for name, source in split.sets.items()}
        return sets.pop("train"), sets, mean, std
    if args.data_mode == "stream":
        if args.cache_dir:
            with run.phase("cache") as phase:
                pipeline.build_cache(phase.bar)
        sets = {name: pipeline.images(*source, keep=not args.cache_dir) for name, source in split.sets.items()}
        return sets.pop("train"), sets, mean, std
    try:
        for name, (list_name, rows) in split.sets.items():  # the training set is the first
            with run.phase(f"read {name}") as phase:
                pixels = pipeline.pixels(list_name, rows, phase.bar)
            if name == "train" and args.weights == "none":  # a continued run keeps the values that it began with
                mean, std = run.keep("mean_std", [list(values) for values in mean_std(pixels)])
            labels = pipeline.lists[list_name].labels[rows]
            views = pipeline.views
            sets[name] = DeviceImages(pixels, labels, mean, std, views.flip, run.runtime, strong=views.strong)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"{run.runtime.device}: not enough memory for {len(rows)} images; try --data_mode stream"
        raise DivideMixError(problem) from error
    pipeline.close()
    return sets.pop("train"), sets, mean, std


def finish(
    run: Run, train: DataSet, tests: Mapping[str, DataSet], held_out: DataSet | None, pipeline: Pipeline
) -> dict[str, Any]:
    """Print the best epoch's accuracies, score the labels, also the held-out ones, and return the final metrics."""
    best, titles = logs.of_averages(run.records[run.best_epochs[0]]), {"val": "validation", "test": "test"}
    accuracies = ", ".join(f"{title} {best[f'{name}_acc']:.2f}" for name, title in titles.items() if name in tests)
    chosen_on = "the validation images" if "val" in tests else "the test set"
    averaged = " of the averaged weights" * bool(run.args.ema)
    line = f"best epoch {best['epoch']}{averaged}, chosen on {chosen_on}: {accuracies}"
    line = line if tests else f"epoch {best['epoch']}, the last, is taken"
    return run.finish(line, train, held_out, lambda: duplicates.first_equal(pipeline.equal_images()["train"]))


if __name__ == "__main__":
    command_line(main)
