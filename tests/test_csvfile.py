"""CSV files: what goes in comes out."""

import csv
import io

import pytest

from dividemix.csvfile import to_csv

NAMES = ["a,b", 'a"b', "a\nb", "a\rb", "a\r\nb", "\r", "\n", " a ", "", "'=1+1", "\u732b", "a\r\n"]


def test_every_name_comes_back():
    """Else a file called with a line end, which is legal, shifts all rows below it: their labels are other images'."""
    content = to_csv(["name", "number"], [(name, i) for i, name in enumerate(NAMES)])
    rows = [[name, str(i)] for i, name in enumerate(NAMES)]
    assert list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True)) == [["name", "number"], *rows]
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(io.BytesIO(content), keep_default_na=False)
    assert frame["name"].tolist() == NAMES and frame["number"].tolist() == list(range(len(NAMES)))


def test_plain_rows_are_plain_lines():
    """Else a file of another system's line ends, or full of quotes, is what people compare with `diff`."""
    assert to_csv(["index", "path"], [(0, "a b.jpg"), (1, 0.1)]) == b"index,path\n0,a b.jpg\n1,0.1\n"


@pytest.mark.parametrize(("errors", "kept"), [("backslashreplace", b"caf\\udce9"), ("surrogateescape", b"caf\xe9")])
def test_a_name_that_is_no_text(errors, kept):
    """A list for people must be readable as a whole; one that names files for a program must keep their bytes."""
    assert to_csv(["path"], [("caf\udce9",)], errors) == b"path\n" + kept + b"\n"
