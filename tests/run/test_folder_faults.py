"""Odd things in and about a run folder: links, pipes, other people's files, paths without a name, file systems without
locks. A run does not overwrite what is not its own, and does not wait for ever."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.runs import begin, end_epoch, go_on, opened, validated
from helpers.scripts import end_of, tiny

import Train_cifar
from dividemix import DivideMixError, files
from dividemix.data.store import locked
from dividemix.report import report
from dividemix.run import checkpoint, run
from dividemix.run.run import lock_folder, set_aside


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: [])


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory) -> Path:
    """A run of one epoch, to be copied."""
    out = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: [])
        return Path(Train_cifar.main(tiny(out, "--num_epochs", "1"))["run_dir"])


@pytest.fixture
def begun(one_epoch, tmp_path) -> Path:
    return shutil.copytree(one_epoch, tmp_path / "run")


@pytest.fixture
def start(begun, monkeypatch, capsys):
    """Runs the command line in-process on `begun`. -> (exit status, stderr)"""

    def start(*flags: str) -> tuple[int, str]:
        capsys.readouterr()
        status = end_of(Train_cifar, tiny(begun.parent, "--run_dir", str(begun), *flags), monkeypatch)
        return status, capsys.readouterr().err

    return start


# ---- Files that are not what their names say ----


def test_links_in_a_run_folder_lead_to_no_other_file(begun, start):
    """A run folder from somebody else, to be continued: links in it overwrite its user's own files."""
    (begun.parent / "thesis").write_text("precious")
    for name in ("labels.npz", "metrics.jsonl", "best.pt", "epoch-001.pt", "histograms.jsonl"):
        (begun / name).unlink(missing_ok=True)
        (begun / name).symlink_to(begun.parent / "thesis")
    assert start()[0] == 0 and (begun.parent / "thesis").read_text() == "precious"
    assert len((begun / "metrics.jsonl").read_text().splitlines()) == 2
    for name, said in (
        ("last.json", f"error: {begun / 'last.json'} is damaged"),
        (".lock", f"error: run folder {begun} "),
    ):
        (begun / name).unlink()
        (begun / name).symlink_to(begun.parent / "thesis")
        status, error = start()
        assert status == 1 and error.startswith(said) and error.count("\n") == 1
    assert (begun.parent / "thesis").read_text() == "precious"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_noise_file_that_is_no_file(begun, start, make):
    """A pipe is waited for without a word; or a folder is said not to be there, or to be deleted."""
    make(file := begun.parent / "noise.json")
    said = "cannot be read (not a file): move it away, or name another with --noise_file\n"
    assert start("--noise_file", str(file)) == (1, f"error: noise file {file} {said}")
    own = begun / "digits_0.5_sym.json"
    own.unlink()
    make(own)
    assert start() == (1, f"error: noise file {own} {said}")


def test_a_path_that_is_not_utf_8(tmp_path):
    """A folder named on an old system: TensorBoard, an extra, ends the run with a stack trace."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with opened(folder) as this, pytest.warns(UserWarning, match="no TensorBoard events"):
        begin(this)


# ---- Checkpoints that are kept ----


def test_a_user_s_own_copies_are_left_alone(tmp_path):
    """`cp epoch-100.pt epoch-100-before-drop.pt`, and the next epoch deletes it."""
    checkpoint.save_last(tmp_path, 0, {"epoch": 0})
    shutil.copy(tmp_path / "epoch-000.pt", tmp_path / "epoch-000-mine.pt")
    for epoch in (1, 2):
        checkpoint.save_last(tmp_path, epoch, {"epoch": epoch})
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"epoch-000-mine.pt", "epoch-001.pt", "epoch-002.pt", "last.json"}


# ---- Locks ----


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Lustre without flock, some network folders: every run is refused, for another process that does not exist."""

    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with pytest.warns(UserWarning, match=r"\.lock cannot be locked \(.*No locks available"):
        lock_folder(tmp_path).release()
    with pytest.warns(UserWarning, match=r"cache\.lock cannot be locked"), locked(str(tmp_path / "cache")):
        pass


def test_a_folder_is_locked_until_the_new_one_is(tmp_path, monkeypatch):
    """A process that came just before `--fresh` moved the folder would train in it, beside the one in the new."""
    opened(tmp_path / "run").__exit__(None, None, None)
    (tmp_path / "run").mkdir()
    locked_folders = []

    def lock(folder):
        if locked_folders:
            with pytest.raises(DivideMixError, match="another process"):
                lock_folder(next(tmp_path.glob("run.*")))
        locked_folders.append(folder)
        return lock_folder(folder)

    monkeypatch.setattr(run, "lock_folder", lock)
    with opened(tmp_path / "run", fresh=True):
        assert len(locked_folders) == 2
        lock_folder(next(tmp_path.glob("run.*"))).release()


# ---- Paths ----


@pytest.mark.parametrize("path", [".", "/", "a/.."])
def test_fresh_needs_a_folder_with_a_name(path):
    """`--run_dir . --fresh` ends in a stack trace; or the folder above, with all that is in it, is moved."""
    with pytest.raises(DivideMixError, match=rf"--fresh cannot move {path} aside"):
        set_aside(Path(path))


def test_fresh_in_the_folder_itself(begun, start, monkeypatch):
    monkeypatch.chdir(begun)
    before = sorted(begun.iterdir())
    status, error = start("--run_dir", ".", "--fresh")
    assert (status, error.count("\n")) == (1, 1) and sorted(begun.iterdir()) == before


# ---- What is said ----


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("file", "done", "left"),
    [
        ("epoch-000.pt", 0, "starts again"),
        ("epoch-001.pt", 1, "continues {} with epoch 1"),
        ("best.pt", 0, "continues {} with epoch 1"),
    ],
    ids=["first checkpoint", "checkpoint", "after it"],
)
def test_a_full_disk_is_told_as_it_is(tmp_path, monkeypatch, file, done, left):
    """A user who is told of a checkpoint that does not exist deletes the wrong files to make room."""
    folder, write_state = tmp_path / "run", files.write_state

    def fill_up(path, state):
        return full() if path.name == file else write_state(path, state)

    go_on(folder, [(60.0, 60.0)] * done)
    with pytest.raises(DivideMixError) as error, opened(folder) as this:
        begin(this)
        monkeypatch.setattr(files, "write_state", fill_up)
        for _ in this.epochs(done + 2):
            end_epoch(this, validated(60.0, 60.0))
    problem = f"epoch {done} could not be written to {folder} as a whole (No space left on device)"
    assert str(error.value) == f"{problem}: make room, then the same command {left.format(folder)}"
    assert len(checkpoint.load_last(folder).get("records", [])) == ("again" not in left)


def test_ctrl_c_while_the_figures_are_drawn(begun, start, monkeypatch):
    """A run that is done is said to continue with an epoch that there is not."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "draw", interrupted)
    said = f"\ninterrupted: the same command makes the result and figures of {begun}\n"
    assert start("--num_epochs", "2") == (130, said)
    assert json.loads((begun / "result.json").read_text())["epoch"] == 1


def test_a_pipe_where_a_file_is_expected(begun, start):
    """It is waited for until a queue kills the job."""
    (begun / "last.json").rename(begun / "kept")
    os.mkfifo(begun / "last.json")
    status, error = start()
    assert status == 1 and error.startswith(f"error: {begun / 'last.json'} ") and error.count("\n") == 1
    (begun / "kept").rename(begun / "last.json")
    assert start()[0] == 0


def test_a_run_whose_path_is_not_utf_8(tmp_path, monkeypatch):
    """A folder of another age or language: its name can be used, but not printed as it is."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    assert end_of(Train_cifar, tiny(tmp_path, "--run_dir", str(folder), "--num_epochs", "1"), monkeypatch) == 0
    assert (folder / "last.json").exists()
