"""What the user is told about a data folder before hours of training, and what is left out of it."""

import json
import os
from pathlib import Path

import pytest
from helpers.errors import assert_refused
from helpers.trees import Artist, make_clothing1M

import dataloader_clothing1M
from dividemix import DivideMixError
from dividemix.data.check import problem, run_check, sound_rows, usable
from dividemix.data.lists import Boundary
from dividemix.runtime.ranks import Ranks


def save(path: Path, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    Artist(0, (40, 40)).image(3).convert(mode).save(path, kind)
    return path.read_bytes()


def damage_middle(path: Path) -> None:
    content = bytearray(save(path, "PNG"))
    start = content.index(b"IDAT") + 4
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)


def find(root: Path):
    return dataloader_clothing1M.find(root)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "P"), ("WEBP", "L")])
def test_one_image(tmp_path, kind, mode):
    """Sound images of odd formats would be refused; or `full` would see no more than the quick look."""
    path = tmp_path / "photo.jpg"
    content = save(path, kind, mode)
    for end in (b"", b"\0" * 100):
        path.write_bytes(content + end)
        assert [problem(str(path), Boundary(tmp_path), full) for full in (False, True)] == ["", ""]
    damage_middle(path)
    quick, full = (problem(str(path), Boundary(tmp_path), full) for full in (False, True))
    assert quick == "" and full != ""


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Clothing1M, two images of each class to train on: one missing, one empty, and one of the test list cut short."""
    root = make_clothing1M(tmp_path / "c1m", 28, 14, 14, noise=0, sides=(8, 8))
    lists, _ = find(root)
    os.remove(lists["train"].path(3))
    Path(lists["train"].path(20)).write_bytes(b"")
    Path(lists["test"].path(5)).write_bytes(Path(lists["test"].path(5)).read_bytes()[:-50])
    return root


def test_complete_data_pass(tmp_path, capsys):
    """`--check_data` would exit with an error on a good data folder, or say nothing of its classes."""
    lists, problems = find(make_clothing1M(tmp_path, 14, 14, 15, sides=(8, 8)))
    run_check(lists, problems, ["classes: 0 to 13"], full=True)
    first, *_, test, counts, last = capsys.readouterr().out.splitlines()
    assert first == "classes: 0 to 13" and test.startswith("test: 15 of 15 images") and "complete" in last
    assert counts.endswith(": 0: 2, " + ", ".join(f"{c}: 1" for c in range(1, 14)))


@pytest.mark.parametrize("full", [False, True])
def test_everything_wrong_is_in_one_report(tmp_path, capsys, full):
    """The user would mend one thing, start again, and be told of the next; or be told that training can run."""
    root = make_clothing1M(tmp_path, 270, 14, 14, sides=(8, 8))
    (root / "clean_test_key_list.txt").unlink()
    lists, problems = find(root)
    train = lists["train"]
    for i in range(250, 259):  # threads take 256 images at a time
        os.remove(train.path(i))
    for i in range(264, 268):
        Path(train.path(i)).write_bytes(b"<html>")
    with pytest.raises(DivideMixError, match=r"data folder$"):  # leaving images out does not help a list
        run_check(lists, problems, full=full, skip=True)
    lines = capsys.readouterr().out.splitlines()
    assert "clean_test_key_list.txt is missing" in lines[0]
    assert lines[1].startswith("train: 261 of 270 images") and "4 of them" in lines[1]
    assert lines[2] == f"  {train.path(250)}: missing ({root}/noisy_train_key_list.txt, line 251)"
    assert "line 265" in lines[11] and "3 more" in lines[12]
    assert any(line.startswith("val: 14 of 14 images") for line in lines) and "284 images" in lines[-1]
    with pytest.raises(DivideMixError):  # a list that is missing is enough
        run_check({"val": lists["val"]}, problems, full=full)
    capsys.readouterr()
    with pytest.raises(DivideMixError) as caught:
        run_check(*find(tmp_path / "nothing"), skip=True)
    out = capsys.readouterr().out
    assert out.count("is missing") == str(caught.value).count("is missing") == 5 and "no image was read" in out


def test_bad_images_can_be_skipped_if_they_are_all_that_is_wrong(damaged, capsys, monkeypatch):
    """A job that waits for `--check_data && train` would start on damaged data, or not know the way out."""
    with pytest.raises(DivideMixError, match="--skip_bad_images"):
        run_check(*find(damaged))
    run_check(*find(damaged), skip=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("train: 26 of 28 images, val: 14 of 14 images, test: 13 of 14 images")
    for i in range(14):
        os.remove(find(damaged)[0]["val"].path(i))
    with pytest.raises(DivideMixError, match=r"val: .* 14 images .*/.*: missing"):
        run_check(*find(damaged), skip=True)
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")  # eight processes would read the folder at once, and print the report eight times
    run_check(*find(damaged))
    assert capsys.readouterr().out == ""


def test_bad_images_are_looked_for_once_and_stay_left_out(damaged, tmp_path):
    """The labels left would move to their neighbours, or the next start train on other images."""
    lists, file = find(damaged)[0], tmp_path / "skipped.json"
    index, lines = usable(lists, None, file, Ranks())
    assert [len(rows) for rows in index.values()] == [28, 14, 14] and not lines and not file.exists()
    index, (train, val, test) = usable(lists, "quick", file, Ranks())
    assert index["train"].tolist() == [i for i in range(28) if i not in (3, 20)]
    assert [len(index[name]) for name in ("val", "test")] == [14, 13]
    assert train.startswith("train: 2 of 28 images") and "1 missing, 1 unreadable" in train
    assert val.startswith("val: 0 of 14 images") and test.startswith("test: 1 of 14 images")
    bad = {lists["train"].name(3): "missing", lists["train"].name(20): "empty"}
    record = json.loads(file.read_text())
    assert record["depth"] == "quick" and record["lists"]["train"] == {"total": 28, "bad": bad}
    damage_middle(Path(lists["train"].path(3)))  # both mended meanwhile, for a quick look
    save(Path(lists["train"].path(20)))
    for depth in ("quick", None):
        again, lines = usable(lists, depth, file, Ranks())
        assert {name: rows.tolist() for name, rows in again.items()} == {n: rows.tolist() for n, rows in index.items()}
        assert str(file) in lines[-1]
    index, _ = usable(lists, "full", file, Ranks())  # asked for a closer look, it looks
    assert {*range(28)} - {*index["train"]} == {3} and json.loads(file.read_text())["depth"] == "full"
    with pytest.warns(UserWarning, match="class 3: "):  # it loses both of its images
        sound_rows({"train": lists["train"]}, {"train": {3: "missing", 17: "missing"}})


def record_of(**lists: object) -> str:
    """A record in which the lists are whole, but for these."""
    whole = {"train": {"total": 28, "bad": {}}, "val": {"total": 14, "bad": {}}, "test": {"total": 14, "bad": {}}}
    return json.dumps({"depth": "quick", "lists": {k: v for k, v in (whole | lists).items() if v is not None}})


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"depth": "quick"', ""),
        ("[]", ""),
        (record_of(train={"total": 27, "bad": {}}), "27"),
        (record_of(train={"total": 28, "bad": {"0/no.jpg": "missing"}}), "0/no.jpg"),
        (record_of(val=None), "val"),
        (record_of(train=3), ""),
        (None, "not a file"),  # a pipe, which would be waited for
    ],
    ids=["cut", "a list", "another total", "another name", "other lists", "no entry", "a pipe"],
)
def test_a_record_that_is_damaged_or_of_other_data_is_refused(damaged, tmp_path, content, word):
    """The run would leave out the wrong images, and mix up which sample is which."""
    file = tmp_path / "skipped.json"
    os.mkfifo(file) if content is None else file.write_text(content)
    for depth in ("quick", None):
        assert_refused(lambda depth=depth: usable(find(damaged)[0], depth, file, Ranks()), file, word)
