"""Data as tokens: the images of a source, encoded once by a tokenizer. A folder with `tokens.safetensors` and the tokenizer as
the decoder (`decoder.json`, `decoder.safetensors`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.plain import plain_torch
from distill.data.source import Source
from distill.files import read_json, sha256_file, sha256_text, write_json, write_safetensors
from distill.models.autoencoder import DESCRIPTION as DECODER
from distill.models.autoencoder import WEIGHTS, load_autoencoder, save_autoencoder
from distill.models.build import build_conditions
from distill.models.conditions import Conditions, of_source
from distill.models.decoder import Decoder, codebook_of, codes_of, indices

TOKENS, DESCRIPTION = "tokens.safetensors", "tokens.json"
FILES = (TOKENS, DESCRIPTION, DECODER, WEIGHTS)
BATCH = 256  # images that are encoded at once
SCHEMA = 1


class Tokens:
    """Reads a folder of tokens; a source whose samples are code vectors [L,C], with their `tokens`.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""

    has = ("x0", "tokens")

    @plain_torch()
    def __init__(self, folder: Path | str) -> None:
        self.folder = folder = Path(folder)
        path = folder / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; expected a folder that a Tokenize stage has made")
        value = read_json(path)
        if not isinstance(value, dict) or set(value) != {"schema", "conditions", "sha256"}:
            raise ValueError(f"{path}: expected the entries schema, conditions, sha256")
        if value["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema: found {value['schema']!r}, this version reads {SCHEMA}")
        if (found := sha256_file(folder / TOKENS)) != value["sha256"]:
            raise ValueError(
                f"{folder / TOKENS}: sha256: found {found[:12]}, {DESCRIPTION} expects {value['sha256'][:12]}"
            )
        self.decoder = load_autoencoder(folder)
        self.conditions: Conditions = build_conditions(value["conditions"], f"{path}: conditions")
        table = safetensors.torch.load_file(folder / TOKENS)
        self.tokens, self.columns = table.pop("tokens").long(), table
        book = codebook_of(self.decoder)
        if self.tokens.dim() != 2 or int(self.tokens.max()) >= len(book):
            raise ValueError(f"{folder / TOKENS}: tokens: expected indices [n,L] below {len(book)}")
        self.conditions.check(self.columns)
        self.num_classes = self.conditions.num_classes
        self.sample_shape: tuple[int, ...] = (self.tokens.shape[1], book.shape[1])

    def __len__(self) -> int:
        return len(self.tokens)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """The codes at `rows`; the id of a sample is its row."""
        tokens = self.tokens[rows]
        cond = self.conditions.stored({name: column[rows] for name, column in self.columns.items()})
        return Batch(ids=rows, index=index, cond=cond, x0=codes_of(self.decoder, tokens), tokens=tokens)

    def fingerprint(self) -> str:
        """sha256 over the tokens and the tokenizer."""
        names = (TOKENS, DESCRIPTION, DECODER, WEIGHTS)
        return sha256_text(
            " ".join(sha256_file(self.folder / name) for name in names if (self.folder / name).is_file())
        )


@plain_torch()
@torch.no_grad()
def write_tokens(folder: Path, images: Source, decoder: Decoder) -> dict[str, Any]:
    """Encode all images of a source. Returns facts: codes that are used, and the mean squared error of decoded images."""
    rows, parts, columns, error = torch.arange(len(images), device="cpu"), [], [], 0.0
    conditions = of_source(images)
    for part in rows.split(BATCH):
        batch = images.fetch(part, part)
        assert batch.x0 is not None
        codes = decoder.encode(batch.x0)
        parts.append(indices(decoder, codes))
        error += float((decoder.decode(codes) - batch.x0).square().mean()) * len(part) / len(images)
        columns.append(batch.cond.get("label"))
    found = torch.cat(parts)
    if (count := len(codebook_of(decoder))) > 2**16:
        raise ValueError(
            f"decoder: found {count} codes, expected at most {2**16}: tokens are stored in 16 bits"
        )
    labels = (
        torch.cat([c for c in columns if c is not None])
        if conditions.num_classes
        else torch.full_like(rows, -1)
    )
    save_autoencoder(folder, decoder)
    write_safetensors(folder / TOKENS, {"tokens": found.to(torch.uint16), "label": labels.to(torch.int32)})
    digest = sha256_file(folder / TOKENS)
    write_json(folder / DESCRIPTION, {"schema": SCHEMA, "conditions": conditions.config(), "sha256": digest})
    return {"codes_used": len(found.unique()), "codes": count, "mse": error}
