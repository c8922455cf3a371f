"""The run folder: the same command again continues the run, and ends as an uninterrupted run ends. What kills and
signals leave is in test_signals.py."""

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import (
    Forked,
    assert_same_run,
    begin,
    contents,
    end_epoch,
    full,
    go_on,
    last_epoch,
    last_state,
    opened,
    read_records,
    validated,
)

from dividemix import DivideMixError, files, runtime
from dividemix.codivide import Mixture
from dividemix.engine import Terms
from dividemix.run import checkpoint, histograms, logs, run
from dividemix.run.run import lock_folder, set_aside
from dividemix.runtime import ranks
from dividemix.runtime.ranks import Ranks

EPOCH = (60.0, 60.0)  # net 1's and net 2's accuracy
KEYS = {"nets", "optimizers", "histories", "records", "histograms", "best_epochs", "config", "pins", "versions"}
KEYS |= {"script", "format", "probabilities"}


def test_what_a_checkpoint_holds(tmp_path):
    """What it holds beyond the state of a run would have to be kept in line with that, in each change of the method."""
    go_on(tmp_path, [EPOCH], r=0.5, num_epochs=1)
    state = last_state(tmp_path)
    assert state.keys() == KEYS and (state["format"], state["script"]) == (checkpoint.FORMAT, "Train_clothing1M.py")
    assert state["config"] == {"seed": 123, "r": 0.5}


def test_every_phase_has_draws_of_its_own_that_follow_from_the_seed(tmp_path):
    """Else both nets see the same views, every epoch has the same order, or two equal nets confirm each other."""
    draws = {}
    for seed in (123, 124):
        with opened(tmp_path / str(seed), seed=seed) as this:
            for this.epoch in (0, 1):
                for key in [(name, k) for name in ("warmup", "train", "divide") for k in (0, 1)]:
                    first, again = (this.phase(*key).rng.integers(2**62, size=2).tolist() for _ in range(2))
                    assert first == again
                    draws[seed, this.epoch, *key] = tuple(first)
    assert len({*draws.values()}) == len(draws) == 24


# ---- Whose folder it is ----


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    """Half of a run's epochs would be of one method, script or noise, and half of another, under one number."""
    folder = tmp_path / "run"
    go_on(folder, [EPOCH], r=0.5, num_epochs=1)
    before = contents(folder)
    for flags, said in (({"r": 0.2}, r"--r was 0\.5, now 0\.2"), ({"r": 0.5, "new": 1}, "--new was None, now 1")):
        with pytest.raises(DivideMixError, match=rf"{said}.*--fresh"):
            opened(folder, num_epochs=1, **flags)
    with pytest.raises(DivideMixError, match=r"a run of Train_clothing1M\.py"):
        opened(folder, logs.WEBVISION, r=0.5)
    assert contents(folder) == before
    free = {"num_epochs": 2, "eval_batch_size": 7, "device": "cuda", "workers": 3}  # change nothing that is computed
    with opened(folder, r=0.5, **free) as this, pytest.raises(DivideMixError, match="another process"):
        opened(folder, r=0.5)
    assert this.begun


def test_data_that_changed_are_refused(tmp_path, monkeypatch):
    """Else a run goes on with other labels, or a rank with an older copy of a list trains on other images."""
    with opened(tmp_path / "run") as this:
        this.pin("labels", "a", "")
        assert this.keep("mean", [1.0]) == [1.0]
        begin(this)
        for _ in this.epochs(1):
            end_epoch(this, validated())
    with opened(tmp_path / "run") as this:
        this.pin("labels", "a", "")
        assert this.keep("mean", [2.0]) == [1.0]
        with pytest.raises(DivideMixError, match=r"other labels: .*--fresh"):
            this.pin("labels", "b", "other labels")
        monkeypatch.setattr(Ranks, "broadcast_from_rank0", lambda self, function, *args: "the first rank's")
        with pytest.raises(DivideMixError, match="labels: this rank reads other data"):
            this.pin("labels", "a", "")
        monkeypatch.undo()


def test_fresh_keeps_the_old_folder_locked_until_the_new_one_is(tmp_path, monkeypatch):
    """A process that came just before `--fresh` would train in the old folder; a refused run would lose it."""
    folder, locked = tmp_path / "run", []
    go_on(folder, [EPOCH])
    before = contents(folder)

    def lock(path):
        if locked:
            with pytest.raises(DivideMixError, match="another process"):
                lock_folder(next(tmp_path.glob("run.*")))
        locked.append(path)
        return lock_folder(path)

    monkeypatch.setattr(run, "lock_folder", lock)
    with opened(folder, fresh=True) as this:
        [aside] = tmp_path.glob("run.*")
        assert len(locked) == 2 and not this.begun and contents(aside) == before
        lock_folder(aside).release()
    assert contents(folder) == before and not [*tmp_path.glob("run.*")]  # it ended before it began


def test_fresh_never_deletes_and_needs_a_folder_with_a_name(tmp_path, monkeypatch):
    """Else `--run_dir .. --fresh` moves the folder above, or a clock that was set back moves one run over another."""
    for path in (".", "/", "a/.."):
        with pytest.raises(DivideMixError, match=rf"--fresh cannot rename {path}"):
            set_aside(Path(path))
    now = run.datetime.datetime(2020, 1, 1)
    monkeypatch.setattr(run, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: now)))
    for k in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / str(k)).touch()
        assert (set_aside(tmp_path / "run") / str(k)).exists()
    assert len([*tmp_path.iterdir()]) == 3


def test_links_in_a_run_folder_lead_to_no_other_file(tmp_path):
    """A run folder from somebody else, to be continued: links in it overwrite its user's own files."""
    folder, thesis = tmp_path / "run", tmp_path / "thesis"
    go_on(folder, [EPOCH])
    thesis.write_text("precious")
    for name in ("labels.npz", "metrics.jsonl", "best.pt", "epoch-001.pt", "histograms.jsonl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(thesis)
    go_on(folder, [EPOCH, (70.0, 70.0)])
    assert len(read_records(folder)) == 2
    for name in ("last.json", ".lock"):
        (folder / name).unlink()
        (folder / name).symlink_to(thesis)
        with pytest.raises(DivideMixError, match=str(folder)):
            opened(folder)
    assert thesis.read_text() == "precious"


def test_a_path_that_is_not_utf_8(tmp_path):
    """A folder of another age or language: TensorBoard, or a line with its name, ends the run with a stack trace."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    status, out, err = Forked(tmp_path / "output", lambda _: go_on(folder, [EPOCH])).end()
    assert status == 0 and last_epoch(folder) == 0 and "caf\\udce9" in out
    assert err.startswith("warning: no TensorBoard events") and err.count("\n") == 1


# ---- What is written ----


def test_a_run_that_goes_on_writes_its_logs_anew(tmp_path):
    """A kill must not leave an epoch twice or half, nor temporary files, each as large as a checkpoint."""
    folder, names = tmp_path / "run", ("acc.txt", "stats.txt", "metrics.jsonl", "histograms.jsonl")
    go_on(folder, [EPOCH] * 2)
    expected = {name: (folder / name).read_text() for name in names}
    (folder / "metrics.jsonl").write_text(expected["metrics.jsonl"] + '{"epoch": 2, "test')
    (folder / "histograms.jsonl").write_text(expected["histograms.jsonl"] * 2)
    (folder / "acc.txt").write_text("")
    (folder / "stats.txt").unlink()
    for orphan in (".epoch-002.pt.abc.tmp", "scores/.epoch_002.npz.abc.tmp"):
        (folder / orphan).write_bytes(b"half")
    go_on(folder, [EPOCH] * 2)
    assert {name: (folder / name).read_text() for name in names} == expected
    assert not [*folder.rglob("*.tmp")]
    starts = json.loads((folder / "args.json").read_text())["starts"]
    assert [start["epoch"] for start in starts] == [0, 2]


def best(folder) -> list[int]:
    file = torch.load(folder / "best.pt", weights_only=True)
    assert [int(state["w"][1]) for state in file["nets"]] == [1, 2]
    assert [int(state["w"][0]) for state in file["nets"]] == file["epochs"]
    return file["epochs"]


def test_each_network_keeps_the_weights_of_its_own_best_epoch(tmp_path):
    """Clothing1M's test is of the two best networks, each at its own best epoch, of equals the first."""
    accuracies = [(60.0, 60.0), (70.0, 50.0), (65.0, 80.0), (70.0, 10.0), (71.0, 80.0)]
    expected = [[0, 0], [1, 0], [1, 2], [1, 2], [4, 2]]
    for stop, epochs in enumerate(expected, start=1):  # a new start for each epoch
        this = go_on(tmp_path / "run", accuracies, stop)
        assert this.best_epochs == best(tmp_path / "run") == epochs
        assert [int(state["w"][0]) for state in this.best_networks()] == epochs
    last = this.records[-1]
    assert (last["best_val_acc_net1"], last["best_val_acc_net2"]) == (71.0, 80.0)
    assert go_on(tmp_path / "straight", accuracies).best_epochs == expected[-1] == best(tmp_path / "straight")


def test_best_weights_that_are_lost_are_said_to_be(tmp_path):
    """Else a damaged best.pt ends a run of days, or the other network's best weights come from nowhere."""
    go_on(tmp_path / "run", [EPOCH, (70.0, 50.0)])
    lost = pytest.warns(UserWarning, match=r"best\.pt cannot be read .* epoch 2")
    with opened(tmp_path / "run") as this, lost:
        begin(this)
        (tmp_path / "run" / "best.pt").write_bytes(b"half")
        for _ in this.epochs(3):
            end_epoch(this, validated(65.0, 65.0))
    assert this.best_epochs == best(tmp_path / "run") == [2, 2]


def test_the_result_is_left_once_and_the_same_again(tmp_path):
    """Else a table is made from a run that has not ended, or acc.txt has a test accuracy for each start."""
    folder = tmp_path / "run"
    for _ in range(2):
        final = go_on(folder, [EPOCH]).finish("the end", test_acc=74.758, more=float("inf"))
        assert final == json.loads((folder / "result.json").read_text()) and final["val_acc_net1"] == 60.0
        assert (final["test_acc"], final["more"], final["run_dir"]) == (74.758, None, str(folder))
        lines = (folder / "acc.txt").read_text().splitlines()
        assert lines == ["Validation Epoch:0      Acc1:60.00  Acc2:60.00", "Test Accuracy:74.76"]
    go_on(folder, [EPOCH, (61.0, 61.0)])  # continued: that was not its result
    assert not (folder / "result.json").exists() and "Test" not in (folder / "acc.txt").read_text()


def test_what_is_kept_of_an_epoch_is_each_networks_own(tmp_path):
    """Else a loss stands under the other network's name or image, or for a network that found nothing clean."""
    folder, index = tmp_path / "run", [np.array([70, 8, 5, 3]), np.arange(4)]
    losses = [np.array([0.0, 0.1, 0.9, 1.0], np.float32), np.array([1.0, 0.8, 0.2, 0.0], np.float32)]
    divisions = [Mixture(0.5).divide(loss, np.arange(4) + k) for k, loss in enumerate(losses)]
    found_clean = [[1, 2], [1], []]  # networks, in each epoch
    with opened(folder, save_scores=True) as this:
        this.save_labels(index=np.arange(4), given=np.array([0, 0, 1, 1]), true=np.zeros(4, int))
        begin(this)
        for epoch in this.epochs(3):
            present = [division if k in found_clean[epoch] else None for k, division in enumerate(divisions, start=1)]
            this.end_epoch(0.1, present, [Terms(1.0, 1.0, 0.0, 0.0)] * 2, validated(), index)
    assert [record["phase"] for record in this.records] == ["train", "train", "warmup"]
    lines = [json.loads(line) for line in (folder / "histograms.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == [{"epoch", "net1", "net2"}, {"epoch", "net1"}]
    both, first_only = map(np.load, sorted((folder / "scores").iterdir()))
    assert {name[-4:] for name in first_only} == {"net1"}
    for k, division in enumerate(divisions):
        expected = {"raw_loss": losses[k], "loss": division.loss, "clean_probability": division.clean_probability}
        for name, values in (expected | {"prediction": np.arange(4) + k, "index": index[k]}).items():
            np.testing.assert_array_equal(both[f"{name}_net{k + 1}"], values)
        assert lines[0][f"net{k + 1}"] == histograms.count(division, np.array([True, True, False, False]))
    go_on(folder, [EPOCH] * 2, save_scores=False, fresh=True)  # then the last epoch's are kept
    assert [path.name for path in (folder / "scores").iterdir()] == ["epoch_001.npz"]


def test_training_goes_on_while_an_epoch_is_written(tmp_path, monkeypatch):
    """Else the card idles at each epoch's end, or what is written mixes two epochs, or logs are ahead of weights."""
    go, saved, folder = threading.Event(), checkpoint.save_last, tmp_path / "run"
    monkeypatch.setattr(checkpoint, "save_last", lambda *rest: go.wait(60) and saved(*rest))

    def look(this):
        # The weights change in place, as by a step; in epoch 1 nothing of epoch 0 is written yet.
        assert checkpoint.load_last(folder) == {} and (folder / "metrics.jsonl").read_text() == ""
        if this.epoch == 1:
            go.set()

    go_on(folder, [EPOCH] * 2, in_epoch=look)
    states = [files.load_file(folder / f"epoch-00{epoch}.pt") for epoch in range(2)]
    assert [state["nets"][0]["w"].tolist() for state in states] == [[0, 1], [1, 1]]
    assert [len(state["records"]) for state in states] == [1, 2]


# ---- Disks and extras that fail ----


@pytest.mark.parametrize(
    ("file", "done", "epochs", "left"),
    [
        ("epoch-000.pt", 0, 4, "from the beginning (no epoch was finished)"),  # said at the next epoch's end
        ("epoch-001.pt", 1, 2, "continues {} with epoch 1"),  # no epoch follows
        ("best.pt", 0, 2, "continues {} with epoch 1"),
    ],
    ids=["first checkpoint", "last epoch", "after the checkpoint"],
)
def test_a_full_disk_is_told_as_it_is(tmp_path, monkeypatch, file, done, epochs, left):
    """Else a run goes on for days and nothing is kept, or its user relies on a checkpoint that does not exist."""
    folder, write_state, seen = tmp_path / "run", files.write_state, []
    go_on(folder, [EPOCH] * done)

    def write(path, state):
        return full() if path.name == file else write_state(path, state)

    def fill_up(this):
        seen.append(this.epoch)
        monkeypatch.setattr(files, "write_state", write)

    with pytest.raises(DivideMixError) as error:
        go_on(folder, [EPOCH] * epochs, in_epoch=fill_up)
    monkeypatch.undo()
    message = str(error.value)
    assert f"epoch {done} " in message and "No space left" in message and message.endswith(left.format(folder))
    assert len(seen) <= 2 and len(read_records(folder)) == done and not [*folder.rglob("*.tmp")]
    assert len(checkpoint.load_last(folder).get("records", [])) == ("beginning" not in left)
    go_on(folder, [EPOCH] * epochs)
    go_on(tmp_path / "straight", [EPOCH] * epochs)
    assert_same_run(folder, tmp_path / "straight")


def test_an_error_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    """Two things go wrong at once: what ended the run is said, and that the last epoch is not saved."""
    monkeypatch.setattr(checkpoint, "save_last", full)
    first = pytest.raises(DivideMixError, match="the first fault")
    with first, pytest.warns(UserWarning, match="epoch 0 could not be written"), opened(tmp_path / "run") as this:
        begin(this)
        for _ in this.epochs(3):
            end_epoch(this, validated())
            raise DivideMixError("the first fault")


def test_a_tensorboard_that_fails(tmp_path, monkeypatch):
    """Extras must not end a run: a folder that cannot be written, a disk that fills up later."""
    from torch.utils.tensorboard import SummaryWriter

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    with pytest.warns(UserWarning, match="no TensorBoard events"):
        go_on(tmp_path / "run", [EPOCH])
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.warns(UserWarning, match="no more TensorBoard events"):
        go_on(tmp_path / "later", [EPOCH])
    assert_same_run(tmp_path / "later", tmp_path / "run")


# ---- Several ranks ----


def rank_main(folder: Path, lr: float):
    def main(_):
        this_rank = ranks.join(torch.device("cpu"))
        visible = folder if this_rank.first else Path("/proc/nowhere")  # the others need not see the folder
        with opened(visible, runtime=runtime.Runtime(torch.device("cpu"), ranks=this_rank), lr=lr) as this:
            this.pin("labels", 1, "other labels")
            read = len(this.state)
            this.save_labels(given=np.zeros(2))
            begin(this)
            this.say("once")
            begun = len(this.records)
            for epoch in this.epochs(begun + 1):
                accuracy = epoch * (1 + this_rank.rank)  # should the ranks ever differ, the first one's counts
                end_epoch(this, validated(accuracy, -accuracy))
            nets = [float(state["w"][0]) for state in this.best_networks()]
            this.finish("the end", test_acc=5.0)
            print("seen", begun, this.records[-1]["val_acc_net1"], this.best_epochs, nets, read)

    return main


def two_ranks(output: Path, folder: Path, lr: float) -> list[tuple[int, str, str]]:
    """Two processes with the environment that torchrun gives them, whose store is here."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    world["WORLD_SIZE"] = "2"
    processes = [Forked(output / rank, rank_main(folder, lr), RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
    return [process.end() for process in processes]


def test_two_ranks_have_one_run_folder_and_end_together(tmp_path):
    """Else several processes write one file, all print every line, or nodes wait for each other without a word."""
    for begun in (0, 1):
        first, second = two_ranks(tmp_path, tmp_path / "run", 1.0)
        seen = f"seen {begun} {begun} [{begun}, 0] [{begun}.0, 0.0] {len(KEYS) if begun else 0}\n"
        assert first[0] == second[0] == 0 and first[2] == second[2] == "", first[2] + second[2]
        assert first[1].endswith(seen) and first[1].count("once") == 1 and second[1] == seen
    assert len(read_records(tmp_path / "run")) == 2
    first, second = two_ranks(tmp_path, tmp_path / "run", 3.0)
    assert first[0] == second[0] == 1
    assert first[2].startswith("rank 0: error: ") and "--lr was 1.0, now 3.0" in first[2] and first[2].count("\n") == 1
    assert second[2].splitlines()[-1].startswith("rank 1: error: another rank ended"), second[2]
