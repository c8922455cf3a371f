"""What Train_clothing1M.py and Train_webvision.py have in common: the paper's flags, damaged data folders,
--check_data, --skip_bad_images, and a run folder that is continued with other settings or images; and, with
Train_folder.py, Algorithm 1: when a division is made, by which weights, and who learns from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nets import same, snapshot
from helpers.runs import last_state, read_records
from helpers.scripts import (
    CLOTHING1M,
    FOLDER,
    SMALL_NET,
    WEBVISION,
    assert_co_divided,
    end_of,
    image_of,
    note_co_division,
    note_phases,
    run_script,
)
from helpers.trees import make_clothing1M

import Train_clothing1M
import Train_webvision
from dividemix import networks
from dividemix.codivide import Mixture, normalise
from dividemix.report import report

# The other tests are of the first two.
ALL = pytest.mark.parametrize("script", [CLOTHING1M, WEBVISION, FOLDER], ids=["clothing1M", "webvision", "folder"])


@pytest.fixture(params=[CLOTHING1M, WEBVISION], ids=["clothing1M", "webvision"])
def script(request):
    return request.param


@pytest.fixture
def tree(script, tmp_path) -> Path:
    return script.make(tmp_path / "data", noise=0, sides=(16, 24))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: [])


@pytest.fixture
def start(script, tree, tmp_path, monkeypatch, capsys):
    """Runs the command line in-process, as a user would. -> (exit status, stdout, stderr)"""

    def run(*flags: str) -> tuple[int, str, str]:
        default = ["--data_path", str(tree), *SMALL_NET, *script.size, "--workers", "0", "--num_epochs", "2"]
        capsys.readouterr()
        status = end_of(script.main, [*default, "--out_dir", str(tmp_path / "out"), *flags], monkeypatch)
        return status, *capsys.readouterr()

    return run


# ---- The paper's flags ----


def test_what_a_phase_is_given(script, start, monkeypatch):
    """Another weight decay, penalty, batch or schedule than the paper's trains as well, and ends a point lower."""
    calls = note_phases(monkeypatch, script.main)
    status, _, error = start("--num_epochs", "4", "--warm_up", "2", "--lr_drop", "3")
    assert status == 0 and "error" not in error
    assert [call["kind"] for call in calls] == ["warmup"] * 4 + ["train"] * 4
    for i, call in enumerate(calls):
        assert call["lr"] == pytest.approx(script.lr if i < 6 else script.lr / 10)
        assert (call["momentum"], call["nesterov"], call["weight_decay"]) == (0.9, False, script.weight_decay)
        mixmatch, phase = call["mixmatch"], call["phase"]
        assert (mixmatch.batch_size, mixmatch.num_class, mixmatch.warm_up) == (8, script.num_class, 2)
        assert (mixmatch.alpha, mixmatch.T, mixmatch.views, mixmatch.refine) == (0.5, 0.5, 2, True)
        assert (mixmatch.unlabeled_loss, mixmatch.conf_penalty) == (False, script.conf_penalty)
        assert phase.epoch == i // 2
    assert not same(calls[0]["state"], calls[1]["state"])  # two networks that start differently


def test_the_defaults_are_the_papers(script):
    """Else `python Train_*.py` alone is another experiment than the README says."""
    args = vars(script.main.parse_args([]))
    common = {"batch_size": 32, "num_epochs": 80, "lr_drop": 40, "warm_up": 1, "alpha": 0.5, "T": 0.5, "lambda_u": 0}
    clothing1m = {"arch": "resnet50", "image_size": 224, "num_class": 14, "num_batches": 1000}
    webvision = {"arch": "inceptionresnetv2", "image_size": 299, "num_class": 50}
    expected = common | {"p_threshold": 0.5, "lr": script.lr} | (clothing1m if script is CLOTHING1M else webvision)
    assert {name: args[name] for name in expected} == expected
    assert script.main.PAPER.weight_decay == script.weight_decay


def test_lambda_u_says_that_it_has_no_effect(script, start, monkeypatch):
    """Else somebody tunes for a week what nothing depends on."""
    calls = note_phases(monkeypatch, script.main)
    status, out, _ = start("--lambda_u", "25")
    assert status == 0
    assert "--lambda_u 25 has no effect" in out
    assert not any(call["mixmatch"].unlabeled_loss for call in calls)
    assert "lambda_u 0" not in start("--fresh")[1]


# ---- Algorithm 1, of all three ----


def scores_of(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Of each epoch that left scores, these."""
    return {int(file.stem[6:]): dict(np.load(file)) for file in sorted((folder / "scores").glob("*.npz"))}


def all_scores(script) -> list[str]:
    """The flag that keeps them, where it is one."""
    return [] if script is WEBVISION else ["--save_scores"]


@ALL
def test_an_epoch_is_divided_at_its_start_and_the_networks_swap(script, start, tmp_path, monkeypatch):
    """Divided by other weights than those it starts with, by its own division, or with a stale peer, an epoch trains
    without any error, as another method; a division after the last epoch would be hours for nothing, and its scores
    would lie beside those that were trained on. Also over a restart."""
    events = note_co_division(monkeypatch, script.main)
    fits, divide, test = [], Mixture.divide, script.main.test

    def spy_divide(mixture, *given):
        fits.append(given[-1])
        return divide(mixture, *given)

    def spy_test(nets, sets, *given, **more):
        if not events or events[-1]["what"] != "test":  # on several sets, one after the other: noted once
            events.append({"what": "test", "nets": [snapshot(net) for net in nets]})
        return test(nets, sets, *given, **more)

    monkeypatch.setattr(Mixture, "divide", spy_divide)
    monkeypatch.setattr(script.main, "test", spy_test)
    folder = tmp_path / "out" / script.name
    for epochs in ("2", "3"):
        status, _, error = start("--num_epochs", epochs, *all_scores(script))
        assert status == 0, error
    divided = ["score", "score", "train", "train", "test"]
    assert [event["what"] for event in events] == ["test", *divided, *divided]
    assert fits == ["net 2", "net 1"] * 2

    scores, labels = scores_of(folder), np.load(folder / "label_scores.npz")
    assert [*scores] == [1, 2] and labels["epochs"] == 3
    assert ["seconds_loss" in record for record in read_records(folder)] == [False, True, True]
    for epoch, begin in ((1, 0), (2, 5)):
        tested, *of_epoch = events[begin : begin + 5]
        assert_co_divided(*of_epoch)
        for k, scored in ((2, of_epoch[0]), (1, of_epoch[1])):
            assert same(scored["net"], tested["nets"][k - 1]), "not the weights that the epoch before ended with"
            np.testing.assert_array_equal(normalise(scores[epoch][f"raw_loss_net{k}"]), scored["loss"])


@ALL
def test_an_epoch_whose_losses_cannot_be_divided_afterwards_is_kept(script, start, tmp_path, monkeypatch, recwarn):
    """The last of a hundred epochs would be lost to a division that nobody asked for: its weights are broken, its
    record, logs and checkpoint are not."""
    trained, train = [], script.main.train_epoch

    def train_and_break(net, peer, *given):
        trained.append(net)
        terms = train(net, peer, *given)
        for broken in (net, peer) if len(trained) == 2 else ():  # after the last training of epoch 1
            broken.linear.bias.data.fill_(float("nan"))
        return terms

    monkeypatch.setattr(script.main, "train_epoch", train_and_break)
    status, _, error = start()
    assert status == 0, error
    folder = tmp_path / "out" / script.name
    assert [record["phase"] for record in read_records(folder)] == ["warmup", "train"]
    assert len(last_state(folder)["records"]) == 2 and json.loads((folder / "result.json").read_text())["epoch"] == 1
    before = (folder / "last.json").read_bytes()
    status, _, error = start("--num_epochs", "3")  # now it is asked for
    assert status == 1 and "epoch 2: " in error.splitlines()[-1] and "not finite" in error
    assert (folder / "last.json").read_bytes() == before


@ALL
def test_where_nothing_is_clean_the_peer_warms_up_once_more(script, start, tmp_path, monkeypatch, recwarn):
    """An epoch on no labeled sample would be no epoch; a division of another epoch's losses would be taken for one of
    these, or, of another sample's, give each image another one's clean probability."""
    nothing = {1: ["net 2"], 2: ["net 1", "net 2"]}  # epoch -> networks that find nothing clean
    calls, asked, divide = note_phases(monkeypatch, script.main), [], Mixture.divide

    def choosy(mixture, *given):
        asked.append(given[-1])
        mixture.threshold = 1.0 if given[-1] in nothing.get((len(asked) + 1) // 2, []) else 0.5
        return divide(mixture, *given)

    monkeypatch.setattr(Mixture, "divide", choosy)
    status, _, error = start("--num_epochs", "4", *all_scores(script))
    assert status == 0, error
    said = [str(warning.message).split(" finds no sample clean")[0] for warning in recwarn]
    assert said == ["net 2", "net 2", "net 1"]
    kinds = ["warmup", "warmup", "warmup", "train", "warmup", "warmup", "train", "train"]
    assert [call["kind"] for call in calls] == kinds
    nets = [call["net"] for call in calls[:2]]
    for i, call in enumerate(calls):
        assert call["net"] is nets[i % 2] and call["phase"].epoch == i // 2
        assert "peer" not in call or call["peer"] is nets[1 - i % 2]
    if script is CLOTHING1M:  # a sample of a warm-up epoch's size, not that which nothing is clean of
        assert len(calls[2]["data"]) == len(calls[0]["data"]) > len(calls[3]["data"])

    folder = tmp_path / "out" / script.name
    records, scores = read_records(folder), scores_of(folder)
    assert [record["phase"] for record in records] == ["warmup", "train", "warmup", "train"]
    sizes = [[record[f"labeled_net{k}"] is not None for k in (1, 2)] for record in records]
    assert sizes == [[False, False], [True, False], [False, False], [True, True]]
    assert [*scores] == [1, 3]
    assert not any(name.endswith("net2") for name in scores[1]) and "raw_loss_net1" in scores[1]
    assert "raw_loss_net1" in scores[3] and "raw_loss_net2" in scores[3]
    assert len((folder / "stats.txt").read_text().splitlines()) == 3


@ALL
def test_no_warm_up(script, start, tmp_path):
    """Networks that come trained already (--init_from) need none: the first epoch is divided by them as they are."""
    status, _, error = start("--warm_up", "0", "--num_epochs", "1")
    assert status == 0, error
    folder = tmp_path / "out" / script.name
    assert [record["phase"] for record in read_records(folder)] == ["train"]
    assert [*scores_of(folder)] == [0]


# ---- The run folder ----


def test_other_settings_are_refused_and_a_higher_num_epochs_continues(script, start, tmp_path, monkeypatch):
    """A run that goes on with another seed, network or rate half way is a result of no setting."""
    calls = note_phases(monkeypatch, script.main)
    assert start("--num_epochs", "1")[0] == 0
    for flag, value, before in (("--seed", "5", "123"), ("--lr", "0.5", str(script.lr)), ("--alpha", "4.0", "0.5")):
        folder = str(tmp_path / "out" / script.name)
        status, _, error = start(flag, value, "--run_dir", folder)
        assert status == 1 and error.count("\n") == 1
        assert f"{folder} holds a run with other settings ({flag} was {before}, now {value}): give this" in error
    assert len(calls) == 2
    status, out, _ = start("--eval_batch_size", "7")
    assert status == 0 and len(calls) == 4 and "with epoch 1 (of 0..1)" in out
    status, out, _ = start()
    assert status == 0 and len(calls) == 4 and "is finished (2 epochs)" in out


def test_other_images_than_the_run_began_with_are_refused(script, start, tree, tmp_path, monkeypatch):
    """The rows of samples and divisions would be those of other images: silently another experiment. The same lists in
    another place are the same run."""
    note_phases(monkeypatch, script.main)
    assert start("--num_epochs", "1")[0] == 0
    moved = tmp_path / "moved"
    tree.rename(moved)
    status, out, _ = start("--data_path", str(moved))
    assert status == 0 and "with epoch 1 (of 0..1)" in out
    lines = (moved / script.labels).read_text().splitlines()
    key, label = lines[0].rsplit(" ", 1)
    (moved / script.labels).write_text("\n".join([f"{key} {(int(label) + 1) % 10}", *lines[1:]]))
    status, _, error = start("--data_path", str(moved), "--num_epochs", "3")
    assert status == 1 and error.count("\n") == 1
    assert f"the images or labels in {moved} are not those " in error and "--fresh" in error


def test_init_from_starts_both_networks_from_a_run(script, start, tmp_path, monkeypatch):
    """Else an evaluation or a fine-tuning of published weights is one of random ones."""
    calls = note_phases(monkeypatch, script.main)
    assert start("--num_epochs", "1")[0] == 0
    file = tmp_path / "out" / script.name / "best.pt"
    assert start("--num_epochs", "1", "--init_from", str(file), "--seed", "6", "--run_dir", str(tmp_path / "b"))[0] == 0
    for call, state in zip(calls[2:], torch.load(file, weights_only=True)["nets"], strict=True):
        assert same(call["state"], state)


# ---- A data folder with faults ----


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    html = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "html": html}[how])


SAID = {"truncated": "truncated", "empty": "empty", "html": "not an image"}


@pytest.mark.parametrize("how", ["truncated", "empty", "html"])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_image_is_refused_with_its_path(script, start, tree, how, workers):
    """A grey square, or a silent gap, in its place would train and score without anyone knowing."""
    if script is CLOTHING1M:  # its samples do not draw every image; it validates with all of these
        name, i = "clean_val_key_list.txt", 3
    else:
        name, i = "info/train_filelist_google.txt", 5
    image = tree / (tree / name).read_text().splitlines()[i].split()[0]
    damage(image, how)
    status, _, error = start("--workers", workers)
    line = error.splitlines()[-1]
    assert status == 1 and line.startswith(f"error: {image}: ")
    assert SAID[how] in line.lower() and f"({tree / name}, line {i + 1})" in line and "--skip_bad_images" in line


def test_skip_bad_images_leaves_them_out_counts_them_and_stays_with_it(script, start, tree, tmp_path, monkeypatch):
    """Else one bad file in a million ends a run of days, or the images of a continued run are others than its rows."""
    calls = note_phases(monkeypatch, script.main)
    bad = [image_of(script, tree, i) for i in (0, 2, 5)]  # of images that the lists name
    for image, how in zip(bad, ("truncated", "empty", "html"), strict=True):
        damage(image, how)
    (gone := image_of(script, tree, 8)).unlink()
    status, out, _ = start("--num_epochs", "1", "--skip_bad_images")
    total = 56 if script is CLOTHING1M else 40
    assert status == 0
    assert f"train: 4 of {total} images left out (1 missing, 3 unreadable)\n" in out
    for name, n in zip(script.lists[1:], sizes(script), strict=True):
        assert f"\n{name}: 0 of {n} images left out\n" in out
    folder = tmp_path / "out" / script.name
    skipped = json.loads((folder / "skipped.json").read_text())
    below = tree / "images" if script is CLOTHING1M else tree
    assert {below / name for name in skipped["lists"]["train"]["bad"]} == {*bad, gone}
    data = [call["data"] for call in calls]
    used = {each.pipeline.lists["train"].path(i) for each in data for i in each.index if each.name == "train"}
    assert used and not used & {str(path) for path in (*bad, gone)}
    assert json.loads((folder / "args.json").read_text())["data"]["train"] == total - 4

    good = image_of(script, tree, 1)
    for image in (*bad, gone):
        image.write_bytes(good.read_bytes())  # mended meanwhile: the run goes on without them all the same
    status, out, _ = start()  # asked for once is enough
    assert status == 0 and "with epoch 1 (of 0..1)" in out
    assert f"train: 4 of {total} images left out (1 missing, 3 unreadable)\n" in out


def test_a_begun_run_can_leave_out_what_goes_bad_later(script, start, tree, tmp_path):
    """Else a file that is damaged at epoch 40 ends the run for good: other settings, other images, another run."""
    status, _, _ = start("--num_epochs", "2")
    assert status == 0
    folder = tmp_path / "out" / script.name
    for i in (0, 2, 5):
        damage(image_of(script, tree, i), "empty")
    more = ["--cache_dir", str(tmp_path / "cache")] if script is not CLOTHING1M else []  # which must not hold them
    status, out, error = start("--num_epochs", "4", "--skip_bad_images", *more)
    assert status == 0, error
    assert "with epoch 2 (of 0..3)" in out and "train: 3 of " in out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def sizes(script) -> tuple[int, int]:
    return (28, 28) if script is CLOTHING1M else (20, 20)


@pytest.mark.parametrize("fault", ["label", "outside", "absolute"])
def test_faults_of_a_list_are_refused_with_file_and_line(script, start, tree, tmp_path, fault):
    """A label out of range crashes a GPU without a word; a path that leads out of the folder reads what a downloaded
    list should not."""
    file = tree / (script.labels if fault == "label" else script.paths)
    lines = file.read_text().splitlines()
    key, _, label = lines[2].partition(" ")
    new, said = {
        "label": (f"{key} 1000", "label '1000', expected a whole number from 0 to"),
        "outside": (f"images/../../{key} {label}".strip(), "has a part '..'"),
        "absolute": (f"/{key} {label}".strip(), "is an absolute path"),
    }[fault]
    file.write_text("\n".join([*lines[:2], new, *lines[3:]]))
    status, _, error = start()
    assert status == 1 and error.count("\n") == 1
    assert error.startswith(f"error: {file}, line 3: ") and said in error
    assert not (tmp_path / "out").exists()


# ---- --check_data ----


@pytest.fixture
def no_weights(monkeypatch):
    """No download, no network, no device: a data folder is checked on a machine that has none."""

    def refuse(*_, **__):
        raise AssertionError("--check_data asked for more than the data folder")

    for module, name in ((networks, "imagenet_file"), (networks, "pair"), (torch.hub, "download_url_to_file")):
        monkeypatch.setattr(module, name, refuse)
    for module in (Train_clothing1M, Train_webvision):
        monkeypatch.setattr(module.options, "start_runtime", refuse)
        monkeypatch.setattr(module, "Run", refuse)


@pytest.mark.parametrize("depth", [[], ["full"]])
def test_check_data_reports_and_ends_with_a_status(script, tree, tmp_path, monkeypatch, capsys, no_weights, depth):
    """Else hours of download or training pass before it shows that an image is missing; or a script that waits for a
    good folder is told that a bad one is good. With the paper's flags, whose weights are not looked for."""
    flags = ["--data_path", str(tree), *script.size[script.size[0] == "--num_batches" and 2 :]]
    flags += ["--out_dir", str(tmp_path / "out"), "--check_data", *depth]

    def check(*more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return end_of(script.main, [*flags, *more], monkeypatch), *capsys.readouterr()

    status, out, error = check()
    total = 56 if script is CLOTHING1M else 40
    assert status == 0 and error == ""
    for name, n in zip(script.lists, (total, *sizes(script)), strict=True):
        assert f"{name}: {n} of {n} images exist, 0 of them unreadable\n" in out
    how = "every image decoded" if depth else "header and end of every image read"
    assert f"the data are complete ({how})\n" in out
    counts = np.bincount(list_of(script, tree), minlength=script.num_class)
    assert "images of each class: " + ", ".join(f"{c}: {n}" for c, n in enumerate(counts)) in " ".join(out.split())

    damage(bad := image_of(script, tree, 0), "truncated")
    (gone := image_of(script, tree, 3)).unlink()
    status, out, error = check()
    assert status == 1 and error.count("\n") == 1 and error.startswith("error: training cannot run on these data")
    assert f"train: {total - 1} of {total} images exist, 1 of them unreadable\n" in out
    assert f"  {bad}: " in out and f"  {gone}: missing (" in out
    status, out, error = check("--skip_bad_images")
    assert status == 0 and f"with --skip_bad_images it can, on train: {total - 2} of {total} images" in out

    (tree / script.paths).unlink()  # and a list that is missing, in the same report
    status, out, error = check("--skip_bad_images")
    assert status == 1 and f"{tree / script.paths} is missing" in out
    assert f"{script.lists[1]}: {sizes(script)[0]} of " in out
    assert not (tmp_path / "out").exists()


def list_of(script, tree: Path) -> np.ndarray:
    """The labels of the training list, by reading the files anew."""
    labels = dict(line.rsplit(" ", 1) for line in (tree / script.labels).read_text().splitlines())
    keys = [line.split()[0] for line in (tree / script.paths).read_text().splitlines()]
    found = np.array([int(labels[key]) for key in keys])
    return found[found < script.num_class]


def test_check_data_in_a_process_of_its_own(tmp_path):
    """The exit status that a shell script sees, with every default of the paper's and nothing but the data folder."""
    tree = make_clothing1M(tmp_path / "data", 14, 14, 14, images_folder=False, sides=(16, 24))
    (tree / "0/00").rename(tree / "0/elsewhere")
    process = run_script("--data_path", "data", "--check_data", cwd=tmp_path, script="Train_clothing1M.py")
    assert process.returncode == 1 and "train: 13 of 14 images exist" in process.stdout
    assert process.stderr.count("\n") == 1 and "Traceback" not in process.stderr
    assert not (tmp_path / "checkpoint").exists()
