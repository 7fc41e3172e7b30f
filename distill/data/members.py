"""Decodes the members of a sample in a shard: an image, and a caption or a class."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from distill.data.decode import decode_bytes, to_pixels

LARGEST_TEXT = 2**20  # bytes of a caption, a class or a JSON member


@dataclass(frozen=True)
class Members:
    """Which members of a sample are read, and how.

    Attributes:
        image: extensions of images, the first that a sample has is read: "jpg;png".
        caption: of the caption: an extension ("txt"), or "json:KEY"; None: not read.
        label: of the class, an integer in 0 .. num_classes - 1: an extension ("cls"), or "json:KEY"; None: no classes.
        num_classes: 0 without `label`.
        channels: 1 (grey) or 3.

    Raises ValueError naming the option.
    """

    image: str = "jpg;jpeg;png;webp"
    caption: str | None = None
    label: str | None = None
    num_classes: int = 0
    channels: int = 3

    def __post_init__(self) -> None:
        if not self.images or not all(re.fullmatch(r"[^\s/;:]+", name) for name in self.images):
            raise ValueError(f"image: found {self.image!r}, expected extensions such as jpg;png")
        for name in ("caption", "label"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[^\s/;:]+(:.+)?", value):
                raise ValueError(
                    f"{name}: found {value!r}, expected an extension such as txt, or json:KEY, or null"
                )
        if self.channels not in (1, 3) or isinstance(self.channels, bool):
            raise ValueError(f"channels: found {self.channels!r}, expected 1 (grey) or 3 (RGB)")
        if type(self.num_classes) is not int or self.num_classes < 0:
            raise ValueError(f"num_classes: found {self.num_classes!r}, expected an integer of at least 0")
        if (self.label is None) != (self.num_classes == 0):
            raise ValueError(
                f"num_classes: found {self.num_classes} with label={self.label}; expected the number of classes with a "
                "label, and 0 without"
            )

    @property
    def images(self) -> list[str]:
        """The extensions of images."""
        return [name.lower() for name in self.image.split(";")]

    @property
    def texts(self) -> list[str]:
        """The extensions of the caption and of the class."""
        return [value.partition(":")[0].lower() for value in (self.caption, self.label) if value is not None]

    @property
    def needed(self) -> list[list[str]]:
        """Extensions of which a sample needs one each."""
        return [self.images, *([name] for name in self.texts)]

    def pixels(self, sample: Mapping[str, bytes], size: Sequence[int] | None, where: str) -> Tensor:
        """The image of a sample as bytes [C,H,W] uint8; `size` (H, W): see `decode.to_pixels`; None: as it is."""
        name = next((name for name in self.images if name in sample), None)
        if name is None:
            raise ValueError(f"{where}: has no member {' or '.join(self.images)}")
        image, header = decode_bytes(sample[name], f"{where}.{name}")
        height, width = header.size if size is None else size
        return to_pixels(image, header.grey, (height, width), self.channels, f"{where}.{name}")

    def text(self, sample: Mapping[str, bytes], where: str) -> str:
        """The caption of a sample: not empty, at most `LARGEST_TEXT` bytes of UTF-8."""
        assert self.caption is not None
        found = _entry(sample, self.caption, where)
        if not isinstance(found, str) or not found.strip() or "\0" in found:
            raise ValueError(f"{where}: {self.caption}: found {found!r:.80}, expected a caption")
        return " ".join(found.split())

    def number(self, sample: Mapping[str, bytes], where: str) -> int:
        """The class of a sample."""
        assert self.label is not None
        found = _entry(sample, self.label, where)
        if isinstance(found, str) and re.fullmatch(r"\s*\d{1,18}\s*", found):
            found = int(found)
        if type(found) is not int or not 0 <= found < self.num_classes:
            raise ValueError(
                f"{where}: {self.label}: found {found!r:.80}, expected a class in 0 .. {self.num_classes - 1}"
            )
        return found


def _entry(sample: Mapping[str, bytes], place: str, where: str) -> object:
    """The text of a member, or the entry KEY of a JSON member for `json:KEY`."""
    name, _, key = place.partition(":")
    content = sample.get(name.lower())
    if content is None:
        raise ValueError(f"{where}: has no member {name}")
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"{where}.{name}: found {len(content)} bytes, expected at most {LARGEST_TEXT}")
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text) if key else text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}.{name}: is not {'JSON' if key else 'UTF-8'}: {error}") from error
    if not key:
        return value
    if not isinstance(value, dict) or key not in value:
        raise ValueError(f"{where}.{name}: has no entry {key!r}")
    return value[key]
