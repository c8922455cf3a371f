"""Several runs: groups of seeds, mean and spread, and the page of all."""

import re
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
    """Three seeds of DivideMix, two of cross-entropy, in mixed order; run_dir and workers are no settings."""
    ce, name = {"method": "ce"}, "digits_0.5_sym"
    flags = [
        (name, {"seed": 123, "accuracy": 50.0}),
        (f"{name}_ce_seed1", {"seed": 1, "accuracy": 40.0, **ce}),
        (f"{name}_seed1", {"seed": 1, "accuracy": 53.0}),
        (f"{name}_seed2", {"seed": 2, "accuracy": 51.0, "run_dir": "x", "workers": 3}),
        (f"{name}_ce", {"seed": 123, "accuracy": 42.0, **ce}),
    ]
    return [read_run(make_run(tmp_path / name, noise_seed=f["seed"], **f)) for name, f in flags]


def lists_of(runs):
    return {run.path: label_issues.find(run) for run in runs}


def sizes(folders) -> list[int]:
    return [len(group) for _, group in compare.group_by_setting([*map(read_run, folders)])]


def test_runs_that_differ_only_in_the_seed_are_one_group(runs, tmp_path):
    """Else the spread over seeds is one over settings, or over runs of another length."""
    groups = compare.group_by_setting(runs)
    assert [(name, len(group)) for name, group in groups] == [("digits_0.5_sym", 3), ("digits_0.5_sym_ce", 2)]
    longer = read_run(make_run(tmp_path / "longer", epochs=4, noise_seed=123))
    wider = read_run(make_run(tmp_path / "wider_seed1", width=32, noise_seed=123))
    groups = compare.group_by_setting([runs[0], longer, wider])
    assert [name for name, _ in groups] == ["digits_0.5_sym", "longer", "wider_seed1"]  # alone it keeps its seed
    assert compare.differing_flags(groups) == [["epochs", "3", "4", "3"], ["width", "-", "-", "32"]]
    # A recipe's 25 is a flag's 25.0
    assert sizes(make_run(tmp_path / f"u{u}", lambda_u=u) for u in (25, 25.0, 25.5)) == [2, 1]


def test_other_labels_are_another_setting(tmp_path):
    """Else the mean of a run and of one with corrected labels or other images is called a mean over seeds."""
    flags = {"paths": [b"%d.jpg" % i for i in range(N)], "command": "Train_folder.py", "truth": False}
    folders = [make_run(tmp_path / name, seed=k, id=name, **flags) for k, name in enumerate(("a", "b", "corrected"))]
    labels = dict(np.load(folders[2] / "labels.npz"))
    np.savez(folders[2] / "labels.npz", **labels | {"list_given": np.zeros(N, np.int64)})
    folders.append(make_run(tmp_path / "images", **flags | {"paths": [b"x%d.jpg" % i for i in range(N)]}))
    assert sizes(folders) == [2, 1, 1]
    folders = [make_run(tmp_path / f"s{k}", noise_file=file) for k, file in enumerate((None, None, "cleaned.json"))]
    np.savez(folders[1] / "labels.npz", index=np.arange(N), given=np.zeros(N), true=np.zeros(N), list_given=np.zeros(N))
    assert sizes(folders) == [2, 1]


def test_the_tables_by_hand(runs):
    """Else the numbers that go into a table of results are wrong, or another run's."""
    lists = lists_of(runs)
    ours, ce = compare.spread_table(compare.group_by_setting(runs), lists).to_dict("records")
    best = [52.0, 55.0, 53.0]
    assert ours["best"] == f"{sum(best) / 3:.2f} ± {statistics.stdev(best):.2f}" == "53.33 ± 1.53"
    assert ce["best"] == "43.00 ± 1.41" and (ours["seeds"], ce["seeds"]) == ("3", "2")
    assert ours["AUC, mean of nets"] == "0.8750 ± 0.0000" and ce["AUC, mean of nets"] == "-"
    assert ours["precision of the list, %"] == "100.0 ± 0.0" and ours["recall of the list, %"] == "75.0 ± 0.0"
    table = compare.run_table(runs, lists)
    listed = ["3 of 12 (25.0%)", "3 of 4 (75.0%)", "3 of 3 (100.0%)"]
    assert table.values[0].tolist() == ["digits_0.5_sym", "3", "52.00", "52.00", "51.00", "0.875/0.875", *listed]
    assert table.values[1, :6].tolist() == ["digits_0.5_sym_ce_seed1", "3", "42.00", "42.00", "41.00", "-"]
    rows = [re.split(" {2,}", line.strip()) for line in compare.console_table(table).splitlines()]
    assert rows == [table.columns.tolist(), *table.values.tolist()]


def test_a_run_with_averaged_weights_has_their_numbers(tmp_path):
    """Else averaging seems to change nothing, and the accuracy is not that of best.pt."""
    run = read_run(make_run(tmp_path / "averaged", averaged=61.5))
    assert [*compare.accuracies(run).values()] == [61.5, 61.5, 61.5, None]
    assert figures.accuracy(run).tolist() == [61.5] * 3


def test_a_run_without_truth_list_or_test_has_dashes(tmp_path):
    """Else one run of another kind takes the table with it, or validation stands below others' test accuracy."""
    folder = make_run(tmp_path / "a", truth=False, scored=False)
    (folder / "metrics.jsonl").write_text('{"epoch": 0, "val_acc": 60.0, "auc_net1": 0.5, "auc_net2": null}\n')
    run = read_run(folder)
    table = compare.run_table([run, read_run(make_run(tmp_path / "b"))], {})
    assert "validation" in table.columns[5]
    assert table.values[0].tolist() == ["a", "1", "-", "-", "-", "60.00", "0.500/-", "-", "-", "-"]
    assert table.values[1, 2:6].tolist() == ["52.00", "52.00", "51.00", "-"]
    spread = compare.spread_table([("a", [run])], {}).values.tolist()
    assert spread == [["a", "1", "-", "-", "-", "60.00", "-", "-", "-", "-"]]
    assert compare.mean_and_deviation([50.0, None]) == "-"


def test_other_validation_labels_are_told(tmp_path):
    """Else a run with corrected labels seems to gain on the first one, and only its validation labels are better. Seeds
    of one setting may well have other noise."""

    def group(name, *labels):
        folders = [make_run(tmp_path / f"{name}{k}", truth=False) for k in range(len(labels))]
        for folder, label in zip(folders, labels, strict=True):
            arrays = dict(np.load(folder / "labels.npz")) | {"list_given": np.full(N, label), "held_out": np.array([3])}
            np.savez(folder / "labels.npz", **arrays)
        return name, [*map(read_run, folders)]

    dividemix, ce, corrected = group("a", 0, 1), group("ce", 1), group("corrected", 2)
    assert compare.other_validation([dividemix, ce]) == compare.other_validation([corrected]) == ""
    assert "validation labels differ" in compare.other_validation([dividemix, ce, corrected])
    tested = "tested", [read_run(make_run(tmp_path / "tested"))]  # without held-out images
    assert compare.other_validation([dividemix, tested]) == ""
    page = compare.comparison_page([dividemix, corrected], {}, {}).decode()
    assert "validation labels differ" in Reader(page).text


def test_the_page_of_several_runs(runs, tmp_path, monkeypatch):
    """Else a name runs as a script, or runs of another setting stand beside the paper's number without a word."""
    monkeypatch.setattr(figures, "png", lambda draw: b"\x89PNG")
    paper = {"dataset": "cifar10", "noise_mode": "sym", "r": 0.2, "warm_up": 10}
    runs += [read_run(make_run(tmp_path / name, **paper, lambda_u=u)) for name, u in (("as paper", 0), ("b", 25))]
    runs.append(read_run(make_run(tmp_path / "<script>alert(1)<", note=HOSTILE)))
    groups = compare.group_by_setting(runs)
    drawn = figures.draw_comparison(groups, tmp_path / "figures")
    read = assert_self_contained(compare.comparison_page(groups, lists_of(runs), drawn).decode())
    assert "digits_0.5_sym 3 53.33 ± 1.53" in read.text and len(read.all("img")) == len(drawn) == 5
    assert f"note - - - - {HOSTILE}" in read.text and "method dividemix ce dividemix" in read.text
    assert "b differs from the paper's setting: --lambda_u 25 (paper: 0)" in read.text
    assert "as paper differs" not in read.text
    assert "±" not in Reader(compare.comparison_page(groups[2:], {}, drawn).decode()).text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """The same setting in two --out_dir: else two rows, and two curves, have one name."""
    paths = [tmp_path / "bf16" / "digits", tmp_path / "fp32" / "digits", tmp_path / "fp32" / "other"]
    assert compare.distinct_names(paths) == ["bf16/digits", "fp32/digits", "other"]
    assert compare.distinct_names([tmp_path / "a", tmp_path / "b" / "a"])[1] == "b/a"
