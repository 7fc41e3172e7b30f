"""Captions of a folder of images: `metadata.jsonl`, a line {"file_name": ..., "text": ...} for each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

METADATA, FILE = "metadata.jsonl", "file_name"


def read_captions(folder: Path, key: str, images: Sequence[Path]) -> list[str]:
    """The captions of `images` below `folder`, in their order: the entries `key` of the lines of its `metadata.jsonl`.

    Raises FileNotFoundError without the file; ValueError naming the file and the line, or the image: no JSON object, no name,
    no caption, a name twice, names of other files, images without a line."""
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: missing; expected lines such as {{"{FILE}": "a/b.png", "{key}": "a dog"}}, or caption=null'
        )
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            entry = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get(FILE), str):
            raise ValueError(f"{where}: {FILE}: found {entry!r:.80}, expected the name of an image")
        name, caption = str(PurePosixPath(entry[FILE])), entry.get(key)
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: {key}: found {caption!r:.80}, expected a caption")
        if name in found:
            raise ValueError(f"{where}: {FILE}: found {name} twice, expected each image once")
        found[name] = " ".join(caption.split())
    names = [image.relative_to(folder).as_posix() for image in images]
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{path}: {missing[0]}: has no line ({len(missing)} images have none), expected its caption"
        )
    if unknown := sorted(found.keys() - set(names)):
        raise ValueError(f"{path}: {unknown[0]}: is no image of the folder ({len(unknown)} lines name none)")
    return [found[name] for name in names]
