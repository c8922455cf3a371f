"""Faults of the folders that Train_clothing1M.py and Train_webvision.py read, as the user meets them: lists, class
folders, odd sizes, a worker that is killed. Damaged images, and more of lists, are in test_scripts.py."""

import multiprocessing

import numpy as np
import pytest
from helpers.runs import assert_equal, last_state, read_records
from helpers.scripts import CLOTHING1M, SMALL_NET, WEBVISION, end_of, image_of, note_phases
from helpers.trees import make_webvision
from PIL import Image

from dividemix.data.images import MAX_RATIO, BadImage, Views, read
from dividemix.data.lists import Boundary
from dividemix.report import report

BOTH = pytest.mark.parametrize("script", [CLOTHING1M, WEBVISION], ids=["clothing1M", "webvision"])


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs a script's command line in-process, tiny, as a user would, on the folder `data`. -> (exit status, stderr)"""
    monkeypatch.setattr(report, "draw", lambda *_: [])

    def run(script, *flags: str) -> tuple[int, str]:
        default = ["--data_path", str(tmp_path / "data"), *SMALL_NET, *script.size, "--workers", "0"]
        capsys.readouterr()
        more = ["--num_epochs", "2", "--run_dir", str(tmp_path / "run"), *flags]
        return end_of(script.main, [*default, *more], monkeypatch), capsys.readouterr().err

    return run


# ---- Lists and class folders ----


@BOTH
@pytest.mark.parametrize("fault", ["gone", "link", "encoding", "no label"])
def test_faults_of_a_list_name_the_line(start, script, tmp_path, fault):
    """One line of a million is wrong: it must not end in a traceback, nor must a file outside the folder be read."""
    tree = script.make(tmp_path / "data", noise=0, sides=(16, 24))
    file, said = tree / script.paths, {"gone": "missing", "link": "a symbolic link that leads out of the data folder"}
    image, lines = image_of(script, tree, 2), (tree / script.paths).read_bytes().splitlines()
    if fault in said:
        image.rename(tmp_path / "outside.jpg")
        if fault == "link":
            image.symlink_to(tmp_path / "outside.jpg")
        expected = f"error: {image}: {said[fault]} ({file}, line 3): "
    elif fault == "encoding":
        lines[2] = b"caf\xe9/" + lines[2]
        expected = f"error: {file}, line 3: not UTF-8 text"
    else:
        lines[2] = lines[2].split()[0] + b".else"  # no label in this line, or for this key
        expected = f"error: {file}, line 3: '{lines[2].decode().removeprefix('images/')}' has no label"
    file.write_bytes(b"\n".join(lines))
    # all images are drawn
    status, error = start(script, *(["--num_batches", "50"] if script is CLOTHING1M else []))
    assert status == 1 and error.count("\n") == 1 and error.startswith(expected), error
    assert fault in said or not (tmp_path / "run").exists()


@BOTH
def test_blank_lines_are_passed_over(start, script, tmp_path, monkeypatch):
    """A list that was edited by hand would be refused, or its labels move by a line."""
    tree = script.make(tmp_path / "data", noise=0, sides=(16, 24))
    calls = note_phases(monkeypatch, script.main)
    assert start(script, "--num_epochs", "1")[0] == 0
    for name in (script.paths, script.labels):
        text = (tree / name).read_bytes()
        (tree / name).write_bytes(b"\n \t\n" + text.replace(b"\n", b"\r\n\n"))
    assert start(script)[0] == 0  # the same images to this run, which refuses others
    assert len(read_records(tmp_path / "run")) == 2 and len(calls) == 4


def test_class_folders(start, tmp_path, monkeypatch):
    """WebVision's accuracy on ImageNet would be measured on fewer classes, or stop at a file manager's hidden file."""
    tree = make_webvision(tmp_path / "data", noise=0, sides=(16, 24))
    note_phases(monkeypatch, WEBVISION.main)
    for name in (".DS_Store", "0/.DS_Store", "0/._0.JPEG", "0/notes.txt", ".git/x.jpg"):
        (tree / "imagenet/val" / name).parent.mkdir(exist_ok=True)
        (tree / "imagenet/val" / name).write_bytes(b"\0\0\0\1Bud1")
    assert start(WEBVISION)[0] == 0
    (tree / "imagenet/val/3").rename(tree / "imagenet/val/three")
    status, error = start(WEBVISION)
    assert status == 1 and error.count("\n") == 1
    assert error.startswith(f"error: {tree / 'imagenet/val'}: class folders missing: 3; ")


# ---- Odd data ----


@pytest.mark.parametrize("odd", ["few", "one class"])
@BOTH
def test_odd_data_sets_are_trained_on(start, script, tmp_path, odd):
    """Fewer images than a batch, so that classes have one image or none; all images of one class: a first try on a few
    images of one's own would crash, and look like a fault of the data."""
    n = 5 if odd == "few" else 20
    tree = script.make(tmp_path / "data", n, 14, 14, noise=0, sides=(16, 24))
    if odd == "one class":
        lines = [line.rsplit(" ", 1) for line in (tree / script.labels).read_text().splitlines()]
        lines = [f"{path} 3\n" for path, label in lines if int(label) < script.num_class]
        (tree / script.labels).write_text("".join(lines))
    status, error = start(script)
    assert status == 0 and "error" not in error
    last = read_records(tmp_path / "run")[-1]
    assert last["phase"] == "train" and np.isfinite([last["loss_x"], last["penalty"]]).all()


@BOTH
def test_one_training_image_is_refused(start, script, tmp_path):
    """A mixture of two cannot be fitted to one loss: better to hear of it at the start than after an epoch."""
    script.make(tmp_path / "data", 1, 14, 14, noise=0, sides=(16, 24))
    status, error = start(script)
    assert (status, error) == (1, "error: 1 training samples are left: at least 2 are needed\n")
    assert not (tmp_path / "run").exists()


# ---- Images of hostile sizes ----


def test_an_image_much_longer_than_wide_is_refused(start, tmp_path):
    """Resized to a short side of 256 pixels, one of 2 x 3000 takes 295 MB, and eight of them are read at a time."""
    tree = make_webvision(tmp_path / "data", noise=0, sides=(16, 24))
    image = image_of(WEBVISION, tree, 4)
    Image.new("RGB", (2, 3000)).save(image, "JPEG")
    status, error = start(WEBVISION)
    said = f"error: {image}: 2 x 3000 pixels, one side over {MAX_RATIO} times the other ("
    assert status == 1 and error.count("\n") == 1 and error.startswith(said) and "--skip_bad_images" in error


def test_the_longest_image_that_is_read_takes_little_memory(tmp_path):
    """The bound would not be one."""
    Image.new("RGB", (MAX_RATIO, 1)).save(tmp_path / "x.jpg")
    image = read(str(tmp_path / "x.jpg"), Boundary(tmp_path))
    assert Views(256, 224).resized(image).nbytes == MAX_RATIO * 256 * 256 * 3 < 50e6


def jpeg_of(side: int) -> bytes:
    """A JPEG whose header claims side x side pixels, with the data of few."""
    frame = b"\xff\xc0\x00\x0b\x08" + side.to_bytes(2, "big") * 2 + b"\x01\x01\x11\x00"
    return b"\xff\xd8" + frame + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + b"\0" * 20 + b"\xff\xd9"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_600, 65_500])
def test_a_jpeg_that_claims_an_absurd_size_is_not_decoded(tmp_path, side):
    """A hundred bytes would take gigabytes of every worker's memory."""
    (tmp_path / "x.jpg").write_bytes(jpeg_of(side))
    with pytest.raises(BadImage, match="pixels"):
        read(str(tmp_path / "x.jpg"), Boundary(tmp_path))


def test_a_file_that_pillow_would_start_a_program_for_is_no_image(tmp_path, monkeypatch):
    """PostScript under the name of a photo: Pillow hands it to Ghostscript, a program with holes of its own."""
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "EPS"  # so Pillow alone would take it
    with pytest.raises(BadImage, match="not an image"):
        read(str(tmp_path / "x.jpg"), Boundary(tmp_path))


# ---- Workers ----


@BOTH
def test_a_worker_killed_in_an_epoch_loses_that_epoch_alone(start, script, tmp_path, monkeypatch):
    """The kernel kills a worker for want of memory at night: the run must say so, and end as if that had not been."""
    script.make(tmp_path / "data", noise=0, sides=(16, 24))
    flags = ["--workers", "1"] + (["--keep_images", "no"] if script is CLOTHING1M else [])
    assert start(script, *flags, "--run_dir", str(tmp_path / "straight"))[0] == 0
    train_epoch = script.main.train_epoch

    def train_after_a_kill(*args, **kwargs):
        for worker in multiprocessing.active_children():
            worker.kill()
        return train_epoch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(script.main, "train_epoch", train_after_a_kill)
        status, error = start(script, *flags)
    line = error.splitlines()[-1]
    assert status == 1 and line.startswith("error: a worker that reads images died (") and "--workers" in line
    assert "the same command then continues after the last finished epoch" in line
    assert len(read_records(tmp_path / "run")) == 1
    assert start(script, *flags)[0] == 0
    assert_equal(last_state(tmp_path / "run"), last_state(tmp_path / "straight"))
