"""Prompts as conditions: a folder of prompts that a teacher's text encoders encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.files import canonical_json, copy, read_json, sha256_file, write_json, write_safetensors
from distill.models.conditions import Conditions, Label, Prompt
from distill.models.families import family_of
from distill.models.families.family import Encoded
from distill.models.pretrained import Folder
from distill.typed import parse

SCHEMA = 1
DESCRIPTION, TENSORS = FILES = "prompts.json", "prompts.safetensors"
EXPORTED = 64  # prompts that an export holds


@dataclass(frozen=True)
class TextEncoders:
    """What encoded the prompts: a pipeline's folder with the digest of its encoders, the null prompt and the type of the
    encoders' weights."""

    path: str
    sha256: str
    negative: str = ""
    dtype: str = "float32"
    variant: str | None = None

    @classmethod
    def of(cls, folder: Folder, negative: str = "", dtype: str = "float32") -> TextEncoders:
        """That of a folder. Raises ValueError for a pipeline that takes no prompts."""
        _, family = family_of(folder)
        if not family.encoders:
            raise ValueError(f"prompts: {folder.path} holds a {folder.pipeline}, which takes no prompts")
        parts = family.used_encoders(folder)
        for part, classes in parts.items():
            folder.class_of(part, classes)
            if not part.startswith("tokenizer"):
                folder.weights(part)
        return cls(str(folder.path.resolve()), folder.digest(parts), negative, dtype, folder.variant)

    def encode(self, prompts: Sequence[str], batch_size: int = 64) -> Encoded:
        """Encode prompts. Raises ValueError where the folder is gone or holds other encoders."""
        try:
            folder = Folder(self.path, self.variant)
        except FileNotFoundError as error:
            raise ValueError(
                f"prompt: not among those that were encoded for this model, and its text encoders are gone: {error}"
            ) from error
        _, family = family_of(folder)
        if (found := folder.digest(family.used_encoders(folder))) != self.sha256:
            raise ValueError(
                f"prompt: {self.path}: sha256 of the text encoders: found {found[:12]}, expected {self.sha256[:12]}"
            )
        return family.encode(folder, prompts, self.negative, self.dtype, batch_size)


@dataclass(frozen=True)
class Whole:
    """The table of `count` prompts, with its digest, of which an export holds the first."""

    sha256: str
    count: int


@dataclass(frozen=True)
class _Description:
    """prompts.json; `tensors`: sha256 of prompts.safetensors; `truncated`: of the whole table."""

    schema: int
    source: TextEncoders
    prompts: list[str]
    tensors: str
    truncated: int
    sample_shape: list[int]
    whole: Whole | None = None


@dataclass
class Table:
    """Encoded prompts in memory; with `whole`, the first ones of a larger table."""

    prompts: list[str]
    values: dict[str, Tensor]
    nulls: dict[str, Tensor]
    sample_shape: tuple[int, ...]
    source: TextEncoders | None = None
    truncated: int = 0
    whole: Whole | None = None
    rows: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {prompt: row for row, prompt in reversed(list(enumerate(self.prompts)))}

    def cond(self, rows: Tensor) -> Cond:
        """The conditions of some rows [n] int64. Raises ValueError naming `prompt` for rows that are not here."""
        if len(rows) and (last := int(rows.max())) >= len(self.prompts):
            raise ValueError(
                f"prompt: found number {last}, but this folder holds the first {len(self.prompts)} prompts alone; "
                "expected fewer samples, or type prompt=TEXT"
            )
        return Cond(len(rows), {name: value[rows] for name, value in self.values.items()}, self.nulls)


def write_table(
    folder: Path,
    prompts: Sequence[str],
    source: TextEncoders,
    encoded: Encoded,
    sample_shape: Sequence[int],
    whole: Whole | None = None,
) -> None:
    """Write a folder of encoded prompts: the tensors, then their description; `whole`: they are the first of those."""
    values = {f"values.{name}": value.contiguous() for name, value in encoded.values.items()}
    nulls = {f"nulls.{name}": value.contiguous() for name, value in encoded.nulls.items()}
    write_safetensors(folder / TENSORS, values | nulls)
    write_json(
        folder / DESCRIPTION,
        {
            "schema": SCHEMA,
            "source": vars(source),
            "prompts": list(prompts),
            "tensors": sha256_file(folder / TENSORS),
            "truncated": encoded.truncated,
            "sample_shape": list(sample_shape),
        }
        | ({} if whole is None else {"whole": vars(whole)}),
    )


def digest_of(folder: Path) -> str:
    """The digest of a folder of encoded prompts: of the prompts, their tensors and what encoded them; where it lies does not
    matter."""
    found = _described(folder)
    source = vars(found.source) | {"path": ""}
    content = [found.prompts, found.tensors, source, found.sample_shape]
    content += [] if found.whole is None else [vars(found.whole)]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _described(folder: Path) -> _Description:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the model's prompts were encoded there")
    found = parse(_Description, read_json(path), f"{path}: ")
    if found.schema != SCHEMA or not found.prompts:
        raise ValueError(f"{path}: schema: found {found.schema}, this version reads {SCHEMA}, with prompts")
    return found


def read_table(folder: Path | str, sha256: str | None = None) -> Table:
    """The encoded prompts of a folder; kept in memory for its last users.

    Raises FileNotFoundError or ValueError naming the file: missing, changed, or (with `sha256`) other prompts."""
    folder = Path(folder)
    if sha256 is not None and (found := digest_of(folder)) != sha256:
        raise ValueError(
            f"{folder / DESCRIPTION}: found prompts of digest {found[:12]}, the model expects {sha256[:12]}"
        )
    return _table(folder.resolve(), digest_of(folder))


@lru_cache(maxsize=2)
def _table(folder: Path, sha256: str) -> Table:
    described = _described(folder)
    if (found := sha256_file(folder / TENSORS)) != described.tensors:
        raise ValueError(
            f"{folder / TENSORS}: sha256: found {found[:12]}, {DESCRIPTION} expects {described.tensors[:12]}"
        )
    tensors = safetensors.torch.load_file(folder / TENSORS, device="cpu")
    parts: dict[str, dict[str, Tensor]] = {"values": {}, "nulls": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    return Table(
        described.prompts,
        parts["values"],
        parts["nulls"],
        tuple(described.sample_shape),
        described.source,
        described.truncated,
        described.whole,
    )


class Prompts(Conditions):
    """Prompts of a folder of encoded ones; sample i has prompt i mod n.

    Args:
        folder: of `write_table`. sha256: its digest. It is read when conditions are first asked for.
        whole: the digest of the table that these are the first prompts of, if any. Prompts of the same table are equal.
    """

    kind = "prompts"

    def __init__(self, folder: str, sha256: str, whole: str | None = None) -> None:
        self.folder, self.sha256, self.whole = folder, sha256, whole
        self._made: Table | None = None

    @classmethod
    def of_folder(cls, folder: Path | str) -> Prompts:
        """Those of a folder."""
        place, whole = Path(folder).resolve(), _described(Path(folder)).whole
        return cls(str(place), digest_of(place), *([] if whole is None else [whole.sha256]))

    @classmethod
    def of_table(cls, table: Table) -> Prompts:
        """Those of a table in memory, which no file can name."""
        made = cls("", "")
        made._made = table
        return made

    @property
    def table(self) -> Table:
        """The encoded prompts."""
        if self._made is None:
            self._made = read_table(self.folder, self.sha256)
        return self._made

    @property
    def has_null(self) -> bool:
        """Whether the encoders make a null condition."""
        return bool(self.table.nulls)

    @property
    def period(self) -> int:
        """The number of prompts, of the whole table."""
        whole = self.table.whole
        return len(self.table.prompts) if whole is None else whole.count

    def of(self, ids: Tensor) -> Cond:
        return self.table.cond((ids % self.period).cpu())

    def ask(self, *, count: int, label: Label | None = None, prompt: Prompt | None = None) -> Cond:
        if label is not None:
            raise ValueError(f"label: found {label}, but this model takes prompts; expected prompt")
        if prompt is None:
            return self.of(torch.arange(count, device="cpu"))
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count or not all(isinstance(each, str) for each in prompts):
            raise ValueError(f"prompt: found {len(prompts)} prompts, expected one or {count}, all strings")
        table = self.table
        if all(each in table.rows for each in prompts):
            return table.cond(torch.tensor([table.rows[each] for each in prompts]))
        if table.source is None:
            raise ValueError("prompt: found prompts that were not encoded, and no text encoder")
        names = list(dict.fromkeys(prompts))
        encoded = table.source.encode(names)
        made = Table(names, encoded.values, encoded.nulls, table.sample_shape)
        return made.cond(torch.tensor([made.rows[each] for each in prompts]))

    def draw(self, draws: Draws) -> Cond:
        return self.table.cond(draws.integer("prompt", self.period).cpu()).to(draws.index.device)

    def columns(self, ids: Tensor) -> dict[str, Tensor]:
        return {"prompt": (ids % self.period).to(torch.int32)}

    def check(self, columns: Mapping[str, Tensor]) -> None:
        low, high = int(columns["prompt"].min()), int(columns["prompt"].max())
        if low < 0 or high >= self.period:
            raise ValueError(f"prompt: found {low} .. {high}, expected 0 .. {self.period - 1}")

    def stored(self, columns: Mapping[str, Tensor]) -> Cond:
        return self.table.cond(columns["prompt"].to(torch.int64))

    def words(self) -> str:
        return "prompts"

    def _near(self, folder: Path, depth: int) -> Path | None:
        """The copy of these prompts in a folder of a model or of pairs, or in another stage's folder of the same run: beside
        `folder`, or beside one of the `depth - 1` folders above it."""
        if (folder / DESCRIPTION).is_file():
            return folder
        name = Path(self.folder).name
        for run in folder.absolute().parents[:depth] if name else ():
            with suppress(OSError, ValueError):
                if digest_of(run / name) == self.sha256:
                    return run / name
        return None

    def beside(self, folder: Path) -> Prompts:
        near = self._near(folder, depth=3)  # of STAGE/nodes/000
        if near is None or str(near) == self.folder:
            return self
        return Prompts(str(near), self.sha256, *([] if self.whole is None else [self.whole]))

    def copy_to(self, folder: Path) -> None:
        near = self._near(folder, depth=1)
        if near is None or digest_of(near) != self.sha256:
            read_table(self.folder, self.sha256)  # raises where they are gone or changed
            for name in FILES:
                copy(Path(self.folder) / name, folder / name)

    def exported(self, folder: Path) -> Prompts:
        """The first prompts, of which samples without a prompt are made, and the null condition."""
        table = self.table
        if table.source is None:
            raise ValueError("prompts: found a table in memory, expected prompts of a folder")
        values = {name: value[:EXPORTED].clone() for name, value in table.values.items()}
        encoded = Encoded(values, table.nulls, table.truncated)
        whole = table.whole or Whole(self.sha256, self.period) if self.period > EXPORTED else None
        write_table(folder, table.prompts[:EXPORTED], table.source, encoded, table.sample_shape, whole)
        return Prompts.of_folder(folder)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prompts):
            return False
        # Tables in memory have no digest.
        mine, theirs = self.whole or self.sha256, other.whole or other.sha256
        return mine == theirs if mine else self._made is other._made

    def __deepcopy__(self, memo: dict[int, Any]) -> Prompts:
        return self  # immutable


class PromptSource:
    """Encoded prompts as training data without images, for methods that make their own samples."""

    name = "prompts"
    num_classes = 0
    has: tuple[str, ...] = ()

    def __init__(self, folder: Path | str) -> None:
        self.conditions = Prompts.of_folder(folder)
        self.sample_shape = self.conditions.table.sample_shape

    def __len__(self) -> int:
        return self.conditions.period

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """The prompts at `rows`."""
        return Batch(ids=rows, index=index, cond=self.conditions.of(rows))

    def fingerprint(self) -> str:
        """The digest of the folder."""
        return self.conditions.sha256
