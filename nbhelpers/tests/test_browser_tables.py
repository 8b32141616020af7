"""The sortable table and the scoreboard's chart in headless Chromium, as pages of their own."""

from __future__ import annotations

import pytest

from nbhelpers.scoreboard_panel import scoreboard_panel
from nbhelpers.tables import SortableTable

from .test_browser import FLAGS, find_browser, playwright_api
from .test_scoreboard import rows
from .test_tables import ROWS


@pytest.fixture(scope="module")
def page():
    with playwright_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield browser.new_page(viewport={"width": 1280, "height": 800})
        browser.close()


def column(page, n: int) -> list[str]:
    return page.locator(f"tbody tr:visible td:nth-child({n})").all_inner_texts()


def test_click_sorts_and_words_filter(page):
    page.set_content(SortableTable(ROWS, {"size": ",", "dB": ".2f"})._repr_html_())
    assert column(page, 1) == ["b <i>", "a", "c"]
    page.get_by_role("columnheader", name="size").click()
    assert column(page, 2) == ["200", "1,000", "3,000"]  # by value, not by letters
    page.get_by_role("columnheader", name="size").click()
    assert column(page, 2) == ["3,000", "1,000", "200"]
    for _ in range(2):  # a missing number stays last in both directions
        page.get_by_role("columnheader", name="dB").click()
        assert column(page, 3)[-1] == ""
    page.get_by_role("columnheader", name="network").press("Enter")
    assert column(page, 1) == ["a", "b <i>", "c"]
    page.get_by_role("searchbox").fill("00 B")  # every word, in any column, capital or not
    assert column(page, 1) == ["b <i>"]
    assert page.get_by_text("1 of 3 rows").is_visible()


def test_pointing_at_a_network_shows_its_numbers(page):
    page.set_content(scoreboard_panel(rows()).image.value)
    spot = page.locator(".nb-point[data-text^='far']")
    shown = "element => getComputedStyle(element, '::after').content"
    assert spot.evaluate(shown) == "none"
    spot.hover()
    assert "PSNR-Y (dB), Set5: 32.00" in spot.evaluate(shown)
    inside, picture = spot.bounding_box(), page.locator(".nb-chart img").bounding_box()
    assert picture["x"] < inside["x"] < picture["x"] + picture["width"]
    assert picture["y"] < inside["y"] < picture["y"] + picture["height"]
