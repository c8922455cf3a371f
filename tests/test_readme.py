"""README, CONTRIBUTING and docs/: commands that work as written (those of docstrings and of the Makefile, too), links
that lead somewhere, the paper's numbers, the worked example, and the README's length."""

import ast
import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from helpers.runs import read_records, without_times
from helpers.scripts import ROOT, tiny
from torch.distributed.run import get_args_parser

import Train_cifar
from benchmarks import demo
from dividemix import DivideMixError, recipes
from dividemix.__main__ import COMMANDS
from dividemix.report import report

SOURCES = ("Train_*.py", "reproduce.py", "dataloader_*.py", "dividemix/**/*.py", "benchmarks/*.py")
MODULES = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]
CHANGE, RESULTS = ROOT / "docs" / "change-the-method.md", ROOT / "benchmarks" / "RESULTS.md"
COMMAND = rf"dividemix +(?:{'|'.join({name.split()[0] for name in COMMANDS})})\b"
OURS = re.compile(rf"python3? +(?:Train_\w+\.py|reproduce\.py|benchmarks/\w+\.py|-m +dividemix\b)|^\s*{COMMAND}", re.M)


# ---- Finding commands ----

FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *``` *$", re.MULTILINE | re.DOTALL)


def fenced_blocks(markdown: str) -> list[str]:
    return FENCE.findall(markdown)


def inline_code(markdown: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", markdown))


def worked_example(markdown: str) -> str:
    """The only diff of the page."""
    [diff] = re.findall(r"^```diff\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return diff


def shell_commands(text: str) -> list[list[str]]:
    """The words of each line of `text` that starts Python, make, torchrun or a command of `dividemix`; continuations
    are joined, comments and `srun` are left out."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    program = rf"(?:\S*/)?(?:python[\d.]*|make|torchrun) |{COMMAND}"
    started = [re.match(rf"\s*(?:srun .*?)?((?:{program}).*)", line) for line in lines]
    return [shlex.split(command[1], comments=True) for command in started if command]


# ---- Checking one ----


def check(command: list[str]) -> None:
    """Fails, or raises, for a command that would not start."""
    program, *arguments = ["python", "-m", *command] if command[0] == "dividemix" else command
    if program == "torchrun":  # by its own parser, which takes a script's flag for one of its own where it can
        parsed = get_args_parser().parse_args(arguments)
        arguments = [parsed.training_script, *parsed.training_script_args]
        assert arguments[0] != "Train_cifar.py", "which trains on one card"
    if program == "make":
        dry = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
    elif arguments[:3] == ["-m", "dividemix", "report"]:
        check_arguments(parse_report, arguments[3:])
    elif arguments[:2] == ["-m", "dividemix"]:
        if arguments[2] == "issues":
            arguments[2:3] = ["train", "folder", "--data_path"]
        n = 4 if arguments[2] == "train" else 3
        check_arguments(importlib.import_module(COMMANDS[" ".join(arguments[2:n])][0]).parse_args, arguments[n:])
    elif arguments[0] == "-m":
        assert arguments[1] in ("venv", "pip", "pytest"), "unknown module"
    elif re.fullmatch(r"Train_\w+\.py|reproduce\.py|benchmarks/\w+\.py", arguments[0]):
        module = arguments[0].removesuffix(".py").replace("/", ".")
        check_arguments(importlib.import_module(module).parse_args, arguments[1:])
        if "--" in arguments:  # flags that are handed on
            check_arguments(Train_cifar.parse_args, arguments[arguments.index("--") + 1 :])
    else:
        assert arguments[0] == "img/framework.py" and (ROOT / arguments[0]).is_file(), "unknown script"


def check_arguments(parse, arguments: list[str]) -> None:
    """`...` stands for a value after a flag that takes one, and for more flags elsewhere."""
    with_values = [word for i, word in enumerate(arguments) if word != "..." or arguments[i - 1].startswith("--")]
    without = [word for word in arguments if word != "..."]
    try:
        parse(with_values)
    except SystemExit:
        parse(without)


def parse_report(arguments: list[str]) -> None:
    """The report's command line; no run is read and no figure drawn."""
    parsed = DivideMixError("the command line is sound")
    with mock.patch.object(report, "read_run", side_effect=parsed), contextlib.suppress(DivideMixError):
        report.main(arguments)


def check_all(text: str, where: str) -> int:
    """-> how many commands there are"""
    commands = shell_commands(text)
    for command in commands:
        try:
            check(command)
        except (AssertionError, LookupError, ImportError, SystemExit) as error:
            pytest.fail(f"{where}: {shlex.join(command)}: {error!r}")
    shown = len(OURS.findall(re.sub(r"(?<!\S)#.*", "", re.sub(r"\\\n\s*", " ", text))))
    programs = ["dividemix" if command[0] == "dividemix" else "python" for command in commands]
    starts = [" ".join([program, *command[1:]]) for program, command in zip(programs, commands, strict=True)]
    parsed = sum(OURS.match(start) is not None for start in starts)
    assert parsed == shown, f"{where}: {shown} commands are shown, only {parsed} of them on a line of their own"
    return len(commands)


# ---- The tests ----


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_a_page_parses(page):
    """Else the first thing that a new user copies ends in an error."""
    text = page.read_text()
    if page == CHANGE:  # its commands have a flag that its example adds
        text = re.sub(r" --lambda_r [\d.]+", "", text)
    assert sum(check_all(code, page.name) for code in [*fenced_blocks(text), *inline_code(text)]) >= 1


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_flag_and_file_that_a_page_names_is_there(page):
    """Else the reader looks for a flag that was renamed or a module that was moved."""
    sources = "".join(path.read_text() for path in MODULES)
    text = page.read_text()
    added = worked_example(text) if page == CHANGE else ""
    for span in inline_code(text):
        for flag in re.findall(r"--\w+", span):
            is_flag = f'"{flag}"' in sources or f'("{flag[2:]}",' in sources or f'"{flag}"' in added
            assert is_flag or span.startswith("git "), f"{page.name}: `{span}`: no script has {flag}"
        if re.fullmatch(r"(dividemix|tests|benchmarks)/\S+", span):
            assert (ROOT / span).exists(), f"{page.name}: `{span}` is not there"


def test_the_readmes_file_tree_is_there():
    """Else it sends the reader to modules of an earlier version."""
    [tree] = [block for block in fenced_blocks(PAGES[0].read_text()) if "\ndividemix/\n" in block]
    names = re.findall(r"[\w*]+(?:\.py|/)(?=\s)", tree)
    assert len(names) > 20
    assert [name for name in names if not any([*ROOT.glob(name), *ROOT.glob(f"dividemix/{name}")])] == []


def anchors(markdown: str) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, RESULTS], ids=[*NAMES, "RESULTS.md"])
def test_every_link_leads_somewhere(page):
    """Else a reader who wants to know more ends on an error page, or at the top of a long one."""
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}: no such file"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}: no such heading"


def tables(markdown: str) -> list[list[str]]:
    """The cells of every row, head and rules included."""
    lines = [line for line in FENCE.sub("", markdown).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_readme_can_be_read():
    """Else it grows back into a manual of 800 lines, in which nobody finds the three commands that matter."""
    text = PAGES[0].read_text()
    assert len(text.encode()) <= 15 * 1024 and len(text.splitlines()) <= 200
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 160, "a line is a paragraph"


@pytest.mark.parametrize("page", [*PAGES, RESULTS], ids=[*NAMES, "RESULTS.md"])
def test_tables_have_short_cells_and_no_empty_rows(page):
    """A table with cells like paragraphs, or with rows that wait for a number, is no overview."""
    for cells in tables(page.read_text()):
        assert any(cells[1:]), f"{page.name}: an empty row: {cells[0]}"
        assert max(map(len, cells)) <= 140, f"{page.name}: {max(cells, key=len)}"


def test_the_readme_has_the_papers_rows():
    """A command beside another row's numbers misleads everybody who compares."""
    shown = {}
    for cells in tables(PAGES[0].read_text()):
        if command := re.fullmatch("`python (Train_.*)`", cells[1]):
            script, *flags = shlex.split(command[1])
            args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
            row = (args.dataset, args.noise_mode, args.r) if script == "Train_cifar.py" else script
            assert row not in shown
            shown[row] = [re.sub(r" \(a\)$", "", cell) for cell in cells[2:]]
            if script == "Train_webvision.py":
                assert vars(args).items() >= recipes.WEBVISION.results_with.items()
    expected = {
        (row.dataset, row.mode, row.r): [f"{row.lambda_u:g}", f"{row.best} / {row.last}", f"{row.ce_best}"]
        for row in recipes.ROWS
    }
    test, top5, imagenet, imagenet_top5 = recipes.WEBVISION.results.values()
    expected["Train_clothing1M.py"] = ["-", f"test {recipes.CLOTHING1M.results['test_acc']:.2f}", "-"]
    expected["Train_webvision.py"] = ["-", f"top-1 (top-5) {test:.2f} ({top5:.2f})", "-"]
    assert shown == expected
    assert f"top-1 (top-5) {imagenet:.2f} ({imagenet_top5:.2f})" in PAGES[0].read_text()


def test_the_pages_have_the_ablations():
    """Else a flag is compared with another row of Table 5 than its own, or with a number that has no source."""
    text = (ROOT / "docs" / "reproduce.md").read_text()
    shown = {cells[0]: cells[1] for cells in tables(text) if cells[0].startswith("`--ablation")}
    ablations = recipes.ABLATIONS.items()
    assert shown == {f"`--ablation {name}`": row.paper_name for name, row in ablations if name != "none"}
    assert "best 94.1 (sym 20 %) and 86.5 (asym 40 %) for Divide and MixMatch" in text


def test_the_diff_of_the_worked_example_applies():
    """Else who follows docs/change-the-method.md is stopped by the first command."""
    assert "git apply --recount" in CHANGE.read_text()
    apply = ["git", "apply", "--recount", "--check", "-"]
    subprocess.run(apply, cwd=ROOT, input=worked_example(CHANGE.read_text()), text=True, check=True)


@pytest.mark.slow
def test_the_worked_example_adds_a_hyper_parameter(tmp_path, no_figures):
    """Else who follows docs/change-the-method.md has a flag without effect, or other numbers without the flag."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "dividemix", tree / "dividemix", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tree)
    diff = worked_example(CHANGE.read_text())
    subprocess.run(["git", "apply", "--recount", "-"], cwd=tree, input=diff, text=True, check=True)

    def flags(name: str, *changed: str) -> list[str]:
        return tiny(tmp_path, "--run_dir", str(tmp_path / name), *changed)

    code = "import Train_cifar; Train_cifar.report.of_finished = lambda run: None\n"
    code += f"for flags in {[flags('changed', '--lambda_r', '0'), flags('default')]}: Train_cifar.main(flags)"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: two threads round differently
    subprocess.run([sys.executable, "-c", code], cwd=tree, env=one_thread, check=True)
    Train_cifar.main(flags("before"))
    before, default, changed = (
        [without_times(record) for record in read_records(tmp_path / name)] for name in ("before", "default", "changed")
    )
    assert default == before and changed[0] == before[0]  # epoch 0 is warm-up
    assert changed[1]["loss_x"] != before[1]["loss_x"] and changed[1]["penalty"] > before[1]["penalty"]


def test_every_command_of_a_docstring_parses():
    """Else the commands at the head of a script, which replace the manual for most users, cannot be copied."""
    for path in MODULES:
        commands = check_all(ast.get_docstring(ast.parse(path.read_text())) or "", path.name)
        assert commands or not path.name.startswith("Train_"), f"{path.name} shows no command"


def test_the_demo_ends_with_what_came_out_and_what_to_try(tmp_path, monkeypatch, capsys):
    """Else `make demo`, the first thing that anybody tries, fails, or names files and commands that do not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "FLAGS", "--dataset digits --r 0.5 --limit_train 60 --width 4 --warm_up 1 --num_epochs 2")
    demo.main([])
    out = capsys.readouterr().out
    assert check_all(out, "make demo") >= 5  # two runs, three to try
    found = re.search(r"lists (\d+) labels as wrong, and (\d+) of these are wrong", out)
    assert int(found[1]) >= int(found[2])
    pictures = re.findall(r"^(?:Look at:|        ) (\S+)  \(", out, re.MULTILINE)
    assert len(pictures) == 2 and all((tmp_path / path).is_file() for path in pictures)


@pytest.mark.parametrize(
    "text",
    [
        "python Train_nothing.py --r 0.5",
        "python Train_cifar.py \\\n    --dataset cifar11  # comment",
        "python -m dividemix report",
        "dividemix issues ./flowers --no_such_flag",
        "dividemix train nothing --r 0.5",
        "make nothing",
        "some text python Train_cifar.py --r 0.5",
        "torchrun --nproc_per_node=2 -- Train_cifar.py --r 0.5",
        "python reproduce.py --table 1 -- --dataset cifar11",
    ],
)
def test_the_check_itself_finds_wrong_commands(text):
    """Else the tests above pass whatever the README says."""
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        check_all(text, "here")


def test_the_hooks_have_the_pinned_ruff():
    """Else a commit is formatted by one version and refused by another."""
    [version] = re.findall(r"^ruff==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"rev: v{version}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
