"""`python -m dividemix predict`: its rows are what the run's networks say of each file, whatever the files are."""

import csv
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import grey_digits
from helpers.nets import reference_logits
from helpers.pages import refused, rows_of
from helpers.scripts import end_of
from helpers.trained import COLOUR, GREY, KINDS, NAMES, QUICK, draw_photos, make_trained, nets_of, train
from PIL import ExifTags, Image, ImageOps

from dividemix.data.lists import read_table
from dividemix.deploy import predict
from dividemix.report import report
from dividemix.run.description import read_description

RANKED = [f"{name}_{k}" for k in (2, 3, 4, 5) for name in ("label", "class", "probability")]


@pytest.fixture
def run(tmp_path) -> Path:
    return make_trained(tmp_path / "run")


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """The command in-process, as a user would start it in tmp_path. -> (exit status, stdout, stderr)"""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            status = end_of(predict, [*map(str, arguments), "--device", "cpu"], monkeypatch)
        out, error = capsys.readouterr()
        return status, out, "".join(f"warning: {warning.message}\n" for warning in caught) + error

    return command


# ---- Every kind of run ----


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICK)]
)
def test_predictions_on_the_test_images_have_the_runs_accuracy(kind, start, tmp_path, monkeypatch):
    """Else what a user gets is not the classifier whose accuracy was reported: other weights, images or classes."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    run = train(kind, tmp_path)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f'"{path}"\n' for path in run.images))
    for weights, accuracy in (("best", run.best), ("last", run.last)):
        status, out, error = start(run.folder, "list.csv", "--weights", weights)
        assert (status, error) == (0, ""), error
        rows = rows_of(tmp_path / "predictions.csv")
        assert [row["path"] for row in rows] == [str(path) for path in run.images]
        right = [int(row["label"]) == label for row, label in zip(rows, run.labels, strict=True)]
        assert len({row["label"] for row in rows}) > 1  # else a constant answer would pass
        if accuracy is not None:
            assert 100 * sum(right) / len(right) == pytest.approx(accuracy, abs=1e-9)
        names = json.loads((run.folder / "args.json").read_text())["data"]["classes"]
        assert all(row["class"] == names[int(row["label"])] for row in rows)
    assert f"{len(rows)} images" in out


# ---- What a row says ----


def test_a_row_is_what_torchvision_and_both_networks_give(run, start, tmp_path):
    """By other means, from the files: a wrong mean, crop, weight or class name, or one network alone, would go out as
    the run's answer."""
    paths = draw_photos(tmp_path / "photos", 9)
    assert start(run, "photos")[0] == 0
    rows = rows_of(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["path", "label", "class", "confidence", *RANKED]
    assert [row["path"] for row in rows] == [f"photos/{path.name}" for path in paths]
    logits = [
        reference_logits(net, paths, COLOUR.resize, COLOUR.image_size, COLOUR.mean, COLOUR.std) for net in nets_of(run)
    ]
    expected = ((logits[0] + logits[1]) / 2).double().softmax(dim=1)
    assert len(set(expected.argmax(dim=1).tolist())) > 1  # else a constant would pass
    for row, p in zip(rows, expected, strict=True):
        order = p.argsort(descending=True)[:5].tolist()
        assert [int(row[name]) for name in ("label", "label_2", "label_3", "label_4", "label_5")] == order
        names = [row[name] for name in ("class", "class_2", "class_3", "class_4", "class_5")]
        assert names == [NAMES[label] for label in order]
        found = [float(row[name]) for name in ("confidence", *RANKED[2::3])]
        np.testing.assert_allclose(found, p[order], rtol=1e-4)


@pytest.mark.parametrize(("num_class", "columns"), [(2, RANKED[:3]), (3, RANKED[:6]), (7, RANKED)])
def test_there_are_no_more_columns_than_classes(start, tmp_path, num_class, columns):
    """Else two classes end in a traceback, or in columns that are always empty."""
    run = make_trained(tmp_path / "run", classes=None, num_class=num_class)
    draw_photos(tmp_path / "photos", 2)
    assert start(run, "photos")[0] == 0
    for row in rows_of(tmp_path / "predictions.csv"):
        assert list(row) == ["path", "label", "class", "confidence", *columns]
        assert row["class"] == row["label"]  # classes without names
        p = [float(row[name]) for name in ("confidence", *columns[2::3])]
        assert p == sorted(p, reverse=True)
        assert num_class > 5 or sum(p) == pytest.approx(1, abs=1e-5)


def test_a_tie_goes_as_in_the_test(start, tmp_path):
    """Else equal logits, as of networks that learnt nothing, give another class than the ensemble's argmax."""
    run = make_trained(tmp_path / "run")
    state = torch.load(run / "best.pt", weights_only=True)
    for net in state["nets"]:
        net["linear.weight"].zero_(), net["linear.bias"].zero_()
    torch.save(state, run / "best.pt")
    draw_photos(tmp_path / "photos", 2)
    assert start(run, "photos")[0] == 0
    row = rows_of(tmp_path / "predictions.csv")[0]
    assert [row[name] for name in ("label", "label_2", "label_5", "confidence")] == ["0", "1", "4", "0.166667"]


def test_batches_and_threads_change_nothing(run, start, tmp_path):
    """Else the answer to an image depends on its neighbours, or comes to stand beside another's name."""
    draw_photos(tmp_path / "photos", 9)
    (tmp_path / "photos" / "photo_04.png").write_bytes(b"no image")
    tables = []
    for size, workers in ((1, 1), (2, 3), (9, 0), (100, 8)):
        assert start(run, "photos", "--batch_size", size, "--workers", workers, "--out", "a.csv")[0] == 0
        tables.append(rows_of(tmp_path / "a.csv"))
    for table in tables[1:]:
        assert [row["label"] for row in table] == [row["label"] for row in tables[0]]
        p = [[float(row["confidence"] or "nan") for row in rows] for rows in (table, tables[0])]
        np.testing.assert_allclose(*p, rtol=1e-4)
    assert [row["path"] for row in tables[0] if not row["label"]] == ["photos/photo_04.png"]


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


def test_damaged_weights_say_nothing(run, start, tmp_path):
    """Else a run that diverged classifies everything as class 0, with confidence nan."""
    state = torch.load(run / "best.pt", weights_only=True)
    state["nets"][1]["linear.bias"][3] = float("nan")
    torch.save(state, run / "best.pt")
    draw_photos(tmp_path / "photos", 2)
    refused(start(run, "photos"), "not finite")
    assert not (tmp_path / "predictions.csv").exists()


# ---- Files of all kinds ----


def test_hostile_names_are_read_back_from_the_csv(start, tmp_path):
    """Else one file name with a comma or a line end shifts columns, or makes rows of its own choosing."""
    run = make_trained(tmp_path / "run", classes=["a,b", 'c"d', "e\nf", "=1+1", " ", "<b>&amp;\r\n"])
    names = [
        "a,b.png",
        'a"b".png',
        "a\nb,0,cat,1.png",
        "a\rb.png",
        "=cmd().png",
        " a .png",
        "\u202egnp.png",
        "ä.png",
        "'.png",
    ]
    [source] = draw_photos(tmp_path / "one", 1)
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).write_bytes(source.read_bytes())
    status, _, error = start(run, "photos")
    assert (status, error) == (0, "")
    rows = rows_of(tmp_path / "predictions.csv")
    assert {row["path"] for row in rows} == {f"photos/{name}" for name in names}
    assert len(rows) == len(names)
    known = read_description(run).classes
    assert all(row["class"] == known[int(row["label"])] for row in rows)
    assert all(row.keys() == rows[0].keys() and None not in row.values() for row in rows)


@pytest.mark.parametrize("preparation", [COLOUR, GREY], ids=["colour", "grey"])
def test_any_mode_of_image_is_read(start, tmp_path, preparation):
    """Else a folder with one transparent or 16-bit image among thousands ends the command."""
    run = make_trained(tmp_path / "run", preparation)
    folder = tmp_path / "photos"
    [path] = draw_photos(folder, 1, sides=(20, 21))
    with Image.open(path) as image:
        for mode in ("L", "LA", "RGBA", "P", "1"):
            image.convert(mode).save(folder / f"{mode}.png")
        image.convert("CMYK").save(folder / "CMYK.jpg")
        Image.fromarray(np.arange(0, 40000, 100, dtype=np.uint16).reshape(20, 20)).save(folder / "deep.png")
        image.convert("L").convert("RGB").save(folder / "same as L.png")
        image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    status, _, error = start(run, "photos")
    assert (status, error) == (0, "")
    rows = {Path(row["path"]).stem: row for row in rows_of(tmp_path / "predictions.csv")}
    assert len(rows) == 10 and all(row["label"] for row in rows.values())
    grey, colour = rows["L"], rows["photo_00"]
    assert grey["confidence"] == rows["same as L"]["confidence"]  # a grey file and its three equal channels
    assert (grey["confidence"] == colour["confidence"]) == (preparation is GREY)


@pytest.mark.parametrize("preparation", [COLOUR, GREY], ids=["colour", "grey"])
def test_images_are_predicted_as_a_viewer_shows_them(start, tmp_path, preparation):
    """A photo from a phone would be classified lying on its side, a drawing on a transparent ground as a black image:
    other answers than for the same picture stored otherwise."""
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
    status, out, error = start(run, "photos")
    assert (status, error) == (0, "")
    rows = {Path(row.pop("path")).stem: row for row in rows_of(tmp_path / "predictions.csv")}
    assert rows["turned"] == rows["photo_00"] and rows["drawing"] == rows["on white"] != rows["turned"]
    assert out.count("images read: 4, of which 1 turned") == 1 and "1 with transparency" in out


BAD = {
    "cut.png": "truncated",
    "empty.png": "empty",
    "text.png": "not an image",
    "huge.png": "pixels",
    "long.png": "one side over 200 times the other",
    "folder.png": None,  # a folder is no image, and is gone through
    "out.png": "leads out of the data folder",
    "gone.png": "missing",
}


@pytest.fixture
def damaged(tmp_path, monkeypatch) -> Path:
    """Two sound images, and one of each kind that is not."""
    folder, outside = tmp_path / "photos", tmp_path / "outside.png"
    big, *_ = draw_photos(folder, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40)
    big.rename(outside)
    Image.effect_noise((40, 40), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-300])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("<html>")
    Image.new("RGB", (50, 50)).save(folder / "huge.png")
    Image.new("RGB", (201, 1)).save(folder / "long.png")
    (folder / "folder.png").mkdir()
    (folder / "out.png").symlink_to("../outside.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    return folder


def test_images_that_cannot_be_read_are_left_empty_and_named(run, start, damaged, tmp_path):
    """Else a folder of a million photos, of which one is cut off, gives nothing; or a bomb fills the memory; or the
    damaged ones are classified."""
    status, out, error = start(run, "photos", "--workers", "2")
    assert status == 0 and "9 images, of which 7 cannot be read and are left empty" in out
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "predictions.csv")}
    for name, what in BAD.items():
        said = [line for line in error.splitlines() if f"photos/{name}: " in line]
        if what is None:
            assert not said and name not in rows
            continue
        assert len(said) == 1 and said[0].startswith("warning: ") and what in said[0]
        assert not any(value for column, value in rows[name].items() if column != "path")
    assert error.count("\n") == 7
    assert all(rows[f"photo_0{k}.png"]["confidence"] for k in (1, 2))


def test_strict_takes_no_bad_image(run, start, damaged, tmp_path):
    """Else a pipeline that asked to stop goes on with holes."""
    (tmp_path / "predictions.csv").write_text("before")
    refused(start(run, "photos", "--strict"), "photos/cut.png: ", "truncated", "nothing is written")
    assert (tmp_path / "predictions.csv").read_text() == "before"


def test_warnings_end_at_ten(run, start, tmp_path):
    """Else a folder of damaged files scrolls everything else away."""
    folder = tmp_path / "photos"
    draw_photos(folder, 1)
    for i in range(14):
        (folder / f"bad{i:02}\n.png").touch()
    status, out, error = start(run, "photos")
    assert status == 0 and "of which 14 cannot be read" in out
    assert error.count("\n") == 11 and "4 more images cannot be read" in error and r"bad00\n.png': empty" in error


def test_nothing_readable_is_an_error(run, start, tmp_path):
    """Else a table of nothing passes for a result."""
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.jpg").touch()
    status, _, error = start(run, "photos")
    assert status == 1 and "error: photos: not one of 2 images can be read; nothing is written" in error
    assert not (tmp_path / "predictions.csv").exists()


# ---- Which images ----


def test_a_folder_is_gone_through_and_hidden_files_are_left_out(run, start, tmp_path):
    """Else a link to a folder above never ends, or thumbnails of the system's are classified."""
    folder = tmp_path / "photos"
    [path] = draw_photos(folder, 1)
    for name in ("b/c/Z.JPEG", "b/a.tiff", ".hidden.png", ".git/a.png", "b/._a.png", "notes.txt", "b/a.png.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    (folder / "b" / "up").symlink_to("..")
    (folder / "again").symlink_to("b/c")
    assert start(run, "photos")[0] == 0
    found = [row["path"].removeprefix("photos/") for row in rows_of(tmp_path / "predictions.csv")]
    assert found == ["again/Z.JPEG", "b/a.tiff", "photo_00.png"]  # each folder once


def test_one_file(run, start, tmp_path):
    """Whatever it is called: whoever names one file means it."""
    [path] = draw_photos(tmp_path, 1)
    path.rename(tmp_path / "upload.tmp")
    assert start(run, "upload.tmp", "--out", "one.csv")[0] == 0
    assert [row["path"] for row in rows_of(tmp_path / "one.csv")] == ["upload.tmp"]


def test_a_list_of_files(run, start, tmp_path):
    """Else its rows cannot be joined with the list again, or its paths are looked for in another folder."""
    _, second = draw_photos(tmp_path / "data" / "photos", 2)
    names = ["photos/photo_00.png", str(second), "photos/../photos/photo_00.png", "", "photos/a\0b.png"]
    with open(tmp_path / "data" / "list.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["label", "path"], *(["cat, big", name] for name in names), ["short"]])
    status, _, error = start(run, "data/list.csv")
    assert status == 0 and error.count("\n") == 3
    rows = rows_of(tmp_path / "predictions.csv")
    assert [row["path"] for row in rows] == [*names, ""]
    assert [bool(row["label"]) for row in rows] == [True, True, True, False, False, False]
    assert rows[0]["confidence"] == rows[2]["confidence"]


def test_the_table_of_a_training_is_a_list(run, start, tmp_path):
    """Else a table that Train_folder.py takes has to be written anew to be classified."""
    draw_photos(tmp_path, 2)
    (tmp_path / "labels.csv").write_text("Label, Path,path\ncat, photo_00.png,x\ndog,photo_01.png ,x\n")
    assert [os.path.basename(path) for path in read_table(tmp_path / "labels.csv").paths] == [
        *(b"photo_00.png", b"photo_01.png")
    ]
    assert start(run, "labels.csv")[0] == 0
    assert all(row["label"] for row in rows_of(tmp_path / "predictions.csv"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"file,label\na.png,1\n", "a column `path`"),
        (b"", "not a CSV"),
        (b"path\n", "a line for each image"),
        (b"path\n\xff.png\n", "not a CSV in UTF-8"),
        (b'path\n"a.png\n', "not a CSV"),
    ],
)
def test_a_list_that_is_none_is_refused(run, start, tmp_path, content, what):
    """Else a wrong file as list ends in a traceback, or in an empty table."""
    (tmp_path / "list.csv").write_bytes(content)
    refused(start(run, "list.csv"), "list.csv", what)


def test_what_cannot_be_is_refused_at_the_start(run, start, tmp_path):
    """Else the mistake is noticed after an hour of reading, or a list is overwritten by the answer."""
    draw_photos(tmp_path / "photos", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("path\nphotos/photo_00.png\n")
    refused(start(run, "empty"), "no image below empty", ".jpg")
    refused(start(run, "nowhere"), "nowhere does not exist")
    refused(start("nowhere", "photos"), "nowhere is not a run folder")
    refused(start(run, "photos", "--out", "photos/photo_00.png"), "photos/photo_00.png", ".csv")
    refused(start(run, "photos", "--out", "nowhere/a.csv"), "nowhere/a.csv", "folder")
    os.mkfifo(tmp_path / "pipe.csv")
    refused(start(run, "pipe.csv"), "pipe.csv: not a file")
    status, _, error = start(run, "photos", "--workers", "9999")
    assert status == 2 and "expected a whole number from 0 to 256" in error
    (tmp_path / "pipe.csv").unlink()
    refused(start(run, "list.csv", "--out", "list.csv"), "is the list")
    (run / "best.pt").unlink()
    refused(start(run, "photos"), "best.pt is missing", "--weights last")
    assert start(run, "photos", "--weights", "last")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("empty", "list.csv", "photos", "predictions.csv", "run")
    ]


def test_weights_last_is_the_last_checkpoint(run, start, tmp_path):
    """Else --weights has no effect, and the last epoch's networks pass for the best."""
    draw_photos(tmp_path / "photos", 3)
    assert "weights of the best epoch 1;" in start(run, "photos", "--out", "best.csv")[1]
    assert "weights of the last epoch 2;" in start(run, "photos", "--out", "last.csv", "--weights", "last")[1]
    best, last = (rows_of(tmp_path / f"{name}.csv") for name in ("best", "last"))
    assert [row["confidence"] for row in best] != [row["confidence"] for row in last]


def test_the_table_is_there_whole_or_not_at_all(run, start, tmp_path, monkeypatch):
    """Else a full disk leaves half a table that looks like a whole one."""
    draw_photos(tmp_path / "photos", 1)
    (tmp_path / "predictions.csv").write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device", "predictions.csv")

    monkeypatch.setattr(os, "fsync", full)
    refused(start(run, "photos"), "No space left on device")
    assert (tmp_path / "predictions.csv").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "photos", "predictions.csv"}


def test_grey_digits_of_any_size_are_read(start, tmp_path):
    """Else a network of grey 14x14 images takes files of that size alone."""
    run = make_trained(tmp_path / "run", GREY)
    (tmp_path / "photos").mkdir()
    for i, digit in enumerate(grey_digits(2)[0]):
        Image.fromarray(digit).resize((14 + 9 * i, 14 + 30 * i)).save(tmp_path / "photos" / f"{i}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start(run, "photos")[0] == 0
    assert all(row["label"] for row in rows_of(tmp_path / "predictions.csv"))
