"""DivideMix on CIFAR-10, CIFAR-100, Fashion-MNIST and scikit-learn's digits (Algorithm 1 of the paper).

    python Train_cifar.py --data_path ./cifar-10 --r 0.5                          # CIFAR-10, 50 % symmetric (Table 1)
    python Train_cifar.py --data_path ./cifar-10 --noise_mode asym --r 0.4        # 40 % asymmetric noise (Table 2)
    python Train_cifar.py --dataset cifar100 --data_path ./cifar-100 --r 0.8      # CIFAR-100, 80 % symmetric noise
    python Train_cifar.py --noise_mode human --noise_key worse_label              # CIFAR-10N; --noise_mode idn, too
    python Train_cifar.py --dataset digits --width 16 --warm_up 8 --num_epochs 20 # no download, minutes on a CPU
    python Train_cifar.py ... --method ce                                         # plain cross-entropy, to compare
    python Train_cifar.py ... --recipe blind                                      # settings chosen from the data
    python Train_cifar.py ... --ablation no_refinement                            # without label refinement (Table 5)
    python Train_cifar.py ... --augment strong                                    # beyond the paper: strong views

The same command again continues the run. The defaults of lambda_u, p_threshold and loss_window are the paper's for this
noise (`dividemix/recipes.py`); with --recipe blind they are chosen from the data (`dividemix/blind.py`). `main` reads
from top to bottom: data, two networks, Algorithm 1.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import dataloader_cifar
from dividemix import recipes, report
from dividemix.engine import co_divide, test, train_epoch, warmup_epoch
from dividemix.run import Description, Run, command_line, defaults, logs, options
from dividemix.runtime import set_learning_rate


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        prog="Train_cifar.py",
        description="DivideMix on small images with noisy labels.",
        examples=["--data_path ./cifar-10 --download --r 0.5", "--dataset digits --width 16 --num_epochs 20"],
        common=["dataset", "data_path", "download", "noise_mode", "r"],
    )
    options.add_method(parser, batch_size=64, lr=0.02, alpha=4, num_epochs=300, lr_drop=150, division="global")
    options.add_small_images(parser)
    options.add_run(parser)
    args = parser.parse_args(argv)
    defaults.resolve_noise(parser, args)
    if args.ablation != "none" and args.method == "ce":
        parser.error(f"--ablation {args.ablation}: --method ce has no part of DivideMix to leave out; drop one of them")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue a run. Returns the last epoch's metrics with `run_dir` and, where the paper has a result for
    this setting, `paper_best` and `paper_last`."""
    args = parse_args(argv)
    options.refuse_ranks("Train_cifar.py")
    runtime = options.start_runtime(args)
    images = dataloader_cifar.load(args.dataset, args.data_path, args.download)
    setting = defaults.resolve_small_images(args, images.train_labels, images.num_class, images.folder)
    ablation = setting.ablation

    with Run(setting.folder, args, runtime, logs.CIFAR) as run:
        train, tests, summary, lines = dataloader_cifar.noisy_sets(
            images, setting.noise, run, args.limit_train, args.val_fraction, args.noise_file, args.augment == "strong"
        )
        nets = options.build_networks(args, runtime, run.begun, count=ablation.nets)
        optimizers = [runtime.optimizer(net, args.lr, recipes.CIFAR_WEIGHT_DECAY) for net in nets]
        mixtures = options.mixtures(args, len(nets))
        warm_up = math.inf if args.method == "ce" else args.warm_up
        mixmatch = options.mixmatch(
            args, warm_up=warm_up, conf_penalty=setting.conf_penalty, refine=ablation.refine, views=ablation.views
        )
        shape = args.arch, args.num_class, args.width
        model = Description(*shape, images.class_names, images.preparation, len(nets)).as_dict()
        run.start(argv, nets, optimizers, mixtures, mixmatch, data=summary, model=model, lines=[*lines, *setting.lines])
        choice = options.blind_choice(args, run, mixtures, train)

        for epoch in run.epochs(args.num_epochs):
            lr = set_learning_rate(optimizers, args.lr if epoch < args.lr_drop else args.lr / 10)

            # W = GMM(X, Y, theta): both networks divide the samples before either is trained.
            divisions = [None] * len(nets)
            if epoch >= mixmatch.warm_up:
                divisions = co_divide(nets, [train] * len(nets), mixtures, run.phase, run.probabilities.add)
                if choice:
                    mixmatch = choice.update(divisions, mixmatch)

            # Net 1 learns from net 2's division, then net 2 from net 1's with the updated net 1 as its peer. Without
            # co-training there is one network: it learns from its own division, and is its own peer.
            losses = []
            for k, net in enumerate(nets):
                division, peer = divisions[-1 - k], nets[-1 - k]
                if division is None:  # warm-up, or the other network found no clean sample
                    losses.append(warmup_epoch(net, optimizers[k], train, mixmatch, run.phase("warmup", k)))
                else:
                    phase = run.phase("train", k)
                    losses.append(train_epoch(net, peer, optimizers[k], train, division, mixmatch, phase))

            accuracy = test(nets, tests, run.phase)
            run.end_epoch(lr, divisions, losses, accuracy | (choice.record if choice else {}))

        line, paper = defaults.compare_with_paper(args, run.records, run.best_epochs[0], images.official)
        final = run.finish(line, train, tests.get("val"), **paper)
        report.of_finished(run)
        return final


if __name__ == "__main__":
    command_line(main)
