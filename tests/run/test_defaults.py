"""What Train_folder.py chooses for own images, and that a flag wins."""

import pytest
import torch

import Train_folder
from dividemix import DivideMixError, networks, recipes
from dividemix.run import defaults

NAMES = ("val_fraction", "arch", "weights", "image_size", "data_mode", "batch_size", "lr", "alpha", "warm_up")
NAMES += ("num_epochs", "lr_drop", "lambda_u", "p_threshold", "loss_window", "division")


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
