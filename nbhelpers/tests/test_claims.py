"""Verdicts follow from intervals alone."""

from __future__ import annotations

import math
import re

import pytest

from nbhelpers import claims


@pytest.mark.parametrize(
    ("expected", "mean", "half", "word"),
    [
        ("more", 1.0, 0.5, "holds"),
        ("more", -1.0, 0.5, "fails"),
        ("more", 0.2, 0.5, "undecided"),
        ("less", -1.0, 0.5, "holds"),
        ("less", 1.0, 0.5, "fails"),
        ("no gain", 0.0, 0.04, "holds"),
        ("no gain", 0.2, 0.1, "fails"),
        ("no gain", 0.2, 0.3, "undecided"),
        ("no loss", -0.02, 0.02, "holds"),
        ("no loss", -0.2, 0.1, "fails"),
        ("more", 1.0, math.nan, "undecided"),
    ],
)
def test_verdict(expected, mean, half, word):
    assert claims.verdict(expected, mean, half, margin=0.05) == word


def test_wrong_arguments_are_quoted():
    with pytest.raises(ValueError, match="'better'"):
        claims.verdict("better", 1, 1, 0.1)
    with pytest.raises(ValueError, match="-1"):
        claims.verdict("more", 1, 1, -1)
    with pytest.raises(ValueError, match="'perhaps'"):
        claims.table([("K1", "+1", "perhaps")])


def test_lines_and_table_hold_the_same():
    rows = [("K1 a", claims.said(0.123, 0.05), "holds"), ("K2 b", claims.said(-3, 1, "", 0), "fails")]
    assert claims.lines(rows) == "holds | K1 a | +0.12 ± 0.05 dB\nfails | K2 b | -3 ± 1"
    table = claims.table(rows)
    assert repr(table) == claims.lines(rows)
    assert re.findall(r"<t[dh]\b[^>]*>([^<]*)", table._repr_html_()) == [*claims.HEADINGS, *rows[0], *rows[1]]


def test_table_survives_jupyterlabs_sanitizer_and_odd_characters():
    shown = claims.table([("K1 a < b & c", "+1", "holds")])._repr_html_()
    assert "a &lt; b &amp; c" in shown
    assert "<style" not in shown  # dropped in a notebook that is not trusted
    assert all("text-align: left" in cell for cell in re.findall(r"<t[dh]\b[^>]*>", shown))
