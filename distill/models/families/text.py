"""Text encoders of pipelines: CLIP and T5."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.files import read_json
from distill.models.pretrained import Folder

# Classes of transformers that are loaded; what another class would do is unknown.
CLIP_TOKENIZER, CLIP = (
    ("CLIPTokenizer", "CLIPTokenizerFast"),
    ("CLIPTextModel", "CLIPTextModelWithProjection"),
)
CLIP_PROJECTED = CLIP[1:]
T5_TOKENIZER, T5 = ("T5Tokenizer", "T5TokenizerFast"), ("T5EncoderModel",)


@dataclass
class States:
    """What a text encoder makes of n prompts.

    Attributes:
        last: [n, L, C] final hidden states. penultimate: those of the layer before; None where they are not asked for.
        pooled: [n, C]; None for encoders without. mask: [n, L] bool, true where there is a token. cut: [n] bool, true
            for prompts that are longer than L tokens.
    """

    last: Tensor
    mask: Tensor
    cut: Tensor
    pooled: Tensor | None = None
    penultimate: Tensor | None = None


def token_length(folder: Folder, tokenizer: str) -> int:
    """The number of tokens that prompts are padded to: `model_max_length` of the tokenizer."""
    path = folder.path / tokenizer / "tokenizer_config.json"
    found = read_json(path).get("model_max_length")
    if not isinstance(found, int) or not 1 < found < 10_000:
        raise ValueError(f"{path}: model_max_length: found {found!r}, expected a number of tokens")
    return found


def clip_states(
    folder: Folder, suffix: str, *, prompts: Sequence[str], dtype: str, batch_size: int, hidden: bool = False
) -> States:
    """States of the CLIP encoder `text_encoder<suffix>`, all tokens attended as the pipelines do; the encoder is freed
    before it returns.

    hidden: also those of the layer before the last."""
    tokenizer = f"tokenizer{suffix}"
    ids, mask, cut = tokens(folder, tokenizer, CLIP_TOKENIZER, prompts, token_length(folder, tokenizer))
    encoder = folder.load(f"text_encoder{suffix}", CLIP, dtype=dtype)
    attend = bool(getattr(encoder.config, "use_attention_mask", False))
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for part, here in zip(ids.split(batch_size), mask.split(batch_size), strict=True):
            out: Any = encoder(
                part, attention_mask=here.long() if attend else None, output_hidden_states=hidden
            )
            pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
            parts.append((out.last_hidden_state, pooled, *([out.hidden_states[-2]] if hidden else [])))
    del encoder
    gc.collect()
    last, pooled, *rest = (torch.cat(each).float() for each in zip(*parts, strict=True))
    return States(last, mask, cut, pooled, rest[0] if rest else None)


def t5_states(
    folder: Folder,
    suffix: str,
    *,
    prompts: Sequence[str],
    length: int,
    dtype: str,
    batch_size: int,
    masked: bool,
) -> States:
    """States of the T5 encoder `text_encoder<suffix>`; `masked`: padding is not attended."""
    ids, mask, cut = tokens(folder, f"tokenizer{suffix}", T5_TOKENIZER, prompts, length)
    encoder = folder.load(f"text_encoder{suffix}", T5, dtype=dtype)
    with torch.no_grad():
        parts = [
            encoder(part, attention_mask=here.long() if masked else None)[0]
            for part, here in zip(ids.split(batch_size), mask.split(batch_size), strict=True)
        ]
    del encoder
    gc.collect()
    return States(torch.cat(parts).float(), mask, cut)


def tokens(
    folder: Folder, name: str, classes: Sequence[str], prompts: Sequence[str], length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [n, length], mask [n, length] bool, cut [n] bool: longer than `length`)."""
    tokenizer = folder.load(name, classes)
    found = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    longer = tokenizer(list(prompts), padding=False, truncation=True, max_length=length + 1)["input_ids"]
    cut = torch.tensor([len(each) > length for each in longer])
    return found["input_ids"], found["attention_mask"].bool(), cut
