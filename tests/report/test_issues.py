"""Which labels look wrong: the list against cases made by hand, and its files read back."""

import csv
import io
from dataclasses import replace

import numpy as np
import pandas
import pytest
from helpers.run_folder import CLASSES, GIVEN, LOSS, P_CLEAN, SUGGESTED, TRUE, N, label_scores, make_run

from dividemix.files import csv_bytes
from dividemix.report import issues as label_issues
from dividemix.run import scoring
from dividemix.run.folder import read_run


def issues_of(folder, **kind):
    return label_issues.find(read_run(make_run(folder / "run", **kind)))


def rows_of(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True))


# ---- Which they are ----


def test_an_issue_is_doubted_and_has_another_suggestion(tmp_path):
    """Else the list names labels that nobody would change: sample 1 is doubted, but its class is suggested."""
    issues = issues_of(tmp_path)
    assert issues.is_issue.tolist() == [i in (0, 3, 6) for i in range(N)]
    np.testing.assert_allclose(issues.quality, P_CLEAN - 0.005)
    assert scoring.worst_first(issues.quality, issues.is_issue, issues.loss)[:5].tolist() == [6, 3, 0, 1, 9]
    scores = label_scores(3) | {"p_clean_net1": np.full(N, 0.4), "p_clean_net2": np.full(N, 0.6)}
    assert not scoring.label_quality(scores, GIVEN)[1].any()


def test_cross_entropy_is_judged_by_the_probability_of_the_given_label(tmp_path):
    """Else the baseline has no list, or one that what reads the others cannot read."""
    issues = issues_of(tmp_path, method="ce")
    assert issues.quality.tolist() == [0.75 if SUGGESTED[i] == GIVEN[i] else 0.125 for i in range(N)]
    assert issues.is_issue.tolist() == [i in (0, 3, 6, 9) for i in range(N)]
    table = label_issues.issues_table(issues)
    assert table.columns.tolist() == label_issues.issues_table(issues_of(tmp_path / "b")).columns.tolist()
    assert {(row["p_clean_net1"], row["p_clean_net2"]) for row in rows_of(csv_bytes(table))} == {("", "")}


def test_against_the_truth_by_hand(tmp_path):
    """Else precision and recall in the report are not those of its list."""
    # Wrong: 0, 3, 6, 9. Listed: 0, 3, 6. After the correction 6, which has another wrong label, and 9 are wrong.
    truth = label_issues.against_truth(issues_of(tmp_path))
    counts = truth.n, truth.wrong, truth.listed, truth.listed_wrong, truth.by_loss, truth.wrong_after
    assert counts == (12, 4, 3, 3, 4, 2) and (truth.precision, truth.recall) == (1.0, 0.75)
    loss = np.where(
        np.isin(np.arange(N), [0, 3, 1, 2]), 5.0, LOSS
    )  # the four largest: two wrong labels, two right ones
    assert label_issues.against_truth(replace(issues_of(tmp_path / "b"), loss=loss)).by_loss == 2
    empty = label_issues.Agreement(5, 0, 0, 0, 0, 0)
    assert empty.precision is None and empty.recall is None


def test_truth_of_other_samples_is_no_truth(tmp_path):
    """Else truth is another sample's after damaged images are left out."""
    folder = make_run(tmp_path / "run")
    np.savez(folder / "labels.npz", index=np.arange(N - 1), given=GIVEN[1:], true=TRUE[1:], list_given=GIVEN)
    assert label_issues.against_truth(label_issues.find(read_run(folder))) is None


# ---- For the terminal ----


def test_the_summary_says_how_many_where_and_how_well(tmp_path):
    """Else the first numbers that the user reads are wrong, or class names move the cursor or fill the screen."""
    issues = issues_of(tmp_path)
    lines = label_issues.summary(issues)
    assert lines[0].startswith("labels: 3 of 12 look wrong (25.0%)") and "in-sample" in lines[0]
    assert lines[1] == "  by given class: dog (3 of 8)"
    assert all(words in lines[2] for words in ("precision 100.0%", "recall 75.0%", "33.3% as given", "16.7%"))
    assert "4 of the 4" in lines[3] and "(100.0%)" in lines[3]
    classes = [f"c\x1b[2J\n{k}" for k in range(15)]
    changed = {"given_labels": np.arange(N), "is_issue": np.ones(N, bool), "class_names": classes}
    lines = label_issues.summary(replace(issues, **changed))
    assert all(line.isprintable() for line in lines)
    assert lines[1].count("(1 of 1)") == 10 and lines[1].endswith("2 more classes (2 of 2)")


def test_classes_that_were_not_learned_are_named_in_one_line(tmp_path):
    """All 503 shirts of Fashion-MNIST were listed in a run: whoever drops what is listed has no such class left."""
    issues = issues_of(tmp_path)
    for listed, named in ((2, [0]), (20, [0, 1])):
        given = np.repeat([0, 1, 2], [20, 21, 4])
        is_issue = np.concatenate([np.arange(20) < 19, np.arange(21) < listed, np.full(4, True)])
        changed = {"given_labels": given, "suggested_labels": given, "is_issue": is_issue, "true_labels": None}
        [line] = label_issues.summary(replace(issues, index=np.arange(45), **changed))[2:]
        assert [name in line for name in CLASSES] == [k in named for k in range(3)] and "(19 of 20)" in line


# ---- Files ----


def test_the_files_come_back_to_the_bit(tmp_path):
    """Else whoever works with the lists reads other numbers than the run's, or an odd name shifts the columns."""
    classes = ['c,a"t', "d\nog\udce9", ""]
    paths = [b'a,"b"\n.jpg', b"\r.jpg", b"caf\xe9.jpg", "=1+1 \u732b.jpg".encode()]
    paths += [b"%d.jpg" % i for i in range(N - len(paths))]
    issues = issues_of(tmp_path, paths=paths, classes=classes)
    label_issues.write(issues, tmp_path)
    names = [path.decode(errors="backslashreplace") for path in paths]
    classes = [name.encode("utf-8", "backslashreplace").decode() for name in classes]
    rows = rows_of((tmp_path / "label_issues.csv").read_bytes())
    assert ",".join(rows[0]) == (
        "index,path,given_label,suggested_label,label_quality,is_label_issue,loss,p_clean_net1,p_clean_net2,confidence,"
        "given_class,suggested_class"
    )
    assert [row["path"] for row in rows] == names
    for i, row in enumerate(rows):
        assert (int(row["index"]), int(row["given_label"]), int(row["suggested_label"])) == (i, GIVEN[i], SUGGESTED[i])
        assert row["is_label_issue"] == str(i in (0, 3, 6)) and float(row["label_quality"]) == issues.quality[i]
        assert np.float32(row["loss"]) == issues.loss[i] == LOSS[i] + np.float32(0.25)
        assert float(row["p_clean_net1"]) == P_CLEAN[i] and float(row["p_clean_net2"]) == issues.p_clean[1][i]
        assert np.float32(row["confidence"]) == 0.75
        assert (row["given_class"], row["suggested_class"]) == (classes[GIVEN[i]], classes[SUGGESTED[i]])
    rows = rows_of((tmp_path / "cleaned_labels.csv").read_bytes())
    assert list(rows[0]) == ["index", "path", "label", "was"] and [row["path"] for row in rows] == names
    cleaned = [SUGGESTED[i] if i in (0, 3, 6) else GIVEN[i] for i in range(N)]
    assert [(int(row["label"]), int(row["was"])) for row in rows] == list(zip(cleaned, GIVEN, strict=True))


def test_the_list_is_what_cleanlab_takes(tmp_path):
    """docs/own-images.md says so."""
    classification = pytest.importorskip("cleanlab.classification")
    from sklearn.linear_model import LogisticRegression

    issues = issues_of(tmp_path)
    label_issues.write(issues, tmp_path)
    frame = pandas.read_csv(tmp_path / "label_issues.csv")
    learner = classification.CleanLearning(LogisticRegression(), verbose=False)
    learner.fit(np.eye(N), GIVEN, label_issues=frame)
    assert learner.get_label_issues()["is_label_issue"].tolist() == issues.is_issue.tolist()


def test_the_transition_table_is_by_true_class_and_name(tmp_path):
    """Else a notebook that reads transition.csv draws nothing, a transposed matrix, or the wrong classes."""
    folder = make_run(tmp_path / "run", classes=["01", 'a "dog", large', "NA"])
    np.savez(folder / "labels.npz", index=np.arange(6), true=[0, 0, 0, 0, 1, 1], given=[0, 0, 0, 1, 2, 1])
    content = csv_bytes(label_issues.transition_table(read_run(folder)))
    frame = pandas.read_csv(io.BytesIO(content), dtype={"true_class": str}, keep_default_na=False, na_values=[""])
    assert frame["true_class"].tolist() == ["01", 'a "dog", large', "NA"]
    assert frame["true_label"].tolist() == [0, 1, 2] and frame["samples"].tolist() == [4, 2, 0]
    assert frame[[f"count_{c}" for c in range(3)]].values.tolist() == [[3, 1, 0], [0, 1, 1], [0] * 3]
    rates = [[0.75, 0.25, 0], [0, 0.5, 0.5], [np.nan] * 3]
    np.testing.assert_array_equal(frame[[f"rate_{c}" for c in range(3)]].values, rates)
    assert label_issues.transition_table(read_run(make_run(tmp_path / "b", truth=False))) is None
