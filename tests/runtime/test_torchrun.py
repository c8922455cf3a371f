"""The scripts among several processes, as torchrun starts them: gloo on the CPU. The ranks run torchrun_driver.py."""

import shutil
import signal
import time

import numpy as np
import pytest
import torch
from helpers import torchrun_driver as driver
from helpers.scripts import LIMIT, SMALL_NET, Job, torchrun
from helpers.trees import make_clothing1M, make_digits, make_folder, make_webvision
from sklearn.metrics import roc_auc_score

import Train_clothing1M
import Train_folder
import Train_webvision
from dividemix import DivideMixError, networks
from dividemix.report import report
from dividemix.run.checkpoint import load_last
from dividemix.runtime.device import Runtime

ONE = Runtime(torch.device("cpu"), memory_format=torch.contiguous_format)


def own_lines(stderr: str) -> list[str]:
    """What the ranks say, without torchrun's report."""
    return [line for line in stderr.splitlines() if line.startswith("rank ")]


def tiny(data, *flags) -> list[str]:
    """Flags of a run of Train_folder.py of seconds, with images that are read from files. Later flags win."""
    size = ["--warm_up", "1", "--num_epochs", "2", "--workers", "0", "--data_mode", "stream"]
    return list(map(str, ["--data_path", data, *SMALL_NET, *size, *flags]))


def without_seconds(record: dict) -> dict:
    return {key: value for key, value in record.items() if not key.startswith("seconds_")}


def same(a, b) -> bool:
    """Whether two nested structures are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_state(one: dict, other: dict) -> bool:
    """Whether two checkpoints hold the same, but for the seconds."""
    records = [[without_seconds(record) for record in state["records"]] for state in (one, other)]
    return records[0] == records[1] and all(same(one[key], other[key]) for key in ("nets", "optimizers", "histories"))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """One start of two ranks for all of the quick tests, on a run that one process has begun."""
    out = tmp_path_factory.mktemp("ranks")
    data = make_folder(out / "images", 40)

    def flags(name: str, epochs: int) -> list[str]:
        return tiny(data, "--run_dir", out / name, "--num_epochs", epochs, "--save_scores")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda _: [])  # a figure takes seconds
        Train_folder.main(flags("one", 2))
        shutil.copytree(out / "one", out / "two")
        runs = [flags("two", 3), flags("whole", 3), flags("parts", 2), flags("parts", 3)]
        (out / "runs.txt").write_text("\n".join("\t".join(each) for each in runs))
        result = torchrun("tests/helpers/torchrun_driver.py", "small", out)
        assert result.returncode == 0, result.stderr
        Train_folder.main(flags("one", 3))

        def load(name: str) -> list:
            return [torch.load(out / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]

        yield out, load, result, flags


def test_losses_accuracy_and_division_are_those_of_one_process(job):
    """Sizes that do not divide, fewer batches than ranks: a batch that is counted twice or by no rank would show as
    another accuracy, and as losses of 0, which are divided as clean."""
    _, load, _, _ = job
    first, second = load("scored")
    for k, (n, batch_size) in enumerate(driver.SIZES):
        alone = driver.scored(ONE, n, batch_size)
        assert same(first[k], alone), (n, batch_size)
        assert same(second[k], alone), (n, batch_size)


def test_a_run_is_divided_the_same_on_one_rank_and_on_two(job):
    """From one checkpoint: else a run that moves to two GPUs goes on with other labeled sets than it would have had."""
    out, _, _, _ = job
    for name in ("two", "whole"):
        assert same(dict(np.load(out / "one/labels.npz")), dict(np.load(out / name / "labels.npz")))
    one, two = (dict(np.load(out / name / "scores/epoch_002.npz")) for name in ("one", "two"))
    assert {"raw_loss_net1", "clean_probability_net2", "prediction_net1", "means_net2"} <= one.keys()
    assert same(one, two)
    labeled = one["clean_probability_net1"] > one["threshold_net1"]
    assert labeled.any() and not labeled.all()


def test_labels_are_scored_by_two_ranks_as_by_one(job):
    """Else a list of wrong labels has samples with a loss of 0 that no rank looked at, or two ranks' suggestions added
    up to a class that nobody suggested."""
    out, _, _, flags = job
    shutil.copytree(out / "whole", out / "alone")
    (out / "alone" / "label_scores.npz").unlink()
    Train_folder.main(flags("alone", 3))
    one, two = (dict(np.load(out / name / "label_scores.npz")) for name in ("alone", "whole"))
    assert same(one, two) and {"p_clean_net1", "p_clean_net2", "prediction"} <= one.keys()
    one, two = (dict(np.load(out / name / "thumbnails.npz")) for name in ("alone", "whole"))
    assert same(one, two)


def test_a_batch_dealt_out_gives_the_update_of_one_process(job):
    """A gradient that is summed instead of averaged, a penalty of each rank's own rows, or a weight of lambda_u counted
    twice is training with another learning rate or another loss."""
    _, load, _, _ = job
    first, second = load("dealt")
    assert same(first["weights"], second["weights"]) and same(first["gradients"], second["gradients"])
    # Row i of rank r's part p of its 16 rows is row 2 i + r of part p of all 32.
    index = torch.empty(32, dtype=torch.int64)
    places = [torch.tensor([8 * (row // 4) + 2 * (row % 4) + rank for row in range(16)]) for rank in range(2)]
    for place in places:
        index[place] = place[driver.local_index()]
    net, peer = driver.without_bn(ONE, 1), driver.without_bn(ONE, 2)
    terms = driver.step_of(net, peer, ONE.optimizer(net, 0.1, 5e-4), slice(None), index)
    for own, expected in zip(first["gradients"], net.parameters(), strict=True):
        torch.testing.assert_close(own, expected.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["weights"], driver.values(net), rtol=1e-5, atol=1e-6)
    assert same(first["peer"], driver.values(peer))
    for k, term in enumerate(terms):
        torch.testing.assert_close((first["terms"][k] + second["terms"][k]) / 2, term, rtol=1e-5, atol=1e-6)


def test_the_same_rows_on_every_rank_give_the_update_of_those_rows(job):
    """With BN too, whose statistics are then the same: K ranks must not train K times as fast, nor as slowly."""
    _, load, _, _ = job
    for name, build in (("copies", driver.without_bn), ("copies_bn", driver.network)):
        first, second = load(name)
        if name == "copies":
            first, second = first["weights"], second["weights"]
        net, peer = build(ONE, 1), build(ONE, 2)
        driver.step_of(net, peer, ONE.optimizer(net, 0.1, 5e-4), slice(0, None, 2), driver.local_index())
        assert same(first, second)
        torch.testing.assert_close(first, driver.values(net), rtol=1e-4, atol=1e-6)


def test_a_pass_of_full_batches_is_one_process_es(job):
    """Other draws, other crops or rows that no rank has: all of it would show in the weights after a pass."""
    _, load, _, _ = job
    first, second = load("passes")
    alone = driver.passes(ONE)
    assert same(first, second)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["terms"], alone["terms"], rtol=1e-5, atol=1e-6)


def test_weights_and_statistics_are_the_same_on_all_ranks_after_every_phase(job):
    """Tails of one row, an unlabeled set of one sample or none, fewer labeled samples than ranks: ranks that drift
    apart score and save different networks, and one with a step more waits for ever."""
    _, load, _, _ = job
    first, second = load("phases")
    assert len(first) == 4
    assert same(first, second)
    assert all(torch.isfinite(value).all() for phase in first for value in phase[2].values())
    averaged = load("averaged")
    assert same(*averaged)
    assert all((value == 1.5).all() for key, value in averaged[0].items() if "running" in key)


def test_one_rank_s_bad_loss_stops_the_update_of_all(job):
    """Else the other ranks apply a gradient that the first one refused, and go on with other weights."""
    _, load, _, _ = job
    for error, weights, found_inf in load("bad"):
        assert error.startswith("the loss or a gradient was not finite at batch 2 of 3, and no update was applied")
        assert found_inf == 1
        assert not same(weights[0], weights[1])
        assert same(weights[1], weights[2]) and same(weights[2], weights[3])


def test_one_rank_writes_and_speaks(job):
    """Two processes that write one file spoil it; lines said twice hide what happens."""
    out, _, result, _ = job
    assert result.stdout.count("epoch 2/2 train |") == 3  # the runs two, whole and parts
    assert result.stdout.count("continuing ") == 2 and result.stdout.count("2 ranks, each: cpu") == 4
    assert own_lines(result.stderr) == ["rank 0: warning: the disk is nearly full"]
    files = {
        name: {path.name for path in (out / name).rglob("*") if "tensorboard" not in str(path)}
        for name in ("one", "two", "whole", "parts")
    }
    assert files["two"] == files["whole"] == files["parts"] == files["one"]
    for name in ("two", "whole"):
        for log in ("acc.txt", "metrics.jsonl"):
            assert len((out / name / log).read_text().splitlines()) == 3


def test_interrupted_is_uninterrupted_with_the_same_number_of_ranks(job):
    """Else a night's work cannot be repeated, and a queue's time limit changes the result."""
    out, _, _, _ = job
    assert same_state(load_last(out / "whole"), load_last(out / "parts"))


def test_one_process_goes_on_with_a_run_of_two(job):
    """A checkpoint whose keys say 'module.', or that only as many ranks can read, ties a run to a machine."""
    out, _, _, flags = job
    final = Train_folder.main(flags("two", 4))
    assert final["epoch"] == 3 and final["phase"] == "train"
    assert len((out / "two/acc.txt").read_text().splitlines()) == 4


def test_device_resident_sets_are_refused(tmp_path, monkeypatch):
    """Each rank would train on all rows, and the flag that was given have no effect."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    data = make_folder(tmp_path / "images", 40)
    with pytest.raises(DivideMixError, match="--data_mode device"):
        Train_folder.main(tiny(data, "--data_mode", "device", "--run_dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    """Not a hang, not a batch of another size than was asked for, and no run folder left behind."""
    data = make_folder(tmp_path / "images", 40)
    result = torchrun("Train_folder.py", *tiny(data, "--out_dir", tmp_path / "out", "--batch_size", "15"))
    assert result.returncode != 0
    lines = own_lines(result.stderr)
    assert 1 <= len(lines) <= 2  # whoever is first; torchrun may end the other before it has spoken
    assert "error: --batch_size 15 " in lines[0] and "2 ranks do not divide it" in lines[0]
    assert not (tmp_path / "out").exists() and result.stdout == ""


DEATHS = {
    "kill": None,  # it says nothing; torchrun does
    "kill_first": None,
    "bad_image": "rank 1: error: images/7.jpg: not an image",
    "bug": "rank 1: Traceback",
    "mixture": "rank 0: error: all per-sample losses are equal",
    "disk": "No space left on device): make room, then the same command continues",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEATHS)
def test_a_rank_s_death_ends_the_job(job, tmp_path, kind):
    """Whatever happens to one rank, wherever the others wait just then: a job that hangs until its time is up costs a
    night of eight GPUs and says nothing. The same command then goes on as if nothing had been."""
    out, _, _, _ = job
    flags = tiny(out / "images", "--run_dir", tmp_path / "run", "--num_epochs", "3", "--save_scores")
    result = torchrun("tests/helpers/torchrun_driver.py", "fail", kind, tmp_path / "stamp", *flags)
    seconds = time.time() - float((tmp_path / "stamp").read_text())
    assert result.returncode != 0
    assert seconds < 45, seconds  # torchrun's own end takes some of it
    lines = own_lines(result.stderr)
    if DEATHS[kind]:
        assert any(DEATHS[kind] in line for line in lines), result.stderr
    else:
        assert "Signal 9 (SIGKILL)" in result.stderr
    assert sum("Traceback" in line for line in lines) == (kind == "bug"), result.stderr
    done = (tmp_path / "run/acc.txt").read_text().splitlines()  # the first epoch may still have been on its way to it
    assert len(done) == 1 or (len(done) == 0 and kind != "disk")
    if kind == "kill_first":
        assert torchrun("Train_folder.py", *flags).returncode == 0
        assert same_state(load_last(tmp_path / "run"), load_last(out / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_ends_the_job(tmp_path, number):
    """Ctrl-C, or a queue that takes the nodes back: ranks that live on hold the cards and the run folder."""
    data = make_folder(tmp_path / "images", 40)
    flags = tiny(data, "--run_dir", tmp_path / "run", "--num_epochs", "500")
    stamp = tmp_path / "stamp"
    job = Job("tests/helpers/torchrun_driver.py", "fail", "wait", stamp, *flags)
    begun = time.monotonic()
    while not stamp.exists() and time.monotonic() - begun < LIMIT and job.process.poll() is None:
        time.sleep(0.2)
    job.process.send_signal(number)
    sent = time.monotonic()
    result = job.end()
    assert time.monotonic() - sent < 45
    assert result.returncode != 0
    done = len((tmp_path / "run/acc.txt").read_text().splitlines())
    assert 1 <= done < 500
    flags = tiny(data, "--run_dir", tmp_path / "run", "--num_epochs", done + 1)
    assert Train_folder.main(flags)["epoch"] == done  # nobody holds the folder any more


@pytest.mark.slow
def test_two_ranks_learn_as_one_process_does(tmp_path):
    """Every collective can be right and the whole still learn worse: half the batch for BN, or half the penalty."""
    data, truth = make_digits(tmp_path / "digits", wrong=0.3)
    size = ["--width", "16", "--image_size", "32", "--batch_size", "32", "--lr", "0.02", "--no_flip"]
    size += ["--warm_up", "6", "--num_epochs", "8"]
    result = torchrun("Train_folder.py", *tiny(data, *size, "--run_dir", tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    labels, scores = (dict(np.load(tmp_path / "run" / f"{name}.npz")) for name in ("labels", "label_scores"))
    numbers = [int(path.split(b"/")[-1][:4]) for path in labels["list_path"][labels["index"]]]
    assert (scores["prediction"] == truth[numbers]).mean() > 0.9
    p_clean = (scores["p_clean_net1"] + scores["p_clean_net2"]) / 2
    assert roc_auc_score(labels["given"] == truth[numbers], p_clean) > 0.93


@pytest.mark.slow
def test_clothing1m_and_webvision_score_and_go_on_as_one_process_does(tmp_path):
    """Images that workers read, samples of each network's own: from one checkpoint each rank must get the losses,
    divisions and accuracies that the run itself logged, to the bit, and training must go on."""
    common = ["--device", "cpu", "--precision", "fp32", "--arch", "preresnet18", "--width", "4", "--weights", "none"]
    common += ["--image_size", "16", "--batch_size", "4", "--lr", "0.01", "--eval_batch_size", "7"]
    clothing1m = ["--data_path", str(make_clothing1M(tmp_path / "c", n_val=25, n_test=25)), "--num_batches", "5"]
    clothing1m += [*common, "--workers", "1", "--save_scores", "--run_dir", str(tmp_path / "clothing1m")]
    webvision = ["--data_path", str(make_webvision(tmp_path / "w", n_train=41, n_val=23)), "--num_class", "10"]
    webvision += [*common, "--workers", "0", "--run_dir", str(tmp_path / "webvision")]
    Train_clothing1M.main([*clothing1m, "--num_epochs", "1"])
    Train_webvision.main([*webvision, "--num_epochs", "1"])
    flags = ["\t".join([*each, "--num_epochs", "2"]) for each in (clothing1m, webvision)]
    result = torchrun("tests/helpers/torchrun_driver.py", "images", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert own_lines(result.stderr) == [] and result.stdout.count("epoch 1/1 train") == 2

    for name in ("clothing1m", "webvision"):
        records = load_last(tmp_path / name)["records"]
        scores, other = (torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=False) for rank in range(2))
        assert same(scores, other)
        logged = np.load(tmp_path / name / "scores/epoch_001.npz")  # made when the run went on, on two ranks
        for key in sorted(scores.keys() - {"val"}):
            assert np.array_equal(np.asarray(scores[key]), logged[key]), key
        assert scores["val"].items() <= records[0].items()
        assert len(records) == 2 and records[1]["phase"] == "train"
        finals = [torch.load(tmp_path / f"{name}_final.{rank}.pt", weights_only=False) for rank in range(2)]
        assert finals[0] == finals[1]  # of Clothing1M: the test of best.pt, on all ranks


@pytest.mark.slow
def test_an_image_that_one_rank_cannot_read_ends_the_job_and_can_be_left_out(tmp_path):
    """One rank meets it, in a worker of its own: the others must not wait for that rank's batch for ever; and all of
    them must leave out the same images."""
    data = make_clothing1M(tmp_path / "data", n_train=28, n_val=14, n_test=14)
    image = next((data / "images/9").rglob("*0000000009,*.jpg"))
    image.write_bytes(b"no image")
    flags = ["--data_path", data, "--arch", "preresnet18", "--width", "4", "--weights", "none", "--image_size", "16"]
    flags += ["--batch_size", "4", "--num_batches", "7", "--num_epochs", "1", "--device", "cpu", "--workers", "1"]
    flags += ["--run_dir", tmp_path / "run"]
    result = torchrun("Train_clothing1M.py", *flags)
    assert result.returncode != 0
    assert any(f"error: {image}: " in line for line in own_lines(result.stderr)), result.stderr
    assert "Traceback" not in "".join(own_lines(result.stderr))
    result = torchrun("Train_clothing1M.py", *flags, "--skip_bad_images", "--fresh")
    assert result.returncode == 0, result.stderr
    assert "train: 1 of 28 images left out (0 missing, 1 unreadable)" in result.stdout
    assert result.stdout.count("moved to") == 1 and len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", networks.ARCHITECTURES)
def test_every_weight_of_every_network_has_a_gradient(arch):
    """DistributedDataParallel waits for the gradient of each: one without ends the second step of a run on several
    GPUs, for that network alone."""
    side = networks.ARCHITECTURES[arch].min_side
    net = networks.build(arch, 3, 4 if networks.ARCHITECTURES[arch].has_width else networks.WIDTH).train()
    net(torch.randn(2, 3, side, side)).sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
