"""Large pictures: tiles as large as memory allows, peak memory bounded, and nothing left behind by a stopped run."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from nbhelpers import checkpoints, inference, runtime
from nbhelpers.inference import upscale

from .test_inference import assert_same, network, picture, png

PEAK = """
import sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from nbhelpers import inference, models

def memory(what):  # VmRSS now, VmHWM at most; getrusage would count the parent process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

folder, side = Path(sys.argv[1]), inference.AUTO_TILE + 8
torch.set_num_threads(1)
before = memory("VmRSS")
inference.upscale(models.build("ESPCN", scale=2, channels=128), np.zeros((side, side, 3), np.uint8), tile=0)
one_tile = memory("VmHWM") - before
Image.fromarray(np.tile(np.arange(250, dtype=np.uint8)[None, :, None], (4000, 24, 3))).save(folder / "in.bmp")
inference.upscale_file(models.build("ESPCN", scale=2, channels=1), folder / "in.bmp", folder / "out.jpg")
print(one_tile, memory("VmHWM"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's count of peak memory")
def test_memory_of_a_24_megapixel_photo_is_bounded(tmp_path):
    """A photo of 6000x4000 at x2 within 1.5 GB beside the decoded pictures, the Python process itself included.

    With 128 channels that takes minutes on a CPU. Peak memory is at most what a full run needs with one channel
    plus what the largest tile needs with 128, and both are measured here; that no tile is larger is checked.
    """
    jobs = list(inference._tiles(4000, 6000, inference.AUTO_TILE, 4, inference.LEAST_AREA))
    largest = max((j.seen[0].stop - j.seen[0].start) * (j.seen[1].stop - j.seen[1].start) for j in jobs)
    assert largest <= (inference.AUTO_TILE + 8) ** 2
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    one_tile, full = map(int, done.stdout.split())
    pictures = 3 * (6000 * 4000 + 12000 * 8000)
    assert one_tile > 2 * 128 * 4 * inference.AUTO_TILE**2 * 0.9, "the tile's features were really held"
    print(f"one tile {one_tile / 1e6:.0f} MB, full run {full / 1e6:.0f} MB, pictures {pictures / 1e6:.0f} MB")
    assert full + one_tile - pictures < 1.5e9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # 96 megapixels
        assert Image.open(tmp_path / "out.jpg").size == (12000, 8000)


class Wide(torch.nn.Module):
    """Two pointwise convolutions with 512 channels between: 2 kB a pixel, and hardly any arithmetic."""

    scale = 2

    def __init__(self, halo: int | None = 0):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 512, 1), torch.nn.Conv2d(512, 12, 1), torch.nn.PixelShuffle(2)
        )
        self.halo = halo

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def tiles_of(model: torch.nn.Module, h: int, w: int, monkeypatch, memory: float, **options: object) -> list:
    monkeypatch.setattr(runtime, "memory_for", lambda device: memory)
    given = {"tile": None, "overlap": None} | options
    return inference._plan(model, h, w, where=torch.device("cpu"), precision="fp32", **given)


def seen_pixels(job: inference._Tile) -> int:
    return (job.seen[0].stop - job.seen[0].start) * (job.seen[1].stop - job.seen[1].start)


def test_tiles_are_as_large_as_memory_allows(monkeypatch):
    model = Wide()
    one = 4 * (512 + 12)  # bytes of features at a pixel: both convolutions' outputs
    weights = 2 * sum(p.nbytes for p in model.parameters())
    assert len(tiles_of(model, 300, 300, monkeypatch, 1e9)) == 1, "small enough as it is"
    jobs = tiles_of(model, 300, 300, monkeypatch, weights + one * 150**2)
    assert [(j.core[0].stop, j.core[1].stop) for j in jobs] == [(150, 150), (150, 300), (300, 150), (300, 300)]
    assert len(tiles_of(model, 128, 128, monkeypatch, 1.0)) == 1, "small pictures are not worth a look"
    assert len(tiles_of(model, 300, 300, monkeypatch, 1.0, tile=0)) == 1, "whole was asked for"
    x = picture(300, 300)
    monkeypatch.setattr(runtime, "memory_for", lambda device: weights + one * 150**2)
    assert_same(upscale(model, x), upscale(model, x, tile=0))


def test_overlap_where_memory_is_short(monkeypatch, recwarn):
    memory = 4 * (512 + 12) * 200**2 + 2 * sum(p.nbytes for p in Wide().parameters())
    for halo, overlap, core, reach in ((50, None, 100, 50), (200, 90, 50, 90), (None, None, 136, 32)):
        jobs = tiles_of(Wide(halo), 600, 600, monkeypatch, memory, overlap=overlap)
        inner = jobs[len(jobs) // 2]  # not at the border, where it sees less
        assert inner.core[0].stop - inner.core[0].start == core
        assert inner.core[0].start - inner.seen[0].start == reach
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"sees 90 pixels far, but only 200x200 fit into memory.*overlap by 25"):
        jobs = tiles_of(Wide(90), 600, 600, monkeypatch, memory)
    assert max(map(seen_pixels, jobs)) == 200**2


TILED = """
import numpy as np, torch
from nbhelpers import inference, profiling, runtime
from nbhelpers.tests.test_large_pictures import Wide

torch.set_num_threads(1)
model, array = Wide(), np.zeros((760, 760, 3), np.uint8)
inference.upscale(model, array[:150, :150])
for memory in (64e6, 2e9):
    runtime.memory_for = lambda device: memory
    print(profiling.peak_of_call(lambda: inference.upscale(model, array), torch.device("cpu")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's count of peak memory")
def test_memory_stays_within_what_a_device_may_take():
    """Features of the whole picture would be 1.2 GB; 64 MB are allowed, and the output takes 7 MB."""
    done = subprocess.run([sys.executable, "-c", TILED], capture_output=True, text=True, check=True)
    tiled, whole = map(int, done.stdout.split())
    assert tiled < 64e6 * 1.5 + 4 * 3 * 760**2 + 20e6 and whole > 1.1e9


WRITING = """
import sys
from PIL import Image
from nbhelpers.__main__ import main

def save(image, *args, write=Image.Image.save, **options):
    print("writing", file=sys.stderr, flush=True)
    write(image, *args, **options)

Image.Image.save = save
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGKILL"])
@pytest.mark.parametrize("moment", ["upscaling:  ", "writing"])
def test_a_stopped_run_leaves_nothing_behind(tmp_path, stop, moment):
    """Neither the picture nor a temporary file, in the middle of the tiles or of the compression."""
    model = network(4, 128 if "upscaling" in moment else 8)
    checkpoints.save("net", model, "ESPCN", {"scale": 4, "channels": model.features[0].out_channels}, {}, [], tmp_path)
    side, out = 1000, tmp_path / "out"
    png(tmp_path / "in.png", side, side)  # noise, which is slow to compress
    out.mkdir()
    command = [
        "upscale",
        str(tmp_path / "in.png"),
        "-o",
        str(out / "big.png"),
        "--model",
        str(tmp_path / "net.safetensors"),
    ]
    with subprocess.Popen([sys.executable, "-c", WRITING, *command], stderr=subprocess.PIPE) as process:
        read = b""
        while moment.encode() not in read:
            byte = process.stderr.read(1)
            assert byte, read.decode()
            read += byte
        process.send_signal(getattr(signal, stop))
        rest = process.stderr.read()
    assert list(out.iterdir()) == []
    assert process.returncode == (130 if stop == "SIGINT" else -signal.SIGKILL)
    assert stop == "SIGKILL" or rest.rstrip().endswith(b"interrupted")
    assert b"Traceback" not in rest
