"""review.html: which labels are on it, with which images, and that names do nothing. What a browser makes of it is in
test_review_in_browser.py."""

import json
import re

import numpy as np
import pytest
from helpers.pages import HOSTILE, assert_self_contained
from helpers.run_folder import N, make_run
from PIL import Image

from dividemix.report import figures, report


@pytest.fixture(autouse=True)
def unrendered(monkeypatch):
    monkeypatch.setattr(figures, "png", lambda draw: b"\x89PNG")


def data_of(page) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text()).group(1))


def test_the_labels_come_with_their_numbers_most_doubtful_first(tmp_path):
    """Else a person decides on one image by the picture or the class of another."""
    folder = make_run(tmp_path / "run")
    report.main([str(folder), "--review"])
    data = data_of(folder / "review.html")
    items = data.pop("items")
    assert [item["id"] for item in items] == ["6", "3", "0", "1"]  # the others have no image
    assert [item["suggested"] for item in items] == ["bird", "cat", "cat", "dog"]
    assert [item["listed"] for item in items] == [True, True, True, False] and data["end"] == 3
    assert items[2].items() >= {"given": "dog", "quality": "0.125", "confidence": "0.812"}.items()
    assert (data["column"], data["file"], data["classes"]) == ("index", "decisions.csv", ["cat", "dog", "bird"])
    assert "review.html" in (folder / "report.html").read_text()


def test_images_come_from_files_where_the_run_has_none_and_pages_follow_each_other(tmp_path, capsys):
    """A list of 10,000 labels, or data on another disk: else the page cannot be opened, or images are missing without a
    word."""
    paths = [f"{i}.png" for i in range(N)]
    for i in (4, 5, 7):
        Image.new("RGB", (300, 200), (10 * i, 0, 0)).save(tmp_path / paths[i])
    flags = {"paths": [*map(str.encode, paths)], "command": "Train_folder.py", "data_path": str(tmp_path)}
    folder = make_run(tmp_path / "run", truth=False, **flags)
    (folder / "review-9.html").touch()
    report.main([str(folder), "--review", "3"])
    pages = [folder / name for name in ("review.html", "review-2.html", "review-3.html")]
    assert sorted(folder.glob("review*")) == sorted(pages)
    assert [[item["id"][0] for item in data_of(page)["items"]] for page in pages] == [
        ["6", "3", "0"],
        ["1", "7", "5"],
        ["4"],
    ]
    assert [data_of(page)["end"] for page in pages] == [3, 0, -3]
    assert data_of(pages[1])["file"] == "decisions-2.csv" and data_of(pages[1])["column"] == "path"
    assert len({data_of(page)["key"] for page in pages}) == 3
    out = capsys.readouterr().out
    assert str(pages[2]) in out and f"review: {N - 7} labels are left out" in out and str(tmp_path) in out
    text = assert_self_contained(pages[0].read_text()).text
    command = f"train folder --data_path {tmp_path} --width=8 --corrections decisions.csv"
    assert f"{command} decisions-2.csv decisions-3.csv" in text
    report.main([str(folder), "--review"])
    assert command in folder.joinpath("review.html").read_text() and "leave out" not in data_of(folder / "review.html")
    relabelled = make_run(tmp_path / "relabelled", truth=False, **flags, labels="mine.csv")
    report.main([str(relabelled), "--review"])
    assert "--labels mine.csv --corrections decisions.csv" in (relabelled / "review.html").read_text()
    unscored = make_run(tmp_path / "unscored", scored=False)
    report.main([str(unscored), "--review"])
    assert not (unscored / "review.html").exists() and "no scores" in capsys.readouterr().out


def test_a_second_round_saves_other_files(tmp_path):
    """Its decisions would replace those of the first, which the next run needs too."""
    earlier = [str(tmp_path / "decisions.csv"), "decisions-3.csv"]
    flags = {"command": "Train_folder.py", "data_path": str(tmp_path), "corrections": earlier}
    folder = make_run(tmp_path / "run", truth=False, **flags)
    report.main([str(folder), "--review", "2"])
    pages = sorted(folder.glob("review*"), key=lambda page: len(page.name))
    assert [data_of(page)["file"] for page in pages] == ["decisions-2.csv", "decisions-4.csv"]
    assert f"--corrections {' '.join(earlier)} decisions-2.csv decisions-4.csv" in pages[1].read_text()


def test_data_in_memory_have_no_next_command(tmp_path):
    """It would name a folder that is gone."""
    flags = {"command": "Train_folder.py", "data_path": str(tmp_path / "gone")}
    folder = make_run(tmp_path / "run", truth=False, **flags)
    report.main([str(folder), "--review"])
    assert "--corrections" not in (folder / "review.html").read_text()


def test_equal_images_under_two_labels_name_each_other(tmp_path):
    """One of two labels is wrong for certain, and the person sees one image without the other."""
    folder = make_run(tmp_path / "run")
    scores = dict(np.load(folder / "label_scores.npz"))
    np.savez(folder / "label_scores.npz", **scores, duplicate_of=np.array([0, 1, 0, -1, 1, *[-1] * 7]))
    report.main([str(folder), "--review"])
    equal = {item["id"]: item["equal"] for item in data_of(folder / "review.html")["items"]}
    assert equal == {"0": "2", "1": "", "3": "", "6": ""}  # 1 and 4 have the same label


def test_other_labels_have_other_progress(tmp_path):
    """Else a page of corrected labels begins with the decisions on the first ones."""
    folders = [make_run(tmp_path / name / "run") for name in ("a", "b")]
    labels = dict(np.load(folders[1] / "labels.npz"))
    np.savez(folders[1] / "labels.npz", **labels | {"list_given": labels["list_given"][::-1]})
    for folder in folders:
        report.main([str(folder), "--review"])
    assert len({data_of(folder / "review.html")["key"] for folder in folders}) == 2


def test_hostile_names_stay_text(tmp_path):
    """A file or class called like the end of the script would run in the browser of whoever decides."""
    names = [HOSTILE, "</script><img src=x onerror=alert(1)>", "<!--<script>{{ 7 * 7 }}\N{CAT FACE}"]
    paths = [f"{names[i % 3]}{i}.jpg".encode() for i in range(N)]
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>", classes=names, paths=paths)
    report.main([str(folder), "--review"])
    read = assert_self_contained((folder / "review.html").read_text())
    assert "<img src=x onerror=alert(1)>" in read.text
    data = data_of(folder / "review.html")
    assert data["classes"] == names and data["items"][0]["id"] == paths[6].decode()
