"""The run folder: the same command again continues the run, and ends as an uninterrupted run ends."""

import json

import pytest
import torch

import Train_cifar
from dividemix import DivideMixError, checkpoint
from dividemix.run import Run, draws, seeded

TINY = "--dataset digits --limit_train 96 --width 4 --batch_size 16 --warm_up 1 --lr_drop 3 --device cpu"


def train(folder, epochs, *more):
    return Train_cifar.main([*TINY.split(), "--run_dir", str(folder), "--num_epochs", str(epochs), *more])


def last_state(folder):
    return torch.load(folder / json.loads((folder / "last.json").read_text())["file"], weights_only=True)


def without_times(record):
    return {k: v for k, v in record.items() if not k.startswith("seconds_")}


def assert_equal(a, b, path="state"):
    """Bitwise, through dicts and lists."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        a, b = (without_times(x) if "test_acc" in x else x for x in (a, b))
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


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


@pytest.fixture
def copy(trained, tmp_path):
    import shutil

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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"file": 3}', "null"])
def test_an_unreadable_pointer_is_survived(copy, content):
    """last.json is the smallest file and the first to be damaged by hand."""
    (copy / "last.json").write_text(content)
    assert len(checkpoint.load_last(copy)["records"]) == 2


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
        checkpoint.load_networks(evil)
    for file in copy.glob("epoch-*.pt"):
        file.write_bytes(evil.read_bytes())
    (copy / "last.json").unlink()
    with pytest.raises(DivideMixError, match="can be read"), pytest.warns(UserWarning, match="passed over"):
        train(copy, 3)
    assert not marker.exists()


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    """A full disk in the middle of a checkpoint must not take the one before with it."""
    file = tmp_path / "file"
    checkpoint.write_atomically(file, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        checkpoint.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_checkpoints_are_kept(tmp_path):
    """All of them would fill the disk (180 MB an epoch at full width), one alone could not be fallen back from."""
    for epoch in range(4):
        checkpoint.save_last(tmp_path, epoch, {"epoch": epoch})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch-002.pt", "epoch-003.pt", "last.json"]
    assert checkpoint.load_last(tmp_path) == {"epoch": 3}


def test_two_processes_in_one_folder(copy):
    """Two runs that write the same checkpoints end with neither."""
    config = checkpoint.load_last(copy)["config"]
    with Run(copy, config), pytest.raises(DivideMixError, match="another process"):
        Run(copy, config)


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
