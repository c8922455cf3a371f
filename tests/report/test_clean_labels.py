"""A corrected copy of the labels, in the data set's own format: the training scripts read it back."""

import csv
import json
import shlex
import shutil

import numpy as np
import pytest
from helpers.run_folder import GIVEN, SUGGESTED, TRUE, N, make_run
from helpers.trees import make_clothing1M, make_webvision

import dataloader_clothing1M
import dataloader_webvision
from dividemix import DivideMixError, noise
from dividemix.noise import file as noise_file
from dividemix.report import clean_labels
from dividemix.report import issues as label_issues
from dividemix.run.folder import read_run

CLEANED = np.where(np.isin(np.arange(N), [0, 3, 6]), SUGGESTED, GIVEN)


def export(folder, target) -> list[str]:
    run = read_run(folder)
    return clean_labels.export(run, label_issues.find(run), target)


def test_a_json_list_that_noise_file_takes(tmp_path):
    """Else the corrected labels of a small set cannot be trained on: --noise_file refuses what is not as --r says."""
    lines = export(make_run(tmp_path / "run", dataset="digits"), tmp_path / "clean")
    assert {path.name for path in (tmp_path / "clean").iterdir()} == {"cleaned_labels.json", "cleaned_labels.csv"}
    assert json.loads((tmp_path / "clean" / "cleaned_labels.json").read_text()) == CLEANED.tolist()
    assert "(3 of 12 changed)" in lines[0]
    rate = float(lines[1].split("--r ")[1].split()[0])
    assert rate == round(2 / 12 * 3 / 2, 2) and "--dataset digits " in lines[1]  # two of twelve are wrong still
    spec = noise_file.NoiseSpec("digits", "sym", rate, 0, 3, noise.synthetic.next_class(3))
    assert noise_file.read(tmp_path / "clean" / "cleaned_labels.json", TRUE, spec).tolist() == CLEANED.tolist()


@pytest.mark.parametrize("num_class", [2, 10, 100])
@pytest.mark.parametrize("wrong_after", [0.0, 0.013, 0.3])
def test_the_rate_that_is_named_is_one_that_the_file_passes(tmp_path, num_class, wrong_after):
    """Else the command that the export prints ends in an error."""
    rng = np.random.default_rng(0)
    n = 20_000
    true = rng.integers(num_class, size=n)
    labels = np.where(rng.random(n) < wrong_after, (true + rng.integers(1, num_class, n)) % num_class, true)
    run = read_run(make_run(tmp_path / "run"))
    object.__setattr__(run, "labels", {"list_given": true})
    given, classes = (true + 1) % num_class, [str(c) for c in range(num_class)]
    fields = {"index": np.arange(n), "paths": None, "given": given, "suggested": labels, "quality": np.zeros(n)}
    fields |= {"is_issue": np.ones(n, bool), "loss": np.zeros(n), "p_clean": [], "confidence": np.zeros(n)}
    issues = label_issues.LabelIssues(**fields, true=true, class_names=classes, threshold=0.5, epochs=1)
    rate = clean_labels.rate_left(run, issues)
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(labels.tolist()))
    noise_file.read(
        file, true, noise_file.NoiseSpec("digits", "sym", rate, 0, num_class, noise.synthetic.next_class(num_class))
    )


def test_labels_that_were_not_scored_are_kept(tmp_path):
    """Held-out and damaged images: else their lines are missing, and the list is refused or is of other images."""
    folder = make_run(tmp_path / "run")
    whole = np.concatenate([GIVEN, [2, 2, 0]])
    np.savez(folder / "labels.npz", index=np.arange(N), given=GIVEN, true=TRUE, list_given=whole)
    lines = export(folder, tmp_path / "clean")
    labels = json.loads((tmp_path / "clean" / "cleaned_labels.json").read_text())
    assert labels == [*CLEANED.tolist(), 2, 2, 0]
    assert "(3 of 15 changed, 3 were not scored and keep theirs)" in lines[0]


def test_clothing1m_reads_its_corrected_list(tmp_path):
    """Else the list cannot take the place of noisy_label_kv.txt. Images may be below images/ or directly in the data
    folder; the keys are the same."""
    for images_folder in (True, False):
        tree = make_clothing1M(tmp_path / f"data{images_folder}", N, 2, 2, sides=(8, 9), images_folder=images_folder)
        before = dataloader_clothing1M.load(tree).train
        names = before.names().tolist()
        assert names[0].startswith(b"images/") == images_folder and (tree / names[0].decode()).is_file()
        folder = make_run(tmp_path / f"run{images_folder}", command="Train_clothing1M.py", paths=names, truth=False)
        export(folder, tmp_path / f"clean{images_folder}")
        shutil.copy(tmp_path / f"clean{images_folder}" / "noisy_label_kv.txt", tree)
        after = dataloader_clothing1M.load(tree).train
        assert after.paths.tolist() == before.paths.tolist() and after.labels.tolist() == CLEANED.tolist()


def test_webvision_reads_its_corrected_list(tmp_path):
    """Else the list cannot take the place of train_filelist_google.txt."""
    tree = make_webvision(tmp_path / "data", N, 4, 4, num_class=3, sides=(8, 9))
    before = dataloader_webvision.load(tree, 3).train
    folder = make_run(tmp_path / "run", command="Train_webvision.py", paths=before.names().tolist(), truth=False)
    lines = export(folder, tmp_path / "clean")
    shutil.copy(tmp_path / "clean" / "train_filelist_google.txt", tree / "info")
    after = dataloader_webvision.load(tree, 3).train
    assert after.paths.tolist() == before.paths.tolist() and after.labels.tolist() == CLEANED.tolist()
    assert "train_filelist_google.txt" in lines[0] and "in a copy of the data folder" in lines[1]


def test_other_image_lists_become_a_csv_with_the_names_of_the_classes(tmp_path):
    """Else somebody's own folder has no corrected list; a name that is no text keeps its bytes, so that it is found."""
    paths = [b'cat/a,"b".jpg', b"dog/caf\xe9.jpg", *(b"x/%d.jpg" % i for i in range(N - 2))]
    folder = make_run(tmp_path / "run", command="Train_folder.py", paths=paths, truth=False)
    export(folder, tmp_path / "clean")
    with open(tmp_path / "clean" / "labels.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "label"]
    assert [row[0].encode("utf-8", "surrogateescape") for row in rows[1:]] == paths
    assert [row[1] for row in rows[1:]] == [["cat", "dog", "bird"][label] for label in CLEANED]


@pytest.mark.parametrize(
    "where", ["not empty", "file", "data folder", "below the data folder", "link to it", "beside the list"]
)
def test_the_originals_are_never_touched(tmp_path, where):
    """A corrected list over the published one is data that is lost."""
    data = tmp_path / "data"
    data.mkdir()
    target = {"not empty": tmp_path / "full", "file": tmp_path / "file", "data folder": data}.get(where, data / "new")
    if where == "not empty":
        target.mkdir()
        (target / "kept").touch()
    elif where == "file":
        target.touch()
    elif where == "link to it":
        target = tmp_path / "link"
        target.symlink_to(data)
    before = sorted(tmp_path.rglob("*"))
    path = data
    if where == "beside the list":  # --data_path flowers/labels.csv
        path = data / "labels.csv"
        path.touch()
        before = sorted(tmp_path.rglob("*"))
    folder = make_run(tmp_path.parent / f"{tmp_path.name}-run", data_path=str(path))
    with pytest.raises(
        DivideMixError, match=r"--export_clean .*: is (there and not empty|in the data folder)"
    ) as caught:
        export(folder, target)
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """Else a mistyped path ends in a stack trace."""
    (tmp_path / "file").touch()
    with pytest.raises(DivideMixError, match=r"--export_clean .*file/x: cannot be written"):
        export(make_run(tmp_path / "run"), tmp_path / "file" / "x")


def test_the_command_that_is_named_is_one_that_a_shell_takes(tmp_path):
    """Else who copies it trains on another folder's images, or gets an error for a name with a blank."""
    runs = [
        make_run(tmp_path / "a", dataset="cifar10", data_path="my data/cifar"),
        make_run(tmp_path / "b", command="Train_folder.py", paths=[b"x"] * N, data_path="my data", truth=False),
        make_run(tmp_path / "c", dataset="cifar10", data_path="d", truth=False),
    ]
    lines = [export(run, tmp_path / f"clean {run.name}")[1].partition(": ")[2] for run in runs]
    words = ["python", "Train_cifar.py", "--dataset", "cifar10", "--data_path", "my data/cifar", "--noise_mode", "sym"]
    file = str(tmp_path / "clean a" / "cleaned_labels.json")
    assert shlex.split(lines[0]) == [*words, "--r", "0.25", "--noise_file", file]
    file = str(tmp_path / "clean b" / "labels.csv")
    assert shlex.split(lines[1]) == ["python", "Train_folder.py", "--data_path", "my data", "--labels", file]
    assert "--data_path d --noise_file" in lines[2] and lines[2].endswith("that you think is wrong still")
