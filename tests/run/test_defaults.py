"""The values of flags that were not given: the paper's, and for own images those that fit the data. A flag wins."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import tiny

import Train_cifar
import Train_clothing1M
import Train_folder
import Train_webvision
from dividemix import DivideMixError, networks, recipes
from dividemix.run import defaults

# The paper's Table 7 and results, typed from the paper and not from recipes.py:
# lambda_u, p_threshold, loss_window, best, last, best of plain cross-entropy.
PAPER = {
    ("cifar10", "sym", 0.2): (0, 0.5, 1, 96.1, 95.7, 86.8),
    ("cifar10", "sym", 0.5): (25, 0.5, 1, 94.6, 94.4, 79.4),
    ("cifar10", "sym", 0.8): (25, 0.5, 1, 93.2, 92.9, 62.9),
    ("cifar10", "sym", 0.9): (50, 0.6, 5, 76.0, 75.4, 42.7),
    ("cifar10", "asym", 0.4): (0, 0.5, 1, 93.4, 92.1, 85.0),
    ("cifar100", "sym", 0.2): (25, 0.5, 1, 77.3, 76.9, 62.0),
    ("cifar100", "sym", 0.5): (150, 0.5, 1, 74.6, 74.2, 46.7),
    ("cifar100", "sym", 0.8): (150, 0.5, 1, 60.2, 59.6, 19.9),
    ("cifar100", "sym", 0.9): (150, 0.6, 5, 31.5, 31.0, 10.1),
}
DIFFERS = "differs from the paper's setting"
NAMES = ("val_fraction", "arch", "weights", "image_size", "data_mode", "batch_size", "lr", "alpha", "warm_up")
NAMES += ("num_epochs", "lr_drop", "lambda_u", "p_threshold", "loss_window", "division")


def resolved(*flags: str) -> tuple[argparse.Namespace, dict[str, float], list[str]]:
    """-> the flags with their values, the paper's results to compare with, and the lines"""
    args = Train_cifar.parse_args(flags)
    lines = defaults.resolve_recipe(args)
    return args, recipes.in_paper("Train_cifar.py", vars(args))[1], lines


# ---- The paper's rows ----


@pytest.mark.parametrize("setting", PAPER)
def test_a_setting_of_the_paper_gets_its_own_values_and_says_so(setting):
    """Else the first command that anybody runs does not reproduce the paper, or is compared with another number."""
    dataset, mode, r = setting
    lambda_u, p_threshold, loss_window, best, last, ce_best = PAPER[setting]
    args, paper, lines = resolved("--dataset", dataset, "--noise_mode", mode, "--r", str(r))
    assert (args.lambda_u, args.p_threshold, args.loss_window) == (lambda_u, p_threshold, loss_window)
    assert args.warm_up == (30 if dataset == "cifar100" else 10)
    assert paper == {"best": best, "last": last} and len(recipes.ROWS) == len(PAPER)
    row, exact = recipes.nearest(*setting)
    assert exact and recipes.paper_results(row, "ce") == {"best": ce_best}
    assert f"lambda_u {lambda_u} (paper, Table 7: {dataset} {mode} {round(100 * r)}%)" in lines
    assert DIFFERS not in str(lines)


@pytest.mark.parametrize(
    ("asked", "wrong", "nearest"),
    [
        (("cifar10", "sym", 0.45), None, ("cifar10", "sym", 0.5)),
        (("cifar10", "sym", 0.35), None, ("cifar10", "sym", 0.2)),  # as close to 0.5: the lower one
        (("cifar10", "asym", 0.1), None, ("cifar10", "asym", 0.4)),  # the same mode comes before the closer rate
        (("cifar100", "asym", 0.4), None, ("cifar100", "sym", 0.5)),  # CIFAR-10's asymmetric row is no substitute
        (("fashionmnist", "asym", 0.3), None, ("cifar10", "asym", 0.4)),
        # Human and instance-dependent noise, by the share of wrong labels: 45 % are wrong at 50 %, 18 % at 20 %
        (("cifar10", "human", None), 0.402, ("cifar10", "sym", 0.5)),
        (("cifar10", "human", None), 0.4, ("cifar10", "sym", 0.5)),  # not the asymmetric row of this rate
        (("cifar10", "human", None), 0.09, ("cifar10", "sym", 0.2)),
        (("cifar100", "human", None), 0.402, ("cifar100", "sym", 0.5)),
    ],
)
def test_a_setting_that_the_paper_lacks_takes_the_nearest_row(asked, wrong, nearest):
    """Else a setting gets values tuned for something far away, or its result is set beside the paper's numbers."""
    row, exact = recipes.nearest(*asked, wrong)
    assert ((row.dataset, row.mode, row.r), exact) == (nearest, False)
    dataset, mode, r = asked
    noise = ["--noise_key", "worse_label"] if wrong else ["--r", str(r)]
    args = Train_cifar.parse_args(["--dataset", dataset, "--noise_mode", mode, *noise])
    lines = defaults.resolve_recipe(args, wrong)
    assert recipes.in_paper("Train_cifar.py", vars(args)) == ({}, {})  # nothing of the paper's to compare with
    assert args.p_threshold == row.p_threshold
    by = f" by {wrong:.1%} wrong labels" if wrong else ""
    assert sum(f"(not in the paper; nearest row{by}, Table 7: {row.name})" in line for line in lines) == 3, lines


# ---- What is said of a setting ----


@pytest.mark.parametrize(
    ("flags", "differences"),
    [
        ("--noise_mode asym --r 0.4 --conf_penalty off", "--conf_penalty off (paper: auto)"),
        ("--r 0.2 --lambda_u 25 --T 1", "--T 1 (paper: 0.5), --lambda_u 25 (paper: 0)"),
        ("--dataset digits --width 16", ""),  # no row of it
        ("--r 0.2 --method ce --alpha 1", ""),  # which has no use for it
        ("--r 0.2 --method ce --lr 0.1", "--lr 0.1 (paper: 0.02)"),
        ("--r 0.2 --recipe blind --width 16", "--width 16 (paper: 64), --recipe blind (paper: paper)"),
    ],
)
def test_what_is_not_the_papers_setting_is_said_before_300_epochs_are_over(flags, differences):
    """A user who left out a zero, the penalty or the batch size finds out from the last line of the run."""
    lines = [line for line in resolved(*flags.split())[2] if line.startswith(DIFFERS)]
    assert lines == ([f"{DIFFERS}: {differences}"] if differences else [])


def test_confidence_penalty_in_warm_up():
    """Without it the nets fit asymmetric noise within the warm-up; elsewhere it is not the paper's method."""
    for flags, state in (
        ("", "off (paper"),
        ("--noise_mode asym", "on (paper"),
        ("--conf_penalty on", "on (given"),
        ("--noise_mode asym --conf_penalty off", "off (given"),
        ("--noise_mode idn", "off (paper"),
        ("--noise_mode asym --method ce", None),
        ("--noise_mode asym --method ce --conf_penalty on", None),
    ):
        args, _, lines = resolved(*flags.split())
        assert any(line.startswith(f"confidence penalty in warm-up: {state}") for line in lines) == bool(state)
        assert defaults.uses_conf_penalty(args) == (state.startswith("on") if state else "on" in flags.split()), flags


def test_given_flags_win_and_are_named_as_given():
    """Else a user's own value is overridden, or the log credits the paper with it. 0 is a value, not 'not given'."""
    flags = ["--lambda_u", "0", "--p_threshold", "0.7", "--loss_window", "3", "--warm_up", "0"]
    args, paper, lines = resolved("--r", "0.9", *flags)
    assert (args.lambda_u, args.p_threshold, args.loss_window, args.warm_up) == (0, 0.7, 3, 0)
    assert paper["best"] == 76.0  # still the paper's row to compare with
    starts = ["lambda_u 0 (given", "p_threshold 0.7 (given", "loss_window 3 (given", "warm_up 0 (given"]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False)), lines


def test_the_papers_number_stands_beside_its_own_setting():
    """WebVision's number is of 100 epochs, the default 80; and --lambda_u, which has no effect, is tuned for a week."""
    recipe, paper = recipes.WEBVISION, "--num_epochs 100 --lr_drop 50"
    for flags, differences in (
        ("", "--lr_drop 40 (paper: 50), --num_epochs 80 (paper: 100)"),
        (f"{paper} --lambda_u 0", ""),
        (f"{paper} --lambda_u 9 --T 1", "--T 1 (paper: 0.5)"),
    ):
        args = Train_webvision.parse_args(flags.split())
        lines = defaults.resolve_images(args, recipe)
        assert (args.lambda_u == 9) == lines[0].startswith("--lambda_u 9 ") if lines else not differences
        assert [line for line in lines if DIFFERS in line] == ([f"{DIFFERS}: {differences}"] if differences else [])
        note = defaults.difference_note(args, recipe.setting)
        assert note == (f" (but this run: {differences})" if differences else "")


def test_cifars_number_stands_bare_only_beside_the_papers_setting():
    """A short run of a narrow net beside "94.6" without a word: its user looks for a mistake that is not there."""
    for flags, official, results, expected in (
        ("", True, [94.6, 94.4], "; paper: 94.6 / 94.4"),
        ("--width 16", True, [94.6, 94.4], "94.4 (but this run: --width 16 (paper: 64))"),
        ("--lambda_u 0", False, [94.6, 94.4], "(paper: 25), not the official cifar10)"),
        ("--augment strong", True, [94.6, 94.4], "94.4 (but this run: --augment strong (paper: weak))"),
        ("--ablation divide_mixmatch --r 0.2", True, [94.1], "Divide and MixMatch (Table 5): best 94.1"),
        ("--ablation divide_mixmatch --dataset cifar100", True, [], "mean of the last 10 93.00"),  # none with a source
        ("--noise_definition exclude_self", True, [], "mean of the last 10 93.00"),
    ):
        args, *_ = resolved(*flags.split())
        line, paper = defaults.compare_with_paper(args, [{"best_acc": 94.0, "last10_acc": 93.0}] * 11, 3, official)
        assert line.startswith("best 94.00 (epoch 3), mean of the last 10 93.00") and line.endswith(expected)
        assert [*paper.values()] == results


def test_weights_follow_the_network_unless_given():
    """Else every --arch but the paper's is refused, or the paper's starts from random weights and ends points lower."""
    for flags, weights in (([], "imagenet"), (["--arch", "preresnet18"], "none"), (["--weights", "x"], "x")):
        args = Train_clothing1M.parse_args(flags)
        defaults.resolve_images(args, recipes.CLOTHING1M)
        assert args.weights == weights


def test_name_of_the_run_folder():
    """Else two different runs share a folder, or the documented paths do not exist."""
    for flags, name in (
        ([], "out/digits_0.5_sym"),
        (["--r", "0.80", "--noise_mode", "asym"], "out/digits_0.8_asym"),
        (["--method", "ce", "--seed", "7", "--id", "a"], "out/digits_0.5_sym_ce_seed7_a"),
        (["--ablation", "one_view", "--seed", "123", "--id", "try-2"], "out/digits_0.5_sym_one_view_try-2"),
        (["--run_dir", "elsewhere/run", "--id", "a"], "elsewhere/run"),
    ):
        args = Train_cifar.parse_args(tiny(Path("out"), *flags))
        assert defaults.resolve_small_images(args, np.zeros(1000, np.int64), 10, None).folder == Path(name), flags


# ---- One's own images ----


def chosen(*flags: str, n: int = 3000, side: int = 28, lists=("train",)):
    """-> (the flags' values, the recipe, the lines)"""
    args = Train_folder.parse_args(["--data_path", "x", *flags])
    recipe, lines = defaults.choose(args, n, side, lists)
    return args, recipe, lines


@pytest.mark.parametrize("flag", ["--features", "--method ce"])
def test_strong_views_that_nothing_would_see_are_refused(flag):
    """A run that is called strong and is not."""
    with pytest.raises(DivideMixError, match="--augment strong"):
        chosen("--augment", "strong", *flag.split(), side=375)


def values(args, *names: str) -> tuple:
    return tuple(getattr(args, name) for name in names)


def test_small_images_and_photos():
    """Photos would be cut down to 64 pixels, or a large network be trained from nothing on a few of them."""
    args, recipe, lines = chosen("--width", "16")  # minutes on two cores: see benchmarks/RESULTS.md
    assert values(args, "arch", "weights", "image_size", "data_mode") == ("preresnet18", "none", 32, "device")
    assert values(args, "batch_size", "lr", "alpha", "lambda_u", "p_threshold") == (16, 0.02, 4, 0, 0.5)
    assert values(args, "loss_window", "division") == (1, "per_class")
    assert values(args, "val_fraction", "warm_up", "num_epochs", "lr_drop") == (0.1, 10, 18, 16)
    assert recipe is recipes.OWN_SMALL and recipe.unlabeled_loss
    assert [line.split()[0] for line in lines] == [*NAMES]
    assert any(line.startswith("warm_up 10 (850 steps") for line in lines)
    args, recipe, _ = chosen(side=375)
    assert values(args, "arch", "weights", "image_size", "data_mode") == ("resnet50", "imagenet", 224, "stream")
    assert values(args, "batch_size", "lr", "alpha", "warm_up", "num_epochs") == (16, 0.002, 0.5, 4, 12)
    assert recipe is recipes.OWN_PRETRAINED and not recipe.unlabeled_loss
    args, recipe, _ = chosen("--arch", "inceptionresnetv2", side=375, n=73_333)
    assert values(args, "weights", "image_size", "lr", "warm_up", "num_epochs") == ("none", 299, 0.01, 1, 80)
    assert recipe is recipes.OWN_SCRATCH


def test_a_flag_wins_and_is_called_given():
    """Else somebody's setting is silently another; more --num_epochs that changed others could not continue a run."""
    flags = {"arch": "resnet18", "weights": "none", "image_size": "40", "data_mode": "stream", "batch_size": "16"}
    flags |= {"lr": "0.5", "alpha": "1.0", "warm_up": "3", "num_epochs": "7", "lr_drop": "2", "lambda_u": "25.0"}
    flags |= {"p_threshold": "0.6", "val_fraction": "0.3", "loss_window": "3", "division": "global"}
    args, _, lines = chosen(*(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert {name: str(getattr(args, name)) for name in flags} == flags
    assert len(lines) == len(flags) and all(line.endswith(" (given)") for line in lines)
    settings = [vars(chosen("--num_epochs", epochs)[0]) | {"num_epochs": 0} for epochs in ("1", "18", "300")]
    assert settings[0] == settings[1] == settings[2]


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, (8, 10, 100)), (360, (16, 10, 59)), (1500, (16, 10, 21)), (60_000, (64, 9, 91)), (600_000, (64, 1, 9))],
)
def test_sizes_of_sets(n, expected):
    """A handful of images would be a single batch an epoch, or a million take a month."""
    args, _, _ = chosen(n=n)
    assert values(args, "batch_size", "warm_up", "num_epochs") == expected
    assert 1 <= args.warm_up < args.lr_drop <= args.num_epochs
    args, _, _ = chosen(n=n, side=500)
    assert 1 <= args.warm_up <= 10 and args.num_epochs <= 80


@pytest.mark.parametrize(
    ("arch", "side", "expected"),
    [("preresnet18", 8, 32), ("preresnet18", 33, 40), ("preresnet18", 500, 64)]
    + [("resnet50", 28, 128), ("resnet50", 150, 160), ("resnet50", 500, 224), ("inceptionresnetv2", 30, 299)],
)
def test_image_size(arch, side, expected):
    """Images would lose what they show, or a network be given a size that it cannot take."""
    assert defaults.image_size(arch, side) == expected
    assert not networks.refusal(arch, expected)


def test_size_of_the_pixels_decides_where_they_are(monkeypatch):
    """A set that does not fit the card would end the run, or a small one wait for its workers; several ranks stream."""
    many = defaults.DEVICE_LIMIT // (40 * 40 * 3)
    assert chosen(n=many)[0].data_mode == "device" and chosen(n=2 * many)[0].data_mode == "stream"
    assert chosen("--data_mode", "device", side=500)[0].data_mode == "device"
    assert chosen("--image_size", "65", "--arch", "preresnet18")[0].data_mode == "stream"
    assert (defaults.resize("device", 32), defaults.resize("stream", 224)) == (32, 256)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert chosen()[0].data_mode == "stream"
    with pytest.raises(DivideMixError, match="--data_mode device"):
        chosen("--data_mode", "device")


def test_what_the_best_epoch_is_chosen_by():
    """Without held-out images there is no accuracy at all; with a test split, holding some out wastes them."""
    assert chosen(lists=("train", "test"))[0].val_fraction == chosen(lists=("train", "val"))[0].val_fraction == 0
    assert chosen("--val_fraction", "0.2", lists=("train", "test"))[0].val_fraction == 0.2


@pytest.mark.parametrize(
    ("flags", "device", "side", "grey", "features"),
    [
        ("", "cpu", 300, False, True),
        ("", "cpu", 32, False, True),
        ("", "cpu", 300, True, True),
        ("", "cpu", 64, True, False),
        ("", "cuda", 300, False, False),
        ("--features", "cuda", 28, True, True),
        ("--weights none", "cpu", 300, False, False),
        ("--arch preresnet18", "cpu", 300, False, False),
        ("--arch resnet18", "cpu", 300, False, True),
        ("--weights file.pth", "cpu", 300, False, True),
        ("--width 8", "cpu", 32, False, False),
        ("--augment strong", "cpu", 32, False, False),
    ],
)
def test_features_or_whole_networks(monkeypatch, flags, device, side, grey, features):
    """`dividemix issues` would take hours on a laptop, ask small scans of a network that knows photos, leave a card
    unused, or overrule its user."""
    monkeypatch.setattr(defaults, "pick_device", lambda *_: torch.device(device))
    args = Train_folder.parse_args(["--data_path", "x", *flags.split()])
    chosen, line = defaults.choose_features(args, side, grey)
    assert chosen == features and ("features" if features else "whole networks") in line.split(";")[0]


def test_flags_that_do_not_go_together(capsys):
    """Else the run ends in a network's traceback, after the images were read."""
    for flags, lists in (
        ("--arch resnet18 --width 16", ["train"]),
        ("--weights imagenet", ["train"]),
        ("--val_fraction 0.2", ["train", "val"]),
    ):
        with pytest.raises(DivideMixError, match=" ".join(flags.split()[-2:])):
            chosen(*flags.split(), lists=lists)
    with pytest.raises(SystemExit):
        Train_folder.parse_args(["--data_path", "x", "--arch", "resnet81"])
    error = capsys.readouterr().err
    assert "argument --arch: 'resnet81'" in error and "resnet18" in error and error.count("\n") == 1


@pytest.mark.parametrize("method", ["dividemix", "ce"])
def test_the_blind_recipe_leaves_to_the_run_what_it_chooses(method):
    """A value that is filled in would win over the choice; cross-entropy, which divides nothing, needs one."""
    args, _, lines = chosen("--recipe", "blind", "--loss_window", "3", "--method", method)
    expected = (0, 0.5, 3) if method == "ce" else (None, None, 3)
    assert values(args, "lambda_u", "p_threshold", "loss_window") == expected
    assert [line.split()[0] for line in lines] == [*NAMES] and "loss_window 3 (given)" in lines


def test_smaller_batches_do_not_change_the_number_of_steps():
    """The defaults count steps: a given batch size would train a quarter as much, or four times."""
    runs = [chosen("--batch_size", size, n=40_000)[0] for size in ("32", "128")]
    assert [args.warm_up for args in runs] == [7, 10]  # 3,900 steps are 28 epochs of the latter: too many
    small = [chosen("--batch_size", size, n=9000)[0] for size in ("8", "32")]
    steps = [(args.num_epochs - args.warm_up) * 8100 // args.batch_size for args in small]
    assert steps[0] > steps[1] > 1000  # but never fewer than 8 epochs
