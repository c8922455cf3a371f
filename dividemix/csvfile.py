"""CSV files that every reader takes apart as they were put together, whatever names they hold."""

import csv
from collections.abc import Iterable


class _Rows(list[str]):
    """What csv.writer writes to: a row at a time, of which it keeps all but the line end."""

    def write(self, row: str) -> None:
        self.append(row.removesuffix("\r\n"))


def to_csv(head: Iterable[str], rows: Iterable[Iterable], errors: str = "backslashreplace") -> bytes:
    """Lines that end in a line feed. errors: what becomes of a file name that is no text, as in str.encode; by default
    the file stays one that can be read.

    Written with \\r\\n and joined anew, since csv.writer quotes those characters alone that its line ends consist of: a
    bare carriage return in a name would end the line for every reader.
    """
    lines = _Rows()
    writer = csv.writer(lines)
    writer.writerow(head)
    writer.writerows(rows)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", errors)
