"""The register reads verdicts from outputs, in every form the notebooks use, and refuses what it cannot trust."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbhelpers import claims, register, runtime
from nbhelpers.register import Finding, RegisterError

ROWS = [("K4 nicer", "-0.006 ± 0.001 LPIPS", "holds"), ("ours: a < b & c", "+1.0 ± 2.0 dB", "undecided")]
MARKDOWN = """## Claims
| source claim | our measurement | verdict |
|---|---|---|
| K3: beside *interpolation* better | 10 of 10 | holds for sharpness; the rest is taste |
"""


def code(outputs: list[dict], count: int | None = 1) -> dict:
    return {
        "cell_type": "code",
        "execution_count": count,
        "metadata": {},
        "source": ["x"],
        "outputs": outputs,
    }


def lines(rows=ROWS) -> dict:
    return {
        "output_type": "stream",
        "name": "stdout",
        "text": [claims.lines(rows) + "\n", "a | line of another kind\n"],
    }


def html(rows=ROWS) -> dict:
    return {"output_type": "execute_result", "data": {"text/html": [claims.table(rows)._repr_html_()]}, "metadata": {}}


def notebook(folder: Path, *cells: dict, name: str = "07_test") -> Path:
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": list(cells)}), encoding="utf-8")
    return path


def expected(rows=ROWS) -> list[Finding]:
    return [Finding("K4" if "K4" in c else "", c, m, v, "07_test") for c, m, v in rows]


@pytest.mark.parametrize("output", [lines, html])
def test_each_form_gives_the_same(tmp_path, output):
    notebook(tmp_path, code([output()]))
    assert register.collect(tmp_path) == expected()


def test_what_is_shown_twice_counts_once(tmp_path):
    notebook(tmp_path, code([lines()]), code([html([*ROWS, ("M9 15 ms", "129 ms", "not testable here")])], 2))
    found = register.collect(tmp_path)
    assert [(f.id, f.verdict) for f in found] == [("K4", "holds"), ("", "undecided"), ("M9", "not testable here")]


def test_markdown_table_and_words_after_the_verdict(tmp_path):
    markdown = {"cell_type": "markdown", "metadata": {}, "source": [MARKDOWN]}
    path = notebook(tmp_path, code([]), markdown)
    told = "10 of 10 (for sharpness; the rest is taste)"
    assert register.collect([path]) == [Finding("K3", "K3: beside interpolation better", told, "holds", "07_test")]


@pytest.mark.parametrize("count", [None, 0])
def test_a_notebook_that_was_not_executed_is_named(tmp_path, count):
    notebook(tmp_path, code([lines()]), name="01_done")
    notebook(tmp_path, code([lines()]), code([], count), name="02_half")
    with pytest.raises(RegisterError, match=r"first to last cell: 02_half\.ipynb; run") as error:
        register.collect(tmp_path)
    assert "01_done" not in str(error.value)


def test_other_errors_say_which_and_why(tmp_path):
    with pytest.raises(RegisterError, match="no notebooks"):
        register.collect(tmp_path)
    bad = [("K4 nicer", "0", "perhaps")]
    rows = claims.table(ROWS[:1])._repr_html_().replace("holds", "perhaps")
    path = notebook(tmp_path, code([{"output_type": "execute_result", "data": {"text/html": [rows]}}]))
    with pytest.raises(RegisterError, match=r"07_test gives 'K4 nicer' the verdict 'perhaps'.*holds"):
        register.collect(tmp_path)
    assert register.collect([notebook(tmp_path, code([lines(bad)]))]) == []  # a printed line is only taken for one
    path.write_text("{", encoding="utf-8")
    with pytest.raises(RegisterError, match=r"07_test\.ipynb cannot be read"):
        register.collect(tmp_path)


def test_a_number_that_is_not_listed_is_named():
    strange = Finding("K99", "K99 odd", "", "holds", "03_x")
    for call in (register.without_verdict, register.counts, register.table):
        with pytest.raises(RegisterError, match=r"03_x judge K99, which claims\.csv does not list"):
            call([strange])


def test_every_claim_stands_in_the_table_once_or_with_each_finding():
    found = [*expected(), Finding("K4", "K4 again", "1", "fails", "05_x")]
    rows, listed = register.table(found), register.known()
    assert len(rows) == len(listed) + 2  # K4 twice, one without a number
    k4 = [r for r in rows if r["claim"].startswith("K4 ")]
    assert [(r["what was tested"], r["verdict"]) for r in k4] == [("nicer", "holds"), ("again", "fails")]
    assert sum(r["verdict"] == register.OPEN for r in rows) == len(listed) - 1 == len(register.without_verdict(found))
    by = {row["document"]: row for row in register.counts(found)}
    assert (by["002"]["holds"], by["002"]["fails"], by[register.UNNUMBERED]["undecided"]) == (1, 1, 1)
    assert sum(row[register.OPEN] for row in by.values()) == len(listed) - 1
    assert sum(row["claims"] for row in by.values()) == len(listed)


def test_list_of_claims_is_complete_in_itself():
    listed = register.known()
    assert len({claim["id"] for claim in listed}) == len(listed) > 40
    assert all(
        claim["short"] and claim["title"] and claim["document"] in ("000", "001", "002", "003", "004")
        for claim in listed
    )
    letters = {claim["id"][0]: claim["document"] for claim in listed}
    assert all(letters[claim["id"][0]] == claim["document"] for claim in listed)


@pytest.mark.skipif(not (runtime.ROOT / "notebooks").is_dir(), reason="the notebooks are not in this copy")
def test_committed_notebooks_give_verdicts_on_listed_claims():
    found = register.collect()
    assert register.without_verdict(found) is not None
    assert {f.notebook[:2] for f in found} >= {"00", "01", "02", "03", "04", "05"}
    assert all(f.claim and f.measured for f in found)
