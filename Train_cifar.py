"""DivideMix on CIFAR-10, CIFAR-100, Fashion-MNIST and scikit-learn's digits (Algorithm 1 of the paper).

    python Train_cifar.py --data_path ./cifar-10 --r 0.5                          # CIFAR-10, 50 % symmetric (Table 1)
    python Train_cifar.py --data_path ./cifar-10 --noise_mode asym --r 0.4        # 40 % asymmetric noise (Table 2)
    python Train_cifar.py --dataset cifar100 --data_path ./cifar-100 --r 0.8      # CIFAR-100, 80 % symmetric noise
    python Train_cifar.py --noise_mode human --noise_key worse_label              # CIFAR-10N; --noise_mode idn, too
    python Train_cifar.py --dataset digits --width 16 --warm_up 8 --num_epochs 20 # no download, minutes on a CPU
    python Train_cifar.py ... --method ce                                         # plain cross-entropy, to compare
    python Train_cifar.py ... --recipe blind                                      # chosen from the data
    python Train_cifar.py ... --ablation no_refinement                            # a part left out (Table 5)
    torchrun --nproc_per_node=2 -- Train_cifar.py --r 0.5                         # two GPUs (-- shields --r)

The same command again continues the run. lambda_u, p_threshold and the loss window are the paper's for the setting
(`dividemix/recipes.py`), unless given, or chosen from the data (`dividemix/blind.py`). `main` reads from top to bottom:
data, two networks, Algorithm 1.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import dataloader_cifar
from dividemix import (
    DivideMixError,
    blind,
    deploy,
    logs,
    networks,
    noise,
    noise_file,
    noise_flags,
    options,
    recipes,
    report,
    runtime,
)
from dividemix.codivide import CoDivide
from dividemix.data import DeviceImages
from dividemix.engine import ensemble_accuracy, per_sample_loss, set_learning_rate, train_epoch, warmup_epoch
from dividemix.run import Run, folder_for, score_arrays
from dividemix.scoring import score_labels
from dividemix.seeds import draws, hold_out
from dividemix.state import restore, state_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(prog="Train_cifar.py", description="DivideMix on small images with noisy labels.")
    options.add_method(parser, batch_size=64, lr=0.02, alpha=4, num_epochs=300, lr_drop=150)
    group = parser.add_argument_group("data")
    names = ["cifar10", "cifar100", "fashionmnist", "digits"]
    group.add_argument("--dataset", choices=names, default="cifar10", help="digits come with scikit-learn")
    group.add_argument("--data_path", default="./cifar-10", help="folder of the data set's files; digits needs none")
    group.add_argument("--download", action="store_true", help="fetch and verify the data set if it is not there")
    group.add_argument(
        "--num_class", type=options.positive_int, help="refused when it contradicts the data (default: from the data)"
    )
    group.add_argument(
        "--limit_train", type=options.positive_int, metavar="N", help="train on a seeded subset of N samples"
    )
    noise_flags.add(parser)
    group = parser.add_argument_group("network and variants")
    group.add_argument("--arch", choices=networks.SMALL_IMAGES, default="preresnet18", help="both networks")
    group.add_argument("--width", type=options.positive_int, default=64, help="channels of the first stage")
    group.add_argument(
        "--method",
        choices=["dividemix", "ce"],
        default="dividemix",
        help="ce: plain cross-entropy, the same nets and schedule",
    )
    group.add_argument(
        "--ablation",
        choices=list(recipes.ABLATIONS),
        default="none",
        help="leave a part of the method out, as in the paper's Table 5",
    )
    group.add_argument(
        "--recipe",
        choices=["paper", "blind"],
        default="paper",
        help="lambda_u, p_threshold, loss_window and conf_penalty: the paper's for r and noise_mode, or blind to both",
    )
    group.add_argument(
        "--loss_window",
        type=options.positive_int,
        help="epochs of loss averaged before the mixture is fitted (default: the paper's)",
    )
    group.add_argument(
        "--conf_penalty", choices=["auto", "on", "off"], default="auto", help="in warm-up; auto: by the recipe"
    )
    options.add_run(parser)
    args = parser.parse_args(argv)
    noise_flags.resolve(parser, args)
    if args.ablation != "none" and args.method == "ce":
        parser.error(f"--ablation {args.ablation}: --method ce has no part of DivideMix to leave out; drop one of them")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue. -> the last epoch's metrics, with `run_dir` and, where the paper has this row, `paper_best`
    and `paper_last`."""
    args = parse_args(argv)
    machine = options.machine(args)
    images = machine.ranks.local_first(lambda: dataloader_cifar.load(args.dataset, args.data_path, args.download))
    if args.num_class not in (None, images.num_class):
        raise DivideMixError(
            f"--num_class {args.num_class}: {args.dataset} has {images.num_class} classes; leave it out"
        )
    args.num_class = images.num_class
    if args.limit_train and args.limit_train > len(images.train_labels):
        raise DivideMixError(f"--limit_train {args.limit_train}: there are {len(images.train_labels)} training samples")
    by_recipe = blind.CONF_PENALTY if args.recipe == "blind" else args.noise_mode == "asym"
    conf_penalty = args.conf_penalty == "on" or (
        args.conf_penalty == "auto" and by_recipe and args.method == "dividemix"
    )
    choosing = args.recipe == "blind" and args.method == "dividemix"
    ablation = recipes.ABLATIONS[args.ablation]

    variant = "ce" if args.method == "ce" else args.ablation if args.ablation != "none" else ""
    suffixes = [variant, f"seed{args.seed}" if args.seed != 123 else "", args.id]
    spec = noise_flags.spec(args)
    folder = folder_for(args.out_dir, args.run_dir, args.dataset, *spec.folder_parts, *suffixes)
    sources = images.folder, folder, args.noise_file
    wrong = machine.ranks.from_first(noise_file.wrong_share, images.train_labels, spec, *sources)
    row, recipe_lines = options.resolve_recipe(args, wrong)
    if args.ablation != "none":
        recipe_lines.insert(0, f"ablation {args.ablation}: {ablation.reading} ({ablation.paper_name})")
    with Run(folder, vars(args), args.fresh, machine.ranks) as run:
        train, validation, test, truly_clean, about = prepare_data(args, images, spec, run, machine)
        start = {"init_from": args.init_from, "seed": args.seed, "machine": machine, "begun": bool(run.state)}
        nets = networks.pair(args.arch, args.num_class, args.width, "none", **start, count=ablation.nets)
        optimizers = [machine.optimizer(net, args.lr, recipes.CIFAR_WEIGHT_DECAY) for net in nets]
        keep = blind.HISTORY if choosing else 1
        codivide = [CoDivide(args.p_threshold, args.loss_window, keep) for _ in nets]
        restore(run.state, nets, optimizers, codivide, len(train))
        run.start(
            {
                "command": ["Train_cifar.py", *(sys.argv[1:] if argv is None else argv)],
                "args": vars(args),
                "data": about,
                "model": deploy.describe(
                    args.arch, args.width, args.num_class, images.class_names, images.preparation, len(nets)
                ),
                "machine": machine.describe(),
            }
        )
        run.say(machine.describe(), *about["lines"], *recipe_lines, f"run folder {folder}")

        warmup = {"batch_size": 2 * args.batch_size, "conf_penalty": conf_penalty, "machine": machine}
        mixmatch = {
            name: getattr(args, name) for name in ("batch_size", "warm_up", "alpha", "T", "lambda_u", "num_class")
        }
        mixmatch |= {"refine": ablation.refine, "M": ablation.M, "machine": machine}
        evaluation = {"batch_size": args.eval_batch_size, "machine": machine}
        flags = {name: getattr(args, name) for name in blind.NAMES}
        about_noise = (train.labels, args.num_class, flags, machine.ranks)
        choice = blind.Choice(run.records, codivide, *about_noise) if choosing else None

        for epoch in run.epochs(args.num_epochs):
            lr = args.lr if epoch < args.lr_drop else args.lr / 10
            set_learning_rate(optimizers, lr)
            warming_up = args.method == "ce" or epoch < args.warm_up

            # W = GMM(X, Y, theta): both networks score the data before either is trained. Net 2 first, whose division
            # is needed first: on a GPU each mixture is fitted while the card goes on.
            scored, dividing = [None] * len(nets), [None] * len(nets)
            for k in reversed(range(len(nets))):
                if not warming_up or args.save_scores:
                    with run.phase("loss") as bar:
                        scored[k] = per_sample_loss(nets[k], train, bar=bar, **evaluation)
                if not warming_up:
                    with run.phase("gmm"):
                        random_state = int(draws(args.seed, "divide", epoch, k).integers(2**32))
                        fit = (scored[k].loss, truly_clean, random_state, f"net {k + 1}")
                        dividing[k] = machine.background(codivide[k], *fit)
            chosen = dict.fromkeys(blind.FIELDS) if choice else {}
            if choice and not warming_up:  # --recipe blind: what both divisions say of the noise sets lambda_u
                with run.phase("gmm"):
                    fitted = [divide() for divide in dividing]
                    chosen, news = choice.by(fitted, [scores.prediction for scores in scored])
                mixmatch["lambda_u"] = chosen["lambda_u"]
                for line in news:
                    run.say(line)

            # Co-divide: net 1 learns from net 2's division, then net 2 from net 1's with the updated net 1 as its peer.
            divisions, terms = [None] * len(nets), []
            for k, net in enumerate(nets):
                other = len(nets) - 1 - k  # k itself without co-training: its own division, and no peer
                peer = nets[other] if other != k else None
                if dividing[other]:
                    with run.phase("gmm"):
                        divisions[other] = dividing[other]()
                if divisions[other] is None:
                    with run.phase(f"warmup{k + 1}") as bar:
                        rng = draws(args.seed, "warmup", epoch, k)
                        terms.append(warmup_epoch(net, optimizers[k], train, rng=rng, bar=bar, **warmup))
                else:
                    with run.phase(f"train{k + 1}") as bar:
                        rng = draws(args.seed, "train", epoch, k)
                        step = {"epoch": epoch, "rng": rng, "bar": bar, **mixmatch}
                        terms.append(train_epoch(net, peer, optimizers[k], train, divisions[other], **step))

            with run.phase("test") as bar:
                accuracy = ensemble_accuracy(nets, test, bar=bar, **evaluation)
                held_out = ensemble_accuracy(nets, validation, **evaluation) if validation else None

            metrics = {"phase": "ce" if args.method == "ce" else "train" if any(divisions) else "warmup", "lr": lr}
            metrics |= epoch_metrics(accuracy, held_out, divisions, terms, truly_clean) | chosen
            scores = {}
            for k, found in enumerate(zip(scored, divisions, strict=True)):
                scores |= score_arrays(k, *found)
            run.end_epoch(metrics, state_of(nets, optimizers, codivide), scores, args.save_scores)

        divide = args.method == "dividemix"
        score = partial(score_labels, nets, train, codivide, seed=args.seed, divide=divide, **evaluation)
        return finish(run, row, args, images.official, None if args.no_label_scores else score)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of main


def prepare_data(
    args: argparse.Namespace,
    images: dataloader_cifar.ImageData,
    spec: noise_file.NoiseSpec,
    run: Run,
    machine: runtime.Runtime,
):
    """Noisy labels, subset and validation part on the device. -> (train, validation or None, test, truly_clean (N,)
    bool, what args.json and the first lines say of the data)."""
    given, origin = machine.ranks.from_first(
        lambda: noise_file.noisy_labels(
            *(images.train_labels, spec, images.folder, run.folder, args.noise_file),
            begun=bool(run.state),
            images=images.train_images,
        )
    )
    labels_sha256 = hashlib.sha256(given.tobytes() + images.train_labels.tobytes()).hexdigest()
    run.pin("labels_sha256", labels_sha256, f"the labels ({origin}) are not those that {run.folder} began with")

    index = np.arange(len(given))
    if args.limit_train:
        index = np.sort(draws(args.seed, "subset").permutation(index)[: args.limit_train])
    index, held_out = hold_out(index, args.val_fraction, args.seed)

    def on_device(pixels, labels):
        return DeviceImages(pixels, labels, images.mean, images.std, images.flip, machine.device, machine.ranks)

    truth = images.train_labels[index]
    run.save_labels(index=index, given=given[index], true=truth, list_given=given)
    changed = float((given[index] != truth).mean())
    lines = [
        f"{args.dataset}: {len(index)} training, {len(images.test_labels)} test images, {images.num_class} classes"
        + (f", {len(held_out)} held out with their noisy labels to select the best epoch" if len(held_out) else "")
        + (f" (official {args.dataset})" if images.official else ""),
        f"noise {spec.name}: {changed:.1%} of the training labels are wrong; {origin}",
    ]
    if args.noise_mode == "asym":
        lines.append(f"asymmetric map: {noise.asym_transition(images.num_class, args.dataset)[1]}")
    about = {
        "lines": lines,
        "classes": images.class_names,
        "train": len(index),
        "test": len(images.test_labels),
        "wrong": changed,
    }
    train = on_device(images.train_images[index], given[index])
    validation = on_device(images.train_images[held_out], given[held_out]) if len(held_out) else None
    test = on_device(images.test_images, images.test_labels)
    return train, validation, test, given[index] == truth, about


def epoch_metrics(accuracy, held_out, divisions, terms, truly_clean) -> dict[str, Any]:
    """The record of an epoch, flat."""
    metrics = {}
    for name, values in (("test_acc", accuracy), ("val_acc", held_out)):
        if values:  # of the networks together, then of each
            metrics |= {name: values[0]} | {f"{name}_net{k}": value for k, value in enumerate(values[1:], start=1)}
    metrics |= {f"auc_net{k}": division.auc if division else None for k, division in enumerate(divisions, start=1)}
    metrics |= logs.training(divisions, terms, truly_clean)
    divided = [t.unlabeled for t, division in zip(terms, divisions[::-1], strict=True) if division]
    metrics["loss_u"] = float(np.mean(divided)) if divided else None
    return metrics


def finish(
    run: Run, row, args: argparse.Namespace, official: bool, score: Callable[[Run], None] | None = None
) -> dict[str, Any]:
    """Print best and last beside the paper's row, score the labels, make the report, and return the final metrics."""
    final = {**run.records[-1], "run_dir": str(run.folder)}
    line = f"best {final['best_acc']:.2f} (epoch {run.best_epochs[0]}), mean of the last 10 {final['last10_acc']:.2f}"
    if args.method == "ce":
        line += f"; net 1 alone: best {max(record['test_acc_net1'] for record in run.records):.2f}"
    if row:
        other = recipes.setting_differences(vars(args), recipes.setting(row, args.method))
        other += [] if official else [f"not the official {args.dataset}"]
        but = f" (but this run: {', '.join(other)})" if other else ""
        paper = recipes.paper_results(row, args.method, args.ablation)
        final |= {f"paper_{name}": value for name, value in paper.items()}
        if args.method == "ce":
            line += f"; paper's cross-entropy, one net: best {row.ce_best}{but}"
        elif args.ablation == "none":
            line += f"; paper: {row.best} / {row.last}{but}"
        elif paper:
            line += f"; paper's {recipes.ABLATIONS[args.ablation].paper_name} (Table 5): best {paper['best']}{but}"
    run.say(line)
    final = run.finish(final, score)
    report.of_finished(run)
    return final


if __name__ == "__main__":
    options.command_line(main)
