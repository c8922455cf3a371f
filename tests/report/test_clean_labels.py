"""A corrected copy of the labels, in the data set's own format: the training scripts read it back."""

import csv
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.run_folder import CLASSES, GIVEN, SUGGESTED, TRUE, N, make_run
from helpers.trees import make_clothing1M, make_webvision

import dataloader_clothing1M
import dataloader_webvision
from dividemix import DivideMixError, noise
from dividemix.noise import file as noise_file
from dividemix.report import clean_labels, report
from dividemix.report import issues as label_issues
from dividemix.run.folder import read_run

CLEANED = np.where(np.isin(np.arange(N), [0, 3, 6]), SUGGESTED, GIVEN).tolist()


def export(folder, target) -> tuple[list[str], list[str]]:
    """-> what is said, and the words of the command in it"""
    run = read_run(folder)
    lines = clean_labels.export(run, label_issues.find(run), target)
    return lines, shlex.split(lines[1].partition(": ")[2])


def test_small_sets_get_a_noise_file(tmp_path):
    """Else --noise_file refuses the list: it is too short, since three labels have no score, or not as --r says."""
    folder = make_run(tmp_path / "run", dataset="digits")
    given, true = np.append(GIVEN, [2, 2, 0]), np.append(TRUE, [2, 2, 1])
    np.savez(folder / "labels.npz", index=np.arange(N), given=GIVEN, list_given=given, list_true=true)
    lines, command = export(folder, tmp_path / "clean")
    assert {path.name for path in (tmp_path / "clean").iterdir()} == {"cleaned_labels.json", "cleaned_labels.csv"}
    assert "3 of 15 changed" in lines[0] and "3 without a score" in lines[0]
    file = tmp_path / "clean" / "cleaned_labels.json"
    # Of the 15 labels 2 + 1 are wrong still.
    assert command[5:] == f"--dataset digits --width=8 --id clean --noise_mode sym --r 0.3 --noise_file {file}".split()
    spec = noise_file.NoiseSpec("digits", "sym", 0.3, 0, 3, noise.synthetic.next_class(3))
    assert noise_file.read(file, true, spec).tolist() == [*CLEANED, 2, 2, 0]
    unknown = make_run(tmp_path / "unknown", dataset="cifar10", data_path="d", truth=False)
    assert "--noise_mode" not in export(unknown, tmp_path / "of unknown")[1]


@pytest.mark.parametrize("kind", ["images/", "without images/", "WebVision"])
def test_the_published_sets_read_their_corrected_list(tmp_path, kind):
    """Else the list cannot replace the published file. Clothing1M's keys are the same without a folder images/."""
    tree, script, name = tmp_path / "data", "Train_clothing1M.py", "noisy_label_kv.txt"
    if kind == "WebVision":
        script, name = "Train_webvision.py", "info/train_filelist_google.txt"
        make_webvision(tree, N, 4, 4, num_class=3, sides=(8, 9))
    else:
        make_clothing1M(tree, N, 2, 2, sides=(8, 9), images_folder=kind == "images/")

    def read():
        return (dataloader_webvision.load(tree, 3) if kind == "WebVision" else dataloader_clothing1M.load(tree)).train

    before = read()
    folder = make_run(tmp_path / "run", command=script, paths=before.names().tolist(), truth=False)
    lines, _ = export(folder, tmp_path / "clean")
    file = Path(name).name
    shutil.copy(tmp_path / "clean" / file, tree / name)
    assert read().paths.tolist() == before.paths.tolist() and read().labels.tolist() == CLEANED
    assert all(file in line for line in lines)


def test_own_images_become_a_csv_with_class_names(tmp_path, monkeypatch):
    """Else own images have no corrected list, or a command that a shell splits; bytes that are not UTF-8 are kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").mkdir()
    paths = [b'cat/a,"b".jpg', b"dog/caf\xe9.jpg", *(b"x/%d.jpg" % i for i in range(N - 2))]
    flags = {"command": "Train_folder.py", "paths": paths, "data_path": "my data", "truth": False}
    _, command = export(make_run(tmp_path / "run", **flags), tmp_path / "clean list")
    file = tmp_path / "clean list" / "labels.csv"
    words = ["train", "folder", "--data_path", "my data", "--width=8", "--id", "clean-list", "--labels", str(file)]
    assert command == ["python", "-m", "dividemix", *words]
    for k, (started, program) in enumerate(
        [("dividemix report", ["dividemix"]), ("/x y/Train_cifar.py", ["python", "/x y/Train_folder.py"])]
    ):
        monkeypatch.setattr(sys, "argv", [started])
        _, command = export(make_run(tmp_path / f"run{k}", **flags), tmp_path / f"clean{k}")
        assert command[:-3] == [*program, *words[2 * k : -3]] and command[-2:-1] == ["--labels"]
    moved = make_run(tmp_path / "moved", **flags | {"data_path": str(tmp_path / "gone")})
    assert "find_label_issues" in export(moved, tmp_path / "of moved")[0][1]
    columns = {"path_column": "photo", "label_column": "2"}
    export(make_run(tmp_path / "named", **flags, **columns), tmp_path / "clean")
    assert (tmp_path / "clean" / "labels.csv").read_text(errors="replace").startswith("photo,2\n")
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = list(csv.reader(lines))
    assert rows[0] == ["path", "label"]
    assert [row[0].encode("utf-8", "surrogateescape") for row in rows[1:]] == paths
    assert [row[1] for row in rows[1:]] == [CLASSES[label] for label in CLEANED]


def test_a_list_goes_on_as_it_began(tmp_path, monkeypatch):
    """Else the next step is another command than the first, and its run lands where nobody looks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").mkdir()
    paths = [b"x/%d.jpg" % i for i in range(N)]
    flags = {"command": "Train_folder.py", "paths": paths, "data_path": "my data", "truth": False}
    folder = make_run(tmp_path / "run", **flags, run_dir="first run/")
    args = json.loads((folder / "args.json").read_text()) | {"program": "dividemix issues"}
    args["command"][1:] = ["--val_fraction", "0", "--data_path", "my data", "--run_dir", "first run/", "--seed", "1"]
    (folder / "args.json").write_text(json.dumps(args))
    _, command = export(folder, tmp_path / "clean")
    words = ["my data", "--seed", "1", "--run_dir", "first run-clean", "--labels", str(tmp_path / "clean/labels.csv")]
    assert command == ["python", "-m", "dividemix", "issues", *words]
    report.main([str(folder), "--review"])
    assert "run-corrected&#39; --corrections decisions.csv" in (folder / "review.html").read_text()


@pytest.mark.parametrize(
    ("target", "data_path"),
    [("full", "data"), ("file/x", "data"), ("data/new", "data/labels.csv"), ("link", "data")],
)
def test_the_originals_are_never_changed(tmp_path, target, data_path):
    """Else a corrected list replaces the published one. A target that cannot be made is an error, too."""
    for folder in ("full", "data/empty"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("full/labels.json", "data/labels.csv", "file"):
        (tmp_path / file).touch()
    (tmp_path / "link").symlink_to("data/empty")
    run = make_run(tmp_path / "run", data_path=str(tmp_path / data_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DivideMixError, match=f"--export_clean .*{target}"):
        export(run, tmp_path / target)
    assert sorted(tmp_path.rglob("*")) == before
