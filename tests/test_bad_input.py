"""Bad input gets one clear line and a non-zero exit, before any training, and leaves nothing behind."""

import json
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.data import make_cifar10, make_cifar100, make_fashionmnist
from helpers.runs import args_of
from helpers.scripts import ROOT, run_script, tiny

import dataloader_cifar
import PreResNet
import Train_cifar
from dividemix import DivideMixError, noise
from dividemix.report import report
from dividemix.run import options
from dividemix.run.run import Run
from dividemix.runtime import device as runtime


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    """Runs the command line in-process as a user would, from an empty folder, with `flags` that must be refused.
    -> (exit status, the line on stderr); checks that it is one line and that no run folder is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # command_line's changes end with the test
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "unusable_card", lambda: None)

    def run(*flags: str, out_dir: str | Path = "out") -> tuple[int, str]:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["Train_cifar.py", *tiny(out_dir, *flags)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
            options.command_line(Train_cifar.main)
        status, error = caught.value.code, capsys.readouterr().err
        if isinstance(status, str):  # the interpreter prints it on stderr and exits with 1
            status, error = 1, error + status + "\n"
        assert status in (1, 2) and error.endswith("\n") and error.count("\n") == 1, (status, error)
        assert not Path(out_dir).is_dir() or not any(Path(out_dir).iterdir()), "a run folder is left behind"
        left = {path.name for path in tmp_path.rglob("*")} - {path.name for path in before}
        assert left <= {"out", "0.5_sym.json", "fashionmnist_0.5_sym.json"}, left  # noise that was made is sound
        return status, error.strip()

    return run


# ---- Flags ----

POSITIVE, WHOLE, SEED = "a number above 0", "a whole number of 1 or more", "a whole number from 0 to 2^32 - 1"
RATE, OPEN, PART = "a rate from 0 to 1", "a number between 0 and 1, both excluded", "a number of 0 or more and below"
CASES = [
    *[("--r", value, RATE) for value in ("-0.1", "1.1", "nan", "inf", "-inf", "half", "50%", "")],
    *[(flag, value, POSITIVE) for flag in ("--T", "--alpha", "--lr") for value in ("0", "-1", "nan", "inf", "x")],
    *[(flag, value, WHOLE) for flag in ("--batch_size", "--num_epochs", "--width") for value in ("0", "-1", "1.5")],
    *[(flag, "0", WHOLE) for flag in ("--lr_drop", "--limit_train", "--loss_window", "--eval_batch_size")],
    *[("--num_class", value, WHOLE) for value in ("0", "ten")],
    *[("--p_threshold", value, OPEN) for value in ("0", "1", "-0.5", "1.5", "nan", "x")],
    *[(flag, value, SEED) for flag in ("--seed", "--noise_seed") for value in ("-1", "1.5", "4294967296", "x")],
    *[("--val_fraction", value, PART) for value in ("1", "-0.1", "nan")],
    *[("--lambda_u", value, "a number of 0 or more") for value in ("-1", "nan")],
    *[(flag, "-1", "a whole number of 0 or more") for flag in ("--warm_up", "--gpuid")],
    *[("--workers", value, "a whole number from 0 to 256") for value in ("-1", "257")],
    *[("--id", value, "expected letters, digits, '.', '_' and '-'") for value in ("a/b", "../x", "a b", ".", "..")],
    ("--noise_mode", "symmetric", "sym"),
    ("--dataset", "cifar", "cifar10"),
    ("--device", "gpu", "cuda"),
    ("--precision", "fp16", "bf16"),
    ("--arch", "resnet18", "preresnet18"),
    ("--method", "dividemix2", "ce"),
    ("--conf_penalty", "yes", "on"),
]


@pytest.mark.parametrize(("flag", "value", "expected"), CASES, ids=[f"{flag}={value}" for flag, value, _ in CASES])
def test_a_value_out_of_range_is_named(refuse, flag, value, expected):
    """Else it crashes hours later, or worse, trains something that nobody asked for."""
    status, line = refuse(f"{flag}={value}")
    assert status == 2
    assert line.startswith(f"Train_cifar.py: error: argument {flag}")
    assert expected in line and f"'{value}'" in line


def test_a_number_with_too_many_digits_is_refused(refuse):
    """Else a slip of the keyboard ends in a stack trace."""
    status, line = refuse("--seed", "1" + "0" * 400)
    assert status == 2 and SEED in line


@pytest.mark.parametrize("flags", [["--num", "3"], ["--warm-up", "1"], ["--lamda_u", "25"], ["--rr"], ["cifar10"]])
def test_unknown_and_abbreviated_flags_are_refused(refuse, flags):
    """Else `--num 3` means --num_epochs today and --num_class tomorrow, and a mistyped flag is silently ignored."""
    status, line = refuse(*flags)
    assert status == 2 and "unrecognized arguments" in line and flags[0] in line and "--help" in line


def test_a_flag_without_its_value_is_refused(refuse):
    """Else the next flag is taken for the value."""
    status, line = refuse("--lr")
    assert status == 2 and "--lr" in line and "expected one argument" in line


# ---- Data ----


def test_missing_data_names_the_ways_out(refuse, tmp_path):
    """The most common first run: else the user does not learn where to put the data, nor that nothing is needed."""
    for dataset in ("cifar10", "cifar100", "fashionmnist"):
        status, line = refuse("--dataset", dataset, "--data_path", "nowhere")
        assert status == 1 and line.startswith(f"error: {dataset} not found")
        assert str(tmp_path / "nowhere") in line and "--download" in line and "--dataset digits" in line


@pytest.mark.parametrize(
    ("dataset", "make", "file"),
    [
        ("cifar10", make_cifar10, "data_batch_3"),
        ("cifar100", make_cifar100, "train"),
        ("fashionmnist", make_fashionmnist, "t10k-images-idx3-ubyte"),
    ],
)
def test_damaged_and_missing_files_are_named(refuse, tmp_path, dataset, make, file):
    """Else a broken download trains on rubbish, or ends in a stack trace that does not say which file."""
    path = make(tmp_path / "data", 40, 10) / file
    content = path.read_bytes()
    for damage in (lambda: path.write_bytes(content[: len(content) // 2]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        status, line = refuse("--dataset", dataset, "--data_path", "data")
        assert status == 1 and line.startswith("error: ") and str(path) in line


def test_num_class_that_contradicts_the_data(refuse, tmp_path):
    """Else the authors' `--num_class 10` with CIFAR-100 trains a network that cannot name 90 classes."""
    status, line = refuse("--num_class", "14")
    assert status == 1 and line == "error: --num_class 14: digits has 10 classes; leave it out"
    make_cifar100(tmp_path / "data", 40, 10)
    assert "cifar100 has 100 classes" in refuse("--dataset", "cifar100", "--data_path", "data", "--num_class", "10")[1]


def test_a_subset_larger_than_the_data(refuse):
    """Else --limit_train is silently less than the report of the run says."""
    status, line = refuse("--limit_train", "1451")
    assert status == 1 and "--limit_train 1451: there are 1450 training samples" in line


def test_too_few_samples_to_divide(refuse):
    """Else a mixture of two Gaussians is fitted to one sample."""
    status, line = refuse("--limit_train", "1")
    assert status == 1 and "at least 2" in line


# ---- Noise file ----

DIGITS = 1450  # training samples


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda truth: truth[:-1], f"has {DIGITS - 1} labels, the data set {DIGITS}"),
        (lambda truth: [*truth[:-1], 10], "outside 0..9"),
        (lambda truth: [*truth[:-1], -1], "outside 0..9"),
        (lambda truth: truth, "changes 0.0% of the labels"),  # clean labels, not 50 % noise
        (lambda truth: [(t + 1) % 10 for t in truth], "changes 100.0% of the labels"),
        (lambda truth: [float(t) for t in truth], "whole numbers"),
        (lambda truth: {"labels": truth}, "one flat JSON list"),
        (lambda truth: "x" * 10**5, "one flat JSON list"),
    ],
    ids=["length", "label 10", "label -1", "rate 0", "rate 1", "floats", "dict", "large"],
)
def test_a_noise_file_that_cannot_be_this_noise(refuse, tmp_path, content, expected):
    """Else a run claims 50 % noise and trains on another rate's, another data set's or shifted labels."""
    truth = dataloader_cifar.load("digits", "").train_labels.tolist()
    (tmp_path / "noise.json").write_text(json.dumps(content(truth)))
    status, line = refuse("--noise_file", "noise.json")
    assert status == 1 and line.startswith("error: noise file noise.json ") and expected in line


def test_a_noise_file_that_cannot_be_read(refuse, tmp_path):
    """Else a mistyped --noise_file makes new noise, and the runs that were to be compared have different labels."""
    assert "noise file gone.json does not exist" in refuse("--noise_file", "gone.json")[1]
    (tmp_path / "half.json").write_text("[1, 2, ")
    assert "noise file half.json is not a complete JSON file" in refuse("--noise_file", "half.json")[1]


# ---- Folders, checkpoints, device ----


def test_folders_that_cannot_be_written(refuse, tmp_path):
    """Else hours of training end without a place to save them."""
    (tmp_path / "file").write_text("")
    for flags in ({"out_dir": "file"}, {"out_dir": "file/below"}):
        status, line = refuse(**flags)
        assert status == 1 and "cannot be written" in line and str(flags["out_dir"]) in line and "--out_dir" in line
    assert "run folder file cannot be written" in refuse("--run_dir", "file")[1]


def test_a_checkpoint_to_start_from_that_is_missing_or_none(refuse, tmp_path):
    """Else training starts from random weights although --init_from was given, or from a file that runs code."""
    assert "checkpoint gone.pt cannot be read (No such file" in refuse("--init_from", "gone.pt")[1]
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "checkpoint text.pt cannot be read" in refuse("--init_from", "text.pt")[1]
    torch.save({"model": 1}, tmp_path / "other.pt")
    assert "--init_from other.pt: expected a checkpoint with 2 networks" in refuse("--init_from", "other.pt")[1]
    torch.save({"nets": [print, print]}, tmp_path / "code.pt")
    assert "checkpoint code.pt cannot be read" in refuse("--init_from", "code.pt")[1]


def test_a_checkpoint_of_another_network(refuse, tmp_path):
    """Else weights of another width or class number are half loaded."""
    state = PreResNet.ResNet18(10, 8).state_dict()
    torch.save({"nets": [state, state]}, tmp_path / "wide.pt")
    status, line = refuse("--init_from", "wide.pt")  # the run's width is 4
    assert status == 1 and "wide.pt does not fit these networks" in line and "--width" in line
    torch.save({"nets": [state, 3]}, tmp_path / "odd.pt")
    assert "odd.pt does not fit these networks" in refuse("--init_from", "odd.pt", "--width", "8")[1]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(refuse, monkeypatch, device):
    """Else a job for a card runs for days on a CPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    status, line = refuse("--device", device)
    assert status == 1 and line.startswith(f"error: --device {device}: ") and "--device cpu" in line


# ---- A run folder that is taken ----


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """A run of one epoch, with the noise file one.json; beside it two.json with other noise of the same rate."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    truth = dataloader_cifar.load("digits", "").train_labels.tolist()
    for seed, name in enumerate(["one.json", "two.json"]):
        (tmp_path / name).write_text(json.dumps(noise.inject(truth, "sym", 0.5, 10, seed)))
    flags = ["--num_epochs", "1", "--noise_file", f"{tmp_path}/one.json"]
    return Path(Train_cifar.main(tiny(tmp_path / "runs", *flags))["run_dir"])


def test_another_noise_file_for_a_run_that_has_begun(begun, tmp_path):
    """Else the run goes on with its old labels, and the user believes that it learns from the file that was named."""
    with pytest.raises(DivideMixError, match="labels"):
        Train_cifar.main(tiny(tmp_path / "runs", "--noise_file", f"{tmp_path}/two.json"))
    assert len((begun / "metrics.jsonl").read_text().splitlines()) == 1
    (tmp_path / "one.json").rename(tmp_path / "moved.json")  # the same labels elsewhere are fine
    final = Train_cifar.main(tiny(tmp_path / "runs", "--noise_file", f"{tmp_path}/moved.json"))
    assert final["epoch"] == 1


def test_a_run_stopped_before_its_first_checkpoint_does_not_hold_its_labels(begun, tmp_path, monkeypatch):
    """Else a command that was stopped at once and mended (--noise_file) trains on the labels of before."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Train_cifar, "warmup_epoch", mock.Mock(side_effect=KeyboardInterrupt))
        Train_cifar.main(tiny(tmp_path / "more", "--noise_file", f"{tmp_path}/one.json"))
    flags = ["--num_epochs", "1", "--noise_file", f"{tmp_path}/two.json"]
    folder = Path(Train_cifar.main(tiny(tmp_path / "more", *flags))["run_dir"])
    assert json.loads((folder / "digits_0.5_sym.json").read_text()) == json.loads((tmp_path / "two.json").read_text())


@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["again", "fresh"])
def test_a_folder_that_another_process_trains_in(begun, tmp_path, fresh):
    """Else two processes write one run's checkpoints in turn; --fresh would move the folder away under the other one,
    which then goes on writing into the new run."""
    with Run(begun, args_of(begun)), pytest.raises(DivideMixError, match="another process is training"):
        Train_cifar.main(tiny(tmp_path / "runs", *fresh))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [begun.name]
    assert len((begun / "metrics.jsonl").read_text().splitlines()) == 1


# ---- What the user sees ----


def test_bad_input_of_the_real_script(tmp_path):
    """Else what the tests above check in-process is not what the user sees: a stack trace, more lines, status 0."""
    cases = (
        ([], 1, r"error: cifar10 not found, looked in .*cifar-10.*--download.*--dataset digits.*"),
        (["--dataset", "digits", "--device", "cuda"], 1, r"error: --device cuda: .*--device cpu.*"),
        (["--r", "1.1"], 2, r"Train_cifar.py: error: argument --r: expected a rate from 0 to 1, got '1.1' .*"),
    )
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda case: run_script(*case[0], cwd=tmp_path), cases)
    for done, (_, status, expected) in zip(runs, cases, strict=True):
        assert done.returncode == status, done.stderr
        lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: A GPU IS HERE")]
        assert len(lines) == 1 and re.fullmatch(expected, lines[0]), done.stderr
        assert done.stdout == ""
    assert not any(tmp_path.iterdir())


def command_line(body: str, **environment: str) -> subprocess.CompletedProcess:
    """`options.command_line` around a main of these lines, in a process of its own: pytest catches warnings itself."""
    imports = "from dividemix import DivideMixError, warn\nfrom dividemix.run import options\n"
    code = f"{imports}def main(_):\n {body}\noptions.command_line(main)"
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True, "check": False}
    return subprocess.run([sys.executable, "-c", code], **options)


def test_a_warning_is_one_line_each_time():
    """Else a warning shows Python source lines, which users learn to overlook; or it is shown once and then never."""
    done = command_line("for _ in range(2): warn('no TensorBoard events: disk full')")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "warning: no TensorBoard events: disk full\n" * 2


def test_an_error_is_one_line_and_a_non_zero_status():
    """Else a job script takes a refused run for a finished one."""
    done = command_line("raise DivideMixError('noise file x: mend it')")
    assert (done.returncode, done.stderr) == (1, "error: noise file x: mend it\n")


def test_a_fault_of_the_program_is_not_hidden():
    """Else a bug looks like a user's mistake, and there is no stack trace to report."""
    done = command_line("raise ValueError('a bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_ctrl_c_says_how_to_go_on():
    """Else a user who stops a run sees a stack trace and fears that the run is lost."""
    done = command_line("raise KeyboardInterrupt")
    assert done.returncode == 130
    assert "same command continues" in done.stderr and done.stderr.strip().count("\n") == 0


def test_a_rank_that_is_done_ends_at_once():
    """Else the interpreter cleans up while gloo's threads let go of tensors, and now and then a rank of a run that went
    well aborts: torchrun then reports a failure and a queue starts the job again."""
    ends_badly = "import atexit, os; atexit.register(os._exit, 9); print('done', end='')"
    alone, rank = command_line(ends_badly), command_line(ends_badly, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert (alone.returncode, rank.returncode, rank.stdout) == (9, 0, "done")
