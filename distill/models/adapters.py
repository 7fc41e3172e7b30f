"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): a frozen net, and small trained matrices beside some layers.

A layer with weight W becomes y = W x + (alpha / rank) B A x. B is 0 at the start, so the adapted net begins as the base.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.guidance_adapters import Given, GuidanceTerms, width_of
from distill.nets.layers import embeds_guidance
from distill.nets.net import Net
from distill.typed import parse

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
A, B = "lora_A.weight", "lora_B.weight"


class LowRank(nn.Module):
    """A layer with a low-rank term beside it: layer(x) + scale * B(A(x)), A and B in float32.

    Args:
        layer: one of `LAYERS`.
        rank: of B A. scale: alpha / rank. dropout: of the input of A while training.
    """

    def __init__(self, layer: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        options: dict[str, Any] = {"bias": False, "device": _weight(layer).device, "dtype": torch.float32}
        if isinstance(layer, nn.Linear):
            self.lora_A: nn.Module = nn.Linear(layer.in_features, rank, **options)
            self.lora_B: nn.Module = nn.Linear(rank, layer.out_features, **options)
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            conv: Any = type(layer)
            shared = {
                name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")
            }
            self.lora_A = conv(layer.in_channels, rank, layer.kernel_size, **shared, **options)
            self.lora_B = conv(rank, layer.out_channels, 1, **options)
        nn.init.zeros_(_weight(self.lora_B))

    # Some networks read these of their layers.
    @property
    def weight(self) -> Tensor:
        """Of the layer, without the term."""
        return _weight(self.layer)

    @property
    def bias(self) -> Tensor | None:
        """Of the layer."""
        found = self.layer.bias
        assert found is None or isinstance(found, Tensor)
        return found

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The weights of A and B."""
        return _weight(self.lora_A), _weight(self.lora_B)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """As the layer's."""
        out: Tensor = self.layer(x, *args, **options)
        term = self.lora_B(self.lora_A(self.dropout(x.to(_weight(self.lora_A).dtype))))
        return out + (self.scale * term).to(out.dtype)

    def delta(self) -> Tensor:
        """scale B A in the shape of the layer's weight, float32."""
        down, up = self.factors
        return self.scale * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])

    def norm(self) -> Tensor:
        """Frobenius norm of `delta`, of products of the size of the rank."""
        down, up = (factor.flatten(1) for factor in self.factors)
        return abs(self.scale) * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


class Adapted(Net):
    """`base` with low-rank terms beside the layers `targets`. The base's weights are shared, not copied: every net made from
    one base, and every copy of such a net, holds the same tensors.

    Args:
        base: a net; stays as it is.
        rank: of the terms. alpha: the terms are scaled by alpha / rank; None: rank, which means 1.
        targets: names of layers, each whole or the end after a dot; None: see `own_targets`.
        dropout: of the terms' inputs while training.
        guidance: terms that take the guidance w as an input, see `models.guidance_adapters.GuidanceTerms`; with them, rank 0
            leaves out the low-rank terms. None: no such terms.

    Attributes:
        origin: where the base's weights come from; None where they were not loaded.
        embeds_guidance: whether it takes the guidance w as an input.

    Raises:
        ValueError: names `rank`, `alpha`, `dropout`, `targets` or `guidance`: no layer of that name, or one without a term.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 16,
        alpha: float | None = None,
        targets: list[str] | None = None,
        dropout: float = 0.0,
        guidance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if rank < (0 if guidance else 1):
            raise ValueError(f"rank: found {rank}, expected at least 1")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha: found {alpha}, expected a positive number, or null for the rank")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: found {dropout}, expected a number in [0, 1)")
        if adapter_of(base) is not None:
            raise ValueError("base: found a net with an adapter; expected one without, such as a merged one")
        self.rank, self.alpha, self.dropout = rank, float(rank if alpha is None else alpha), dropout
        self.targets = [] if rank == 0 else list(own_targets(base) if targets is None else targets)
        self.paths = [] if rank == 0 else layers_named(base, self.targets)
        self.origin = getattr(base, "origin", None)
        self.guidance = None if guidance is None else parse(GuidanceTerms, guidance, "guidance")
        self.embeds_guidance = guidance is not None
        self.blocks = [] if self.guidance is None else blocks_named(base, self.guidance)
        layers = {id(layer): layer for path in self.paths if (layer := base.get_submodule(path))}
        wrapped = {key: LowRank(layer, rank, self.alpha / rank, dropout) for key, layer in layers.items()}
        # The layers that others share stay in place; the modules around adapted ones are new, and blocks with a hook.
        hooked = {id(base.get_submodule(path)) for path in self.blocks}
        shared = {id(part): part for part in _shared(base, layers, hooked)}
        self.net = copy.deepcopy(base, shared | wrapped)
        self.terms, self.given = nn.ModuleDict(), Given()
        for path in self.blocks:
            self._add_term(path)

    def _add_term(self, path: str) -> None:
        block = self.net.get_submodule(path)
        dim = width_of(block)
        assert self.guidance is not None
        assert dim is not None  # of every block that `blocks_named` found
        with torch.device(next(block.parameters()).device):  # also where a model is built on the meta device
            term = self.guidance.term(dim)
        self.terms[path.replace(".", "/")] = term
        term.given = self.given
        block.register_forward_hook(term.after, with_kwargs=True)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """As the base's. With guidance terms, `cond` holds the guidance w."""
        if self.guidance is not None:
            given = self.given
            if (w := cond.get("guidance_w")) is None:
                raise ValueError(
                    "guidance_w: missing; this net was trained with the guidance w = guidance_scale - 1 as an input"
                )
            given.w, given.t = w, t
            given.context, given.mask = cond.get("context"), cond.get("context_mask")
            cond = cond.with_guidance(None)
        out: Tensor = self.net(x, t, cond)
        return out

    def layers(self) -> dict[str, LowRank]:
        """path in the base -> adapted layer."""
        found = {path: self.net.get_submodule(path) for path in self.paths}
        return {path: layer for path, layer in found.items() if isinstance(layer, LowRank)}

    def own(self) -> list[str]:
        """Names of the adapter's tensors in `state_dict`."""
        low_rank = [f"net.{path}.{name}" for path in self.paths for name in (A, B)]
        return [*low_rank, *(f"terms.{name}" for name in self.terms.state_dict())]

    def takes(
        self,
        rank: int,
        alpha: float | None,
        targets: list[str] | None,
        dropout: float,
        guidance: dict[str, Any] | None = None,
    ) -> bool:
        """Whether the constructor's options make adapters like these."""
        if (None if guidance is None else parse(GuidanceTerms, guidance)) != self.guidance:
            return False
        own = self._config.get("targets")
        layers = targets is own is None or (targets and own and set(targets) == set(own))
        same = (rank, float(rank if alpha is None else alpha), dropout) == (
            self.rank,
            self.alpha,
            self.dropout,
        )
        return bool(layers) and same

    def like(self, base: nn.Module) -> Adapted:
        """Another net with fresh adapters of the same options. Its random weights are always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            guidance = {} if self.guidance is None else {"guidance": vars(self.guidance)}
            return Adapted(base, self.rank, self.alpha, self.targets, self.dropout, **guidance)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with an adapter of its own on the same base."""
        own = {id(part) for layer in self.layers().values() for part in (layer.lora_A, layer.lora_B)}
        for shared in _shared(self.net, own, {id(self.net.get_submodule(path)) for path in self.blocks}):
            memo.setdefault(id(shared), shared)
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def adapter_of(net: nn.Module) -> Adapted | None:
    """The adapted net that a net is or contains, the outermost one; None for nets without."""
    return next((module for module in net.modules() if isinstance(module, Adapted)), None)


def forget_origin(net: nn.Module) -> None:
    """Say that a net's weights, all of which are about to be trained, are no longer those of a model folder."""
    if isinstance(net, Net) and net.origin is not None:
        net.origin = None


def own_names(net: nn.Module) -> list[str]:
    """Names in `net.state_dict()` that are the net's own: without those of an adapter's base."""
    return [name for name in net.state_dict() if not _within(name, _bases(net))]


def trained_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training a net changes: all, or of an adapted net those of the adapter."""
    bases = _bases(net)
    return {name: p for name, p in net.named_parameters() if not _within(name, bases)}


def _bases(net: nn.Module) -> list[tuple[str, set[str]]]:
    """(prefix, own names below it) of the adapted net in a net, which shares everything else there."""
    for path, module in net.named_modules():
        if isinstance(module, Adapted):
            prefix = f"{path}." if path else ""
            return [(prefix, {prefix + name for name in module.own()})]
    return []


def _within(name: str, bases: Sequence[tuple[str, set[str]]]) -> bool:
    return any(name.startswith(prefix) and name not in own for prefix, own in bases)


def own_targets(base: nn.Module) -> list[str]:
    """The layers that a net, or one in it, names in `adapter_targets`; without any, all linear layers and convolutions."""
    named = (getattr(module, "adapter_targets", None) for module in base.modules())
    return next((list(found) for found in named if found), None) or _kinds(base)


def layers_named(base: nn.Module, targets: Collection[str]) -> list[str]:
    """Paths of the layers that `targets` name, in the net's order. Raises ValueError for a name without layers, or with a
    layer that has no low-rank term."""
    if not targets:
        raise ValueError(
            f"targets: found none, expected names of layers such as {', '.join(_kinds(base)[:6])}"
        )
    modules, found = dict(base.named_modules()), set()
    for target in targets:
        named = [path for path, _ in base.named_modules() if path == target or path.endswith(f".{target}")]
        named = [
            path for path in named if next(modules[path].parameters(), None) is not None
        ]  # no nn.Identity
        if not named:
            raise ValueError(
                f"targets: found {target!r}, which names no layer; expected some of {', '.join(_kinds(base))}"
            )
        if other := next((path for path in named if not _adaptable(modules[path])), None):
            raise ValueError(
                f"targets: found {target!r}, which names {other}, a {type(modules[other]).__name__}; expected linear layers "
                f"and convolutions of one group, such as {', '.join(_kinds(base)[:6])}"
            )
        found.update(named)
    return [path for path in modules if path in found]


def blocks_named(base: nn.Module, terms: GuidanceTerms) -> list[str]:
    """Paths of the blocks that guidance terms stand beside. Raises ValueError that starts with `guidance`: a net that takes the
    guidance already, names without blocks, or blocks without a linear layer or convolution."""
    if embeds_guidance(base):
        raise ValueError("guidance: the net takes the guidance as an input; expected a net without")
    named = terms.blocks
    if named is None:
        known = (getattr(module, "guidance_blocks", {}).get(terms.kind) for module in base.modules())
        named = next((list(found) for found in known if found), [])
    paths = [path for path, _ in base.named_modules()]
    found = {name: [path for path in paths if path == name or path.endswith(f".{name}")] for name in named}
    ends = dict.fromkeys(path.rpartition(".")[2] for path in paths if path and not path[-1].isdigit())
    if missing := [name for name, hits in found.items() if not hits] or ([] if named else [terms.kind]):
        raise ValueError(
            f"guidance.blocks: found {terms.blocks}, where {missing[0]!r} names no block of this net; expected names of "
            f"blocks such as {', '.join(list(ends)[:12])}"
        )
    blocks = [path for path in paths if any(path in hits for hits in found.values())]
    if without := next((path for path in blocks if width_of(base.get_submodule(path)) is None), None):
        raise ValueError(
            f"guidance.blocks: found {without}, which has no linear layer or convolution; expected a block with some"
        )
    return blocks


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1


def _kinds(base: nn.Module) -> list[str]:
    """Names of the layers that can have a term, from the last word on (to_out.0), in the net's order."""
    ends: dict[str, None] = {}
    for path, module in base.named_modules():
        if _adaptable(module):
            parts = path.split(".")
            word = max((place for place, part in enumerate(parts) if not part.isdigit()), default=0)
            ends[".".join(parts[word:])] = None
    return list(ends)


def _shared(
    net: nn.Module, apart: Collection[int], around: Collection[int] = ()
) -> Iterator[nn.Module | Tensor]:
    """What a copy of a net has in common with it, where the modules with the ids `apart` differ, and those of the ids `around`
    are new ones: the largest modules with parameters and none of these inside; of the modules around these, the parameters and
    buffers. Modules without parameters are not shared: their training modes differ."""
    if id(net) in apart:
        return
    new = {*apart, *around}
    if next(net.parameters(), None) is not None and not any(id(module) in new for module in net.modules()):
        yield net
        return
    yield from net.parameters(recurse=False)
    yield from net.buffers(recurse=False)
    for child in net.children():
        yield from _shared(child, apart, around)


def low_rank_of(net: nn.Module, where: str) -> Adapted:
    """The adapted net in a net, with low-rank terms alone. Raises ValueError that starts with `where` for other nets."""
    adapter = adapter_of(net)
    if adapter is None:
        raise ValueError(f"{where}: the model has no adapter; expected one")
    if adapter.guidance is not None:
        raise ValueError(
            f"{where}: the adapter takes the guidance w as an input, which is its strength; expected guidance_w"
        )
    return adapter


@torch.no_grad()
def strengthened(net: nn.Module, strength: float) -> nn.Module:
    """A net like an adapted one, with its terms times `strength` (0: the base), on the same base. Raises like `low_rank_of`."""
    low_rank_of(net, "strength")
    made = copy.deepcopy(net)
    for layer in low_rank_of(made, "strength").layers().values():
        layer.factors[1].mul_(strength)
    return made


@torch.no_grad()
def merged(net: nn.Module) -> nn.Module:
    """A copy of a net with the adapter's terms added to the weights, and without the adapter. Computed in float32; the weights
    keep their type. Nothing is shared with `net`."""
    adapter = adapter_of(net)
    if adapter is None:
        return copy.deepcopy(net)
    if adapter.guidance is not None:
        raise ValueError(
            "merged: the adapter takes the guidance w as an input, which weights cannot hold; expected no merging"
        )
    layers: dict[int, Any] = {}
    for low_rank in adapter.layers().values():
        layer = layers[id(low_rank)] = copy.deepcopy(low_rank.layer)
        weight = _weight(layer)
        weight.copy_((weight.float() + low_rank.delta()).to(weight.dtype))
    whole = copy.deepcopy(adapter.net, layers)
    return whole if net is adapter else copy.deepcopy(net, {id(adapter): whole})


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight
