"""Makes shards of emoji with captions from the npm packages `emoji-datasource-twitter` and `emoji-datasource-google`.

    npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0
    python scripts/data/emoji.py data/emoji emoji-datasource-*.tgz [--size 32] [--skin-tones]

Images are composed on white and resized to --size (the originals have 64 pixels). A sample has png, txt ("grinning face,
twitter style"), cls (the category) and json (name, category, vendor, code point, licence). Shards are split by code point, so
that the same emoji of another vendor or skin tone is never in both: train-*.tar and val-*.tar. Runs give equal bytes. Only
these two vendors are read: the graphics of others may not be redistributed. NOTICE names the licences; keep it with the shards.

Then: data=webdataset "data.shards='data/emoji/train-{00000..00001}.tar'" data.caption=txt (docs/data.md); with
--skin-tones there are four shards.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

# Vendor -> licence and attribution of its graphics.
LICENCES = {
    "twitter": "Twemoji (jdecked/twemoji), graphics CC-BY 4.0: https://creativecommons.org/licenses/by/4.0/",
    "google": "Noto Emoji, graphics Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0",
}
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
SOURCE = 64  # pixels of the files that are read
PER_SHARD, VALIDATION = 2000, 50  # samples a shard; thousandths of the code points that are held out


class Emoji(NamedTuple):
    """One image: `base` is the code point without a skin tone."""

    name: str
    category: str
    vendor: str
    unified: str
    base: str
    content: bytes


def caption(name: str, tone: str = "") -> str:
    """The lower-case name, with the skin tones of a variant such as 1F3FB or 1F3FB-1F3FF."""
    tones = [f"{TONES[part]} skin tone" for part in tone.split("-") if part in TONES]
    return ", ".join([" ".join(name.lower().split()), *tones])


def emojis(package: Path, skin_tones: bool) -> Iterator[Emoji]:
    """The emoji of one npm package. Raises ValueError for another package, or an image that is missing."""
    with tarfile.open(package, "r:gz") as tar:
        members = {member.name: member for member in tar if member.isfile()}

        def read(name: str) -> bytes:
            if (member := members.get(name)) is None or (file := tar.extractfile(member)) is None:
                raise ValueError(f"{package}: {name}: missing; expected emoji-datasource-VENDOR of npm")
            return file.read()

        name = json.loads(read("package/package.json"))["name"]
        vendor = str(name).removeprefix("emoji-datasource-")
        if vendor not in LICENCES:
            raise ValueError(
                f"{package}: found {name!r}, expected emoji-datasource-twitter or -google: the licences of other vendors "
                "do not allow it"
            )
        for entry in json.loads(read("package/emoji.json")):
            variants: dict[str, Any] = {"": entry} | (
                entry.get("skin_variations") or {} if skin_tones else {}
            )
            for tone, variant in variants.items():
                if not variant.get(f"has_img_{vendor}"):
                    continue
                content = read(f"package/img/{vendor}/{SOURCE}/{variant['image']}")
                text = caption(entry["name"] or entry["short_name"], tone)
                yield Emoji(text, entry["category"], vendor, variant["unified"], entry["unified"], content)


def held_out(base: str) -> bool:
    """Whether a code point belongs to the validation split."""
    return int(hashlib.sha1(base.encode()).hexdigest(), 16) % 1000 < VALIDATION


def members(emoji: Emoji, size: int) -> list[tuple[str, bytes]]:
    """(extension, content) of a sample."""
    with Image.open(io.BytesIO(emoji.content)) as first:
        image = first.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG")
    facts = {key: getattr(emoji, key) for key in ("name", "category", "vendor", "unified")}
    facts["licence"] = LICENCES[emoji.vendor]
    return [
        ("png", out.getvalue()),
        ("txt", f"{emoji.name}, {emoji.vendor} style".encode()),
        ("cls", str(CATEGORIES.index(emoji.category)).encode()),
        ("json", json.dumps(facts, sort_keys=True).encode()),
    ]


def write(folder: Path, split: str, found: list[Emoji], size: int) -> int:
    """Write the shards of one split, in an order that mixes categories; returns their number."""
    found = sorted(found, key=lambda each: hashlib.sha1(f"{each.vendor}/{each.unified}".encode()).hexdigest())
    starts = range(0, len(found), PER_SHARD)
    for number, start in enumerate(starts):
        with tarfile.open(folder / f"{split}-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, emoji in enumerate(found[start : start + PER_SHARD], start):
                for extension, content in members(emoji, size):
                    info = tarfile.TarInfo(f"{place:06d}.{extension}")  # time 0: equal runs give equal bytes
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return len(starts)


def convert(folder: Path, packages: list[Path], size: int, skin_tones: bool) -> dict[str, int]:
    """Write all shards and NOTICE; returns samples by split. Raises ValueError for a folder with other shards, a vendor twice,
    or no emoji."""
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(
        path.name for path in folder.iterdir() if re.fullmatch(r"(train|val)-\d+\.tar", path.name)
    ):
        raise ValueError(f"{folder}: found {old[0]}, expected a folder without shards")
    found = [emoji for package in packages for emoji in emojis(package, skin_tones)]
    if not found:
        raise ValueError(f"{packages}: found no emoji")
    keys = [(emoji.vendor, emoji.unified) for emoji in found]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{packages}: found a vendor twice, expected each once")
    counts = {}
    for split, held in (("train", False), ("val", True)):
        chosen = [emoji for emoji in found if held_out(emoji.base) == held]
        write(folder, split, chosen, size)
        counts[split] = len(chosen)
    vendors = sorted({emoji.vendor for emoji in found})
    notice = [
        "Emoji names and categories: emoji-datasource (MIT).",
        *(f"Images, changed (white background, {size} pixels): {LICENCES[vendor]}" for vendor in vendors),
        "Classes of *.cls: " + ", ".join(f"{number} {name}" for number, name in enumerate(CATEGORIES)),
    ]
    (folder / "NOTICE").write_text("\n".join(notice) + "\n")
    return counts


def main() -> None:
    """Convert the packages of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", type=Path, nargs="+")
    parser.add_argument("--size", type=int, default=32, choices=(32, 64))
    parser.add_argument(
        "--skin-tones", action="store_true", help="also the variants, 60 %% of which are people"
    )
    given = parser.parse_args()
    counts = convert(given.folder, given.packages, given.size, given.skin_tones)
    print(f"{given.folder}: {counts['train']} + {counts['val']} samples")


if __name__ == "__main__":
    main()
