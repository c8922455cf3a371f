"""DivideMix on WebVision 1.0, its first 50 classes: photos from web search (Sec. 4.2, Table 4 of the paper).

    python Train_webvision.py --data_path ./dataset/                                # the authors' single-GPU setting
    python Train_webvision.py --data_path ./dataset/ --num_epochs 100 --lr_drop 50  # the paper's: 77.32 (91.64)
    python Train_webvision.py --data_path ./dataset/ --check_data                   # is everything there?

The same command again continues the run. Accuracies are top-1 and top-5, on WebVision's and ILSVRC12's validation sets.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import dataloader_webvision
from dividemix import recipes, report
from dividemix.codivide import Mixture
from dividemix.data import Pipeline, StreamedImages, Views, check
from dividemix.engine import co_divide, test, train_epoch, warmup_epoch
from dividemix.run import Description, Preparation, Run, command_line, defaults, logs, options, splits
from dividemix.runtime import set_learning_rate

PAPER = recipes.WEBVISION


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    examples = "--data_path ./dataset/ --check_data", "--data_path ./dataset/ --num_epochs 100 --lr_drop 50"
    title = "DivideMix on WebVision 1.0."
    common = "data_path", "check_data", "num_epochs", "seed", "id"
    parser = options.Parser(prog="Train_webvision.py", description=title, examples=examples, common=common)
    options.add_method(parser, **PAPER.method)
    options.add_images(parser, **PAPER.images, data_path="./dataset/", cache_dir=True)
    options.add_run(parser, save_scores=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue a run. Returns the last epoch's metrics with `run_dir` and the paper's results,
    `paper_<metric>`; {} after --check_data."""
    args = parse_args(argv)
    notes = defaults.resolve_images(args, PAPER)
    if args.check_data:
        lists_and_problems = dataloader_webvision.find(args.data_path, args.num_class)
        check.run_check(*lists_and_problems, full=args.check_data == "full", skip=bool(args.skip_bad_images))
        return {}
    runtime = options.start_runtime(args)
    data = dataloader_webvision.load(args.data_path, args.num_class)
    views = Views(PAPER.resize_for(args.image_size), args.image_size, "resized_crop")

    with Run(options.run_folder(args, "webvision"), args, runtime, logs.WEBVISION) as run:
        lists = {"train": data.train, "val": data.val, "imagenet": data.imagenet}
        split = splits.split(lists, run, args.skip_bad_images, val_fraction=args.val_fraction)
        reading = {"workers": args.workers, "cache_dir": args.cache_dir}
        with Pipeline(split.lists, views, data.mean, data.std, runtime, **reading) as pipeline:
            if args.cache_dir:
                with run.phase("cache") as phase:
                    pipeline.build_cache(phase.bar)
            train = pipeline.images("train", split.train)
            tests = {"test": pipeline.images("val"), "imagenet": pipeline.images("imagenet")}
            held_out = {"val": pipeline.images("train", split.held_out)} if len(split.held_out) else {}
            nets = options.build_networks(args, runtime, run.begun)
            optimizers = [runtime.optimizer(net, args.lr, PAPER.weight_decay) for net in nets]
            mixtures = [Mixture(args.p_threshold, division=args.division) for _ in nets]
            mixmatch = options.mixmatch(args, unlabeled_loss=False, conf_penalty=PAPER.conf_penalty)
            summary = {"classes": data.class_names, **{name: len(images) for name, images in split.lists.items()}}
            preparation = Preparation(data.mean, data.std, views.crop, views.resize)
            model = Description(args.arch, args.num_class, args.width, data.class_names, preparation).as_dict()
            lines = [*split.lines, *notes]
            run.start(argv, nets, optimizers, mixtures, mixmatch, data=summary, model=model, lines=lines)

            for epoch in run.epochs(args.num_epochs):
                lr = set_learning_rate(optimizers, args.lr if epoch < args.lr_drop else args.lr / 10)

                # W = GMM(X, Y, theta): both networks divide the samples before either is trained.
                divisions = [None, None]
                if epoch >= mixmatch.warm_up:
                    divisions = co_divide(nets, [train, train], mixtures, run.phase, run.probabilities.add)

                # Net 1 learns from net 2's division, then net 2 from net 1's with the updated net 1 as its peer.
                losses = []
                for k, net in enumerate(nets):
                    division, peer = divisions[1 - k], nets[1 - k]
                    if division is None:  # warm-up, or the other network found no clean sample
                        losses.append(warmup_epoch(net, optimizers[k], train, mixmatch, run.phase("warmup", k)))
                    else:
                        phase = run.phase("train", k)
                        losses.append(train_epoch(net, peer, optimizers[k], train, division, mixmatch, phase))

                accuracy = test(nets, tests, run.phase, ks=(1, 5)) | test(nets, held_out, run.phase)
                run.end_epoch(lr, divisions, losses, accuracy)

            return finish(run, args, train, held_out.get("val"))


def finish(
    run: Run, args: argparse.Namespace, train: StreamedImages, held_out: StreamedImages | None
) -> dict[str, Any]:
    """Print the best epoch's accuracies and the paper's, score the labels, and return the final metrics."""
    best, paper = run.records[run.best_epochs[0]], PAPER.results

    def accuracies(record: dict[str, float]) -> str:
        webvision = f"WebVision {record['test_acc']:.2f} ({record['test_acc_top5']:.2f})"
        return f"{webvision}, ILSVRC12 {record['imagenet_acc']:.2f} ({record['imagenet_acc_top5']:.2f})"

    last10 = f"mean of the last 10 {run.records[-1]['last10_acc']:.2f}"
    differences = defaults.difference_note(args, PAPER.setting)
    line = f"best epoch {best['epoch']}: {accuracies(best)}; {last10}; paper: {accuracies(paper)}{differences}"
    final = run.finish(line, train, held_out, **{f"paper_{name}": value for name, value in paper.items()})
    report.of_finished(run)
    return final


if __name__ == "__main__":
    command_line(main)
