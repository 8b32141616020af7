"""``python -m nbhelpers readme``: what README.md takes from committed results, namely two tables and a picture."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable

from . import checkpoints, claims, register, runtime

README = "README.md"
PICTURE = "comparison.webp"  # in data/results/
NETWORKS = ("espcn_gan_x4", "m23_rlfn_x4", "lean_srnet_x4")  # of the picture, beside bicubic
PHOTOS = ("abbey_arches", "boats_at_dusk")  # its rows, from data/photos/val
SIDE = 96  # of its windows, in pixels


class ReadmeError(ValueError):
    """README.md lacks the marks of a part, or what the part is made of; the message says which."""


def scores() -> str:
    """The means of ``data/results/set5.csv`` as a Markdown table; what was but a stage of another stays out."""
    from .studies import read

    rows = [r for r in read(runtime.RESULTS / "set5.csv") if r["image"] == "mean" and "_stage" not in r["model"]]
    known = checkpoints.available()
    lines = ["| network | scale | parameters | PSNR-Y (dB) | SSIM-Y | LPIPS-Squeeze |", "|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: (r["scale"], r["psnr_y"])):
        size = f"{checkpoints.card(r['model'])['parameters']:,}" if r["model"] in known else "–"
        lpips = "–" if r["lpips"] == "" else f"{r['lpips']:.3f}"
        lines.append(f"| {r['model']} | ×{r['scale']} | {size} | {r['psnr_y']:.2f} | {r['ssim_y']:.4f} | {lpips} |")
    return "\n".join(lines)


def verdicts() -> str:
    """One line per source document: ``data/documents.csv``'s words, and the verdicts counted in the notebooks."""
    counted = {row["document"]: row for row in register.counts(register.collect())}
    with (runtime.DATA / "documents.csv").open(newline="", encoding="utf-8") as file:
        documents = list(csv.DictReader(file))
    lines = ["| document | what became of it | " + " | ".join(claims.VERDICTS) + " |", "|---|---|" + "---|" * 4]
    for row in documents:
        numbers = (str(counted[row["document"]][verdict]) for verdict in claims.VERDICTS)
        lines.append(f"| {row['document']} {row['subject']} | {row['conclusion']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {"scores": scores, "verdicts": verdicts}


def between(part: str) -> tuple[str, str]:
    """The marks around a part of README.md."""
    return f"<!-- {part}: made by python -m nbhelpers readme -->", f"<!-- end of {part} -->"


def current(part: str, text: str) -> str:
    """What stands between the marks of ``part`` in ``text``. Raises ReadmeError where they are missing."""
    begin, end = between(part)
    _, found, rest = text.partition(begin)
    body, closed, _ = rest.partition(end)
    if not (found and closed):
        raise ReadmeError(f"{README} needs the lines {begin!r} and {end!r}, in this order, around its {part}")
    return body.strip("\n")


def update(*parts: str) -> list[str]:
    """Write ``parts`` (default: all of ``PARTS``) into README.md; the names of those that changed. Raises ReadmeError,
    RegisterError (a notebook is not executed) and OSError (a table is missing)."""
    path, changed = runtime.ROOT / README, []
    text = old = path.read_text(encoding="utf-8")
    for part in parts or PARTS:
        before, after = current(part, text), PARTS[part]()
        if before != after:
            begin, end = between(part)
            head, tail = text.split(begin)[0], text.split(end, 1)[1]
            text = f"{head}{begin}\n{after}\n{end}{tail}"
            changed.append(part)
    if text != old:
        with runtime.atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return changed


def picture() -> None:
    """Write ``data/results/comparison.webp``: where networks and bicubic differ most, on two validation photos."""
    from . import degrade, images, inference, metrics, show

    shown = {}
    for photo in PHOTOS:
        hr = degrade.crop_to_multiple(images.load_image(runtime.PHOTOS / "val" / f"{photo}.png"), 4)
        lr = degrade.downscale(hr, 4)
        enlarged = {n: inference.upscale(inference.get_model(n, 4), lr) for n in ("bicubic", *NETWORKS)}
        window = show.window(enlarged["bicubic"], enlarged[NETWORKS[-1]], hr, SIDE)
        for name, sr in enlarged.items():
            shown[f"{name}: {metrics.psnr_y(sr, hr, 4):.2f} dB"] = sr[window]
        shown[f"original, {photo}"] = hr[window]
    fig = show.side_by_side(shown, columns=len(NETWORKS) + 2, height=2.2)
    with runtime.atomic_path(runtime.RESULTS / PICTURE) as part:
        fig.savefig(part, format="webp", dpi=110, bbox_inches="tight", pil_kwargs={"quality": 75})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m nbhelpers readme``."""
    text = "change nothing; exit code 1 if a table is not what its results give"
    parser.add_argument("--check", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """``python -m nbhelpers readme``."""
    if args.check:
        text = (runtime.ROOT / README).read_text(encoding="utf-8")
        stale = [part for part, make in PARTS.items() if current(part, text) != make()]
        print(f"not up to date: {', '.join(stale)}; run python -m nbhelpers readme" if stale else "up to date")
        return int(bool(stale))
    picture()
    print(f"README.md, changed: {', '.join(update()) or 'nothing'}; written: {runtime.RESULTS / PICTURE}")
    return 0
