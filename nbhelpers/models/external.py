"""Networks trained elsewhere (ESRGAN, Real-ESRGAN, SwinIR, DAT …), recognised by spandrel from their weights."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")


class External(nn.Module):
    """A third-party upscaler as one of ours: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale", unclamped.

    ``halo`` is None: how far such a network sees is not known, so tiles overlap by a generous default.
    """

    halo = None

    def __init__(self, descriptor: object):
        super().__init__()
        self.network, self.scale = descriptor.model, descriptor.scale
        self.arch = descriptor.architecture.name
        self._multiple = descriptor.size_requirements.multiple_of
        self._least = descriptor.size_requirements.minimum

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        pad = [max(self._least, -(-n // self._multiple) * self._multiple) - n for n in (w, h)]
        x = nn.functional.pad(x, (0, pad[0], 0, pad[1]), mode="replicate") if any(pad) else x
        return self.network(x)[..., : h * self.scale, : w * self.scale].float()


def load_external(path: str | Path) -> External:
    """Read a weight file of a published network; in eval mode, without gradients.

    Pickled files are read with ``weights_only=True``, so they cannot run code. Raises ValueError for a file that
    cannot be read, or is no picture-to-picture network with 3 channels that spandrel knows.
    """
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError, canonicalize_state_dict

    path = Path(path)
    try:
        if path.suffix.lower() == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        found = ModelLoader().load_from_state_dict(canonicalize_state_dict(state))
    except UnsupportedModelError:
        raise ValueError(f"{path.name} holds no network that spandrel knows (ESRGAN, SwinIR, DAT …)") from None
    except (pickle.UnpicklingError, SafetensorError, OSError, RuntimeError, EOFError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path.name} is not a readable weight file ({reason})") from error
    if not isinstance(found, ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise ValueError(
            f"{path.name} holds {found.architecture.name}, which does not map RGB pictures to RGB pictures"
        )
    return External(found).eval().requires_grad_(False)


def rrdbnet(channels: int = 64, blocks: int = 23, scale: int = 4) -> nn.Module:
    """ESRGAN's generator, untrained (Wang et al. 2018): 16,697,987 parameters at x4; the reference for count and speed.

    The class is spandrel's, so a published file fits it. "b 3 h w" in [0, 1] → "b 3 h·scale w·scale".
    """
    from spandrel.architectures.ESRGAN import ESRGAN

    model = ESRGAN(num_filters=channels, num_blocks=blocks, scale=scale)
    model.halo = 1 + 15 * blocks + 1 + 3  # first, 3 x 5 per block, trunk; the rest works at higher resolution
    return model
