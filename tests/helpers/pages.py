"""HTML pages, CSV files and error messages, read back."""

import base64
import csv
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def refused(ended: tuple[int, str, str], *expected: object) -> None:
    """Exit status 1 and one line that contains each of `expected`."""
    status, _, error = ended
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(str(words) in error for words in expected), error


HOSTILE = '"><script>alert(1)</script>'
VOID = {"meta", "img", "input", "br"}


class Reader(HTMLParser):
    """Checks that elements are closed in order; keeps their attributes and the text that is shown."""

    def __init__(self, content: str):
        super().__init__()
        self.open, self.elements, self.shown = [], [], []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def assert_self_contained(content: str) -> Reader:
    """No address outside the file but its neighbours, each image a data URI, no script but the page's own, and a policy
    that admits no other."""
    read = Reader(content)
    [policy] = [meta["content"] for meta in read.all("meta") if "http-equiv" in meta]
    [script] = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy and "img-src data:;" in policy
    assert [s for s in read.all("script") if s.get("type") != "application/json"] == [{}]
    images = [image.get("src", "data:image/") for image in read.all("img")]  # that of a <template> has none
    assert images and all(image.startswith("data:image/") for image in images)
    addresses = [v for _, attributes in read.elements for k, v in attributes.items() if k in ("src", "href")]
    names = {"label_issues.csv", "suspects.csv", "cleaned_labels.csv", "metrics.jsonl"}
    names |= {"review.html", "review-2.html", "review-3.html"}
    assert {address for address in addresses if not address.startswith("data:")} <= names
    assert not re.search(r"https?://|url\(|@import", content)
    assert not [k for _, attributes in read.elements for k in attributes if k.startswith("on")]
    return read
