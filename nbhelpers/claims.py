"""Verdicts on the sources' claims: computed from an interval, shown as a table, printed as lines a program can read."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

HOLDS, FAILS, UNDECIDED, UNTESTABLE = "holds", "fails", "undecided", "not testable here"
VERDICTS = (HOLDS, FAILS, UNDECIDED, UNTESTABLE)
Claim = tuple[str, str, str]  # what the source says, what was measured, verdict
HEADINGS = ("source claim", "our measurement ± 95 %", "verdict")


def verdict(expected: str, mean: float, half: float, margin: float) -> str:
    """Judge a measured difference by its 95 % interval mean ± half, in the unit of ``margin``.

    ``expected`` is ``more`` or ``less`` (the whole interval must lie on that side of zero), ``no gain`` or ``no loss``
    (it must end within ``margin`` on the side that would contradict it). ``undecided`` where the interval allows both,
    also for one seed alone (NaN). Raises ValueError for another ``expected`` or a margin below 0.
    """
    if margin < 0:
        raise ValueError(f"margin {margin} must be at least 0")
    low, high = mean - half, mean + half
    holds = {"more": low > 0, "less": high < 0, "no gain": high < margin, "no loss": low > -margin}
    fails = {"more": high < 0, "less": low > 0, "no gain": low > 0, "no loss": high < 0}
    if expected not in holds:
        raise ValueError(f"expected {expected!r} is unknown; choose one of {list(holds)}")
    if math.isnan(low):
        return UNDECIDED
    return HOLDS if holds[expected] else FAILS if fails[expected] else UNDECIDED


def plainly(claim: str, measured: str, holds: bool) -> Claim:
    """A claim that needs no interval: it holds or fails."""
    return claim, measured, HOLDS if holds else FAILS


def said(mean: float, half: float, unit: str = "dB", digits: int = 2) -> str:
    """ "+0.12 ± 0.03 dB"."""
    return f"{mean:+.{digits}f} ± {half:.{digits}f} {unit}".rstrip()


class ClaimsTable:
    """What :func:`table` gives: left-aligned HTML in a notebook, ``lines`` elsewhere.

    Each cell says itself how it is aligned: from a notebook that it does not trust yet, as after a clone, JupyterLab
    drops a ``<style>`` block and keeps a cell's own.
    """

    def __init__(self, claims: Sequence[Claim]):
        self.claims = list(claims)

    def __repr__(self) -> str:
        return lines(self.claims)

    def _repr_html_(self) -> str:
        rows = "\n".join(_row("td", claim) for claim in self.claims)
        return f"<table>\n<thead>{_row('th', HEADINGS)}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _row(tag: str, texts: Sequence[str]) -> str:
    cells = (f'<{tag} style="text-align: left">{html.escape(text)}</{tag}>' for text in texts)
    return f"<tr>{''.join(cells)}</tr>"


def table(claims: Sequence[Claim]) -> ClaimsTable:
    """The claims for a notebook, left-aligned. Raises ValueError for a verdict that is none of ``VERDICTS``."""
    if unknown := sorted({v for *_, v in claims} - set(VERDICTS)):
        raise ValueError(f"verdict {unknown} is unknown; choose from {list(VERDICTS)}")
    return ClaimsTable(claims)


def lines(claims: Sequence[Claim]) -> str:
    """One line per claim, "verdict | claim | measurement": for cells whose output is compared, and for the register."""
    return "\n".join(" | ".join((word, claim, measured)) for claim, measured, word in claims)
