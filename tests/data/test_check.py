"""check_data: what the user is told about a data folder before hours of training."""

import json
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.trees import Artist, make_clothing1M
from PIL import Image

import dataloader_clothing1M
from dividemix import DivideMixError
from dividemix.data.check import BadImage, check, describe, left_out, opened, problem, run_check, sound, usable
from dividemix.data.lists import Boundary, ImageList, list_folders
from dividemix.runtime.ranks import Ranks


def save(path: Path, kind: str = "JPEG", mode: str = "RGB", side: int = 40, **options: object) -> bytes:
    Artist(0, (side, side)).image(3).convert(mode).save(path, kind, **options)
    return path.read_bytes()


def verdict(path: Path, full: bool = False) -> str:
    return problem(str(path), Boundary(path.parent), full)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data folder with a file `photo.jpg`."""
    (tmp_path / "data").mkdir()
    save(tmp_path / "data" / "photo.jpg")
    return tmp_path / "data"


# ---- One file ----

SOUND = {
    "grey JPEG": ("JPEG", "L", {}),
    "CMYK JPEG": ("JPEG", "CMYK", {}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
    "PNG": ("PNG", "RGB", {}),
    "palette PNG": ("PNG", "P", {}),
    "GIF": ("GIF", "P", {}),
    "WebP": ("WEBP", "RGB", {}),
    "BMP": ("BMP", "RGB", {}),
}


def test_what_training_refuses_is_named_by_a_full_check(folder):
    """--skip_bad_images would leave in what ends the run, which sends the user to it."""
    (folder / "photo.jpg").unlink()
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(folder / "scan.tif")
    for as_shown in (False, True):
        assert "more than 16" in problem(str(folder / "scan.tif"), Boundary(folder), True, as_shown)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("kind", "mode", "options"), SOUND.values(), ids=SOUND)
def test_sound_images(folder, kind, mode, options, full):
    """A data set would be refused for images that can be read, whatever format the name claims."""
    save(folder / "photo.jpg", kind, mode, **options)
    assert verdict(folder / "photo.jpg", full) == ""
    with opened(str(folder / "photo.jpg"), Boundary(folder)) as (image, _):
        assert image.convert("RGB").size == (40, 40)


def test_bytes_after_the_end_are_no_damage(folder):
    """Many photos of the web have a few bytes after the end mark: a whole data set would be refused for them."""
    path = folder / "photo.jpg"
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert verdict(path) == ""


BROKEN = {
    "empty": (lambda data: b"", "empty"),
    "one byte": (lambda data: data[:1], "not an image"),
    "web page": (lambda data: b"<html><body>404 Not Found</body></html>", "not an image"),
    "half": (lambda data: data[: len(data) // 2], "truncated"),
    "end missing": (lambda data: data[:-40], "truncated"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("damage", "expected"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_found_by_a_look_at_their_ends(folder, kind, damage, expected):
    """A download that broke off would be found hours into training."""
    path = folder / "photo.jpg"
    path.write_bytes(damage(save(path, kind)))
    assert expected in verdict(path).lower() and expected in verdict(path, full=True).lower()
    with pytest.raises(BadImage) as caught, opened(str(path), Boundary(folder)) as (image, _):
        image.convert("RGB")
    assert str(caught.value) == verdict(path)  # the training run says it in the same words


def test_only_full_sees_damage_in_the_middle(folder):
    """`full` would cost a decoding of every image and find no more than the quick look."""
    path = folder / "photo.jpg"
    data = bytearray(save(path, "PNG"))
    start = data.index(b"IDAT") + 4
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    assert verdict(path) == "" and verdict(path, full=True) != ""


def test_decompression_bombs(folder):
    """A file of a few kilobytes could fill the memory of every worker."""
    side = 20_000
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    picture = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (folder / "bomb.jpg").write_bytes(b"\x89PNG\r\n\x1a\n" + picture)
    assert "pixels" in verdict(folder / "bomb.jpg")


def test_what_is_not_a_file(folder, tmp_path):
    """The check would hang on a pipe, crash on a folder, or read a file outside the data folder through a link."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    assert verdict(folder / "pipe.jpg") == verdict(folder / "folder.jpg") == "not a file"
    assert verdict(folder / "absent.jpg") == verdict(folder / "photo.jpg" / "below.jpg") == "missing"
    with pytest.raises(BadImage, match="missing"), opened(str(folder / "absent.jpg"), Boundary(folder)):
        pass
    save(tmp_path / "outside.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    assert "symbolic link" in verdict(folder / "link.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    assert verdict(folder / "loop.jpg")
    (folder / "inner.jpg").symlink_to("photo.jpg")
    assert verdict(folder / "inner.jpg") == ""


# ---- A data folder ----


def test_a_complete_folder(tmp_path):
    """A good data set would be called bad, or the user could not see how its classes are filled."""
    lists, problems = dataloader_clothing1M.find(make_clothing1M(tmp_path, 30, 14, 15))
    assert not problems and check(lists) == {"train": {}, "val": {}, "test": {}}
    assert describe("test", lists["test"], {}) == [
        "test: 15 of 15 images exist, 0 of them unreadable",
        "  images of each class: 0: 2, " + ", ".join(f"{c}: 1" for c in range(1, 14)),
    ]


@pytest.mark.parametrize("full", [False, True])
def test_everything_wrong_is_in_one_report(tmp_path, capsys, full):
    """The user would mend one thing, start again, and be told of the next; or be told that training can run."""
    root = make_clothing1M(tmp_path, 600, 14, 14, sides=(8, 8))
    (root / "clean_test_key_list.txt").unlink()
    lists, problems = dataloader_clothing1M.find(root)
    for i in range(250, 259):  # threads take the images in parts of 256
        os.remove(lists["train"].path(i))
    for i in range(590, 594):
        Path(lists["train"].path(i)).write_bytes(b"<html>")
    with pytest.raises(DivideMixError, match="training cannot run"):
        run_check((lists, problems), full, about=["classes: 0 to 13"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "classes: 0 to 13" and "clean_test_key_list.txt is missing" in lines[1]
    assert lines[2] == "train: 591 of 600 images exist, 4 of them unreadable"
    assert lines[3] == f"  {lists['train'].path(250)}: missing ({root}/noisy_train_key_list.txt, line 251)"
    assert "not an image" in lines[12] and "line 591" in lines[12] and lines[13] == "  and 3 more"
    assert "val: 14 of 14 images exist, 0 of them unreadable" in lines and "training cannot run" in lines[-1]
    bad = check(lists, full)
    assert [*bad["train"]] == [*range(250, 259), *range(590, 594)] and bad["val"] == {}
    with pytest.raises(DivideMixError):  # a list that is missing is enough
        run_check(({"val": lists["val"]}, problems), full)


def test_nothing_to_check_is_not_enough(tmp_path, capsys):
    """A wrong --data_path would pass the check."""
    with pytest.raises(DivideMixError, match="training cannot run"):
        run_check(dataloader_clothing1M.find(tmp_path), skip=True)
    assert capsys.readouterr().out.count("is missing") == 5


def test_class_folders_need_no_line_numbers(folder):
    """The report on ImageNet's class folders would crash on the first bad image."""
    (folder / "0").mkdir()
    (folder / "0" / "x.jpg").write_bytes(b"")
    images = list_folders(folder, "", ["0"])
    assert check({"imagenet": images}) == {"imagenet": {0: "empty"}}
    assert describe("imagenet", images, {0: "empty"})[1] == f"  {folder}/0/x.jpg: empty ({folder})"


def test_a_name_is_on_one_line(tmp_path):
    """A line break in a name makes lines that look like the report's own, or hides others by a terminal's codes."""
    images = ImageList(tmp_path, tmp_path, "", [b"a\n\x1b[2J.jpg"], [0], 1)
    assert images.problem(0, "empty") == f"'{tmp_path}/a\\n\\x1b[2J.jpg': empty ({tmp_path})"


def test_pillow_still_warns_after_a_check(folder):
    """The check would silence the warnings of the whole training run."""
    before = list(warnings.filters)
    check({"imagenet": list_folders(folder.parent, "", ["data"])})
    assert warnings.filters == before
    with Image.open(folder / "photo.jpg") as image:
        assert image.size == (40, 40)


# ---- --check_data ----


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Clothing1M, two images of each class to train on: one missing, one empty, and one of the test list cut short."""
    root = make_clothing1M(tmp_path / "c1m", 28, 14, 14, noise=0)
    lists = dataloader_clothing1M.find(root)[0]
    os.remove(lists["train"].path(3))
    Path(lists["train"].path(20)).write_bytes(b"")
    Path(lists["test"].path(5)).write_bytes(Path(lists["test"].path(5)).read_bytes()[:-50])
    return root


def lists_of(root: Path) -> dict[str, ImageList]:
    return dataloader_clothing1M.find(root)[0]


def test_check_data_passes_complete_data(tmp_path, capsys):
    """`--check_data` would exit with an error on a good data folder, or say nothing."""
    run_check(dataloader_clothing1M.find(make_clothing1M(tmp_path, 14, 14, 14)), full=True)
    assert capsys.readouterr().out.endswith("the data are complete (every image decoded)\n")


def test_check_data_fails_where_training_could_not_run(damaged, capsys):
    """A job that waits for `--check_data && train` would start on damaged data; the user would not know the way out."""
    with pytest.raises(DivideMixError, match=r"cannot run on these data.* --skip_bad_images"):
        run_check(dataloader_clothing1M.find(damaged))
    assert "train: 27 of 28 images exist, 1 of them unreadable" in capsys.readouterr().out
    (damaged / "clean_label_kv.txt").unlink()
    for skip in (False, True):  # leaving images out does not mend a list
        with pytest.raises(DivideMixError, match=r"mend the data folder$"):
            run_check(dataloader_clothing1M.find(damaged), skip=skip)
        assert "clean_label_kv.txt is missing" in capsys.readouterr().out


def test_check_data_with_bad_images_skipped(damaged, capsys):
    """The user would not learn how many images `--skip_bad_images` leaves, or be told that it cannot train."""
    run_check(dataloader_clothing1M.find(damaged), skip=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last == "with --skip_bad_images it can, on train: 26 of 28 images, val: 14 of 14 images, test: 13 of 14 images"
    )


def test_check_data_with_a_list_of_bad_images_alone(tmp_path):
    """A folder without images would pass once bad images are skipped."""
    root = make_clothing1M(tmp_path, 14, 14, 14)
    for i in range(14):
        os.remove(lists_of(root)["val"].path(i))
    with pytest.raises(DivideMixError, match="val: none of its 14 images can be used"):
        run_check(dataloader_clothing1M.find(root), skip=True)


def test_one_of_several_ranks_checks(damaged, capsys, monkeypatch):
    """Under torchrun eight processes would read the folder at once, and print the report eight times."""
    monkeypatch.setenv("RANK", "1")
    run_check(dataloader_clothing1M.find(damaged))
    assert capsys.readouterr().out == ""


# ---- --skip_bad_images ----


def without_bad(lists, full=False):
    """The rows of the lists' sound images, and the others."""
    bad = check(lists, full)
    return sound(lists, bad), bad


def test_usable_looks_once_and_stays_with_it(damaged, tmp_path):
    """Else each start of a run looks at a million files again, or trains on other images than the start before."""
    lists, file = lists_of(damaged), tmp_path / "skipped.json"
    index, lines = usable(lists, None, file, Ranks())
    assert [len(rows) for rows in index.values()] == [28, 14, 14] and not lines and not file.exists()
    index, lines = usable(lists, "quick", file, Ranks())
    assert [len(rows) for rows in index.values()] == [26, 14, 13] and lines[0].startswith("train: 2 of 28")
    Path(lists["train"].path(3)).write_bytes(Path(lists["train"].path(4)).read_bytes())  # mended meanwhile
    for how in ("quick", None):
        again, lines = usable(lists, how, file, Ranks())
        assert {name: rows.tolist() for name, rows in again.items()} == {n: rows.tolist() for n, rows in index.items()}
        assert str(file) in lines[-1]
    index, _ = usable(lists, "full", file, Ranks())  # asked for a closer look, it looks
    assert len(index["train"]) == 27 and json.loads(file.read_text())["how"] == "full"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"how": "quick"', '{"how": "quick"}'])
def test_a_damaged_record_is_refused(damaged, tmp_path, content):
    """Taken for empty, it would put images into the run that it was to leave out."""
    file = tmp_path / "skipped.json"
    file.write_text(content)
    with pytest.raises(DivideMixError, match=r"skipped\.json does not say .* delete it, and give --skip_bad_images"):
        usable(lists_of(damaged), "quick", file, Ranks())
    file.unlink()
    os.mkfifo(file)  # would be waited for
    with pytest.raises(DivideMixError, match="not a file"):
        usable(lists_of(damaged), "quick", file, Ranks())


def test_bad_images_are_left_out_of_each_list(damaged):
    """A million photos would be refused for one; or the labels of those left would move to their neighbours."""
    lists = lists_of(damaged)
    left, bad = without_bad(lists)
    assert [len(left[name]) for name in ("train", "val", "test")] == [26, 14, 13]
    assert left["train"].tolist() == [i for i in range(28) if i not in (3, 20)]
    assert not any(check({name: lists[name].select(rows) for name, rows in left.items()}).values())
    assert bad["train"] == {3: "missing", 20: "empty"}
    assert left_out(lists, bad) == [
        "train: 2 of 28 images left out (1 missing, 1 unreadable)",
        "val: 0 of 14 images left out",
        "test: 1 of 14 images left out (0 missing, 1 unreadable)",
    ]


def test_the_record_names_the_images(damaged, tmp_path):
    """People, and a later start, would not learn which images a run was trained without."""
    lists, file = lists_of(damaged), tmp_path / "skipped.json"
    usable(lists, "full", file, Ranks())
    names = [lists["train"].name(i) for i in (3, 20)]
    record = json.loads(file.read_text())["lists"]
    assert record["train"] == {"total": 28, "bad": dict(zip(names, ["missing", "empty"], strict=True))}
    assert record["val"] == {"total": 14, "bad": {}}


def entry(total: int = 28, bad: object = ()) -> dict[str, object]:
    return {"total": total, "bad": dict(bad)}


STRANGE_RECORDS = {
    "other total": ({"train": entry(27), "val": entry(14), "test": entry(14)}, "27 images, .* has 28"),
    "other name": ({"train": entry(bad={"0/no.jpg": "missing"}), "val": entry(14), "test": entry(14)}, "0/no.jpg"),
    "other lists": ({"train": entry(), "imagenet": entry(14)}, "val"),
    "no record": ({"train": 3}, "does not say which"),
    "no object": ([1, 2], "does not say which"),
}


@pytest.mark.parametrize(("record", "words"), STRANGE_RECORDS.values(), ids=STRANGE_RECORDS)
def test_a_record_of_other_data_is_refused(damaged, tmp_path, record, words):
    """A run that goes on with other data would leave out the wrong images, and mix up which sample is which."""
    file = tmp_path / "skipped.json"
    file.write_text(json.dumps({"how": "quick", "lists": record}))
    with pytest.raises(DivideMixError, match=words) as caught:
        usable(lists_of(damaged), None, file, Ranks())
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_that_vanishes_is_warned_of_and_an_empty_list_refused(damaged):
    """The net would never see one of the classes that it is tested on; or the run would end in a traceback."""
    lists = lists_of(damaged)
    os.remove(lists["train"].path(3 + 14))
    with pytest.warns(UserWarning, match=r"no training image is left of class 3: "):
        left, _ = without_bad(lists)
    assert len(left["train"]) == 25
    for i in range(14):
        if os.path.exists(lists["test"].path(i)):
            os.remove(lists["test"].path(i))
    words = r"test: none of its 14 images can be used \(the first is /.*: missing\)"
    with pytest.raises(DivideMixError, match=words), pytest.warns(UserWarning, match="no training image"):
        without_bad(lists)
