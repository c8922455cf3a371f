"""dataloader_clothing1M: which images and labels the run gets, and the balance of its samples."""

from pathlib import Path

import numpy as np
import pytest
from helpers.errors import assert_refused
from helpers.trees import make_clothing1M
from hypothesis import given
from hypothesis import strategies as st

from dataloader_clothing1M import NUM_CLASS, balanced_sample, find, load


@pytest.mark.parametrize("images_folder", [True, False])
def test_images_and_labels_of_both_layouts(tmp_path, monkeypatch, images_folder):
    """Clothing1M as many keep it could not be read, or clean labels would be trained on."""
    root = make_clothing1M(tmp_path / "data", 30, 16, 14, images_folder=images_folder)
    for path in root.glob("*.txt"):  # some copies end without the last line's end
        path.write_bytes(path.read_bytes().rstrip() if images_folder else path.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    start = root / ("images" if images_folder else "")
    for path in (root, f"{root}/", "~/data", "./data/"):
        data = load(path)
        assert Path(data.train.path(3)) == start / "3/03/0000000003,1000000003.jpg"
    assert [len(images) for images in (data.train, data.val, data.test)] == [30, 16, 14]
    assert NUM_CLASS == 14 and data.class_names[13] == "Underwear"
    assert all(Path(images.path(i)).is_file() for images in (data.train, data.val, data.test) for i in range(14))
    noisy = dict(line.rsplit(" ", 1) for line in (root / "noisy_label_kv.txt").read_text().splitlines())
    keys = (root / "noisy_train_key_list.txt").read_text().split()
    assert data.train.labels.tolist() == [int(noisy[key]) for key in keys] != [i % 14 for i in range(30)]
    assert [*data.val.labels, *data.test.labels] == [*range(14), 0, 1, *range(14)]


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("noisy_label_kv.txt", "images/0/00/x.jpg 14", "label '14'"),
        ("clean_val_key_list.txt", "../secret.jpg", "'..'"),
        ("noisy_train_key_list.txt", "images/0/00/x.jpg", "noisy_label_kv.txt"),
    ],
)
def test_bad_lines_and_missing_lists_are_named_at_once(tmp_path, name, line, expected):
    """A label that nobody gave would be trained on; or the user be told of one list after the other."""
    root = make_clothing1M(tmp_path, 14, 14, 14)
    (root / "clean_test_key_list.txt").unlink()
    lines = (root / name).read_text().splitlines()
    (root / name).write_text("\n".join([*lines[:8], line, *lines[9:]]))
    assert_refused(
        lambda: load(root), "clean_test_key_list.txt is missing", f"{root / name}, line 9: ", expected, "--data_path"
    )
    lists, problems = find(root)
    assert "test" not in lists and ("train" in lists) == ("val" in name) and len(problems) == 2


def test_an_image_that_is_listed_again_is_taken_once_with_its_last_label(tmp_path, recwarn):
    """The published lists would be refused, or an image get another label than in the published script."""
    root = make_clothing1M(tmp_path, 14, 14, 14)
    train, val = ((root / f"{name}_key_list.txt").read_text().split()[0] for name in ("noisy_train", "clean_val"))
    lines = {"clean_label_kv.txt": f"{val} 8", "noisy_label_kv.txt": f"{train} 9", "noisy_train_key_list.txt": train}
    for name, line in lines.items():
        with (root / name).open("a") as file:
            file.write(line + "\n")
    data = load(root)
    assert len(data.train) == 14 and data.train.labels[0] == 9 and data.val.labels[0] == 8
    warned = sorted(str(warning.message).split(":")[0] for warning in recwarn)
    assert warned == [str(root / name) for name in lines]


def one_by_one(labels: np.ndarray, n: int, num_class: int, rng: np.random.Generator) -> list[int]:
    """The rule as the paper's setting words it."""
    counts, taken = [0] * num_class, []
    for i in rng.permutation(len(labels)):
        if counts[labels[i]] < n / num_class and len(taken) < n:
            counts[labels[i]] += 1
            taken.append(int(i))
    return taken


NUMBERS = st.one_of(st.integers(0, 70), st.sampled_from([5, 10, 15]))  # the latter: a whole number for each class


@given(st.lists(st.integers(0, 4), max_size=60), NUMBERS, st.sampled_from([5, 7, 300]), st.integers(0, 2**32))
def test_samples_are_those_of_drawing_one_by_one(labels, n, num_class, seed):
    """Frequent classes would crowd out the others, or training see other images or another order than the rule says."""
    labels = np.array(labels, np.int64)
    index = balanced_sample(labels, n, num_class, np.random.default_rng(seed))
    assert index.dtype == np.int64 and index.tolist() == one_by_one(labels, n, num_class, np.random.default_rng(seed))
