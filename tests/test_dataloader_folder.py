"""dataloader_folder: which images, labels and splits the run gets from class folders and CSV tables, and what is
refused. How the text of a table is read is in data/test_tables.py."""

from pathlib import Path

import numpy as np
import pytest
from helpers.errors import assert_refused
from PIL import Image

from dataloader_folder import balance, class_order, find, load, mean_std, survey
from dividemix import DivideMixError, DivideMixWarning


def put(root: Path, *names: str) -> Path:
    """Files with these names; the images among them are never opened here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def table(path: Path, *rows: str, head: str = "path,label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in (head, *rows)))
    return path


def read(images) -> dict[str, int]:
    """Path below the data folder -> label."""
    return {name.decode(): label for name, label in zip(images.names(), images.labels.tolist(), strict=True)}


def refused(data_path: Path, *expected: str, labels: Path | None = None) -> str:
    return assert_refused(lambda: load(data_path, labels), *expected)


def test_class_folders(tmp_path):
    """Images would get another class, those in deeper folders be lost, or hidden files be trained on."""
    names = ["b/2.JPG", "b/1.png", "b/deep/er/0.jpg", "a/x.webp", "a/.hidden.jpg", "a/.git/y.jpg", ".cache/z.jpg"]
    data = load(put(tmp_path, *names, "a/notes.txt", "loose.jpg"))
    expected = {"a/x.webp": 0, "b/1.png": 1, "b/2.JPG": 1, "b/deep/er/0.jpg": 1}
    assert read(data.train) == expected and [*read(data.train)] == [*expected]  # the order too: the rows of a run
    assert data.class_names == ["a", "b"] and data.num_class == 2 and [*data.lists] == ["train"]
    assert data.lines[0] == f"train: 4 images, {tmp_path}" and data.lines[1].startswith("2 files ignored")
    assert data.train.path(3) == str(tmp_path / "b/deep/er/0.jpg") and data.train.where(3) == str(tmp_path)
    lists, problems, lines = find(tmp_path)  # as --check_data reads it, which must not end before its report
    assert [*lists] == ["train"] and problems == [] and lines == [*data.lines, "classes: 0 a, 1 b"]
    assert find(tmp_path / "a") == ({}, [refused(tmp_path / "a")], [])


def test_folders_that_are_no_classes(tmp_path):
    """The thumbnails of a file server would be a class, or one empty folder stop the run."""
    names = ["__MACOSX/b/1.jpg", "@eaDir/1.jpg", ".ipynb_checkpoints/1.jpg", "lost+found/1.jpg", "$RECYCLE.BIN/1.jpg"]
    root = put(tmp_path, "a/1.jpg", "b/1.jpg", "b/@eaDir/1.jpg", "empty/1.txt", "System Volume Information/1", *names)
    with pytest.warns(DivideMixWarning, match=f"{root}: .* empty$"):
        data = load(root)
    assert read(data.train) == {"a/1.jpg": 0, "b/1.jpg": 1} and data.class_names == ["a", "b"]
    assert data.lines[1].startswith("1 files ignored")


def test_splits_in_folders(tmp_path):
    """A test image would be trained on, or counted for another class; a class without a test image stop the run."""
    names = ["train/cat/1.jpg", "train/dog/1.jpg", "train/emu/1.jpg", "val/emu/2.jpg", "test/dog/d/3.jpg"]
    (put(tmp_path, *names) / "test/cat").mkdir()
    data = load(tmp_path)
    assert read(data.train) == {"train/cat/1.jpg": 0, "train/dog/1.jpg": 1, "train/emu/1.jpg": 2}
    assert read(data.lists["val"]) == {"val/emu/2.jpg": 2} and read(data.lists["test"]) == {"test/dog/d/3.jpg": 1}
    assert data.lists["test"].path(0) == str(tmp_path / "test/dog/d/3.jpg")
    assert [*data.lists] == ["train", "val", "test"] and all(images.num_class == 3 for images in data.lists.values())
    only_train = load(tmp_path / "train")
    assert read(only_train.train) == {"cat/1.jpg": 0, "dog/1.jpg": 1, "emu/1.jpg": 2}
    assert [*only_train.lists] == ["train"]


def test_a_class_named_like_a_split(tmp_path):
    """Vehicles or exams: their images would be taken for a training set of no classes."""
    data = load(put(tmp_path, "car/1.jpg", "train/1.jpg", "test/1.jpg"))
    assert data.class_names == ["car", "test", "train"] and [*data.lists] == ["train"]
    refused(put(tmp_path / "x", "car/1.jpg", "train/a/1.jpg"), f"{tmp_path / 'x'}", "train/", "(car)")
    refused(put(tmp_path / "y", "car/1.jpg", "bus/1.jpg", "test/car/1.jpg"), f"{tmp_path / 'y'}", "test/", "(car)")
    put(tmp_path / "z", "train/a/1.jpg", "train/b/1.jpg", "docs/readme.txt")  # no images: no class
    assert load(tmp_path / "z").class_names == ["a", "b"]


@pytest.mark.parametrize("flag", ["folder", "file", "labels"])
def test_a_table(tmp_path, flag):
    """Rows would go to other images, or a column more, as other programs write it, would stop the run."""
    put(tmp_path, "x/2.jpg", "x/1.jpg", "a, b.jpg")
    rows = ["x/2.jpg,dog,0.5", '"a, b.jpg", cat ,0.7', "", "x/1.jpg,dog,"]
    path = tmp_path / ("elsewhere/mine.csv" if flag == "labels" else "labels.csv")
    table(path, *rows, head="Path,label,score")
    data = load(tmp_path if flag != "file" else path, path if flag == "labels" else None)
    assert read(data.train) == {"x/2.jpg": 1, "a, b.jpg": 0, "x/1.jpg": 1}
    assert data.class_names == ["cat", "dog"] and data.train.path(1) == str(tmp_path / "a, b.jpg")
    assert [data.train.where(i) for i in range(3)] == [f"{path}, line {n}" for n in (2, 3, 5)]
    names = {"folder": tmp_path.name, "file": f"{tmp_path.name}_labels", "labels": f"{tmp_path.name}_mine"}
    assert data.name == names[flag]  # of the run folder: other labels are another run


def test_split_folders_of_other_names_are_no_classes(tmp_path):
    """A network would be trained to tell training images from test images."""
    for name, usual in (("Train", "train"), ("TEST", "test"), ("valid", "val"), ("validation", "val")):
        root = put(tmp_path / name, f"{name}/a/1.jpg", f"{name}/b/2.jpg", "x/3.jpg")
        refused(root, f"{root / name}: a folder of class folders: rename it to {usual}")
    assert load(put(tmp_path / "classes", "Test/1.jpg", "Training/2.jpg")).class_names == ["Test", "Training"]


def test_images_of_a_folder_named_like_a_split_are_found_by_the_table(tmp_path):
    """Test images beside a table that names them would have to be moved first."""
    put(tmp_path, "test/1.jpg", "train/2.jpg", "train/3.jpg")
    table(tmp_path / "train.csv", "train/2.jpg,a", "train/3.jpg,b")
    assert [*load(tmp_path).lists] == ["train"]


def test_photos_that_cannot_be_read_are_warned_of(tmp_path):
    """Half of the photos of a phone would be left out, unsaid."""
    put(tmp_path, "a/1.jpg", "b/2.jfif", "a/3.HEIC", "b/4.heic", "b/5.txt", "a/6")
    with pytest.warns(DivideMixWarning, match="2 photos are left out.*heic"):
        data = load(tmp_path)
    assert len(data.train) == 2 and ".heic 2, " in data.lines[1] and "no ending 1" in data.lines[1]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_splits_in_tables(tmp_path, ending):
    """A test set beside the training table would be left out, or its images be trained on."""
    train, mark = f"train{ending}", {".csv": ",", ".tsv": "\t"}[ending]
    rows = [row.replace(",", mark) for row in ("1.jpg,10", "2.jpg,9", "3.jpg,10", "4.jpg,10")]
    table(tmp_path / train, *rows[:3], head=f"path{mark}label")
    table(tmp_path / f"val{ending}", rows[3], head=f"path{mark}label")
    put(tmp_path, "test/9/5.jpg", "9/6.jpg", *(f"{i}.jpg" for i in range(1, 5)))
    for path in (tmp_path, tmp_path / train):
        data = load(path)
        assert data.class_names == ["9", "10"]  # by value
        assert (read(data.train), read(data.lists["val"])) == ({"1.jpg": 1, "2.jpg": 0, "3.jpg": 1}, {"4.jpg": 1})
        assert read(data.lists["test"]) == {"test/9/5.jpg": 0}


@pytest.mark.parametrize(
    ("head", "columns"), [("path,split,label", "path, label, split"), ("Image,Split,class", "Image, class, Split")]
)
def test_a_table_of_all_splits(tmp_path, head, columns):
    """Test images would be trained on, where one table lists the whole data set."""
    splits = ["train", "Validation", "test", "TRAINING", "valid", "testing", "train"]
    put(tmp_path, "test/b/9.jpg", *(f"{i}.jpg" for i in range(7)))
    path = table(tmp_path / "all.csv", *(f"{i}.jpg,{split},{'ab'[i % 2]}" for i, split in enumerate(splits)), head=head)
    data = load(path)
    assert {name: read(images) for name, images in data.lists.items()} == {
        "train": {"0.jpg": 0, "3.jpg": 1, "6.jpg": 0},
        "val": {"1.jpg": 1, "4.jpg": 0},
        "test": {"2.jpg": 0, "5.jpg": 1},
    }
    assert data.lists["test"].where(1) == f"{path}, line 7" and [*data.lists] == ["train", "val", "test"]
    assert data.lines[2] == f"test: 2 images, {path} (columns {columns})"
    refused(table(path, "0.jpg,train,a", "1.jpg,fold2,b", head=head), f"{path}, line 3: split 'fold2'")
    refused(table(path, "0.jpg,test,a", "1.jpg,val,b", head=head), f"{path}: no row whose split is train")
    refused(table(path, "0.jpg,train,a", "1.jpg,,b", head=head), f"{path}, line 3: split ''")
    table(path, "0.jpg,train,a", "1.jpg,train,b", "2.jpg,val,b", head=head)
    others = [{"2.jpg": 1}, {"test/b/9.jpg": 1}]  # the second from its folder
    assert [read(images) for images in load(path).lists.values()][1:] == others
    labels = table(tmp_path / "lists/corrected.csv", "1.jpg,a", "3.jpg,b")  # for the training part of that table
    for found_as in (path, tmp_path):
        assert [read(images) for images in load(found_as, labels).lists.values()] == [{"1.jpg": 0, "3.jpg": 1}, *others]
        path.rename(tmp_path / "labels.csv")
        path = tmp_path / "labels.csv"
        for rows in (["gone.jpg,train,a"], [",train,"], []):  # the replaced rows are not read
            table(path, *rows, "2.jpg,val,b", head=head)
            assert [read(images) for images in load(path, labels).lists.values()][1:] == others
    table(path, "0.jpg,a", head="path,species")  # has no other splits
    assert read(load(path, labels).train) == {"1.jpg": 0, "3.jpg": 1}
    refused(path, "is a folder", labels=tmp_path / "lists")


def test_a_table_round_trips_the_class_folders(tmp_path):
    """Corrected labels, written as a table of the same images, would name others."""
    data = load(put(tmp_path, "b/é 1.jpg", 'b/"q",.jpg', "a/deep/1.jpg", "10/x.jpg"))
    names = [name.decode().replace('"', '""') for name in data.train.names()]
    rows = [f'"{name}",{data.class_names[label]}' for name, label in zip(names, data.train.labels, strict=True)]
    again = load(tmp_path, table(tmp_path / "out/cleaned.csv", *rows))
    assert again.class_names == data.class_names == ["10", "a", "b"]
    assert again.train.digest() == data.train.digest()


def test_paths_as_people_have_them(tmp_path):
    """Tables from Windows, with whole paths, or beside the images' folder could not be used; or the wrong file be."""
    root = put(tmp_path / "data", "a/1.jpg", "a/2.jpg", "both.jpg")
    put(tmp_path, "photos/3.jpg", "lists/4.jpg", "lists/both.jpg")
    names = ["a\\1.jpg", f"{root}/a/./2.jpg", f"{tmp_path}/photos/3.jpg", "4.jpg"]
    path = table(tmp_path / "lists/mine.csv", *(f"{name},{i % 2}" for i, name in enumerate(names)))
    data = load(root, path)
    assert read(data.train) == {"a/1.jpg": 0, "a/2.jpg": 1, f"{tmp_path}/photos/3.jpg": 0, f"{tmp_path}/lists/4.jpg": 1}
    assert [data.train.path(i) for i in (1, 2)] == [f"{root}/a/2.jpg", f"{tmp_path}/photos/3.jpg"]
    for name in ("a/1.jpg", "photos/3.jpg"):
        draw((root if name < "b" else tmp_path) / name, (20, 30))
    assert survey(data.train).checked == 2
    refused(
        root, f"{path}, line 2: ", f"{root}/both.jpg and {tmp_path}/lists/both.jpg", labels=table(path, "both.jpg,0")
    )
    refused(root, f"{path}, line 3: 'a/1.jpg' is already in line 2", labels=table(path, "a/1.jpg,0", ".\\a\\1.jpg,1"))
    refused(root, f"{path}, line 2: ", "5004 letters", labels=table(path, f"{'b' * 5000}.jpg,0"))
    for label in ("x" * 5000, '"a\nb"'):
        refused(root, f"{path}, line 3: label ", labels=table(path, "a/1.jpg,0", f"a/2.jpg,{label}"))


def test_rows_without_labels_and_images(tmp_path):
    """One image that was deleted would stop a run for good, or labels that nobody gave be made up."""
    put(tmp_path, *(f"{i}.jpg" for i in range(4)))
    rows = [*(f"{i}.jpg,{i % 2}" for i in range(9)), "x.jpg, ", "y.jpg", ",1", "z.jpg,"]
    path = table(tmp_path / "labels.csv", *rows)
    refused(
        tmp_path, f"{path}, line 11: rows without a path or a label: 4, first in line 11, 12, 13", "--skip_bad_images"
    )
    data = load(tmp_path, skip_bad=True)
    assert len(data.train) == 9 and "left out: rows without a path or a label: 4, first in line 11" in data.lines[0]
    table(path, *rows[:9])
    first = f"{tmp_path}/4.jpg: missing ({path}, line 6); 5 of 9 images are missing"
    refused(tmp_path, first, f"{tmp_path}/5.jpg, {tmp_path}/6.jpg: ", "--skip_bad_images")
    lists, problems, _ = find(tmp_path)  # --check_data names them all
    assert problems == [] and len(lists["train"]) == len(load(tmp_path, skip_bad=True).train) == 9


def test_columns_by_flags(tmp_path):
    """The columns of another program's table could not be named, or a flag be ignored."""
    path = table(put(tmp_path, "1.jpg", "2.jpg") / "labels.csv", "1.jpg,x,a", "2.jpg,x,b", head="where,label,what")
    data = load(tmp_path, path_column="where", label_column="what")
    assert data.class_names == ["a", "b"] and data.lines == [f"train: 2 images, {path} (columns where, what)"]
    refused(tmp_path, f"{path}, line 1: no column of paths", "where, label, what", "--path_column")


def test_class_order_of_numbers():
    """Class 10 would come before class 9, or another order in another process exchange a continued run's classes."""
    assert class_order(["10", "9", "-1", "9", "100"]) == ["-1", "9", "10", "100"]
    assert class_order(["10", "9", "x"]) == ["10", "9", "x"]
    assert class_order(["1" * 5000, "2"]) == ["1" * 5000, "2"]  # no number that int() takes


def test_what_is_no_data_folder(tmp_path):
    """The first mistake of a new user would end in a traceback."""
    refused(tmp_path / "gone", f"--data_path {tmp_path / 'gone'}")
    refused(tmp_path, "no class folder", "<class>/<image>")
    refused(put(tmp_path / "x", "a.txt") / "a.txt", "a.txt", ".csv")
    refused(put(tmp_path / "one", "a/1.jpg", "a/2.jpg"), "one class, 'a'")
    for name in ("both/train.csv", "both/labels.csv", "test/test.csv"):
        table(tmp_path / name, "1.jpg,0", "2.jpg,1")
    refused(tmp_path / "both", "train.csv and labels.csv")
    table(tmp_path / "val/train.tsv", "1.jpg\t0", "2.jpg\t1")
    for name in ("val/val.tsv", "val/val.csv"):
        table(tmp_path / name, "3.jpg,0")
    refused(tmp_path / "val", "val.csv and val.tsv")
    refused(tmp_path / "test/test.csv", "test.csv", "split")
    refused(tmp_path / "both", "mine.csv is missing", labels=tmp_path / "mine.csv")


def test_a_test_set_that_does_not_fit(tmp_path):
    """Accuracy would be of classes that no output stands for, or of images that were learned by heart."""
    root = put(tmp_path / "classes", "train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg", "test/c/3.jpg")
    refused(root, f"{root / 'test'}: 'c' ", "(a, b)")
    path = table(root / "test.csv", "test/a/2.jpg,a", "test/c/3.jpg,A")
    refused(root, f"{path}, line 3: 'A' ")
    root = put(tmp_path / "images", "test/a/1.jpg", "x.jpg", "y.jpg")
    train = table(root / "labels.csv", "x.jpg,a", "test/./a/1.jpg,b")
    refused(root, f"{root / 'test'}: 'test/a/1.jpg' ", f"({train}, line 3)")
    test = table(root / "test.csv", "y.jpg,a", "x.jpg,a")
    refused(root, f"{test}, line 3: 'x.jpg' ", f"({train}, line 2)")


@pytest.mark.parametrize(
    ("name", "expected"), [(b"a/\xff.jpg", "\\xff"), (b"\xff/1.jpg", "\\xff"), (b"a /1.jpg", "b'a '")]
)
def test_names_that_a_table_cannot_hold(tmp_path, name, expected):
    """They would break the tables and JSON that a run writes; corrected labels be of a class that no folder has."""
    put(tmp_path, "a/1.jpg", "b/1.jpg", name.decode(errors="surrogateescape"))
    refused(tmp_path, str(tmp_path), expected, "rename it")


def draw(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    Image.new(mode, size).save(path)


def test_survey(tmp_path):
    """Photos would be cut down to 32 pixels, or icons blown up to 224; a million images take an hour."""
    put(tmp_path, "a/0.png", "b/empty.png")
    with pytest.raises(DivideMixError, match=r"a/0\.png: empty .*--check_data"):
        survey(load(tmp_path).train)
    for i, size in enumerate([(30, 40), (90, 50), (60, 60)]):
        draw(tmp_path / f"a/{i}.png", size, "L")
    images = load(tmp_path).train
    assert survey(images) == (3, 50, 30, 90, True)
    assert all(text in str(survey(images)) for text in ("grey", "30 to 90 px", "50 px", "3 images"))
    for mode, is_grey in (("RGB", False), ("I;16", True)):
        draw(tmp_path / "b/empty.png", (8, 8), mode)
        assert survey(images).grey == is_grey
    assert survey(images.select(np.arange(5000) % 2)).checked == 200


def test_mean_and_std():
    """Wrong ones shift what every network sees, in training and wherever it is used."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 5, 3), dtype=np.uint8)
    pixels[..., 1] = 7
    mean, std = mean_std(pixels)
    expected = (pixels / 255).reshape(-1, 3)
    np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, [expected.std(axis=0)[0], 1 / 255, expected.std(axis=0)[2]], rtol=1e-12)


def test_balance():
    """A rare class whose labels are nearly all called wrong would come as a surprise."""
    line, warning = balance(np.repeat([0, 1, 2], [3, 40, 4]), ["a", "b", "c"], 10)
    assert all(text in line for text in ("3 (a)", "40 (b)", "13.3")) and "13 times" in warning
    assert balance(np.repeat([0, 1], [3, 30]), ["a", "b"], 10)[1] == ""
    assert "0 (a) to 2 (b), 2.0" in balance(np.array([1, 1]), ["a", "b"], 10)[0]
