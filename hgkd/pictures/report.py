"""One self-contained HTML page about some runs: tables, curves and pictures, no script and nothing from elsewhere.

Every name and text is escaped; pictures and curves are embedded as PNG.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from hgkd.errors import MissingFileError
from hgkd.weights.run_folder import logged_lines
from hgkd.writing import written_beside

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}th,td{border:1px solid #ccc;padding:.3rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}th{background:#f3f3f3}img{max-width:100%}figure{margin:1rem 0}
figcaption{color:#555}pre{background:#f6f6f6;padding:.7rem;overflow:auto}
"""


@dataclass(frozen=True)
class ResultTable:
    """Rows of cells under column names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def html(self) -> str:
        """The table as HTML."""
        head = "".join(f"<th>{html.escape(str(c))}</th>" for c in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in self.rows)
        return f"<table><tr>{head}</tr>{body}</table>"


@dataclass(frozen=True)
class Curves:
    """Lines in one diagram: name -> (x values, y values)."""

    lines: dict[str, tuple[Sequence[float], Sequence[float]]]
    x_label: str
    y_label: str

    def html(self) -> str:
        """The curves as HTML, an embedded picture."""
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, (x, y) in self.lines.items():
            axes.plot(x, y, marker=".", label=name)
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        axes.grid(alpha=0.3)
        if self.lines:
            axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        return _embedded(buffer.getvalue(), f"{self.y_label} over {self.x_label}")


@dataclass(frozen=True)
class Picture:
    """A PNG file with a caption.

    Raises:
        FileNotFoundError: when the page is written and the file is not there.
    """

    path: str | os.PathLike[str]
    caption: str = ""

    def html(self) -> str:
        """The picture as HTML, embedded."""
        return _embedded(Path(self.path).read_bytes(), self.caption)


@dataclass(frozen=True)
class Text:
    """A paragraph, or with ``code`` a block of commands."""

    text: str
    code: bool = False

    def html(self) -> str:
        """The text as HTML."""
        tag = "pre" if self.code else "p"
        return f"<{tag}>{html.escape(self.text)}</{tag}>"


@dataclass(frozen=True)
class Section:
    """A headline and what stands under it."""

    title: str
    parts: Sequence[ResultTable | Curves | Picture | Text] = field(default_factory=tuple)

    def html(self) -> str:
        """The section as HTML, its heading and its parts."""
        return f"<h2>{html.escape(self.title)}</h2>" + "".join(part.html() for part in self.parts)


def _embedded(png: bytes, caption: str) -> str:
    text = html.escape(caption, quote=True)
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def write_report(path: str | os.PathLike[str], title: str, sections: Sequence[Section]) -> Path:
    """Write the page under a temporary name, then rename it; returns its path.

    Raises:
        WriteError: the disk does not take it; a page that was there is untouched.
    """
    path = Path(path)
    heading = html.escape(title)
    body = "".join(section.html() for section in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{heading}</h1>{body}</body></html>\n"
    )
    with written_beside(path) as beside:
        beside.write_text(page, encoding="utf-8")
    return path


def read_scalars(work_dir: str | os.PathLike[str], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a logged quantity over all runs in a work folder, from mmengine's JSON lines.

    Raises:
        FileNotFoundError: the folder holds no log.
    """
    if not any(Path(work_dir).glob("*/vis_data/scalars.json")):
        raise MissingFileError("scalars-missing", f"{work_dir} holds no */vis_data/scalars.json; was a run finished there?")
    found: dict[int, float] = {}
    for entry in logged_lines(work_dir):
        if key in entry:
            found[int(entry["step"])] = float(entry[key])  # of a resumed run, the later one counts
    return list(found), list(found.values())
