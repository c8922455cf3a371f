"""Which labels look wrong: the list against cases made by hand, and its files read back."""

import csv
import io
from dataclasses import replace

import numpy as np
import pandas
import pytest
from helpers.run_folder import CLASSES, GIVEN, LOSS, P_CLEAN, P_GIVEN, SUGGESTED, N, label_scores, make_run

from dividemix.files import csv_bytes
from dividemix.report import figures, report
from dividemix.report import issues as label_issues
from dividemix.run import scoring
from dividemix.run.folder import read_run


def issues_of(folder, **kind):
    return label_issues.find(read_run(make_run(folder / "run", **kind)))


def rows_of(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True))


# ---- Which they are ----


def test_the_list_is_made_from_mean_probabilities(tmp_path):
    """Else the list names labels that nobody would change: sample 1 is doubted, but its own class is suggested."""
    issues = issues_of(tmp_path)
    assert issues.is_issue.tolist() == [i in (0, 3, 6) for i in range(N)]
    np.testing.assert_allclose(issues.quality, P_GIVEN)
    assert issues.suggested_labels.tolist() == SUGGESTED.tolist() and (issues.wrong_share, len(issues)) == (0.25, 12)
    assert np.argsort(issues.rank)[:4].tolist() == [6, 3, 0, 1] and sorted(issues.rank) == [*range(1, N + 1)]


def test_cross_entropy_has_a_list_of_the_same_columns(tmp_path):
    """Else the baseline has no list, or one that what reads the others cannot read."""
    table = label_issues.issues_table(issues_of(tmp_path, method="ce"))
    assert table.columns.tolist() == label_issues.issues_table(issues_of(tmp_path / "b")).columns.tolist()
    assert {(row["p_clean_net1"], row["p_clean_net2"]) for row in rows_of(csv_bytes(table))} == {("", "")}


def test_against_the_truth_by_hand(tmp_path):
    """Else precision and recall in the report are not those of its list."""
    # Wrong: 0, 3, 6, 9. Listed: 0, 3, 6. After the correction 6, which has another wrong label, and 9 are wrong.
    truth = label_issues.against_truth(issues_of(tmp_path))
    counts = truth.n, truth.wrong, truth.listed, truth.listed_wrong, truth.wrong_after
    assert counts == (12, 4, 3, 3, 2) and (truth.precision, truth.recall) == (1.0, 0.75)
    empty = label_issues.Agreement(5, 0, 0, 0, 0)
    assert empty.precision is None and empty.recall is None


# ---- For the terminal ----


def test_the_summary_says_how_many_where_and_how_well(tmp_path):
    """Else the first numbers that the user reads are wrong, or class names move the cursor or fill the screen."""
    issues = issues_of(tmp_path)
    lines = label_issues.summary(issues)
    assert lines[0].startswith("labels: 3 of 12 look wrong (25.0%)") and "in-sample" in lines[0]
    assert "25.0 %" in lines[1] and "12.5" in lines[1] and "about 75 %" in lines[1]
    assert "share is higher" in label_issues.estimate(replace(issues, relabelled=True))
    assert "corrected" not in lines[1]
    assert lines[2] == "  by given class: dog (3 of 8)"
    assert all(words in lines[3] for words in ("precision 100.0%", "recall 75.0%", "33.3% as given", "16.7%"))
    classes = [f"c\x1b[2J\n{k}" for k in range(15)]
    changed = {"given_labels": np.arange(N), "is_issue": np.ones(N, bool), "class_names": classes}
    lines = label_issues.summary(replace(issues, **changed))
    assert all(line.isprintable() for line in lines)
    assert lines[2].count("(1 of 1)") == 10 and lines[2].endswith("2 more classes (2 of 2)")


def test_warnings(tmp_path):
    """All 503 shirts of Fashion-MNIST were listed in a run: whoever drops what is listed has no such class left. Nor
    may a list that means nothing, or that does harm, look like the others."""
    issues = issues_of(tmp_path)
    assert label_issues.warnings(issues) == []
    for listed, of_cat, named in ((2, 19, [0]), (20, 19, [0, 1]), (1, 12, [0]), (9, 12, [])):
        given = np.repeat([0, 1, 2], [20, 21, 4])
        is_issue = np.concatenate([np.arange(20) < of_cat, np.arange(21) < listed, np.full(4, listed > 2)])
        changed = {"given_labels": given, "suggested_labels": given, "is_issue": is_issue, "true_labels": None}
        lines = label_issues.warnings(replace(issues, index=np.arange(45), **changed))
        assert len(lines) == bool(named)
        assert [name in "".join(lines) for name in CLASSES] == [k in named for k in range(3)]
    harm = replace(issues, true_labels=issues.given_labels, failures=["the networks guess"])
    means_nothing, worse = label_issues.warnings(harm)
    assert "the networks guess" in means_nothing and "0 are wrong as given, 3 as corrected" in worse


# ---- Files ----


def test_the_files_come_back(tmp_path):
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
        "index,path,split,given_label,suggested_label,label_quality,is_label_issue,rank,loss,p_clean_net1,p_clean_net2,"
        "confidence,duplicate_of,given_class,suggested_class"
    )
    assert [row["path"] for row in rows] == names
    for i, row in enumerate(rows):
        assert (int(row["index"]), int(row["given_label"]), int(row["suggested_label"])) == (i, GIVEN[i], SUGGESTED[i])
        assert row["is_label_issue"] == str(i in (0, 3, 6))
        assert float(row["label_quality"]) == float(f"{P_GIVEN[i]:.4g}")
        assert (row["split"], int(row["rank"])) == ("train", issues.rank[i])
        assert float(row["loss"]) == float(f"{LOSS[i] + 0.25:.4g}") and len(row["loss"]) <= 6
        assert float(row["p_clean_net1"]) == P_CLEAN[i] and float(row["p_clean_net2"]) == round(P_CLEAN[i] - 0.01, 2)
        assert float(row["confidence"]) == float(f"{max(P_GIVEN[i], 0.8125 * (SUGGESTED[i] != GIVEN[i])):.4g}")
        assert (row["given_class"], row["suggested_class"]) == (classes[GIVEN[i]], classes[SUGGESTED[i]])
    suspects = [(names[i], "train", classes[GIVEN[i]], classes[SUGGESTED[i]]) for i in (6, 3, 0)]
    assert [tuple(row.values()) for row in rows_of((tmp_path / "suspects.csv").read_bytes())] == suspects
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


def test_held_out_labels_are_ranked_apart(tmp_path):
    """The networks have not learned them: their probabilities are lower, and all would come first. Their images have no
    clean probability."""
    folder = make_run(tmp_path / "run")
    held_out = np.isin(np.arange(N), [1, 2, 3])
    p_clean = np.where(held_out, np.nan, P_CLEAN)
    scores = label_scores(3) | {"held_out": held_out, "p_clean_net1": p_clean, "p_clean_net2": p_clean}
    np.savez(folder / "label_scores.npz", **scores)
    label_issues.write(label_issues.find(read_run(folder)), folder)
    rows = rows_of((folder / "label_issues.csv").read_bytes())
    assert [(row["split"], row["rank"]) for row in rows[:5]] == [
        ("train", "2"), ("val", "2"), ("val", "3"), ("val", "1"), ("train", "9")
    ]  # fmt: skip
    assert rows[1]["p_clean_net1"] == "" and [row["index"] for row in rows] == [*map(str, range(N))]
    assert [row["index"] for row in rows_of((folder / "suspects.csv").read_bytes())] == ["6", "0", "3"]


@pytest.mark.parametrize(
    ("accuracy", "averaged", "p_clean_net2", "words"),
    [
        (70.0, None, P_CLEAN, []),
        (64.0, None, P_CLEAN, ["66.7%"]),  # with the last of three epochs 66 %, no better than the largest class
        (70.0, None, 1 - P_CLEAN, ["hardly agree on which"]),
        (50.0, None, 1 - P_CLEAN, ["66.7%", "hardly agree on which"]),
        (70.0, 50.0, P_CLEAN, ["66.7%"]),  # the list is of the averaged weights
        (50.0, 80.0, P_CLEAN, []),
    ],
)
def test_a_list_that_means_nothing_says_so(tmp_path, monkeypatch, accuracy, averaged, p_clean_net2, words):
    """A run that learned nothing ends with a list, too: whoever takes its suggestions has no right labels left."""
    monkeypatch.setattr(scoring, "_LITTLE_SKILL", 0.1)
    monkeypatch.setattr(scoring, "_FEWEST", 1)
    monkeypatch.setattr(figures, "draw_all", lambda *_: {})
    folder = make_run(tmp_path / "run", accuracy=accuracy, averaged=averaged)
    np.savez(folder / "label_scores.npz", **label_scores(3) | {"p_clean_net2": p_clean_net2})
    (folder / "cleaned_labels.csv").touch()  # of an earlier end
    *_, last = report.draw(folder)
    assert all(text in last and text in (folder / "report.html").read_text() for text in words)
    assert ("NOTHING" in last) == bool(words)
    assert (folder / "cleaned_labels.csv").exists() == (not words)
    report.main([str(folder), "--export_clean", str(tmp_path / "clean")])
    assert (tmp_path / "clean" / "cleaned_labels.csv").is_file()
