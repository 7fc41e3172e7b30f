"""The public files of autoregressive models: LlamaGen's GPT and tokenizer (`.pt`), VAR's transformer and tokenizer (`.pth`),
and the students of Distilled Decoding, whose files look the same.

A file is read with `torch.load(weights_only=True)`, which builds tensors and plain containers alone; the options of the
training script (`argparse.Namespace`) are read and ignored. All sizes follow from the tensors. Every tensor must be one of the
network's, and every one of the network's must be there, but for the tables and counters of `IGNORED`.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.models.build import REFUSALS
from distill.models.weights import check_finite, check_tensors, header_of
from distill.nets.llamagen import LlamaGen
from distill.nets.net import Net
from distill.nets.scales import SCALES
from distill.nets.token_net import TokenNet
from distill.nets.tokenizer import TokenizerNet
from distill.nets.var import VAR
from distill.nets.vq import ScaleTokenizer, VQTokenizer

State = dict[str, Tensor]
# Where the weights are in a checkpoint, averages first: LlamaGen's scripts write ema, model, module or state_dict; those of VAR
# and of Distilled Decoding write ema_parameters and var_wo_ddp below `trainer`. Published files of VAR are the weights alone.
ENTRIES = ("ema", "ema_parameters", "model", "var_wo_ddp", "module", "state_dict")
# Tables that follow from the sizes, and counters of the tokenizers' training.
IGNORED = (
    "freqs_cis",
    "lvl_1L",
    "attn_bias_for_masking",
    "quantize.codebook_used",
    "quantize.ema_vocab_hit_SV",
)
# Heads of LlamaGen's sizes B, L, XL, XXL, 3B by their width.
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32}


class PublicFile:
    """The weights in a file.

    Args:
        field: the option that names it, for messages. path: the file. what: what is expected in it.
        weights: False: shapes alone, on the meta device.

    Raises:
        FileNotFoundError, ValueError: name `field` and the file: none there, not readable as weights alone, or without weights.
    """

    def __init__(self, field: str, path: str, what: str, *, weights: bool = True) -> None:
        self.path, self.what, self.weights = Path(path).expanduser(), what, weights
        self.where = f"{field}: {self.path}"
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.where}: no such file; expected {what}")
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(self.path, map_location="cpu" if weights else "meta", weights_only=True)
        except (*REFUSALS, pickle.UnpicklingError, EOFError, OSError) as error:  # whatever is wrong with it
            text = " ".join(str(error).split())
            raise ValueError(
                f"{self.where}: not readable as weights alone, expected {what}: {text[:300]}"
            ) from error
        self.state = {name: value for name, value in self._weights(found).items() if name not in IGNORED}

    def _weights(self, found: Any) -> State:
        if isinstance(found, Mapping) and isinstance(found.get("trainer"), Mapping):
            found = found["trainer"]
        if isinstance(found, Mapping):
            found = next((found[name] for name in ENTRIES if isinstance(found.get(name), Mapping)), found)
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            kind = sorted(found)[:5] if isinstance(found, Mapping) else type(found).__name__
            raise ValueError(
                f"{self.where}: found {kind}, expected {self.what}: tensors by name, or one of {list(ENTRIES)} with them"
            )
        return dict(found)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises ValueError for one that is not there."""
        if name not in self.state:
            raise ValueError(f"{self.where}: {name}: missing; expected {self.what}")
        return tuple(self.state[name].shape)

    def count(self, start: str) -> int:
        """Numbers that follow `start` in the names: layers of a list. Raises ValueError for none."""
        found = {match[1] for name in self.state if (match := re.match(rf"{re.escape(start)}(\d+)\.", name))}
        if not found:
            raise ValueError(f"{self.where}: {start}0: missing; expected {self.what}")
        return len(found)

    def filled(self, make: Callable[[], Net], state: State, elsewhere: tuple[str, ...] = ()) -> Any:
        """The network with the weights `state`; on the meta device without `weights`. Names that begin with one of
        `elsewhere` are not in the file. Raises ValueError for tensors that are missing, unknown, not finite or of other
        shapes."""
        with torch.device("meta"):
            wanted = make().state_dict()
        given = {name: value for name, value in wanted.items() if not name.startswith(elsewhere or ("\0",))}
        check_tensors(given, header_of(state, self.path), self.path, "the file itself")
        if not self.weights:
            with torch.device("meta"):
                return make()
        check_finite(state, self.path)
        net = make()
        net.load_state_dict(state, strict=not elsewhere)
        return net


def sizes_of(file: PublicFile, state: State, levels: int) -> dict[str, Any]:
    """Options of `nets.vq.VQGAN` that both tokenizers have, of weights with the names of these nets. Raises ValueError for one
    that is not there."""
    first = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    for name in ("encoder.conv_in.weight", "embedding.weight", *first):
        if name not in state:
            raise ValueError(f"{file.where}: {name} (as VAR calls it): missing; expected {file.what}")
    width, channels = state["encoder.conv_in.weight"].shape[:2]
    outputs = [state[name].shape[0] for name in first]
    vocabulary, size = state["embedding.weight"].shape
    return {
        "channels": channels,
        "width": width,
        "multiples": [count // width for count in outputs],
        "blocks": len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}),
        "vocabulary": vocabulary,
        "size": size,
    }


def llamagen_names(state: State, levels: int) -> State:
    """Names of LlamaGen's tokenizer as those of `nets.vq`, where query, key and value are one convolution."""
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    made: State = {}
    for name, value in state.items():
        name = name.removeprefix("quantize.")
        name = re.sub(r"\.mid\.([012])\.", lambda found: f".mid.{middle[found[1]]}.", name)
        if match := re.match(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(\w+)\.", name):
            side, part = int(match[2]), {"res": "block"}.get(match[3], match[3])
            place = f"encoder.down.{side}" if match[1] == "encoder" else f"decoder.up.{levels - 1 - side}"
            name = f"{place}.{part}.{name[match.end() :]}"
        made[name] = value
    for name in [name for name in made if re.search(r"\.q\.(weight|bias)$", name)]:
        start, _, kind = name.rpartition(".q.")
        names = [f"{start}.{letter}.{kind}" for letter in "qkv"]
        if all(each in made for each in names):
            made[f"{start}.qkv.{kind}"] = torch.cat([made.pop(each) for each in names])
    return made


class Networks(NamedTuple):
    """A transformer, its tokenizer, and whether its table of classes has a null class."""

    net: TokenNet
    tokenizer: TokenizerNet
    null: bool


@dataclass(frozen=True)
class Asked:
    """What the tensors do not say.

    Attributes:
        heads: of LlamaGen; None: those of its sizes. resolution: of LlamaGen, side of the images in pixels.
        num_classes: of LlamaGen; None: all rows of the table of classes but the last, which is the null class.
        scales: of VAR, positions a side of each.
        student: whether the transformer is a student. split: of a student, see `TokenNet`, in groups.
    """

    heads: int | None = None
    resolution: int = 256
    num_classes: int | None = None
    scales: tuple[int, ...] = SCALES
    student: bool = False
    split: int | None = None


def llamagen(model: PublicFile, tokenizer: PublicFile, asked: Asked) -> Networks:
    """LlamaGen's GPT and its tokenizer."""
    levels = tokenizer.count("encoder.conv_blocks.")
    state = llamagen_names(tokenizer.state, levels)
    factor = 2 ** (levels - 1)
    if asked.resolution % factor or asked.resolution < factor:
        raise ValueError(
            f"resolution: found {asked.resolution}, expected a multiple of {factor}, the pixels of a token"
        )
    grid = asked.resolution // factor
    options = sizes_of(tokenizer, state, levels) | {
        "grid": grid,
        "inner": tokenizer.shape("encoder.conv_out.weight")[0],
    }
    vq = tokenizer.filled(lambda: VQTokenizer(**options), state)

    rows, width = model.shape("cls_embedding.embedding_table.weight")
    heads = HEADS.get(width) if asked.heads is None else asked.heads
    if heads is None:
        raise ValueError(
            f"heads: found null, but {model.path} has the width {width}, none of {sorted(HEADS)}; expected a number"
        )
    classes = rows - 1 if asked.num_classes is None else asked.num_classes
    if rows - classes not in (0, 1):
        raise ValueError(f"num_classes: found {classes}, but the table of {model.path} has {rows} rows")
    made = {
        "width": width,
        "depth": model.count("layers."),
        "heads": heads,
        "grid": grid,
        "vocabulary": model.shape("output.weight")[0],
        "size": options["size"],
        "num_classes": classes,
        "null_row": rows > classes,
        "hidden": model.shape("layers.0.feed_forward.w1.weight")[0],
    } | ({"student": True, "split": asked.split} if asked.student else {})
    net = model.filled(lambda: LlamaGen(**made), model.state, ("codebook",))
    return Networks(net, vq, rows > classes)


def var(model: PublicFile, tokenizer: PublicFile, asked: Asked) -> Networks:
    """VAR's transformer and its tokenizer."""
    scales = list(asked.scales)
    # The start of a student is a level of its own.
    sizes = (model.shape("lvl_embed.weight")[0] - asked.student, model.shape("pos_1LC")[1] - asked.student)
    if sizes != (len(scales), sum(side**2 for side in scales)):
        raise ValueError(
            f"scales: found {scales}, but {model.path} has {sizes[0]} scales of {sizes[1]} positions in all"
        )
    levels = tokenizer.count("encoder.down.")
    old, new = "quantize.quant_resi.qresi_ls.", "scales.phis."
    state = {
        (new + name.removeprefix(old) if name.startswith(old) else name.removeprefix("quantize.")): value
        for name, value in tokenizer.state.items()
    }
    options = sizes_of(tokenizer, state, levels) | {"scales": scales, "shared": tokenizer.count(old)}
    vq = tokenizer.filled(lambda: ScaleTokenizer(**options), state)
    made = {
        "depth": model.count("blocks."),
        "width": model.shape("word_embed.weight")[0],
        "heads": model.shape("blocks.0.attn.scale_mul_1H11")[1],
        "scales": scales,
        "vocabulary": model.shape("head.weight")[0],
        "size": options["size"],
        "num_classes": model.shape("class_emb.weight")[0] - 1,
        "shared": options["shared"],
        "shared_adaln": "shared_ada_lin.1.weight" in model.state,
    } | ({"student": True, "split": asked.split} if asked.student else {})
    net = model.filled(lambda: VAR(**made), model.state, ("codebook", "quantize."))
    if not asked.student:  # the transformer's inputs are maps of the tokenizer
        net.quantize.load_state_dict(vq.scales.state_dict())
    return Networks(net, vq, True)


FAMILIES: dict[str, tuple[Callable[[PublicFile, PublicFile, Asked], Networks], str, str]] = {
    "llamagen": (llamagen, "a class-conditional GPT of LlamaGen", "a tokenizer of LlamaGen"),
    "var": (var, "a transformer of VAR", "a tokenizer of VAR"),
}


def load_networks(family: str, path: str, tokenizer: str, asked: Asked, *, weights: bool = True) -> Networks:
    """The networks in two files; without `weights` on the meta device.

    Raises FileNotFoundError or ValueError naming the option `family`, `path`, `tokenizer` or one of `asked`."""
    if family not in FAMILIES:
        raise ValueError(f"family: found {family!r}, expected one of {', '.join(FAMILIES)}")
    load, model, decoder = FAMILIES[family]
    files = (
        PublicFile("path", path, model, weights=weights),
        PublicFile("tokenizer", tokenizer, decoder, weights=weights),
    )
    return load(*files, asked)
