"""What a number comes from beside the flags: versions, and the project's commit. For args.json and checkpoints."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import torch


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"),  # to import it takes seconds
        "numpy": np.__version__,
        "scikit-learn": metadata.version("scikit-learn"),
    }


def commit() -> str | None:
    """The project's git commit, with '+changes' where the working tree differs; None outside a git checkout."""

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve().parent.parent
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
