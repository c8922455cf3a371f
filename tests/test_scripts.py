"""What the four training scripts promise alike: Algorithm 1, the files of a run, a run that is stopped and continued,
flags, refusals, damaged data. What one script does on its own is in its own test file."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.nets import reference_logits, same
from helpers.runs import assert_same_run, last_state, read_records, without_times
from helpers.scripts import (
    CIFAR,
    CLOTHING1M,
    FOLDER,
    STREAMED,
    WEBVISION,
    assert_co_divided,
    end_of,
    image_of,
    note_co_division,
    note_phases,
    run_script,
    small_run,
)
from helpers.trees import make_folder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import transforms

from dividemix import networks
from dividemix.codivide import Mixture, normalise
from dividemix.seeds import seeded
from PreResNet import ResNet18

pytestmark = pytest.mark.usefixtures("no_figures")


def for_scripts(*scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.id)


ALL = for_scripts(CIFAR, CLOTHING1M, WEBVISION, FOLDER)
ALL_AND_STREAMED = for_scripts(CIFAR, CLOTHING1M, WEBVISION, FOLDER, STREAMED)
OF_FILES = for_scripts(CLOTHING1M, WEBVISION, FOLDER, STREAMED)


@pytest.fixture
def tree(script, tmp_path) -> Path:
    """A data folder of the script's format, all of its labels right."""
    return script.make(tmp_path / "data", noise=0, sides=(16, 24))


@pytest.fixture
def start(script, tree, tmp_path, monkeypatch, capsys):
    """Runs the script's command line in this process, tiny, as a user would. -> (exit status, stdout, stderr)"""

    def run(*flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        argv = small_run(script, tree, tmp_path / "out", "--no_label_scores", *flags)
        return end_of(script.main, argv, monkeypatch), *capsys.readouterr()

    return run


@pytest.fixture
def folder(script, tmp_path) -> Path:
    return tmp_path / "out" / script.name


def scores_of(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Of each epoch that left scores, these."""
    return {int(file.stem[6:]): dict(np.load(file)) for file in sorted((folder / "scores").glob("*.npz"))}


# ---- A finished run and its files ----


@pytest.fixture(scope="module", params=[CIFAR, CLOTHING1M, WEBVISION, FOLDER], ids=lambda script: script.id)
def done(request, tmp_path_factory):
    """A finished run of a fresh process: one epoch of warm-up and two divided ones, images read by a worker."""
    script, root = request.param, tmp_path_factory.mktemp("run")
    if script is FOLDER:
        tree = make_folder(root / "data", splits=("train", "val", "test"), sides=(16, 40))
    else:
        tree = script.make(root / "data", sides=(16, 32))
    scores = [] if script is CIFAR else script.keep_scores
    flags = small_run(script, tree, root / "out", "--num_epochs", "3", "--workers", "1", *scores)
    process = run_script(*flags, cwd=root, script=f"{script.main.__name__}.py")
    assert process.returncode == 0, process.stderr
    folder = root / "out" / script.name
    final = json.loads((folder / "result.json").read_text())
    made = {"folder": folder, "records": read_records(folder), "final": final, "out": process.stdout}
    return SimpleNamespace(script=script, tree=tree, flags=flags, err=process.stderr, **made)


def test_output_is_one_line_an_epoch_without_bars(done):
    """Else a log file fills with progress bars, or a tiny run's number stands beside the paper's as if it were one."""
    lines = done.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == ["0/2", "1/2", "2/2"]
    assert not re.search(r"[\r█▏]|it/s|\d%\|", done.out + done.err)
    assert all(line.startswith("warning: ") for line in done.err.splitlines()), done.err
    assert f"run folder {done.folder}" in lines
    [result] = [line for line in lines if line.startswith(("best ", "test "))]
    paper = done.script.results
    assert all(f"{value:.2f}" in result.partition("; paper: ")[2] for value in paper.values())
    assert ("paper" in result) == ("--batch_size 8 (paper: 32)" in result) == bool(paper)


def test_files_of_a_run(done):
    """Else a log or figure is missing, nobody can tell which flags a number comes from, or old checkpoints pile up."""
    files = {path.name for path in done.folder.iterdir()} - {".lock", "cleaned_labels.csv"}  # of a usable list only
    names = {"acc.txt", "stats.txt", "metrics.jsonl", "histograms.jsonl", "args.json", "tensorboard", "scores"}
    names |= {"labels.npz", "label_scores.npz", "thumbnails.npz", "result.json"}
    names |= {"report.html", "review.html", "figures", "label_issues.csv", "suspects.csv"}
    names |= {"digits_0.5_sym.json", "transition.csv"} if done.script is CIFAR else set()
    assert files == names | {"last.json", "best.pt", "epoch-001.pt", "epoch-002.pt"}
    log = done.script.logs
    acc = "".join(map(log.acc, done.records)) + log.final(done.final)
    for name, text in {"acc.txt": acc, "stats.txt": "".join(map(log.stats, done.records))}.items():
        assert (done.folder / name).read_text() == text
    assert (done.folder / "figures" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert [*scores_of(done.folder)] == ([2] if done.script is CIFAR else [1, 2])
    about = json.loads((done.folder / "args.json").read_text())
    assert about["command"] == [f"{done.script.main.__name__}.py", *done.flags]
    assert about["args"].items() >= {"width": 4, "T": 0.5, "seed": 123, "num_class": done.script.num_class}.items()
    assert about["data"].items() >= done.script.sizes.items()
    assert len(about["data"]["classes"]) == done.script.num_class
    accuracy = "val_acc" if done.script is CLOTHING1M else "test_acc"
    events = EventAccumulator(str(done.folder / "tensorboard")).Reload().Scalars(accuracy)
    assert [event.step for event in events] == [0, 1, 2]
    assert [event.value for event in events] == pytest.approx([record[accuracy] for record in done.records])


def test_metrics_are_one_flat_object_an_epoch(done):
    """Else notebooks that read metrics.jsonl break, Clothing1M's epochs have a test accuracy that invites to choose by
    it, or a script trains without the penalty of its warm-up."""
    names = f"epoch phase lr loss_x penalty labeled* unlabeled* {done.script.metrics}".split()
    keys = {name.replace("*", f"_net{k}") for name in names for k in (1, 2)}
    seconds = {name.removesuffix("_acc") for name in {"test_acc", "val_acc", "imagenet_acc"} & keys} | {"save"}
    phases = {"warmup": {"warmup1", "warmup2"}, "train": {"loss", "gmm", "train1", "train2"}}
    assert [(r["epoch"], r["phase"]) for r in done.records] == [(0, "warmup"), (1, "train"), (2, "train")]
    of_division = [key for key in keys if key == "loss_u" or re.match("auc|labeled|unlabeled|clean", key)]
    for record in done.records:
        assert record.keys() == keys | {f"seconds_{name}" for name in phases[record["phase"]] | seconds}
        assert all(value is None or isinstance(value, int | float | str) for value in record.values())
        assert {record[key] is None for key in of_division} == {record["phase"] == "warmup"}
        for k in (1, 2) if record["phase"] == "train" else ():
            scored = 4 * 8 if done.script is CLOTHING1M else done.script.sizes["train"]
            assert record[f"labeled_net{k}"] + record[f"unlabeled_net{k}"] == scored
    if "best_acc" in keys and done.script is not FOLDER:  # whose best epoch is chosen on the validation images
        values = [record["test_acc"] for record in done.records]
        assert [record["best_acc"] for record in done.records] == [max(values[: n + 1]) for n in range(3)]
    assert (done.records[0]["penalty"] < 0) == done.script.conf_penalty  # minus the mean entropy


def test_a_finished_run_started_again_says_so_and_ends_the_same(done, capsys):
    """Else a second start loses the result or trains on; or what main returns is something else than the log says."""
    before = {name: (done.folder / name).read_bytes() for name in ("result.json", "acc.txt", "stats.txt", "best.pt")}
    assert done.script.main.main(done.flags) == done.final
    assert {name: (done.folder / name).read_bytes() for name in before} == before
    assert "is finished (3 epochs)" in capsys.readouterr().out
    assert done.final.items() >= done.records[-1].items() and done.final["run_dir"] == str(done.folder)
    paper = {name: value for name, value in done.final.items() if name.startswith("paper_")}
    assert paper == {f"paper_{name}": value for name, value in done.script.results.items()}


@pytest.mark.parametrize("done", [CLOTHING1M, WEBVISION, FOLDER], indirect=True, ids=lambda script: script.id)
def test_scores_and_accuracies_are_what_torchvision_and_pillow_give(done):
    """By other means, from the files: a wrong mean, size, crop, label, list or k, or a net in train mode, divides and
    tests something else, and shows in no number that one could doubt."""
    lists, labels = done.script.read(done.tree), np.load(done.folder / "labels.npz", allow_pickle=False)
    train = lists.pop("train")
    assert labels["index"].tolist() == [*range(len(train))] and labels["given"].tolist() == train.labels.tolist()

    if done.script is FOLDER:
        prepare = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16), transforms.ToTensor()])
        pixels, resize = torch.stack([prepare(Image.open(train.path(i))) for i in range(len(train))]), 16
        mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3), correction=0).tolist()
    else:
        (mean, std), resize = done.script.mean_std, done.script.resize

    def logits(state: dict, images, rows) -> torch.Tensor:
        net = ResNet18(done.script.num_class, 4)
        net.load_state_dict(state)
        return reference_logits(net, [images.path(i) for i in rows], resize, 16, mean, std)

    best = torch.load(done.folder / "best.pt", weights_only=True)["nets"]
    for name, images in lists.items():
        tested = best if done.script is CLOTHING1M and name == "test" else last_state(done.folder)["nets"]
        both = [logits(state, images, range(len(images))) for state in tested]
        truth = torch.from_numpy(images.labels)
        expected = [100 * (x.argmax(1) == truth).float().mean().item() for x in (sum(both), *both)]
        accuracies = [done.final[f"{name}_acc{suffix}"] for suffix in ("", "_net1", "_net2")]
        assert accuracies == pytest.approx(expected, abs=0.5 * 100 / len(images))
        if done.script is WEBVISION:
            top5 = 100 * (sum(both).topk(5)[1] == truth[:, None]).any(1).float().mean().item()
            assert done.final[f"{name}_acc_top5"] == pytest.approx(top5, abs=0.5 * 100 / len(images))
    before, scores = torch.load(done.folder / "epoch-001.pt", weights_only=True)["nets"], scores_of(done.folder)[2]
    for k, state in enumerate(before, start=1):  # epoch 2 was divided by the networks that epoch 1 ended with
        rows = scores.get(f"index_net{k}", np.arange(len(train)))
        given = torch.from_numpy(train.labels[rows])
        loss = torch.nn.functional.cross_entropy(logits(state, train, rows), given, reduction="none")
        np.testing.assert_allclose(scores[f"raw_loss_net{k}"], loss, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(scores[f"loss_net{k}"], normalise(loss), rtol=1e-2, atol=2e-3)
        labeled = scores[f"clean_probability_net{k}"] > scores[f"threshold_net{k}"]
        assert labeled.sum() == done.records[2][f"labeled_net{k}"]


# ---- Algorithm 1 ----


@ALL_AND_STREAMED
def test_an_epoch_is_divided_at_its_start_and_the_networks_swap(script, start, folder, monkeypatch):
    """Divided by other weights than those it starts with, by its own division, or with a stale peer, an epoch trains
    without any error, as another method. Also over a restart."""
    events, fits, divide = note_co_division(monkeypatch, script.main), [], Mixture.divide

    def spy_divide(mixture, *arguments):
        fits.append(arguments[-1])
        return divide(mixture, *arguments)

    monkeypatch.setattr(Mixture, "divide", spy_divide)
    for epochs in ("2", "3"):
        status, _, error = start("--num_epochs", epochs, *script.keep_scores)
        assert status == 0, error
    divided = ["score", "score", "train", "train", "test"]
    assert [event["what"] for event in events] == ["test", *divided, *divided]
    assert fits == ["net 2", "net 1"] * 2

    scores = scores_of(folder)
    assert [*scores] == [1, 2]
    for epoch, begin in ((1, 0), (2, 5)):
        tested, *of_epoch = events[begin : begin + 5]
        assert_co_divided(*of_epoch)
        for k, scored in ((2, of_epoch[0]), (1, of_epoch[1])):
            assert same(scored["net"], tested["nets"][k - 1]), "not the weights that the epoch before ended with"
            np.testing.assert_array_equal(normalise(scores[epoch][f"raw_loss_net{k}"]), scored["loss"])
    if script is not CLOTHING1M:  # it ends with a test of the best networks
        assert all(same(*pair) for pair in zip(events[-1]["nets"], last_state(folder)["nets"], strict=True))


@ALL
def test_where_nothing_is_clean_the_peer_warms_up_once_more(script, start, folder, monkeypatch, recwarn):
    """An epoch on no labeled sample would be no epoch; another epoch's division would be of other losses or images."""
    nothing = {1: ["net 2"], 2: ["net 1", "net 2"]}  # epoch -> networks that find nothing clean
    calls, names, divide = note_phases(monkeypatch, script.main), [], Mixture.divide

    def choosy(mixture, *arguments):
        names.append(arguments[-1])
        mixture.threshold = 1.0 if names[-1] in nothing.get((len(names) + 1) // 2, []) else 0.5
        return divide(mixture, *arguments)

    monkeypatch.setattr(Mixture, "divide", choosy)
    status, _, error = start("--num_epochs", "4", *script.keep_scores)
    assert status == 0, error
    warned = [str(warning.message).partition(" finds no sample clean") for warning in recwarn]
    assert [name for name, problem, _ in warned if problem] == ["net 2", "net 2", "net 1"]
    kinds = ["warmup", "warmup", "warmup", "train", "warmup", "warmup", "train", "train"]
    assert [call["kind"] for call in calls] == kinds
    nets = [call["net"] for call in calls[:2]]
    for i, call in enumerate(calls):
        assert call["net"] is nets[i % 2] and call["phase"].epoch == i // 2
        assert "peer" not in call or call["peer"] is nets[1 - i % 2]
    if script is CLOTHING1M:  # a sample of a warm-up epoch's size, not that which nothing is clean of
        assert len(calls[2]["data"]) == len(calls[0]["data"]) > len(calls[3]["data"])

    records = read_records(folder)
    assert [record["phase"] for record in records] == ["warmup", "train", "warmup", "train"]
    labeled = [int(call["division"].labeled.sum()) for call in calls if call["kind"] == "train"]
    assert labeled == [records[1]["labeled_net1"], records[3]["labeled_net2"], records[3]["labeled_net1"]]
    assert records[1]["labeled_net2"] is None and [*scores_of(folder)] == [1, 3]
    stats = (folder / "stats.txt").read_text().splitlines()
    assert [int(re.match(r"Numer of labeled samples:(\d+)", line)[1]) for line in stats] == labeled


# ---- Flags ----


@ALL_AND_STREAMED
def test_what_a_phase_is_given_by_default(script, start, monkeypatch):
    """Another weight decay, penalty, batch or schedule than the paper's trains as well, and ends a point lower; two
    networks that start as one make the same errors, and co-teaching teaches nothing."""
    calls = note_phases(monkeypatch, script.main)
    status, _, error = start("--num_epochs", "4", "--warm_up", "2", "--lr_drop", "3")
    assert status == 0 and "error" not in error
    assert [call["kind"] for call in calls] == ["warmup"] * 4 + ["train"] * 4
    for i, call in enumerate(calls):
        assert call["lr"] == pytest.approx(script.lr if i < 6 else script.lr / 10)
        assert (call["momentum"], call["nesterov"], call["weight_decay"]) == (0.9, False, script.weight_decay)
        mixmatch, has_loss = call["mixmatch"], script not in (CLOTHING1M, WEBVISION)
        batch_size = 16 if script is CIFAR else 8
        assert (mixmatch.batch_size, mixmatch.num_class, mixmatch.warm_up) == (batch_size, script.num_class, 2)
        assert (mixmatch.alpha, mixmatch.T, mixmatch.views, mixmatch.refine) == (script.alpha, 0.5, 2, True)
        assert (mixmatch.unlabeled_loss, mixmatch.conf_penalty) == (has_loss, script.conf_penalty)
        assert mixmatch.lambda_u == (25 if script is CIFAR else 0) and call["phase"].epoch == i // 2
    if hasattr(script, "mean_std"):
        views, normalise = calls[0]["data"].pipeline.views, calls[0]["data"].pipeline.normalise
        assert (views.resize, views.crop, views.kind) == (script.resize, 16, script.crop)
        assert normalise.mean.flatten().tolist() == pytest.approx(script.mean_std[0])
    for k in (0, 1):
        net = seeded(123, k, lambda: ResNet18(script.num_class, 4))
        assert same(calls[k]["state"], net.state_dict())
    assert not same(calls[0]["state"], calls[1]["state"])


@ALL
def test_flags_reach_the_training(script, start, folder, tmp_path, monkeypatch):
    """Else a flag is accepted, saved and reported, and has no effect; or published weights are not started from."""
    calls = note_phases(monkeypatch, script.main)
    values = {"alpha": 0.7, "T": 0.3, "lambda_u": 11, "batch_size": 4, "warm_up": 0}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    status, out, error = start(*flags, "--p_threshold", "0.4")
    assert status == 0, error
    assert [call["kind"] for call in calls] == ["train"] * 4
    for call in calls:
        assert {name: getattr(call["mixmatch"], name) for name in values} == values
        assert call["division"].threshold == 0.4
    assert ("has no effect" in out) == (script in (CLOTHING1M, WEBVISION)) and "lambda_u 11" in out
    file = folder / "best.pt"
    assert start("--num_epochs", "1", "--init_from", str(file), "--seed", "6", "--run_dir", str(tmp_path / "b"))[0] == 0
    first, second = torch.load(file, weights_only=True)["nets"]
    assert same(calls[4]["state"], first) and same(calls[5]["state"], second) and not same(first, second)


# ---- Stopped and continued ----


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (CIFAR, "--save_scores --r 0.9"),  # the losses of five epochs are averaged
        (CIFAR, "--save_scores --r 0.9 --ablation no_cotraining"),
        (CLOTHING1M, ""),
        (WEBVISION, ""),
        (FOLDER, "--augment strong --ema 0.9"),
        (STREAMED, "--arch squeezenet1_1 --weights none --width 64 --image_size 32 --lr 1e-5"),  # it has dropout
        (STREAMED, "--augment strong"),
    ],
)
def test_interrupted_is_uninterrupted_bit_for_bit(script, flags, start, tmp_path):
    """Weights, momentum, samples, scores, best epochs and all logs: a run that a stop changes cannot be reproduced.
    Stops in each epoch are in test_resume.py."""
    for name, stops in (("straight", "3"), ("stopped", "23")):
        for epochs in stops:
            where = ["--num_epochs", epochs, "--run_dir", str(tmp_path / name)]
            status, out, error = start("--lr_drop", "2", *flags.split(), *where)
            assert status == 0, error
    assert f"continuing {tmp_path / 'stopped'} with epoch 2 (of 0..2)" in out
    assert re.findall(r"^epoch (\d)/2", out, re.MULTILINE) == ["2"]
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "stopped")]
    straight, stopped = (without_times(result) | {"run_dir": ""} for result in results)
    assert straight == stopped


# ---- A data folder with faults ----


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        html = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "html": html}[kind])


@pytest.mark.parametrize(
    ("script", "kind", "problem", "workers"),
    [
        (CLOTHING1M, "truncated", "truncated", "0"),
        (WEBVISION, "empty", "empty", "1"),
        (FOLDER, "html", "not an image", "0"),
        (STREAMED, "missing", "missing", "1"),
    ],
)
def test_a_bad_image_is_refused_with_file_and_line(script, start, tree, folder, kind, problem, workers):
    """A grey square, or a silent gap, in its place would train and score without anyone knowing."""
    image = image_of(script, tree, 5)
    damage(image, kind)
    all_images = ["--num_batches", "50"] if script is CLOTHING1M else []
    status, _, error = start("--workers", workers, *all_images)
    line = error.splitlines()[-1]
    assert status == 1 and line.startswith(f"error: {image}: ") and problem in line.lower()
    assert f"({tree / script.paths}, line {6 + script.header})" in line and "--skip_bad_images" in line
    assert script is not FOLDER or not folder.exists()


@OF_FILES
def test_bad_images_can_be_left_out_from_the_start_or_later(script, start, tree, folder, tmp_path, monkeypatch):
    """Else one bad file in a million, or one that is damaged at epoch 40, ends a run of days for good."""
    calls = note_phases(monkeypatch, script.main)
    lists = script.read(tree)
    total = len(lists["train"])
    assert start("--run_dir", str(tmp_path / "begun"))[0] == 0
    bad = [image_of(script, tree, i) for i in (0, 2, 5, 8)]  # of images that the lists name
    for image, kind in zip(bad, ("truncated", "empty", "html", "missing"), strict=True):
        damage(image, kind)
    calls.clear()
    status, out, error = start("--num_epochs", "1", "--skip_bad_images")
    assert status == 0, error
    line = f"train: 4 of {total} images left out (1 missing, 3 unreadable)\n"
    assert line in out and out.count(": 0 of ") == len(lists) - 1
    labels, data = np.load(folder / "labels.npz"), json.loads((folder / "args.json").read_text())["data"]
    used = {tree / name.decode() for name in labels["list_path"][labels["index"]]}
    assert len(used) == data["train"] and not used & {*bad}
    for samples in (call["data"] for call in calls):
        if script is FOLDER:
            assert len(samples) == len(used)
        else:
            assert {Path(samples.pipeline.lists["train"].path(i)) for i in samples.index} <= used

    cache = ["--cache_dir", str(tmp_path / "cache")] if script is not CLOTHING1M else []  # which must not hold them
    status, out, error = start("--num_epochs", "3", "--skip_bad_images", "--run_dir", str(tmp_path / "begun"), *cache)
    assert status == 0 and "with epoch 2 (of 0..2)" in out and line in out, error


@pytest.mark.parametrize(("script", "depth"), [(CLOTHING1M, []), (WEBVISION, ["full"]), (FOLDER, [])])
def test_check_data_reports_and_ends_with_a_status(script, depth, tree, tmp_path, monkeypatch, capsys):
    """Else hours pass before it shows that an image is missing, or a bad folder is called good. With every default of
    the paper's, and nothing but the data folder: no download, no network, no device."""
    for owner, name in ((networks, "pair"), (script.main, "Run"), (script.main.options, "start_runtime")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("asked for more than the data folder"))
    size = script.size if script is WEBVISION else []
    flags = ["--data_path", str(tree), *size, "--out_dir", str(tmp_path / "out"), "--check_data", *depth]

    def check(*more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return end_of(script.main, [*flags, *more], monkeypatch), *capsys.readouterr()

    lists = script.read(tree)
    status, out, error = check()
    assert status == 0 and error == ""
    for name, images in zip(script.sizes, lists.values(), strict=False):
        assert f"{name}: {len(images)} of {len(images)} images exist, 0 of them unreadable\n" in out
    assert ("every image decoded" in out) == bool(depth)
    assert ("\nclasses: 0 c0, 1 c1, 2 c2, 3 c3\n" in out) == (script is FOLDER)  # which the numbers stand for
    bad = image_of(script, tree, 0)
    damage(bad, "truncated")
    status, out, error = check()
    assert status == 1 and error.count("\n") == 1 and f"  {bad}: " in out
    assert check("--skip_bad_images")[0] == 0
    (tree / script.labels).write_text("nonsense\n")  # and a list that cannot be read
    status, out, error = check("--skip_bad_images")
    assert status == 1 and f"{tree / script.labels}" in out + error and not (tmp_path / "out").exists()
