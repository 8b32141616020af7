"""Tables that can be sorted and filtered in the page: what stands in the HTML."""

from __future__ import annotations

import math

import pytest

from nbhelpers.tables import SortableTable

ROWS = [
    {"network": "b <i>", "size": 1000, "dB": 30.126},
    {"network": "a", "size": 200, "dB": math.nan},
    {"network": "c", "size": 3000, "dB": 29.0},
]


def test_numbers_keep_their_value_beside_their_form():
    page = SortableTable(ROWS, {"size": ",", "dB": ".2f"})._repr_html_()
    assert '<td data-value="1000">1,000</td><td data-value="30.126">30.13</td>' in page
    assert '<td data-value=""></td>' in page and "nan" not in page
    assert "<td>b &lt;i&gt;</td>" in page and page.count("<tr>") == 4
    assert repr(SortableTable(ROWS)) == "Table of 3 rows: network, size, dB"


def test_wrong_arguments_are_quoted():
    with pytest.raises(ValueError, match="at least one row"):
        SortableTable([])
    with pytest.raises(ValueError, match=r"formats for \['Size'\]"):
        SortableTable(ROWS, {"Size": ","})
    with pytest.raises(ValueError, match=r"links for \['page'\]"):
        SortableTable(ROWS, links={"page": "{}"})


def test_links_lead_to_a_page_of_their_text():
    page = SortableTable([{"notebook": "01_a"}, {"notebook": ""}, {"notebook": "<b>"}], links={"notebook": "{}.ipynb"})
    shown = page._repr_html_()
    assert '<td><a href="01_a.ipynb">01_a</a></td>' in shown and "<td></td>" in shown
    assert '<td><a href="%3Cb%3E.ipynb">&lt;b&gt;</a></td>' in shown
