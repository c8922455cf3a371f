"""Faults of flags, labels and small data sets, as the user meets them: the script goes on as defined, or refuses with
one line and a non-zero exit status. Faults of image folders are in test_image_faults.py, of bytes in test_fuzz.py."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import Evil, batch, make_cifar10, make_cifar100
from helpers.runs import read_records
from helpers.scripts import end_of, tiny

import dataloader_cifar
import Train_cifar
import Train_clothing1M
import Train_folder
import Train_webvision
from dividemix import DivideMixError, engine, noise, runtime
from dividemix.noise import file as noise_file
from dividemix.report import report
from dividemix.run import options

SCRIPTS = [Train_cifar, Train_clothing1M, Train_webvision, Train_folder]


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs Train_cifar.py's command line in-process, tiny, as a user would. -> (exit status, the lines on stderr)"""
    monkeypatch.setattr(report, "draw", lambda *_: [])

    def run(*flags: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        status = end_of(Train_cifar, tiny(tmp_path / "out", "--run_dir", str(tmp_path / "run"), *flags), monkeypatch)
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory) -> Path:
    """The folder of a run of one epoch, to be copied."""
    out = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: [])
        return Path(Train_cifar.main(tiny(out, "--num_epochs", "1"))["run_dir"])


@pytest.fixture
def begun(start, one_epoch, tmp_path):
    """The same for a run that has one epoch behind it."""
    shutil.copytree(one_epoch, tmp_path / "run")
    return start


def records_of(tmp_path: Path) -> list[dict]:
    return read_records(tmp_path / "run")


# ---- Flags ----

NO_NUMBERS = ["nan", "inf", "-inf", "1e999", "text", "", "0x10", "1,5"]
OUTSIDE = {  # values outside each type's range, which its message states
    options.positive_int: ["0", "-1", "1.5", "2147483648"],
    options.count: ["-1", "1.5", "2147483648"],
    options.processes: ["-1", "1.5", "257", "100000"],
    options.seed: ["-1", "1.5", "4294967296"],
    options.positive: ["0", "-0.1"],
    options.non_negative: ["-0.1"],
    options.rate: ["-0.1", "1.1"],
    options.open_unit: ["0", "1", "-0.5", "1.5"],
    options.part: ["-0.1", "1", "1.5"],
}


class Parsing(Exception):
    """Carries the parser."""


def number_flags(script, monkeypatch) -> dict[str, list[str]]:
    """The script's flags that take a number, each with values that are to be refused."""

    def stop(parser, *_):
        raise Parsing(parser)

    with monkeypatch.context() as patch, pytest.raises(Parsing) as seen:
        patch.setattr(options.Parser, "parse_args", stop)
        script.parse_args([])
    texts = (None, options.run_id, options.architecture)
    typed = [action for action in seen.value.args[0]._actions if action.type not in texts]
    return {action.option_strings[0]: [*NO_NUMBERS, *OUTSIDE[action.type]] for action in typed}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_number_is_checked(script, monkeypatch, capsys):
    """A flag of another type than these, without a range: nan or -1 trains for hours, on something nobody asked for."""
    flags = number_flags(script, monkeypatch)
    assert {"--lr", "--batch_size", "--seed", "--lambda_u", "--p_threshold", "--T", "--workers"} <= flags.keys()
    for flag, values in flags.items():
        for value in values:
            with pytest.raises(SystemExit) as ended:
                script.parse_args([f"{flag}={value}"])
            error = capsys.readouterr().err
            assert ended.value.code == 2 and error.count("\n") == 1, (flag, value)
            assert f"argument {flag}" in error and "expected" in error and f"'{value}'" in error


# ---- Rates, and sets that a division makes small ----


@pytest.mark.parametrize(("mode", "r", "known"), [("sym", "0", False), ("asym", "1", False), ("sym", "1", True)])
def test_rates_0_and_1(start, tmp_path, mode, r, known):
    """Without a clean or without a wrong label there is no AUC: training on good labels would end in a traceback, or
    leave a NaN in the logs, which is no JSON."""
    status, errors = start("--noise_mode", mode, "--r", r, "--seed", "0", "--lambda_u", "0")
    assert status == 0 and not [line for line in errors if line.startswith("error")]
    last = records_of(tmp_path)[-1]
    assert last["phase"] == "train" and (last["auc_net1"] is not None) == (last["auc_net2"] is not None) == known
    assert ("AUC:null\n" in (tmp_path / "run/stats.txt").read_text()) == (not known)
    assert np.load(tmp_path / "run/labels.npz")["given"].max() < 10


@pytest.mark.parametrize(
    ("clean", "labeled", "said"),
    [
        ([20, 0], [20, None], "finds no sample clean with p > 0.5: its peer gets one more warm-up epoch"),
        ([0, 20], [None, 20], "finds no sample clean with p > 0.5: its peer gets one more warm-up epoch"),
        ([33, 1], [33, 1], "finds every sample clean: no unlabeled images this epoch"),
        ([32, 17], [32, 17], None),
    ],
    ids=["labeled empty", "labeled empty at first", "unlabeled empty, one labeled", "one unlabeled, one over"],
)
def test_sets_that_are_empty_or_of_one_sample(start, tmp_path, monkeypatch, recwarn, clean, labeled, said):
    """The labeled or the unlabeled set empty or of one image, and batches of one image, at the end of a pass of 33
    (warm-up, loss) or 17: a run would crash at whichever epoch comes to it, and come to it again when it continues."""
    epochs = iter(np.repeat(clean, 2))  # two networks

    def predict_proba(gmm, loss):
        clean = np.where(np.arange(len(loss)) < next(epochs), 0.9, 0.1)
        return np.stack([clean, 1 - clean] if gmm.means_[0] < gmm.means_[1] else [1 - clean, clean], axis=1)

    monkeypatch.setattr("sklearn.mixture.GaussianMixture.predict_proba", predict_proba)
    flags = ["--no_label_scores", "--limit_train", "33", "--r", "0.2"]
    flags += ["--eval_batch_size", "32"]  # that of a warm-up batch, too
    assert start(*flags)[0] == 0
    assert start(*flags, "--num_epochs", "3")[0] == 0
    found = records_of(tmp_path)
    for k in (1, 2):
        assert [record[f"labeled_net{k}"] for record in found] == [None, *labeled]
        assert [record[f"unlabeled_net{k}"] for record in found] == [None, *(n and 33 - n for n in labeled)]
    assert all(np.isfinite(record["loss_x"]) for record in found)
    assert [str(warning.message) for warning in recwarn] == [f"net {k} {said}" for k in (2, 1) if said]


# ---- Noise files ----


@pytest.mark.parametrize("r", [0.5, 0.9, 1.0])
def test_a_noise_file_of_another_data_set(tmp_path, r):
    """CIFAR-10's file beside CIFAR-100, or that of another set of the same size: a run on labels of other images. Near
    rate 1 the share of changed labels alone does not tell."""
    truth, other = np.arange(50_000) % 100, np.arange(50_000) % 10
    spec = noise_file.NoiseSpec("cifar100", "sym", r, 123, 100, noise.asym_transition(100)[0])
    file = tmp_path / "noise.json"
    file.write_text(json.dumps(noise.inject(other.tolist(), "sym", r, 10, 123)))
    with pytest.raises(DivideMixError, match=r"another .*data set's"):
        noise_file.read(file, truth, spec)
    file.write_text(json.dumps(noise.inject(truth[::-1].tolist(), "sym", r, 100, 123)))
    if r == 1:  # all labels are drawn: it is this noise
        assert noise_file.read(file, truth, spec).shape == (50_000,)
    else:
        with pytest.raises(DivideMixError, match="another rate's or data set's"):
            noise_file.read(file, truth, spec)


def test_a_ten_class_noise_file_with_cifar100(start, tmp_path):
    """The authors' file names are the same for both data sets: 0.5_sym.json of one is easily put beside the other."""
    folder = make_cifar100(tmp_path / "data", 400, 10)
    (folder / "0.5_sym.json").write_text(json.dumps(noise.inject([i % 10 for i in range(400)], "sym", 0.5, 10, 123)))
    status, [line] = start("--dataset", "cifar100", "--data_path", str(tmp_path / "data"))
    assert status == 1 and line.startswith(f"error: noise file {folder / '0.5_sym.json'} changes ")
    assert not (tmp_path / "run").exists()


# ---- Data sets ----


def test_a_malicious_batch_is_refused_by_the_script(start, tmp_path):
    """A data set from anywhere would run programs on its users' machines."""
    folder = make_cifar10(tmp_path / "data", n_train=4, n_test=4, batches=1)
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch(data=Evil(os.mkdir, str(tmp_path / "marker"))), 2))
    status, [line] = start("--dataset", "cifar10", "--data_path", str(tmp_path / "data"))
    assert status == 1 and line.startswith(f"error: {folder / 'data_batch_1'}: it asks to run code")
    assert not (tmp_path / "marker").exists() and not (tmp_path / "run").exists()


def cifar10_of(folder: Path, labels: list[int], names: int = 0) -> list[str]:
    """Own data in CIFAR's format: training images with these labels, and the first of them to test on; with `names`,
    a file of so many class names. -> flags"""
    folder.mkdir()
    for name, part in (("data_batch_1", labels), ("test_batch", labels[:1])):
        (folder / name).write_bytes(pickle.dumps(batch(len(part), labels=part)))
    if names:
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(c) for c in range(names)]}))
    return ["--dataset", "cifar10", "--data_path", str(folder), "--limit_train", str(len(labels))]


@pytest.mark.parametrize("names", [0, 1])
def test_one_class_alone_is_refused(start, tmp_path, names):
    """All losses are 0, whatever the labels: after hours of warm-up there would be nothing to divide by."""
    status, [line] = start(*cifar10_of(tmp_path / "data", [0] * 8, names))
    assert status == 1 and line.startswith(f"error: cifar10 in {tmp_path / 'data'} has one class alone")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "names"),
    [([0] * 40, 3), ([0] * 39 + [1], 0), ([0, 1, 0, 1, 2], 0), ([0, 1], 0)],
    ids=["one of three classes", "a class of one sample", "fewer than a batch", "two samples"],
)
def test_odd_data_sets_are_trained_on(start, tmp_path, labels, names):
    """Own data are often like this at first: a crash in the middle would be taken for a fault of the data."""
    status, errors = start(*cifar10_of(tmp_path / "data", labels, names))
    assert status == 0 and all(line.startswith("warning: ") for line in errors), errors
    last = records_of(tmp_path)[-1]
    assert last["phase"] == "train" and np.isfinite([last["loss_x"], last["penalty"]]).all()


def test_one_training_sample_is_refused(start, tmp_path):
    """A mixture of two cannot be fitted to one loss: better to hear of it before warm-up than after."""
    status, [line] = start(*cifar10_of(tmp_path / "data", [1]))
    assert status == 1 and "at least 2" in line and not (tmp_path / "run").exists()


def test_a_sample_of_one_image(tmp_path, monkeypatch, capsys):
    """The same for Clothing1M's samples, whose size is a flag: the data need not be there to tell."""
    argv = ["--num_batches", "1", "--batch_size", "1", "--out_dir", str(tmp_path), "--device", "cpu"]
    assert end_of(Train_clothing1M, argv, monkeypatch) == 1
    assert "--num_batches 1 --batch_size 1: a sample of 1 image" in capsys.readouterr().err


# ---- Devices ----


def test_a_card_that_is_not_there(start, monkeypatch, tmp_path):
    """Else a mistyped --gpuid ends in a CUDA stack trace."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, [line] = start("--device", "cuda", "--gpuid", "2")
    assert status == 1 and line.startswith("error: --gpuid 2: this machine has 2 CUDA cards, 0 is the first")
    assert not (tmp_path / "run").exists()


CARD = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ...")


@pytest.mark.parametrize("error", [CARD, HOST], ids=["card", "host"])
@pytest.mark.parametrize(
    ("owner", "function", "said"),
    [
        (engine, "train_step", "not enough memory to train; try --no_graph, a smaller --width or a smaller --batch"),
        (runtime.Runtime, "evaluation_forward", "no memory to evaluate 1 images; use a smaller --eval_batch_size"),
        (runtime.Runtime, "prepare", "not enough memory for two networks of --arch preresnet18; is another job using"),
    ],
    ids=["train", "evaluate", "build"],
)
def test_out_of_memory_names_the_flags_and_loses_nothing(begun, monkeypatch, owner, function, said, error):
    """A card that another job fills up in the night: the epochs before must stay, and the user learn what to make
    smaller."""

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full)
        status, [line] = begun("--eval_batch_size", "1")
    assert status == 1 and line.startswith(f"error: cpu: {said}")
    assert begun("--num_epochs", "1") == (0, [])  # as it was: finished, as far as that


@pytest.mark.parametrize("error", [MemoryError(), HOST], ids=["python", "torch"])
def test_too_little_memory_anywhere_is_one_line(start, tmp_path, monkeypatch, error):
    """Memory ends where nobody thought of it: a traceback tells a user that the program is broken."""

    def full(*_, **__):
        raise error

    monkeypatch.setattr(dataloader_cifar, "noisy_sets", full)
    status, [line] = start()
    assert status == 1 and line.startswith("error: not enough memory") and not (tmp_path / "run").exists()
