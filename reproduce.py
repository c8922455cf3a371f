"""The paper's tables in one command: runs any part of its experiments, and sets our numbers beside the paper's.

    python reproduce.py --list                                       # the rows, what they need, what is there
    python reproduce.py --table 1 --seeds 3 --dry_run                # the commands, and the hours that they take
    python reproduce.py --table 1 --seeds 3                          # runs them; the same command again continues
    python reproduce.py --rows 'cifar10-sym-??' --jobs_per_gpu 2     # by name; several runs share a card
    python reproduce.py --table here                                 # small sets: digits, Fashion-MNIST; hours on a CPU
    python reproduce.py --rows cifar10-sym-50 -- --num_epochs 20     # flags of the scripts: said not to be the paper's
    python reproduce.py --table all --report_only                    # results.csv, RESULTS.md, curves of what is there
    python reproduce.py --table 5 --launcher slurm --slurm_partition gpu
    python reproduce.py --smoke                                      # all of it in miniature, minutes on 2 cores

A run is the training script itself in a process of its own, with a run folder below --out_dir and its output in
logs/. What is finished is skipped, what is not is continued, what fails is reported and the rest goes on.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import dataloader_cifar
from dividemix import DivideMixError, estimates, experiments, launch, measured, options, plan, results, signals, status
from dividemix.experiments import Experiment
from dividemix.runtime import available_cores


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = options.Parser(
        prog="reproduce.py",
        description="The paper's tables: runs, and numbers beside the paper's.",
        epilog="Flags after -- go to the training scripts, like -- --num_epochs 20; such runs are said not to be the "
        "paper's.",
    )
    group = parser.add_argument_group("what")
    group.add_argument("--list", action="store_true", help="show the rows, and end")
    tables = [*experiments.TABLES, "all", experiments.SMOKE]
    group.add_argument("--table", action="append", choices=tables, help="a table's rows; may be repeated")
    group.add_argument("--rows", action="append", metavar="'GLOB'", help="rows by name; may be repeated")
    group.add_argument("--seeds", type=options.positive_int, default=1, help="runs of each row, seeds 123, 124 ...")
    group.add_argument(
        "--data_root",
        type=folder,
        default=Path(),
        help="holds cifar-10, cifar-100, data (Fashion-MNIST), Clothing1M/data and webvision",
    )
    group.add_argument("--out_dir", type=folder, default=plan.OUT_DIR, help="run folders, logs, results")
    group.add_argument("--dry_run", action="store_true", help="show the commands and the hours they take, and end")
    group.add_argument("--report_only", action="store_true", help="run nothing: write the results of what is there")
    group.add_argument("--smoke", action="store_true", help="try all of this in miniature, on digits")
    group = parser.add_argument_group("where")
    group.add_argument(
        "--jobs_per_gpu",
        type=options.positive_int,
        default=1,
        metavar="K",
        help="runs at once on a card, or on the CPU",
    )
    group.add_argument("--gpus", metavar="0,2", help="which cards (default: all that are visible)")
    group.add_argument("--launcher", choices=["local", "slurm"], default="local", help="this machine, or a SLURM queue")
    group = parser.add_argument_group("slurm")
    group.add_argument("--slurm_partition", metavar="NAME")
    group.add_argument(
        "--slurm_time",
        type=options.positive_int,
        default=1440,
        metavar="MINUTES",
        help="of a job; its runs go on in the next one",
    )
    group.add_argument("--slurm_gpus_per_node", type=int, choices=[0, 1], default=1, help="of a job")
    group.add_argument("--slurm_cpus_per_task", type=options.positive_int, default=8, metavar="N", help="of a job")
    group.add_argument("--slurm_jobs", type=options.positive_int, default=100, metavar="N", help="in the queue at once")
    group.add_argument("--slurm_extra", action="append", metavar="KEY=VALUE", help="for sbatch; may be repeated")
    args = parser.parse_args(words[:end])
    args.extra = words[end + 1 :]
    if args.table and experiments.SMOKE in args.table and (len(args.table) > 1 or args.rows):
        parser.error("--table smoke: its runs are no results; give it alone")
    if not (args.list or args.smoke or args.table or args.rows):
        parser.error("say what to run: --table 1, --rows 'cifar10-sym-*', or --list to see the rows")
    if any("=" not in word for word in args.slurm_extra or ()):
        parser.error("--slurm_extra: expected KEY=VALUE")
    return args


def folder(word: str) -> Path:
    """An argparse type."""
    return Path(word).expanduser()


def main(argv: Sequence[str] | None = None) -> None:
    """Raises DivideMixError where a run failed or none could be started, signals.Stopped where it was interrupted."""
    args = parse_args(argv)
    if args.smoke:
        from dividemix import smoke

        return smoke.run()
    tables = args.table or ([] if args.rows else ["all"])
    every = experiments.smoke_rows() if tables == [experiments.SMOKE] else experiments.every_row()
    rows = experiments.select(every, tables, args.rows or [])
    if args.list:
        return list_rows(rows, args.data_root, args.out_dir)
    runs = plan.plan(rows, args.seeds, args.data_root, args.out_dir, args.extra)
    with_others = [row for row in every if row in rows or results.outcomes(row, args.out_dir)]
    if args.report_only:
        return report(with_others, args)
    slots = make_slots(args)
    if args.dry_run:
        at_once = sum(slot.size for slot in slots)
        where = f"with {at_once} at once" + (" in the queue" if args.launcher == "slurm" else " here")
        return print(*estimates.dry_run(runs, args.extra, args.out_dir, at_once, where), sep="\n")
    tasks = launch.make_tasks(runs, args.out_dir / "logs")
    fetch(runs, args)
    stopped = run(tasks, slots, args)
    report(with_others, args)
    conclude(tasks, stopped)


def list_rows(rows: Sequence[Experiment], data_root: Path, out_dir: Path) -> None:
    """A line a row: its name, the paper's numbers, what is there of it."""
    width, table = max(len(row.name) for row in rows), ""
    for row in rows:
        if row.table != table:
            title = experiments.TABLES.get(row.table, "In miniature")
            print(f"{table and chr(10)}{title} (--table {row.table})")
            table = row.table
        begin = f"{row.run_name}_seed"  # and a number: what follows it are other flags
        own = [folder for folder in out_dir.glob(f"{begin}*") if folder.name.removeprefix(begin).isdecimal()]
        finished = sum(measured.read(folder).is_finished(row.num_epochs) for folder in own)
        notes = [f"read from {row.run}" if row.run else "", f"{finished} finished" if finished else ""]
        notes.append(experiments.DATA[row.data].missing(data_root))
        paper = " / ".join("-" if value is None else f"{value:g}" for value in row.paper.values())
        print(f"  {row.name:<{width}}  {paper:<28}  {'; '.join(filter(None, notes))}".rstrip())


def make_slots(args: argparse.Namespace) -> list[launch.Slot]:
    """Places for runs: K on each card or on the CPU, or jobs of K runs in SLURM's queue."""
    if args.launcher == "slurm":
        threads = {"OMP_NUM_THREADS": str(max(1, args.slurm_cpus_per_task // args.jobs_per_gpu))}
        return [launch.Slot(threads, args.jobs_per_gpu)] * args.slurm_jobs
    on_cpu = plan.grouped(args.extra).get("device") == ["cpu"]
    return launch.local_slots([] if on_cpu else launch.visible_cards(args.gpus), args.jobs_per_gpu, available_cores())


def parameters(args: argparse.Namespace) -> dict:
    """Of submitit's executor."""
    if args.launcher == "local":
        return {"timeout_min": 60 * 24 * 365}
    found = {"timeout_min": args.slurm_time, "cpus_per_task": args.slurm_cpus_per_task, "name": "dividemix"}
    found |= {"gpus_per_node": args.slurm_gpus_per_node} if args.slurm_gpus_per_node else {}
    found |= {"slurm_partition": args.slurm_partition} if args.slurm_partition else {}
    extra = dict(word.split("=", 1) for word in args.slurm_extra or ())
    return found | ({"slurm_additional_parameters": extra} if extra else {})


def run(tasks: Sequence[launch.Task], slots: Sequence[launch.Slot], args: argparse.Namespace) -> int:
    """Run what waits. -> the signal that ended it early, or 0"""
    on_cluster = args.launcher == "slurm"
    with status.show(on_cluster) as show:
        show.update(tasks)
        if not any(task.state == launch.WAITING for task in tasks):
            return 0
        with launch.session_folder(args.out_dir) as session:
            executor = launch.make_executor(args.launcher, session, parameters(args))
            return launch.launch(tasks, slots, executor, session, show, on_cluster)


def fetch(runs: Sequence[plan.Plan], args: argparse.Namespace) -> None:
    """For `-- --download`: once, before several runs do it in one folder."""
    if "download" in plan.grouped(args.extra):
        for name in sorted({run.experiment.data for run in runs}):
            data = experiments.DATA[name]
            if data.can_download and not data.place(args.data_root):
                dataloader_cifar.load(name, args.data_root / data.folder, download=True)


def report(rows: Sequence[Experiment], args: argparse.Namespace) -> None:
    def command(row: Experiment) -> str:
        return plan.row_command(row, args.seeds, args.data_root, args.out_dir)

    for path in results.write(rows, args.out_dir, command):
        print(path)


def conclude(tasks: Sequence[launch.Task], stopped: int) -> None:
    """Say how it ended: returns where all that could be run is finished."""
    print(launch.summary(tasks))
    failed = [task for task in tasks if task.state == launch.FAILED]
    for task in failed:
        print(f"failed: {task.run.name}: {task.note} ({os.path.relpath(task.log)})")
    if stopped:
        error = signals.Stopped(stopped)
        begun = sum(task.state == launch.STOPPED and bool(task.found and task.found.records) for task in tasks)
        error.add_note(f"the same command continues the runs that have begun ({begun}), and starts the others")
        raise error
    if failed:
        raise DivideMixError(f"{len(failed)} of {len(tasks)} runs failed; the same command tries them again")
    if all(task.state == launch.NOT_RUN for task in tasks):
        raise DivideMixError(f"nothing could be run: {'; '.join(sorted({task.note for task in tasks}))}")


if __name__ == "__main__":
    options.command_line(main)
