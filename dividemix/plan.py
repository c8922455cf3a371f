"""Which runs make the chosen rows: a command and a run folder for each row and seed, the same at every start."""

import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dividemix import DivideMixError
from dividemix.experiments import DATA, FIRST_SEED, Experiment
from dividemix.run import FREE_FLAGS

ROOT = Path(__file__).resolve().parent.parent  # of the scripts
_OURS = {"seed": "--seeds", "run_dir": "--out_dir", "out_dir": "--out_dir", "data_path": "--data_root"}
_OURS |= {"fresh": "another --out_dir", "id": "another --out_dir", "gpuid": "--gpus"}
_OURS |= {"noise_seed": "--noise_file; all runs have the first seed's noise"}
_NO_RUN = ("check_data", "help")  # flags that train nothing
_LONGEST = 120  # characters of the flags in a folder's name


@dataclass(frozen=True)
class Plan:
    """One run. missing: why it cannot be started, '' where it can. variant: what its folder's name has for flags that
    are not the row's."""

    experiment: Experiment
    seed: int
    folder: Path
    command: tuple[str, ...]
    num_epochs: int
    missing: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        return self.folder.name


def plan(
    experiments: Sequence[Experiment], seeds: int, data_root: Path, out_dir: Path, extra: Sequence[str]
) -> list[Plan]:
    """The runs, in the order of the rows, each folder once. extra: more flags of the scripts, which name the folders
    where they decide what is computed. Raises DivideMixError for flags that are reproduce.py's to give."""
    given = grouped(extra)
    for name, instead in _OURS.items():
        if name in given:
            raise DivideMixError(f"--{name} after --: reproduce.py gives it to each run; use {instead}")
    for name in _NO_RUN:
        if name in given:
            raise DivideMixError(f"--{name} after --: that trains nothing; give it to the script itself")
    end, plans = variant(given), {}
    for experiment in experiments:
        data = DATA[experiment.data]
        missing, place = data.missing(data_root, "download" in given), data.place(data_root) or data_root / data.folder
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            folder = out_dir / f"{experiment.run_name}_seed{seed}{end}"
            flags = [*experiment.flags, *seed_flags(experiment, seed), *extra, "--run_dir", str(folder)]
            flags = [*(["--data_path", str(place)] if data.folder else []), *flags]
            command = (sys.executable, str(ROOT / experiment.script), *flags)
            epochs = int(given["num_epochs"][0]) if given.get("num_epochs") else experiment.num_epochs
            plans.setdefault(folder, Plan(experiment, seed, folder, command, epochs, missing, end))
    return list(plans.values())


def seed_flags(experiment: Experiment, seed: int) -> list[str]:
    """The first seed is the scripts' own. The noise is the same for all."""
    if seed == FIRST_SEED:
        return []
    noise = ["--noise_seed", str(FIRST_SEED)] if experiment.script == "Train_cifar.py" else []
    return ["--seed", str(seed), *noise]


# ---------------------------------------------------------------------------------------------------------------------
# Flags behind --


def grouped(extra: Sequence[str]) -> dict[str, list[str]]:
    """['--lr', '0.1', '--no_graph'] -> {'lr': ['0.1'], 'no_graph': []}. Raises DivideMixError for words that belong to
    no flag, and for a --num_epochs or --warm_up that is no number."""
    found: dict[str, list[str]] = {}
    for word in extra:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = [value] if equals else []
        elif found:
            found[next(reversed(found))].append(word)
        else:
            raise DivideMixError(f"{word}: expected flags of the training scripts after --, like -- --num_epochs 20")
    for name, pattern in (("num_epochs", "[1-9][0-9]{0,8}"), ("warm_up", "[0-9]{1,9}")):
        if name in found and not re.fullmatch(pattern, " ".join(found[name])):
            value = " ".join(found[name])
            raise DivideMixError(f"--{name}{value and ' ' + value}: expected a whole number")
    return found


def variant(given: dict[str, list[str]]) -> str:
    """What a folder's name has for these flags: '' or '_num_epochs-20_width-16'. Left out are those that a run may
    change, but for the three that make it another one: its length and its data (whose labels it keeps)."""
    named = {"num_epochs", "noise_file", "skip_bad_images"}
    kept = sorted(name for name in given if name in named or name not in FREE_FLAGS)
    whole = "".join("_" + re.sub(r"[^\w.+-]", "-", "-".join([name, *given[name]])) for name in kept)
    if len(whole) <= _LONGEST:
        return whole
    digest = hashlib.sha256(repr([(name, given[name]) for name in kept]).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{whole[:_LONGEST]}-{digest[:8]}"


def decides(variant: str, name: str) -> bool:
    """Whether the flags in a folder's name say what this flag is, themselves or by what follows from them."""
    flags = [name, *(flag for flag, implied in _IMPLIED.items() if name in implied)]
    return len(variant) > _LONGEST or any(f"_{flag}-" in variant for flag in flags)


_BY_NOISE = ("lambda_u", "p_threshold", "loss_window", "warm_up", "noise_definition")
_IMPLIED = dict.fromkeys(("recipe", "dataset", "noise_mode", "r", "noise_file"), _BY_NOISE)
_IMPLIED |= {"learning_rate": ("lr",), "arch": ("weights",)}


# ---------------------------------------------------------------------------------------------------------------------
# Commands to copy


def shown(command: Sequence[str]) -> str:
    """A run's command for the terminal that reproduce.py was started in."""
    python, script, *flags = command
    here = shutil.which("python")
    python = "python" if here and os.path.realpath(here) == os.path.realpath(python) else python
    script = os.path.relpath(script) if Path.cwd() == ROOT else script
    return shlex.join([python, script, *flags])


OUT_DIR = Path("reproduced")  # the default


def row_command(experiment: Experiment, seeds: int, data_root: Path, out_dir: Path) -> str:
    """The reproduce.py command that makes a row, as the row says."""
    words = ["python", "reproduce.py", "--rows", experiment.name]
    words += ["--seeds", str(seeds)] if seeds > 1 else []
    words += ["--data_root", str(data_root)] if data_root != Path() else []
    words += ["--out_dir", str(out_dir)] if out_dir != OUT_DIR else []
    return shlex.join(words)
