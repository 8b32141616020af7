"""What a network costs on paper, without a clock: parameters, FLOPs, bytes moved, and memory alive at once."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REST = "between"  # what a network computes itself, outside its parts: sums, concatenations
# The parts of the networks by the names of their children; others keep their own name.
PARTS = {
    "head": ("head", "first"),
    "blocks": ("body",),
    "trunk": ("trunk", "body_conv"),
    "upsampling": ("upsampling", "upscale", "to_subpixels", "shuffle"),
    "last convolution": ("tail",),
    "bicubic": ("skip",),
}


class Ledger(TorchDispatchMode):
    """Adds up the bytes that this thread's operations read and write, by ``label``, and those of tensors alive at once.

    Within ``with Ledger() as ledger``; ``ledger.peak`` is the most that the tensors made there held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label, self.moved = REST, Counter()
        self.alive = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for storage in (t.untyped_storage() for t in made):
            if storage not in self._known:  # a view or an in-place result shares what is known already
                self._known.add(storage)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        if not func.is_view:
            read = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            self.moved[self.label] += sum(t.nbytes for t in (*read, *made))
        return out

    def _free(self, size: int) -> None:
        self.alive -= size

    def enter(self, part: str) -> None:
        self.label = part

    def leave(self, _: str) -> None:
        self.label = REST


def peak_activations(model: nn.Module, x: torch.Tensor) -> int:
    """Most bytes that the tensors made by ``model(x)`` hold at once; the input and the weights are not counted.

    Found by running it, in the precision of an autocast around the call. Proportional to the pixels of x. What
    oneDNN or cuDNN take in passing is not seen.
    """
    with torch.no_grad(), Ledger() as ledger:
        model(x)
    return ledger.peak


def flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Floating-point operations (2 per multiply-add) of one forward pass on an input of ``shape``."""
    # Here, for it imports triton: 70 MB that enlarging a picture can do without.
    from torch.utils.flop_counter import FlopCounterMode

    device = next(itertools.chain(model.parameters(), model.buffers())).device  # bicubic has no parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(shape, device=device))
    return counter.get_total_flops()


def parts(model: nn.Module) -> dict[str, list[str]]:
    """The parts of a network in forward order, {"blocks": names of its modules}: see ``PARTS``.

    Of a network that is one chain of layers (ESRGAN's generator), what stands before the only container is the head
    and what follows it the upsampling.
    """
    names, prefix = dict(model.named_children()), ""
    while len(names) == 1 and isinstance(only := next(iter(names.values())), nn.Sequential):
        prefix += next(iter(names)) + "."
        names = dict(only.named_children())
    containers = [name for name, child in names.items() if next(child.children(), None) is not None]
    if prefix and len(containers) == 1:
        at = list(names).index(containers[0])
        label = {name: ("head", "blocks", "upsampling")[(i >= at) + (i > at)] for i, name in enumerate(names)}
    else:
        label = {child: part for part, children in PARTS.items() for child in children}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(label.get(name, name), []).append(prefix + name)
    return found


@contextlib.contextmanager
def watching(model: nn.Module, enter: Callable[[str], object], leave: Callable[[str], object]) -> Iterator[None]:
    """Call ``enter(part)`` before and ``leave(part)`` after each module of :func:`parts` runs."""
    handles = []
    for part, names in parts(model).items():
        for module in map(model.get_submodule, names):
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: enter(part)))
            handles.append(module.register_forward_hook(lambda *_, part=part: leave(part)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count(model: nn.Module, shape: tuple[int, int, int, int]) -> list[dict]:
    """Parameters, arithmetic and traffic of a network's parts for an fp32 input of ``shape`` "b c h w".

    Rows {"part", "parameters", "flops", "macs" = flops / 2, "bytes", "intensity", "flops_share", "bytes_share"}; the
    last row is their "total". FLOPs are those of convolutions and matrix products, as ``torch.utils.flop_counter``
    counts them. Bytes are what each operation reads (weights too) and writes, 4 per value, as if nothing stayed in a
    cache between two operations; ``intensity`` is FLOPs per byte, and twice that in 2-byte precision.
    """
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(shape, device=next(model.parameters()).device)
    ledger = Ledger()
    labelling = watching(model, ledger.enter, ledger.leave)
    with torch.no_grad(), labelling, FlopCounterMode(display=False) as counter, ledger:
        model(x)
    root, counts = type(model).__name__, counter.get_flop_counts()
    rows = []
    for part, names in parts(model).items():
        used = sum(sum(counts.get(f"{root}.{name}", {}).values()) for name in names)
        weights = {p for name in names for p in model.get_submodule(name).parameters()}
        rows.append(_row(part, sum(p.numel() for p in weights), used, ledger.moved[part]))
    everything = [sum(p.numel() for p in model.parameters()), counter.get_total_flops(), ledger.moved.total()]
    in_parts = [sum(row[key] for row in rows) for key in ("parameters", "flops", "bytes")]
    rest = [whole - part for whole, part in zip(everything, in_parts, strict=True)]
    rows += [_row(REST, *rest)] * any(rest) + [_row("total", *everything)]
    for row in rows:
        row["flops_share"], row["bytes_share"] = row["flops"] / max(1, everything[1]), row["bytes"] / everything[2]
    return [row for row in rows if row["bytes"]]


def _row(part: str, parameters: int, used: int, moved: int) -> dict:
    row = {"part": part, "parameters": parameters, "flops": used, "macs": used // 2, "bytes": moved}
    return row | {"intensity": used / max(1, moved)}
