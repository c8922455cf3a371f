"""Which labels look wrong: the list against cases made by hand, and its files read back."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pandas
import pytest
from helpers.run_folder import CLASSES, GIVEN, LOSS, P_CLEAN, SUGGESTED, TRUE, N, label_scores, make_run

from dividemix.files import csv_bytes
from dividemix.report import issues as label_issues
from dividemix.run import scoring
from dividemix.run.folder import read_run


def issues_of(tmp_path, **kind):
    return label_issues.find(read_run(make_run(tmp_path / "run", **kind)))


def rows_of(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(content.decode().splitlines(keepends=True)))


# ---- Which they are ----


def test_an_issue_is_doubted_and_has_another_suggestion(tmp_path):
    """Else the list names labels that nobody would change, or leaves out those that both networks doubt. Sample 1 is
    doubted, but its own class is suggested; the threshold itself is not below the threshold."""
    found = issues_of(tmp_path)
    assert found.is_issue.tolist() == [i in (0, 3, 6) for i in range(N)]
    np.testing.assert_allclose(found.quality, P_CLEAN - 0.005)
    assert found.cleaned.tolist() == [SUGGESTED[i] if i in (0, 3, 6) else GIVEN[i] for i in range(N)]
    scores = label_scores(3) | {"p_clean_net1": np.full(N, 0.4), "p_clean_net2": np.full(N, 0.6)}
    assert not scoring.label_quality(scores, GIVEN)[1].any()


def test_cross_entropy_is_judged_by_the_probability_of_the_given_label(tmp_path):
    """Else the baseline has no list, or one by a clean probability that it does not have."""
    found = issues_of(tmp_path, method="ce")
    assert found.p_clean == []
    assert found.quality.tolist() == [0.75 if SUGGESTED[i] == GIVEN[i] else 0.125 for i in range(N)]
    assert found.is_issue.tolist() == [i in (0, 3, 6, 9) for i in range(N)]


def test_the_most_doubtful_come_first(tmp_path):
    """Else the images that a user looks at are not those worth a look. Among equal qualities the larger loss decides;
    a doubted label whose own class is suggested comes after all issues."""
    found = issues_of(tmp_path)
    order = scoring.worst_first(found.quality, found.is_issue, found.loss)
    assert order[:5].tolist() == [6, 3, 0, 1, 9]


def test_against_the_truth_by_hand(tmp_path):
    """Else precision and recall in the report are not those of its list. Wrong: 0, 3, 6, 9. Listed: 0, 3, 6. After the
    suggestions 6, which has another wrong one, and 9 are wrong. All four have the largest losses."""
    found = label_issues.against_truth(issues_of(tmp_path))
    assert (found.n, found.wrong, found.listed, found.found, found.by_loss, found.wrong_after) == (12, 4, 3, 3, 4, 2)
    assert (found.precision, found.recall) == (1.0, 0.75)
    empty = label_issues.Agreement(5, 0, 0, 0, 0, 0)
    assert empty.precision is None and empty.recall is None
    assert label_issues.against_truth(issues_of(tmp_path / "b", truth=False)) is None


def test_ranking_by_loss_takes_the_largest(tmp_path):
    """Else cross-entropy's ranking, which DivideMix is compared with, is another one."""
    folder = make_run(tmp_path / "run")
    loss = np.where(np.isin(np.arange(N), [0, 3, 1, 2]), 5.0, 1.0).astype(np.float32)  # two wrong, two right ones
    np.savez(folder / "label_scores.npz", **label_scores(3) | {"loss_net1": loss, "loss_net2": loss})
    assert label_issues.against_truth(label_issues.find(read_run(folder))).by_loss == 2


def test_a_run_without_scores_has_no_list(tmp_path):
    """Else the report of a run that is not finished ends in a stack trace."""
    assert issues_of(tmp_path, scored=False) is None


def test_truth_of_other_samples_is_no_truth(tmp_path):
    """A run that goes on without damaged images has other samples than its scores: their truth would be another's."""
    folder = make_run(tmp_path / "run")
    np.savez(folder / "labels.npz", index=np.arange(N - 1), given=GIVEN[1:], true=TRUE[1:], list_given=GIVEN)
    assert label_issues.find(read_run(folder)).true is None


# ---- What is said ----


def test_the_summary_says_how_many_where_and_how_well(tmp_path):
    """Else the user reads the first numbers of the tool and they are wrong, or takes in-sample scores for a test."""
    lines = label_issues.summary(issues_of(tmp_path))
    assert lines[0] == (
        "labels: 3 of 12 look wrong (25.0%); scores are in-sample: the networks were trained on these labels"
    )
    assert lines[1] == "  by given class: dog: 3 of 8"
    assert "3 of the 3 listed are wrong (precision 100.0%), of 4 wrong ones (recall 75.0%)" in lines[2]
    assert "wrong labels 33.3%, after the suggestions 16.7%" in lines[2]
    assert lines[3] == "  by loss alone: of the 4 with the largest loss 4 are wrong (100.0%)"
    assert len(label_issues.summary(issues_of(tmp_path / "b", truth=False))) == 2


def test_a_class_that_was_not_learned_is_told_from_wrong_labels(tmp_path):
    """All 503 shirts of Fashion-MNIST were listed in a run: whoever drops what is listed has no such class left."""
    issues = issues_of(tmp_path)
    given, listed = np.repeat([0, 1, 2], [20, 20, 4]), np.repeat([True, False, True], [19, 21, 4])
    issues = replace(issues, given=given, suggested=given, is_issue=listed, true=None)
    found = label_issues.lost_classes(issues)
    assert len(found) == 1 and found[0].startswith(f"{CLASSES[0]}: 19 of 20 labels look wrong, nearly all")
    assert f"  {found[0]}" in label_issues.summary(replace(issues, index=np.arange(len(given))))


def test_many_classes_are_cut_short_and_odd_names_stay_on_their_line(tmp_path):
    """A thousand classes would push everything else off the screen; a name may hold what moves the cursor."""
    folder = make_run(tmp_path / "run", classes=[f"c\x1b[2J\n{k}" for k in range(15)])
    given = np.arange(N)
    np.savez(folder / "labels.npz", index=np.arange(N), given=given, list_given=given)
    scores = label_scores(3) | {"prediction": (given + 1).astype(np.int32)}
    np.savez(folder / "label_scores.npz", **scores | {"p_clean_net1": np.zeros(N), "p_clean_net2": np.zeros(N)})
    lines = label_issues.summary(label_issues.find(read_run(folder)))
    assert all(line.isprintable() for line in lines)
    assert lines[1].count(": 1 of 1") == 10 and lines[1].endswith("2 more classes: 2 of 2")


# ---- Files ----


def test_label_issues_csv_round_trip(tmp_path):
    """Else whoever works with the list reads other numbers than the run's: every value comes back to the bit."""
    found = issues_of(tmp_path)
    label_issues.write(found, tmp_path)
    content = (tmp_path / "label_issues.csv").read_bytes()
    assert content.splitlines()[0].decode() == (
        "index,given_label,suggested_label,label_quality,is_label_issue,loss,p_clean_net1,p_clean_net2,confidence,"
        "given_class,suggested_class"
    )
    rows = rows_of(content)
    assert len(rows) == N
    for i, row in enumerate(rows):
        assert (int(row["index"]), int(row["given_label"]), int(row["suggested_label"])) == (i, GIVEN[i], SUGGESTED[i])
        assert row["is_label_issue"] == str(i in (0, 3, 6))
        assert float(row["label_quality"]) == found.quality[i]
        assert np.float32(row["loss"]) == found.loss[i] == LOSS[i] + np.float32(0.25)
        assert float(row["p_clean_net1"]) == P_CLEAN[i] and float(row["p_clean_net2"]) == found.p_clean[1][i]
        assert np.float32(row["confidence"]) == 0.75
        assert (row["given_class"], row["suggested_class"]) == (CLASSES[GIVEN[i]], CLASSES[SUGGESTED[i]])
        flagged = float(row["label_quality"]) < 0.5 and row["suggested_label"] != row["given_label"]
        assert str(flagged) == row["is_label_issue"]  # whoever computes it anew from the file finds the same


def test_cleaned_labels_csv_round_trip(tmp_path):
    """Else the labels that somebody trains on next are not the corrected ones."""
    found = issues_of(tmp_path, paths=[b"images/%d.jpg" % i for i in range(N)])
    label_issues.write(found, tmp_path)
    rows = rows_of((tmp_path / "cleaned_labels.csv").read_bytes())
    assert rows[0].keys() == {"index", "path", "label", "was"}
    assert [int(row["label"]) for row in rows] == found.cleaned.tolist()
    assert [int(row["was"]) for row in rows] == GIVEN.tolist()
    assert [row["path"] for row in rows] == [f"images/{i}.jpg" for i in range(N)]


NAMES = [
    "a,b",
    'a"b',
    "a\nb",
    "a\rb",
    "a\r\nb",
    "\r",
    "\n",
    " a ",
    "",
    "'=1+1",
    "\u732b",
    "NA",
    "None",
    "nan",
    "01",
    "1e5",
]


def test_every_name_comes_back():
    """Else a file called with a line end, which is legal, shifts all rows below it: their labels are other images'; or
    the class 01 is the class 1, and NA is no class."""
    content = csv_bytes(pandas.DataFrame({"name": label_issues.texts(NAMES), "number": range(len(NAMES))}))
    rows = [[name, str(i)] for i, name in enumerate(NAMES)]
    assert list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True)) == [["name", "number"], *rows]
    frame = pandas.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    assert frame["name"].tolist() == NAMES


def test_plain_rows_are_plain_lines():
    """Else a file of another system's line ends, or full of quotes, is what people compare with `diff`."""
    table = pandas.DataFrame({"index": [0, 1], "path": ["a b.jpg", "c"], "loss": np.float32([0.1, 1])})
    assert csv_bytes(table) == b"index,path,loss\n0,a b.jpg,0.1\n1,c,1.0\n"


@pytest.mark.parametrize(("errors", "kept"), [("backslashreplace", b"caf\\udce9"), ("surrogateescape", b"caf\xe9")])
def test_a_name_that_is_no_text(errors, kept):
    """A list for people must be readable as a whole; one that names files for a program must keep their bytes."""
    table = pandas.DataFrame({"path": label_issues.texts(["caf\udce9"])})
    assert csv_bytes(table, errors) == b"path\n" + kept + b"\n"


HOSTILE = [b'a,"b"\n.jpg', b"\r.jpg", b"caf\xe9.jpg", "=1+1 \u732b.jpg".encode(), b"'; drop table.jpg", b"a\\udce9.jpg"]


def test_hostile_names_stay_in_their_cells(tmp_path):
    """A comma, quote, line end or byte that is no text in a file or class name must not shift the columns, or make the
    file one that cannot be read at all."""
    paths = HOSTILE + [b"%d" % i for i in range(N - len(HOSTILE))]
    found = issues_of(tmp_path, paths=paths, classes=['c,a"t', "d\nog", ""])
    content = csv_bytes(label_issues.issues_table(found))
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True))
    assert len(rows) == N and all(None not in row and None not in row.values() for row in rows)
    assert [row["path"] for row in rows[:5]] == [
        'a,"b"\n.jpg',
        "\r.jpg",
        "caf\\xe9.jpg",
        "=1+1 \u732b.jpg",
        "'; drop table.jpg",
    ]
    assert {row["given_class"] for row in rows} == {"d\nog", ""}
    assert (
        csv_bytes(label_issues.cleaned_table(found)).decode().count("\n") == N + 2
    )  # the head, and the line end in a name


def test_a_cross_entropy_list_has_the_same_columns(tmp_path):
    """Else what reads the one list fails on the other; what cross-entropy lacks is empty."""
    [ours, ce] = [
        rows_of(csv_bytes(label_issues.issues_table(issues_of(tmp_path / m, method=m)))) for m in ("dividemix", "ce")
    ]
    assert ours[0].keys() == ce[0].keys()
    assert {row["p_clean_net1"] for row in ce} == {row["p_clean_net2"] for row in ce} == {""}


def test_the_list_is_what_cleanlab_takes(tmp_path):
    """docs/own-images.md says so: CleanLearning.fit takes a frame with is_label_issue, which it uses as a mask with ~,
    and with given_label, which must be the labels; one row a sample, in their order."""
    classification = pytest.importorskip("cleanlab.classification")
    from sklearn.linear_model import LogisticRegression

    found = issues_of(tmp_path)
    label_issues.write(found, tmp_path)
    frame = pandas.read_csv(tmp_path / "label_issues.csv")
    assert frame["is_label_issue"].dtype == bool and len(frame) == N
    assert frame["label_quality"].between(0, 1).all() and frame["loss"].dtype == float
    learner = classification.CleanLearning(LogisticRegression(), verbose=False)
    learner.fit(np.eye(N), GIVEN, label_issues=frame)
    assert learner.get_label_issues()["is_label_issue"].tolist() == found.is_issue.tolist()
    assert learner.clf.coef_.shape[1] == N


def test_every_row_is_a_sample(tmp_path):
    """A comment line, or a blank one, would be a sample to every reader: what scores are is said elsewhere."""
    content = csv_bytes(label_issues.issues_table(issues_of(tmp_path))).decode()
    assert re.fullmatch(r"index,.*\n(\d+,.*\n){12}", content)


# ---- The transition matrix ----


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
