"""The paper's tables in one command: run any of the experiments, and see our numbers beside the paper's.

    python reproduce.py --list                                       # the rows, the data they need, finished runs
    python reproduce.py --table 1 --seeds 3                          # runs a table; --dry_run shows commands and hours
    python reproduce.py --rows 'cifar10-sym-??' --jobs_per_gpu 2     # rows by name; two runs share a card
    python reproduce.py --rows cifar10-sym-50 -- --num_epochs 20     # flags of the training script after --

Finished runs are skipped, others are continued. A run that fails is reported, and the others go on.
"""

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import dataloader_cifar
from dividemix import DivideMixError
from dividemix.reproduction import jobs, results, rows
from dividemix.run import command_line, options
from dividemix.runtime import available_cores


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = options.Parser(
        prog="reproduce.py",
        description="Run the paper's experiments, and write our numbers beside the paper's.",
        examples=["--table 1 --seeds 3", "--rows cifar10-sym-50 -- --num_epochs 20"],
        common=["list", "table", "rows", "seeds", "dry_run"],
        epilog="Flags after -- go to the training scripts. The tables show how such runs differ.",
    )
    add = parser.add_argument_group("what").add_argument
    add("--list", action="store_true", help="print the rows, and stop")
    add("--table", action="append", choices=[*rows.TABLES, "all"], help="a table's rows; may be repeated")
    add("--rows", action="append", metavar="'GLOB'", help="rows by name; may be repeated")
    add("--seeds", type=options.positive_int, default=1, help="runs of each row, seeds 123, 124 ...")
    add("--data_root", type=Path, default=Path(), help="with cifar-10, cifar-100, data, Clothing1M/data, webvision")
    add("--out_dir", type=Path, default=Path("reproduced"), help="run folders, logs, results")
    add("--dry_run", action="store_true", help="print the commands and their hours, and stop")
    add("--report_only", action="store_true", help="run nothing: write the results of the runs that exist")
    add = parser.add_argument_group("where").add_argument
    add("--launcher", choices=["local", "slurm"], default="local", help="this machine, or a SLURM queue")
    add("--jobs_per_gpu", type=options.positive_int, default=1, metavar="K", help="runs at once on a card, or the CPU")
    # submitit takes these by the same names.
    add = parser.add_argument_group("slurm").add_argument
    add("--slurm_partition", metavar="NAME")
    add("--slurm_time", type=options.positive_int, default=1440, metavar="MIN", help="of a job; then queued again")
    add("--slurm_gpus_per_node", type=int, choices=[0, 1], default=1, help="of a job")
    add("--slurm_cpus_per_task", type=options.positive_int, default=8, metavar="N", help="of a job")
    add("--slurm_extra", action="append", metavar="KEY=VALUE", default=[], help="for sbatch; may be repeated")
    args = parser.parse_args(words[:end])
    args.extra = words[end + 1 :]
    args.data_root, args.out_dir = args.data_root.expanduser(), args.out_dir.expanduser()
    if not (args.list or args.table or args.rows):
        parser.error("say what to run: --table 1, --rows 'cifar10-sym-*', or --list to see the rows")
    if any("=" not in word for word in args.slurm_extra):
        parser.error("--slurm_extra: expected KEY=VALUE")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Raises DivideMixError if a run failed or none could be started, signals.Stopped if it was interrupted."""
    args = parse_args(argv)
    chosen = rows.select(args.table or ([] if args.rows else ["all"]), args.rows or [])
    if args.list:
        return list_rows(chosen, args)
    runs = rows.plan(chosen, args.seeds, args.data_root, args.out_dir, args.extra)
    if args.dry_run:
        return dry_run(runs, args)
    waiting = [run for run in runs if not (args.report_only or run.missing or run.is_finished)]
    failed: list[str] = []
    try:
        if waiting:
            failed = launch(waiting, args)
    finally:
        print(*results.write(chosen, args.out_dir), sep="\n")
    missing = {run.name: run.missing for run in runs if run.missing and not run.is_finished}
    for line in [*(f"{name}: not run: {needs}" for name, needs in missing.items()), *failed]:
        print(line)
    if failed:
        raise DivideMixError(f"{len(failed)} of {len(runs)} runs failed; the same command tries these again")
    if len(missing) == len(runs) and not args.report_only:
        raise DivideMixError(f"nothing could be run: {'; '.join(sorted({*missing.values()}))}")


def list_rows(chosen: Sequence[rows.Row], args: argparse.Namespace) -> None:
    """Print a line for each row: its name, the paper's numbers, finished runs, missing data."""
    table = results.table_of_runs(chosen, args.out_dir)
    done = table[table.finished & (table.setting == "")].row.value_counts()
    for number, lines in itertools.groupby(chosen, lambda row: row.table):
        print(f"{rows.TABLES[number]} (--table {number})")
        for row in lines:
            notes = [f"read from {row.run_name}"] if row.run_name != row.name else []
            notes += [f"{done[row.name]} finished"] if row.name in done else []
            notes += filter(None, [rows.DATA[row.data].find(args.data_root)[1]])
            print(f"  {row.name:<31}  {results.paper_numbers(row, [*row.paper]):<28}  {'; '.join(notes)}".rstrip())


def dry_run(runs: Sequence[rows.PlannedRun], args: argparse.Namespace) -> None:
    """Print each run's command and hours, and the sum of the hours."""
    table = results.table_of_runs(rows.all_rows(), args.out_dir)
    all_hours: list[float] = []
    for run in runs:
        hours = results.hours_left(run, table)
        all_hours += [] if hours is None else [hours]
        took = "time not measured here" if hours is None else f"about {hours:.1f} hours"
        print(f"# {run.name}: {'; '.join(filter(None, (run.missing, took)))}")
        print(shlex.join(["python", os.path.relpath(run.command[1]), *run.command[2:]]))
    if all_hours:
        print(f"# about {sum(all_hours):.1f} hours for {len(all_hours)} of {len(runs)} runs, one after the other")


def launch(runs: Sequence[rows.PlannedRun], args: argparse.Namespace) -> list[str]:
    """Run all of them. -> a line for each run that failed"""
    flags = rows.grouped(args.extra)
    if "download" in flags:  # once, before several runs do it in the same folder
        for name in sorted({run.row.data for run in runs}):
            folder, missing = rows.DATA[name].find(args.data_root)
            if missing:
                dataloader_cifar.load(name, folder, download=True)
    logs = args.out_dir / "logs"
    if args.launcher == "local":
        slots = jobs.local_slots(args.jobs_per_gpu, available_cores(), flags.get("device") == "cpu")
        return jobs.launch(runs, logs, slots)
    parameters = {name: value for name, value in vars(args).items() if name.startswith("slurm_") and value}
    parameters["slurm_additional_parameters"] = dict(word.split("=", 1) for word in parameters.pop("slurm_extra", []))
    executor = jobs.slurm_executor(args.out_dir / "slurm", **parameters)
    slots = [jobs.threads(args.slurm_cpus_per_task // args.jobs_per_gpu)] * len(runs)
    return jobs.launch(runs, logs, slots, args.jobs_per_gpu, executor)


if __name__ == "__main__":
    command_line(main, "the same command continues its runs")
