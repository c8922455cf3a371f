"""The frame of a report page, and its parts: one HTML file without network, scripts from elsewhere or images beside it.

`text` is the only way in for anything that comes from a run folder; everything else takes finished HTML. A content
security policy admits this page's own script alone, so a name that slipped through would still run nothing.
"""

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STYLE = """
:root { color-scheme: light; --line: #d8dde3; --soft: #f4f6f8; --dim: #5b6672; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; color: #1b1f24; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 8px 0 2px; }
h2 { font-size: 18px; margin: 36px 0 8px; padding-top: 10px; border-top: 1px solid var(--line); }
p { margin: 6px 0 10px; max-width: 80ch; }
.dim { color: var(--dim); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 14px 0; }
.card { background: var(--soft); border-radius: 8px; padding: 8px 12px; }
.card b { display: block; font-size: 19px; line-height: 1.35; white-space: nowrap; }
.card span { color: var(--dim); font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; }
.figures img, svg { width: 100%; height: auto; max-width: 620px; display: block; }
figcaption { color: var(--dim); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 600; }
.wide td, .wide th { white-space: nowrap; overflow-wrap: normal; }
.settings { columns: 300px; column-gap: 28px; font-size: 13px; margin: 8px 0; padding: 0; list-style: none; }
.settings li { break-inside: avoid; border-bottom: 1px solid var(--line); padding: 2px 0; }
code, .settings b { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--soft); padding: 8px 12px; border-radius: 8px; white-space: pre-wrap; margin: 6px 0; }
.matrix { white-space: pre; overflow-x: auto; overflow-wrap: normal; font-size: 12px; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 12px; }
.thumbs img { width: 96px; height: 96px; object-fit: contain; background: #eef0f2; display: block; }
.thumbs figcaption { line-height: 1.35; color: inherit; }
.right { color: #00674b; } .mistaken { color: #b0420a; }
.slider { display: flex; gap: 12px; align-items: center; margin: 6px 0; }
.slider input { flex: 1; max-width: 560px; }
svg text { font-size: 13px; fill: #333; }
@media (max-width: 600px) { svg text { font-size: 20px; } }
.bars { opacity: .55; } .bars.all { fill: #999999; } .bars.clean { fill: #0072b2; } .bars.wrong { fill: #d55e00; }
.curve { fill: none; stroke-width: 2.5; } .curve.clean { stroke: #0072b2; } .curve.wrong { stroke: #d55e00; }
.axis { fill: none; stroke: #333; } .threshold { stroke: #333; stroke-width: 1.8; stroke-dasharray: 6 4; }
.key { display: inline-block; width: 12px; height: 12px; margin: 0 5px 0 12px; vertical-align: -1px; }
[hidden] { display: none !important; }
"""

# Without it, the last epoch's frame is what is shown.
SCRIPT = """
for (const box of document.querySelectorAll(".frames")) {
  const frames = [...box.querySelectorAll(".frame")];
  const input = box.querySelector("input"), shown = box.querySelector("output");
  const show = () => {
    frames.forEach((frame, i) => { frame.hidden = i !== Number(input.value); });
    shown.textContent = "epoch " + frames[input.value].dataset.epoch;
  };
  input.max = frames.length - 1;
  input.value = frames.length - 1;
  input.addEventListener("input", show);
  show();
  box.querySelector(".slider").hidden = frames.length < 2;
}
"""


def text(value: Any) -> str:
    """Anything from outside as HTML text, also within a quoted attribute."""
    return html.escape(str(value), quote=True)


def page(title: str, body: str) -> str:
    """The whole file. title: as it is, not escaped yet."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def paragraph(content: str, dim: bool = False) -> str:
    return f'<p class="dim">{content}</p>' if dim else f"<p>{content}</p>"


def cards(values: Iterable[tuple[str, str]]) -> str:
    """(name, value) pairs, both HTML."""
    return f'<div class="cards">{"".join(f"<div class=card><b>{v}</b><span>{n}</span></div>" for n, v in values)}</div>'


def table(rows: Sequence[Sequence[Any]]) -> str:
    """The first row is the head. Cells are escaped here."""
    head, *body = ["".join(f"<{tag}>{text(cell)}</{tag}>" for cell in row) for tag, row in tagged(rows)]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in body)}</table></div>'


def tagged(rows: Sequence[Sequence[Any]]) -> list[tuple[str, Sequence[Any]]]:
    return [("td" if i else "th", row) for i, row in enumerate(rows)]


def png_figure(content: bytes, alt: str) -> str:
    """alt: escaped here."""
    return f'<figure><img src="{data_uri(content, "png")}" alt="{text(alt)}"></figure>'


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(pixels: NDArray[np.uint8]) -> str:
    """The data URI of an image (H, W, 3): PNG where it is tiny, else JPEG."""
    kind = "png" if max(pixels.shape) <= 48 else "jpeg"
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return data_uri(content.getvalue(), kind)
