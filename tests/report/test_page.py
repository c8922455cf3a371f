"""The page of a run: what it says, what it escapes, and what it does without."""

import base64
import io
import json

import numpy as np
import pytest
from helpers.pages import HOSTILE, Reader, assert_self_contained
from helpers.run_folder import N, make_run
from PIL import Image

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


def text_of(folder) -> str:
    return Reader(page_of(folder)).text


def edit_records(folder, *replacements: tuple[str, str]):
    text = (folder / "metrics.jsonl").read_text()
    for old, new in replacements:
        text = text.replace(old, new)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_the_page_of_a_whole_run(tmp_path):
    """Else a number on it, or a label beside an image, is another one's."""
    read = assert_self_contained(page_of(make_run(tmp_path / "run", epochs=12)))
    for words in (
        *("61.00 best test accuracy", "55.50 mean of the last 10", "0.875/0.875 AUC, net 1/2"),
        "both networks 61.00 56.50 61.00 net 1 60.00 55.50 60.00 net 2 59.00 54.50 59.00",
        *("3 of 12 labels look wrong", "100.0% precision of", "75.0% recall of"),
        "scores are in-sample: the networks were trained on these labels",
        "labels 3 wrong labels among them 3 precision 100.0% recall 75.0%",
        *("Wrong labels: 33.3%", "16.7% of the corrected labels", "dog 3 8 37.5%"),
        *("python -m dividemix train cifar --r 0.5", "p_threshold 0.5"),
        "given dog suggested cat quality 0.125 true label cat",
        "sample 1 given dog suggested dog quality 0.375, not listed label is right",
        *("The surest of the list sample 6 given dog", "limit of the quality. sample 1 given"),
        "Estimated share of wrong labels: 25.0 %",
    ):
        assert words in read.text, words


def test_the_slider_has_every_divided_epoch_and_the_last_one_is_shown_without_it(tmp_path):
    """Else an epoch cannot be looked at, or a browser without scripts shows none, or all at once."""
    read = Reader(page_of(make_run(tmp_path / "run", epochs=5, warm_up=2)))
    frames = [box for box in read.all("div") if "frame" in box.get("class", "").split()]
    assert [frame["data-epoch"] for frame in frames] == ["2", "3", "4"]
    assert ["hidden" in frame for frame in frames] == [True, True, False]
    drawings = [f"net {k}, epoch {e}" for e in (2, 3, 4) for k in (1, 2)]
    assert [drawing["aria-label"] for drawing in read.all("svg")] == drawings
    [slider] = [box for box in read.all("div") if box.get("class") == "slider"]
    assert "hidden" in slider  # the script shows it


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
    edit_records(folder, ('{"epoch"', f'{{"test_acc_x": {json.dumps(HOSTILE)}, "epoch"'))
    (folder / "result.json").write_text(json.dumps({f"paper_{HOSTILE}": HOSTILE, "paper_best": 3}))
    read = assert_self_contained(page_of(folder))
    assert read.text.count(HOSTILE) >= 10 and f"{HOSTILE}6.jpg" in read.text
    assert "<img src=x onerror=alert(1)>" in read.text
    odd = RIGHT_TO_LEFT.replace("\ud800", "\\ud800")
    assert f"given {odd}{HOSTILE}2 suggested {{{{ 7 * 7 }}}}' onmouseover='alert(1)" in read.text


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ({"scored": False}, "no scores of its labels"),
        ({"thumbnails": False}, "no images of these samples"),
        ({"histograms": False}, "no loss histograms"),
        ({"epochs": 1}, "not divided yet"),
        ({"method": "ce"}, "cross-entropy does not divide"),
        ({"truth": False}, "true labels are unknown"),
    ],
    ids=["scores", "thumbnails", "histograms", "division", "dividemix", "truth"],
)
def test_what_a_run_lacks_is_left_out_with_a_sentence(tmp_path, lacking, words):
    """Else the report fails, does not say what is missing, or calls a softmax probability a clean one."""
    text = text_of(make_run(tmp_path / "run", **lacking))
    assert words in text and words not in text_of(make_run(tmp_path / "whole"))
    assert ("quality 0." in text) == (not {"scored", "thumbnails"} & lacking.keys())
    assert "truth" not in lacking or "label is right" not in text


def test_the_papers_numbers_are_those_of_the_setting(tmp_path):
    """Else a run stands beside another row's number, or one of other settings without a word."""
    flags = {"dataset": "cifar10", "noise_mode": "sym", "r": 0.5}
    assert "best 52.00 94.6 mean of the last 10 51.00 94.4" in text_of(make_run(tmp_path / "a", **flags))
    assert "best 52.00 79.4" in text_of(make_run(tmp_path / "b", method="ce", **flags))
    averaged = text_of(make_run(tmp_path / "averaged", averaged=61.5, **flags))  # best.pt has these weights
    assert "best 61.50 94.6 mean of the last 10 61.50 94.4" in averaged and "61.50 last epoch" in averaged
    for name, changed in (("c", {"r": 0.45}), ("d", {"noise_definition": "exclude_self"})):
        text = text_of(make_run(tmp_path / name, **flags | changed))
        assert "paper has no result" in text and "94.6" not in text
    text = text_of(make_run(tmp_path / "e", **flags, T=0.9))
    assert "94.6" in text and "differs from" in text and "--T 0.9 (paper: 0.5)" in text
    finished = make_run(tmp_path / "f", command="Train_webvision.py")
    (finished / "result.json").write_text(json.dumps({"test_acc": 74.5}))
    text = text_of(finished)
    assert "test accuracy 74.50 77.32" in text and "ILSVRC12 - 75.2" in text and "3 epochs, finished" in text


def test_an_accuracy_is_called_what_it_is(tmp_path):
    """Else the accuracy that chose the epoch is read as a test's, or one against doubtful labels as one of truth."""
    folder = make_run(tmp_path / "run", command="Train_folder.py")
    text = text_of(edit_records(folder, ('"test_acc', '"val_acc'), ('"best_acc', '"best_val_acc')))
    assert "52.00 best validation accuracy" in text and "no test images" in text and "test accuracy" not in text
    text = text_of(edit_records(make_run(tmp_path / "held out"), ('{"epoch"', '{"val_acc": 30.0, "epoch"')))
    assert "52.00 test accuracy (%) of the epoch with the best validation" in text and "best test" not in text


def test_the_choice_of_the_blind_recipe_is_shown(tmp_path):
    """Its flags are empty: else nobody sees from the report what the run trained with."""
    values = {"noise_rate_estimate": 0.444, "concentration": 0.125, "lambda_u": 25, "p_threshold": 0.6}
    folder = make_run(tmp_path / "run", recipe="blind")
    text = text_of(edit_records(folder, ("}", f", {json.dumps(values | {'loss_window': 5})[1:-1]}}}")))
    assert "lambda_u 25, p_threshold 0.6, loss_window 5." in text and "44.4% of the labels" in text and "0.12" in text
    assert "--recipe blind" not in text_of(make_run(tmp_path / "paper"))


def test_images_are_those_of_their_labels(tmp_path):
    """Else the thumbnail beside a label is another image."""
    images = Reader(page_of(make_run(tmp_path / "run"))).all("img")
    contents = [base64.b64decode(i["src"].split(",")[1]) for i in images if i["alt"] == ""]
    assert [np.asarray(Image.open(io.BytesIO(c)))[0, 0, 0] // 20 for c in contents] == [6, 3, 0, 1]
