"""DivideMix on Clothing1M: a million shop photos, about 39 % of their labels wrong (Sec. 4.2, Table 3 of the paper).

    python Train_clothing1M.py --data_path ../../Clothing1M/data                # the paper's setting: 74.76 %
    python Train_clothing1M.py --data_path ../../Clothing1M/data --check_data   # is everything there?

The same command again continues the run. An epoch is not a pass over all images: each network draws a class-balanced
sample, scores it and divides it, and the other network learns from that.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import dataloader_clothing1M
from dataloader_clothing1M import balanced_sample
from dividemix import DivideMixError, recipes, report
from dividemix.codivide import Mixture
from dividemix.data import Pipeline, StreamedImages, Views, check
from dividemix.engine import Phase, co_divide, test, train_epoch, warmup_epoch
from dividemix.networks import load_weights
from dividemix.run import Description, Preparation, Run, command_line, defaults, logs, options, splits
from dividemix.runtime import set_learning_rate

PAPER = recipes.CLOTHING1M


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    examples = "--data_path ~/Clothing1M/data --check_data", "--data_path ~/Clothing1M/data"
    title = "DivideMix on Clothing1M."
    common = "data_path", "check_data", "num_epochs", "seed", "id"
    parser = options.Parser(prog="Train_clothing1M.py", description=title, examples=examples, common=common)
    options.add_method(parser, **PAPER.method)
    options.add_images(parser, **PAPER.images, data_path="../../Clothing1M/data", keep_images=True)
    options.add_run(parser, id="clothing1m", val_fraction=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue a run. Returns the last epoch's metrics with `test_acc`, `test_acc_net1`, `test_acc_net2`,
    `run_dir` and `paper_test_acc`; {} after --check_data."""
    args = parse_args(argv)
    notes = defaults.resolve_images(args, PAPER)
    if args.num_class != dataloader_clothing1M.NUM_CLASS:
        raise DivideMixError(f"--num_class {args.num_class}: Clothing1M has {dataloader_clothing1M.NUM_CLASS} classes")
    if args.num_batches * args.batch_size < 2:
        raise DivideMixError("--num_batches 1 --batch_size 1: a sample of 1 image; a division needs 2 or more")
    if args.check_data:
        lists_and_problems = dataloader_clothing1M.find(args.data_path)
        check.run_check(*lists_and_problems, full=args.check_data == "full", skip=bool(args.skip_bad_images))
        return {}
    runtime = options.start_runtime(args)
    data = dataloader_clothing1M.load(args.data_path)
    views = Views(PAPER.resize_for(args.image_size), args.image_size, "crop")
    sample_size = args.num_batches * args.batch_size  # twice as large in a warm-up epoch

    with Run(options.run_folder(args), args, runtime, logs.CLOTHING1M) as run:
        lists = {"train": data.train, "val": data.val, "test": data.test}
        split = splits.split(lists, run, args.skip_bad_images)
        reading = {"workers": args.workers, "keep": args.keep_images}
        with Pipeline(split.lists, views, data.mean, data.std, runtime, **reading) as pipeline:
            val, tests = {"val": pipeline.images("val")}, {"test": pipeline.images("test")}
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

                # W = GMM(X, Y, theta): each network draws and divides a sample of its own before either is trained.
                divisions, samples = [None, None], [None, None]
                if epoch >= mixmatch.warm_up:
                    samples = [draw(pipeline, sample_size, run.phase("sample", k), keep=True) for k in range(2)]
                    divisions = co_divide(nets, samples, mixtures, run.phase)

                # Net 1 learns from net 2's sample and division, then net 2 from net 1's with the updated net 1 as peer.
                losses = []
                for k, net in enumerate(nets):
                    division, peer = divisions[1 - k], nets[1 - k]
                    if division is None:  # warm-up, or the other network found no clean sample
                        sample = draw(pipeline, 2 * sample_size, run.phase("warmup sample", k))
                        losses.append(warmup_epoch(net, optimizers[k], sample, mixmatch, run.phase("warmup", k)))
                    else:
                        phase = run.phase("train", k)  # a variable for the sample would keep its images in memory
                        losses.append(train_epoch(net, peer, optimizers[k], samples[1 - k], division, mixmatch, phase))

                rows = [split.index[sample.index] if sample else None for sample in samples]
                run.end_epoch(lr, divisions, losses, test(nets, val, run.phase), rows)

            # The test is of each network as it was at its best epoch on the validation set.
            load_weights(nets, run.best_networks(), "best.pt")
            return finish(run, args, test(nets, tests, run.phase), pipeline.images("train"))


def draw(pipeline: Pipeline, n: int, phase: Phase, keep: bool = False) -> StreamedImages:
    """One network's sample for an epoch: n training images, or fewer, with the classes balanced."""
    images = pipeline.lists["train"]
    return pipeline.images("train", balanced_sample(images.labels, n, images.num_class, phase.rng), keep=keep)


def finish(run: Run, args: argparse.Namespace, accuracy: dict[str, float], train: StreamedImages) -> dict[str, Any]:
    """Print the test accuracy and the paper's, score the labels, and return the final metrics."""
    paper, epochs = PAPER.results["test_acc"], " and ".join(map(str, run.best_epochs))
    line = (
        f"test {accuracy['test_acc']:.2f} (nets {logs.pair(accuracy, 'test_acc', '.2f')}, of epochs {epochs}, chosen "
        f"on the clean validation set); paper: {paper}{defaults.difference_note(args, PAPER.setting)}"
    )
    final = run.finish(line, train, paper_test_acc=paper, **accuracy)
    report.of_finished(run)
    return final


if __name__ == "__main__":
    command_line(main)
