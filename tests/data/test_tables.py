"""Tables of images: which row and column a value is of, whatever program wrote the file, and what is refused."""

from pathlib import Path

import pandas
import pytest
from helpers.errors import assert_refused

from dividemix.data.tables import find_files, read_table


def written(folder: Path, content: bytes | str) -> Path:
    path = folder / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path, *flags: str | None) -> list[tuple]:
    """(line, path, label, ...) of each row."""
    return [*read_table(path, *flags).rows.itertuples(name=None)]


def test_rows_and_their_lines(tmp_path):
    """Rows would go to other labels, or a line number point to another row."""
    content = '\ufeffid,Label , PATH,note\r\n7,"two words",a.jpg,x\r\n'
    content += '\n , ,\n8, 3 ,"b ""c"", d.jpg",y\n9,"x",é.jpg\n,,,\n'
    expected = [(2, "a.jpg", "two words"), (5, 'b "c", d.jpg', "3 "), (6, "é.jpg", "x")]
    assert rows_of(written(tmp_path, content)) == expected
    path = written(tmp_path, '\n\nlabel,note,path\na,"one\r\n\ntwo",1.jpg\nb,,2.jpg\r\nc,"\r",3.jpg\nd,"x",4.jpg')
    assert [row[0] for row in rows_of(path)] == [4, 7, 8, 10]  # of the line that a row begins in
    assert rows_of(written(tmp_path, "path,label\ra.jpg,1\rb.jpg,2\r")) == [(2, "a.jpg", "1"), (3, "b.jpg", "2")]


ROWS = [
    (2, "a/1.jpg", "01"),
    (3, "a, b;c/2.jpg", "NA"),
    (4, "é/3.jpg", "None"),
    (5, "4.jpg", "1.0"),
    (6, "5.jpg", "nan"),
]


@pytest.mark.parametrize("delimiter", ",;\t")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_what_spreadsheets_write(tmp_path, delimiter, encoding):
    """A class 01 would become 1, and NA no class at all; or the table of another program not be read."""
    rows = "".join(f'"{path}"{delimiter}{label}{delimiter}0,5\r\n'.replace("0,5", '"0,5"') for _, path, label in ROWS)
    text = f"path{delimiter}label{delimiter}score\r\n{rows}"
    bom = "\ufeff" if encoding == "utf-16-be" else ""
    assert rows_of(written(tmp_path, (bom + text).encode(encoding))) == ROWS


@pytest.mark.parametrize(
    ("head", "columns"),
    [
        ("filename,class,score", "filename, class"),
        (",Image Path,category", "Image Path, category"),  # an index, as pandas writes it
        ("index,path,label,was", "path, label"),  # cleaned_labels.csv
        ("path,label,class,confidence", "path, label"),  # predictions.csv
        ("file,path,target,label", "path, label"),
        ("id;x,img,label", "img, label"),  # more columns with commas
    ],
)
def test_columns_are_found_by_their_names(tmp_path, head, columns):
    """A user would have to rename columns first, or another column be taken for the labels, unsaid."""
    names = [name.strip() for name in head.split(",")]
    table = read_table(written(tmp_path, f"{head}\n{','.join(map(str, range(len(names))))}\n"))
    assert table.columns == f"columns {columns}"
    assert [*table.rows.iloc[0]] == [str(names.index(name)) for name in columns.split(", ")]


FLAGS = "--path_column and --label_column"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not one row"),
        ("\n path,label\n ,\n", "not one row"),
        (
            "Flowers 2024\npath,label\na.jpg,3\n",
            "line 2: more cells than line 1, which has 1 and should name the columns",
        ),
        ("Flowers\n", "or remove the line if it is a title"),
        ("path,label,split,Split\na,b,train,test\n", "line 1: several columns of splits"),
        ('path,label,note\na.jpg,cat,"big\nb.jpg,dog,\nc.jpg,dog,"x"\n', "line 4: not a row of a CSV file"),
        ('path,label\na.jpg,"big \\"cat, tiger\\""\n', "line 2: not a row of a CSV file"),
        (b"PK\3\4 label", "save it as a CSV file"),
        ("photo;label\na.jpg;3\n", f"line 1: no column of paths; the columns are photo, label: choose by {FLAGS}"),
        ("path|label\na.jpg|3\n", f"line 1: no column of paths; the columns are path|label: choose by {FLAGS}"),
        ("\npath,id\na.jpg,3\n", f"line 2: no column of labels; the columns are path, id: choose by {FLAGS}"),
        ("file,image,label\na,b,3\n", "line 1: several columns of paths; the columns are file, image, label"),
        ("path,class,target\na,b,3\n", "line 1: several columns of labels"),
        ("path,Label,label\na,b,3\n", "line 1: several columns of labels; the columns are path, Label, label"),
        ("Path,label,path\na,b,3\n", "line 1: several columns of paths"),
        ("index,path,split,given_label,given_class\n0,a,val,1,b\n", "line 1: no column of labels"),  # label_issues.csv
        ("path,split,given_class,suggested_class\na,train,b,c\n", "line 1: no column of labels"),  # suspects.csv
        ("0,a.jpg,cat\n", "line 1: several columns of labels; the columns are 1, 2, 3, since no line names them"),
        ("a.jpg,b.jpg,cat\n", "line 1: several columns of paths"),
        (b"path,label\n\na.jpg,caf\xe9\n", "line 3: not UTF-8 text"),
        ("path,label\na.jpg,cat\n".encode("utf-32"), "line 1: "),
        ("path,label\na.jpg,3\nb, c.jpg,3\n", "line 3: more cells"),
        ("path,label\na.jpg,3\nb,c,d,e.jpg,3\n", "line 3: not a row of a CSV file"),
        ('path,label\na.jpg,3\n"b.jpg,3\n', "line 3: not a row of a CSV file"),
        ("path,label," + "x" * 140_000, "line 1: not a row of a CSV file"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, expected):
    """Another column or another cell would be trained on as the label, or the mistake end in a traceback."""
    path = written(tmp_path, content)
    assert_refused(lambda: read_table(path), str(path), expected)


def test_columns_that_the_user_names(tmp_path):
    """label_issues.csv and tables without names could not be used without a spreadsheet program."""
    path = written(tmp_path, "index,path,given_class,split,suggested_class\n0,a.jpg,cat,val,dog\n")
    assert rows_of(path, None, "Suggested_Class") == [(2, "a.jpg", "dog", "val")]
    assert_refused(lambda: read_table(path, "photo"), f"{path}, line 1: no column of paths", "suggested_class")
    path = written(tmp_path, "path,Label,label,LABEL,Score,score\na.jpg,x,y,z,0,0\n")
    assert [rows_of(path, None, name)[0][2] for name in ("Label", " label ", "LABEL")] == ["x", "y", "z"]
    assert_refused(lambda: read_table(path, None, "SCORE"), "several columns of labels")
    assert_refused(lambda: read_table(path, "label", "label"), "the same column")
    path = written(tmp_path, "0\ta.jpg\tcat\n1\tb.jpg\t\n")
    assert rows_of(path, "2", "3") == rows_of(path, None, "3") == [(1, "a.jpg", "cat"), (2, "b.jpg", "")]
    assert_refused(lambda: read_table(path, None, "4"), f"{path}, line 1: no column of labels")


def test_forms_that_people_write(tmp_path):
    """Quotes would be part of a class's name after a space, and the first line of Excel be taken for the columns."""
    path = written(tmp_path, '"path", "label", n\na.jpg, "cat, big", 1\nb.jpg, 5" pot,\n')
    assert rows_of(path) == [(2, "a.jpg", "cat, big"), (3, "b.jpg", '5" pot')]
    assert rows_of(written(tmp_path, "sep=;\r\npath;label\r\na.jpg;x\r\n")) == [(3, "a.jpg", "x")]


def test_a_table_without_a_first_line_of_names(tmp_path):
    """The first image would be lost, or the file be refused."""
    path = written(tmp_path, ".\\x, y\\1.JPG;cat\n2.png;NA\n")
    assert rows_of(path) == [(1, ".\\x, y\\1.JPG", "cat"), (2, "2.png", "NA")]
    assert read_table(path).columns == "no line of column names, columns 1, 2"
    path = written(tmp_path, "cat,a.heic\ndog,b.jpg\n")  # no ending of an image that is read
    assert read_table(path, "2").rows.to_numpy().tolist() == [["a.heic", "cat"], ["b.jpg", "dog"]]
    table = read_table(written(tmp_path, "a.jpg\nb.jpg\n"), labeled=False)
    assert [*table.rows["path"]] == ["a.jpg", "b.jpg"]


def test_the_file_that_a_path_means(tmp_path):
    """A table from Windows would name no file, or an image beside the table be taken for that of the data folder."""
    for name in ("data/a/1.jpg", "data/odd\\2.jpg", "lists/3.jpg", "lists/a/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "data/gone.jpg").symlink_to("nowhere.jpg")
    places = {
        "odd\\2.jpg": ("data/odd\\2.jpg", True),
        ".\\3.jpg": ("lists/3.jpg", True),
        "..\\lists//3.jpg": ("lists/3.jpg", True),
        f"{tmp_path}/lists/3.jpg": ("lists/3.jpg", True),
        "x\\y.jpg": ("data/x/y.jpg", False),
        "gone.jpg": ("data/gone.jpg", False),
        "a": ("data/a", False),
        "/b.jpg": ("/b.jpg", False),
    }
    table, bases = tmp_path / "table.csv", [tmp_path / "data", tmp_path / "lists"]
    found = find_files(table, pandas.Series([*places, ""]), bases)
    assert found == [*((str(tmp_path / place), exists) for place, exists in places.values()), ("", False)]
    two = pandas.Series(["a/1.jpg"], index=[7])
    (tmp_path / "link").symlink_to("data")
    assert find_files(table, two, [tmp_path / "data", tmp_path / "link"]) == [(str(tmp_path / "data/a/1.jpg"), True)]
    assert_refused(lambda: find_files(table, two, bases), "line 7", str(tmp_path / "data/a/1.jpg"), "lists/a/1.jpg")
