"""--ablation in whole runs: who trains on what, the logs, restarts, and what a run of one network leaves behind."""

import contextlib
import html
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.nets import same, snapshot
from helpers.runs import assert_same_run, read_records
from helpers.scripts import end_of, tiny
from PIL import Image
from test_ablation import ALONE, ASKED, TABLE5

import dataloader_cifar
import Train_cifar
from dividemix import DivideMixError, codivide, deploy, engine, files, networks
from dividemix.data.device import DeviceImages
from dividemix.data.images import shown
from dividemix.deploy import export, predict
from dividemix.report import issues as label_issues
from dividemix.report import report
from dividemix.run import checkpoint, options
from dividemix.run.description import read_description
from dividemix.run.folder import read_run
from PreResNet import ResNet18

# ---- Whole runs ----

EPOCHS = 3


def flags(out_dir: Path, name: str, *more: str) -> list[str]:
    return tiny(out_dir, "--limit_train", "64", "--num_epochs", str(EPOCHS), "--ablation", name, *more)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of each ablation, one warm-up epoch and two divided ones, and what happened in it."""
    runs, out = {}, tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: [])  # a figure takes a second
        for name in ASKED:
            built, trained, divided = [], [], []
            spy_on(patch, built, trained, divided)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                final = Train_cifar.main(flags(out, name))
            folder = Path(final["run_dir"])
            made = {"final": final, "folder": folder, "records": read_records(folder)}
            happened = {"built": built, "trained": trained, "divided": divided, "said": said.getvalue().splitlines()}
            runs[name] = SimpleNamespace(**made, **happened)
            patch.undo()
            patch.setattr(report, "draw", lambda *_: [])
    return runs


def spy_on(patch, built: list, trained: list, divided: list) -> None:
    """Note each network that is built, each division that is made with its network's number, and each training phase
    with what it was given."""
    build, train, divide = networks.build, Train_cifar.train_epoch, codivide.Mixture.divide

    def spy_build(*args):
        built.append(build(*args))
        return built[-1]

    def spy_train(net, peer, optimizer, data, division, mixmatch, phase):
        before = snapshot(net)
        terms = train(net, peer, optimizer, data, division, mixmatch, phase)
        given = {"net": net, "peer": peer, "division": division, "data": data, "mixmatch": mixmatch}
        trained.append(SimpleNamespace(before=before, **given))
        return terms

    def spy_divide(self, loss, *arguments):
        division = divide(self, loss, *arguments)
        divided.append((arguments[-1], codivide.normalise(loss), division))
        return division

    patch.setattr(networks, "build", spy_build)
    patch.setattr(Train_cifar, "train_epoch", spy_train)
    patch.setattr(codivide.Mixture, "divide", spy_divide)


@pytest.mark.parametrize("name", ASKED)
def test_who_trains_on_whose_division_with_which_peer(done, name):
    """Without co-training no other network may be made or asked, and the division is its own; with it all stays as in
    Algorithm 1. A hidden second network, or an exchanged division, makes the ablation measure nothing."""
    run, (nets, refine, views) = done[name], ASKED[name]
    assert len(run.built) == nets
    assert len(run.trained) == len(run.divided) == nets * (EPOCHS - 1)
    assert {(phase.mixmatch.refine, phase.mixmatch.views) for phase in run.trained} == {(refine, views)}
    for i, phase in enumerate(run.trained):
        k, epoch = i % nets, i // nets
        of_epoch = {each[0]: each for each in run.divided[nets * epoch : nets * (epoch + 1)]}
        assert phase.net is run.built[k]
        if nets == 1:
            assert phase.peer is phase.net and list(of_epoch) == ["net 1"]
            assert phase.division is of_epoch["net 1"][2]
        else:
            assert phase.peer is run.built[1 - k]
            assert phase.division is of_epoch[f"net {2 - k}"][2]


@pytest.mark.parametrize("name", ALONE)
def test_one_network_divides_by_its_own_losses_before_it_is_trained(done, name):
    """Else the split is a stale one, or that of a network which has already learned from it."""
    run = done[name]
    for phase, (_, loss, division) in zip(run.trained, run.divided, strict=True):
        net = ResNet18(10, 4)
        net.load_state_dict(phase.before)
        found = codivide.normalise(engine.per_sample_loss(net, phase.data).loss.numpy())
        np.testing.assert_allclose(found, loss, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(division.loss, loss, rtol=1e-5, atol=1e-6)


def test_all_start_from_the_same_network_and_warm_up(done):
    """Else an ablation differs from the whole method before it has left anything out."""
    first = {name: run.records[0]["test_acc_net1"] for name, run in done.items()}
    assert len(set(first.values())) == 1
    assert all(same(run.trained[0].before, done["none"].trained[0].before) for run in done.values())


@pytest.mark.parametrize("name", TABLE5)
def test_an_ablation_is_another_run(done, name):
    """A flag that does nothing gives the whole method's numbers under another name."""
    weights = [checkpoint.load_last(done[each].folder)["nets"][0] for each in ("none", name)]
    assert not same(*weights)
    assert done[name].folder.name == f"digits_0.5_sym_{name}"


@pytest.mark.parametrize("name", ALONE)
def test_logs_of_one_network(done, name):
    """Else a reader of the logs finds a second network that never was, or every tool that reads them stops."""
    run = done[name]
    assert not [key for record in run.records for key in record if key.endswith("_net2") or key.endswith("2")]
    for record in run.records:
        assert record["test_acc"] == record["test_acc_net1"]
    assert [record["labeled_net1"] is None for record in run.records] == [True, False, False]
    assert run.records[-1].keys() == {key for key in done["none"].records[-1] if not key.endswith("2")}
    assert (run.folder / "acc.txt").read_text().count("\n") == EPOCHS
    stats = (run.folder / "stats.txt").read_text().splitlines()
    expected = [f"Numer of labeled samples:{r['labeled_net1']}   AUC:{r['auc_net1']:.3f}" for r in run.records[1:]]
    assert stats == expected
    lines = (run.folder / "histograms.jsonl").read_text().splitlines()
    assert [json.loads(line).keys() for line in lines] == [{"epoch", "net1"}] * 2
    assert all(key.endswith("_net1") for key in np.load(run.folder / "scores/epoch_002.npz"))
    best = torch.load(run.folder / "best.pt", weights_only=True)
    accuracy = [record["test_acc"] for record in run.records]
    assert len(best["nets"]) == 1 and best["epochs"] == [accuracy.index(max(accuracy))]


@pytest.mark.parametrize("name", ALONE)
def test_the_list_of_wrong_labels_is_the_one_networks(done, name):
    """Else the list is missing, or its quality is half of what the network says."""
    run = done[name]
    scores = dict(np.load(run.folder / "label_scores.npz"))
    assert "p_clean_net2" not in scores and "loss_net2" not in scores
    issues = label_issues.find(read_run(run.folder))
    np.testing.assert_array_equal(issues.quality, scores["p_clean_net1"])
    np.testing.assert_array_equal(issues.loss, scores["loss_net1"])
    label_issues.write(issues, run.folder)
    head, first, *_ = (run.folder / "label_issues.csv").read_text().splitlines()
    row = dict(zip(head.split(","), first.split(","), strict=True))
    assert float(row["p_clean_net1"]) == float(row["label_quality"]) and row["p_clean_net2"] == ""


def test_what_is_printed(done):
    """Else nobody sees in a log that a part was left out, or a network's line speaks of two."""
    lines = done["no_cotraining"].said
    assert (
        "ablation no_cotraining: one network, which divides and guesses for itself (DivideMix w/o co-training)" in lines
    )
    [divided] = [line for line in lines if line.startswith("epoch 2/2")]
    assert re.search(r"\| labeled \d+ unlabeled \d+ \| AUC \d\.\d+ \|", divided)
    assert re.search(r"\| test \d+\.\d\d \| best", divided) and "net" not in divided


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], "; paper: 96.1 / 95.7"),
        (["--ablation", "one_view"], ""),  # no number with a source
        (
            ["--ablation", "divide_mixmatch", "--num_epochs", "9"],
            "; paper's Divide and MixMatch (Table 5): best 94.1 (but this run: --num_epochs 9 (paper: 300))",
        ),
    ],
)
def test_the_paper_number_beside_an_ablation_is_its_own(asked, expected):
    """One network without co-training beside 96.1: its user looks for a mistake that is not there."""
    records = [{"best_acc": 94.0, "last10_acc": 93.0}]
    args = Train_cifar.parse_args([*asked, "--r", "0.2"])
    options.resolve_recipe(args)
    line, paper = options.compare_with_paper(args, records, 0, True)
    assert line == f"best 94.00 (epoch 0), mean of the last 10 93.00{expected}"
    assert ("paper_last" in paper) == (not asked)
    args = Train_cifar.parse_args(["--ablation", "divide_mixmatch", "--dataset", "cifar100"])  # which Table 5 lacks
    assert options.compare_with_paper(args, records, 0, True) == ("best 94.00 (epoch 0), mean of the last 10 93.00", {})


# ---- Stop, continue, refuse ----


@pytest.mark.parametrize(
    "name",
    ["no_cotraining", *(pytest.param(name, marks=pytest.mark.slow) for name in TABLE5 if name != "no_cotraining")],
)
def test_interrupted_is_uninterrupted(tmp_path, monkeypatch, name):
    """Else a run of one network cannot be continued, or ends as another."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    asked = ["--ablation", name, "--save_scores", "--r", "0.9"]  # averages losses over epochs
    Train_cifar.main(tiny(tmp_path, *asked, "--run_dir", f"{tmp_path}/whole", "--num_epochs", "3"))
    for epochs in ("2", "3"):
        Train_cifar.main(tiny(tmp_path, *asked, "--run_dir", f"{tmp_path}/parts", "--num_epochs", epochs))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_another_ablation_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    """Else half a run has a part of the method and half has not."""
    monkeypatch.setattr(report, "draw", lambda *_: [])

    def start(*more: str) -> dict:
        return Train_cifar.main(tiny(tmp_path, "--run_dir", f"{tmp_path}/run", *more))

    start("--num_epochs", "1")
    for name in ("no_refinement", "no_cotraining"):
        with pytest.raises(DivideMixError, match=rf"other settings \(--ablation was none, now {name}\)"):
            start("--ablation", name)


def test_cross_entropy_has_nothing_to_leave_out(capsys):
    """Else a cross-entropy run goes by an ablation's name."""
    with pytest.raises(SystemExit) as ended:
        Train_cifar.parse_args(["--method", "ce", "--ablation", "no_refinement"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "--ablation no_refinement: --method ce has no part of DivideMix to leave out" in error


def test_a_checkpoint_of_one_network_and_one_of_two(done, tmp_path, monkeypatch):
    """--init_from: an ablation may begin with the first of two networks; two from one would begin as the same."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    both, one = (done[name].folder / "best.pt" for name in ("none", "no_cotraining"))
    trained: list = []
    spy_on(monkeypatch, [], trained, [])
    short = ["--num_epochs", "1", "--warm_up", "0"]
    for file in (both, one):
        Train_cifar.main(flags(tmp_path, "no_cotraining", *short, "--init_from", str(file), "--id", file.parent.name))
        assert same(trained.pop().before, files.load_file(file)["nets"][0]) and not trained
    with pytest.raises(DivideMixError, match=r"--init_from .*best\.pt: .* 2 networks"):
        Train_cifar.main(flags(tmp_path, "none", *short, "--init_from", str(one)))


@pytest.mark.slow
def test_blind_recipe_works_with_one_network(tmp_path, monkeypatch):
    """It estimates the noise from both divisions; there may be one."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    final = Train_cifar.main(flags(tmp_path, "no_cotraining", "--recipe", "blind"))
    assert None not in (final["noise_rate_estimate"], final["lambda_u"], final["concentration"])


# ---- A run that has ended ----


@pytest.mark.slow
def test_the_report_of_one_network(done, tmp_path):
    """Else the page has an empty second network, or does not come."""
    run = done["no_cotraining"].folder
    report.main([str(run), "--out", str(tmp_path / "report")])
    page = " ".join(html.unescape((tmp_path / "report" / "report.html").read_text()).split())
    assert "net 2" not in page and "net 1/2" not in page and "two networks" not in page
    assert "their quality, the network's clean probability" in page
    assert "AUC, net 1" in page and "net 1, epoch 2" in page


@pytest.mark.slow
def test_one_network_and_two_are_compared(done, tmp_path, capsys):
    """That is what an ablation is for."""
    report.main([*(str(done[name].folder) for name in ("none", *ALONE)), "--out", str(tmp_path)])
    table = capsys.readouterr().out
    for name in ALONE:
        [line] = [line for line in table.splitlines() if line.startswith(done[name].folder.name)]
        assert f" {done[name].final['auc_net1']:.3f} " in line
    assert (tmp_path / "report.html").exists()


def test_prediction_of_one_network(done, tmp_path, monkeypatch):
    """Else a user of the run gets another classifier than the tested one, or half its confidence."""
    run = done["divide_mixmatch"]
    description = read_description(run.folder)
    assert description.count == 1 and str(description).startswith("one preresnet18")
    ensemble = deploy.load_ensemble(run.folder, description)
    data = dataloader_cifar.load("digits", "")
    images = DeviceImages(data.test_images, data.test_labels, data.mean, data.std, data.flip)
    accuracy = engine.test(list(ensemble.nets), {"test": images})
    best = dict.fromkeys(("test_acc", "test_acc_net1"), run.final["best_acc"])
    assert accuracy == pytest.approx(best, abs=0.5 * 100 / len(images))
    Image.fromarray(data.test_images[0]).save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    assert end_of(predict, [str(run.folder), "digit.png", "--device", "cpu"], monkeypatch) == 0
    row = dict(zip(*(line.split(",") for line in Path("predictions.csv").read_text().splitlines()), strict=True))
    with torch.no_grad():
        pixels = torch.tensor(description.preparation.view(shown(f"{tmp_path}/digit.png").image))
        p = ensemble(deploy.to_images(pixels[None])).softmax(1)[0]
    assert int(row["label"]) == p.argmax() and float(row["confidence"]) == pytest.approx(float(p.max()), abs=1e-3)
    # A file with another number of networks than the run has is not this run's
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_bytes((run.folder / "args.json").read_bytes())
    (tmp_path / "run" / "best.pt").write_bytes((done["none"].folder / "best.pt").read_bytes())
    with pytest.raises(DivideMixError, match=r"best\.pt does not fit these networks"):
        deploy.load_ensemble(tmp_path / "run", description)


@pytest.mark.slow
def test_export_of_one_network(done, tmp_path, monkeypatch):
    """Its file says what to make of the logits: half of them would be another confidence."""
    run, file = done["divide_mixmatch"].folder, tmp_path / "model.pt2"
    assert end_of(export, [str(run), str(file)], monkeypatch) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    about = json.loads(extra["metadata.json"])
    assert about["program"] == "DivideMix: one network" and about["networks"]["count"] == 1
    assert "softmax(logits) " in about["output"]["meaning"]
    x = torch.rand(3, *about["input"]["shape"][1:])
    with torch.no_grad():
        expected = deploy.load_ensemble(run, read_description(run))(x)
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4)
