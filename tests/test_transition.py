"""The transition matrix: what is printed and what is saved."""

import csv
import io

import numpy as np
import pytest

from dividemix.transition import count, describe, rates

NAMES = ["cat", "dog", "truck"]
TRUTH = np.array([0, 0, 0, 0, 1, 1])
GIVEN = np.array([0, 0, 0, 1, 2, 1])


def table(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_rows_are_true_classes_and_add_up_to_one():
    """A transposed matrix, or one normalised the other way, is another statement about the labels."""
    counts = count(TRUTH, GIVEN, 3)
    np.testing.assert_array_equal(counts, [[3, 1, 0], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(rates(counts), [[0.75, 0.25, 0], [0, 0.5, 0.5], [np.nan] * 3])


def test_a_small_matrix_is_printed_whole():
    """Else the user does not see which classes are confused."""
    lines, _ = describe(TRUTH, GIVEN, NAMES)
    assert lines == [
        "given label (column), % of each true class (row):",
        "            0     1     2",
        "0 cat    75.0  25.0     .",
        "1 dog       .  50.0  50.0",
        "2 truck  no samples",
    ]
    assert describe(TRUTH, GIVEN, ["0", "1", "2"])[0][2] == "0  75.0  25.0     ."


def test_many_classes_are_summed_up_in_a_line():
    """Else 100 lines of 100 numbers hide what the run says."""
    truth = np.repeat(np.arange(20), 10)
    given = truth.copy()
    given[:4] = 7  # of class 0
    given[10:12] = 0  # of class 1
    lines, _ = describe(truth, given, [f"c{c}" for c in range(20)])
    assert lines == [
        "given labels: 3.0% wrong; right from 60.0% of c0 to 100.0% of c2; most frequent flips: c0 -> c7 40.0%, "
        "c1 -> c0 20.0%"
    ]
    assert describe(truth, truth, [f"c{c}" for c in range(21)])[0][0].endswith("most frequent flips: none")


def test_the_file_holds_counts_and_rates_by_name():
    """Else a notebook that reads transition.csv draws nothing, or the wrong classes."""
    rows = table(describe(TRUTH, GIVEN, ["cat", 'a "dog", large', "truck"])[1])
    assert [row["true_class"] for row in rows] == ["cat", 'a "dog", large', "truck"]
    assert [row["true_label"] for row in rows] == ["0", "1", "2"] and [row["samples"] for row in rows] == [
        "4",
        "2",
        "0",
    ]
    assert [[row[f"count_{c}"] for c in range(3)] for row in rows] == [["3", "1", "0"], ["0", "1", "1"], ["0"] * 3]
    assert [[row[f"rate_{c}"] for c in range(3)] for row in rows] == [
        ["0.75", "0.25", "0"],
        ["0", "0.5", "0.5"],
        [""] * 3,
    ]


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\ud800", "x" * 500])
def test_names_from_a_file_do_no_harm(name):
    """A class name is whatever the data set's file holds: it must not break lines, colour a terminal or end the run."""
    lines, content = describe(TRUTH, GIVEN, [name, "dog", "truck"])
    assert len(lines) == 5 and all(line.isprintable() and len(line) < 80 for line in lines)
    assert len(table(content)) == 3


def test_a_million_classes_have_no_matrix():
    """Own data may have any number of classes: a square of them would fill the memory."""
    lines, content = describe(TRUTH, GIVEN, [""] * 10**6)
    assert lines == ["no transition matrix: it is made of up to 1000 classes, not of 1000000"] and content is None
