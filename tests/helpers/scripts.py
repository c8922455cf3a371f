"""The training scripts, run tiny: in this process, in their own, under torchrun."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dataloader_clothing1M
import dataloader_folder
import dataloader_webvision
import Train_cifar
import Train_clothing1M
import Train_folder
import Train_webvision
from dividemix import engine
from dividemix.codivide import normalise
from dividemix.engine import Terms
from dividemix.run import command_line, logs
from helpers.nets import same, snapshot
from helpers.trees import make_clothing1M, make_folder, make_webvision

LIMIT = 900  # seconds; none of these takes so long on a busy machine, so one that does is waiting for ever


class Job:
    """torchrun with `ranks` processes on this machine. In a session of its own, so that a hang can be ended whole."""

    def __init__(self, *arguments, ranks: int = 2):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
        # The two dashes are part of the documented command: without them torchrun takes --r for one of its own flags.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        self.process = subprocess.Popen(
            [*command, "--", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end(self) -> subprocess.CompletedProcess:
        try:
            output = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)  # torchrun ends its ranks, which have sessions of their own
            output = self.process.communicate()
            pytest.fail(f"still running after {LIMIT} s:\n{output[0]}\n{output[1]}")
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, *output)


def torchrun(*arguments, ranks: int = 2) -> subprocess.CompletedProcess:
    return Job(*arguments, ranks=ranks).end()


def make_listed_folder(root: Path, n: int = 24, noise: float = 0, sides: tuple[int, int] = (16, 24)) -> Path:
    """The images of `make_folder`, with a labels.csv that lists them."""
    make_folder(root, n, sides=sides)
    rows = [f"{path.relative_to(root)},{path.parent.name}\n" for path in sorted(root.rglob("*.jpg"))]
    (root / "labels.csv").write_text("path,label\n" + "".join(rows))
    return root


# The scripts and what the tests need to know of each. make: (root, noise, sides) -> its data folder. read: the lists of
# images of such a folder, by the names that they have in an epoch's record. name: the run folder's. size: flags of a
# tiny run. keep_scores: the flag that keeps all scores, if any. paths, labels: the files of the training images
# and labels, with `header` lines before the first. sizes: of each list, as args.json says it. metrics: of an epoch,
# beside those that all scripts have; * of each network. results: the paper's. resize: the short side of an image before
# its crop of 16 pixels; crop: its kind. The other values are what trains by default.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# fmt: off
CIFAR = SimpleNamespace(
    id="cifar", main=Train_cifar, logs=logs.CIFAR, make=lambda root, **_: root, name="digits_0.5_sym",
    keep_scores=["--save_scores"], sizes={"train": 48, "test": 347}, results={},
    metrics="test_acc test_acc* best_acc last10_acc loss_u auc* clean_precision* clean_recall*",
    weight_decay=5e-4, lr=0.02, alpha=4, conf_penalty=False, num_class=10,
)
CLOTHING1M = SimpleNamespace(
    id="clothing1M", main=Train_clothing1M, logs=logs.CLOTHING1M, make=make_clothing1M, name="clothing1m",
    size=["--num_batches", "4"], keep_scores=["--save_scores"],
    read=lambda tree: lists_of(dataloader_clothing1M.load(tree), train="train", val="val", test="test"),
    paths="noisy_train_key_list.txt", labels="noisy_label_kv.txt", separator=" ", header=0,
    sizes={"train": 56, "val": 28, "test": 28}, results={"test_acc": 74.76}, metrics="val_acc val_acc* best_val_acc*",
    mean_std=((0.6959, 0.6537, 0.6371), (0.3113, 0.3192, 0.3214)), resize=round(16 * 256 / 224), crop="crop",
    weight_decay=1e-3, lr=0.002, alpha=0.5, conf_penalty=True, num_class=14,
)
WEBVISION = SimpleNamespace(
    id="webvision", main=Train_webvision, logs=logs.WEBVISION, make=make_webvision, name="webvision",
    size=["--num_class", "10"], keep_scores=[],
    read=lambda tree: lists_of(dataloader_webvision.load(tree, 10), train="train", test="val", imagenet="imagenet"),
    paths="info/train_filelist_google.txt", labels="info/train_filelist_google.txt", separator=" ", header=0,
    sizes={"train": 40, "val": 20, "imagenet": 20},
    results={"test_acc": 77.32, "test_acc_top5": 91.64, "imagenet_acc": 75.20, "imagenet_acc_top5": 90.84},
    metrics="test_acc test_acc* test_acc_top5 imagenet_acc imagenet_acc* imagenet_acc_top5 best_acc last10_acc",
    mean_std=IMAGENET, resize=round(16 * 320 / 299), crop="resized_crop",
    weight_decay=5e-4, lr=0.01, alpha=0.5, conf_penalty=False, num_class=10,
)
FOLDER = SimpleNamespace(
    id="folder", main=Train_folder, logs=logs.FOLDER, make=make_listed_folder, name="folder_data",
    size=["--warm_up", "1"], keep_scores=["--save_scores"], read=lambda tree: dataloader_folder.load(tree).lists,
    paths="labels.csv", labels="labels.csv", separator=",", header=1,
    sizes={"train": 24, "val": 24, "test": 24}, results={},
    metrics="val_acc val_acc* test_acc test_acc* best_acc last10_acc loss_u",
    weight_decay=5e-4, lr=0.02, alpha=4, conf_penalty=False, num_class=4,
)
# fmt: on
# The same script, but images are read from their files in each pass
streamed = {"id": "folder-streamed", "size": [*FOLDER.size, "--data_mode", "stream"], "mean_std": IMAGENET}
STREAMED = SimpleNamespace(**vars(FOLDER) | streamed, resize=round(16 * 256 / 224), crop="crop")


def lists_of(data, **names: str) -> dict:
    return {name: getattr(data, attribute) for name, attribute in names.items()}


def image_of(script, tree: Path, i: int) -> Path:
    """Training image i, as its list has it."""
    lines = (tree / script.paths).read_text().splitlines()[script.header :]
    return tree / lines[i].rsplit(script.separator, 1)[0]


ROOT = Path(__file__).resolve().parents[2]


def run_script(*arguments: str, cwd: Path, script: str = "Train_cifar.py") -> subprocess.CompletedProcess:
    """The real script as a user starts it, from another folder than its own, on the CPU and without a terminal."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def tiny(out_dir: Path, *flags: str) -> list[str]:
    """Flags of a run of a second: 48 digits, a net of width 4 on the CPU, one warm-up epoch. Later flags win."""
    data = ["--dataset", "digits", "--limit_train", "48", "--batch_size", "16"]
    size = ["--width", "4", "--warm_up", "1", "--num_epochs", "2", "--device", "cpu", "--precision", "fp32"]
    return [*data, *size, "--out_dir", str(out_dir), *flags]


# Flags of the scripts for large images, the same: a net of width 4 on crops of 16 pixels. Later flags win.
SMALL_NET = ["--arch", "preresnet18", "--width", "4", "--image_size", "16", "--batch_size", "8"]
SMALL_NET += ["--device", "cpu", "--precision", "fp32"]


def small_run(script, tree: Path, out_dir: Path, *flags: str) -> list[str]:
    """Flags of such a run of any of the scripts. Later flags win."""
    if script is CIFAR:
        return tiny(out_dir, *flags)
    data = ["--data_path", str(tree), *SMALL_NET, *script.size, "--num_epochs", "2", "--workers", "0"]
    return [*data, "--out_dir", str(out_dir), *flags]


def end_of(script, argv: list[str], monkeypatch) -> int:
    """The exit status of a script's main, in this process; what it prints is as in a process of its own."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `command_line` sets it
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        command_line(lambda _: script.main(argv))
    return ended.value.code


def note_phases(monkeypatch, script) -> list[dict]:
    """From now on the script trains nothing: every call of warmup_epoch and train_epoch is noted instead, with the
    net's state, its peer, data and division, the method's settings, the phase, and the optimizer's settings."""
    calls: list[dict] = []

    def note(kind: str, net, optimizer, **arguments) -> Terms:
        [group] = optimizer.param_groups
        assert {*map(id, group["params"])} == {*map(id, net.parameters())}, "another net's optimizer"
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        calls.append({"kind": kind, "net": net, "state": snapshot(net), **settings, **arguments})
        return Terms(1.0, 1.0, 0.0, 0.0)

    def warmup(net, optimizer, data, mixmatch, phase):
        return note("warmup", net, optimizer, data=data, mixmatch=mixmatch, phase=phase)

    def train(net, peer, optimizer, data, division, mixmatch, phase):
        arguments = {"peer": peer, "data": data, "division": division, "mixmatch": mixmatch, "phase": phase}
        return note("train", net, optimizer, **arguments)

    monkeypatch.setattr(script, "warmup_epoch", warmup)
    monkeypatch.setattr(script, "train_epoch", train)
    return calls


def note_co_division(monkeypatch, script) -> list[dict]:
    """From now on the script's scores, training and tests are noted, with the networks as they are then and, of data
    that are drawn, the rows, in the form that `assert_co_divided` takes. -> the notes, to which more are added"""
    events: list[dict] = []
    loss, train, test = engine.per_sample_loss, script.train_epoch, script.test

    def spy_loss(net, data, *arguments, **settings):
        scored = loss(net, data, *arguments, **settings)
        event = {"what": "score", "net": snapshot(net), "rows": getattr(data, "index", ())}
        events.append(event | {"loss": normalise(scored.loss.numpy())})
        return scored

    def spy_train(net, peer, optimizer, data, division, mixmatch, phase):
        event = {"what": "train", "net": snapshot(net), "peer": snapshot(peer), "mixmatch": mixmatch}
        terms = train(net, peer, optimizer, data, division, mixmatch, phase)
        event |= {"rows": getattr(data, "index", ()), "loss": division.loss, "after": snapshot(net)}
        events.append(event)
        return terms

    def spy_test(nets, sets, *arguments, **settings):
        if not events or events[-1]["what"] != "test":  # on several sets, one after the other: noted once
            events.append({"what": "test", "nets": [snapshot(net) for net in nets]})
        return test(nets, sets, *arguments, **settings)

    monkeypatch.setattr(engine, "per_sample_loss", spy_loss)
    monkeypatch.setattr(script, "train_epoch", spy_train)
    monkeypatch.setattr(script, "test", spy_test)
    return events


def assert_co_divided(net2, net1, first, second) -> None:
    """Of one epoch, noted: both networks' scores, then both networks' training. Each learns from the other's division,
    with the other, as it is then, as its peer."""
    assert same(first["net"], net1["net"]) and same(second["net"], net2["net"])
    assert same(first["peer"], net2["net"]), "net 1's peer is not net 2"
    assert same(second["peer"], first["after"]) and not same(first["after"], first["net"]), "a stale peer"
    assert np.abs(net1["loss"] - net2["loss"]).max() > 1e-3  # the two divisions can be told apart
    for trained, divided in ((first, net2), (second, net1)):
        np.testing.assert_allclose(trained["loss"], divided["loss"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(trained["rows"], divided["rows"])  # not another sample than was divided
