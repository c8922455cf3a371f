"""The paper's settings as data, how a run gets them, and the command line that a user of the authors' script knows."""

import argparse
import dataclasses
import re

import pytest

import Train_cifar
import Train_clothing1M
import Train_webvision
from dividemix import recipes, runtime
from dividemix.engine import MixMatch
from dividemix.run import options

# The paper's Table 7 and results, typed from FIDELITY.md section 6 and not from recipes.py:
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
# DESIGN.md, "Flags": the authors' defaults and those that all scripts share. None: from the data, or the paper's.
DEFAULTS = {
    **{"batch_size": 64, "lr": 0.02, "lr_drop": 150, "num_epochs": 300, "warm_up": None, "alpha": 4, "T": 0.5},
    **{"lambda_u": None, "p_threshold": None, "loss_window": None, "conf_penalty": "auto", "recipe": "paper"},
    **{"division": "global"},
    **{"dataset": "cifar10", "data_path": "./cifar-10", "download": False, "num_class": None, "limit_train": None},
    **{"noise_mode": "sym", "r": 0.5, "noise_definition": "with_self", "noise_file": None, "noise_key": None},
    **{"noise_seed": 123, "seed": 123, "id": "", "out_dir": "./checkpoint", "run_dir": None, "fresh": False},
    **{"init_from": None, "val_fraction": 0.0, "no_label_scores": False, "save_scores": False},
    **{"arch": "preresnet18", "width": 64, "method": "dividemix", "ablation": "none"},
    **{"device": "auto", "gpuid": 0, "precision": "auto", "deterministic": False, "no_compile": False},
    **{"no_graph": False, "eval_batch_size": 1000, "workers": min(16, runtime.available_cores())},
}
DIFFERS = "differs from the paper's setting"


def resolved(*flags: str) -> tuple[argparse.Namespace, dict[str, float], list[str]]:
    """-> the flags with their values, the paper's results to compare with, and the lines"""
    args = Train_cifar.parse_args(flags)
    lines = options.resolve_recipe(args)
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
    source = f"(paper, Table 7: {dataset} {mode} {round(100 * r)}%)"
    expected = [f"lambda_u {lambda_u} {source}", f"p_threshold {p_threshold} {source}", f"loss_window {loss_window}"]
    assert all(any(line.startswith(start) for line in lines) for start in expected), lines
    assert not any(DIFFERS in line for line in lines)


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        (("cifar10", "sym", 0.45), ("cifar10", "sym", 0.5)),
        (("cifar10", "sym", 0.35), ("cifar10", "sym", 0.2)),  # as close to 0.5: the lower one
        (("cifar10", "sym", 1.0), ("cifar10", "sym", 0.9)),
        (("cifar10", "asym", 0.1), ("cifar10", "asym", 0.4)),  # the same mode comes before the closer rate
        (("cifar100", "asym", 0.4), ("cifar100", "sym", 0.5)),  # CIFAR-100 has no asym row; CIFAR-10's is no substitute
        (("fashionmnist", "asym", 0.3), ("cifar10", "asym", 0.4)),
        (("digits", "sym", 0.9), ("cifar10", "sym", 0.9)),
    ],
)
def test_a_setting_that_the_paper_lacks_takes_the_nearest_row(asked, nearest):
    """Else the user's setting silently gets values that were tuned for something far away, or a result is called the
    paper's and set beside its numbers."""
    row, exact = recipes.nearest(*asked)
    assert ((row.dataset, row.mode, row.r), exact) == (nearest, False)
    dataset, mode, r = asked
    _, paper, lines = resolved("--dataset", dataset, "--noise_mode", mode, "--r", str(r))
    assert not paper and not any("(paper, Table 7" in line for line in lines)
    assert sum(f"nearest row, Table 7: {row.name}" in line for line in lines) == 3, lines


@pytest.mark.parametrize(
    ("dataset", "wrong", "nearest"),
    [
        ("cifar10", 0.402, ("cifar10", "sym", 0.5)),  # worse_label: 45 % are wrong there, and 18 % at 20 %
        ("cifar10", 0.09, ("cifar10", "sym", 0.2)),  # aggre_label
        ("cifar10", 0.33, ("cifar10", "sym", 0.5)),  # nearer to 45 % than to 18 %
        ("cifar10", 0.4, ("cifar10", "sym", 0.5)),  # and not the asymmetric row of this rate
        ("cifar100", 0.402, ("cifar100", "sym", 0.5)),  # noisy_label
        ("digits", 0.95, ("cifar10", "sym", 0.9)),
    ],
)
def test_noise_that_the_paper_lacks_goes_by_its_wrong_labels(dataset, wrong, nearest):
    """Else human or instance-dependent noise takes the row of an r that says something else there."""
    row, exact = recipes.nearest(dataset, "human", None, wrong)
    assert ((row.dataset, row.mode, row.r), exact) == (nearest, False)
    args = Train_cifar.parse_args(["--dataset", dataset, "--noise_mode", "human", "--noise_key", "worse_label"])
    line = next(line for line in options.resolve_recipe(args, wrong) if line.startswith("p_threshold "))
    assert recipes.in_paper("Train_cifar.py", vars(args)) == ({}, {})  # nothing of the paper's to compare with
    assert args.p_threshold == row.p_threshold and f"{wrong:.1%}" in line and row.name in line


def test_large_image_recipes_are_the_papers():
    """Else the defaults train something else than the paper's, or are compared with a number nobody published."""
    both = {"batch_size": 32, "lr_drop": 40, "num_epochs": 80, "warm_up": 1}
    both |= {"alpha": 0.5, "lambda_u": 0, "p_threshold": 0.5, "division": "global"}
    clothing, web = recipes.CLOTHING1M, recipes.WEBVISION
    assert clothing.method == both | {"lr": 0.002} and web.method == both | {"lr": 0.01}
    assert (clothing.weight_decay, web.weight_decay) == (1e-3, 5e-4)
    assert (clothing.conf_penalty, web.conf_penalty) == (True, False)
    size = {"image_size": 224, "num_class": 14, "num_batches": 1000}
    assert clothing.images == {"arch": "resnet50", "weights": "imagenet"} | size
    assert web.images == {"arch": "inceptionresnetv2", "weights": "none", "image_size": 299, "num_class": 50}
    assert clothing.results == {"test_acc": 74.76}
    assert list(web.results.values()) == [77.32, 91.64, 75.20, 90.84]
    assert list(web.results) == ["test_acc", "test_acc_top5", "imagenet_acc", "imagenet_acc_top5"]
    assert (clothing.resize_for(224), web.resize_for(299), clothing.resize_for(56)) == (256, 320, 64)


# ---- What is said of a setting ----


def test_what_is_not_the_papers_setting_is_said_before_300_epochs_are_over():
    """A user who left out a zero, the penalty or the batch size finds out from the last line of the run."""
    for mode, r, conf_penalty, state in (("sym", "0.2", "auto", "off"), ("asym", "0.4", "auto", "on")):
        line = resolved("--noise_mode", mode, "--r", r, "--conf_penalty", conf_penalty)[2][-1]
        assert line.startswith(f"confidence penalty in warm-up: {state} (paper")
    flags = ("--conf_penalty", "off", "--batch_size", "128")
    *_, penalty, differences = resolved("--noise_mode", "asym", "--r", "0.4", *flags)[2]
    assert penalty.startswith("confidence penalty in warm-up: off (given; ")
    assert differences == f"{DIFFERS}: --batch_size 128 (paper: 64), --conf_penalty off (paper: auto)"
    *_, differences = resolved("--r", "0.2", "--lambda_u", "25", "--T", "1", "--lr", "0.1")[2]
    assert differences == f"{DIFFERS}: --lr 0.1 (paper: 0.02), --T 1 (paper: 0.5), --lambda_u 25 (paper: 0)"
    assert DIFFERS not in str(resolved("--dataset", "digits", "--width", "16")[2])  # no row of it
    assert resolved("--r", "0.2", "--method", "ce", "--alpha", "1")[2] == []  # which has no use for it
    ce = ("--method", "ce", "--recipe")
    assert resolved("--r", "0.2", *ce, "paper", "--lr", "0.1")[2] == [f"{DIFFERS}: --lr 0.1 (paper: 0.02)"]
    assert resolved("--r", "0.2", *ce, "blind")[2] == [f"{DIFFERS}: --recipe blind (paper: paper)"]
    *_, differences = resolved("--r", "0.2", "--recipe", "blind", "--batch_size", "128")[2]
    assert differences == f"{DIFFERS}: --batch_size 128 (paper: 64), --recipe blind (paper: paper)"


def test_given_flags_win_and_are_named_as_given():
    """Else a user's own value is overridden, or the log credits the paper with it. 0 is a value, not 'not given'."""
    flags = ["--lambda_u", "0", "--p_threshold", "0.7", "--loss_window", "3", "--warm_up", "0"]
    args, paper, lines = resolved("--r", "0.9", *flags)
    assert (args.lambda_u, args.p_threshold, args.loss_window, args.warm_up) == (0, 0.7, 3, 0)
    assert paper["best"] == 76.0  # still the paper's row to compare with
    starts = ["lambda_u 0 (given", "p_threshold 0.7 (given", "loss_window 3 (given", "warm_up 0 (given"]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False)), lines


def image_parser(recipe: recipes.ImageRecipe, **more) -> options.Parser:
    parser = options.Parser(prog="Train_images.py")
    options.add_method(parser, **recipe.method)
    options.add_images(parser, **recipe.images, data_path="./images", **more)
    options.add_run(parser, id="clothing1m", val_fraction=False, eval_batch_size=200)
    return parser


def test_the_papers_number_stands_beside_its_own_setting():
    """WebVision's number is of 100 epochs, the default 80; and --lambda_u, which has no effect, is tuned for a week."""
    parser, recipe = image_parser(recipes.WEBVISION), recipes.WEBVISION
    paper = ["--num_epochs", "100", "--lr_drop", "50"]
    for flags, differences in (
        ([], "--lr_drop 40 (paper: 50), --num_epochs 80 (paper: 100)"),
        ([*paper, "--lambda_u", "0"], ""),
        ([*paper, "--lambda_u", "9", "--T", "1"], "--T 1 (paper: 0.5)"),
    ):
        args = parser.parse_args(flags)
        first, lines = ["--lambda_u 9"] * (args.lambda_u > 0), options.resolve_images(args, recipe)
        assert lines[len(first) :] == ([f"{DIFFERS}: {differences}"] if differences else [])
        assert [line[:12] for line in lines[: len(first)]] == first
        assert options.difference_note(args, recipe.setting) == (
            f" (but this run: {differences})" if differences else ""
        )


def test_weights_follow_the_network_unless_given():
    """Else every --arch but the paper's is refused, or the paper's starts from random weights and ends points lower."""
    for flags, weights in (([], "imagenet"), (["--arch", "preresnet18"], "none"), (["--weights", "x"], "x")):
        args = image_parser(recipes.CLOTHING1M).parse_args(flags)
        options.resolve_images(args, recipes.CLOTHING1M)
        assert args.weights == weights


# ---- A new hyper-parameter ----


def test_a_new_hyper_parameter_reaches_the_engine_and_the_comparison(monkeypatch):
    """Else a changed method stands beside the paper's number without a word. `views` has no flag yet."""
    more = dataclasses.make_dataclass("More", [("new", float, 1.0)], bases=(MixMatch,), frozen=True)
    monkeypatch.setattr(options, "MixMatch", more)
    assert options.mixmatch(argparse.Namespace(num_class=10, new=3.0, seed=1), conf_penalty=False) == more(10, new=3.0)
    cifar = {"dataset": "cifar10", "noise_mode": "sym", "r": 0.2}
    for script, args in (("Train_cifar.py", cifar), ("Train_clothing1M.py", {}), ("Train_webvision.py", {})):
        setting, _ = recipes.in_paper(script, args)
        assert recipes.setting_differences(args | {"views": 3}, setting) == ["--views 3 (paper: 2)"]
        assert recipes.setting_differences(args | {"views": 2}, setting) == []


def test_every_flag_that_is_a_field_of_mixmatch_is_in_it():
    """Else a flag is accepted, saved and reported, and has no effect."""
    values = {"alpha": 0.7, "T": 0.3, "lambda_u": 11.0, "warm_up": 3, "batch_size": 8, "num_class": 5}
    args = Train_cifar.parse_args([word for name, value in values.items() for word in (f"--{name}", str(value))])
    options.resolve_recipe(args)
    mixmatch = options.mixmatch(args, conf_penalty=False, views=1)
    assert {name: getattr(mixmatch, name) for name in values} == values and mixmatch.views == 1
    assert options.mixmatch(args, conf_penalty=True, T=2.0).T == 2.0  # what a script says wins


# ---- The command line ----


def test_flags_and_defaults_are_the_documented_ones():
    """Else a command from the paper's time, or from the README, means something else here."""
    assert vars(Train_cifar.parse_args([])) == vars(Train_cifar.parse_args(["--seed", "123"])) == DEFAULTS
    assert Train_cifar.parse_args(["--learning_rate", "0.1"]).lr == 0.1  # the authors' long name
    assert Train_cifar.parse_args(["--seed", "7"]).noise_seed == 7
    assert Train_cifar.parse_args(["--seed", "7", "--noise_seed", "0"]).noise_seed == 0


def test_flags_of_the_scripts_for_large_images():
    """Else a default differs from the documented one, or a flag is accepted by a script that has no use for it."""
    args = vars(image_parser(recipes.CLOTHING1M, keep_images=True).parse_args([]))
    expected = recipes.CLOTHING1M.method | recipes.CLOTHING1M.images
    expected |= {"width": 64, "eval_batch_size": 200, "id": "clothing1m", "keep_images": "auto"}
    expected |= {"check_data": None, "skip_bad_images": None, "weights": None}
    assert {name: args[name] for name in expected} == expected
    assert not {"val_fraction", "cache_dir", "loss_window"} & args.keys()
    web = image_parser(recipes.WEBVISION, cache_dir=True).parse_args(["--check_data", "--skip_bad_images", "full"])
    assert (web.check_data, web.skip_bad_images, web.cache_dir) == ("quick", "full", None)
    assert not {"num_batches", "keep_images"} & vars(web).keys()


def test_help_lists_every_flag_and_each_default_once(capsys):
    """Else --help crashes, hides a flag, or sends its users to the source or to a table without a row for them."""
    for parse, some in (
        (Train_cifar.parse_args, ("(default: the paper's)", "(default: 64)", "which CUDA card (default: 0)")),
        (image_parser(recipes.CLOTHING1M).parse_args, ("(default: resnet50)", "(default: 1)")),
    ):
        with pytest.raises(SystemExit) as caught:
            parse(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert caught.value.code == 0 and all(each in text for each in some)
        assert not any(each in text for each in ("default: None", "default: False", ") (default"))
        flags = set(re.findall(r"(?<!\S)--[\w-]+", text))
        assert not [flag for flag in flags if "-" in flag[2:]]
        if parse is Train_cifar.parse_args:
            assert {f"--{name}" for name in DEFAULTS} <= flags
    assert "the paper's)" not in text


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (options.positive_int, ["1", "2147483647"], ["0", "-1", "1.5", "2147483648", "x", "", "nan", "inf"]),
        (options.count, ["0", "3"], ["-1", "0.0", "x"]),
        (options.seed, ["0", "123", str(2**32 - 1)], ["-1", str(2**32), "1.5", "1" + "0" * 400]),
        (options.positive, ["1e-9", "4"], ["0", "-0.1", "nan", "inf", "x"]),
        (options.non_negative, ["0", "150"], ["-1e-9", "nan", "inf"]),
        (options.rate, ["0", "1", "0.45"], ["-0.1", "1.1", "nan", "inf", "50%"]),
        (options.open_unit, ["0.001", "0.999"], ["0", "1", "nan"]),
        (options.fraction, ["0", "0.999"], ["-0.1", "1", "nan"]),
        (options.run_id, ["", "a", "try_2.b-c"], ["a/b", "..//", "a b", "a\nb", "$x"]),
    ],
)
def test_ranges_of_flag_types(kind, good, bad):
    """Else a value that cannot work gets through and fails hours later, or a sound one is refused."""
    for text in good:
        kind(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            kind(text)


def test_lines_of_several_ranks_say_whose_they_are(monkeypatch, capsys):
    """Else eight ranks' errors cannot be told apart."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as caught:
        Train_cifar.parse_args(["--r", "2"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("rank 3: Train_cifar.py: error: argument --r")


def test_a_division_by_class_is_not_the_papers_setting(capsys):
    """Else a number of another method stands beside the paper's as if it were of the same."""
    for script, setting in (
        (Train_cifar, recipes.in_paper("Train_cifar.py", vars(Train_cifar.parse_args([])))[0]),
        (Train_clothing1M, recipes.CLOTHING1M.setting),
        (Train_webvision, recipes.WEBVISION.setting),
    ):
        args = script.parse_args(["--division", "per_class"])
        assert "--division per_class (paper: global)" in recipes.setting_differences(vars(args), setting)
        differences = recipes.setting_differences(vars(script.parse_args([])), setting)
        assert not any(text.startswith("--division") for text in differences)
    with pytest.raises(SystemExit):
        Train_cifar.parse_args(["--division", "classes"])
    assert "global" in capsys.readouterr().err
