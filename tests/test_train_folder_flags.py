"""Train_folder.py: what its flags and its images make of a run, down to what each phase is given."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nets import same
from helpers.runs import read_records
from helpers.scripts import note_phases
from helpers.trees import make_folder
from test_train_folder import EPOCHS, MACHINE, MODES, NET, starter, tiny

import Train_folder
from dividemix import DivideMixWarning, networks

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """24 images of 4 classes; 2 of them are held out."""
    return make_folder(tmp_path_factory.mktemp("own") / "images")


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    return starter(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_phase_is_given(tree, start, monkeypatch, mode):
    """The flags of a run, and what follows from its images, would not be those that were printed."""
    calls = note_phases(monkeypatch, Train_folder)
    status, _, error = start(tree, "--data_mode", mode, "--num_epochs", "4", "--warm_up", "2", "--lr_drop", "3")
    assert status == 0 and "error" not in error
    assert [call["kind"] for call in calls] == ["warmup"] * 4 + ["train"] * 4
    for i, call in enumerate(calls):
        assert call["lr"] == pytest.approx(0.02 if i < 6 else 0.002)
        assert (call["momentum"], call["nesterov"], call["weight_decay"]) == (0.9, False, 5e-4)
        assert len(call["data"]) == 22
        mixmatch = call["mixmatch"]
        assert (mixmatch.batch_size, mixmatch.num_class, mixmatch.warm_up) == (8, 4, 2)
        assert (mixmatch.alpha, mixmatch.T, mixmatch.lambda_u) == (4, 0.5, 0)
        assert mixmatch.unlabeled_loss and not mixmatch.conf_penalty and call["phase"].epoch == i // 2
    assert not same(calls[0]["state"], calls[1]["state"])  # two networks that start differently


@pytest.mark.parametrize("mode", MODES)
def test_no_flip(tree, start, monkeypatch, mode):
    """Mirrored digits, or organs, are other ones."""
    calls = note_phases(monkeypatch, Train_folder)
    for flags, expected in (([], True), (["--no_flip", "--fresh"], False)):
        assert start(tree, "--data_mode", mode, "--num_epochs", "1", *flags)[0] == 0
        data = calls[-1]["data"]
        assert (data.flip if mode == "device" else data.pipeline.views.flip) == expected


def test_flags_reach_the_phases(tree, start, monkeypatch):
    """Else somebody tunes for a week what nothing depends on."""
    calls = note_phases(monkeypatch, Train_folder)
    assert start(tree, "--conf_penalty", "on", "--T", "0.7", "--alpha", "2", "--p_threshold", "0.6")[0] == 0
    mixmatch = calls[0]["mixmatch"]
    assert mixmatch.conf_penalty and (mixmatch.T, mixmatch.alpha) == (0.7, 2) and calls[-1]["mixmatch"] is mixmatch
    assert calls[-1]["division"].threshold == 0.6
    large = ["--image_size", "72", "--batch_size", "4"]  # large images: as WebVision's, unless lambda_u says otherwise
    for flags, expected in (([], (False, 0)), (["--lambda_u", "3"], (True, 3))):
        assert start(tree, *large, *flags, "--fresh", "--num_epochs", "2")[0] == 0
        mixmatch = calls[-1]["mixmatch"]
        assert (mixmatch.unlabeled_loss, mixmatch.lambda_u) == expected


def test_imagenets_weights_come_with_their_normalisation(tree, start, tmp_path, monkeypatch):
    """Weights of one normalisation, images of another: a network that starts with nonsense."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = tmp_path / "torch/hub/checkpoints" / networks.architecture("squeezenet1_1").imagenet.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    state = networks.build("squeezenet1_1", 1000).state_dict()
    torch.save(state, file)
    calls = note_phases(monkeypatch, Train_folder)
    flags = ["--arch", "squeezenet1_1", "--width", "64", "--image_size", "32", "--num_epochs", "1"]
    status, out, error = start(tree, *flags)
    assert status == 0, error
    assert "weights imagenet (torchvision's)\n" in out and "lr 0.002 (as Clothing1M)\n" in out
    assert "mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (ImageNet's)\n" in out
    for call in calls:
        assert torch.equal(call["state"]["features.0.weight"], state["features.0.weight"])
        assert call["data"].mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert call["weight_decay"] == 1e-3


def test_the_unlabeled_loss_is_recorded_where_there_is_one(tree, tmp_path):
    """It would be trained by and never seen; or a loss of 0 would look like one that is trained by."""
    small, large = ["--lambda_u", "5"], ["--image_size", "72", "--batch_size", "4"]
    for name, flags in (("small", small), ("large", large)):
        Train_folder.main(tiny(tree, tmp_path / name, *flags, "--num_epochs", "2"))
    warmup, train = read_records(tmp_path / "small")
    assert warmup["loss_u"] is None and train["loss_u"] > 0
    assert not any("loss_u" in record for record in read_records(tmp_path / "large"))


def test_plain_cross_entropy(tree, tmp_path):
    """The comparison would divide after all, or end without the losses that its labels are ranked by."""
    flags = ["--method", "ce", "--save_scores", "--num_epochs", str(EPOCHS), "--out_dir", str(tmp_path)]
    Train_folder.main(["--data_path", str(tree), *NET, *MACHINE, *flags])
    folder = tmp_path / "folder_images_ce"
    records = read_records(folder)
    assert [record["phase"] for record in records] == ["ce"] * EPOCHS
    assert not any("seconds_gmm" in record or "seconds_loss" in record for record in records)
    assert not (folder / "scores").exists()
    scores = np.load(folder / "label_scores.npz")
    assert len(scores["loss_net1"]) == len(scores["loss_net2"]) == 22 and "p_clean_net1" not in scores


@pytest.mark.parametrize(
    ("parts", "flags", "sizes", "chosen"),
    [
        ((), [], (22, 2, None), "the validation images: validation"),
        (("train", "test"), [], (24, None, 24), "the test set: test"),
        (("train", "test"), ["--val_fraction", "0.25"], (18, 6, 24), "the validation images: validation"),
        (("train", "val"), [], (24, 24, None), "the validation images: validation"),
        (("train", "val", "test"), [], (24, 24, 24), "the validation images: validation"),
    ],
)
def test_what_the_best_epoch_is_chosen_on(tmp_path, start, monkeypatch, parts, flags, sizes, chosen):
    """Else the best epoch is chosen on what it is then tested with, or on images that were trained on."""
    note_phases(monkeypatch, Train_folder)
    named = [name for name, size in zip(("val", "test"), sizes[1:], strict=True) if size]
    values = {"val": iter([10.0, 30.0, 20.0]), "test": iter([50.0, 40.0, 60.0])}
    evaluated: list[dict[str, int]] = []

    def accuracy(nets, sets, phase):
        evaluated.append({name: len(data) for name, data in sets.items()})
        record = {f"{name}_acc": next(values[name]) for name in sets}
        return record | {f"{name}_acc_net{k}": 0.0 for name in sets for k in (1, 2)}

    monkeypatch.setattr(Train_folder, "test", accuracy)
    status, out, error = start(make_folder(tmp_path / "data", parts=parts), *flags)
    assert status == 0, error
    assert evaluated == [dict(zip(named, filter(None, sizes[1:]), strict=True))] * EPOCHS
    data = json.loads((tmp_path / "run/args.json").read_text())["data"]
    assert tuple(data.get(name) for name in ("train", "val", "test")) == sizes
    assert f"chosen on {chosen} " in out and ("no test part: " in out) == ("test" not in named)
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)["epochs"]
    assert best == ([1, 1] if "val" in named else [2, 2])
    record = read_records(tmp_path / "run")[-1]
    assert ("test_acc" in record, "val_acc" in record) == ("test" in named, "val" in named)
    assert record.get("best_acc") == {"test": 60.0, "val test": 40.0}.get(" ".join(named))


def test_an_imbalance_is_reported(tmp_path, start, monkeypatch):
    """A class of four among hundreds loses half of its right labels, and nobody knows why."""
    note_phases(monkeypatch, Train_folder)
    tree = make_folder(tmp_path / "data", 40, num_class=2, parts=("train", "test"))
    for image in sorted((tree / "train/c1").iterdir())[2:]:
        image.unlink()
    status, out, error = start(tree)
    assert status == 0
    assert "images of a class: 2 (c1) to 20 (c0), 10.0 times\n" in out and error == ""
    next((tree / "train/c1").iterdir()).unlink()
    with pytest.warns(DivideMixWarning, match="the largest class has 20 times as many images as the smallest: "):
        status, out, _ = start(tree, "--fresh")
    assert status == 0 and "images of a class: 1 (c1) to 20 (c0), 20.0 times\n" in out


def test_other_settings_are_refused(tree, start, monkeypatch):
    """A run that goes on with another network, crop or rate half way is a result of no setting."""
    note_phases(monkeypatch, Train_folder)
    assert start(tree, "--num_epochs", "1")[0] == 0
    for flags, said in (
        (["--data_mode", "stream"], "--data_mode was device, now stream"),
        (["--no_flip"], "--no_flip was False, now True"),
        (["--image_size", "24"], "--image_size was 16, now 24"),
        (["--val_fraction", "0.2"], "--val_fraction was 0.1, now 0.2"),
    ):
        status, _, error = start(tree, *flags)
        assert status == 1 and said in error
    assert start(tree, "--keep_images", "no", "--eval_batch_size", "3")[0] == 0
