"""What `pip install .` gives: the command `dividemix`, all modules, the page's template."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.scripts import ROOT

from dividemix.__main__ import COMMANDS


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)


def test_help_needs_no_torch():
    """Else the first thing that a user types takes seconds."""
    code = "import sys; from dividemix.__main__ import main\n"
    code += "for words in (['--help'], ['train', '-h'], []): sys.argv = ['dividemix', *words]; main()\n"
    code += "assert not {'torch', 'pandas', 'numpy'} & sys.modules.keys()"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name.split()[-1] in done.stdout and name.split()[0] in done.stdout


def test_an_unknown_command_is_one_line():
    """Else a typing mistake ends in a traceback."""
    for words in (["trian"], ["train"], ["train", "--data_path"], ["issue", "flowers"]):
        done = run(sys.executable, "-m", "dividemix", *words, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "train cifar|" in done.stderr


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment(tmp_path):
    """Else what is installed lacks a module or the page's template, and fails far from this folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # pip would leave build/ beside the sources
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\n")
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    made = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    [wheel] = tmp_path.glob("*.whl")
    modules = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    assert any(name.endswith(".jinja") for name in zipfile.ZipFile(wheel).namelist())
    assert not [name for name in modules if name.startswith(("tests", "benchmarks", "build"))]
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = run(*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = str(python.parent / "dividemix")
    assert "train cifar|" in run(command, "--help", cwd=tmp_path).stdout
    names = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in modules]
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)\n"
    code += f"import dividemix; assert dividemix.__file__.startswith({str(tmp_path)!r}); dividemix.find_label_issues"
    done = run(str(python), "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        done = run(command, *name.split(), "--help", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: dividemix {name} "), done.stderr
        assert done.stdout.count(f"  dividemix {name} ") == 2, done.stdout[:300]
    done = run(command, "issues", os.fspath(tmp_path / "nothing"), cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: --data_path ")
