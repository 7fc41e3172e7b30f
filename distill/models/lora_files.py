"""LoRA files: what diffusers, PEFT and kohya's scripts write, read as the start of a student, and the files that an adapted net
is exported to.

Layers have the names of the diffusers network, or of the package's net. The forms of the names (A [rank, in], B [out, rank]):

    base_model.model.LAYER.lora_A.weight, lora_B   PEFT, alpha in adapter_config.json beside the file
    LAYER.lora_A.weight, lora_B                    diffusers, of one network, alpha in the header
    unet.LAYER.lora_A.weight, transformer.LAYER... diffusers, of a pipeline, alpha in the header
    unet.LAYER.lora.down.weight, lora.up           earlier diffusers, without alpha
    lora_unet_LAYER_WITH_UNDERSCORES.lora_down.weight, lora_up, alpha      kohya
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.files import read_json, sha256_file, write_safetensors
from distill.models.adapters import Adapted
from distill.models.families import families
from distill.models.families.core import Core
from distill.models.weights import read_header, read_tensors

HEADER = "lora_adapter_metadata"  # diffusers reads it: the options of peft's LoraConfig
FACTS = "distill"  # key in the header of what this package says of a student
CONFIG = "adapter_config.json"
PARTS = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down"), "A"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up"), "B"),
}
KEY = re.compile(rf"(.+)\.(?:({'|'.join(map(re.escape, PARTS))})\.weight|(alpha))")
KOHYA = re.compile("lora_(?:unet|transformer)_")
TEXT = ("text_encoder", "lora_te")
NONE_OF = ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save")
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LoraFile:
    """The adapters of a file.

    Attributes:
        path: of the file. rank: of all adapters. alpha: of all adapters; None where the file has none.
        layers: name in the file, without a prefix -> A, B in float32. kohya: names have underscores in place of dots.
    """

    path: Path
    rank: int
    alpha: float | None
    layers: Mapping[str, Pair]
    kohya: bool = False

    @classmethod
    def read(cls, path: str | Path) -> LoraFile:
        """Raises FileNotFoundError, or ValueError that starts with `file` and names the tensor or entry:
        another kind of adapter, one of a text encoder, adapters of different ranks or alphas, A without B."""
        path = Path(path).expanduser()
        where = f"file: {path}"
        if not path.is_file() or path.suffix != ".safetensors":
            raise FileNotFoundError(f"{where}: not a file; expected a LoRA as FILE.safetensors")
        read_header(path)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(path).items():
            match = KEY.fullmatch(key)
            if key.startswith(TEXT):
                raise ValueError(
                    f"{where}: {key}: belongs to a text encoder, which is not trained; expected a file without"
                )
            if match is None:
                raise ValueError(
                    f"{where}: {key}: not a tensor of a LoRA; expected lora_A and lora_B, or lora_down and lora_up"
                )
            found.setdefault(match[1], {})[PARTS.get(match[2], "alpha")] = tensor.float()
        if half := [name for name, parts in found.items() if not {"A", "B"} <= parts.keys()]:
            raise ValueError(
                f"{where}: {half[0]}: found {sorted(found[half[0]])}, expected both factors of the term"
            )
        kohya = [name for name in found if KOHYA.match(name)]
        if not found or (kohya and len(kohya) < len(found)):
            raise ValueError(
                f"{where}: found {len(kohya)} of {len(found)} layers named as kohya's, expected all or none"
            )
        rank = _one({name: float(len(parts["A"])) for name, parts in found.items()}, f"{where}: rank")
        alphas = {name: float(parts["alpha"]) for name, parts in found.items() if "alpha" in parts}
        if alphas and len(alphas) < len(found):
            raise ValueError(
                f"{where}: alpha: missing of {next(n for n in found if n not in alphas)}; expected it of all layers"
            )
        own = _options(path, int(rank))
        alpha = _one(alphas, f"{where}: alpha") if alphas else own.get("lora_alpha")
        layers = {_bare(name): (parts["A"], parts["B"]) for name, parts in found.items()}
        return cls(path, int(rank), None if alpha is None else float(alpha), layers, bool(kohya))

    def on(self, base: nn.Module) -> dict[str, Pair]:
        """path of a layer in `base` -> A, B. Raises ValueError for layers that it does not have."""
        prefix, _ = network_in(base)
        paths = [path.removeprefix(prefix) for path, _ in base.named_modules() if path.startswith(prefix)]
        known = (
            {path.replace(".", "_"): path for path in reversed(paths)}
            if self.kohya
            else dict(zip(paths, paths, strict=True))
        )
        if unknown := [name for name in self.layers if name not in known]:
            raise ValueError(
                f"file: {self.path}: {len(unknown)} of {len(self.layers)} layers, as {unknown[0]!r}, are not in the model: "
                f"a LoRA for another base; expected names such as {', '.join([path for path in paths if path][-3:])}"
            )
        return {prefix + known[name]: pair for name, pair in self.layers.items()}

    def options(self, base: nn.Module, rank: int | None, alpha: float | None) -> dict[str, Any]:
        """rank, alpha and targets of the file as arguments of `Adapted`. Raises ValueError naming the option that contradicts
        the file, or `alpha` where it is missing in both."""
        if rank not in (None, self.rank):
            raise ValueError(f"rank: found {rank}, but {self.path} has rank {self.rank}; expected null")
        if self.alpha is None and alpha is None:
            raise ValueError(
                f"alpha: missing, also in {self.path}; expected the number that it was trained with, often {self.rank}"
            )
        if alpha is not None and self.alpha not in (None, alpha):
            raise ValueError(f"alpha: found {alpha}, but {self.path} has alpha {self.alpha}; expected null")
        return {
            "rank": self.rank,
            "alpha": self.alpha if alpha is None else alpha,
            "targets": sorted(self.on(base)),
        }

    @torch.no_grad()
    def fill(self, adapted: Adapted) -> None:
        """Give adapters made with `options` the file's numbers. Raises ValueError for other layers or shapes."""
        layers, given = adapted.layers(), self.on(adapted.net)
        if layers.keys() != given.keys():
            extra = min(layers.keys() ^ given.keys())
            raise ValueError(
                f"file: {self.path}: {extra}: its name ends as that of an adapted layer; expected that layer in the file"
            )
        for path, (down, up) in given.items():
            for weight, tensor in zip(layers[path].factors, (down, up), strict=True):
                if weight.shape != tensor.shape:
                    raise ValueError(
                        f"file: {self.path}: {path}: found the shape {list(tensor.shape)}, expected {list(weight.shape)}: "
                        "a LoRA for another base"
                    )
                weight.copy_(tensor)


def digest(path: str | Path) -> str:
    """sha256 of a LoRA file, and of the config beside it. Raises FileNotFoundError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"adapt.lora.file: {path}: not a file; expected a LoRA as FILE.safetensors")
    config = path.parent / CONFIG
    parts = [sha256_file(path), sha256_file(config) if config.is_file() else ""]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def network_in(net: nn.Module) -> tuple[str, Core | None]:
    """(what starts the names of the diffusers network's modules in a net, the core that holds it); ("", None) without one."""
    for path, module in net.named_modules():
        if isinstance(module, Core):
            return (f"{path}.net." if path else "net."), module
    return "", None


def part_of(core: Core) -> str:
    """The pipeline's part that a core's network is: unet or transformer."""
    return next(family.network for family in families().values() if family.core is type(core))


def pairs_of(adapted: Adapted) -> dict[str, Pair]:
    """layer -> A, B of an adapted net, with the names of the diffusers network, or of the net."""
    prefix, _ = network_in(adapted.net)
    return {path.removeprefix(prefix): low_rank.factors for path, low_rank in adapted.layers().items()}


def write_peft(path: Path, adapted: Adapted, facts: Mapping[str, Any]) -> None:
    """The form of diffusers with the options of peft in its header, and `facts`."""
    _, core = network_in(adapted.net)
    start = "" if core is None else f"{part_of(core)}."
    pairs = pairs_of(adapted)
    tensors = {
        f"{start}{layer}.lora_{name}.weight": tensor
        for layer, pair in pairs.items()
        for name, tensor in zip("AB", pair, strict=True)
    }
    options = {
        "r": adapted.rank,
        "lora_alpha": _whole(adapted.alpha),
        "target_modules": sorted(pairs),
        "bias": "none",
    }
    header = json.dumps({f"{start}{key}": value for key, value in options.items()}, sort_keys=True)
    write_safetensors(
        path, tensors, {"format": "pt", HEADER: header, FACTS: json.dumps(facts, sort_keys=True)}
    )


def write_kohya(path: Path, adapted: Adapted, facts: Mapping[str, Any]) -> None:
    """The form of kohya's scripts with alpha as a tensor of each layer, and `facts` in the header."""
    _, core = network_in(adapted.net)
    start = "lora_unet" if core is None else f"lora_{part_of(core)}"
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in pairs_of(adapted).items():
        name = f"{start}_{layer.replace('.', '_')}"
        alpha = torch.tensor(adapted.alpha)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    header = {"ss_network_module": "networks.lora", "ss_network_dim": str(adapted.rank)}
    header |= {"ss_network_alpha": str(adapted.alpha), FACTS: json.dumps(facts, sort_keys=True)}
    write_safetensors(path, tensors, header)


def _bare(name: str) -> str:
    """The name of a layer without a form's prefix."""
    name = name.removeprefix("base_model.model.")
    return KOHYA.sub("", re.sub(r"^(?:unet|transformer)\.", "", name), count=1)


def _one(found: Mapping[str, float], where: str) -> float:
    if len(values := sorted(set(found.values()))) > 1:
        layer = next(name for name, value in found.items() if value == values[-1])
        raise ValueError(
            f"{where}: found {values[0]:g} and {values[-1]:g} ({layer}), expected one for all layers"
        )
    return values[0]


def _options(path: Path, rank: int) -> dict[str, Any]:
    """peft's options of a file, from its header or the config beside it."""
    where = f"file: {path}: {HEADER}"
    with safe_open(path, framework="pt") as file:
        text, keys = (file.metadata() or {}).get(HEADER), list(file.keys())
    try:
        options = None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: found no JSON: {error}") from error
    if options is None and keys[0].startswith("base_model.model.") and (path.parent / CONFIG).is_file():
        where, options = f"file: {path.parent / CONFIG}", read_json(path.parent / CONFIG)
    if not isinstance(options, dict | None):
        raise ValueError(f"{where}: found {type(options).__name__}, expected a mapping")
    own = {re.sub(r"^(?:unet|transformer)\.", "", key): value for key, value in (options or {}).items()}
    if wrong := [key for key in NONE_OF if own.get(key)]:
        raise ValueError(
            f"{where}: {wrong[0]}: found {own[wrong[0]]!r}, which is not supported; expected none"
        )
    alpha = own.get("lora_alpha")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0):
        raise ValueError(f"{where}: lora_alpha: found {alpha!r}, expected a positive number")
    if own.get("r", rank) != rank:
        raise ValueError(f"{where}: r: found {own['r']!r}, but the tensors have rank {rank}")
    return own


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number
