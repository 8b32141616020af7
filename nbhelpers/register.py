"""The register of claims: verdicts gathered from the outputs of executed notebooks, beside the list of all claims."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from . import runtime
from .claims import VERDICTS

CLAIMS = "claims.csv"  # in data/, in our own words
OPEN, UNNUMBERED = "no verdict yet", "not numbered"
COLUMNS = ("claim", "what was tested", "measured ± 95 %", "verdict", "notebook")
HEADER = ("source claim", "our measurement")  # how a notebook's table of claims begins
NUMBERED = re.compile(r"([A-Z]\d+)\b")  # K4 …


class RegisterError(ValueError):
    """Notebooks from which no verdicts can be read; the message says which and why."""


@dataclass(frozen=True)
class Finding:
    """One verdict as a notebook shows it; ``id`` is the claim's in ``data/claims.csv``, "" for one not listed there:
    a remark without a number, a question of our own."""

    id: str
    claim: str
    measured: str
    verdict: str
    notebook: str


def known() -> list[dict[str, str]]:
    """All claims of the source documents in order: {"id", "document", "short", "title"}, from ``data/claims.csv``."""
    with (runtime.DATA / CLAIMS).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def collect(notebooks: Path | Iterable[Path] | None = None) -> list[Finding]:
    """Verdicts in the outputs of executed notebooks, in order (default: all of ``notebooks/`` but the scoreboard).

    Read are the lines of :func:`nbhelpers.claims.lines`, the tables of :func:`nbhelpers.claims.table`, and Markdown
    tables with the same columns; what a notebook shows twice counts once. Raises RegisterError for a notebook that is
    not executed (or not whole), cannot be read, or shows an unknown verdict, and where there is none.
    """
    if notebooks is None:
        notebooks = [p for p in _in(runtime.ROOT / "notebooks") if "scoreboard" not in p.name]
    paths = _in(notebooks) if isinstance(notebooks, Path) else list(notebooks)
    if not paths:
        raise RegisterError("there are no notebooks to read verdicts from")
    cells = {path: _cells(path) for path in paths}
    not_run = [path.name for path, found in cells.items() if not _is_executed(found)]
    if not_run:
        raise RegisterError(
            f"not executed from first to last cell: {', '.join(not_run)}; run them "
            "(jupyter nbconvert --to notebook --execute --inplace notebooks/NAME.ipynb), then collect again"
        )
    return [finding for path, found in cells.items() for finding in _findings(path.stem, found)]


def _in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ipynb"))


def _cells(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegisterError(f"{path.name} cannot be read as a notebook ({error})") from error


def _is_executed(cells: Sequence[dict]) -> bool:
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    return bool(code) and all(cell.get("execution_count") for cell in code)


def _findings(notebook: str, cells: Sequence[dict]) -> list[Finding]:
    rows = [row for cell in cells for text, read in _texts(cell) for row in read(text)]
    found = {}  # a dictionary keeps the order
    for claim, measured, told in rows:
        verdict = next((v for v in VERDICTS if told == v or told.startswith((f"{v} ", f"{v};", f"{v},"))), None)
        if verdict is None:
            raise RegisterError(f"{notebook} gives {claim!r} the verdict {told!r}; known are {list(VERDICTS)}")
        # Words after the verdict belong to what was measured.
        rest = told.removeprefix(verdict).strip(" ;,")
        match = NUMBERED.match(claim)
        finding = Finding(
            match[1] if match else "", claim, f"{measured} ({rest})" if rest else measured, verdict, notebook
        )
        found[finding] = None
    return list(found)


def _texts(cell: dict) -> Iterable[tuple[str, object]]:
    """What a cell shows, each with the function that reads rows (claim, measured, verdict) from it."""
    if cell["cell_type"] == "markdown":
        yield "".join(cell["source"]), _from_markdown
    for output in cell.get("outputs", ()):
        if output.get("name") == "stdout":
            yield "".join(output["text"]), _from_lines
        yield "".join(output.get("data", {}).get("text/html", "")), _from_html


def _from_lines(text: str) -> list[tuple[str, str, str]]:
    parts = [line.split(" | ", 2) for line in text.splitlines()]
    return [(p[1].strip(), p[2].strip(), p[0]) for p in parts if len(p) == 3 and p[0] in VERDICTS]


def _from_markdown(text: str) -> list[tuple[str, str, str]]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return _below_header([[cell.replace("*", "") for cell in row] for row in rows if set(row[0]) - set(":- ")])


def _from_html(text: str) -> list[tuple[str, str, str]]:
    if HEADER[0] not in text:
        return []
    reader = _TableReader()
    reader.feed(text)
    return _below_header([[" ".join(cell.split()) for cell in row] for row in reader.rows])


def _below_header(rows: Sequence[Sequence[str]]) -> list[tuple[str, str, str]]:
    for i, row in enumerate(rows):
        if len(row) == 3 and row[0].startswith(HEADER[0]) and row[1].startswith(HEADER[1]):
            return [(claim, measured, verdict) for claim, measured, verdict in rows[i + 1 :]]
    return []


class _TableReader(HTMLParser):
    """Texts of an HTML table's cells, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def without_verdict(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The claims of :func:`known` that no notebook judges. Raises RegisterError for a number that is not known."""
    judged, claims = {f.id for f in findings if f.id}, known()
    if strange := sorted(judged - {claim["id"] for claim in claims}):
        where = sorted({f.notebook for f in findings if f.id in strange})
        raise RegisterError(f"{', '.join(where)} judge {', '.join(strange)}, which {CLAIMS} does not list")
    return [claim for claim in claims if claim["id"] not in judged]


def counts(findings: Sequence[Finding]) -> list[dict[str, object]]:
    """Verdicts by source document, and of what has no number: rows {"document", "claims", *VERDICTS, ``OPEN``}.

    A claim is tested in several ways, so that it has several verdicts; "claims" and ``OPEN`` count claims.
    """
    waiting = Counter(claim["document"] for claim in without_verdict(findings))
    document = {claim["id"]: claim["document"] for claim in known()}
    rows = []
    for name in [*dict.fromkeys(document.values()), UNNUMBERED]:
        of = Counter(f.verdict for f in findings if document.get(f.id, UNNUMBERED) == name)
        listed = sum(d == name for d in document.values())
        rows.append({"document": name, "claims": listed, **{v: of[v] for v in VERDICTS}, OPEN: waiting[name]})
    return rows


def table(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """All there is to show, in the order of the documents: the findings on each claim, a claim without any, the rest.

    Keys are ``COLUMNS``.
    """
    rows = []
    without_verdict(findings)  # says which number is not known
    for claim in [*known(), {"id": "", "title": UNNUMBERED}]:
        mine = [f for f in findings if f.id == claim["id"]]
        title = f"{claim['id']} {claim['title']}".strip()
        for f in mine:
            tested = f.claim.removeprefix(f"{f.id} ")
            rows.append(dict(zip(COLUMNS, (title, tested, f.measured, f.verdict, f.notebook), strict=True)))
        if not mine and claim["id"]:
            rows.append(dict(zip(COLUMNS, (title, "", "", OPEN, ""), strict=True)))
    return rows
