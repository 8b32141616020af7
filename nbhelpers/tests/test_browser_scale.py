"""The live slider of the scale in real JupyterLab in headless Chromium, as a reader's hand moves it."""

import nbformat
import pytest

from nbhelpers.tests.test_browser import (
    CANVAS,
    control,
    jupyter_lab,
    opened,
    our_problems,
    pixels,
    playwright_api,
    screenshot_path,
    status,
    waits_for_change,
)

CELLS = [
    """
import torch
from nbhelpers import models
from nbhelpers.scale_panel import scale_panel
torch.manual_seed(0)
encoder = {"preset": "EDSR-b", "n_feats": 8, "n_blocks": 1}
panel = scale_panel(models.build("LMLTE", encoder=encoder, skip="bicubic", start="default"), name="untrained")
""",
    "panel",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A notebook with the panel of an untrained network on the bundled photos."""
    folder = tmp_path_factory.mktemp("lab")
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3"}  # without it a dialog may ask for one
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "scale.ipynb")
    with jupyter_lab(folder) as server, opened(server, "scale") as page:
        yield page


def test_the_slider_renders_another_scale(page):
    assert "x4.00: 96 x 96 to 384 x 384" in status(page)
    before = pixels(page)
    handle = control(page, "Scale", ".noUi-handle")
    handle.focus()
    words = page.locator("[role=status]").first
    for text in ("x4.05: 96 x 96 to 389 x 389", "x4.10: 96 x 96 to 394 x 394", "x4.15: 96 x 96 to 398 x 398"):
        handle.press("ArrowRight")
        playwright_api.expect(words).to_contain_text(text, timeout=20_000)
    waits_for_change(page, before, "scale raised")
    playwright_api.expect(words).to_contain_text("rendered from kept features")


def test_the_ends_of_the_slider_are_1_and_8(page):
    handle, words = control(page, "Scale", ".noUi-handle"), page.locator("[role=status]").first
    for key, text in (("Home", "x1.00: 96 x 96 to 96 x 96"), ("End", "x8.00: 96 x 96 to 768 x 768")):
        handle.press(key)
        playwright_api.expect(words).to_contain_text(text, timeout=20_000)


def test_another_photo_is_encoded(page):
    before = pixels(page)
    photo = control(page, "Photo", "select")
    photo.select_option(index=3)
    waits_for_change(page, before, "photo chosen")
    playwright_api.expect(page.locator("[role=status]").first).to_contain_text("encoded and rendered", timeout=10_000)
    page.locator(CANVAS).scroll_into_view_if_needed()
    page.screenshot(path=screenshot_path("scale.png"))
    assert our_problems(page) == []
