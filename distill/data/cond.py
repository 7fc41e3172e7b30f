"""What samples are conditioned on: named values, a row a sample. Methods pass conditions on and never read them; nets read
them by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.data.arguments import finite, integer, labels

NULL_LABEL = -1
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Values of one number a sample, and the types that they may have.
NUMBERS = {"label": (torch.int64,), "guidance_w": FLOATS}


@dataclass(frozen=True)
class Cond:
    """A batch of conditions.

    Attributes:
        size: B, the number of samples; a batch without values is unconditional.
        values: name -> [B, ...]. Known names: `label` [B] int64, a class; `guidance_w` [B] floats, the guidance
            w = guidance_scale - 1 of nets that take it as an input; `context` [B, L, C], a sequence, with `context_mask`
            [B, L] bool, true where it holds a token.
        nulls: name -> [1, ...], the null condition of each value that classifier-free guidance drops (of a label: -1).
            Values without one (`guidance_w`, sizes) are kept by `null` and `drop`.

    `drop` and `cat` pad sequences of different lengths with zeros along dimension 1, and their masks with False; a
    sequence without a mask `<name>_mask` is not padded.

    Raises:
        ValueError: names the value that is no tensor of `size` rows, or of another type or rank than its null.
    """

    size: int
    values: Mapping[str, Tensor] = field(default_factory=dict)
    nulls: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_labels(cls, label: Tensor | Sequence[int], num_classes: int | None = None) -> Cond:
        """Conditions from class labels [B] (integers; -1 is the null condition). With `num_classes`, classes at or above it
        are refused here, and else by the net, which knows how many it has."""
        found = labels("label", label, num_classes, null=True)
        if found.ndim != 1:
            raise ValueError(
                f"label: expected integers of shape [B], found {found.dtype} {tuple(found.shape)}"
            )
        return cls(len(found), {"label": found}, {"label": found.new_full((1,), NULL_LABEL)})

    @classmethod
    def nothing(cls, size: int) -> Cond:
        """`size` unconditional samples."""
        return cls(size)

    def __post_init__(self) -> None:
        integer("size", self.size, at_least=0)
        for name, value in self.values.items():
            _check_rows(name, value, self.size)
        for name, null in self.nulls.items():
            if name not in self.values:
                raise ValueError(
                    f"nulls.{name}: found without a value; expected some of {sorted(self.values)}"
                )
            value = self.values[name]
            _check_rows(f"nulls.{name}", null, 1)
            if null.dtype != value.dtype or null.dim() != value.dim():
                raise ValueError(
                    f"nulls.{name}: found {null.dtype} {list(null.shape)}, expected {value.dtype} and the rank of the value "
                    f"{list(value.shape)}"
                )
            if (mask := f"{name}_mask") in self.values and mask not in self.nulls:
                raise ValueError(
                    f"nulls.{mask}: missing; {name} has a null condition, expected one of its mask"
                )

    def __len__(self) -> int:
        return self.size

    def get(self, name: str) -> Tensor | None:
        """The value [B, ...] of a name, or None where there is none."""
        return self.values.get(name)

    def with_guidance(self, w: Tensor | float | None) -> Cond:
        """The same conditions with the guidance w [B] (or one number for all) as an input; None removes it."""
        rest = {name: value for name, value in self.values.items() if name != "guidance_w"}
        if w is None:
            return self if len(rest) == len(self.values) else replace(self, values=rest)
        if not isinstance(w, Tensor):
            device = next((value.device for value in rest.values()), None)
            w = torch.full((self.size,), finite("guidance_w", w), dtype=torch.float32, device=device)
        if w.shape != (self.size,):
            raise ValueError(f"guidance_w: expected [{self.size}] numbers, found shape {tuple(w.shape)}")
        return replace(self, values=rest | {"guidance_w": w})

    def null(self) -> Cond:
        """The null conditions that guidance compares with; what has no null stays."""
        if not self.nulls:
            return self
        nulls = {name: null.expand(self.size, *null.shape[1:]) for name, null in self.nulls.items()}
        return replace(self, values={**self.values, **nulls})

    def drop(self, mask: Tensor) -> Cond:
        """The same conditions with the null condition in the rows where `mask` [B] bool is true."""
        dropped = {}
        for name, null in self.nulls.items():
            value, null = self._same_length(name, self.values[name], null)
            dropped[name] = torch.where(mask.reshape(-1, *(1,) * (value.dim() - 1)), null, value)
        return replace(self, values={**self.values, **dropped}) if dropped else self

    def cat(self, other: Cond) -> Cond:
        """Rows of `self`, then rows of `other`, which has the same names."""
        if self.values.keys() != other.values.keys():
            mine, theirs = (", ".join(sorted(cond.values)) or "nothing" for cond in (self, other))
            raise ValueError(f"cond: cannot join conditions of {mine} with conditions of {theirs}")
        joined = {
            name: torch.cat(self._same_length(name, value, other.values[name]))
            for name, value in self.values.items()
        }
        return Cond(self.size + other.size, joined, self.nulls)

    def rows(self, rows: Tensor) -> Cond:
        """The conditions of some rows ([n] integers)."""
        return Cond(len(rows), {name: value[rows] for name, value in self.values.items()}, self.nulls)

    def to(self, device: torch.device | str) -> Cond:
        """The same conditions on `device`."""
        if not self.values:
            return self
        values, nulls = (
            {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
            for tensors in (self.values, self.nulls)
        )
        return replace(self, values=values, nulls=nulls)

    def pin_memory(self) -> Cond:
        """The same conditions in page-locked memory."""
        values, nulls = (
            {name: tensor.pin_memory() for name, tensor in tensors.items()}
            for tensors in (self.values, self.nulls)
        )
        return replace(self, values=values, nulls=nulls)

    def _same_length(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of one name, the shorter sequence padded to the length of the other."""
        if a.shape[1:] == b.shape[1:]:
            return a, b
        sequences = a.shape[2:] == b.shape[2:] and (f"{name}_mask" in self.values or a.dtype == torch.bool)
        if not sequences:
            raise ValueError(
                f"{name}: found shapes {list(a.shape)} and {list(b.shape)}, expected equal ones, or sequences [B, L, ...] "
                f"with a mask {name}_mask [B, L]"
            )
        length = max(a.shape[1], b.shape[1])
        return _padded(a, length), _padded(b, length)


def _padded(sequence: Tensor, length: int) -> Tensor:
    """[B, L, ...] with zeros (False) behind, up to `length`."""
    return pad(sequence, (*(0, 0) * (sequence.dim() - 2), 0, length - sequence.shape[1]))


def _check_rows(name: str, value: Tensor, size: int) -> None:
    kinds = NUMBERS.get(name.removeprefix("nulls."))
    if isinstance(value, Tensor):
        if kinds is None and value.shape[:1] == (size,):
            return
        if kinds is not None and value.dtype in kinds and value.shape == (size,):
            return
        found = f"{value.dtype} {list(value.shape)}"
    else:
        found = type(value).__name__
    expected = f"a tensor [{size}, ...]" if kinds is None else f"a tensor [{size}] of {kinds[0]}"
    raise ValueError(f"{name}: expected {expected}, found {found}")
