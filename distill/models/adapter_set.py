"""Several adapters on one base: which one is on and how strong, sums of some, merging into the base's weights and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill.models.adapters import Adapted, adapter_of, low_rank_of
from distill.models.generator import Generator
from distill.models.lora_files import LoraFile
from distill.models.model import Model
from distill.models.native import load_model

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Combined:
    """A sum of adapters as one.

    Attributes:
        generator: the base with the sum. error: |sum - what is left of it| / |sum|, over all layers; 0 for "cat".
    """

    generator: Generator
    error: float


class AdapterSet:
    """A base, loaded once, and adapters on it by name. Each is a net of its own on the base's tensors, so that changing from
    one to another moves no weights.

    Args:
        base: model folder. device: of all weights.
    """

    def __init__(self, base: str | Path, device: torch.device | str = "cpu") -> None:
        self.device, self._known = device, dict[str, Model]()
        self.base = load_model(base, device=device, known=self._known)
        self._sha256 = next(iter(self._known))
        self._adapters: dict[str, Generator] = {}
        self._files: set[str] = set()  # names of LoRA files, which have no sampler of their own
        # The name of the merged adapter; the layers' weights, and their numbers before.
        self._merged: tuple[str, list[tuple[Tensor, Tensor]]] | None = None

    @property
    def names(self) -> list[str]:
        """The adapters."""
        return list(self._adapters)

    def add(self, name: str, path: str | Path, alpha: float | None = None) -> None:
        """Add the adapter of a model folder, or of a LoRA file (FILE.safetensors), which is sampled as the base is; `alpha` of
        files that do not have it.

        Raises ValueError naming `name`, or the folder that is no adapter of this base; FileNotFoundError; see `LoraFile`."""
        if name in self._adapters:
            raise ValueError(f"name: found {name!r} twice, expected one of its own for each adapter")
        self._check_plain("adding an adapter")
        if Path(path).suffix == ".safetensors":
            file, model = LoraFile.read(path), self.base.denoiser
            net = Adapted(model.net, **file.options(model.net, None, alpha))
            file.fill(net)
            made = model.with_(net=net.eval(), conditions=model.conditions)
            self._files.add(name)
            self._adapters[name] = Generator(made, self.base.spec).to(self.device)
            return
        found = load_model(path, device=self.device, known=self._known)
        adapter = adapter_of(found.denoiser.net)
        if adapter is None or adapter.origin is None or adapter.origin.sha256 != self._sha256:
            raise ValueError(f"{path}: found no adapter of the base {self._sha256[:12]}; expected one")
        self._adapters[name] = found

    def using(self, name: str | None, strength: float = 1.0) -> Generator:
        """The base with one adapter, its terms times `strength`; None: the base alone."""
        if name is None:
            self._check_plain("the base alone")
            return self.base
        self._check_plain(f"the adapter {name!r}")
        return self._named(name).with_strength(strength)

    def combined(
        self,
        weights: Mapping[str, float],
        method: Literal["cat", "svd"] = "cat",
        rank: int | None = None,
    ) -> Combined:
        """One adapter that is the sum of some, each times its weight: "cat" exactly, of the sum of their ranks; "svd" the best
        one of `rank`.

        Raises ValueError: no or unknown names, adapters that are sampled differently, or guidance terms."""
        self._check_plain("combining adapters")
        if not weights:
            raise ValueError(f"weights: found none, expected some of {', '.join(self.names)}")
        if method not in ("cat", "svd") or (method == "svd") != (rank is not None):
            raise ValueError(
                f"method, rank: found {method!r} and {rank}, expected 'cat', or 'svd' with a rank"
            )
        generators = {name: self._named(name) for name in weights}
        students = [name for name in generators if name not in self._files]
        _check_alike({name: generators[name] for name in students})
        first = generators[students[0] if students else next(iter(generators))]
        nets = [
            (low_rank_of(generator.denoiser.net, "weights"), weights[name])
            for name, generator in generators.items()
        ]
        factors = stacked(nets)
        error = 0.0
        if rank is not None:
            factors, error = truncated(factors, rank)
        whole = sum(net.rank for net, _ in nets) if rank is None else rank
        made = Adapted(self.base.denoiser.net, whole, None, list(factors)).eval()
        with torch.no_grad():
            for path, layer in made.layers().items():
                for own, given in zip(layer.factors, factors[path], strict=True):
                    own.copy_(given.reshape(own.shape))
        return Combined(_with_net(first, made), error)

    def merge(self, name: str, strength: float = 1.0) -> Generator:
        """Add an adapter's terms to the base's weights, in place: no further calls of layers and no second copy of the base.
        Until `unmerge`, this generator is the only one. Computed in float32; the weights keep their type.

        Raises ValueError where an adapter is merged already."""
        self._check_plain(f"merging {name!r}")
        generator = self._named(name)
        adapter = low_rank_of(generator.denoiser.net, "name")
        base, before = self.base.denoiser.net, list[tuple[Tensor, Tensor]]()
        with torch.no_grad():
            for path, layer in adapter.layers().items():
                weight = base.get_submodule(path).weight
                assert isinstance(weight, Tensor)
                before.append((weight, weight.clone()))
                weight.copy_((weight.float() + strength * layer.delta()).to(weight.dtype))
        self._merged = (name, before)
        return _with_net(generator, base)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base the weights that it had, bit for bit. Raises ValueError where nothing is merged."""
        if self._merged is None:
            raise ValueError("unmerge: found no merged adapter; expected `merge` before")
        for weight, before in self._merged[1]:
            weight.copy_(before)
        self._merged = None

    def _named(self, name: str) -> Generator:
        if name not in self._adapters:
            raise ValueError(f"name: found {name!r}, expected one of {', '.join(self.names) or 'none'}")
        return self._adapters[name]

    def _check_plain(self, what: str) -> None:
        if self._merged is not None:
            raise ValueError(
                f"{what}: the adapter {self._merged[0]!r} is merged into the base's weights; expected `unmerge` before"
            )


def stacked(nets: list[tuple[Adapted, float]]) -> dict[str, Factors]:
    """path -> (A [R, in...], B [out, R]), R the sum of the ranks, with B A = sum of weight * scale * B_i A_i; layers that an
    adapter does not have are 0 in it."""
    paths = dict.fromkeys(path for net, _ in nets for path in net.layers())
    found: dict[str, Factors] = {}
    for path in paths:
        down, up = [], []
        shapes = next(net.layers()[path].factors for net, _ in nets if path in net.layers())
        for net, weight in nets:
            layer = net.layers().get(path)
            if layer is None:
                down.append(shapes[0].new_zeros(net.rank, *shapes[0].shape[1:]))
                up.append(shapes[1].new_zeros(len(shapes[1]), net.rank))
            else:
                down.append(layer.factors[0])
                up.append(weight * layer.scale * layer.factors[1].flatten(1))
        found[path] = torch.cat(down).detach(), torch.cat(up, 1).detach()
    return found


def truncated(factors: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], float]:
    """The best factors of a rank for each layer, and |what is left out| / |all| over the layers (Frobenius norms). Decomposes
    matrices of the size of the ranks alone.

    Raises ValueError for a rank below 1, or above what the factors have."""
    most = next(iter(factors.values()))[1].shape[1]
    if not 1 <= rank <= most:
        raise ValueError(f"rank: found {rank}, expected 1 .. {most}, the sum of the ranks")
    found: dict[str, Factors] = {}
    left, whole = 0.0, 0.0
    for path, (down, up) in factors.items():
        left_basis, left_part = torch.linalg.qr(up.double())
        right_basis, right_part = torch.linalg.qr(down.double().flatten(1).T)
        u, s, v = torch.linalg.svd(left_part @ right_part.T, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        b, a = left_basis @ u[:, :kept] * root, (right_basis @ v[:kept].T * root).T
        missing = rank - kept  # a layer with fewer inputs or outputs than the rank
        b = torch.nn.functional.pad(b, (0, missing)).to(up.dtype)
        a = torch.nn.functional.pad(a, (0, 0, 0, missing)).to(down.dtype)
        found[path] = a.reshape(rank, *down.shape[1:]), b
        left, whole = left + float(s[kept:].square().sum()), whole + float(s.square().sum())
    return found, (left / whole) ** 0.5 if whole else 0.0


def _with_net(generator: Generator, net: torch.nn.Module) -> Generator:
    """A student with another net in place of its adapted one."""
    model = generator.denoiser
    adapter = adapter_of(model.net)
    outer = net if model.net is adapter else copy.deepcopy(model.net, {id(adapter): net})
    return Generator(model.with_(net=outer, conditions=model.conditions).eval(), generator.spec)


def _check_alike(generators: Mapping[str, Generator]) -> None:
    """Raise ValueError where students are sampled differently: a sum of their terms would be a student of neither."""
    described: dict[str, dict[str, Any]] = {}
    for name, generator in generators.items():
        model, spec = generator.denoiser, generator.spec.to_dict()
        sampler = {key: spec[key] for key in ("times", "mode", "solver", "start_scale", "guidance_scale")}
        described[name] = {
            "kind": model.kind,
            "process": model.process.config(),
            "coupling": model.coupling,
        } | sampler
    names = list(described)
    for name in names[1:]:
        for key, value in described[name].items():
            if value != (other := described[names[0]][key]):
                raise ValueError(
                    f"weights: {names[0]!r} and {name!r} differ in {key}: found {other} and {value}; expected adapters that "
                    "were trained for the same steps"
                )
