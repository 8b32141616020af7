"""Every notebook is committed executed, in order, without errors, small, and with outputs worth comparing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nbhelpers import runtime

NOTEBOOKS = sorted((runtime.ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"(?<![\w.:/-])(/(root|home|work|tmp|Users|usr|opt|var|mnt)/\w|[A-Z]:\\\\?[\w.])")
MAX_BYTES = 400_000
COMPARED = "nbval-check-output"


def problems(notebook: dict, size: int) -> list[str]:
    """What is wrong with a parsed notebook of ``size`` bytes, one line each; empty when it may be committed."""
    cells = notebook["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    found = [] if size < MAX_BYTES else [f"{size} bytes, allowed are {MAX_BYTES}"]
    if not cells or cells[0]["cell_type"] != "markdown" or not "".join(cells[0]["source"]).startswith("# "):
        found.append("the first cell is no title (markdown, '# …')")
    counts = [c["execution_count"] for c in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"not executed in order from a fresh kernel: execution counts {counts}")
    compared = [c for c in code if COMPARED in c["metadata"].get("tags", [])]
    if len(compared) < 3:
        found.append(f"{len(compared)} cells tagged {COMPARED}, needed are 3")
    silent = [c["execution_count"] for c in compared if not _text(c)]
    found += [f"cell [{count}] is tagged {COMPARED} but prints nothing" for count in silent]
    if not any({"image/png", "image/jpeg"} & set(o.get("data", ())) for c in code for o in c["outputs"]):
        found.append("shows no PNG or JPEG picture")
    return found + [f"cell [{c['execution_count']}] {why}" for c in code for why in _cell_problems(c)]


def _cell_problems(cell: dict) -> list[str]:
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            found.append(f"ended in {output['ename']}: {output['evalue']}")
        if output.get("name") == "stderr":
            found.append(f"wrote to stderr: {''.join(output['text'])[:80]!r}")
        if "image/svg+xml" in output.get("data", {}) or "<svg" in _plain(output):
            found.append("shows an SVG; nbval compares it byte by byte, use PNG")
        if path := ABSOLUTE.search(_plain(output)):
            found.append(f"prints the absolute path {path[0]!r}…")
    if path := ABSOLUTE.search("".join(cell["source"])):
        found.append(f"holds the absolute path {path[0]!r}…")
    return found


def _plain(output: dict) -> str:
    """All text of an output: streams, text and HTML, tracebacks; pictures and widget state left out."""
    data = output.get("data", {})
    texts = [v for k, v in data.items() if k.startswith("text/") or k == "application/json"]
    parts = [output.get("text", ""), *texts, output.get("traceback", "")]
    return "\n".join("".join(p) if isinstance(p, list) else str(p) for p in parts)


def _text(cell: dict) -> str:
    return "".join(_plain(o) for o in cell["outputs"] if o.get("name") != "stderr").strip()


@pytest.mark.skipif(not NOTEBOOKS, reason="there are no notebooks yet")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_may_be_committed(path: Path):
    data = path.read_bytes()
    assert problems(json.loads(data), len(data)) == []


def test_names_give_the_reading_order():
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", p.name) for p in NOTEBOOKS), [p.name for p in NOTEBOOKS]
    numbers = [p.name[:2] for p in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)


# --- the policy itself: each rule must be able to fail ---------------------------------------------------------


def cell(count: int, text: str = "42\n", tags=(COMPARED,), **output: object) -> dict:
    outputs = [{"output_type": "stream", "name": "stdout", "text": [text]} | output] if text else []
    return {
        "cell_type": "code",
        "execution_count": count,
        "metadata": {"tags": list(tags)},
        "source": ["x = 1"],
        "outputs": outputs,
    }


def picture(kind: str = "image/png") -> dict:
    data = {kind: "iVBORw0KGgo=" if kind == "image/png" else "<svg/>", "text/plain": "<Figure>"}
    return cell(4, tags=(), text=" ", output_type="display_data", name=None, data=data)


def good() -> dict:
    title = {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "more"]}
    return {"cells": [title, cell(1), cell(2), cell(3), picture()]}


def change(index: int, new: dict | None) -> dict:
    notebook = good()
    notebook["cells"][index : index + 1] = [new] if new else []
    return notebook


def test_a_good_notebook_passes():
    assert problems(good(), 1000) == []


@pytest.mark.parametrize(
    ("notebook", "why"),
    [
        (change(2, cell(7)), "not executed in order"),
        (change(2, cell(None)), "not executed in order"),
        (change(0, None), "first cell is no title"),
        (change(0, {"cell_type": "markdown", "metadata": {}, "source": ["no title"]}), "first cell is no title"),
        (change(1, cell(1, tags=())), "2 cells tagged"),
        (change(1, cell(1, text="")), "prints nothing"),
        (change(1, cell(1, text=" \n")), "prints nothing"),
        (change(4, cell(4)), "no PNG or JPEG"),
        (change(4, picture("image/svg+xml")), "shows an SVG"),
        (change(1, cell(1, name="stderr")), "wrote to stderr"),
        (change(1, cell(1, output_type="error", ename="KeyError", evalue="'a'", traceback=[])), "ended in KeyError"),
        (change(1, cell(1, text="saved /home/me/a.png")), "absolute path '/home/m'"),
        (change(1, cell(1, text="File \"/tmp/ipykernel_1/2.py\"")), "absolute path '/tmp/i'"),
        (change(1, cell(1, text="C:\\Users\\me")), "absolute path"),
        (change(1, cell(1) | {"source": ["open('/work/data')"]}), "holds the absolute path"),
    ],
)  # fmt: skip
def test_each_rule_fails_where_it_should(notebook, why):
    assert any(why in p for p in problems(notebook, 1000)), problems(notebook, 1000)


def test_size_rule():
    assert problems(good(), MAX_BYTES) == [f"{MAX_BYTES} bytes, allowed are {MAX_BYTES}"]


@pytest.mark.parametrize("text", ["https://x.org/home/page", "data/work/a.png", "1/tmp/x", "x4/x8", "PSNR: 3"])
def test_what_is_no_absolute_path(text):
    assert problems(change(1, cell(1, text=text)), 1000) == []
