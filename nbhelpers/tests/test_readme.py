"""README.md: its tables are what committed results give, its links and commands exist."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from nbhelpers import readme, register, runtime
from nbhelpers.__main__ import build_parser, main

TEXT = (runtime.ROOT / "README.md").read_text(encoding="utf-8")
BEGIN, END = readme.between("scores")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A README of its own whose only part is the number of its making."""
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PARTS", {"scores": lambda: "new"})
    monkeypatch.setattr(readme, "picture", lambda: None)
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter ×\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("part", readme.PARTS)
def test_committed_tables_are_up_to_date(part):
    try:
        assert readme.current(part, TEXT) == readme.PARTS[part]()
    except register.RegisterError as error:
        pytest.fail(str(error))


def test_what_stands_around_a_part_is_kept(page):
    assert readme.update() == ["scores"]
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\nnew\n{END}\nafter ×\n"
    assert readme.update("scores") == []


def test_check_writes_nothing(page, capsys):
    old = page.read_bytes()
    assert main(["readme", "--check"]) == 1
    assert "not up to date: scores" in capsys.readouterr().out and page.read_bytes() == old
    assert main(["readme"]) == 0 and main(["readme", "--check"]) == 0


@pytest.mark.parametrize("text", ["nothing", f"{END}\n{BEGIN}", BEGIN])
def test_missing_marks_are_named(page, capsys, text):
    page.write_text(text, encoding="utf-8")
    assert main(["readme"]) == 2
    assert repr(END) in capsys.readouterr().err and page.read_text(encoding="utf-8") == text


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 8
    assert [link for link in links if "://" not in link and not (runtime.ROOT / link).exists()] == []


def test_commands_exist():
    named = set(re.findall(r"python -m nbhelpers (\w+)", TEXT))
    [commands] = [action for action in build_parser("")._actions if action.dest == "command"]
    assert len(named) > 10 and named <= set(commands.choices)


def test_every_notebook_is_in_the_table():
    for path in sorted((runtime.ROOT / "notebooks").glob("*.ipynb")):
        assert f"(notebooks/{path.name})" in TEXT, path.name


def test_the_picture_is_small_and_shows_what_it_should():
    path = runtime.RESULTS / readme.PICTURE
    with Image.open(path) as image:
        assert image.width > 800 and path.stat().st_size < 150_000
