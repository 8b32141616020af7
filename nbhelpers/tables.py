"""Tables that a reader can sort and filter in the page itself: plain HTML, and a short script that may be missing."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

SCRIPT = Path(__file__).parent / "static" / "table.js"
STYLE = """
.nb-sortable thead th {position: sticky; top: 0; cursor: pointer; text-align: left; vertical-align: bottom;
  background: var(--jp-layout-color0, Canvas)}
.nb-sortable td {text-align: left; vertical-align: top}
.nb-sortable td[data-value] {text-align: right; white-space: nowrap}
.nb-sortable th[aria-sort=ascending]::after {content: " ▲"}
.nb-sortable th[aria-sort=descending]::after {content: " ▼"}
"""


class SortableTable:
    """Rows as an HTML table: click a heading to sort, type words to filter; no kernel is needed for either.

    ``rows`` share the first one's keys. ``formats`` gives numbers a form, {column: ",.0f"}; a missing number (None,
    NaN) stays empty and is sorted last. ``links`` makes texts lead to a page, {column: "folder/{}.ipynb"}. Without
    scripts, as on GitHub, the table just stands there. Raises ValueError for no rows, and for a format or a link
    without a column.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, object]],
        formats: Mapping[str, str] | None = None,
        links: Mapping[str, str] | None = None,
    ):
        if not rows:
            raise ValueError("a table needs at least one row")
        self.rows, self.formats, self.links = list(rows), dict(formats or {}), dict(links or {})
        for what, named in (("formats", self.formats), ("links", self.links)):
            if unknown := sorted(set(named) - set(self.rows[0])):
                raise ValueError(f"{what} for {unknown}, but the columns are {list(self.rows[0])}")

    def __repr__(self) -> str:
        return f"Table of {len(self.rows)} rows: {', '.join(self.rows[0])}"

    def _cell(self, column: str, value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return '<td data-value=""></td>'
        if isinstance(value, int | float):
            return f'<td data-value="{value}">{value:{self.formats.get(column, "")}}</td>'
        text = html.escape(str(value))
        if text and column in self.links:
            return f'<td><a href="{html.escape(self.links[column].format(quote(str(value))))}">{text}</a></td>'
        return f"<td>{text}</td>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.rows[0])
        body = "\n".join("<tr>" + "".join(self._cell(c, row[c]) for c in self.rows[0]) + "</tr>" for row in self.rows)
        table = f'<table class="nb-sortable"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
        script = SCRIPT.read_text(encoding="utf-8")
        style = f"<style>{STYLE}</style>"
        return f'{style}<div style="max-height: 32em; overflow: auto">{table}</div><script>{script}</script>'
