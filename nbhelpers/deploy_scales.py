"""Networks for any scale as files: an encoder that runs once for a picture, and a renderer that runs for every size."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .deploy import FORMATS, TOLERANCE, ExportError, line, write
from .models.continuous import AnyScale, Axes, ContinuousSR
from .models.sampling import axes_between

PARTS = ("encoder", "renderer")
POINTS = 2**16  # output pixels asked for at once
CHECKED = ((24, 30, 2.7), (17, 29, 4), (31, 20, (2, 3.5)))  # height, width and scale of the pictures compared


class Encode(nn.Module):
    """Pictures "1 3 h w" in [0, 1] → features "1 c h w"."""

    def __init__(self, model: ContinuousSR):
        super().__init__()
        self.model = model

    def forward(self, lr: Tensor) -> Tensor:
        return self.model.encode(lr)


class Render(nn.Module):
    """Features "1 c h w", their picture "1 3 h w", coordinates "1 q 2" (y, x) in [-1, 1] of the centres of output
    pixels, and the enlargement "2" (y, x) → their colours "1 q 3", not clamped."""

    def __init__(self, model: ContinuousSR):
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, lr: Tensor, coords: Tensor, ratio: Tensor) -> Tensor:
        return self.model.at_points(features, lr, ratio, axes_between(coords, tuple(features.shape[-2:])))


class ExportedScales(AnyScale):
    """The two files written by :func:`export` as one of our networks for any scale; ``path`` is either of them.

    They compute as :class:`nbhelpers.deploy.Exported` does. Raises ValueError for files that cannot be read or do not
    belong together, FileNotFoundError where one is missing.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        stem = path.stem.rpartition("_")[0]
        parts = [FORMATS[path.suffix](path.with_name(f"{stem}_{part}{path.suffix}")) for part in PARTS]
        infos = [part.info for part in parts]
        if infos != [infos[0] | {"part": part} for part in PARTS]:
            raise ValueError(f"{stem}_encoder{path.suffix} and {stem}_renderer{path.suffix} are not of one network")
        super().__init__(infos[0]["scale"])
        self.info, self.halo, self.grid = infos[0], infos[0]["halo"], infos[0]["grid"]
        self.encoder, self.renderer = parts

    @torch.no_grad()
    def at_grid(self, x: Tensor, axes: Axes, ratio: tuple[float, float]) -> Tensor:
        pictures, enlargement = x.float().cpu().contiguous(), torch.tensor(ratio, dtype=torch.float32)
        shape = pictures.shape[-2:]
        places = [(a.low + a.fraction.double() + 0.5) * (2 / n) - 1 for a, n in zip(axes, shape, strict=True)]
        coords = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).float().cpu().view(1, -1, 2)
        out = []
        for lr in pictures.split(1):
            features = self.encoder.compute(lr)
            parts = [self.renderer.compute(features, lr, part, enlargement) for part in coords.split(POINTS, 1)]
            out.append(torch.cat(parts, 1))
        return torch.cat(out).mT.unflatten(2, tuple(map(len, places))).to(x.device)


def is_part(path: Path) -> bool:
    """Is this one of the two files, by its name?"""
    return path.stem.rpartition("_")[2] in PARTS


def export(network: ContinuousSR, path: Path, info: dict[str, object], name: str) -> dict[str, object]:
    """Write STEM_encoder and STEM_renderer beside ``path`` = STEM.onnx or STEM.pt2; see :class:`Encode`,
    :class:`Render`.

    Both appear only if together they give PyTorch's pictures to 1e-4 at three sizes and scales; the largest
    ``difference`` is returned with the metadata and the ``files``. Raises ExportError where PyTorch cannot export a
    part or the values differ.
    """
    with torch.no_grad():
        lr = torch.rand(1, 3, 24, 30)
        features, coords, ratio = network.encode(lr), torch.rand(1, 77, 2) * 2 - 1, torch.tensor([2.5, 3.0])
    size, points = {2: "height", 3: "width"}, {1: "points"}
    inputs = {"encoder": {"lr": (lr, size)}, "renderer": {"features": (features, size), "lr": (lr, size)}}
    inputs["renderer"] |= {"coords": (coords, points), "ratio": (ratio, {})}
    outputs, modules = {"encoder": "features", "renderer": "colours"}, {"encoder": Encode, "renderer": Render}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = [Path(folder) / f"{path.stem}_{part}{path.suffix}" for part in PARTS]
        for part, file in zip(PARTS, made, strict=True):
            module = modules[part](network).eval()
            write(module, file, info | {"part": part}, f"{part} of {name}", inputs[part], outputs[part])
        difference = _check(network, ExportedScales(made[0]), name)
        files = [file.replace(path.with_name(file.name)) for file in made]
    return info | {"difference": difference, "files": [file.name for file in files]}


@torch.no_grad()
def _check(network: ContinuousSR, exported: ExportedScales, name: str) -> float:
    """Largest difference of the two over random pictures; ExportError above ``TOLERANCE``."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for h, w, scale in CHECKED:
        x = torch.rand(1, 3, h, w, generator=generator)
        try:
            got = exported.at(scale)(x)
        except Exception as error:  # ONNX Runtime's share no class of their own
            raise ExportError(f"the files of {name!r} cannot compute {h}x{w} pixels: {line(error)}") from error
        worst = max(worst, float((network.at(scale)(x) - got).abs().max()))
    if not worst <= TOLERANCE:  # also NaN
        raise ExportError(f"the files of {name!r} differ from PyTorch by {worst:.2g}, more than {TOLERANCE:g}")
    return worst
