"""Structured channel pruning: a narrower network of the same class, made of the channels that matter most.

Which weights belong to one channel is found by following channels through one forward pass, operation by operation.
torch-pruning (1.6.1) does that for many networks, but takes a pixel shuffle for something that keeps its channels
(its issues 98 and 420): of our families it prunes ESPCN alone. Here channels are numbered one by one, so a shuffle, a
concatenation or a fixed interpolation kernel costs a line each, and removing some is indexing.
"""

from __future__ import annotations

import argparse
import inspect
import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import checkpoints, models, runtime

WIDTHS = ("channels", "n_feats", "nf")  # what our classes call their width
SIDE = 24  # pixels of the picture whose channels are followed
BATCHES, BATCH = 8, 16  # of patches of that side, for the importance by Taylor expansion
RATE = 0.5  # of the source's learning rate, when the narrower network is trained on
# Operations that change the picture's size or count its values, not its channels.
SPATIAL = {
    "alias", "avg_pool2d", "clone", "constant_pad_nd", "max_pool2d_with_indices",
    "reflection_pad2d", "replication_pad2d", "upsample_bilinear2d", "upsample_nearest2d",
}  # fmt: skip


class PruningError(RuntimeError):
    """A network that cannot be pruned, or not as asked; the message says why."""


class Channels(TorchDispatchMode):
    """Numbers of all channels of a network: inside this context run it once, without gradients.

    Each weight's outputs get new numbers; an operation that ties two channels together (a sum, a shuffle, a block of
    depthwise weights) makes their numbers one. Afterwards ``dims`` maps (name of a tensor of the state dict,
    dimension) to the numbers along it, and ``roots`` the names of weights to those of their outputs; :meth:`find`
    turns them into final ones. Raises PruningError for an operation through which it cannot follow channels.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(t): name for name, t in model.state_dict(keep_vars=True).items()}
        self.parents: list[int] = []
        self.dims: dict[tuple[str, int], list[int]] = {}
        self.roots: dict[str, list[int]] = {}
        self.seen: dict[int, tuple[Tensor, list[int]]] = {}  # by identity; the tensor is held so that none is reused

    def new(self, count: int) -> list[int]:
        """So many new numbers."""
        self.parents += range(len(self.parents), len(self.parents) + count)
        return list(range(len(self.parents) - count, len(self.parents)))

    def find(self, number: int) -> int:
        """The number that stands for all that were tied to this one."""
        while self.parents[number] != number:
            number = self.parents[number]
        return number

    def final(self, numbers: Sequence[int]) -> Tensor:
        """:meth:`find` of many, as a tensor."""
        return torch.tensor([self.find(n) for n in numbers])

    def tie(self, a: Sequence[int], b: Sequence[int]) -> None:
        """Make the numbers of two lists one, pair by pair."""
        for x, y in zip(a, b, strict=True):
            self.parents[self.find(x)] = self.find(y)

    def mark(self, tensor: Tensor, dim: int, numbers: list[int]) -> None:
        """Note the numbers along one dimension of a weight; one that is used twice ties them."""
        if name := self.names.get(id(tensor)):
            self.tie(self.dims.setdefault((name, dim), numbers), numbers)

    def follow(self, x: Tensor, numbers: list[int]) -> None:
        """Say which channels "b c h w" has."""
        self.seen[id(x)] = (x, numbers)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = [y for x in args for y in (x if isinstance(x, list | tuple) else [x])]
        known = {id(x): self.seen[id(x)][1] for x in flat if isinstance(x, Tensor) and id(x) in self.seen}
        if known:
            first = out[0] if isinstance(out, tuple) else out
            numbers = self._through(func, args, list(known.values()))
            if numbers is None or len(numbers) != first.shape[1]:
                raise PruningError(f"cannot follow the channels of this network through {func} (pruning.Channels)")
            self.follow(first, numbers)
        return out

    def _through(self, func, args: tuple, known: list[list[int]]) -> list[int] | None:
        """Numbers of an operation's channels from those of its inputs; None where no rule is known."""
        name = func.overloadpacket.__name__
        if name == "convolution":
            return self._convolution(args, known[0])
        if name == "native_batch_norm":
            for tensor in args[1:5]:
                self.mark(tensor, 0, known[0])
            return known[0]
        if name == "pixel_shuffle":
            square = args[1] ** 2
            for i in range(square):
                self.tie(known[0][::square], known[0][i::square])
            return known[0][::square]
        if name == "cat" and args[1:] == (1,) and len(known) == len(args[0]):
            return [n for numbers in known for n in numbers]
        spatial = (
            name in SPATIAL
            or (name == "slice" and len(args) > 1 and args[1] > 1)
            or (name == "mean" and args[2:] == (True,))
        )
        if torch.Tag.pointwise in func.tags or spatial:
            widest = max(known, key=len)
            for numbers in known:
                if len(numbers) == len(widest):
                    self.tie(numbers, widest)
            return widest
        return None

    def _convolution(self, args: tuple, x: list[int]) -> list[int] | None:
        weight, bias, transposed, groups = args[1], args[2], args[6], args[8]
        if weight.ndim != 4 or transposed or groups not in (1, len(x)):
            return None
        name = self.names.get(id(weight))
        if groups > 1:  # depthwise: each channel becomes as many as it has kernels
            out = [n for n in x for _ in range(len(weight) // groups)]
        elif name is None:
            return None
        else:
            if name not in self.roots:
                self.roots[name] = self.new(len(weight))
            out = self.roots[name]
            self.mark(weight, 1, x)
        self.mark(weight, 0, out)
        if bias is not None:
            self.mark(bias, 0, out)
        return out


def follow(model: nn.Module) -> Channels:
    """The :class:`Channels` of an upscaler. Raises PruningError."""
    channels = Channels(model)
    x = torch.rand(1, 3, SIDE, SIDE)
    channels.follow(x, channels.new(3))
    with torch.no_grad(), channels:
        model(x)
    return channels


def _sums(channels: Channels, values: Mapping[str, Tensor]) -> Tensor:
    """For each number the sum, over all tensors it appears in, of the absolute sum of its slice of ``values``."""
    total = torch.zeros(len(channels.parents))
    for (name, dim), numbers in channels.dims.items():
        if name in values:
            slices = values[name].detach().float().movedim(dim, 0).reshape(len(numbers), -1).sum(1).abs()
            total.index_add_(0, channels.final(numbers), slices)
    return total


def magnitude(model: nn.Module, channels: Channels) -> Tensor:
    """Importance of each number: L1 norm of its slices of all kernels, each kernel in units of its mean weight."""
    kernels = {name: p.abs() for name, p in model.named_parameters() if p.ndim > 1}
    return _sums(channels, {name: p / p.mean().clamp_min(1e-12) / p.numel() for name, p in kernels.items()})


def taylor(model: nn.Module, channels: Channels, loss: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Importance of each number: first-order estimate of what the loss changes without it (Molchanov et al. 2019).

    ``batches`` are (lr, hr) uint8; ``loss(sr, hr)`` returns (total, terms).
    """
    total, model = torch.zeros(len(channels.parents)), deepcopy(model).requires_grad_(True)
    for lr, hr in batches:
        model.zero_grad()
        loss(model(lr.float() / 255), hr.float() / 255)[0].backward()
        total += _sums(channels, {name: p * p.grad for name, p in model.named_parameters() if p.grad is not None})
    return total


def _kept(channels: Channels, model: nn.Module, smaller: nn.Module, importance: Tensor) -> Tensor:
    """Which numbers stay (bool, by number): of channels that belong together, as many as ``smaller`` has."""
    large, small = model.state_dict(), smaller.state_dict()
    kept, counts = torch.ones(len(channels.parents), dtype=torch.bool), {}
    for name, numbers in channels.roots.items():
        together = tuple(sorted(set(channels.final(numbers).tolist())))
        count = len(together) * small[name].shape[0] / large[name].shape[0]
        if counts.setdefault(together, count) != count or not 0 < count <= len(together) or count % 1:
            raise PruningError(f"{name}: {small[name].shape[0]} of {large[name].shape[0]} channels cannot be kept here")
    if sum(map(len, counts)) != len(set().union(*counts)):
        raise PruningError("groups of channels overlap in this network, so that none can be shortened by itself")
    for together, count in counts.items():
        order = importance[list(together)].argsort(descending=True)
        kept[torch.tensor(together)[order[int(count) :]]] = False
    return kept


@torch.no_grad()
def shrink(model: nn.Module, smaller: nn.Module, channels: Channels, importance: Tensor) -> nn.Module:
    """Fill ``smaller``, a narrower network of the same class, with the most important channels of ``model``.

    Returns it. It computes what ``model`` would if nothing read the channels left out; that is checked. Raises
    PruningError where the two networks do not fit.
    """
    kept, state, silenced = _kept(channels, model, smaller, importance), {}, deepcopy(model)
    originals = silenced.state_dict()
    for name, value in model.state_dict().items():
        for dim in range(value.ndim):
            if (name, dim) in channels.dims:
                inside = kept[channels.final(channels.dims[name, dim])]
                value = value.index_select(dim, inside.nonzero()[:, 0])
                if dim:
                    originals[name][:, ~inside] = 0
        state[name] = value
    try:
        smaller.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise PruningError(
            f"{type(smaller).__name__} is not {type(model).__name__} with fewer channels: {reason}"
        ) from error
    x = torch.rand(2, 3, SIDE, SIDE)
    want, got = silenced.eval()(x), smaller.eval()(x)
    if not torch.allclose(got, want, atol=1e-4 * float(want.abs().max() + 1)):
        raise PruningError(f"the narrower {type(model).__name__} does not compute what the channels kept did")
    return smaller


def narrower(info: Mapping[str, object], ratio: float, multiple: int = 8) -> tuple[dict[str, object], str, int]:
    """(arguments of the narrower network, name of its width, width before) for a network's card.

    The width loses the share ``ratio`` of its channels, rounded to a multiple of ``multiple``. Raises PruningError
    where that leaves none or removes none, or the class has no width; ValueError for a ratio outside 0 < ratio < 1 and
    a multiple below 1.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio {ratio} must lie between 0 and 1")
    if multiple < 1:
        raise ValueError(f"multiple {multiple} must be at least 1")
    parameters = inspect.signature(models.REGISTRY[info["arch"]]).parameters
    name = next((w for w in WIDTHS if w in parameters), None)
    if name is None:
        raise PruningError(f"{info['arch']} has no width among its arguments {list(parameters)}, so none to make less")
    before = info["arguments"].get(name, parameters[name].default)
    after = round(before * (1 - ratio) / multiple) * multiple
    if not 0 < after < before:
        what = "leaves no channel" if not after else "removes no channel"
        raise PruningError(f"ratio {ratio} {what} of {before} in multiples of {multiple}; change --ratio or --multiple")
    return info["arguments"] | {name: after}, name, before


def pruned(cfg: DictConfig) -> nn.Module:
    """The network with which a training begins whose configuration has a section ``prune``: ``init_from``, narrowed.

    ``arch`` and ``model`` say to what, ``prune.importance`` (``taylor`` or ``magnitude``) what stays. Raises
    PruningError, CheckpointError.
    """
    source = checkpoints.load(cfg.init_from)
    smaller = models.build(cfg.arch, **OmegaConf.to_container(cfg.model, resolve=True))
    channels = follow(source)
    if cfg.prune.importance == "magnitude":
        return shrink(source, smaller, channels, magnitude(source, channels))
    if cfg.prune.importance != "taylor":
        raise PruningError(f"prune.importance={cfg.prune.importance} is unknown; choose 'taylor' or 'magnitude'")
    from .datasets.pairs import open_pairs  # which, with the losses, only this needs
    from .degradation import Degradation
    from .losses import WeightedLoss

    damage = OmegaConf.select(cfg, "degradation")
    options = {"patch": SIDE, "batch": BATCH, "degradation": damage and Degradation.of(damage)}
    pairs, _ = open_pairs("bundled", source.scale, progress=False, **options)
    batches = [pairs[step] for step in range(BATCHES)]
    return shrink(source, smaller, channels, taylor(source, channels, WeightedLoss(cfg.loss), batches))


def tuning(
    info: Mapping[str, object], changes: Mapping[str, object], steps: int, overrides: Sequence[str]
) -> DictConfig:
    """The configuration that trains a pruned network on: its source's own, shorter and at half the rate.

    ``changes`` are whole keys, ``overrides`` texts KEY=VALUE of keys that are there. ``steps`` are rounded up to whole
    validations. Raises PruningError where the card does not say how the source was trained, and for a wrong override.
    """
    if not isinstance(info.get("config"), dict):
        raise PruningError(f"the card of {info['name']!r} does not say how it was trained; use --steps 0")
    cfg = OmegaConf.create(info["config"] | {"resume": "auto"} | dict(changes))
    every = min(cfg.trainer.val_every, steps)
    cfg.trainer.val_every, cfg.trainer.max_steps, cfg.trainer.sample_every = every, -(-steps // every) * every, 0
    cfg.optimizer.lr *= RATE
    cfg.optimizer.warmup_steps = min(cfg.optimizer.warmup_steps, steps // 10)
    OmegaConf.set_struct(cfg, True)
    try:
        cfg.merge_with_dotlist(list(overrides))
    except (OmegaConfBaseException, ValueError) as error:
        raise PruningError(f"--set {' '.join(overrides)}: {str(error).splitlines()[0]}") from None
    return cfg


def prune(
    model: str | Path,
    name: str,
    ratio: float = 0.3,
    steps: int = 2000,
    importance: str = "taylor",
    multiple: int = 8,
    overrides: Sequence[str] = (),
    command: str | None = None,
) -> dict[str, object]:
    """Narrow a trained network by :func:`narrower`, train it on for ``steps`` and save it as ``name``.

    The result is an ordinary network of the same class. With 0 steps it is saved as the pruning left it. Returns its
    card. Raises PruningError, also where ``name`` exists, ValueError and CheckpointError for what cannot be pruned, and
    what :func:`nbhelpers.training.train` raises.
    """
    if Path(model).suffix in checkpoints.EXPORTED:
        raise PruningError(f"{model} is an exported file; prune the network it was made from, then export that")
    info = checkpoints.card(model)
    if info.get("kind", "upscaler") != "upscaler":
        raise PruningError(f"{str(model)!r} is a {info['kind']}, not an upscaler; choose one from `list`")
    checkpoints.load(model)  # first: a damaged file or card is told as such
    arguments, _, _ = narrower(info, ratio, multiple)
    if steps < 0:
        raise ValueError(f"steps {steps} must be at least 0")
    if Path(name).name != name:
        raise ValueError(f"the new name {name!r} must not be a path")
    changes = {"name": name, "init_from": str(model), "model": arguments, "prune": {"importance": importance}}
    if steps:
        from .training import train

        train(tuning(info, changes, steps, overrides), command)
        return checkpoints.card(name)
    if name in checkpoints.available(kind=None):
        raise PruningError(f"data/checkpoints/{name} exists; choose another -o NAME")
    cfg = OmegaConf.create({"arch": info["arch"], "loss": {"l1": 1.0}, **(info.get("config") or {}), **changes})
    small = pruned(cfg)
    card = {"scale": small.scale, "command": command, "init_from": str(model), "prune": changes["prune"]}
    checkpoints.save(name, small, info["arch"], arguments, card, [], half=True)
    return checkpoints.card(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m nbhelpers prune``."""
    parser.add_argument("model", metavar="MODEL", help="name from `list`, or a .safetensors file with its card")
    parser.add_argument(
        "-o", "--output", required=True, metavar="NAME", help="name of the new network in data/checkpoints"
    )
    text = "share of the width to take away (default: %(default)s)"
    parser.add_argument("--ratio", type=float, default=0.3, help=text)
    text = "round the new width to a multiple of this; processors like 8 or 16 (default: %(default)s)"
    parser.add_argument("--multiple", type=int, default=8, metavar="N", help=text)
    text = "what makes a channel worth keeping (default: taylor, what the loss on photos would change without it)"
    parser.add_argument("--importance", default="taylor", choices=["taylor", "magnitude"], help=text)
    text = "steps of training afterwards, with the network's own configuration at half its rate; 0: none"
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help=f"{text} (default: %(default)s)")
    text = "change the configuration of that training; may be given more than once, e.g. --set data.roots=[bundled]"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def run(args: argparse.Namespace) -> int:
    """``python -m nbhelpers prune MODEL -o NAME``."""
    options = {k: getattr(args, k) for k in ("ratio", "multiple", "importance", "steps")}
    settings = [f"--{k} {v}" for k, v in options.items()] + [f"--set {shlex.quote(text)}" for text in args.set]
    command = " ".join(["python -m nbhelpers prune", shlex.quote(args.model), "-o", args.output, *settings])
    new = prune(args.model, args.output, overrides=args.set, command=command, **options)
    old = checkpoints.card(args.model)
    _, width, before = narrower(old, args.ratio, args.multiple)
    print(f"{args.output}: {width} {new['arguments'][width]}, in {args.model} {before}")
    share = new["parameters"] / old["parameters"]
    print(f"parameters {new['parameters']:,} of {old['parameters']:,} ({share:.0%})")
    scores = [card.get("metrics", {}).get("val_psnr_y") for card in (old, new)]
    if None not in scores:
        print(f"validation PSNR-Y {scores[1]:.2f} dB, before {scores[0]:.2f} dB")
    print(f"written: {runtime.CHECKPOINTS / args.output}.safetensors, .json")
    return 0
