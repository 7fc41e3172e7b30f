"""Decoders in files: an autoencoder's folder (`decoder.json`, `decoder.safetensors`), and the entry of a pair cache whose
samples are latents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from distill.data.plain import plain_torch
from distill.files import read_json, sha256_file, write_json, write_safetensors
from distill.models.build import at_most, build_decoder
from distill.models.decoder import Decoder
from distill.models.weights import check_tensors, read_header, read_tensors

SCHEMA = 1
DESCRIPTION, WEIGHTS = "decoder.json", "decoder.safetensors"
DIGEST = "sha256"  # entry of a decoder's config in a file: of its weights


def entry_of(decoder: Decoder) -> dict[str, Any]:
    """The decoder's config, with the sha256 of its weights file where it has weights; of a decoder on the
    meta device the config alone."""
    weights = decoder.weights()
    if not weights or any(tensor.is_meta for tensor in weights.values()):
        return decoder.config()
    ordered = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    return decoder.config() | {DIGEST: hashlib.sha256(safetensors.torch.save(ordered)).hexdigest()}


def write_weights(folder: Path, decoder: Decoder) -> None:
    """`decoder.safetensors` in a folder, of a decoder that has weights."""
    if weights := decoder.weights():
        write_safetensors(folder / WEIGHTS, weights)


@plain_torch()
def read_decoder(folder: Path, entry: Any, description: Path) -> Decoder:
    """The decoder of `entry` (see `entry_of`) in the file `description`; its weights, if any, lie in `folder`.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""
    where, path = f"{description}: decoder", folder / WEIGHTS
    plain = (
        {key: value for key, value in entry.items() if key != DIGEST} if isinstance(entry, Mapping) else entry
    )
    if plain == entry:
        decoder = build_decoder(plain, where)
        if decoder.weights():
            raise ValueError(f"{where}.{DIGEST}: missing; expected that of {WEIGHTS}")
        return decoder
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {description} names it as the decoder's weights")
    if (found := sha256_file(path)) != entry[DIGEST]:
        raise ValueError(f"{path}: sha256: found {found}, {description.name} expects {entry[DIGEST]}")
    stored = read_header(path)
    with torch.device("meta"), at_most(len(stored)):
        check_tensors(build_decoder(plain, where).weights(), stored, path, description.name)
    decoder = build_decoder(plain, where)
    decoder.load_weights(read_tensors(path))
    return decoder


def save_autoencoder(folder: Path | str, decoder: Decoder) -> None:
    """Write an autoencoder's folder, which `data.autoencoder` of a latent teacher names."""
    folder = Path(folder)
    write_weights(folder, decoder)
    write_json(folder / DESCRIPTION, {"schema": SCHEMA, "decoder": entry_of(decoder)})


def load_autoencoder(folder: Path | str) -> Decoder:
    """Read an autoencoder's folder.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected a folder with {DESCRIPTION} and {WEIGHTS}")
    value = read_json(path)
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != SCHEMA or isinstance(found, bool):
        raise ValueError(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
    if set(value) != {"schema", "decoder"}:
        raise ValueError(f"{path}: found the entries {sorted(value)}, expected schema, decoder")
    return read_decoder(path.parent, value["decoder"], path)
