"""`reproduce.py --smoke`: the command itself, tried in miniature on digits. Two seeds of cross-entropy, DivideMix and
an ablation, two runs at once, and a row whose runs fail; the command is interrupted, and given once more."""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dividemix import DivideMixError, experiments, measured
from dividemix.plan import ROOT

SEEDS = 2
_WAIT = 1800  # seconds, for a machine that is busy with other things


def run() -> None:
    """Prints what the command prints, then its table. Raises DivideMixError where something is not as it should be."""
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        out_dir, begin = Path(folder, "out"), time.monotonic()
        command = [sys.executable, str(ROOT / "reproduce.py"), "--table", experiments.SMOKE, "--seeds", str(SEEDS)]
        command += ["--jobs_per_gpu", "2", "--out_dir", str(out_dir), "--", "--device", "cpu", "--no_label_scores"]
        interrupted = interrupt(command, out_dir)
        check(interrupted.returncode == 143, f"interrupted, it exits with {interrupted.returncode}, not 143")
        begun = {path.parent.name: len(measured.read(path.parent).records) for path in out_dir.glob("*/metrics.jsonl")}
        check(any(0 < n < epochs() for n in begun.values()), "no run was interrupted in the middle")

        print("\n-- the same command again", flush=True)
        again = subprocess.run(command, timeout=_WAIT, check=False)
        check(again.returncode == 1, f"with a row that fails it exits with {again.returncode}, not 1")
        check_runs(out_dir, begun)
        table = (out_dir / "RESULTS.md").read_text()
        print(f"\n{table}\nsmoke test passed in {time.monotonic() - begin:.0f} s", flush=True)


def epochs() -> int:
    return experiments.smoke_rows()[0].num_epochs


def interrupt(command: list[str], out_dir: Path) -> subprocess.Popen:
    """Start it, and stop it as soon as a run has an epoch. (Ctrl-C's signal is ignored where a shell started us in the
    background.)"""
    process = subprocess.Popen(command)
    give_up = time.monotonic() + _WAIT
    while not any(measured.text(path).count("\n") for path in out_dir.glob("*/metrics.jsonl")):
        check(process.poll() is None, f"it ended with {process.returncode} before a run had an epoch")
        if time.monotonic() > give_up:
            process.kill()
            raise DivideMixError(f"smoke test: no run had an epoch within {_WAIT} s")
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_WAIT)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise DivideMixError(f"smoke test: it did not end within {_WAIT} s of a signal") from error
    return process


def check_runs(out_dir: Path, begun: dict[str, int]) -> None:
    """What can run is finished, what had begun was continued, what cannot run is not there, and the tables say so."""
    rows = experiments.smoke_rows()
    for row in rows:
        for seed in range(experiments.FIRST_SEED, experiments.FIRST_SEED + SEEDS):
            name = f"{row.name}_seed{seed}"
            found, log = measured.read(out_dir / name), measured.text(out_dir / "logs" / f"{name}.log")
            fails = row.name.endswith("-fails")
            check(found.is_finished(row.num_epochs) != fails, f"{name} has {len(found.records)} epochs, and: {log}")
            check(not fails or "no-such-file.pt" in log, f"{name} failed for another reason: {log}")
            if 0 < begun.get(name, 0) < row.num_epochs:
                check("continuing " in log, f"{name} was not continued: {log}")
    table = (out_dir / "RESULTS.md").read_text().splitlines()
    rows_of = {row.name: [line for line in table if line.startswith(f"| {row.name} |")] for row in rows}
    for name, lines in rows_of.items():
        whole = len(lines) == 1 and ("not run" in lines[0] if name.endswith("-fails") else f"| {SEEDS} |" in lines[0])
        check(whole, f"RESULTS.md says of {name}: {lines}")


def check(sound: bool, otherwise: str) -> None:
    if not sound:
        raise DivideMixError(f"smoke test: {otherwise}")
