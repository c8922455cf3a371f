"""Bad input on the command line gets one clear line and a non-zero exit status, before any training, and leaves nothing
behind. Odd but sound input is trained on. Damaged files are in test_fuzz.py."""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.data import batch, make_cifar10
from helpers.runs import args_of, read_records
from helpers.scripts import end_of, run_script, tiny
from sklearn.mixture import GaussianMixture

import dataloader_cifar
import PreResNet
import Train_cifar
import Train_clothing1M
import Train_folder
import Train_webvision
from dividemix import DivideMixError, engine, noise, runtime, warn
from dividemix.run import command_line, options
from dividemix.run.run import Run
from dividemix.runtime import device

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with files that can be named on the command line."""
    root = tmp_path_factory.mktemp("inputs")
    truth = dataloader_cifar.load("digits", "").train_labels.tolist()
    for name, seed in (("one", 0), ("two", 1)):
        (root / f"{name}.json").write_text(json.dumps(noise.inject(truth, "sym", 0.5, 10, seed)))
    (root / "text.pt").write_text("no checkpoint")
    state = PreResNet.ResNet18(10, 8).state_dict()  # the runs' width is 4
    for name, nets in {"wide": [state, state], "odd": [state, 3], "single": [state]}.items():
        torch.save({"nets": nets}, root / f"{name}.pt")
    (make_cifar10(root / "damaged", 40, 10, bare=True) / "data_batch_3").write_bytes(b"half")
    return root


@pytest.fixture
def start(inputs, tmp_path, monkeypatch, capsys):
    """Runs Train_cifar.py's command line in-process, tiny, as a user would. -> (exit status, the lines on stderr)"""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "unusable_card", lambda: None)

    def run(*flags: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        status = end_of(Train_cifar, tiny(tmp_path / "out", "--run_dir", str(tmp_path / "run"), *flags), monkeypatch)
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture(scope="module")
def one_epoch(inputs, tmp_path_factory) -> Path:
    """The folder of a run of one epoch with the noise file one.json, to be copied."""
    flags = ["--num_epochs", "1", "--noise_file", f"{inputs}/one.json"]
    with mock.patch("dividemix.report.report.draw", lambda *_: []):
        return Path(Train_cifar.main(tiny(tmp_path_factory.mktemp("begun"), *flags))["run_dir"])


@pytest.fixture
def begun(start, one_epoch, tmp_path):
    """`start` for a run that has one epoch behind it."""
    shutil.copytree(one_epoch, tmp_path / "run")
    return start


# ---- Flags ----


@pytest.mark.parametrize("script", [Train_cifar, Train_clothing1M, Train_webvision, Train_folder])
def test_every_number_has_a_range(script, monkeypatch):
    """A flag of another type than options.number, as float: nan trains for hours, on something nobody wanted."""
    parse = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(options.Parser, "parse_args", lambda parser, argv: parse(parser))
    with pytest.raises(KeyboardInterrupt):
        script.parse_args([])
    actions = parse.call_args[0][0]._actions
    kinds = {action.option_strings[0]: getattr(action.type, "__qualname__", "") for action in actions}
    assert {"--lr", "--seed", "--T"} <= {flag for flag, kind in kinds.items() if kind.startswith("number.")}
    assert {"int", "float"}.isdisjoint(kinds.values())


REFUSED = [  # flags, exit status, what the line names
    ("--num 3", 2, "--num"),  # abbreviated: --num_epochs today and --num_class tomorrow
    ("--lr nan", 2, "--lr"),
    ("--workers 257", 2, "--workers"),  # thousands stop the computer
    ("--noise_mode human --dataset cifar100", 2, "noisy_label"),
    ("--noise_key worse_label", 2, "--noise_mode human"),
    ("--noise_mode asym --noise_definition with_self", 2, "--noise_definition with_self"),
    ("--noise_file a/CIFAR-10_human.pt", 2, "--noise_mode human"),
    ("--noise_file gone.json", 1, "noise file gone.json"),
    ("--num_class 14", 1, "--num_class 14"),
    ("--limit_train 1", 1, "at least 2"),  # a mixture of two is not fitted to one loss
    ("--dataset cifar10 --data_path damaged", 1, "damaged/data_batch_3"),
    ("--run_dir text.pt/below", 1, "text.pt/below"),
    ("--init_from text.pt", 1, "text.pt"),
    ("--init_from single.pt", 1, "single.pt"),
    ("--init_from wide.pt", 1, "wide.pt"),
    ("--init_from odd.pt --width 8", 1, "odd.pt"),
    ("--device cuda", 1, "--device cpu"),
]


@pytest.mark.parametrize(("flags", "status", "expected"), REFUSED, ids=[flags for flags, *_ in REFUSED])
def test_bad_input_is_refused_with_one_line(start, tmp_path, flags, status, expected):
    """Else a run trains on other data or weights than its user thinks, or ends in a stack trace after hours."""
    ended, [line] = start(*flags.split())
    assert ended == status and expected in line
    assert line.startswith("error: " if status == 1 else "Train_cifar.py: error: ")
    assert not [path for path in tmp_path.rglob("*") if path.name != "out"]


def test_a_sample_of_one_image(tmp_path, monkeypatch, capsys):
    """The size of Clothing1M's samples is a flag: else the run ends when the first one is to be divided."""
    argv = ["--num_batches", "1", "--batch_size", "1", "--out_dir", str(tmp_path), "--device", "cpu"]
    assert end_of(Train_clothing1M, argv, monkeypatch) == 1
    assert "--num_batches 1 --batch_size 1: " in capsys.readouterr().err


# ---- Rates, and sets that a division makes small ----


def small_set(folder: Path, labels: list[int], n_names: int = 10) -> list[str]:
    """Own data in CIFAR's format: training images with these labels, the first of them to test on. -> flags"""
    folder.mkdir()
    for name, split in (("data_batch_1", labels), ("test_batch", labels[:1])):
        (folder / name).write_bytes(pickle.dumps(batch(len(split), labels=split)))
    if n_names:
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(c) for c in range(n_names)]}))
    return ["--dataset", "cifar10", "--data_path", str(folder), "--limit_train", str(len(labels))]


@pytest.mark.parametrize(("mode", "r"), [("sym", "0"), ("asym", "1")])
def test_rates_0_and_1(start, tmp_path, mode, r):
    """Without a clean or without a wrong label there is no AUC: a traceback, or a NaN in the logs, which is no JSON."""
    flags = small_set(tmp_path / "data", [2, 3, 4, 5, 9] * 8)  # asym changes each of these classes
    status, errors = start(*flags, "--noise_mode", mode, "--r", r, "--lambda_u", "0")
    assert status == 0 and not [line for line in errors if line.startswith("error")]
    last = read_records(tmp_path / "run")[-1]
    assert (last["phase"], last["auc_net1"], last["auc_net2"]) == ("train", None, None)
    assert "AUC:null\n" in (tmp_path / "run/stats.txt").read_text()


@pytest.mark.parametrize(
    ("clean", "labeled", "warned"),
    [
        ([20, 0], [20, None], True),
        ([0, 20], [None, 20], True),
        ([33, 1], [33, 1], True),
        ([32, 17], [32, 17], False),
    ],
    ids=["labeled empty", "labeled empty at first", "unlabeled empty, one labeled", "one unlabeled, one over"],
)
def test_sets_that_are_empty_or_of_one_sample(start, tmp_path, monkeypatch, recwarn, clean, labeled, warned):
    """A labeled or unlabeled set that is empty or of one image, or a last batch of one image, would end the run."""
    epochs = iter(np.repeat(clean, 2))  # two networks

    def predict_proba(gmm, loss):
        p_clean = np.where(np.arange(len(loss)) < next(epochs), 0.9, 0.1)
        return np.stack([p_clean, 1 - p_clean] if gmm.means_[0] < gmm.means_[1] else [1 - p_clean, p_clean], axis=1)

    monkeypatch.setattr(GaussianMixture, "predict_proba", predict_proba)
    flags = [*small_set(tmp_path / "data", [0, 1, 2] * 11), "--no_label_scores", "--r", "0.2"]
    assert start(*flags, "--num_epochs", "3", "--eval_batch_size", "32")[0] == 0  # 32: that of a warm-up batch, too
    records = read_records(tmp_path / "run")
    for k in (1, 2):
        assert [record[f"labeled_net{k}"] for record in records] == [None, *labeled]
        assert [record[f"unlabeled_net{k}"] for record in records] == [None, *(n and 33 - n for n in labeled)]
    assert all(np.isfinite(record["loss_x"]) for record in records)
    assert [str(warning.message)[:5] for warning in recwarn] == (["net 2", "net 1"] if warned else [])


@pytest.mark.parametrize(
    ("labels", "n_names"),
    [([0] * 40, 3), ([0] * 39 + [1], 0), ([0, 1], 0)],
    ids=["one of three classes", "a class of one sample", "two samples"],
)
def test_odd_data_sets_are_trained_on(start, tmp_path, labels, n_names):
    """Own data are often so at first: a crash in the middle would be taken for a fault of the data."""
    status, errors = start(*small_set(tmp_path / "data", labels, n_names))
    assert status == 0 and all(line.startswith("warning: ") for line in errors), errors
    last = read_records(tmp_path / "run")[-1]
    assert last["phase"] == "train" and np.isfinite([last["loss_x"], last["penalty"]]).all()


# ---- A run folder that is taken ----


def test_a_run_stopped_before_its_first_checkpoint_does_not_keep_its_labels(start, inputs, tmp_path, monkeypatch):
    """Else a command that was stopped at once and corrected (--noise_file) trains on the labels of before."""
    with monkeypatch.context() as patch:
        patch.setattr(Train_cifar, "warmup_epoch", mock.Mock(side_effect=KeyboardInterrupt))
        assert start("--noise_file", "one.json")[0] == 130
    assert start("--num_epochs", "1", "--noise_file", "two.json")[0] == 0
    labels = [json.loads(path.read_text()) for path in (tmp_path / "run/digits_0.5_sym.json", inputs / "two.json")]
    assert labels[0] == labels[1]


def test_a_folder_that_another_process_trains_in(begun, tmp_path):
    """Else two processes write one run's checkpoints in turn, or --fresh moves the folder away under the other one."""
    with Run(tmp_path / "run", args_of(tmp_path / "run")):
        for fresh in ([], ["--fresh"]):
            status, [line] = begun(*fresh)
            assert status == 1 and str(tmp_path / "run") in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and len(read_records(tmp_path / "run")) == 1


# ---- Memory ----

CARD = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ...")


@pytest.mark.parametrize(
    ("owner", "function", "error", "words"),
    [
        (engine, "train_step", HOST, ["--no_graph", "--width", "--batch_size"]),
        (runtime.Runtime, "evaluation_forward", CARD, ["--eval_batch_size"]),
        (runtime.Runtime, "prepare", CARD, ["--arch preresnet18"]),
        (dataloader_cifar, "noisy_sets", HOST, ["not enough memory"]),  # where nobody thought of it
        (dataloader_cifar, "noisy_sets", MemoryError(), ["not enough memory"]),
    ],
    ids=["train", "evaluate", "build", "anywhere", "anywhere in Python"],
)
def test_out_of_memory_names_the_flags_and_loses_nothing(begun, monkeypatch, owner, function, error, words):
    """A card that another job fills: the epochs before must stay, and the user learn what to make smaller."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, mock.Mock(side_effect=error))
        status, [line] = begun("--eval_batch_size", "1")
    assert status == 1 and line.startswith("error: ") and all(word in line for word in words)
    assert begun("--num_epochs", "1") == (0, [])  # as it was: finished, as far as that


# ---- How a script ends ----


@pytest.mark.slow
def test_bad_input_of_the_real_script(tmp_path):
    """Else what the tests above check in-process is not what the user sees: a stack trace, more lines, status 0."""
    done = run_script(cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: A GPU IS HERE")]
    assert (done.returncode, done.stdout, len(lines)) == (1, "", 1) and lines[0].startswith("error: cifar10 not found")
    assert not any(tmp_path.iterdir())


def status_of(main) -> int:
    with pytest.raises(SystemExit) as ended:
        command_line(main)
    return ended.value.code


def test_how_a_script_ends(monkeypatch, capsys):
    """Else a job script takes a refused run for a finished one, or a bug looks like its user's mistake."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `command_line` sets it
    monkeypatch.setattr(os, "_exit", mock.Mock())
    with warnings.catch_warnings(record=True) as shown:
        assert status_of(lambda _: [warn("disk full") for _ in range(2)]) == 0
        assert status_of(mock.Mock(side_effect=DivideMixError("noise file x"))) == 1
        assert capsys.readouterr().err == "error: noise file x\n"
        assert status_of(mock.Mock(side_effect=KeyboardInterrupt)) == 130
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        with pytest.raises(ValueError, match="a bug"):
            command_line(mock.Mock(side_effect=ValueError("a bug")))
        lines = [warnings.formatwarning(warning.message, warning.category, "file.py", 1) for warning in shown]
        assert lines == ["warning: disk full\n"] * 2 and not os._exit.called
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert status_of(mock.Mock()) == 0 and os._exit.call_args == mock.call(0)
