"""`dividemix.find_label_issues`: a list of the wrong labels, for whoever has features and a notebook."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from helpers.trained import lively
from helpers.trees import make_folder
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import dividemix
import Train_folder
from dividemix import DivideMixError, api
from dividemix.data import shown
from dividemix.run import read_run

NAMES = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])


@pytest.fixture(scope="module")
def digits():
    """600 digits as 64 numbers, their true labels and given ones, 30 % of which are wrong."""
    x, truth = (array[:600] for array in load_digits(return_X_y=True))
    rng = np.random.default_rng(0)
    given = np.where(rng.random(600) < 0.3, (truth + rng.integers(1, 10, 600)) % 10, truth)
    return x, truth, given


def test_wrong_labels_are_found(digits):
    """The one thing that it is for; and the columns that a notebook reads."""
    x, truth, given = digits
    table = dividemix.find_label_issues(features=x, labels=given, seed=0)
    columns = ["index", "given_label", "suggested_label", "label_quality", "is_label_issue", "rank"]
    assert [*table.columns] == columns and table["index"].tolist() == [*range(600)]
    wrong = given != truth
    assert average_precision_score(wrong, -table["label_quality"]) > 0.93
    assert (table.suggested_label == truth).mean() > 0.85 and (table.given_label == given).all()
    assert sorted(table["rank"]) == [*range(1, 601)] and table.label_quality.between(0, 1).all()
    ranked = table.sort_values("rank")
    issues = int(table.is_label_issue.sum())
    assert ranked.is_label_issue.tolist() == [True] * issues + [False] * (600 - issues) and 100 < issues < 260
    assert ranked.label_quality[:issues].is_monotonic_increasing
    assert (table.suggested_label != table.given_label)[table.is_label_issue].all()


def test_names_and_views_and_the_seed(digits, recwarn):
    """Class names must come back as names; several views are views, not samples; and the same seed gives the same
    list, or no figure could be repeated."""
    x, _, given = digits
    views = np.stack([x, x + 0.1]).astype(np.float16)[:, :200]
    first, again, other = (
        dividemix.find_label_issues(features=views, labels=NAMES[given[:200]].tolist(), seed=seed) for seed in (1, 1, 2)
    )
    assert not [str(warning.message) for warning in recwarn if "no images" in str(warning.message)]
    pandas.testing.assert_frame_equal(first, again)
    assert set(first.suggested_label) <= {*NAMES} and first.given_label.tolist() == NAMES[given[:200]].tolist()
    assert not np.array_equal(first.label_quality, other.label_quality)


def test_what_cannot_be_listed_is_refused(digits):
    """A list of other samples, or of one class, would be nonsense without a word."""
    x, _, given = digits
    for features, labels in (
        *((x, given[:-1]), (x, np.zeros(600)), (x, given[:, None]), (x[0], given)),
        *((x, [None, *NAMES[given[1:]]]), (x, [float("nan"), *NAMES[given[1:]]]), (x, [np.nan, *given[1:]])),
        *((x, ["one", *given[1:].tolist(), pandas.NA]), (x, [[0], *given[1:].tolist()])),
    ):
        with pytest.raises(DivideMixError, match=r"^(labels|features)") as error:
            dividemix.find_label_issues(features=features, labels=labels)
        assert "\n" not in str(error.value)


def test_a_list_that_means_nothing_is_said_to(digits):
    """Hundreds of labels would be dropped by who has features of other images, or in another order; and a warning where
    the list is of use would make people ignore it."""
    x, truth, given = digits
    rng = np.random.default_rng(0)
    for features, labels in (
        (x, rng.permutation(truth)),
        (rng.normal(size=x.shape), truth),
        (rng.normal(size=x.shape), rng.permutation(truth < 5)),
        (np.ones((60, 4)), truth[:60]),
        (x * 1e-8, given),  # the networks learn nothing from them
    ):
        with pytest.warns(dividemix.DivideMixWarning, match="^THIS LIST MEANS NOTHING: ") as caught:
            dividemix.find_label_issues(features=features, labels=labels)
        assert sum("MEANS NOTHING" in str(warning.message) for warning in caught) == 1
    half_wrong = np.where(rng.random(600) < 0.5, rng.integers(0, 10, 600), truth)
    few = np.where(rng.random(600) < 0.03, truth != 3, truth == 3)
    for rows, labels in ((600, given), (600, half_wrong), (600, few), (100, truth), (4, [0, 0, 1, 1])):
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            dividemix.find_label_issues(features=torch.from_numpy(x[:rows]), labels=labels[:rows])
        said = any("MEANS NOTHING" in str(warning.message) for warning in recorded)
        assert said == (rows == 4)


def test_importing_the_package_loads_no_torch():
    """Else every command that only prints its flags takes seconds."""
    code = "import dividemix, sys; assert 'torch' not in sys.modules; dividemix.nothing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip().endswith("AttributeError: module 'dividemix' has no attribute 'nothing'")


# ---- Images ----

TINY = {"width": 4, "num_epochs": 2, "warm_up": 1, "weights": "none", "workers": 0}
TINY |= {"device": "cpu", "precision": "fp32"}


class Items(list):
    """A torch Dataset is whatever has a length and items."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """24 square images of 4 classes, 20 px."""
    return make_folder(tmp_path_factory.mktemp("api") / "tree", sides=(20, 20))


def pictures(tree) -> tuple[list, list[str]]:
    paths = sorted(tree.rglob("*.jpg"))
    return [Image.open(path).convert("RGB") for path in paths], [path.parent.name for path in paths]


def test_a_folder_arrays_and_a_dataset_have_the_same_list(tree, tmp_path, capsys):
    """Else pixels are changed on the way, or labels belong to other images."""
    images, labels = pictures(tree)
    arrays = np.stack([np.asarray(image) for image in images])
    numbers = [int(name[1]) for name in labels]
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    of_folder = dividemix.find_label_issues(tree, seed=3, **TINY, run_dir=tmp_path / "run")
    assert capsys.readouterr().out == "" and len(of_folder) == 24
    assert [(tree / path).parent.name for path in of_folder.path] == of_folder.given_label.tolist() == labels
    columns = of_folder.columns.drop(["path", "given_label", "suggested_label"])
    for table in (
        dividemix.find_label_issues(images=arrays, labels=labels, seed=3, **TINY),
        dividemix.find_label_issues(Items(zip(tensors, torch.tensor(numbers), strict=True)), seed=3, **TINY),
    ):
        pandas.testing.assert_frame_equal(table[columns], of_folder[columns])
        assert [str(label)[-1] for label in table.suggested_label] == [name[1] for name in of_folder.suggested_label]
    assert len(dividemix.find_label_issues(tree, seed=3, **TINY, run_dir=tmp_path / "run")) == 24  # continues it
    rows = dividemix.load(tmp_path / "run", device="cpu").predict(list(arrays[:3]))
    files = dividemix.load(tmp_path / "run", device="cpu").predict(sorted(tree.rglob("*.jpg"))[:3])
    assert rows["class"].tolist() == files["class"].tolist() and rows.path.tolist() == [0, 1, 2]
    assert rows.confidence.between(0, 1).all() and rows.label.dtype == "Int64"
    for wrong in (arrays[0], [torch.zeros(3, 8, 8)]):
        with pytest.raises(DivideMixError, match="images: "):
            dividemix.load(tmp_path / "run", device="cpu").predict(wrong)
    with pytest.raises(DivideMixError, match="weights 'first'"):
        dividemix.load(tmp_path / "run", weights="first", device="cpu")
    with pytest.raises(DivideMixError, match="--device gpu"):
        dividemix.load(tmp_path / "run", device="gpu")


def test_a_run_is_continued_with_its_own_images_only(tree, tmp_path):
    """The list of other images would come back, without a word."""
    images, labels = pictures(tree)
    arrays, keep = np.stack([np.asarray(image) for image in images]), {"out_dir": tmp_path, "id": "mine"}
    first = dividemix.find_label_issues(images=arrays, labels=labels, **TINY, **keep)
    again = dividemix.find_label_issues(images=arrays, labels=labels, **TINY, **keep, no_flip=np.bool_(False))
    pandas.testing.assert_frame_equal(first, again)
    assert [path.name for path in tmp_path.iterdir()] == ["folder_memory_seed0_mine"]
    with pytest.raises(DivideMixError, match="folder_memory_seed0_mine"):
        dividemix.find_label_issues(images=arrays[::-1], labels=labels, **TINY, **keep)


def test_images_of_all_kinds_are_seen_as_files_are(tree, tmp_path):
    """16 bits would all be white, and what is transparent black."""
    values = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    drawing = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    for image in (
        Image.fromarray(values),
        drawing,
        drawing.convert("P"),
        drawing.convert("LA"),
        Image.new("1", (9, 9)),
    ):
        image.save(tmp_path / "file.png")
        names, _ = api.write_images(tmp_path, [image], None)
        assert np.array_equal(shown(tmp_path / names[0]).image, shown(tmp_path / "file.png").image)


def test_images_that_are_none_and_flags_that_are_wrong_are_one_line(tree):
    """Else a notebook ends in SystemExit, or trains on pixels that a Normalize has shifted."""
    images, _ = pictures(tree)
    array = np.asarray(images[0])
    for source, more, name in (
        (None, {}, "give one of these"),
        (tree, {"images": [array]}, "give one of these"),
        (tree, {"labels": [0, 1]}, "labels"),
        (tree, {"num_epochs": 0}, "--num_epochs"),
        (tree, {"help": True}, "help"),
        (
            None,
            {"images": [array], "labels": [0], "corrections": ["x.csv"], "data_path": "x"},
            "corrections, data_path",
        ),
        (tree, {"no_such_flag": True}, "--no_such_flag"),
        (iter(images), {}, "Dataset"),
        (None, {"images": [array, array / 255.0], "labels": [0, 1]}, "image 1"),
        (None, {"images": [array, array]}, "labels: missing"),
        (None, {"images": [array, array], "labels": [0, 1], "check_data": True}, "check_data"),
        (Items(images[:2]), {}, "item 0"),
        (Items([(Image.new("F", (8, 8)), 0)]), {}, "image 0"),
        (Items([(torch.full((3, 8, 8), -1.0), 0)]), {}, "Normalize"),
    ):
        with pytest.raises(DivideMixError, match=name) as error:
            dividemix.find_label_issues(source, **more)
        assert "\n" not in str(error.value)


def test_a_place_that_is_given_twice_is_refused(tree, tmp_path):
    """The table would be ignored, and another list come back."""
    with pytest.raises(DivideMixError, match=r"own\.csv and --data_path"):
        api.main(["own.csv", "--data_path", str(tree)])
    with pytest.raises(DivideMixError, match="DATA"):
        api.main(["--width", "4", str(tree)])
    (tmp_path / "own.csv").write_text("path,label\nx/1.jpg,a\nx/2.jpg,b\n")
    with pytest.raises(DivideMixError, match="as --labels"):
        api.main([str(tmp_path / "own.csv")])


def test_the_command_chooses_features_for_photos_on_a_cpu_and_says_how_to_repeat_it(tmp_path, no_figures, capsys):
    """One command from a folder to the list: it must train what it says, and the run must be one that Train_folder.py
    continues with the recorded command."""
    tree, arch = make_folder(tmp_path / "photos", 40, sides=(70, 80)), "shufflenet_v2_x0_5"
    torch.save(lively(arch, 1000, 64, 0).state_dict(), tmp_path / "w.pth")
    network = ["--arch", arch, "--weights", str(tmp_path / "w.pth"), "--image_size", "64", "--num_epochs", "4"]
    more = ["--device", "cpu", "--workers", "0", "--out_dir", str(tmp_path / "out")]
    final = api.main([str(tree), *network, *more])
    run = read_run(Path(final["run_dir"]))
    assert run.path.name == "folder_photos_features" and run.args["features"] is True and run.measured == ""
    out = capsys.readouterr().out
    assert "no card: heads on frozen features" in out and out.index("warm_up 3 (") < out.index("features of train: 4 v")
    assert run.args_json["command"][:3] == ["Train_folder.py", "--val_fraction", "0"]
    assert np.load(run.path / "label_scores.npz")["neighbour_kappa"] > 0.1
    Train_folder.main(run.args_json["command"][1:])
    assert "is finished (4 epochs)" in capsys.readouterr().out
