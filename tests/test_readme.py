"""Every command that the README, the scripts' docstrings and the Makefile show is one that works as written."""

import ast
import contextlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

import Train_cifar
from dividemix import DivideMixError, report

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other

SOURCES = ("Train_*.py", "reproduce.py", "dataloader_*.py", "dividemix/*.py", "benchmarks/*.py")
MODULES = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
OURS = re.compile(r"python3? +(Train_\w+\.py|reproduce\.py|benchmarks/\w+\.py|-m +dividemix\b)")


# ---- Finding commands ----


def fenced_blocks(markdown: str) -> list[str]:
    return [block[1] for block in re.findall(r"^ *(```|~~~)[^\n]*\n(.*?)^ *\1 *$", markdown, re.MULTILINE | re.DOTALL)]


def simple_commands(text: str) -> list[list[str]]:
    """The words of each shell command in `text`: continuations joined, prompts, comments and `VAR=value` dropped, lines
    split at ; && || | and &. Lines that no shell can read (a program's output) are left out."""
    commands = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        lexer = shlex.shlex(re.sub(r"^\s*[$>%] ", "", line), posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # an apostrophe in a sentence
            words = [] if not OURS.search(line) else pytest.fail(f"no shell can read: {line}")
        command: list[str] = []
        for word in [*words, ";"]:
            if re.fullmatch("[;&|]+", word):
                commands.append(command)
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):
                command.append(word)
    return [command for command in commands if command]


def runs_python_or_make(command: list[str]) -> bool:
    return re.fullmatch(r"(.*/)?(python[\d.]*|make|torchrun)", command[0]) is not None


# ---- Checking one ----


def check(command: list[str]) -> None:
    """Fails, or raises, for a command that would not start."""
    program, *arguments = command
    if program == "torchrun":  # by its own parser, which takes a script's flag for one of its own where it can
        parsed = get_args_parser().parse_args(arguments)
        arguments = [parsed.training_script, *parsed.training_script_args]
        assert arguments[0] != "Train_cifar.py", "which trains on one card"
    if program == "make":
        targets = [*filter(lambda word: not word.startswith("-") and "=" not in word, arguments)]
        assert targets, "make without a target"
        dry = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
    elif arguments[:2] == ["-m", "dividemix.report"]:
        check_arguments(parse_report, arguments[2:])
    elif arguments[:2] in (["-m", "dividemix.predict"], ["-m", "dividemix.export"]):
        check_arguments(importlib.import_module(arguments[1]).parse_args, arguments[2:])
    elif arguments[0] == "-m":
        assert arguments[1] in ("venv", "pip", "pytest"), f"unknown module {arguments[1]}"
    elif re.fullmatch(r"Train_\w+\.py|reproduce\.py|benchmarks/\w+\.py", arguments[0]):
        assert (ROOT / arguments[0]).is_file(), f"unknown script {arguments[0]}"
        module = arguments[0].removesuffix(".py").replace("/", ".")
        check_arguments(importlib.import_module(module).parse_args, arguments[1:])
        if "--" in arguments:  # flags that are handed on
            check_arguments(Train_cifar.parse_args, arguments[arguments.index("--") + 1 :])
    else:
        assert arguments[0] == "img/framework.py" and (ROOT / arguments[0]).is_file(), f"unknown script {arguments[0]}"


def check_arguments(parse, arguments: list[str]) -> None:
    """`...` stands for a value after a flag that takes one, and for more flags elsewhere."""
    with_values = [word for i, word in enumerate(arguments) if word != "..." or arguments[i - 1].startswith("--")]
    without = [word for word in arguments if word != "..."]
    for words in (with_values, without):
        try:
            parse(words)
            return
        except SystemExit as error:
            failure = error
    raise AssertionError("its flags do not parse") from failure


def parse_report(arguments: list[str]) -> None:
    """The report's command line; no run is read and no figure drawn."""
    parsed = DivideMixError("the command line is sound")
    with mock.patch.object(report, "read_run", side_effect=parsed), contextlib.suppress(DivideMixError):
        report.main(arguments)


def check_all(text: str, where: str) -> int:
    commands = [command for command in simple_commands(text) if runs_python_or_make(command)]
    for command in commands:
        try:
            check(command)
        except (AssertionError, SystemExit) as error:
            pytest.fail(f"{where}: {shlex.join(command)}: {error}")
    shown = len(OURS.findall(re.sub(r"(?<!\S)#.*", "", re.sub(r"\\\n\s*", " ", text))))
    parsed = sum(OURS.match(f"python {' '.join(command[1:])}") is not None for command in commands)
    assert parsed == shown, f"{where}: {shown} commands are shown, only {parsed} of them on a line of their own"
    return len(commands)


# ---- The tests ----


def test_every_command_of_the_readme_parses():
    """Else the first thing that a new user copies ends in an error."""
    blocks = fenced_blocks((ROOT / "README.md").read_text())
    text = "\n".join(blocks)
    assert sum(check_all(block, "README.md") for block in blocks) >= 4
    for expected in ("make demo", "make test", "Train_cifar.py"):
        assert expected in text, f"README.md shows no `{expected}`"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_command_of_a_docstring_parses(path):
    """Else the commands at the head of a script, which replace the manual for most users, cannot be copied."""
    found = check_all(ast.get_docstring(ast.parse(path.read_text())) or "", path.name)
    assert found or not path.name.startswith("Train_"), f"{path.name} shows no command"


def test_every_command_that_the_makefile_runs_parses():
    """Else `make demo`, the first thing that anybody tries, stops at a flag that was renamed."""
    dry = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert check_all("\n".join(line for line in dry.stdout.splitlines() if OURS.search(line)), "make demo") >= 3


@pytest.mark.parametrize(
    "text",
    [
        "python Train_nothing.py --r 0.5",
        "python3 other.py",
        "$ python Train_cifar.py --rate 0.5",
        "python Train_cifar.py --r 5",
        "python Train_cifar.py \\\n    --dataset cifar11  # comment",
        "cd x && .venv/bin/python Train_cifar.py --num-epochs 3",
        "CUDA_VISIBLE_DEVICES=1 python Train_cifar.py --lr",
        "python -m dividemix.nothing a",
        "python -m dividemix.report",
        "python -m dividemix.predict checkpoint/a",
        "python -m dividemix.export checkpoint/a model.pt2 --weights first",
        "make nothing",
        "some text python Train_cifar.py --r 0.5",
        "python Train_cifar.py --id 'open",
        "python benchmarks/bench_cifar.py --rate 1",
        "torchrun --nproc_per_node=2 -- Train_cifar.py --r 0.5",
        "python reproduce.py --table 7",
        "python reproduce.py --table 1 -- --dataset cifar11",
        "python benchmarks/accuracy_pairs.py --seeds 2 -- --dataset cifar11",
    ],
)
def test_the_check_itself_finds_wrong_commands(text):
    """Else the tests above pass whatever the README says."""
    with pytest.raises(pytest.fail.Exception if "some text" not in text else AssertionError):
        check_all(text, "here")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("$ python Train_cifar.py --r 0.5   # 50 %, it's symmetric\nepoch 0/299 warmup | Lx 2.1 it's output", 1),
        ("python Train_cifar.py \\\n  --r 0.5 \\\n  --id a\nmake demo", 2),
        ("python Train_cifar.py ... --method ce\npython Train_cifar.py --data_path ... --r 0.8", 2),
        ("git clone x && cd x && make demo PYTHON=python3.11", 1),
        (".venv/bin/python -m dividemix.report checkpoint/a checkpoint/b | tee report.txt", 1),
        ("CUDA_VISIBLE_DEVICES=1 python Train_cifar.py --dataset digits --fresh &", 1),
        ("error: cifar10 not found\ncheckpoint/", 0),
    ],
)
def test_the_check_itself_accepts_sound_commands(text, count):
    """Else the check fails a README that is right, and somebody switches it off."""
    assert check_all(text, "here") == count


def test_fenced_blocks_are_found():
    """Else a block in another style of fence is never looked at."""
    markdown = "text\n```bash\na\n```\nmake nothing\n~~~\nb\n~~~\n- item\n\n  ```\n  c\n  ```\n"
    assert [block.strip() for block in fenced_blocks(markdown)] == ["a", "b", "c"]
    assert Path(ROOT / "Makefile").is_file()
