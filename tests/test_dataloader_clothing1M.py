"""dataloader_clothing1M: which images and labels the run gets, and the balance of its samples."""

from math import ceil
from pathlib import Path

import numpy as np
import pytest
from helpers.trees import make_clothing1M
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataloader_clothing1M import NUM_CLASS, balanced_sample, find, load
from dividemix import DivideMixError

LISTS = [
    "noisy_train_key_list.txt",
    "noisy_label_kv.txt",
    "clean_val_key_list.txt",
    "clean_label_kv.txt",
    "clean_test_key_list.txt",
]


def rewrite(path: Path, number: int, line: str | None) -> None:
    """Replaces line `number` (from 1) of a text file; None takes it out."""
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    path.write_text("\n".join(lines))


def refused(root: Path, *expected: str) -> str:
    with pytest.raises(DivideMixError) as caught:
        load(root)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in expected), message
    return message


# ---- Key lists ----


@pytest.mark.parametrize("images_folder", [True, False])
def test_images_and_labels_of_both_layouts(tmp_path, images_folder):
    """One of the two ways in which people keep Clothing1M could not be read, or images would get wrong labels."""
    data = load(make_clothing1M(tmp_path / "data", 30, 16, 14, images_folder=images_folder))
    assert [len(part) for part in (data.train, data.val, data.test)] == [30, 16, 14]
    assert data.num_class == NUM_CLASS == 14 and data.class_names[13] == "Underwear"
    start = tmp_path / "data" / ("images" if images_folder else "")
    assert Path(data.train.path(3)) == start / "3/03/0000000003,1000000003.jpg"
    for part in (data.train, data.val, data.test):
        for i in range(len(part)):
            with Image.open(part.path(i)) as image:
                assert image.format == "JPEG"


def test_train_labels_are_the_noisy_ones_and_the_others_clean(tmp_path):
    """The paper's problem would vanish (clean training labels), or accuracy would be measured against wrong labels."""
    root = make_clothing1M(tmp_path, 280, 28, 28, noise=0.4)
    data = load(root)
    clean = np.arange(280) % 14
    assert 0.5 < np.mean(data.train.labels == clean) < 0.7
    noisy = dict(line.rsplit(" ", 1) for line in (root / "noisy_label_kv.txt").read_text().splitlines())
    keys = (root / "noisy_train_key_list.txt").read_text().split()
    assert data.train.labels.tolist() == [int(noisy[key]) for key in keys]
    assert data.val.labels.tolist() == data.test.labels.tolist() == list(range(14)) * 2


def test_path_with_and_without_a_trailing_slash_and_tilde(tmp_path, monkeypatch):
    """The same folder written otherwise would not be found."""
    make_clothing1M(tmp_path / "data", 14, 14, 14)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in (f"{tmp_path}/data", f"{tmp_path}/data/", "~/data", "data", "./data/"):
        assert load(path).train.path(0).startswith(f"{tmp_path}/data/images/")


def test_all_missing_lists_are_named_at_once(tmp_path):
    """The user would fetch one list, start again, and be told of the next."""
    refused(tmp_path, *LISTS, "--data_path")
    root = make_clothing1M(tmp_path, 14, 14, 14)
    (root / "clean_label_kv.txt").unlink()
    (root / "clean_test_key_list.txt").unlink()
    message = refused(root, "clean_label_kv.txt is missing", "clean_test_key_list.txt is missing")
    assert message.count("is missing") == 2


def test_lists_that_are_right_are_found_beside_wrong_ones(tmp_path):
    """--check_data would look at no image at all because of one bad line."""
    root = make_clothing1M(tmp_path, 14, 14, 14)
    rewrite(root / "clean_val_key_list.txt", 5, "../secret.jpg")
    lists, problems = find(root)
    assert list(lists) == ["train", "test"] and len(problems) == 1 and "line 5" in problems[0]


def test_a_key_without_label_is_refused_with_its_line(tmp_path):
    """An image would be trained on with a label that nobody gave it."""
    root = make_clothing1M(tmp_path, 14, 14, 14)
    rewrite(root / "noisy_label_kv.txt", 4, None)
    refused(root, f"{root}/noisy_train_key_list.txt, line 4: ", "has no label in noisy_label_kv.txt")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("images/0/00/x.jpg 14", "label '14', expected a whole number from 0 to 13"),
        ("images/0/00/x.jpg", "has no label"),
        ("/images/0/00/x.jpg 0", "absolute path"),
        ("images/../../x.jpg 0", "'..'"),
    ],
)
def test_bad_label_lines_are_refused_with_their_line(tmp_path, line, expected):
    """A damaged label file would be trained on, or would lead out of the data folder."""
    root = make_clothing1M(tmp_path, 14, 14, 14)
    rewrite(root / "noisy_label_kv.txt", 9, line)
    refused(root, f"{root}/noisy_label_kv.txt, line 9: ", expected)


def test_an_image_that_is_listed_again_is_taken_once_with_its_last_label(tmp_path, recwarn):
    """The published lists would be refused for their repetitions, or an image get another label than the published
    script gives it."""
    root = make_clothing1M(tmp_path, 14, 14, 14)
    train, val = ((root / f"{name}_key_list.txt").read_text().split()[0] for name in ("noisy_train", "clean_val"))
    for name, line in (
        ("noisy_label_kv.txt", f"{train} 9"),
        ("noisy_train_key_list.txt", train),
        ("clean_label_kv.txt", f"{val} 8"),
    ):
        with (root / name).open("a") as file:
            file.write(line + "\n")
    data = load(root)
    assert len(data.train) == 14 and data.train.labels[0] == 9 and data.val.labels[0] == 8
    said = [str(warning.message) for warning in recwarn]
    assert sorted(line.split(":")[0] for line in said) == [
        str(root / name) for name in ("clean_label_kv.txt", "noisy_label_kv.txt", "noisy_train_key_list.txt")
    ]
    assert all(": 1; " in line for line in said)


# ---- Class-balanced samples ----


def one_by_one(labels: np.ndarray, n: int, num_class: int, rng: np.random.Generator) -> list[int]:
    """The rule as the paper's setting words it."""
    counts, taken = [0] * num_class, []
    for i in rng.permutation(len(labels)):
        if counts[labels[i]] < n / num_class and len(taken) < n:
            counts[labels[i]] += 1
            taken.append(int(i))
    return taken


@given(
    st.lists(st.integers(0, 4), max_size=60), st.integers(0, 70), st.sampled_from([5, 7, 300]), st.integers(0, 2**32)
)
def test_samples_are_those_of_drawing_one_by_one(labels, n, num_class, seed):
    """Training would see other images, or in another order, than the rule says."""
    labels = np.array(labels, np.int64)
    index = balanced_sample(labels, n, num_class, np.random.default_rng(seed))
    assert index.dtype == np.int64 and index.tolist() == one_by_one(labels, n, num_class, np.random.default_rng(seed))


def test_balance_of_a_sample():
    """Frequent classes would crowd out the others, as they do in Clothing1M's noisy labels."""
    labels = np.random.default_rng(0).choice(14, 20_000, p=np.arange(1, 15) / 105)
    index = balanced_sample(labels, 1000, 14, np.random.default_rng(1))
    counts = np.bincount(labels[index], minlength=14)
    assert len(index) == len(set(index.tolist())) == 1000 and counts.max() == ceil(1000 / 14) and counts.min() >= 60
    other = balanced_sample(labels, 1000, 14, np.random.default_rng(2))
    assert len(set(index.tolist()) & set(other.tolist())) < 500


def test_a_short_class_gives_what_it_has():
    """Images of a rare class would be drawn twice, or other classes would fill its place, or zeros would."""
    labels = np.repeat([0, 1, 2], [50, 3, 50])
    index = balanced_sample(labels, 30, 3, np.random.default_rng(0))
    assert np.bincount(labels[index]).tolist() == [10, 3, 10] and len(set(index.tolist())) == 23
    assert len(balanced_sample(labels, 30, 4, np.random.default_rng(0))) == 8 + 3 + 8
