"""The scoreboard: joined tables, fronts, choices, charts; the study behind it on tiny pictures."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from nbhelpers import checkpoints, register, runtime, scoreboard, scoreboard_panel
from nbhelpers.register import Finding
from nbhelpers.scoreboard import AXES, BICUBIC, OURS, THEIRS
from nbhelpers.studies import damaged, set5, write
from nbhelpers.studies import scoreboard as study


def rows() -> pd.DataFrame:
    """A made-up table: three of ours, one published, bicubic."""
    values = {  # psnr_y, ssim_y, lpips, parameters, flops, ms, ms_fp32, memory, file, any_scale
        ("bicubic", 4, BICUBIC): (28.0, 0.80, 0.29, math.nan, 150, 1, 2, 1, math.nan, False),
        ("small", 4, OURS): (29.0, 0.82, 0.20, 1000, 2000, 20, 40, 5, 2, False),
        ("twin", 4, OURS): (29.5, 0.83, 0.16, 1000, 2000, 21, 41, 5, 2, False),
        ("large", 4, OURS): (31.0, 0.88, 0.21, 9000, 9000, 90, 200, 50, 18, True),
        ("far", 4, THEIRS): (32.0, math.nan, 0.15, 5000, *[math.nan] * 5, False),
        ("other", 2, OURS): (36.0, 0.95, 0.05, 3000, 5000, 50, 100, 20, 6, False),
    }  # fmt: skip
    keys = ["name", "scale", "kind", *AXES, "any_scale"]
    return pd.DataFrame([dict(zip(keys, (*who, *numbers), strict=True)) for who, numbers in values.items()])


def at(scale: int = 4) -> pd.DataFrame:
    return rows().query("scale == @scale")


@pytest.fixture
def folder(tmp_path):
    """Result tables of two committed networks and bicubic."""
    quality = {"psnr_y": 30.0, "ssim_y": 0.85, "psnr_rgb": 28.0, "lpips": 0.2}
    names = [("bicubic", 4), ("espcn_x4", 4), ("espcn_x2", 2)]
    scores = [{"model": n, "scale": s, "image": i, **quality} for n, s in names for i in ("baby", "mean")]
    write(tmp_path / set5.NAME, scores)
    cost = {"output": "200x100", "parameters": 1, "flops": 40_000, "ms_per_output_megapixel": 50.0, "peak_mb": 2.0}
    more = [*names, ("SPAN ch48", 4), ("m23_rlfn_x4", 4)]  # the last has no score yet
    forms = (("fp32 channels_last", 1), ("bf16 channels_last", 2))
    costs = [
        {"model": n, "scale": s, "form": form, **cost, "machine": "here"}
        | {"ms_per_output_megapixel": 50.0 / k, "peak_mb": 2.0 / k}
        for n, s in more
        for form, k in forms
    ]
    write(tmp_path / study.NAME, costs)
    return tmp_path


def test_table_joins_scores_costs_cards_and_published(folder):
    table = scoreboard.table(folder).set_index(["name", "scale"])
    ours = table.loc["espcn_x4", 4]
    assert (ours.kind, ours.psnr_y, ours.parameters) == (OURS, 30.0, checkpoints.card("espcn_x4")["parameters"])
    assert (ours.flops, ours.ms, ours.ms_fp32, ours.memory) == (2.0, 25.0, 50.0, 50.0)
    assert ours.file == (runtime.CHECKPOINTS / "espcn_x4.safetensors").stat().st_size / 1e3
    assert table.loc["bicubic", 4].kind == BICUBIC and math.isnan(table.loc["bicubic", 4].parameters)
    waiting = table.loc["m23_rlfn_x4", 4]
    assert math.isnan(waiting.psnr_y) and waiting.ms == 25.0
    span = table.loc["SPAN ch48"]
    assert set(span.kind) == {THEIRS} and span.loc[4].ms == 25.0 and math.isnan(span.loc[2].ms)
    assert table.index.is_unique


def test_a_missing_table_names_its_study(tmp_path, folder):
    (folder / study.NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"scoreboard\.csv is missing.*study scoreboard"):
        scoreboard.table(folder)
    with pytest.raises(FileNotFoundError, match=r"scoreboard_photos\.csv is missing"):
        scoreboard.gains(folder)


@pytest.mark.parametrize(
    ("cost", "quality", "names"),
    [
        ("parameters", "psnr_y", ["twin", "far"]),
        ("ms", "psnr_y", ["small", "twin", "large"]),
        ("ms", "lpips", ["small", "twin"]),
        ("psnr_y", "lpips", ["far"]),
    ],
)
def test_front(cost, quality, names):
    points = at()[at().kind != BICUBIC]
    assert list(scoreboard.front(points, AXES[cost], AXES[quality]).name) == names


def test_choices_follow_the_numbers():
    choices = {c["need"]: c for c in scoreboard.needs(rows(), 4, budget_ms=30, few=1001)}
    named = [c["network"] for c in choices.values()]
    # 20 and 21 ms are equal within the clock's tolerance: the higher PSNR decides.
    assert named == ["large", "twin", "twin", "twin", "twin", "twin", "twin", "large"]
    assert choices["closest to the original, pixel by pixel"]["because"].endswith("31.00; next twin, 29.50")
    assert choices["smallest file"]["because"] == "file (kB): 2; next large, 18"
    none = scoreboard.choose(at(), "any", "psnr_y", at().ms < 1)
    assert none == {"need": "any", "network": "none", "because": "no committed network fits"}


def test_damaged_photos_have_a_table_of_their_own(tmp_path):
    assert "study damaged" in scoreboard.for_damaged(tmp_path)["because"]
    found = [("bicubic", "real_esrgan", 0.1), ("a", "real_esrgan", 0.4), ("b", "real_esrgan", 0.3), ("a", "clean", 0.2)]
    table = [
        {"model": m, "set": s, "image": i, "psnr_y": 20.0 + v, "ssim_y": 0.5, "psnr_rgb": 20.0, "lpips": v}
        for m, s, v in found
        for i in ("bee", "mean")
    ]
    write(tmp_path / damaged.NAME, table)
    one = scoreboard.for_damaged(tmp_path)
    assert one["network"] == "b" and one["need"].endswith("for the eye")
    assert one["because"] == "LPIPS-Squeeze, damaged validation photos: 0.300; next a, 0.400"  # no word of Set5
    assert scoreboard.for_damaged(tmp_path, key="psnr_y")["network"] == "a"


def test_gains_and_extremes(tmp_path):
    values = {("bicubic", "a"): 20.0, ("bicubic", "b"): 30.0, ("net", "a"): 21.0, ("net", "b"): 30.5}
    write(
        tmp_path / study.PHOTOS_NAME,
        [{"model": m, "scale": 2, "image": i, "psnr_y": v} for (m, i), v in values.items()],
    )
    gains = scoreboard.gains(tmp_path)
    assert dict(zip(gains.image, gains.gain, strict=True)) == {"a": 1.0, "b": 0.5}
    row = scoreboard.extremes(gains).iloc[0]
    assert (row["name"], row.best, row.worst, row.best_gain, row.worst_gain) == ("net", "a", "b", 1.0, 0.5)


def test_chart_names_every_network_and_says_what_is_better():
    figure = scoreboard_panel.chart(at(), "ms", "psnr_y", lit="twin")
    axis = figure.axes[0]
    assert {t.get_text() for t in axis.texts} == {"small", "twin", "large"}  # the published one has no time
    assert axis.get_xscale() == "log" and "more is better" in axis.get_ylabel() and "less" in axis.get_xlabel()
    both = scoreboard_panel.chart(rows(), "parameters", "lpips")
    assert {t.get_text() for t in both.axes[0].texts} == {"small ×4", "twin ×4", "large ×4", "far ×4", "other ×2"}
    with pytest.raises(ValueError, match="no network has both FLOPs"):
        scoreboard_panel.chart(rows().query("name == 'far'"), "flops", "psnr_y")
    assert len(scoreboard_panel.grid(rows()).axes) == 12


def test_panel_redraws_and_shows_numbers_at_each_point():
    panel = scoreboard_panel.scoreboard_panel(rows())
    assert panel.image.value.count("class='nb-point") == 4 and "4 networks." in panel.status.value
    assert "far ×4, published" in panel.image.value and "PSNR-Y (dB), Set5: 32.00" in panel.image.value
    seen = {panel.image.value}
    for control, value in (("y", "lpips"), ("x", "ms"), ("lit", "twin"), ("scale", 0), ("published", False)):
        getattr(panel, control).value = value
        seen.add(panel.image.value)
    assert len(seen) == 5  # without a time, the published network was not on show
    assert "1 more lack" not in panel.status.value


@pytest.fixture
def ends(small_photos, networks):
    """Best and worst photos of two untrained networks."""
    rows = [("tiny_x2", 2, "c", "c", 1.0, -1.0), ("tiny_x4", 4, "c", "gone", 2.0, 0.5)]
    scoreboard_panel._small.cache_clear()
    yield pd.DataFrame(rows, columns=["name", "scale", "best", "worst", "best_gain", "worst_gain"])
    scoreboard_panel._small.cache_clear()


def test_windows_show_one_place_three_times(ends):
    pictures = scoreboard_panel.windows("tiny_x2", 2, "c", 32)
    assert [tuple(p.shape) for p in pictures] == [(3, 32, 32)] * 3
    assert all(p.min() >= 0 and p.max() <= 1 for p in pictures) and not pictures[0].equal(pictures[2])


def test_extremes_panel_redraws_and_tells_problems_in_words(ends):
    panel = scoreboard_panel.extremes_panel(ends)
    before = panel.image.value
    assert "tiny_x2 ×2: best c +1.00 dB, worst c -1.00 dB" in panel.status.value and before
    panel.side.value = 32
    assert panel.image.value not in (before, b"")
    panel.network.value = 1
    assert panel.image.value == b"" and "gone.png" in panel.status.value


def test_panel_tells_in_words_that_there_is_nothing():
    panel = scoreboard_panel.scoreboard_panel(rows().query("name == 'far'"))
    panel.x.value = "ms"
    assert panel.image.value == "" and "no network has both ms" in panel.status.value


def test_verdict_map_has_a_mark_for_every_finding_and_open_claim():
    found = [Finding("K4", "K4 a", "", v, "02") for v in ("fails", "holds", "holds")]
    figure = scoreboard_panel.verdict_map(found)
    marks = [len(c.get_offsets()) for axis in figure.axes for c in axis.collections]
    assert sum(marks) == len(register.known()) - 1 + 3


def test_a_pruned_network_is_committed_and_a_readers_own_is_not(monkeypatch):
    names = ["espcn_x4", "espcn_x4_pruned", "mine", "mine_pruned"]
    monkeypatch.setattr(checkpoints, "available", lambda: names)
    assert set5.committed() == names[:2]


def test_published_networks_have_a_source():
    table = pd.read_csv(runtime.DATA / scoreboard.PUBLISHED)
    assert not table.duplicated(["name", "scale"]).any()
    assert set(table.origin) == {"weights", "paper"} and table.source.notna().all()
    assert table.psnr_y.between(25, 40).all() and table.parameters.gt(0).all()


def test_study_measures_networks_of_different_scales_on_one_size():
    networks = [("bicubic", 3, "bicubic"), ("espcn_x4", 4, "espcn_x4"), ("espcn_x2", 2, "espcn_x2")]
    found = study.costs(networks, side=48, repeats=1)
    assert [r["scale"] for r in found] == sorted(r["scale"] for r in found)
    assert {r["model"]: r["parameters"] for r in found}["espcn_x4"] == checkpoints.card("espcn_x4")["parameters"]
    assert all(r["flops"] > 0 and r["ms"] > 0 and r["peak_mb"] >= 0 and r["machine"] for r in found)
    with pytest.raises(ValueError, match=r"side 50 is no multiple of \[3, 4\]"):
        study.costs(networks, side=50)


def test_peers_are_the_published_networks():
    """The library's networks have as many parameters as the published table says, to a thousand."""
    table = pd.read_csv(runtime.DATA / scoreboard.PUBLISHED).set_index(["name", "scale"])
    for name, scale, network in study.peers():
        count = sum(p.numel() for p in network.parameters())
        assert abs(count - table.loc[(name, scale), "parameters"]) < 1000, name


@pytest.mark.skipif(not (runtime.RESULTS / study.NAME).is_file(), reason="the study scoreboard has not run yet")
def test_committed_tables_hold_every_committed_network():
    committed, table = set(set5.committed()), scoreboard.table()
    assert committed <= set(table[table.kind == OURS].dropna(subset=["ms", "psnr_y"]).name)
    assert committed <= set(scoreboard.gains().name)
