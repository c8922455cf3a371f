"""DivideMix on Clothing1M: a million shop photos, about 39 % of their labels wrong (Sec. 4.2, Table 3 of the paper).

    python Train_clothing1M.py --data_path ../../Clothing1M/data                        # the paper's setting: 74.76 %
    torchrun --nproc_per_node=2 Train_clothing1M.py --data_path ../../Clothing1M/data   # the same batch on two GPUs
    python Train_clothing1M.py --data_path ../../Clothing1M/data --check_data           # is everything there?

The same command again continues the run. An epoch is no pass over the million: after each epoch each network draws its
own class-balanced sample, scores it and divides it, and in the next one the other network learns from that. Validated
on the clean validation set every epoch; the test takes each network as it was at its own best epoch. `main` reads from
top to bottom: data, two networks, Algorithm 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import dataloader_clothing1M
from dataloader_clothing1M import balanced_sample
from dividemix import DivideMixError, check_data, deploy, logs, networks, options, recipes, report
from dividemix.codivide import CoDivide
from dividemix.engine import ensemble_accuracy, per_sample_loss, set_learning_rate, train_epoch, warmup_epoch
from dividemix.images import Preparation, Views
from dividemix.run import Run, folder_for, score_arrays
from dividemix.scoring import score_labels
from dividemix.seeds import draws, hold_out
from dividemix.state import load_weights, restore, state_of
from dividemix.stream import Pipeline, StreamedImages

PAPER = recipes.CLOTHING1M


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(prog="Train_clothing1M.py", description="DivideMix on Clothing1M.")
    options.add_method(parser, **PAPER.method)
    options.add_images(parser, **PAPER.images, data_path="../../Clothing1M/data", keep_images=True)
    options.add_run(parser, id="clothing1m", val_fraction=False, eval_batch_size=200)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue. -> the last epoch's metrics with test_acc, test_acc_net1 and _net2, `run_dir` and
    `paper_test_acc`. After --check_data: {}."""
    args = parse_args(argv)
    notes = options.resolve_images(args, PAPER)
    if args.num_class != dataloader_clothing1M.NUM_CLASS:
        raise DivideMixError(f"--num_class {args.num_class}: Clothing1M has {dataloader_clothing1M.NUM_CLASS} classes")
    if args.num_batches * args.batch_size < 2:
        raise DivideMixError("--num_batches 1 --batch_size 1: a sample of 1 image; a division needs 2 or more")
    if args.check_data:
        found = dataloader_clothing1M.find(args.data_path)
        check_data.run_check(found, full=args.check_data == "full", skip=bool(args.skip_bad_images))
        return {}
    machine = options.machine(args)
    data = dataloader_clothing1M.load(args.data_path)
    folder = folder_for(
        args.out_dir, args.run_dir, args.id or "clothing1m", f"seed{args.seed}" if args.seed != 123 else ""
    )
    views = Views(PAPER.resize_for(args.image_size), args.image_size, "crop")
    preparation = Preparation(data.mean, data.std, views.crop, views.resize)
    streams = {"workers": args.workers, "ranks": machine.ranks, "keep": args.keep_images}

    with Run(folder, vars(args), args.fresh, machine.ranks, logs.CLOTHING1M, logs.by_network) as run:
        lists = {"train": data.train, "val": data.val, "test": data.test}
        digests = {name: images.digest() for name, images in lists.items()}
        run.pin(
            "images_sha256", digests, f"the lists of images in {args.data_path} are not those that {folder} began with"
        )
        index, lines = check_data.usable(lists, args.skip_bad_images, folder / "skipped.json", machine.ranks)
        hold_out(index["train"], 0, args.seed)  # nothing; but too few images are refused
        with Pipeline(lists, views, data.mean, data.std, machine.device, **streams) as pipeline:
            validation, test = (pipeline.images(name, index[name]) for name in ("val", "test"))
            start = {"init_from": args.init_from, "seed": args.seed, "machine": machine, "begun": bool(run.state)}
            nets = networks.pair(args.arch, args.num_class, args.width, args.weights, **start)
            optimizers = [machine.optimizer(net, args.lr, PAPER.weight_decay) for net in nets]
            codivide = [CoDivide(args.p_threshold) for _ in nets]
            restore(run.state, nets, optimizers, codivide)
            samples = [None, None]
            for k, sample in enumerate(run.state.get("samples", samples)):
                if sample is not None:  # drawn and divided after the last epoch; its images are read once more
                    sound = np.isin(sample, index["train"])  # but for those that are left out from now on
                    codivide[k].select(sound)
                    samples[k] = pipeline.images("train", sample.numpy()[sound], keep=True)
            divisions = [part.division for part in codivide]
            about = {"classes": data.class_names, **{name: len(rows) for name, rows in index.items()}}
            run.start(
                {
                    "command": ["Train_clothing1M.py", *(sys.argv[1:] if argv is None else argv)],
                    "args": vars(args),
                    "data": about,
                    "model": deploy.describe(args.arch, args.width, args.num_class, data.class_names, preparation),
                    "machine": machine.describe(),
                }
            )
            noisy = lists["train"]
            given = noisy.labels[index["train"]]
            run.save_labels(index=index["train"], given=given, list_given=noisy.labels, list_path=noisy.names())
            run.say(machine.describe(), *lines, *notes, f"run folder {folder}")

            warmup = {"batch_size": 2 * args.batch_size, "conf_penalty": PAPER.conf_penalty, "machine": machine}
            mixmatch = {name: getattr(args, name) for name in ("batch_size", "warm_up", "alpha", "T", "num_class")}
            mixmatch |= {"lambda_u": 0.0, "unlabeled_loss": False, "machine": machine}
            evaluation = {"batch_size": args.eval_batch_size, "machine": machine}

            for epoch in run.epochs(args.num_epochs):
                lr = args.lr if epoch < args.lr_drop else args.lr / 10
                set_learning_rate(optimizers, lr)

                # Co-divide: net 1 learns from the sample that net 2 drew and divided at the end of the last epoch, then
                # net 2 from net 1's with the updated net 1 as its peer.
                terms = []
                for k, (net, peer) in enumerate([nets, nets[::-1]]):
                    if divisions[1 - k] is None:
                        with run.phase(f"warmup{k + 1}") as bar:
                            size = 2 * args.num_batches * args.batch_size
                            rng = draws(args.seed, "warmup sample", epoch, k)
                            sample = draw(pipeline, index["train"], size, args.num_class, rng)
                            rng = draws(args.seed, "warmup", epoch, k)
                            terms.append(warmup_epoch(net, optimizers[k], sample, rng=rng, bar=bar, **warmup))
                    else:
                        if samples[1 - k].unread:  # after a restart; else they were read to be scored
                            with run.phase("read") as bar:
                                samples[1 - k].fetch(bar)
                        with run.phase(f"train{k + 1}") as bar:
                            step = {"epoch": epoch, "rng": draws(args.seed, "train", epoch, k), "bar": bar, **mixmatch}
                            terms.append(
                                train_epoch(net, peer, optimizers[k], samples[1 - k], divisions[1 - k], **step)
                            )
                with run.phase("val") as bar:
                    accuracy = ensemble_accuracy(nets, validation, bar=bar, **evaluation)
                metrics = {"phase": "train" if any(divisions) else "warmup", "lr": lr}
                metrics |= dict(zip(("val_acc", "val_acc_net1", "val_acc_net2"), accuracy, strict=True))
                metrics |= logs.training(divisions, terms)

                # W = GMM(X, Y, theta) for the next epoch, of a fresh sample of each network's own. Net 2 first: on a
                # GPU its mixture is fitted while the card scores for net 1.
                scores = {}
                if epoch + 1 >= args.warm_up:
                    before = [sample.index if sample else None for sample in samples]
                    samples, scored, dividing = [None, None], [None, None], [None, None]  # their memory is needed
                    for k in (1, 0):
                        with run.phase("loss") as bar:
                            size = args.num_batches * args.batch_size
                            rng = draws(args.seed, "sample", epoch + 1, k)
                            samples[k] = draw(pipeline, index["train"], size, args.num_class, rng, keep=True)
                            scored[k] = per_sample_loss(nets[k], samples[k], bar=bar, **evaluation)
                        with run.phase("gmm"):
                            random_state = int(draws(args.seed, "divide", epoch + 1, k).integers(2**32))
                            fit = (scored[k].loss, None, random_state, f"net {k + 1}")
                            dividing[k] = machine.background(codivide[k].divide, *fit)
                    for k in range(2):
                        with run.phase("gmm"):
                            divisions[k], is_new = dividing[k]()
                        scores |= score_arrays(k, scored[k], divisions[k] if is_new else None, samples[k].index)
                        if not is_new:  # no sample was clean: the division before is kept, of the sample before
                            samples[k] = pipeline.images("train", before[k], keep=True)
                state = state_of(nets, optimizers, codivide)
                state["samples"] = [torch.from_numpy(sample.index) if sample else None for sample in samples]
                run.end_epoch(metrics, state, scores, args.save_scores)

            # Each network as it was at its own best epoch on the validation set
            load_weights(nets, run.best_networks(), "best.pt")
            with run.phase("test") as bar:
                accuracy = ensemble_accuracy(nets, test, bar=bar, **evaluation)
            noisy = pipeline.images("train", index["train"])
            score = partial(score_labels, nets, noisy, codivide, seed=args.seed, **evaluation)
            return finish(run, args, accuracy, None if args.no_label_scores else score)


def draw(
    pipeline: Pipeline, index: NDArray, n: int, num_class: int, rng: np.random.Generator, keep: bool = False
) -> StreamedImages:
    """About n of the training images `index`, class-balanced: one network's sample for an epoch."""
    labels = pipeline.lists["train"].labels[index]
    return pipeline.images("train", index[balanced_sample(labels, n, num_class, rng)], keep=keep)


def finish(
    run: Run, args: argparse.Namespace, accuracy: list[float], score: Callable[[Run], None] | None
) -> dict[str, Any]:
    """Print the test accuracy beside the paper's, score the labels, and return the final metrics."""
    final = {**run.records[-1], "run_dir": str(run.folder), "paper_test_acc": PAPER.results["test_acc"]}
    final |= dict(zip(("test_acc", "test_acc_net1", "test_acc_net2"), accuracy, strict=True))
    epochs = " and ".join(map(str, run.best_epochs))
    run.say(
        f"test {final['test_acc']:.2f} (nets {logs.pair(final, 'test_acc', '.2f')}, of epochs {epochs}, chosen on the "
        f"clean validation set); paper: {final['paper_test_acc']}{options.but(args, PAPER)}"
    )
    final = run.finish(final, score)
    report.of_finished(run)
    return final


if __name__ == "__main__":
    options.command_line(main)
