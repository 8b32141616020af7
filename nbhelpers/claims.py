"""Verdicts on the sources' claims: computed from an interval, shown as a table, printed as lines a program can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

HOLDS, FAILS, UNDECIDED, UNTESTABLE = "holds", "fails", "undecided", "not testable here"
VERDICTS = (HOLDS, FAILS, UNDECIDED, UNTESTABLE)
Claim = tuple[str, str, str]  # what the source says, what was measured, verdict


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


def said(mean: float, half: float, unit: str = "dB", digits: int = 2) -> str:
    """ "+0.12 ± 0.03 dB"."""
    return f"{mean:+.{digits}f} ± {half:.{digits}f} {unit}".rstrip()


def table(claims: Sequence[Claim]) -> Styler:
    """The claims for a notebook, left-aligned. Raises ValueError for a verdict that is none of ``VERDICTS``."""
    import pandas as pd

    if unknown := sorted({v for *_, v in claims} - set(VERDICTS)):
        raise ValueError(f"verdict {unknown} is unknown; choose from {list(VERDICTS)}")
    frame = pd.DataFrame(claims, columns=["source claim", "our measurement ± 95 %", "verdict"])
    return frame.style.hide(axis="index").set_properties(**{"text-align": "left"})


def lines(claims: Sequence[Claim]) -> str:
    """One line per claim, "verdict | claim | measurement": for cells whose output is compared, and for the register."""
    return "\n".join(" | ".join((word, claim, measured)) for claim, measured, word in claims)
