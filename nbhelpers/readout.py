"""The numbers under a comparison, as HTML: quality, time and memory of each side."""

from __future__ import annotations

import html
from collections.abc import Mapping

from . import metrics
from .comparison import AS_IS, Comparison, Damage

NO_ORIGINAL = "no original exists, so no PSNR"
KEYS = ("psnr_y", "ssim_y", "lpips")
STYLE = """<style>
.nb-numbers {border-collapse: collapse; font: 13px system-ui, sans-serif}
.nb-numbers th, .nb-numbers td {padding: 2px 14px 2px 0; text-align: right; font-variant-numeric: tabular-nums}
.nb-numbers th[scope=row] {text-align: left}
.nb-note {display: block; max-width: 76em; line-height: 1.35; font: 12px system-ui, sans-serif}
</style>"""
MEASURED = (
    "ms: one run on this machine; MB: weights and the most that the network's tensors held at once in that run, "
    "counted; the picture given to it is not included"
)


def table(result: Comparison, names: Mapping[str, str], damage: Damage, lpips: bool) -> str:
    """A table with a row for bicubic and each network, and the line that belongs under it.

    ``names`` are those of the keys "other" and "network"; ``lpips`` says whether it was asked for.
    """
    keys = KEYS if result.scores else ()
    head = "".join(f"<th scope='col'>{t}</th>" for t in ("", *(metrics.NAMES[k] for k in keys), "ms", "MB"))
    rows = []
    for key, ms in result.milliseconds.items():
        scores = result.scores.get(key, {})
        cells = [number(metric, scores[metric], lpips) for metric in keys]
        cells += [f"{ms:.0f}", megabytes(result.bytes[key])]
        title = html.escape(names.get(key, key))
        rows.append(f"<tr><th scope='row'>{title}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return (
        f"{STYLE}<table class='nb-numbers'><tr>{head}</tr>{''.join(rows)}</table>"
        f"<span class='nb-note'>{html.escape(note(result, damage))}</span>"
    )


def note(result: Comparison, damage: Damage) -> str:
    """What the numbers are, in one line."""
    said = metrics.protocol(result.scale) if result.scores else f"Mode “{AS_IS}”: {NO_ORIGINAL}"
    if str(damage):
        said += f"; input damaged by {damage}"
    return f"{said}. {MEASURED}."


def number(metric: str, value: float | None, lpips: bool = True) -> str:
    """One score, or why there is none."""
    if value is not None:
        return f"{value:.2f}" if metric.startswith("psnr") else f"{value:.4f}"
    if metric == "lpips" and not lpips:
        return "off"
    return "not available" if metric == "lpips" else "part too small"


def megabytes(size: int | None) -> str:
    """Bytes as MB; "not seen" for what another runtime held."""
    return "not seen" if size is None else f"{size / 1e6:.1f}" if size < 1e8 else f"{size / 1e6:.0f}"
