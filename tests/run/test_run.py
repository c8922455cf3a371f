"""The run folder: the same command again continues the run, and ends as an uninterrupted run ends."""

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.runs import (
    args_of,
    assert_equal,
    begin,
    end_epoch,
    go_on,
    last_state,
    opened,
    train,
    validated,
    without_times,
)
from helpers.scripts import ROOT

from dividemix import DivideMixError, files
from dividemix.codivide import Mixture
from dividemix.run import checkpoint, logs
from dividemix.run.run import Run, lock_folder, score_arrays
from dividemix.runtime.ranks import Ranks
from dividemix.seeds import draws, seeded


@pytest.mark.parametrize(
    "noise", [("--r", "0.5"), ("--r", "0.9"), ("--noise_mode", "asym", "--r", "0.4", "--method", "ce")]
)
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path, noise):
    """Stopped in warm-up, after the first division and where the learning rate drops: weights, momentum, loss
    history (at 90 % five epochs are averaged) and metrics. A run that a stop changes cannot be reproduced."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(straight, 5, *noise)
    for epochs in (1, 2, 4, 5):
        train(stopped, epochs, *noise)
    a, b = last_state(straight), last_state(stopped)
    assert_equal(a, b)
    assert [record["lr"] for record in a["records"]] == [0.02] * 3 + [0.002] * 2
    for name in ("acc.txt", "stats.txt"):
        assert (straight / name).read_text() == (stopped / name).read_text()
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (straight, stopped)]
    assert [without_times(r) for r in lines[0]] == [without_times(r) for r in lines[1]]
    best = torch.load(stopped / "best.pt", weights_only=True)
    assert_equal(torch.load(straight / "best.pt", weights_only=True), best)
    assert best["epochs"] == a["best_epochs"] and best["epochs"][0] == best["epochs"][1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs, to be copied."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, 2)
    return folder


KEYS = {"nets", "optimizers", "histories", "records", "histograms", "best_epochs", "config", "pins", "versions"}
KEYS |= {"script", "format"}


def test_a_checkpoint_holds_what_a_run_goes_on_from_and_no_more(tmp_path):
    """What is missing there is lost with the process: a run goes on without its momentum, or under other settings. What
    is too much, such as a division that the next epoch makes anew, has to be kept in line with the rest."""
    train(tmp_path / "run", 4, "--loss_window", "3", "--save_scores")
    state = last_state(tmp_path / "run")
    assert state.keys() == KEYS and (state["format"], state["script"]) == (checkpoint.FORMAT, "Train_cifar.py")
    assert [len(state[name]) for name in ("nets", "optimizers", "histories", "best_epochs")] == [2] * 4
    for net, optimizer in zip(state["nets"], state["optimizers"], strict=True):
        assert optimizer["state"][0]["momentum_buffer"].shape == net["conv1.weight"].shape
    scores = [np.load(tmp_path / "run" / "scores" / f"epoch_{epoch:03d}.npz") for epoch in (2, 3)]
    for k, history in enumerate(state["histories"], start=1):  # of three divided epochs, for a window of three
        assert [losses.tolist() for losses in history] == [each[f"raw_loss_net{k}"].tolist() for each in scores]
    assert [record["epoch"] for record in state["records"]] == [0, 1, 2, 3] and state["records"][1]["best_acc"] > 0
    flags = {"seed": 123, "dataset": "digits", "r": 0.5, "noise_mode": "sym", "width": 4}
    assert (flags | {"lambda_u": 25, "num_class": 10}).items() <= state["config"].items()
    assert len(state["pins"]["labels_sha256"]) == 64 and state["versions"]["torch"] == torch.__version__


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("damage", ["empty", "10 bytes", "half", "last byte", "one bit", "gone"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(copy, damage):
    """A disk that lies, a copy that was cut: hours of training end with an error, or go on from damaged weights."""
    file = copy / "epoch-001.pt"
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    cut = {"empty": 0, "10 bytes": 10, "half": len(content) // 2, "last byte": len(content) - 1}.get(damage)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(content[:cut]))
    before = last_state_of(copy, "epoch-000.pt")
    with pytest.warns(UserWarning, match="passed over"):
        state = checkpoint.load_last(copy)
    assert_equal(state, before)


def last_state_of(folder, name):
    return torch.load(folder / name, weights_only=True)


def test_a_checkpoint_of_another_format_is_passed_over(copy, recwarn):
    """A run under way when the project is updated: it ends in a traceback, or goes on from values that mean another
    thing."""
    checkpoint.save_last(copy, 2, last_state(copy) | {"format": checkpoint.FORMAT + 1})
    assert [record["epoch"] for record in checkpoint.load_last(copy)["records"]] == [0, 1]
    [warning] = recwarn
    assert f"{copy / 'epoch-002.pt'} is passed over" in str(warning.message) and "version" in str(warning.message)


@pytest.mark.parametrize("epoch", ["001", "100"])
def test_a_lost_pointer_is_no_new_start(copy, epoch):
    """The run would begin again over its own checkpoints, and delete them with its first epoch."""
    (copy / "last.json").unlink()
    (copy / "epoch-001.pt").rename(copy / f"epoch-{epoch}.pt")
    before = {path.name for path in copy.iterdir()} | {".lock"}
    with pytest.raises(DivideMixError, match=r"last[.]json is missing"):
        train(copy, 3)
    assert {path.name for path in copy.iterdir()} == before


@pytest.mark.parametrize("content", ["", "{", "{}", '{"file": "a"}'])
def test_a_damaged_pointer_is_one_line(copy, content):
    """last.json is the smallest file and the first to be damaged by hand: a stack trace, or a new start over what
    could still be saved."""
    (copy / "last.json").write_text(content)
    with pytest.raises(DivideMixError, match=r"last\.json .*--fresh") as error:
        train(copy, 3)
    assert "\n" not in str(error.value) and (copy / "epoch-001.pt").exists()


def test_a_folder_of_another_script_is_refused(copy):
    """Two scripts' epochs under one number; or a stack trace at weights that do not fit, which names neither."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(DivideMixError, match=r"a run of Train_cifar\.py: .*--fresh") as error:
        Run(copy, args_of(copy), logs=logs.WEBVISION)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_no_readable_checkpoint_is_an_error_not_a_new_start(copy):
    """Starting anew in silence would overwrite what could still be saved."""
    for file in copy.glob("epoch-*.pt"):
        file.write_bytes(b"")
    with pytest.raises(DivideMixError, match="--fresh"), pytest.warns(UserWarning, match="passed over"):
        train(copy, 3)


def test_a_checkpoint_that_would_run_code_is_refused(copy, tmp_path):
    """A checkpoint from the internet is a pickle: loading it must not be trusting it."""
    marker = tmp_path / "payload"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    evil = tmp_path / "evil.pt"
    torch.save({"nets": [Payload(), Payload()]}, evil)
    with pytest.raises(DivideMixError, match=str(evil)):
        files.load_file(evil)
    sha256 = hashlib.sha256(evil.read_bytes()).hexdigest()
    (copy / "last.json").write_text(json.dumps({"file": "evil.pt", "sha256": sha256, "epoch": 1, "previous": None}))
    shutil.copy(evil, copy)
    with pytest.raises(DivideMixError, match="can be read"), pytest.warns(UserWarning, match="passed over"):
        train(copy, 3)
    assert not marker.exists()


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    """A full disk in the middle of a checkpoint must not take the one before with it."""
    file = tmp_path / "file"
    files.write_atomically(file, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        files.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_checkpoints_are_kept(tmp_path):
    """All of them would fill the disk (180 MB an epoch at full width), one alone could not be fallen back from."""
    for epoch in range(4):
        checkpoint.save_last(tmp_path, epoch, {"epoch": epoch, "format": checkpoint.FORMAT})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch-002.pt", "epoch-003.pt", "last.json"]
    assert checkpoint.load_last(tmp_path)["epoch"] == 3


def test_two_processes_in_one_folder(copy):
    """Two runs that write the same checkpoints end with neither."""
    args = args_of(copy)
    with Run(copy, args), pytest.raises(DivideMixError, match="another process"):
        Run(copy, args)


def test_changed_labels_are_refused(copy):
    """Going on with other labels than the run began with gives a number that belongs to no noise file."""
    file = copy / "digits_0.5_sym.json"
    labels = json.loads(file.read_text())
    labels[0] = (labels[0] + 1) % 10
    file.write_text(json.dumps(labels))
    with pytest.raises(DivideMixError, match="not those"):
        train(copy, 3)


def test_logs_are_made_anew_from_the_checkpoint(copy):
    """A kill in the middle of a line, or between the checkpoint and the logs, must not leave an epoch twice or half."""
    expected = {name: (copy / name).read_text() for name in ("acc.txt", "stats.txt", "metrics.jsonl")}
    (copy / "metrics.jsonl").write_text(expected["metrics.jsonl"] + '{"epoch": 2, "test')
    (copy / "acc.txt").write_text("")
    (copy / "stats.txt").write_text(expected["stats.txt"] * 2)
    train(copy, 2)
    assert {name: (copy / name).read_text() for name in expected} == expected


def test_every_phase_has_draws_of_its_own():
    """Two phases with the same stream would show both nets the same views, or every epoch the same order."""
    streams = {
        (phase, epoch, net): tuple(draws(123, phase, epoch, net).integers(2**62, size=2))
        for phase in ("warmup", "train", "divide")
        for epoch in (0, 1)
        for net in (0, 1)
    }
    assert len(set(streams.values())) == len(streams)
    assert tuple(draws(123, "train", 1, 1).integers(2**62, size=2)) == streams["train", 1, 1]
    assert tuple(draws(124, "train", 1, 1).integers(2**62, size=2)) != streams["train", 1, 1]


def test_initial_weights_follow_from_seed_and_net_and_leave_the_global_stream_alone():
    """Two equal nets confirm each other's errors: co-training would be self-training."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, second, again = (seeded(5, net, lambda: torch.nn.Linear(4, 4)).weight for net in (0, 1, 0))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# ---- The best epochs and the end ----


def best(folder):
    file = torch.load(folder / "best.pt", weights_only=True)
    assert [int(state["w"][1]) for state in file["nets"]] == [1, 2]
    assert [int(state["w"][0]) for state in file["nets"]] == file["epochs"]
    return file["epochs"]


def test_each_network_keeps_the_weights_of_its_own_best_epoch(tmp_path):
    """Clothing1M's test is of the two best networks: else one of them is tested at an epoch that was worse. The first
    of equals is kept, as the authors do."""
    accuracies = [(60.0, 60.0), (70.0, 50.0), (65.0, 80.0), (70.0, 10.0), (71.0, 80.0)]
    expected = [[0, 0], [1, 0], [1, 2], [1, 2], [4, 2]]
    for stop, epochs in enumerate(expected, start=1):  # a new process for each epoch
        run = go_on(tmp_path / "run", accuracies, stop)
        assert run.best_epochs == best(tmp_path / "run") == epochs
        assert [int(state["w"][0]) for state in run.best_networks()] == epochs
    last = run.records[-1]
    assert (last["best_val_acc_net1"], last["best_val_acc_net2"]) == (71.0, 80.0)
    assert not last.keys() & {"test_acc", "best_acc", "last10_acc"}
    assert go_on(tmp_path / "whole", accuracies).best_epochs == expected[-1]
    assert best(tmp_path / "whole") == expected[-1]
    assert (tmp_path / "run" / "acc.txt").read_text().splitlines()[
        1
    ] == "Validation Epoch:1      Acc1:70.00  Acc2:50.00"


def test_the_shipped_networks_of_own_images_are_those_of_the_last_of_equal_epochs(tmp_path):
    """Else `predict` and `export` take a warm-up epoch's networks, whose few held-out labels came out as well."""
    epochs = [("warmup", 90.0), ("train", 80.0), ("train", 80.0)]
    for stop, expected in enumerate([0, 1, 2], start=1):  # a new process for each epoch
        with opened(tmp_path / "run", logs.FOLDER) as run:
            begin(run)
            for epoch in run.epochs(stop):
                phase, accuracy = epochs[epoch]
                end_epoch(run, dict.fromkeys(("val_acc", "val_acc_net1", "val_acc_net2"), accuracy), phase)
        assert best(tmp_path / "run") == [expected] * 2


def test_a_machine_that_dies_between_checkpoint_and_best(tmp_path):
    """Else the run goes on with a best.pt that is not of its best epochs, and nobody is told."""
    go_on(tmp_path / "run", [(60.0, 60.0), (70.0, 50.0)])
    before = (tmp_path / "run" / "best.pt").read_bytes()
    go_on(tmp_path / "run", [(60.0, 60.0), (70.0, 50.0), (40.0, 90.0)])
    (tmp_path / "run" / "best.pt").write_bytes(before)
    assert go_on(tmp_path / "run", [()] * 3).best_epochs == [1, 2] == best(tmp_path / "run")


@pytest.mark.parametrize("damage", ["gone", "half"])
def test_best_weights_that_are_lost_are_said_to_be(tmp_path, damage):
    """Else a damaged best.pt ends a run of days, or the other network's best weights come from nowhere."""
    go_on(tmp_path / "run", [(60.0, 60.0), (70.0, 50.0)])
    file = tmp_path / "run" / "best.pt"
    lost = pytest.warns(UserWarning, match=r"best\.pt cannot be read .* all weights in it are now those of epoch 2")
    with opened(tmp_path / "run") as run, lost:
        begin(run)
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:300])
        for _ in run.epochs(3):
            end_epoch(run, validated(65.0, 65.0))
    assert run.best_epochs == best(tmp_path / "run") == [2, 2]


def test_a_flag_that_the_first_start_did_not_know_is_another_setting(tmp_path):
    """A later version's flag is given half-way: half of the epochs are of one method, half of another."""
    go_on(tmp_path / "run", [(60.0, 60.0)])
    with pytest.raises(DivideMixError, match=r"other settings \(--lr was None, now 1\.0\): .*--fresh"):
        opened(tmp_path / "run", lr=1.0)


def test_a_damaged_args_json_is_named(tmp_path):
    """Else the same command ends in a stack trace for good, although it could write the file anew."""
    go_on(tmp_path / "run", [(60.0, 60.0)])
    (tmp_path / "run" / "args.json").write_text("{")
    with pytest.raises(DivideMixError, match=r"args\.json cannot be read .*delete it"), opened(tmp_path / "run") as run:
        begin(run)
    (tmp_path / "run" / "args.json").unlink()
    go_on(tmp_path / "run", [(60.0, 60.0)] * 2)
    assert [start["epoch"] for start in json.loads((tmp_path / "run" / "args.json").read_text())["starts"]] == [1]


def test_the_result_is_left_once_and_the_same_again(tmp_path, monkeypatch):
    """Else a table of results is made from a run that has not ended, or acc.txt ends in as many test accuracies as the
    command was given."""
    folder = tmp_path / "run"
    for _ in range(2):
        final = go_on(folder, [(60.0, 60.0)]).finish("the end", test_acc=74.758, more=float("inf"))
        assert final == json.loads((folder / "result.json").read_text()) and final["val_acc_net1"] == 60.0
        assert (final["test_acc"], final["more"], final["run_dir"]) == (74.758, None, str(folder))
        lines = (folder / "acc.txt").read_text().splitlines()
        assert lines == ["Validation Epoch:0      Acc1:60.00  Acc2:60.00", "Test Accuracy:74.76"]
    go_on(folder, [(60.0, 60.0), (61.0, 61.0)])  # continued: that was not its result
    assert not (folder / "result.json").exists() and "Test" not in (folder / "acc.txt").read_text()


def test_scores_of_a_sample_say_whose_they_are():
    """Each of Clothing1M's networks scores images of its own: else no loss can be traced to an image."""
    loss, prediction, index = np.array([1.0, 2.0], np.float32), np.array([3, 4]), np.array([70, 8])
    arrays = score_arrays(1, Mixture(0.5).divide(loss, prediction), index)
    assert all(name.endswith("_net2") for name in arrays) and arrays["index_net2"].tolist() == [70, 8]
    assert arrays["raw_loss_net2"].tolist() == [1.0, 2.0] and arrays["prediction_net2"].tolist() == [3, 4]
    assert arrays["loss_net2"].tolist() == [0.0, 1.0] and arrays["clean_probability_net2"].tolist()[0] > 0.5
    assert "index_net1" not in score_arrays(0, Mixture(0.5).divide(loss, prediction))


def test_a_run_folders_lock_is_not_held_on_by_workers(tmp_path):
    """Killed, the main process leaves its workers alive for some seconds: the same command again would be refused, as
    if another process was still training."""
    lock, context = lock_folder(tmp_path), multiprocessing.get_context("fork")
    running = context.Event()

    def work():
        running.set()
        time.sleep(60)

    worker = context.Process(target=work)
    worker.start()
    assert running.wait(30)
    try:
        lock.release()
        lock_folder(tmp_path).release()
    finally:
        worker.kill()
        worker.join()


def test_ranks_that_read_other_data_are_refused(tmp_path, monkeypatch):
    """A machine with an older copy of a list would train on other images than the division says."""
    monkeypatch.setattr(Ranks, "broadcast_from_rank0", lambda self, function, *args: "the first rank's")
    run = Run.__new__(Run)
    run.ranks, run.state, run.pins = Ranks(1, 2), {}, {}
    run.pin("images_sha256", "the first rank's", "")
    with pytest.raises(DivideMixError, match="images_sha256: this rank reads other data than the first rank"):
        run.pin("images_sha256", "mine", "")


# ---- Several ranks ----

RANKS = """
import sys, torch
from pathlib import Path
from dividemix import DivideMixError, runtime
from dividemix.run import options
from dividemix.runtime import ranks
from helpers.runs import begin, end_epoch, opened, validated

def main(_):
    me = ranks.join(torch.device("cpu"))
    folder, lr = Path(sys.argv[1]), float(sys.argv[2])
    mine = folder if me.first else Path("/proc/nowhere")  # the others need not see the folder
    with opened(mine, runtime=runtime.Runtime(torch.device("cpu"), ranks=me), lr=lr) as run:
        run.pin("labels", 1, "other labels")
        read = len(run.state)
        run.save_labels(given=torch.zeros(2).numpy())
        begin(run)
        run.say("once")
        begun = len(run.records)
        for epoch in run.epochs(begun + 1):
            with run.phase("test") as phase:
                list(phase.bar(range(2)))
            accuracy = epoch * (1 + me.rank)  # should the ranks ever differ, the first one's counts
            end_epoch(run, validated(accuracy, -accuracy))
        nets = [float(state["w"][0]) for state in run.best_networks()]
        run.finish("the end", test_acc=5.0)
        seen = [begun, run.records[-1]["val_acc_net1"], run.best_epochs, nets, read]
        print("rank", me.rank, seen, flush=True)
        if lr == 2:
            if not me.first:
                raise DivideMixError("this one fails")
            me.sum(torch.zeros(1))

options.command_line(main)
"""


def two_ranks(folder, lr):
    """Two processes as torchrun starts them. -> [(exit status, stdout, stderr)]"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    address["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(folder), str(lr)],
            env=os.environ
            | address
            | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_two_ranks_have_one_run_folder(tmp_path):
    """Else several processes write one file at once, each goes on from what it alone could read, or every line is
    printed by all."""
    for begun in (0, 1):
        first, second = two_ranks(tmp_path / "run", 1)
        assert first[0] == second[0] == 0, first[2] + second[2]
        seen = f"[{begun}, {begun}, [{begun}, 0], [{begun}.0, 0.0], {0 if begun == 0 else len(KEYS)}]"
        assert f"rank 0 {seen}" in first[1] and second[1] == f"rank 1 {seen}\n"
        assert first[1].count("once") == 1 and first[1].count("epoch ") >= 1
        assert first[2] == second[2] == ""
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_rank_that_ends_ends_the_others(tmp_path):
    """A refused run, or one rank's fault, must end the job with a line that says why: else a cluster's nodes wait for
    each other until their time is up."""
    with opened(tmp_path / "run", lr=1.0) as run:
        begin(run)
        for _ in run.epochs(1):
            end_epoch(run, validated(60.0, 60.0))
    started = time.monotonic()
    first, second = two_ranks(tmp_path / "run", 3)
    assert first[0] == second[0] == 1 and time.monotonic() - started < 60
    assert first[2].startswith("rank 0: error: ") and "--lr was 1.0, now 3.0" in first[2] and first[2].count("\n") == 1
    assert second[2].splitlines()[-1].startswith("rank 1: error: another rank ended"), second[2]
    first, second = two_ranks(tmp_path / "other", 2)
    assert first[0] == second[0] == 1
    assert second[2] == "rank 1: error: this one fails\n"
    assert first[2].splitlines()[-1].startswith("rank 0: error: another rank ended"), first[2]
