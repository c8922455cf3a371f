"""The page of a run: what it says, what it escapes, and what it does without."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from helpers.pages import HOSTILE, Reader, assert_self_contained
from helpers.run_folder import N, make_run
from PIL import Image

from dividemix import recipes
from dividemix.report import figures, page
from dividemix.report import issues as label_issues
from dividemix.run.folder import read_run

RIGHT_TO_LEFT = "\u202e\U0001f431 \U0001f469\u200d\U0001f4bb \ud800"  # turned round, emoji, no Unicode


@pytest.fixture(autouse=True)
def unrendered(monkeypatch):
    monkeypatch.setattr(figures, "png", lambda draw: b"\x89PNG")


def page_of(folder) -> str:
    run = read_run(folder)
    issues = label_issues.find(run)
    return page.run_page(run, issues, figures.draw_all(run, issues, folder / "figures")).decode()


def test_the_page_of_a_whole_run(tmp_path):
    """Else a number on it is another one's, or the page needs what is not in it."""
    read = assert_self_contained(page_of(make_run(tmp_path / "run")))
    for words in (
        "52.00 best test accuracy",
        "51.00 mean of the last 10",
        "both networks 52.00 51.00 52.00 net 1 51.00 50.00 51.00 net 2 50.00 49.00 50.00",
        "0.875/0.875 AUC, net 1/2",
        "3 of 12 labels look wrong",
        "100.0% precision of that list 75.0% recall of that list",
        "scores are in-sample: the networks were trained on these labels",
        "labels 3 4 of them wrong 3 4 precision 100.0% 100.0% recall 75.0% 100.0%",
        "Wrong labels: 33.3% as given, 16.7% after the suggestions",
        "dog 3 8 37.5%",
        "python Train_cifar.py --r 0.5",
        "p_threshold 0.5",
    ):
        assert words in read.text, words


def test_the_slider_has_every_divided_epoch_and_the_last_one_is_shown_without_it(tmp_path):
    """Else an epoch cannot be looked at, or a browser without scripts shows none, or all at once."""
    read = Reader(page_of(make_run(tmp_path / "run", epochs=5, warm_up=2)))
    frames = [each for each in read.all("div") if "frame" in each.get("class", "").split()]
    assert [frame["data-epoch"] for frame in frames] == ["2", "3", "4"]
    assert ["hidden" in frame for frame in frames] == [True, True, False]
    assert [each["aria-label"] for each in read.all("svg")] == [
        f"net {k}, epoch {e}" for e in (2, 3, 4) for k in (1, 2)
    ]
    [slider] = [each for each in read.all("div") if each.get("class") == "slider"]
    assert "hidden" in slider  # the script shows it


def test_thumbnails_stand_with_their_labels(tmp_path):
    """Else an image has another one's label beside it. In the order of the file, the worst first."""
    read = Reader(page_of(make_run(tmp_path / "run")))
    shown = [each["alt"] for each in read.all("img") if each["alt"].startswith("sample")]
    assert shown == [
        "sample 0: given dog, suggested cat",
        "sample 3: given dog, suggested cat",
        "sample 6: given dog, suggested bird",
        "sample 1: given dog, suggested dog",
    ]
    assert "given dog suggested cat clean 0.095 truly cat" in read.text
    assert "given dog suggested dog clean 0.095 is right: dog" in read.text
    unknown = Reader(page_of(make_run(tmp_path / "b", truth=False))).text
    assert "given dog suggested cat clean 0.095 given" in unknown and "truly" not in unknown.split("doubtful")[1]


def test_hostile_names_are_shown_and_do_nothing(tmp_path):
    """A class, file, flag, machine or folder called like a script would run in the browser of whoever looks at it."""
    folder = make_run(
        tmp_path / "<img src=x onerror=alert(1)>",
        **{"classes": [HOSTILE, f"{RIGHT_TO_LEFT}{HOSTILE}2", "{{ 7 * 7 }}' onmouseover='alert(1)"]},
        **{"command": f"Train_cifar.py{HOSTILE}", "ablation": HOSTILE},
        **{"paths": [f"{HOSTILE}{i}.jpg".encode() for i in range(N)], "note": HOSTILE, HOSTILE: 1},
    )
    about = json.loads((folder / "args.json").read_text())
    about["data"] |= {"lines": [HOSTILE, RIGHT_TO_LEFT], "train": HOSTILE}
    (folder / "args.json").write_text(json.dumps(about | {"machine": HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(each | {"test_acc_net1": HOSTILE}) + "\n" for each in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "result.json").write_text(json.dumps({f"paper_{HOSTILE}": HOSTILE, "paper_best": 3}))
    read = assert_self_contained(page_of(folder))
    assert read.text.count(HOSTILE) >= 10 and f"{HOSTILE}0.jpg" in read.all("figure")[-4]["title"]
    assert "<img src=x onerror=alert(1)>" in read.text
    odd = RIGHT_TO_LEFT.replace("\ud800", "\\ud800")
    assert f"given {odd}{HOSTILE}2 suggested {{{{ 7 * 7 }}}}' onmouseover='alert(1)" in read.text


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        ({"scored": False}, "The run has no scores of its labels"),
        ({"thumbnails": False}, "The run folder has no images of them"),
        ({"histograms": False}, "No division is in the run folder"),
        ({"epochs": 1}, "The run has divided nothing yet"),
        ({"method": "ce"}, "Plain cross-entropy divides nothing"),
        ({"truth": False}, "The true labels are not known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_run_lacks_is_left_out_with_a_sentence(tmp_path, lacking, sentence):
    """Else the report of an older or unfinished run fails, or leaves its reader to guess why a part is missing."""
    read = assert_self_contained(page_of(make_run(tmp_path / "run", **lacking)))
    assert sentence in read.text
    assert sentence not in Reader(page_of(make_run(tmp_path / "whole"))).text


def test_a_cross_entropy_run_says_what_its_quality_is(tmp_path):
    """Else a softmax probability is read as a clean probability."""
    text = Reader(page_of(make_run(tmp_path / "run", method="ce"))).text
    assert "cross-entropy has no clean probability" in text and "quality 0.125" in text and "clean 0." not in text


def test_the_papers_numbers_are_those_of_the_setting(tmp_path):
    """Else a run stands beside another row's number."""
    flags = {"dataset": "cifar10", "noise_mode": "sym", "r": 0.5}
    text = Reader(page_of(make_run(tmp_path / "a", **flags))).text
    assert "best, % 52.00 94.6 mean of the last 10, % 51.00 94.4" in text
    assert "best, % 52.00 79.4" in Reader(page_of(make_run(tmp_path / "b", method="ce", **flags))).text
    for name, other in (("c", {"r": 0.45}), ("d", {"noise_definition": "exclude_self"}), ("e", {"dataset": "digits"})):
        assert "The paper has no result" in Reader(page_of(make_run(tmp_path / name, **flags | other))).text
    finished = make_run(tmp_path / "f", command="Train_webvision.py")
    (finished / "result.json").write_text(json.dumps({"test_acc": 74.5}))
    text = Reader(page_of(finished)).text
    assert "test accuracy, % 74.50 77.32" in text and "ILSVRC12, % - 75.2" in text and "3 epochs, finished" in text


def test_the_differences_from_the_papers_setting_are_those_of_the_console(tmp_path, monkeypatch, capsys):
    """Else a run of another setting stands beside the paper's number without a word: these flags once were named on the
    console and not on the page."""
    import Train_cifar
    import Train_clothing1M
    import Train_webvision
    from dividemix.run import options

    args = Train_cifar.parse_args(["--r", "0.2", "--lambda_u", "25", "--warm_up", "3", "--T", "0.9"])
    console = options.resolve_recipe(args)
    differences = "--T 0.9 (paper: 0.5), --lambda_u 25 (paper: 0), --warm_up 3 (paper: 10)"
    folder = make_run(tmp_path / "a", **vars(args))
    text = Reader(page_of(folder)).text
    assert differences in console[-1] and f"differs from the paper's setting: {differences}" in text
    args = Train_cifar.parse_args(["--r", "0.2"])
    options.resolve_recipe(args)
    assert "differs from" not in Reader(page_of(make_run(tmp_path / "b", **vars(args)))).text
    for script, paper in ((Train_clothing1M, recipes.CLOTHING1M), (Train_webvision, recipes.WEBVISION)):
        args = script.parse_args(["--lr", "0.5", "--num_epochs", str(paper.setting["num_epochs"])])
        options.resolve_images(args, paper)
        folder = make_run(tmp_path / paper.name, command=f"{script.__name__}.py", **vars(args))
        assert f"--lr 0.5 (paper: {paper.setting['lr']})" in Reader(page_of(folder)).text


def test_an_accuracy_is_called_what_it_is(tmp_path):
    """Else the accuracy that chose the epoch is read as a test's, or one against doubtful labels as one of truth."""
    folder = make_run(tmp_path / "run", command="Train_folder.py")
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines.replace('"test_acc', '"val_acc').replace('"best_acc', '"best_val_acc'))
    text = Reader(page_of(folder)).text
    assert "52.00 peak validation accuracy" in text and "validation accuracy, % peak" in text
    assert "against the validation images' own labels" in text and "test accuracy" not in text
    held_out = make_run(tmp_path / "held out")
    lines = (held_out / "metrics.jsonl").read_text()
    (held_out / "metrics.jsonl").write_text(lines.replace('{"epoch"', '{"val_acc": 30.0, "epoch"'))
    text = Reader(page_of(held_out)).text
    assert "52.00 test accuracy, %, of the epoch that validation chose" in text and "best test" not in text


def test_what_the_blind_recipe_chose_is_said(tmp_path):
    """Its flags are empty: else nobody sees from the report what the run trained with."""
    folder = make_run(tmp_path / "run", recipe="blind")
    found = {"noise_rate_estimate": 0.444, "concentration": 0.125, "lambda_u": 25, "p_threshold": 0.5, "loss_window": 1}
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines.replace("}", f", {json.dumps(found)[1:-1]}}}"))
    text = Reader(page_of(folder)).text
    assert "in the last epoch: lambda_u 25, p_threshold 0.5, loss_window 1." in text
    assert "44.4% of the labels are wrong, with a concentration of 0.12" in text
    assert "--recipe blind" not in Reader(page_of(make_run(tmp_path / "other"))).text


def test_the_page_runs_its_own_script_alone(tmp_path):
    """Else a name that slipped through runs, or the slider does not, since the page itself forbids it."""
    whole = page_of(make_run(tmp_path / "run"))
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', whole)
    [script] = re.findall(r"<script>(.*?)</script>", whole, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy and "img-src data:;" in policy


def test_pictures_are_the_pixels():
    """Else the thumbnail beside a label is another image, or a colour is exchanged."""
    rng = np.random.default_rng(0)
    for shape, kind, tolerance in (((8, 6, 3), "png", 0), ((96, 64, 3), "jpeg", 40)):
        pixels = np.kron(rng.integers(0, 256, (shape[0] // 2, shape[1] // 2, 3)), np.ones((2, 2, 1))).astype(np.uint8)
        head, content = page.picture(pixels).split(",")
        assert head == f"data:image/{kind};base64"
        read = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)
        assert read.shape == shape and np.abs(read - pixels).mean() <= tolerance
