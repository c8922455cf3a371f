"""The frame of a report page: nothing from outside is anything but text, and nothing is fetched."""

import base64
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from dividemix import page

HOSTILE = '"><script>alert(1)</script>'


@pytest.mark.parametrize("value", [HOSTILE, "' onerror='x", "a & b <i>", "]]>--><!--"])
def test_text_is_only_text(value):
    """A class called like a script would run in the browser of whoever looks at the report."""
    shown = page.text(value)
    assert not re.search("[<>\"']", shown)
    assert page.table([("head",), (value,)]).count("<td>") == 1 and value not in page.table([(value,), (value,)])
    assert value not in page.png_figure(b"", value) and value not in page.page(value, "")


def test_the_page_runs_its_own_script_alone():
    """Else a name that slipped through runs, or the slider does not, since the page itself forbids it."""
    whole = page.page("title", "body")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', whole)
    [script] = re.findall(r"<script>(.*?)</script>", whole, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy and "img-src data:;" in policy


def test_pictures_are_the_pixels():
    """Else the thumbnail beside a label is another image, or a colour is exchanged."""
    rng = np.random.default_rng(0)
    for shape, kind, tolerance in (((8, 6, 3), "png", 0), ((96, 64, 3), "jpeg", 40)):
        pixels = np.kron(rng.integers(0, 256, (shape[0] // 2, shape[1] // 2, 3)), np.ones((2, 2, 1))).astype(np.uint8)
        head, content = page.picture(pixels).split(",")
        assert head == f"data:image/{kind};base64"
        read = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)
        assert read.shape == shape and np.abs(read - pixels).mean() <= tolerance
