"""What a number comes from beside the flags: versions, and the project's commit. For args.json and checkpoints."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    known = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return known | {name: metadata.version(name) for name in ("torchvision", "numpy", "scikit-learn")}


def commit() -> str | None:
    """The project's git commit, with '+changes' where the working tree differs; None outside a git checkout."""
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        result = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
