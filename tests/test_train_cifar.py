"""Train_cifar.py end to end, tiny: the real script on every data set's real format, and the files it leaves."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.data import make_cifar10, make_cifar100, make_fashionmnist
from helpers.nets import same
from helpers.runs import read_records
from helpers.scripts import run_script, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataloader_cifar
import PreResNet
import Train_cifar
from dividemix import engine, noise
from dividemix.codivide import normalise
from dividemix.data.device import DeviceImages

EPOCHS = 3  # one of warm-up
SMALL = ["--width", "4", "--num_epochs", str(EPOCHS), "--warm_up", "1", "--batch_size", "16", "--precision", "fp32"]


def noise_name(dataset: str) -> str:
    return "0.5_sym.json" if dataset.startswith("cifar") else f"{dataset}_0.5_sym.json"


@pytest.fixture(scope="module", params=["cifar10", "cifar100", "fashionmnist", "digits"])
def done(request, tmp_path_factory):
    """A finished run of a fresh process, in a folder of its own: its output, run folder and data."""
    dataset, root = request.param, tmp_path_factory.mktemp(request.param)
    make = {"cifar10": make_cifar10, "cifar100": make_cifar100, "fashionmnist": make_fashionmnist}.get(dataset)
    if make:
        flags = ["--data_path", str(root / "data")]
        batches = make(root / "data", 64, 20)
        noise_file = (root / "data" if dataset == "fashionmnist" else batches) / noise_name(dataset)
    else:
        flags = ["--limit_train", "64"]
        noise_file = None
    process = run_script("--dataset", dataset, *flags, *SMALL, cwd=root)
    assert process.returncode == 0, process.stderr
    folder = root / "checkpoint" / f"{dataset}_0.5_sym"
    data = dataloader_cifar.load(dataset, root / "data")
    return SimpleNamespace(
        **{"dataset": dataset, "folder": folder, "data": data, "noise_file": noise_file},
        **{"out": process.stdout, "err": process.stderr, "records": read_records(folder)},
    )


def test_output_is_one_line_an_epoch_without_bars(done):
    """Else a log file fills with progress bars, or does not tell what was trained and with which settings."""
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("epoch ")] == ["0/2", "1/2", "2/2"]
    for text in (done.out, done.err):
        assert not re.search(r"[\r█▏]|it/s|\d%\|", text), text
    assert all(line.startswith("warning: ") for line in done.err.splitlines()), done.err
    classes = 100 if done.dataset == "cifar100" else 10
    train, test = (64, 347) if done.dataset == "digits" else (64, 20)
    assert f"{done.dataset}: {train} training, {test} test images, {classes} classes\n" in done.out
    assert re.search(
        r"noise sym 0.5: \d+\.\d% of the training labels are wrong; made with seed 123, saved as", done.out
    )
    lambda_u = 150 if done.dataset == "cifar100" else 25
    row = f"{done.dataset if done.dataset.startswith('cifar') else 'cifar10'} sym 50%"
    source = "paper, Table 7" if done.dataset.startswith("cifar") else "not in the paper; nearest row, Table 7"
    assert f"lambda_u {lambda_u} ({source}: {row})\n" in done.out
    paper = {"cifar10": "paper: 94.6 / 94.4", "cifar100": "paper: 74.6 / 74.2"}.get(done.dataset)
    last = next(line for line in done.out.splitlines() if line.startswith("best "))
    assert f"; {paper} (but this run: --num_epochs" in last if paper else "paper" not in last
    assert ("not the official" in last) == bool(paper)


def test_log_files_have_the_authors_formats(done):
    """Else every script that people have to plot the authors' logs reads nothing, or exchanges the two networks."""
    acc = (done.folder / "acc.txt").read_text()
    assert acc == "".join(f"Epoch:{r['epoch']}   Accuracy:{r['test_acc']:.2f}\n" for r in done.records)
    lines = (done.folder / "stats.txt").read_text().splitlines()
    found = [re.fullmatch(r"Numer of labeled samples:(\d+)   AUC:(\d\.\d{3})", line) for line in lines]
    assert all(found), lines
    divided = done.records[1:]
    assert [int(match[1]) for match in found] == [r[f"labeled_net{k}"] for r in divided for k in (2, 1)]
    assert [match[2] for match in found] == [f"{r[f'auc_net{k}']:.3f}" for r in divided for k in (2, 1)]


def test_metrics_are_one_flat_object_an_epoch(done):
    """Else notebooks that read metrics.jsonl break, or a NaN makes it a file that strict readers refuse."""
    both = {f"{name}_net{k}" for name in ("test_acc", "auc", "labeled", "unlabeled") for k in (1, 2)}
    both |= {f"clean_{name}_net{k}" for name in ("precision", "recall") for k in (1, 2)}
    keys = both | {"epoch", "phase", "lr", "test_acc", "best_acc", "last10_acc", "loss_x", "loss_u", "penalty"}
    seconds = {"warmup": {"warmup1", "warmup2", "test"}, "train": {"loss", "gmm", "train1", "train2", "test"}}
    assert [(r["epoch"], r["phase"]) for r in done.records] == [(0, "warmup"), (1, "train"), (2, "train")]
    for record in done.records:
        assert record.keys() == keys | {f"seconds_{name}" for name in [*seconds[record["phase"]], "save"]}
        assert all(value is None or isinstance(value, int | float | str) for value in record.values())
        divided = record["phase"] == "train"
        assert all((record[key] is None) != divided for key in (*(both - {"test_acc_net1", "test_acc_net2"}), "loss_u"))
        for k in (1, 2) if divided else ():
            assert record[f"labeled_net{k}"] + record[f"unlabeled_net{k}"] == 64
    accuracy = [r["test_acc"] for r in done.records]
    assert [r["best_acc"] for r in done.records] == [max(accuracy[: n + 1]) for n in range(EPOCHS)]
    assert done.records[-1]["last10_acc"] == pytest.approx(np.mean(accuracy))


def test_args_json_says_what_was_run(done):
    """Else nobody can tell afterwards which flags, versions and code a number comes from."""
    about = json.loads((done.folder / "args.json").read_text())
    args = about["args"]
    assert (args["dataset"], args["width"], args["T"], args["seed"]) == (done.dataset, 4, 0.5, 123)
    assert (args["lambda_u"], args["num_class"]) == ((150, 100) if done.dataset == "cifar100" else (25, 10))
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["numpy"] == np.__version__
    assert {"python", "torchvision", "scikit-learn"} <= about["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", about["commit"] or "0" * 40)
    assert about["command"][0] == "Train_cifar.py" and "--num_epochs" in about["command"]


def test_checkpoints_are_safe_and_are_the_networks_that_were_tested(done):
    """Else a published checkpoint needs code to run when it is loaded, or is not the network of the accuracy that it
    carries, or its best epoch is another."""
    pointer = json.loads((done.folder / "last.json").read_text())
    last = torch.load(done.folder / pointer["file"], weights_only=True)
    best = torch.load(done.folder / "best.pt", weights_only=True)
    accuracy = [r["test_acc"] for r in done.records]
    assert pointer["epoch"] == EPOCHS - 1 and best["epochs"] == [accuracy.index(max(accuracy))] * 2
    data = done.data
    images = DeviceImages(data.test_images, data.test_labels, data.mean, data.std, data.flip)
    for state, epoch in ((last, EPOCHS - 1), (best, best["epochs"][0])):
        nets = load_nets(state["nets"], data.num_class)
        record = done.records[epoch]
        expected = {key: record[key] for key in ("test_acc", "test_acc_net1", "test_acc_net2")}
        assert engine.test(nets, {"test": images}) == pytest.approx(expected, abs=0.5 * 100 / len(images))
        assert not same(*state["nets"])  # two networks, not one twice


def load_nets(states, num_class: int) -> list[torch.nn.Module]:
    nets = [PreResNet.ResNet18(num_class, 4) for _ in states]
    for net, state in zip(nets, states, strict=True):
        net.load_state_dict(state)
    return nets


def test_labels_and_noise_files(done):
    """Else runs that should share their noise do not, the labels that were used are lost, or a data folder that holds
    several data sets mixes up their noise."""
    copy = done.folder / noise_name(done.dataset)
    given = np.array(json.loads(copy.read_text()))
    assert len(given) == len(done.data.train_labels)
    if done.noise_file:
        assert done.noise_file.read_bytes() == copy.read_bytes()
    assert given.tolist() == noise.inject(done.data.train_labels.tolist(), "sym", 0.5, done.data.num_class, 123)
    labels = np.load(done.folder / "labels.npz", allow_pickle=False)
    assert sorted(labels) == ["given", "index", "list_given", "true"] and len(labels["index"]) == 64
    np.testing.assert_array_equal(labels["list_given"], given)
    np.testing.assert_array_equal(labels["given"], given[labels["index"]])
    np.testing.assert_array_equal(labels["true"], done.data.train_labels[labels["index"]])


def test_figure_events_and_nothing_else(done):
    """Else TensorBoard shows an empty page, the figure is missing, or runs litter the disk with old checkpoints."""
    assert (done.folder / "figures" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    board = EventAccumulator(str(done.folder / "tensorboard")).Reload()
    events = board.Scalars("test_acc")
    assert [event.step for event in events] == [0, 1, 2]
    assert [event.value for event in events] == pytest.approx([r["test_acc"] for r in done.records])
    assert [event.step for event in board.Scalars("auc_net2")] == [1, 2]
    files = {path.name for path in done.folder.iterdir()} - {".lock", noise_name(done.dataset)}
    logs = {"acc.txt", "stats.txt", "metrics.jsonl", "histograms.jsonl", "args.json", "tensorboard", "scores"}
    logs |= {"labels.npz", "label_scores.npz", "thumbnails.npz"}
    logs |= {"report.html", "figures", "label_issues.csv", "cleaned_labels.csv", "transition.csv"}
    assert files == logs | {"last.json", "best.pt", "epoch-001.pt", "epoch-002.pt", "result.json"}
    assert [path.name for path in (done.folder / "scores").iterdir()] == ["epoch_002.npz"]


def test_save_scores_keeps_every_divided_epoch_as_of_its_start(tmp_path, no_figures):
    """Else an analysis of the losses over the epochs has gaps, or is shifted by an epoch against the weights."""
    final = Train_cifar.main(tiny(tmp_path, "--num_epochs", "4", "--warm_up", "2", "--save_scores"))
    folder = Path(final["run_dir"])
    assert [file.name for file in sorted((folder / "scores").iterdir())] == ["epoch_002.npz", "epoch_003.npz"]
    scores = dict(np.load(folder / "scores/epoch_003.npz", allow_pickle=False))
    names = ("raw_loss", "prediction", "loss", "clean_probability", "means", "variances", "weights", "threshold")
    assert scores.keys() == {f"{name}_net{k}" for name in names for k in (1, 2)}

    data, index = dataloader_cifar.load("digits", ""), np.load(folder / "labels.npz")["index"]
    given = np.load(folder / "labels.npz")["given"]
    train = DeviceImages(data.train_images[index], given, data.mean, data.std, data.flip)
    weights = torch.load(folder / "epoch-002.pt", weights_only=True)["nets"]
    for k, net in enumerate(load_nets(weights, 10), start=1):  # after epoch 2, which is the start of epoch 3
        scored = engine.per_sample_loss(net, train)
        np.testing.assert_allclose(scores[f"raw_loss_net{k}"], scored.loss.numpy(), rtol=1e-3, atol=1e-4)
        assert (scores[f"prediction_net{k}"] == scored.prediction.numpy()).mean() > 0.95
        np.testing.assert_allclose(scores[f"loss_net{k}"], normalise(scored.loss.numpy()), rtol=1e-2, atol=1e-3)
        labeled = scores[f"clean_probability_net{k}"] > scores[f"threshold_net{k}"]
        assert labeled.sum() == final[f"labeled_net{k}"]
