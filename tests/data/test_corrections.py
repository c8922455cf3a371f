"""Decisions of people on labels, applied to the training images."""

import numpy as np
import pytest
from helpers.trees import make_folder

import dataloader_folder
import Train_folder
from dividemix import DivideMixError

ODD = 'c0/"a, b" <b>\N{CAT FACE}.jpg'


@pytest.fixture
def tree(tmp_path):
    """Images 0 to 11 of the classes c0, c1 and c2, in turn; the first has an odd name."""
    tree = make_folder(tmp_path / "images", 12, 3)
    (tree / "c0/0000.jpg").rename(tree / ODD)
    return tree


@pytest.fixture
def saved(tmp_path):
    """Writes a file of decisions, by default the first. -> its path"""

    def save(rows: str, name: str = "decisions.csv", head: str = "path,decision,label\n"):
        (tmp_path / name).write_text(head + rows)
        return tmp_path / name

    return save


def labels_of(tree, *files) -> dict[str, int]:
    train = dataloader_folder.load(tree, corrections=files).train
    return dict(zip(map(bytes.decode, train.names()), train.labels.tolist(), strict=True))


def test_each_decision_is_applied_and_a_later_file_wins(tree, saved, tmp_path):
    """Else an evening of decisions goes to other images, or the first of two decisions is trained on."""
    first = saved(
        '"c0/""a, b"" <b>\N{CAT FACE}.jpg",other,c2\nc1/0001.jpg,suggestion,c0\nc2/0002.jpg,drop,\n'
        "c0/0003.jpg,keep,c0\nc1/0004.jpg,drop,\nc1/0007.jpg,keep,\n"
    )
    given, changed = labels_of(tree), {ODD: 2, "c1/0001.jpg": 0}
    dropped = {"c2/0002.jpg", "c1/0004.jpg"}
    assert given[ODD] == 0 and len(given) == 12
    assert labels_of(tree, first) == {path: label for path, label in (given | changed).items() if path not in dropped}
    rows = "c1/0004.jpg,keep,c1\nc1/0001.jpg,suggestion,c2\nc2/0005.jpg,drop,\n"
    second = saved(rows, "second.csv", "\ufeffpath,decision,label\n")  # as Excel saves it
    both = given | changed | {"c1/0001.jpg": 2}
    dropped = {"c2/0002.jpg", "c2/0005.jpg"}
    assert labels_of(tree, first, second) == {path: label for path, label in both.items() if path not in dropped}
    flags = ["--data_path", str(tree), "--corrections", str(first), "--corrections", str(second)]
    assert Train_folder.parse_args(flags).corrections == [str(first), str(second)]  # or the first would be dropped
    text = "\r\nPath;Decision;Label;note\r\nc1/0001.jpg;Suggestion;c0;\r\nc2/0002.jpg; DROP;;\r\n"
    (tmp_path / "of Excel.csv").write_bytes(text.encode("utf-16"))
    assert labels_of(tree, tmp_path / "of Excel.csv") == {
        k: v for k, v in (given | {"c1/0001.jpg": 0}).items() if k != "c2/0002.jpg"
    }
    data = dataloader_folder.load(tree, corrections=[first, second])
    counts = "9 decisions (2 replaced by later ones): 2 labels changed, 2 images dropped, 3 kept"
    assert f"corrections: {counts}" in data.lines and data.name == "images_decisions_second"


@pytest.mark.parametrize(
    ("rows", "offending"),
    [
        ("c0/nowhere.jpg,drop,\nc1/0001.jpg,keep,\n", "c0/nowhere.jpg"),
        ("c1/0001.jpg,other,rose\n", "rose"),
        ("c1/0001.jpg,suggestion,\n", "''"),
        ("c1/0001.jpg,maybe,c0\n", "maybe"),
        ("c1/0001.jpg,drop,\nc1/0004.jpg,drop,\nc1/0007.jpg,drop,\nc1/0010.jpg,other,c0\n", "c1"),
        ('c1/0001.jpg,"drop\n', "CSV"),
    ],
)
def test_decisions_that_make_no_sense_are_refused_by_name(tree, saved, rows, offending):
    """Else decisions on another set's images, or with a typing error, are silently ignored."""
    with pytest.raises(DivideMixError) as error:
        labels_of(tree, saved(rows))
    assert offending in str(error.value) and "\n" not in str(error.value)
    assert "decisions.csv" in str(error.value) or "--corrections" in str(error.value)


def test_files_that_are_no_decisions_are_refused(tree, saved, tmp_path):
    """Else the wrong CSV file ends in a stack trace, or changes nothing."""
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for file in (saved("c1/0001.jpg,c0\n", head="path,label\n"), tmp_path / "nowhere.csv", tmp_path / "binary.csv"):
        with pytest.raises(DivideMixError, match=file.name):
            labels_of(tree, file)
    file = saved("c1/0001.jpg,drop,\n")
    with pytest.raises(DivideMixError, match=f"{file.name}: given twice"):
        labels_of(tree, file, tmp_path / "x" / ".." / file.name)


def test_the_val_split_is_not_corrected(tmp_path, saved):
    """Its labels are what a run is measured with; and a path of it in a file of decisions is a mistake."""
    tree = make_folder(tmp_path / "images", 12, 3, splits=("train", "val"))
    file = saved("train/c1/0001.jpg,drop,\n")
    data = dataloader_folder.load(tree, corrections=[file])
    assert len(data.train) == 11 and len(data.lists["val"]) == 12
    assert np.array_equal(data.lists["val"].labels, dataloader_folder.load(tree).lists["val"].labels)
    with pytest.raises(DivideMixError, match="val/c1"):
        dataloader_folder.load(tree, corrections=[saved("val/c1/0001.jpg,drop,\n")])
