"""The paper's settings as data, how a run gets them, and the command line that a user of the authors' script knows."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.scripts import tiny

import reproduce
import Train_cifar
import Train_clothing1M
import Train_folder
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
    **{"init_from": None, "val_fraction": 0.0, "no_label_scores": False, "save_scores": False, "verbose": False},
    **{"arch": "preresnet18", "width": 64, "method": "dividemix", "ablation": "none"},
    **{"device": "auto", "gpuid": 0, "precision": "auto", "deterministic": False, "no_compile": False},
    **{"augment": "weak", "ema": None},
    **{"no_graph": False, "eval_batch_size": None, "workers": min(16, runtime.available_cores())},
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
    lines = options.resolve_recipe(args, wrong)
    assert recipes.in_paper("Train_cifar.py", vars(args)) == ({}, {})  # nothing of the paper's to compare with
    assert args.p_threshold == row.p_threshold
    by = f" by {wrong:.1%} wrong labels" if wrong else ""
    assert sum(f"(not in the paper; nearest row{by}, Table 7: {row.name})" in line for line in lines) == 3, lines


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
    top5 = {"test_acc_top5": 91.64, "imagenet_acc_top5": 90.84}
    assert web.results == {"test_acc": 77.32, "imagenet_acc": 75.20} | top5
    assert (clothing.resize_for(224), web.resize_for(299), clothing.resize_for(56)) == (256, 320, 64)


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
        assert options.uses_conf_penalty(args) == (state.startswith("on") if state else "on" in flags.split()), flags


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
        lines = options.resolve_images(args, recipe)
        assert (args.lambda_u == 9) == lines[0].startswith("--lambda_u 9 ") if lines else not differences
        assert [line for line in lines if DIFFERS in line] == ([f"{DIFFERS}: {differences}"] if differences else [])
        note = options.difference_note(args, recipe.setting)
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
        line, paper = options.compare_with_paper(args, [{"best_acc": 94.0, "last10_acc": 93.0}], 3, official)
        assert line.startswith("best 94.00 (epoch 3), mean of the last 10 93.00") and line.endswith(expected)
        assert [*paper.values()] == results


def test_weights_follow_the_network_unless_given():
    """Else every --arch but the paper's is refused, or the paper's starts from random weights and ends points lower."""
    for flags, weights in (([], "imagenet"), (["--arch", "preresnet18"], "none"), (["--weights", "x"], "x")):
        args = Train_clothing1M.parse_args(flags)
        options.resolve_images(args, recipes.CLOTHING1M)
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
        assert options.resolve_small_images(args, np.zeros(1000, np.int64), 10, None).folder == Path(name), flags


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


# ---- The command line ----


def test_flags_and_defaults_are_the_documented_ones():
    """Else a command from the paper's time, or from the README, means something else here."""
    assert vars(Train_cifar.parse_args([])) == vars(Train_cifar.parse_args(["--seed", "123"])) == DEFAULTS
    assert Train_cifar.parse_args(["--learning_rate", "0.1"]).lr == 0.1  # the authors' long name
    assert Train_cifar.parse_args(["--seed", "7"]).noise_seed == 7
    assert Train_cifar.parse_args(["--seed", "7", "--noise_seed", "0"]).noise_seed == 0


def test_flags_of_the_scripts_for_large_images():
    """Else a default differs from the documented one, or a flag is accepted by a script that has no use for it."""
    args = vars(Train_clothing1M.parse_args([]))
    expected = recipes.CLOTHING1M.method | recipes.CLOTHING1M.images | {"weights": None}
    expected |= {"width": 64, "eval_batch_size": None, "id": "clothing1m", "keep_images": "auto", "check_data": None}
    assert {name: args[name] for name in expected} == expected
    assert not {"val_fraction", "cache_dir", "loss_window"} & args.keys()
    web = vars(Train_webvision.parse_args(["--check_data", "--skip_bad_images", "full"]))
    assert (web["check_data"], web["skip_bad_images"], web["cache_dir"]) == ("quick", "full", None)
    assert not {"num_batches", "keep_images"} & web.keys()


def test_help_lists_every_flag_and_each_default_once(capsys):
    """Else --help crashes, hides a flag, or sends its users to the source or to a table without a row for them."""
    flags = {}
    for script, defaults in (
        (Train_cifar, ("(default: the paper's)", "(default: 64)", "which CUDA card (default: 0)")),
        (Train_clothing1M, ("(default: resnet50)", "(default: 1)")),
    ):
        with pytest.raises(SystemExit) as caught:
            script.parse_args(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert caught.value.code == 0 and all(default in text for default in defaults)
        assert not any(unwanted in text for unwanted in ("default: None", "default: False", ") (default"))
        flags[script] = set(re.findall(r"(?<!\S)--[\w-]+", text))
        assert not [flag for flag in flags[script] if "-" in flag[2:]]
    assert {f"--{name}" for name in DEFAULTS} <= flags[Train_cifar] and "the paper's)" not in text


@pytest.mark.parametrize("script", [Train_cifar, Train_clothing1M, Train_webvision, Train_folder, reproduce])
def test_help_begins_with_what_people_use(script, capsys, monkeypatch):
    """Else a newcomer reads sixty flags to find the folder's, or a flag that was moved to the top is listed twice."""
    for program, shown in (("script.py", f"python {script.__name__}.py "), ("dividemix train x", "dividemix train x ")):
        monkeypatch.setattr(sys, "argv", [program])
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        text = capsys.readouterr().out
        head = text[: text.index("\noptions:")]
        assert head.count(f"\n  {shown}") == 2 and len(re.findall(r"^  --", head, re.MULTILINE)) == 5
        flags = re.findall(r"^  (?:-h, )?(--\w+)", text, re.MULTILINE)
        assert len(flags) == len(set(flags))


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
