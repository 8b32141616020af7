"""The explorer's views, uploads, long work and saved files in real JupyterLab in headless Chromium."""

import base64
import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from spandrel.architectures.ESRGAN import ESRGAN

from nbhelpers import checkpoints
from nbhelpers.tests.test_browser import (
    CANVAS,
    NOTEBOOK,
    control,
    jupyter_lab,
    opened,
    our_problems,
    pixels,
    playwright_api,
    short_notebook,
    waits_for_change,
)

WAIT = 60_000  # milliseconds for what a busy machine may take long for
LARGE = (4000, 3000)  # 12 megapixels

pytestmark = [
    pytest.mark.skipif(not NOTEBOOK.is_file(), reason="notebooks/00_explorer.ipynb is not in this copy"),
    pytest.mark.skipif(not checkpoints.available(), reason="no trained network in data/checkpoints"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The explorer with its default photo and network."""
    folder = tmp_path_factory.mktemp("lab")
    short_notebook(folder)
    with jupyter_lab(folder) as server, opened(server, "explorer") as page:
        yield page


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """What a reader may bring."""
    folder = tmp_path_factory.mktemp("mine")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (300, 320, 3), dtype=np.uint8)).save(folder / "mine.png")
    Image.new("RGBA", (300, 300), (0, 0, 0, 0)).save(folder / "transparent.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    coarse.resize(LARGE, Image.Resampling.BICUBIC).save(folder / "phone.jpg", quality=95, exif=exif)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "empty.jpg").write_bytes(b"")
    torch.manual_seed(0)
    torch.save(ESRGAN(num_filters=8, num_blocks=1, scale=4).state_dict(), folder / "esrgan.pth")
    return {path.name: path for path in folder.iterdir()}


def says(page, text: str) -> None:
    playwright_api.expect(page.locator("[role=status]").first).to_contain_text(text, timeout=WAIT)


def view(page, name: str) -> None:
    page.get_by_role("button", name=f"View: {name}").click()
    page.wait_for_selector(f"{CANVAS}[data-view='{name}']", timeout=WAIT)


def chosen(page, name: str) -> str:
    return control(page, name, "select").evaluate("s => s.options[s.selectedIndex].text")


def drop(page, *names: tuple[str, bytes]) -> None:
    """Drag files from outside onto the canvas, and let go."""
    data = page.evaluate_handle(
        """files => { const moved = new DataTransfer();
           for (const [name, bytes] of files) moved.items.add(new File([new Uint8Array(bytes)], name));
           return moved; }""",
        [[name, list(data)] for name, data in names],
    )
    page.dispatch_event(CANVAS, "dragover", {"dataTransfer": data})
    assert page.locator(".wipe-dropping").count() == 1, "the place to drop on is marked"
    page.dispatch_event(CANVAS, "drop", {"dataTransfer": data})
    assert page.locator(".wipe-dropping").count() == 0


def save(page, button: str) -> tuple[str, bytes]:
    with page.expect_download(timeout=WAIT) as download:
        page.get_by_role("button", name=button).click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


# --- views ------------------------------------------------------------------------------------------------------


def test_side_by_side_zooms_and_pans_in_step(page):
    view(page, "side by side")
    canvas = page.locator(CANVAS)
    canvas.press("1")
    for _ in range(4):
        canvas.press("+")
    before = halves(page)
    assert np.abs(before[0] - before[1]).mean() > 0.5, "two different pictures"
    similar = np.corrcoef(before[0].ravel(), before[1].ravel())[0, 1]
    assert similar > 0.8, "of the same place"
    seen = pixels(page)
    canvas.press("ArrowRight")
    waits_for_change(page, seen, "panned")
    after = halves(page)
    assert np.abs(after[0] - before[0]).mean() > 2 and np.abs(after[1] - before[1]).mean() > 2, "both halves moved"
    assert np.corrcoef(after[0].ravel(), after[1].ravel())[0, 1] > 0.8, "and still show the same place"
    canvas.press("0")


def halves(page) -> list[np.ndarray]:
    """The two panes, in grey, without labels and dividing line."""
    data = page.locator(CANVAS).evaluate("c => c.toDataURL('image/png')")
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("L"), np.float32)
    half = sheet.shape[1] // 2
    return [part[60:, 20 : half - 20] for part in (sheet[:, :half], sheet[:, half : 2 * half])]


def test_flicker_shows_both_in_turns(page):
    view(page, "flicker")
    shown, canvas, deadline = {}, page.locator(CANVAS), time.monotonic() + 30
    while len(shown) < 2 and time.monotonic() < deadline:
        turn, picture = canvas.get_attribute("data-turn"), pixels(page)
        if canvas.get_attribute("data-turn") == turn:  # else it changed in between
            shown[turn] = picture
        page.wait_for_timeout(50)
    assert set(shown) == {"left", "right"} and shown["left"] != shown["right"]
    page.get_by_role("slider", name="Seconds for each picture").press("End")
    playwright_api.expect(page.locator(".wipe-range")).to_have_text("2.0 s each", timeout=WAIT)


def test_difference_grows_with_its_gain(page):
    view(page, "difference")
    dim = sum(pixels(page))
    gain = page.get_by_role("slider", name="Gain of the difference")
    before = pixels(page)
    gain.press("End")
    playwright_api.expect(page.locator(".wipe-range")).to_have_text("× 32", timeout=WAIT)
    assert sum(waits_for_change(page, before, "gain raised")) > 1.5 * dim
    before = pixels(page)
    control(page, "Left side", "select").select_option(label="original")
    before = waits_for_change(page, before, "the original on the left side")
    control(page, "Left side", "select").select_option(label="bicubic")
    waits_for_change(page, before, "bicubic on the left side")


def test_loupe_tells_the_pixel_under_the_pointer(page):
    view(page, "wipe")
    page.get_by_role("button", name="Pixel values").click()
    box = page.locator(CANVAS).bounding_box()
    values = page.locator(".wipe-values")
    page.mouse.move(box["x"] + box["width"] / 2 - 30, box["y"] + box["height"] / 2)
    playwright_api.expect(values).to_contain_text("original: ", timeout=WAIT)
    first = values.inner_text()
    assert first.startswith("x ") and "bicubic" in first and "difference: " in first
    page.mouse.move(box["x"] + box["width"] / 2 + 60, box["y"] + box["height"] / 2 + 40)
    page.wait_for_timeout(300)
    assert values.inner_text() != first
    page.get_by_role("button", name="Pixel values").click()
    playwright_api.expect(values).to_have_text("", timeout=WAIT)


# --- controls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Blur, px", "Noise", "Across, %"])
def test_each_slider_changes_the_picture(page, name):
    before, handle = pixels(page), control(page, name, ".noUi-handle")
    handle.press("PageUp")
    changed = waits_for_change(page, before, f"{name} moved")
    handle.press("Home")
    waits_for_change(page, changed, f"{name} moved back")


def test_two_networks_against_each_other(page):
    left = control(page, "Left side", "select")
    names = left.locator("option").all_inner_texts()
    other = next(name for name in names[2:] if name != chosen(page, "Right side"))
    before = pixels(page)
    left.select_option(label=other)
    waits_for_change(page, before, "a network on the left side")
    table = page.locator(".nb-numbers")
    for words in ("bicubic", other, chosen(page, "Right side"), "PSNR-Y", "SSIM-Y", "LPIPS", "ms", "MB"):
        playwright_api.expect(table).to_contain_text(words, timeout=WAIT)
    left.select_option(label="bicubic")


def test_lpips_is_measured_on_request(page):
    page.get_by_label("LPIPS too").check()
    table = page.locator(".nb-numbers")
    playwright_api.expect(table).not_to_contain_text("off", timeout=WAIT)
    page.get_by_label("LPIPS too").uncheck()
    playwright_api.expect(table).to_contain_text("off", timeout=WAIT)


# --- files ------------------------------------------------------------------------------------------------------


def test_chosen_files_are_shown_and_bad_ones_told(page, files):
    before = pixels(page)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add photos or network files").click()
    chooser.value.set_files([files[name] for name in ("mine.png", "broken.jpg", "transparent.png")])
    waits_for_change(page, before, "photos chosen")
    says(page, "2 added, 1 not: broken.jpg")
    assert chosen(page, "Photo") == "mine.png"


def test_dropped_files_are_shown_and_bad_ones_told(page, files):
    drop(page, ("dropped.png", files["transparent.png"].read_bytes()), ("empty.jpg", b""))
    says(page, "1 added, 1 not: empty.jpg: the file is empty")
    assert chosen(page, "Photo") == "dropped.png"


def test_a_published_network_from_a_path(page, files):
    before = pixels(page)
    control(page, "Photo", "select").select_option(label="mine.png")
    waits_for_change(page, before, "another photo")
    field = page.get_by_placeholder("path of")
    field.fill("nowhere.pth")
    field.press("Tab")
    page.get_by_role("button", name="Load network").click()
    says(page, "no such file: nowhere.pth")
    before = pixels(page)
    field.fill(str(files["esrgan.pth"]))
    field.press("Tab")
    page.get_by_role("button", name="Load network").click()
    waits_for_change(page, before, "a network loaded")
    assert chosen(page, "Right side") == "esrgan.pth"


def test_twelve_megapixels_answer_at_once_and_can_be_cancelled(page, files):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add photos or network files").click()
    chooser.value.set_files(files["phone.jpg"])
    says(page, "pixels of phone.jpg")
    page.get_by_role("button", name="as is", exact=True).click()
    says(page, "pixels of phone.jpg")
    cancel = page.get_by_role("button", name="Cancel")
    playwright_api.expect(cancel).to_be_hidden(timeout=WAIT)
    before = pixels(page)
    start = time.monotonic()
    control(page, "Part shown", "select").select_option(label="whole photo")
    playwright_api.expect(cancel).to_be_visible(timeout=WAIT)
    says(page, "Working")
    print(f"answered after {time.monotonic() - start:.2f} s")
    label = page.locator(".widget-label").filter(has_text="enlarging")
    playwright_api.expect(label).to_contain_text("s left", timeout=WAIT)
    page.locator(CANVAS).press("End")  # the page goes on meanwhile
    before = waits_for_change(page, before, "wiped while tiles are computed")
    cancel.click()
    says(page, "Cancelled. The picture is still that of 256 x 256 pixels of phone.jpg")
    playwright_api.expect(cancel).to_be_hidden(timeout=WAIT)
    control(page, "Part shown", "select").select_option(label="128 x 128")
    says(page, "128 x 128 pixels of phone.jpg")
    page.get_by_role("button", name="shrink then restore").click()
    says(page, "128 x 128 pixels of phone.jpg")


# --- saved files ------------------------------------------------------------------------------------------------


def test_saved_pictures_and_animation(page):
    control(page, "Part shown", "select").select_option(label="128 x 128")
    says(page, "128 x 128 pixels of")
    name, data = save(page, "PNG")
    assert name.endswith(".png") and Image.open(io.BytesIO(data)).width > 800
    says(page, f"{name} (")
    name, data = save(page, "WebP that flickers")
    assert name.endswith(".webp") and Image.open(io.BytesIO(data)).n_frames == 2
    name, data = save(page, "Save enlarged photo")
    assert Image.open(io.BytesIO(data)).size == (128, 128)


def test_the_saved_page_wipes_without_a_kernel(page, tmp_path):
    page.locator(CANVAS).press("End")
    page.wait_for_selector(f"{CANVAS}[aria-valuenow='100']", timeout=WAIT)
    name, data = save(page, "HTML that wipes")
    (tmp_path / name).write_bytes(data)
    alone = page.context.browser.new_context(offline=True).new_page()
    problems = []
    alone.on("console", lambda m: m.type == "error" and problems.append(m.text))
    alone.on("pageerror", lambda error: problems.append(str(error)))
    alone.goto((tmp_path / name).as_uri())
    alone.wait_for_selector(f"{CANVAS}[data-updates]", timeout=WAIT)
    box = alone.locator(CANVAS).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    assert alone.locator(CANVAS).get_attribute("aria-valuenow") == "100", "it opens as it was left"
    before = pixels(alone)
    for key in ("Home", *["PageUp"] * 5):
        alone.locator(CANVAS).press(key)
    before = waits_for_change(alone, before, "wiped by keys")
    divider = int(alone.locator(CANVAS).get_attribute("aria-valuenow"))
    alone.mouse.move(x, y)
    alone.mouse.down()
    alone.mouse.move(x + 60, y, steps=5)
    alone.mouse.up()
    waits_for_change(alone, before, "wiped by hand")
    assert int(alone.locator(CANVAS).get_attribute("aria-valuenow")) > divider
    for name in ("flicker", "difference", "side by side"):
        before = pixels(alone)
        view(alone, name)
        waits_for_change(alone, before, name)
    assert "PSNR-Y" in alone.locator(".nb-numbers").inner_text()
    assert problems == []
    alone.context.close()


def test_no_console_errors(page):
    assert our_problems(page) == []
