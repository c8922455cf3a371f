"""The command line that a user of the authors' script knows, and what the flags ask for."""

import argparse
import dataclasses
import re
import sys

import pytest

import reproduce
import Train_cifar
import Train_clothing1M
import Train_folder
import Train_webvision
from dividemix import recipes, runtime
from dividemix.engine import MixMatch
from dividemix.run import options

# The authors' defaults and those that all scripts share. None: from the data, or the paper's.
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
