"""Frozen features of VGG16 (Simonyan & Zisserman 2015), for the perceptual loss and for looking at them.

The weights are torchvision's files, looked for in `TORCH_HOME` and in the optional shared pack. A file there may be
cut down to the first convolutions: only the layers asked for are read. torchvision's file names carry the first
eight digits of the file's SHA-256; it is compared when a file is downloaded and not at every load, because a cut
file cannot have that hash and hashing 528 MB takes longer than reading the layers.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import runtime

if TYPE_CHECKING:
    from torchvision.models import VGG16_Weights

BLOCKS = (2, 2, 3, 3, 3)  # VGG16's convolutions between one max pool and the next
WHOLE_FILE = "528 MB"


def _indices() -> dict[str, int]:
    # torchvision counts every layer of `features`: each convolution has its ReLU, each block ends in a max pool.
    out, index = {}, 0
    for block, count in enumerate(BLOCKS, 1):
        for i in range(1, count + 1):
            out[f"conv{block}_{i}"] = index
            index += 2
        index += 1
    return out


LAYERS = _indices()
"""VGG16's convolutions in order, "conv1_1" … "conv5_3", with their index in torchvision's ``vgg16().features``."""


class FeatureWeightsError(ValueError):
    """A weight file lacks a wanted layer or cannot be read; the message says which, where, and where to get it."""


def layers_to(depth: str) -> tuple[str, ...]:
    """Names of the convolutions up to and including ``depth``; ValueError for an unknown one."""
    if depth not in LAYERS:
        raise ValueError(f"VGG16 has no layer {depth!r}; choose from {', '.join(LAYERS)}")
    names = tuple(LAYERS)
    return names[: names.index(depth) + 1]


def available_layers(weights: str = "IMAGENET1K_FEATURES") -> tuple[str, ...]:
    """Convolutions whose weights are on this machine, in order; empty without a file. Never downloads."""
    return max((_layers_in(_read(path)) for path in _files(_source(weights))), key=len, default=())


class VGG16Features(nn.Module):
    """VGG16's convolutions up to ``depth``, frozen: "b 3 h w" in [0, 1] → {"conv1_1": "b 64 h w", …}.

    Each feature is what the convolution gives *before* its ReLU (document 002: after it half the signal would be
    zero). Pictures are standardised as the weights' own torchvision preset says, so features are in that network's
    units: IMAGENET1K_FEATURES (from the original Caffe network) reads values of 0–255 where IMAGENET1K_V1 reads
    values of about ±2. A feature times ``unit`` is comparable between the two.

    The weights are buffers outside the state dict: they follow ``.to(device)``, are never trained and never saved.

    Args:
        depth: the last convolution, "conv1_1" … "conv5_3".
        weights: a name in torchvision's ``VGG16_Weights``: "IMAGENET1K_FEATURES", or document 002's "IMAGENET1K_V1".

    Raises ValueError for an unknown name, FeatureWeightsError for a file without a wanted layer. Where there is no
    file at all it is downloaded with a progress bar (528 MB; DownloadError where that fails).
    """

    def __init__(self, depth: str = "conv2_2", weights: str = "IMAGENET1K_FEATURES"):
        super().__init__()
        self.layers, source = layers_to(depth), _source(weights)
        preset = source.transforms()
        self._hold("mean", torch.tensor(preset.mean).reshape(3, 1, 1))
        self._hold("std", torch.tensor(preset.std).reshape(3, 1, 1))
        self.unit = float(self.std.mean()) / (sum(type(source).IMAGENET1K_V1.transforms().std) / 3)
        state = _load(self.layers, source)
        for name in self.layers:
            kernel, bias = _keys(name)
            # Channels last like the networks in training, whose pictures would else be copied at every layer.
            self._hold(f"{name}_weight", state[kernel].float().contiguous(memory_format=torch.channels_last))
            self._hold(f"{name}_bias", state[bias].float())

    def _hold(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.clone(), persistent=False)

    @property
    def min_size(self) -> int:
        """Shortest side in pixels of a picture that leaves one value in the deepest feature."""
        return 2 ** (int(self.layers[-1][4]) - 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = (x - self.mean) / self.std
        out: dict[str, Tensor] = {}
        for name in self.layers:
            if out:
                x = F.relu(x)  # a new tensor: in place it would overwrite the feature already noted
                if name.endswith("_1"):
                    x = F.max_pool2d(x, 2)
            x = F.conv2d(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"), padding=1)
            out[name] = x
        return out


# --- weight files -----------------------------------------------------------------------------------------


def _source(weights: str) -> VGG16_Weights:
    """torchvision's entry for the weights: URL and preprocessing."""
    from torchvision.models import VGG16_Weights

    if weights not in VGG16_Weights.__members__:
        raise ValueError(f"weights {weights!r} are unknown; choose one of {list(VGG16_Weights.__members__)}")
    return VGG16_Weights[weights]


def _keys(layer: str) -> tuple[str, str]:
    return f"features.{LAYERS[layer]}.weight", f"features.{LAYERS[layer]}.bias"


def _target() -> Path:
    return runtime.torch_home() / "hub" / "checkpoints"


def _files(source: VGG16_Weights) -> list[Path]:
    """The weight file in ``TORCH_HOME`` and in the shared pack, as far as they are there."""
    pack = runtime.shared()
    folders = [_target(), *([pack / "torch" / "hub" / "checkpoints"] if pack else [])]
    files = (folder / Path(source.url).name for folder in dict.fromkeys(folders))
    return [path for path in files if path.is_file()]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # Mapped into memory, the layers nobody asks for are never read; the oldest file format cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).partition("\n")[0]
        raise FeatureWeightsError(f"{path} cannot be read ({first}); delete it and fetch it again") from error


def _layers_in(state: dict[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name in LAYERS if all(key in state for key in _keys(name)))


def _load(layers: tuple[str, ...], source: VGG16_Weights) -> dict[str, Tensor]:
    """State dict of the first file that has every wanted layer; downloads only where there is no file."""
    files = _files(source) or [download_vgg16(source.name)]
    states = [_read(path) for path in files]
    for state in states:
        if set(layers) <= set(_layers_in(state)):
            return state
    here = _layers_in(states[0])
    missing = [name for name in layers if name not in here]
    raise FeatureWeightsError(
        f"{files[0]} has no weights for {', '.join(missing)}, only for {', '.join(here) or 'no layer'}: choose a depth "
        f"within these, or fetch the whole file ({WHOLE_FILE}) from {source.url} into FOLDER/hub/checkpoints and set "
        "TORCH_HOME=FOLDER"
    )


def download_vgg16(
    weights: str = "IMAGENET1K_FEATURES", target: Path | None = None, progress: bool = True, base_url: str | None = None
) -> Path:
    """Fetch VGG16's whole weight file (528 MB) and return its path; does nothing where it is already whole.

    A cut or damaged file of that name is replaced, but only once the new one has arrived with the right hash.

    Args:
        weights: a name in torchvision's ``VGG16_Weights``.
        target: folder; ``hub/checkpoints`` under ``TORCH_HOME`` when None.
        progress: show a progress bar in bytes.
        base_url: another server that holds the same file, for example a mirror.

    Raises DownloadError, with URL, size, folder and hash, for no connection, a server error or a wrong hash.
    """
    from .datasets.download import DownloadError, fetch_weights

    url, folder = _source(weights).url, Path(target) if target else _target()
    if base_url:
        url = f"{base_url.rstrip('/')}/{Path(url).name}"
    try:
        return fetch_weights(url, folder, progress)
    except DownloadError as error:
        raise DownloadError(f"VGG16's weights ({weights}, {WHOLE_FILE}) are not here: {error}") from error
