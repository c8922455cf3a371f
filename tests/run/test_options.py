"""The paper's settings as data, how a run gets them, and the command line that a user of the authors' script knows."""

import argparse
import dataclasses
import re

import pytest

import Train_cifar
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
    "batch_size": 64,
    "lr": 0.02,
    "noise_mode": "sym",
    "alpha": 4,
    "lambda_u": None,
    "p_threshold": None,
    "T": 0.5,
    "num_epochs": 300,
    "lr_drop": 150,
    "r": 0.5,
    "id": "",
    "seed": 123,
    "gpuid": 0,
    "num_class": None,
    "data_path": "./cifar-10",
    "dataset": "cifar10",
    "warm_up": None,
    "loss_window": None,
    "conf_penalty": "auto",
    "device": "auto",
    "precision": "auto",
    "out_dir": "./checkpoint",
    "run_dir": None,
    "fresh": False,
    "deterministic": False,
    "no_label_scores": False,
    "no_compile": False,
    "no_graph": False,
    "eval_batch_size": 1000,
    "noise_seed": 123,  # the seed's
    "noise_file": None,
    "noise_definition": "with_self",
    "noise_key": None,
    "val_fraction": 0.0,
    "init_from": None,
    "arch": "preresnet18",
    "width": 64,
    "limit_train": None,
    "download": False,
    "save_scores": False,
    "method": "dividemix",
    "ablation": "none",
    "recipe": "paper",
}


def resolved(*flags: str) -> tuple[argparse.Namespace, dict[str, float], list[str]]:
    """-> the flags with their values, the paper's results to compare with, and the lines"""
    args = Train_cifar.parse_args(flags)
    lines = options.resolve_recipe(args)
    return args, recipes.in_paper("Train_cifar.py", vars(args))[1], lines


def test_the_recipes_are_the_papers_table():
    """Else a run that claims the paper's setting trains with another, or is compared with a number nobody published."""
    rows = {
        (row.dataset, row.mode, row.r): (
            *(row.lambda_u, row.p_threshold, row.loss_window),
            *(row.best, row.last, row.ce_best),
        )
        for row in recipes.ROWS
    }
    assert rows == PAPER
    assert len(recipes.ROWS) == len(PAPER)
    assert [recipes.warm_up(name) for name in ("cifar10", "cifar100", "fashionmnist", "digits")] == [10, 30, 10, 10]


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        (("cifar10", "sym", 0.45), ("cifar10", "sym", 0.5)),
        (("cifar10", "sym", 0.35), ("cifar10", "sym", 0.2)),  # as close to 0.5: the lower one
        (("cifar10", "sym", 0.65), ("cifar10", "sym", 0.5)),
        (("cifar10", "sym", 0.85), ("cifar10", "sym", 0.8)),
        (("cifar10", "sym", 0.0), ("cifar10", "sym", 0.2)),
        (("cifar10", "sym", 1.0), ("cifar10", "sym", 0.9)),
        (("cifar10", "asym", 0.1), ("cifar10", "asym", 0.4)),  # the same mode comes before the closer rate
        (("cifar100", "asym", 0.4), ("cifar100", "sym", 0.5)),  # CIFAR-100 has no asym row; CIFAR-10's is no substitute
        (("fashionmnist", "sym", 0.8), ("cifar10", "sym", 0.8)),
        (("fashionmnist", "asym", 0.3), ("cifar10", "asym", 0.4)),
        (("digits", "sym", 0.9), ("cifar10", "sym", 0.9)),
    ],
)
def test_a_setting_that_the_paper_lacks_takes_the_nearest_row(asked, nearest):
    """Else the user's setting silently gets values that were tuned for something far away, or is called the paper's."""
    row, exact = recipes.nearest(*asked)
    assert ((row.dataset, row.mode, row.r), exact) == (nearest, False)


@pytest.mark.parametrize(
    ("dataset", "wrong", "nearest"),
    [
        ("cifar10", 0.402, ("cifar10", "sym", 0.5)),  # worse_label: 45 % are wrong there, and 18 % at 20 %
        ("cifar10", 0.09, ("cifar10", "sym", 0.2)),  # aggre_label
        ("cifar10", 0.33, ("cifar10", "sym", 0.5)),  # nearer to 45 % than to 18 %
        ("cifar10", 0.4, ("cifar10", "sym", 0.5)),  # and not the asymmetric row of this rate
        ("cifar10", 0.95, ("cifar10", "sym", 0.9)),
        ("cifar100", 0.402, ("cifar100", "sym", 0.5)),  # noisy_label
        ("digits", 0.0, ("cifar10", "sym", 0.2)),
    ],
)
def test_noise_that_the_paper_lacks_goes_by_its_wrong_labels(dataset, wrong, nearest):
    """Else human or instance-dependent noise takes the row of an r that says something else there."""
    row, exact = recipes.nearest(dataset, "human", None, wrong)
    assert ((row.dataset, row.mode, row.r), exact) == (nearest, False)
    args = Train_cifar.parse_args(["--dataset", dataset, "--noise_mode", "human", "--noise_key", "worse_label"])
    lines = options.resolve_recipe(args, wrong)
    assert recipes.in_paper("Train_cifar.py", vars(args)) == ({}, {})  # nothing of the paper's to compare with
    name = f"{nearest[0]} sym {nearest[2]:.0%}"
    assert (
        f"p_threshold {args.p_threshold:g} (not in the paper; nearest row by {wrong:.1%} wrong labels, Table 7: {name})"
        in lines
    )


@pytest.mark.parametrize("setting", PAPER)
def test_a_setting_of_the_paper_gets_its_own_values_and_says_so(setting):
    """Else the first command that anybody runs does not reproduce the paper: the authors' own default costs 5 to 10
    points at 20 % and at asym 40 %."""
    dataset, mode, r = setting
    lambda_u, p_threshold, loss_window, best, last, _ = PAPER[setting]
    args, paper, lines = resolved("--dataset", dataset, "--noise_mode", mode, "--r", str(r))
    assert (args.lambda_u, args.p_threshold, args.loss_window) == (lambda_u, p_threshold, loss_window)
    assert args.warm_up == (30 if dataset == "cifar100" else 10)
    assert paper == {"best": best, "last": last}
    source = f"(paper, Table 7: {dataset} {mode} {round(100 * r)}%)"
    expected = [f"lambda_u {lambda_u} {source}", f"p_threshold {p_threshold} {source}", f"loss_window {loss_window}"]
    assert all(any(line.startswith(start) for line in lines) for start in expected), lines
    assert f"warm_up {args.warm_up} (paper, Sec. 4.1)" in lines


DIFFERS = "differs from the paper's setting"


def test_what_is_not_the_papers_setting_is_said_before_300_epochs_are_over():
    """A user who left out a zero, the penalty or the batch size finds out from the last line of the run."""
    _, _, lines = resolved("--r", "0.2")
    assert lines[-1] == "confidence penalty in warm-up: off (paper: only for asymmetric noise)"
    flags = ("--conf_penalty", "off", "--batch_size", "128")
    *_, penalty, other = resolved("--noise_mode", "asym", "--r", "0.4", *flags)[2]
    assert penalty == "confidence penalty in warm-up: off (given; paper: only for asymmetric noise)"
    assert other == f"{DIFFERS}: --batch_size 128 (paper: 64), --conf_penalty off (paper: auto)"
    *_, other = resolved("--r", "0.2", "--lambda_u", "25", "--T", "1", "--lr", "0.1")[2]
    assert other == f"{DIFFERS}: --lr 0.1 (paper: 0.02), --T 1 (paper: 0.5), --lambda_u 25 (paper: 0)"
    assert DIFFERS not in str(resolved("--dataset", "digits", "--width", "16")[2])  # no row of it
    assert resolved("--r", "0.2", "--method", "ce", "--alpha", "1")[2] == []  # which has no use for it
    ce = ("--method", "ce", "--recipe")
    assert resolved("--r", "0.2", *ce, "paper", "--lr", "0.1")[2] == [f"{DIFFERS}: --lr 0.1 (paper: 0.02)"]
    assert resolved("--r", "0.2", *ce, "blind")[2] == [f"{DIFFERS}: --recipe blind (paper: paper)"]
    *_, other = resolved("--r", "0.2", "--recipe", "blind", "--batch_size", "128")[2]
    assert other == f"{DIFFERS}: --batch_size 128 (paper: 64), --recipe blind (paper: paper)"


def test_other_settings_are_not_called_the_papers():
    """Else a result on digits or at 45 % would pass for one of the paper's settings and be set beside its numbers."""
    for flags in (["--dataset", "digits"], ["--r", "0.45"], ["--noise_mode", "asym", "--r", "0.5"]):
        _, paper, lines = resolved(*flags)
        assert not paper
        assert not any("(paper, Table 7" in line for line in lines)
        assert sum("not in the paper; nearest row, Table 7: cifar10" in line for line in lines) == 3, lines
    assert "warm_up 10 (as CIFAR-10)" in resolved("--dataset", "digits")[2]


def test_given_flags_win_and_are_named_as_given():
    """Else a user's own value is overridden, or the log credits the paper with it. 0 is a value, not 'not given'."""
    flags = ["--lambda_u", "0", "--p_threshold", "0.7", "--loss_window", "3", "--warm_up", "0"]
    args, paper, lines = resolved("--r", "0.9", *flags)
    assert (args.lambda_u, args.p_threshold, args.loss_window, args.warm_up) == (0, 0.7, 3, 0)
    assert paper["best"] == 76.0  # still the paper's row to compare with
    assert lines[:4] == [
        "lambda_u 0 (given; cifar10 sym 90% has 50)",
        "p_threshold 0.7 (given; cifar10 sym 90% has 0.6)",
        "loss_window 3 (given; cifar10 sym 90% has 5)",
        "warm_up 0 (given; cifar10 sym 90% has 10)",
    ]


def test_flags_and_defaults_are_the_documented_ones():
    """Else a command from the paper's time, or from the README, means something else here."""
    workers = {"workers": min(16, runtime.available_cores())}
    assert vars(Train_cifar.parse_args([])) == DEFAULTS | workers


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 0.7), ("T", 0.3), ("lambda_u", 11.0), ("warm_up", 3), ("batch_size", 8), ("num_class", 5)],
)
def test_every_flag_that_is_a_field_of_mixmatch_is_in_it(name, value):
    """Else a flag is accepted, saved and reported, and has no effect."""
    args = Train_cifar.parse_args(["--num_class", "10", f"--{name}", str(value)])
    options.resolve_recipe(args)
    mixmatch = options.mixmatch(args, conf_penalty=False, views=1)
    assert (getattr(mixmatch, name), mixmatch.views) == (value, 1)
    assert getattr(options.mixmatch(args, conf_penalty=False, **{name: 2}), name) == 2  # what a script says wins


def test_a_new_hyper_parameter_reaches_the_engine(monkeypatch):
    """Else a fourth place has to be changed for it, which nobody is told of."""
    more = dataclasses.make_dataclass("More", [("new", float, 1.0)], bases=(MixMatch,), frozen=True)
    monkeypatch.setattr(options, "MixMatch", more)
    assert options.mixmatch(argparse.Namespace(num_class=10, new=3.0, seed=1), conf_penalty=False) == more(10, new=3.0)


def test_the_authors_long_name_of_the_learning_rate_works():
    """Else the authors' own commands (`--learning_rate`) are refused."""
    assert Train_cifar.parse_args(["--learning_rate", "0.1"]).lr == 0.1


def test_the_noise_seed_follows_the_seed_unless_given():
    """Else `--seed 7` alone would keep the labels of seed 123, or `--noise_seed` could not hold the labels fixed."""
    assert Train_cifar.parse_args(["--seed", "7"]).noise_seed == 7
    assert Train_cifar.parse_args(["--seed", "7", "--noise_seed", "0"]).noise_seed == 0


def test_help_lists_every_flag_with_underscores_only(capsys):
    """Else --help crashes or hides a flag, or a flag is spelt with dashes, unlike all the others."""
    with pytest.raises(SystemExit) as caught:
        Train_cifar.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    flags = set(re.findall(r"(?<!\S)--[\w-]+", shown))
    assert {f"--{name}" for name in DEFAULTS} <= flags
    assert not [flag for flag in flags if "-" in flag[2:]]


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


def test_help_shows_each_default_once_and_no_none(capsys):
    """'(default: None)' beside a value that the paper decides would send users to the source."""
    with pytest.raises(SystemExit):
        Train_cifar.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in text
    assert "default: False" not in text
    assert "(default: the paper's)" in text
    assert "(default: 64)" in text and "which CUDA card (default: 0)" in text
    assert ") (default" not in text


# ---- The scripts for large images ----


def image_parser(recipe: recipes.ImageRecipe, **more) -> options.Parser:
    parser = options.Parser(prog="Train_images.py")
    options.add_method(parser, **recipe.method)
    options.add_images(parser, **recipe.images, data_path="./images", **more)
    options.add_run(parser, id="clothing1m", val_fraction=False, eval_batch_size=200)
    return parser


def test_large_image_recipes_are_the_papers():
    """Typed from FIDELITY.md, sections 4 and 6. Else the defaults train something else than what the paper reports, or
    are compared with a number nobody published."""
    both = {"batch_size": 32, "lr_drop": 40, "num_epochs": 80, "warm_up": 1}
    both |= {"alpha": 0.5, "lambda_u": 0, "p_threshold": 0.5}
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


def test_flags_of_the_scripts_for_large_images():
    """Else a default differs from the documented one, or a flag is accepted by a script that has no use for it."""
    args = vars(image_parser(recipes.CLOTHING1M, keep_images=True).parse_args([]))
    expected = recipes.CLOTHING1M.method | recipes.CLOTHING1M.images
    expected |= {"width": 64, "eval_batch_size": 200, "id": "clothing1m", "keep_images": "auto"}
    expected |= {"check_data": None, "skip_bad_images": None, "weights": None}
    assert {name: args[name] for name in expected} == expected
    assert not {"val_fraction", "cache_dir", "loss_window"} & args.keys()
    web = image_parser(recipes.WEBVISION, cache_dir=True)
    args = web.parse_args(["--check_data", "--skip_bad_images", "full", "--cache_dir", "cache"])
    assert (args.check_data, args.skip_bad_images, args.cache_dir) == ("quick", "full", "cache")
    for flags in (["--num_batches", "3"], ["--keep_images", "no"], ["--check_data", "half"]):
        with pytest.raises(SystemExit):
            web.parse_args(flags)


def test_help_of_a_script_for_large_images_names_its_own_defaults(capsys):
    """Else --help sends users to a table of the paper that has no row for this data."""
    with pytest.raises(SystemExit):
        image_parser(recipes.CLOTHING1M).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the paper's)" not in text and "default: None" not in text and ") (default" not in text
    assert (
        "(default: resnet50)" in text
        and "(default: imagenet for resnet50" in text
        and "(default: 1)" in text
        and "accepted and without effect" in text
    )


def test_lambda_u_without_effect_is_said():
    """Else somebody tunes --lambda_u on Clothing1M for a week."""
    parser, recipe = image_parser(recipes.CLOTHING1M), recipes.CLOTHING1M
    for flags in ([], ["--lambda_u", "0"]):
        assert options.resolve_images(parser.parse_args(flags), recipe) == []
    (line,) = options.resolve_images(parser.parse_args(["--lambda_u", "25"]), recipe)
    assert line.startswith("--lambda_u 25")


@pytest.mark.parametrize(
    ("flags", "weights"),
    [([], "imagenet"), (["--arch", "preresnet18"], "none"), (["--weights", "none"], "none"), (["--weights", "x"], "x")],
)
def test_weights_follow_the_network_unless_given(flags, weights):
    """Else every --arch but the paper's is refused until the user finds out about --weights none, or the paper's starts
    from random weights and ends ten points lower."""
    args = image_parser(recipes.CLOTHING1M).parse_args(flags)
    options.resolve_images(args, recipes.CLOTHING1M)
    assert args.weights == weights


def test_the_papers_number_stands_beside_its_own_setting():
    """WebVision's number is of 100 epochs, the default 80: else the two are compared without a word, or it is said when
    the 80 are over."""
    parser, recipe = image_parser(recipes.WEBVISION), recipes.WEBVISION
    for flags, other in (
        ([], "--lr_drop 40 (paper: 50), --num_epochs 80 (paper: 100)"),
        (["--num_epochs", "100", "--lr_drop", "50", "--lambda_u", "0"], ""),
        (["--num_epochs", "100", "--lr_drop", "50", "--lambda_u", "9", "--T", "1"], "--T 1 (paper: 0.5)"),
    ):
        args = parser.parse_args(flags)
        assert options.resolve_images(args, recipe)[-1:] == ([f"{DIFFERS}: {other}"] if other else [])
        assert options.difference_note(args, recipe.setting) == (f" (but this run: {other})" if other else "")


def test_a_new_hyper_parameter_is_compared_with_the_papers_setting():
    """Else a run of a changed method stands beside the paper's number without a word. `views` has no flag yet."""
    for script, args in (
        ("Train_cifar.py", {"dataset": "cifar10", "noise_mode": "sym", "r": 0.2}),
        ("Train_clothing1M.py", {}),
        ("Train_webvision.py", {}),
    ):
        setting, _ = recipes.in_paper(script, args)
        assert recipes.setting_differences(args | {"views": 3}, setting) == ["--views 3 (paper: 2)"]
        assert recipes.setting_differences(args | {"views": 2}, setting) == []


def test_setting_differences_from_a_setting_are_written_as_flags():
    """Else the paper's number stands beside a run of another setting without a word."""
    args = image_parser(recipes.CLOTHING1M).parse_args(["--arch", "preresnet18", "--lr", "0.1"])
    args.weights = "imagenet"
    assert recipes.setting_differences(vars(args), recipes.CLOTHING1M.method) == ["--lr 0.1 (paper: 0.002)"]
    assert recipes.setting_differences(vars(args), recipes.CLOTHING1M.images) == [
        "--arch preresnet18 (paper: resnet50)"
    ]


def test_lines_of_several_ranks_say_whose_they_are(monkeypatch, capsys):
    """Else eight ranks' errors cannot be told apart."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as caught:
        Train_cifar.parse_args(["--r", "2"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("rank 3: Train_cifar.py: error: argument --r")
