"""The scripts among several processes, as torchrun starts them: gloo on the CPU. The ranks run torchrun_driver.py."""

import shutil
import signal
import time

import numpy as np
import pytest
import torch
from helpers import torchrun_driver as driver
from helpers.nets import CPU, snapshot
from helpers.runs import assert_equal
from helpers.scripts import CLOTHING1M, LIMIT, SMALL_NET, WEBVISION, Job, image_of, torchrun
from helpers.trees import make_folder

import Train_folder
from dividemix import DivideMixError
from dividemix.report import report
from dividemix.run.checkpoint import load_last
from dividemix.runtime import Runtime

DRIVER = "tests/helpers/torchrun_driver.py"
ONE = Runtime(CPU)


def lines_of_ranks(stderr: str) -> list[str]:
    """What the ranks say, without torchrun's report."""
    return [line for line in stderr.splitlines() if line.startswith("rank ")]


def tiny(data, *flags) -> list[str]:
    """Flags of a run of Train_folder.py of seconds, with images that are read from files. Later flags win."""
    size = ["--warm_up", "1", "--num_epochs", "2", "--workers", "0", "--data_mode", "stream"]
    return list(map(str, ["--data_path", data, *SMALL_NET, *size, *flags]))


def same(a, b) -> bool:
    """Whether two nested structures of tensors, arrays and numbers are equal to the bit."""
    try:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


def assert_same_arrays(folder, reference, name: str) -> None:
    np.testing.assert_equal(*(dict(np.load(run / name)) for run in (folder, reference)))


def assert_same_checkpoint(folder, reference) -> None:
    """The last checkpoints hold the same, but for the seconds."""
    for name in ("records", "nets", "optimizers", "histories"):
        assert_equal(*(load_last(run)[name] for run in (folder, reference)))


def start(out, command: str, argument, *runs: list[str]):
    """One start of two ranks; `runs`: the flags of Train_folder.py that they run in it, one after the other."""
    (out / "runs.txt").write_text("\n".join("\t".join(flags) for flags in runs))
    result = torchrun(DRIVER, command, argument)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """One start of two ranks for all of the quick tests, on a run that one process has begun."""
    out = tmp_path_factory.mktemp("ranks")
    data = make_folder(out / "images", 40)

    def flags(name: str, epochs: int) -> list[str]:
        return tiny(data, "--run_dir", out / name, "--num_epochs", epochs, "--save_scores")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: [])  # a figure takes seconds
        Train_folder.main(flags("one", 2))
        shutil.copytree(out / "one", out / "two")
        result = start(out, "small", out, flags("two", 3))
        Train_folder.main(flags("one", 3))

        def load(name: str) -> list:
            return [torch.load(out / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]

        yield out, load, result, flags


# ---- What is computed ----


def test_losses_accuracy_and_division_are_those_of_one_process(job):
    """A batch counted by no rank has losses of 0, which are divided as clean; one counted twice shows, too."""
    _, load, _, _ = job
    of_ranks = load("scored")
    for k, (n, batch_size) in enumerate(driver.SIZES):
        of_one = driver.scored(ONE, n, batch_size)
        assert all(same(results[k], of_one) for results in of_ranks), (n, batch_size)


def test_a_batch_split_among_ranks_gives_the_update_of_one_process(job):
    """A gradient that is summed, or a penalty of each rank's rows, is another learning rate or another loss."""
    _, load, _, _ = job
    first, second = load("split")
    assert same(first["weights"], second["weights"])
    # Row i of block p (x1, x2, u1, u2) of rank r's 16 rows is row 2 i + r of block p of all 32.
    index = torch.empty(32, dtype=torch.int64)
    for rank in range(2):
        rows = torch.tensor([8 * (row // 4) + 2 * (row % 4) + rank for row in range(16)])
        index[rows] = rows[driver.local_index()]
    net, peer = driver.without_bn(ONE, 1), driver.without_bn(ONE, 2)
    terms = driver.step_of(net, peer, ONE.optimizer(net, 0.1, 5e-4), slice(None), index)
    torch.testing.assert_close(first["weights"], snapshot(net), rtol=1e-5, atol=1e-6)
    assert same(first["peer"], snapshot(peer))
    for k, term in enumerate(terms):
        torch.testing.assert_close((first["terms"][k] + second["terms"][k]) / 2, term, rtol=1e-5, atol=1e-6)


def test_the_same_rows_on_every_rank_give_the_update_of_those_rows(job):
    """With BN, whose statistics are then the same: K ranks must not train K times as fast, nor as slowly."""
    _, load, _, _ = job
    first, second = load("copies")
    net, peer = driver.network(ONE, 1), driver.network(ONE, 2)
    driver.step_of(net, peer, ONE.optimizer(net, 0.1, 5e-4), slice(0, None, 2), driver.local_index())
    assert same(first, second)
    torch.testing.assert_close(first, snapshot(net), rtol=1e-4, atol=1e-6)


def test_weights_and_statistics_are_the_same_on_all_ranks_after_every_phase(job):
    """Ranks that drift apart score and save different networks, and one with a step more waits for ever."""
    _, load, _, _ = job
    first, second = load("phases")
    assert same(first, second)
    assert all(torch.isfinite(value).all() for phase in first for value in phase[2].values())
    averaged = load("averaged")
    assert same(*averaged)
    assert all((value == 1.5).all() for key, value in averaged[0].items() if "running" in key)


def test_a_bad_loss_of_one_rank_stops_the_update_of_all(job):
    """Else the other ranks apply a gradient that the first one refused, and go on with other weights."""
    _, load, _, _ = job
    for error, weights, found_inf in load("bad"):
        assert "not finite at batch 2 of 3" in error and found_inf == 1
        assert not same(weights[0], weights[1])
        assert same(weights[1], weights[2]) and same(weights[2], weights[3])


def test_ranks_have_one_loss_scale_in_fp16(job):
    """Else a rank applies an update that the others leave out, or unscales the gradients by another number."""
    _, load, _, _ = job
    first, second = load("fp16")
    assert same(first, second)
    assert [step[:2] for step in first] == [[4096, 0], [2048, 0], [0, 1]]
    assert same(first[0][2], first[1][2]) and same(first[1][2], first[2][2])


# ---- Runs ----


def test_a_run_is_divided_and_its_labels_are_scored_the_same_on_one_rank_and_on_two(job):
    """Else a run that moves to two GPUs goes on with other labeled sets, or with labels that no rank scored."""
    out, _, _, flags = job
    for name in ("labels.npz", "scores/epoch_002.npz"):
        assert_same_arrays(out / "two", out / "one", name)
    scores = dict(np.load(out / "one/scores/epoch_002.npz"))
    labeled = scores["clean_probability_net1"] > scores["threshold_net1"]
    assert labeled.any() and not labeled.all()
    shutil.copytree(out / "two", out / "back")  # one process goes on with a run of two
    (out / "back/label_scores.npz").unlink()
    Train_folder.main(flags("back", 3))
    for name in ("label_scores.npz", "thumbnails.npz"):
        assert_same_arrays(out / "back", out / "two", name)
    assert Train_folder.main(flags("back", 4))["epoch"] == 3


def test_one_rank_writes_and_speaks(job):
    """Two processes that write one file spoil it; lines said twice hide what happens."""
    out, _, result, _ = job
    assert result.stdout.count("epoch 2/2 train  labeled") == result.stdout.count("2 ranks, each: cpu") == 1
    lines = lines_of_ranks(result.stderr)
    assert len(lines) == len({*lines}) and all(line.startswith("rank 0: warning: ") for line in lines)
    assert "rank 0: warning: the disk is nearly full" in lines
    files = [
        {path.name for path in (out / name).rglob("*") if "tensorboard" not in str(path)} for name in ("one", "two")
    ]
    assert files[0] == files[1]
    for log in ("acc.txt", "metrics.jsonl"):
        assert len((out / "two" / log).read_text().splitlines()) == 3


def test_device_resident_sets_are_refused(tmp_path, monkeypatch):
    """Each rank would train on all rows, and the flag that was given have no effect."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    data = make_folder(tmp_path / "images", 40)
    with pytest.raises(DivideMixError, match="--data_mode device"):
        Train_folder.main(tiny(data, "--data_mode", "device", "--run_dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def uninterrupted(job, tmp_path_factory):
    """A run of three epochs on two ranks, and the same one in two steps. -> their folder"""
    out, _, _, flags = job
    start(out, "runs", out / "runs.txt", flags("straight", 3), flags("stopped", 2), flags("stopped", 3))
    return out


@pytest.mark.slow
def test_interrupted_is_uninterrupted_with_the_same_number_of_ranks(uninterrupted):
    """Else a night's work cannot be repeated, and a queue's time limit changes the result."""
    assert_same_checkpoint(uninterrupted / "stopped", uninterrupted / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("kill", "Signal 9 (SIGKILL)"),  # by torchrun
        ("error", "rank 1: error: images/7.jpg"),
        ("bug", "rank 1: Traceback"),
        ("mixture", "rank 0: error: all per-sample losses are equal"),
    ],
)
def test_the_death_of_a_rank_ends_the_job(uninterrupted, tmp_path, kind, words):
    """A job that hangs until its time is up costs a night of eight GPUs and says nothing. The same command goes on."""
    flags = tiny(uninterrupted / "images", "--run_dir", tmp_path / "run", "--num_epochs", "3", "--save_scores")
    result = torchrun(DRIVER, "fail", kind, tmp_path / "stamp", *flags)
    seconds = time.time() - float((tmp_path / "stamp").read_text())
    assert result.returncode != 0
    assert seconds < 45, seconds  # torchrun's own end takes some of it
    assert words in result.stderr
    traceback_lines = [line for line in lines_of_ranks(result.stderr) if "Traceback" in line]
    assert len(traceback_lines) == (kind == "bug"), result.stderr
    if kind == "kill":
        assert torchrun("Train_folder.py", *flags).returncode == 0
        assert_same_checkpoint(tmp_path / "run", uninterrupted / "straight")


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_the_job(tmp_path):
    """A queue that takes the nodes back: ranks that live on hold the cards and the run folder."""
    data = make_folder(tmp_path / "images", 40)
    stamp = tmp_path / "stamp"
    job = Job(DRIVER, "fail", "wait", stamp, *tiny(data, "--run_dir", tmp_path / "run", "--num_epochs", "500"))
    begun = time.monotonic()
    while not stamp.exists() and time.monotonic() - begun < LIMIT and job.process.poll() is None:
        time.sleep(0.2)
    job.process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    result = job.end()
    assert time.monotonic() - sent < 45
    assert result.returncode != 0
    epochs = len((tmp_path / "run/acc.txt").read_text().splitlines())
    flags = tiny(data, "--run_dir", tmp_path / "run", "--num_epochs", epochs + 1)
    assert Train_folder.main(flags)["epoch"] == epochs  # nobody holds the folder any more


@pytest.mark.slow
@pytest.mark.parametrize("script", [CLOTHING1M, WEBVISION], ids=lambda script: script.id)
def test_the_image_scripts_divide_on_two_ranks_as_in_one_process(tmp_path, script):
    """Else a run that moves to two GPUs goes on with other labeled sets, or leaves out other damaged images."""
    tree = script.make(tmp_path / "data")
    image_of(script, tree, 9).write_bytes(b"no image")
    flags = ["--data_path", tree, *script.size, *SMALL_NET, "--weights", "none", "--skip_bad_images"]
    flags += ["--lr", "0.01", "--workers", "1", "--eval_batch_size", "7"]
    flags += ["--save_scores"] if script is CLOTHING1M else []  # WebVision saves them always

    def until(name: str, epochs: int) -> list[str]:
        return [*map(str, flags), "--run_dir", str(tmp_path / name), "--num_epochs", str(epochs)]

    script.main.main(until("one", 1))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    script.main.main(until("one", 2))
    result = torchrun(f"{script.main.__name__}.py", *until("two", 2))
    assert result.returncode == 0, result.stderr
    assert "1 unreadable" in result.stdout and result.stdout.count("epoch 1/1 train") == 1
    assert_same_arrays(tmp_path / "two", tmp_path / "one", "scores/epoch_001.npz")
    first, second = load_last(tmp_path / "two")["records"]
    assert first == load_last(tmp_path / "one")["records"][0] and second["phase"] == "train"
