"""`python -m dividemix predict`: its rows are what the run's networks say of each file, whatever the files are."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nets import reference_logits
from helpers.pages import refused, rows_of
from helpers.trained import COLOUR, GREY, KINDS, NAMES, QUICK, command, draw_photos, make_trained, nets_of, train
from PIL import ExifTags, Image, ImageOps

from dividemix.deploy import predict
from dividemix.report import report

RANKED = [f"{name}_{k}" for k in (2, 3, 4, 5) for name in ("label", "class", "probability")]
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICK]


@pytest.fixture
def run(tmp_path) -> Path:
    return make_trained(tmp_path / "run")


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    return command(predict, tmp_path, monkeypatch, capsys, "--device", "cpu")


def change_best(run: Path, change) -> None:
    """Apply `change` to the state of each network of best.pt."""
    state = torch.load(run / "best.pt", weights_only=True)
    for net in state["nets"]:
        change(net)
    torch.save(state, run / "best.pt")


@pytest.mark.parametrize("kind", [*QUICK, *SLOW])
def test_predictions_on_the_test_images_have_the_runs_accuracy(kind, start, tmp_path, monkeypatch):
    """Else what a user gets is not the classifier whose accuracy was reported: other weights, images or classes."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    run = train(kind, tmp_path)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f'"{path}"\n' for path in run.images))
    for weights, accuracy in (("best", run.best), ("last", run.last)):
        status, out, error = start(run.folder, "list.csv", "--weights", weights)
        assert status == 0 and f"weights of the {weights} epoch" in out
        assert all("may mean nothing" in line for line in error.splitlines())  # of so short a run
        rows = rows_of(tmp_path / "predictions.csv")
        assert [row["path"] for row in rows] == [str(path) for path in run.images]
        right = [int(row["label"]) == label for row, label in zip(rows, run.labels, strict=True)]
        assert len({row["label"] for row in rows}) > 1  # else a constant answer would pass
        if accuracy is not None:
            assert 100 * sum(right) / len(right) == pytest.approx(accuracy, abs=1e-9)
        names = json.loads((run.folder / "args.json").read_text())["data"]["classes"]
        assert all(row["class"] == names[int(row["label"])] for row in rows)
    assert f"{len(rows)} images" in out


@pytest.mark.parametrize("flags", [(), ("--batch_size", "2", "--workers", "3")])
def test_a_row_is_what_torchvision_and_both_networks_give(run, start, tmp_path, flags):
    """A wrong mean, crop, weight, class or neighbour's answer would go out as the run's answer."""
    paths = draw_photos(tmp_path / "photos", 9)
    assert start(run, "photos", *flags)[0] == 0
    rows = rows_of(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["path", "label", "class", "confidence", *RANKED]
    assert [row["path"] for row in rows] == [f"photos/{path.name}" for path in paths]
    preparation = COLOUR.resize, COLOUR.image_size, COLOUR.mean, COLOUR.std
    logits = [reference_logits(net, paths, *preparation) for net in nets_of(run)]
    expected = ((logits[0] + logits[1]) / 2).double().softmax(dim=1)
    assert len(set(expected.argmax(dim=1).tolist())) > 1  # else a constant would pass
    for row, p in zip(rows, expected, strict=True):
        order = p.argsort(descending=True)[:5].tolist()
        assert [int(row[name]) for name in ("label", *RANKED[::3])] == order
        assert [row[name] for name in ("class", *RANKED[1::3])] == [NAMES[label] for label in order]
        probabilities = [float(row[name]) for name in ("confidence", *RANKED[2::3])]
        np.testing.assert_allclose(probabilities, p[order], rtol=1e-4)


def test_few_classes_ties_and_damaged_weights(start, tmp_path):
    """Else two classes end in a traceback, or a run that diverged classifies everything as class 0."""
    run = make_trained(tmp_path / "run", classes=None, num_class=2)
    draw_photos(tmp_path / "photos", 2)
    change_best(run, lambda net: [net[f"linear.{name}"].zero_() for name in ("weight", "bias")])
    assert start(run, "photos")[0] == 0
    row = rows_of(tmp_path / "predictions.csv")[0]
    columns = ["path", "label", "class", "confidence", "label_2", "class_2", "probability_2"]
    assert row == dict(zip(columns, ["photos/photo_00.png", "0", "0", "0.5", "1", "1", "0.5"], strict=True))
    (tmp_path / "predictions.csv").unlink()
    change_best(run, lambda net: net["linear.bias"][1:].fill_(float("nan")))
    refused(start(run, "photos"), "not finite")
    assert not (tmp_path / "predictions.csv").exists()


@pytest.mark.gpu
def test_a_card_gives_the_same_answers(run, tmp_path, monkeypatch):
    """Else the answers depend on where the command was started."""
    monkeypatch.chdir(tmp_path)
    draw_photos(tmp_path / "photos", 9)
    for device in ("cpu", "cuda"):
        predict.main([str(run), "photos", "--device", device, "--out", f"{device}.csv"])
    tables = [rows_of(tmp_path / f"{device}.csv") for device in ("cpu", "cuda")]
    labels, confidences = ([[row[name] for row in rows] for rows in tables] for name in ("label", "confidence"))
    assert labels[0] == labels[1]
    np.testing.assert_allclose(*(np.array(values, float) for values in confidences), rtol=1e-3)


@pytest.mark.parametrize("preparation", [COLOUR, GREY], ids=["colour", "grey"])
def test_images_are_predicted_as_a_viewer_shows_them(start, tmp_path, preparation):
    """A photo from a phone would be classified lying on its side, a drawing on a transparent ground as black."""
    run = make_trained(tmp_path / "run", preparation)
    [path] = draw_photos(tmp_path / "photos", 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "photos/turned.png", exif=exif)
        drawing = Image.new("RGBA", image.size)
        drawing.putalpha(image.convert("L"))
        drawing.save(tmp_path / "photos/drawing.png")
        ImageOps.invert(image.convert("L")).save(tmp_path / "photos/on white.png")
        image.convert("L").save(tmp_path / "photos/grey.png")
        image.convert("L").convert("RGB").save(tmp_path / "photos/grey in colour.png")
    status, out, error = start(run, "photos")
    assert (status, error) == (0, "") and "1 turned" in out and "1 with transparency" in out
    rows = {Path(row.pop("path")).stem: row for row in rows_of(tmp_path / "predictions.csv")}
    assert rows["turned"] == rows["photo_00"] and rows["drawing"] == rows["on white"] != rows["turned"]
    assert rows["grey"] == rows["grey in colour"]
    assert (rows["grey"] == rows["photo_00"]) == (preparation is GREY)


def test_images_that_cannot_be_read_are_left_empty_and_named(run, start, tmp_path):
    """Else one damaged photo of a million ends all, or is classified, or a table with holes passes for whole."""
    folder = tmp_path / "photos"
    draw_photos(folder, 2)[1].rename(tmp_path / "outside.png")
    (folder / "cut.png").write_bytes((folder / "photo_00.png").read_bytes()[:-60])
    (folder / "out.png").symlink_to("../outside.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "folder.png").mkdir()  # is no image, and is gone through
    for i in range(9):
        (folder / f'z",{i}\n.png').touch()
    problems = {"cut.png": "truncated", "out.png": "leads out of the data folder", "gone.png": "missing"}
    bad = problems.keys() | {f'z",{i}\n.png' for i in range(9)}
    status, out, error = start(run, "photos", "--workers", "1")  # more read in no order
    assert status == 0 and "13 images" in out and "12 of them" in out
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "predictions.csv")}
    assert rows.keys() == bad | {"photo_00.png"}
    assert {name for name, row in rows.items() if not any([*row.values()][1:])} == bad
    lines = error.splitlines()
    assert len(lines) == 11 and all(line.startswith("warning: ") for line in lines) and "2 more images" in lines[-1]
    for name, problem in problems.items():
        assert len([line for line in lines if f"photos/{name}: " in line and problem in line]) == 1
    (tmp_path / "predictions.csv").write_text("before")
    refused(start(run, "photos", "--strict"), "photos/cut.png: ", "truncated")
    (folder / "photo_00.png").unlink()
    status, _, error = start(run, "photos")
    assert status == 1 and error.splitlines()[-1].startswith("error: none of the 12 images")
    assert (tmp_path / "predictions.csv").read_text() == "before"


def test_a_list_of_files_and_one_file(run, start, tmp_path):
    """Else the rows cannot be joined with the list again, or its paths are looked for in another folder."""
    first, second = draw_photos(tmp_path / "data" / "photos", 2)
    names = ["photos/photo_00.png ", str(second), "photos/../photos/photo_00.png", "", "photos/ab.png"]
    with open(tmp_path / "data" / "list.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(
            [["label", " Path", "note"], *(["cat, big", name, "x"] for name in names), ["short"]]
        )
    first_missing = """3 of 6 paths lead to no file: line 5 '', line 6 'photos/ab.png', line 7 ''"""
    refused(start(run, "data/list.csv"), "data/list.csv: ", first_missing, "--skip_bad_images")
    status, _, error = start(run, "data/list.csv", "--skip_bad_images")
    assert status == 0 and error.count("\n") == 3 and "a row without a path: missing" in error
    rows = rows_of(tmp_path / "predictions.csv")
    assert [row["path"] for row in rows] == [*names, ""]
    assert [bool(row["label"]) for row in rows] == [True, True, True, False, False, False]
    assert rows[0]["confidence"] == rows[2]["confidence"] != rows[1]["confidence"]
    first.rename(tmp_path / "upload.tmp")
    assert start(run, "upload.tmp", "--out", "one.csv")[0] == 0
    assert [row["path"] for row in rows_of(tmp_path / "one.csv")] == ["upload.tmp"]


@pytest.mark.parametrize(
    "content",
    [
        b"a\\1.png\nb.png\n",
        "id;File name;label\n0;a\\1.png;\n1;b.png;x\n".encode("utf-16"),
        b"where\tclass\n.\\a/1.png\tNA\nb.png\t1\n",
    ],
)
def test_lists_of_other_programs(tmp_path, content):
    """The list that was trained on could not be predicted, or its first image be lost."""
    [first] = draw_photos(tmp_path / "a", 1)
    first.rename(tmp_path / "a/1.png")
    (tmp_path / "list.csv").write_bytes(content)
    names, paths, *_ = predict.find_images(tmp_path / "list.csv", "where" if b"where" in content else None, True)
    assert paths == [str(tmp_path / "a/1.png"), str(tmp_path / "b.png")] and names[0].endswith("1.png")


def test_what_cannot_be_is_refused_at_the_start(run, start, tmp_path):
    """Else the mistake is noticed after an hour of reading, or a list is overwritten by the answer."""
    draw_photos(tmp_path / "photos", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("path\nphotos/photo_00.png\n")
    refused(start(run, "empty"), "empty", ".jpg")
    refused(start(run, "nowhere"), "nowhere")
    refused(start("nowhere", "photos"), "nowhere")
    for out in ("nowhere/a.csv", "empty", "a.CSV", "photos/photo_00.png"):
        refused(start(run, "photos", "--out", out), out)
    refused(start(run, "list.csv", "--out", "list.csv"), "--out list.csv")
    status, _, error = start(run, "photos", "--workers", "9999")
    assert status == 2 and "--workers" in error
    for content in (
        b"photo,label\na.png,1\n",
        b"",
        b"path\n",
        b"path\na\0.png\n",
        b"path\n\xff.png\n",
        b'path\n"a.png\n',
    ):
        (tmp_path / "list.csv").write_bytes(content)
        refused(start(run, "list.csv"), "list.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    refused(start(run, "pipe.csv"), "pipe.csv")
    assert not (tmp_path / "predictions.csv").exists()
