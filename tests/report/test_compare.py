"""Several runs: groups of seeds, mean and spread, and the page of all."""

import json
import statistics

import numpy as np
import pytest
from helpers.pages import HOSTILE, Reader, assert_self_contained
from helpers.run_folder import N, make_run

from dividemix.report import compare, figures
from dividemix.report import issues as label_issues
from dividemix.run.folder import read_run


@pytest.fixture
def runs(tmp_path):
    """Three seeds of DivideMix, two of cross-entropy, in mixed order."""
    ours = [("digits_0.5_sym", 123, 50.0), ("digits_0.5_sym_seed1", 1, 53.0), ("digits_0.5_sym_seed2", 2, 51.0)]
    ce = [("digits_0.5_sym_ce_seed1", 1, 40.0), ("digits_0.5_sym_ce", 123, 42.0)]
    made = []
    for (name, seed, accuracy), method in [(ours[0], "dividemix"), (ce[0], "ce"), (ours[1], "dividemix")]:
        made.append(make_run(tmp_path / name, seed=seed, noise_seed=seed, accuracy=accuracy, method=method))
    made.append(make_run(tmp_path / ours[2][0], seed=2, noise_seed=2, accuracy=51.0, run_dir="x", workers=3))
    made.append(make_run(tmp_path / ce[1][0], accuracy=42.0, method="ce", noise_seed=123))
    return [read_run(folder) for folder in made]


def agreements_of(runs):
    return {run.path: label_issues.against_truth(label_issues.find(run)) for run in runs}


def test_runs_that_differ_in_the_seed_alone_are_one_group(runs, tmp_path):
    """Else the spread over seeds is one over settings. Flags that do not change what is computed do not tell runs
    apart; how long a run trained does."""
    groups = compare.group_by_setting(runs)
    assert [(name, len(group)) for name, group in groups] == [("digits_0.5_sym", 3), ("digits_0.5_sym_ce", 2)]
    longer = read_run(make_run(tmp_path / "longer", epochs=4, noise_seed=123))
    wider = read_run(make_run(tmp_path / "wider", width=32, noise_seed=123))
    groups = compare.group_by_setting([runs[0], longer, wider])
    assert [name for name, _ in groups] == ["digits_0.5_sym", "longer", "wider"]
    assert compare.differing(groups) == [["epochs", "3", "4", "3"], ["width", "-", "-", "32"]]
    assert compare.group_by_setting([runs[2]])[0][0] == "digits_0.5_sym_seed1"  # alone it keeps its seed
    same = [read_run(make_run(tmp_path / f"s{k}", seed=k, lambda_u=value)) for k, value in enumerate((25, 25.0, 25.5))]
    assert [len(group) for _, group in compare.group_by_setting(same)] == [2, 1]  # a recipe's value, and flags


def test_other_labels_are_another_setting(tmp_path):
    """`Train_folder.py --labels corrected.csv --id corrected` beside the run before, or two folders of images: else the
    mean of the two is called a mean over seeds. The noise that a seed makes is no other setting."""
    kinds = {"paths": [b"%d.jpg" % i for i in range(N)], "command": "Train_folder.py", "truth": False}
    runs = [make_run(tmp_path / name, seed=k, id=name, **kinds) for k, name in enumerate(("a", "b", "corrected"))]
    labels = dict(np.load(runs[2] / "labels.npz"))
    np.savez(runs[2] / "labels.npz", **labels | {"list_given": np.zeros(N, np.int64)})
    runs.append(make_run(tmp_path / "other", **kinds | {"paths": [b"x%d.jpg" % i for i in range(N)]}))
    groups = compare.group_by_setting(list(map(read_run, runs)))
    assert [[run.path.name for run in group] for _, group in groups] == [["a", "b"], ["corrected"], ["other"]]
    assert "images and labels" in [row[0] for row in compare.differing(groups)]
    small = [make_run(tmp_path / f"s{k}", noise_file=file) for k, file in enumerate((None, None, "cleaned.json"))]
    np.savez(small[1] / "labels.npz", index=np.arange(N), given=np.zeros(N), true=np.zeros(N), list_given=np.zeros(N))
    assert [len(group) for _, group in compare.group_by_setting(list(map(read_run, small)))] == [2, 1]


def test_mean_and_spread_by_hand(runs):
    """Else the numbers that go into a table of results are wrong."""
    ours, ce = compare.spread_table(compare.group_by_setting(runs), agreements_of(runs)).to_dict("records")
    best = [52.0, 55.0, 53.0]
    assert ours["best"] == f"{sum(best) / 3:.2f} ± {statistics.stdev(best):.2f}" == "53.33 ± 1.53"
    assert ce["best"] == "43.00 ± 1.41" and (ours["seeds"], ce["seeds"]) == ("3", "2")
    assert ours["AUC, mean of nets"] == "0.8750 ± 0.0000" and ce["AUC, mean of nets"] == "-"
    assert ours["precision of the list, %"] == "100.0 ± 0.0" and ours["recall of the list, %"] == "75.0 ± 0.0"
    assert compare.mean_and_deviation([50.0]) == "50.00"
    assert compare.mean_and_deviation([50.0, None]) == compare.mean_and_deviation([]) == "-"


def test_the_table_has_a_row_a_run_with_its_numbers(runs):
    """Else `make demo` ends with a table that shows another run's numbers, or crashes on the CE run beside it."""
    table = compare.run_table(runs, agreements_of(runs))
    assert table.values[0].tolist() == [
        *("digits_0.5_sym", "3", "52.00", "52.00", "51.00", "0.875/0.875"),
        *("3 of 4 (75.0%)", "3 of 3 (100.0%)", "4 of 4 (100.0%)"),
    ]
    assert table.values[1, :6].tolist() == ["digits_0.5_sym_ce_seed1", "3", "42.00", "42.00", "41.00", "-"]
    lines = compare.aligned(table).splitlines()
    assert len(lines) == 6 and lines[0].startswith("run ") and lines[1].startswith("digits_0.5_sym ")


def test_a_run_without_truth_list_or_test_has_dashes(tmp_path):
    """Else one run of another kind takes the table of all runs with it, or its accuracy on the images that chose the
    epoch stands below others' on the test set, or nowhere."""
    folder = make_run(tmp_path / "a", truth=False, scored=False)
    records = [{"epoch": 0, "val_acc": 60.0, "auc_net1": 0.5, "auc_net2": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = read_run(folder)
    row = ["a", "1", "-", "-", "-", "60.00", "0.500/-", "-", "-", "-"]
    table = compare.run_table([run], {})
    assert table.values.tolist() == [row] and table.columns[5] == "validation, peak"
    mixed = compare.run_table([run, read_run(make_run(tmp_path / "b"))], {}).values.tolist()
    assert mixed[0] == row and mixed[1][2:6] == ["52.00", "52.00", "51.00", "-"]
    spread = compare.spread_table([("a", [run])], {}).values.tolist()
    assert spread == [["a", "1", "-", "-", "-", "60.00", "-", "-", "-"]]


def test_the_page_of_several_runs(runs, tmp_path, monkeypatch):
    """Else runs cannot be compared without opening one page for each, or a name runs as a script."""
    monkeypatch.setattr(figures, "png", lambda draw: b"\x89PNG")
    runs = [*runs, read_run(make_run(tmp_path / "<script>alert(1)<", note=HOSTILE))]
    groups = compare.group_by_setting(runs)
    drawn = figures.draw_comparison(groups, tmp_path / "figures")
    read = assert_self_contained(compare.comparison_page(groups, agreements_of(runs), drawn).decode())
    assert "digits_0.5_sym 3 53.33 ± 1.53" in read.text and "Mean ± standard deviation over the seeds" in read.text
    assert f"note - - {HOSTILE}" in read.text and "method dividemix ce dividemix" in read.text
    assert len(read.all("img")) == len(drawn) == 5
    alone = compare.comparison_page(groups[2:], {}, drawn).decode()
    assert "No two runs differ in the seed alone" in alone and "settings differ" not in alone


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """The same setting in two --out_dir: else two rows, and two curves, have one name."""
    paths = [tmp_path / "bf16" / "digits", tmp_path / "fp32" / "digits", tmp_path / "fp32" / "other"]
    assert compare.distinct(paths) == ["bf16/digits", "fp32/digits", "other"]
    assert compare.distinct([tmp_path / "a", tmp_path / "b" / "a"])[1] == "b/a"
    a, b = (read_run(make_run(path, precision=path.parent.name)) for path in paths[:2])
    assert compare.run_table([a, b], {})["run"].tolist() == ["bf16/digits", "fp32/digits"]
    assert [name for name, _ in compare.group_by_setting([a, b])] == ["bf16/digits", "fp32/digits"]


def test_groups_that_are_not_the_papers_setting_say_so(tmp_path):
    """Else the mean of runs of another setting is set beside the paper's number."""
    flags = {"dataset": "cifar10", "noise_mode": "sym", "r": 0.2, "warm_up": 10}
    runs = [read_run(make_run(tmp_path / name, **flags, lambda_u=u)) for name, u in (("a", 0), ("b", 25))]
    runs.append(read_run(make_run(tmp_path / "c", command="Train_clothing1M.py", lr=0.1)))
    text = Reader(compare.comparison_page(compare.group_by_setting(runs), {}, {}).decode()).text
    assert "b differs from the paper's setting: --lambda_u 25 (paper: 0)" in text
    assert "c differs from the paper's setting: " in text and "--lr 0.1 (paper: 0.002)" in text
    assert "a differs" not in text
