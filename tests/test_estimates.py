"""Hours of runs to come, from epochs that were run here."""

from pathlib import Path

from test_measured import epoch, write

from dividemix import estimates, measured, plan, recipes
from dividemix.experiments import every_row, select
from dividemix.measured import DIVIDED, PLAIN

SIZE = {"dataset": "digits", "arch": "preresnet18", "width": 16, "batch_size": 64, "limit_train": None}
EPOCHS = recipes.SMALL_SETS["digits"]["num_epochs"]


def one(name: str, out: Path, extra: tuple = ()) -> estimates.Estimate:
    [run] = plan.plan(select(every_row(), [], [name]), 1, out, out, extra)
    return estimates.estimate(run, extra, estimates.all_in(out))


def test_the_same_rows_epochs_come_first_then_a_like_rows(tmp_path):
    """The hours would be those of another network, or of nothing."""
    assert one("digits-sym-50", tmp_path).seconds is None
    assert str(one("digits-sym-50", tmp_path)) == f"{EPOCHS} epochs; time not measured here"
    records = [epoch(0, 1, "warmup"), *(epoch(e, 3) for e in range(1, 4))]
    write(tmp_path / "digits-sym-20_seed123", records, **SIZE, warm_up=1)
    found = one("digits-sym-50", tmp_path)
    assert found.epochs == {PLAIN: 8, DIVIDED: EPOCHS - 8} and found.seconds == 8 * 2 + (EPOCHS - 8) * 4
    assert (
        str(found)
        == f"8 x 2.0 s + {EPOCHS - 8} x 4.0 s = {measured.hours(found.seconds)} (measured: digits-sym-20_seed123)"
    )
    write(tmp_path / "digits-sym-50_seed124", [epoch(0, 9, "warmup"), epoch(1, 19)], **SIZE, warm_up=1)
    assert one("digits-sym-50", tmp_path).each == {PLAIN: 10.0, DIVIDED: 20.0}
    assert one("digits-sym-50-ce", tmp_path).epochs == {PLAIN: EPOCHS, DIVIDED: 0}
    assert one("digits-sym-50-ce", tmp_path).seconds == EPOCHS * 2.0  # a warm-up epoch is the same work
    assert one("cifar10-sym-50", tmp_path).seconds is None
    assert one("digits-sym-50", tmp_path, ("--width", "8")).seconds is None
    assert one("digits-sym-50", tmp_path, ("--num_epochs", "9")).seconds == 8 * 10 + 20


def test_ablations_are_not_estimated_by_the_method(tmp_path):
    """A single network's epoch takes half as long."""
    write(tmp_path / "digits-sym-50_seed123", [epoch(0, 1)], **SIZE, warm_up=0, ablation="no_cotraining")
    assert one("digits-sym-50", tmp_path).seconds is None


def test_a_run_that_has_begun_needs_the_rest(tmp_path):
    """After a night the same estimate as before it."""
    records = [epoch(0, 1, "warmup"), epoch(1, 3)]
    write(tmp_path / "digits-sym-50_seed123", records, **SIZE, warm_up=1)
    assert one("digits-sym-50", tmp_path).epochs == {PLAIN: 6, DIVIDED: EPOCHS - 8}
    records = [epoch(e, 1) for e in range(EPOCHS)]
    write(tmp_path / "digits-sym-80_seed123", records, **SIZE, warm_up=1)
    assert str(one("digits-sym-80", tmp_path)) == "finished"


def test_wall_clock_of_several_at_once():
    """Two cards would be announced with the time of one."""
    assert estimates.wall_seconds([10, 10, 10], 1) == 30 and estimates.wall_seconds([10, 10, 10], 2) == 20
    assert estimates.wall_seconds([], 4) == 0
    assert [measured.hours(s) for s in (48, 720, 12240)] == ["48 s", "12 min", "3.4 h"]


def test_the_dry_run_has_each_command_and_the_sum(tmp_path):
    """What `--dry_run` is for: whether to start it tonight."""
    records = [epoch(0, 1799, "warmup"), epoch(1, 3599)]
    each = (8 * 1800 + (EPOCHS - 8) * 3600) / 3600  # hours of a run
    write(tmp_path / "digits-sym-20_seed123", records, **SIZE, warm_up=1)
    rows = select(every_row(), [], ["digits-sym-50", "digits-sym-80", "cifar10-sym-50", "webvision"])
    lines = estimates.dry_run(plan.plan(rows, 1, tmp_path, tmp_path, ()), (), tmp_path, 2, "with 2 at once here")
    assert sum("Train_cifar.py" in line and not line.startswith("#") for line in lines) == 3
    assert any(line.startswith("# webvision_seed123: needs WebVision in ") for line in lines)
    assert lines[-2] == "# 4 runs: 2 of known length, 0 not measured here, 2 lack data"
    assert lines[-1] == f"# those of known length: {each} h with 2 at once here"
