"""The conditions of a model: none, or class labels. Methods, caches, stages and exporters use this interface alone: a further
kind is a class here, and a net that reads its `Cond`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.data.arguments import check_range
from distill.data.arguments import labels as class_labels
from distill.data.cond import NULL_LABEL, Cond
from distill.data.rng import Draws
from distill.typed import Configured

Label = int | Sequence[int] | Tensor
Prompt = str | Sequence[str]


class Conditions(Configured, ABC):
    """The conditions of a model. Two of the same class and arguments are equal; they have no hash.

    Attributes:
        kind: the name of the kind.
        num_classes: class labels; 0 for kinds without them.
    """

    kind: ClassVar[str]
    num_classes: int = 0

    @property
    def has_null(self) -> bool:
        """Whether conditions can be dropped, which guidance needs."""
        return True

    @property
    def period(self) -> int:
        """`of(ids)` repeats after so many ids; 0 where all ids have the same condition."""
        return 0

    @abstractmethod
    def of(self, ids: Tensor) -> Cond:
        """The conditions of stored samples `ids` [n] int64: a function of each id, as balanced as possible."""

    @abstractmethod
    def ask(self, *, count: int, label: Label | None = None, prompt: Prompt | None = None) -> Cond:
        """The conditions of `count` samples by a user's options, on the CPU; without options, those of ids 0 .. count - 1.

        Raises:
            ValueError: names `label` or `prompt`: the model does not take it, or not this one.
        """

    @abstractmethod
    def draw(self, draws: Draws) -> Cond:
        """Conditions drawn evenly for a training step."""

    def columns(self, ids: Tensor) -> dict[str, Tensor]:
        """What a pair cache stores of the conditions `of(ids)`: name -> [n, ...]."""
        return {"label": torch.full_like(ids, NULL_LABEL, dtype=torch.int32)}

    @abstractmethod
    def check(self, columns: Mapping[str, Tensor]) -> None:
        """Raise ValueError naming the column of stored `columns` that holds other conditions."""

    @abstractmethod
    def stored(self, columns: Mapping[str, Tensor]) -> Cond:
        """The conditions in rows of stored `columns`."""

    @abstractmethod
    def words(self) -> str:
        """In a few words, for messages and cards: "10 classes"."""

    def beside(self, folder: Path) -> Conditions:
        """The same conditions; what they need is read from a folder of a model or of pairs, or beside it, if it is there."""
        return self

    def copy_to(self, folder: Path) -> None:
        """Copy into a stage's folder what `beside` would not find there."""

    def exported(self, folder: Path) -> Conditions:
        """Those of an export, into whose folder they write what they need."""
        return self

    def accepts(self, data: Conditions) -> None:
        """Raise ValueError where a model with these conditions cannot be trained on data with those."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conditions) and self.config() == other.config()


class Nothing(Conditions):
    """An unconditional model."""

    kind = "nothing"

    @property
    def has_null(self) -> bool:
        return False

    def of(self, ids: Tensor) -> Cond:
        return Cond.nothing(len(ids))

    def ask(self, *, count: int, label: Label | None = None, prompt: Prompt | None = None) -> Cond:
        _refuse_prompt(prompt)
        if label is not None:
            raise ValueError(f"label: found {label}, but this model takes no class labels")
        return Cond.nothing(count)

    def draw(self, draws: Draws) -> Cond:
        return Cond.nothing(len(draws.index))

    def check(self, columns: Mapping[str, Tensor]) -> None:
        if int(columns["label"].max()) >= 0:
            raise ValueError(f"label: found {int(columns['label'].max())}, expected {NULL_LABEL}: no classes")

    def stored(self, columns: Mapping[str, Tensor]) -> Cond:
        return Cond.nothing(len(columns["label"]))

    def words(self) -> str:
        return "no conditions"


class Labels(Conditions):
    """Class labels 0 .. `num_classes` - 1; sample i has the class i mod `num_classes`."""

    kind = "labels"

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: found {num_classes}, expected at least 1")
        self.num_classes = num_classes

    @property
    def period(self) -> int:
        return self.num_classes

    def of(self, ids: Tensor) -> Cond:
        return Cond.of_labels(ids % self.num_classes)

    def ask(self, *, count: int, label: Label | None = None, prompt: Prompt | None = None) -> Cond:
        _refuse_prompt(prompt, f"; expected label=0 .. {self.num_classes - 1}")
        if label is None:
            return self.of(torch.arange(count, device="cpu"))
        labels = class_labels("label", label, self.num_classes).cpu()
        labels = labels.expand(count) if labels.ndim == 0 else labels
        if labels.shape != (count,):
            raise ValueError(f"label: expected one label or {count} of them, found {len(labels)}")
        check_range("label", labels, self.num_classes, null=False)  # also those that came from an accelerator
        return Cond.of_labels(labels)

    def draw(self, draws: Draws) -> Cond:
        return Cond.of_labels(draws.integer("label", self.num_classes))

    def columns(self, ids: Tensor) -> dict[str, Tensor]:
        return {"label": (ids % self.num_classes).to(torch.int32)}

    def check(self, columns: Mapping[str, Tensor]) -> None:
        check_range("label", columns["label"], self.num_classes, null=False)

    def stored(self, columns: Mapping[str, Tensor]) -> Cond:
        return Cond.of_labels(columns["label"].to(torch.int64))

    def words(self) -> str:
        return f"{self.num_classes} classes"

    def accepts(self, data: Conditions) -> None:
        if data.num_classes > self.num_classes:
            raise ValueError(
                f"net.num_classes: found {self.num_classes}, but the data have {data.num_classes} classes"
            )


def classes(count: int) -> Conditions:
    """`count` class labels; 0 for no conditions."""
    return Labels(count) if count else Nothing()


def of_net(net: nn.Module) -> Conditions | None:
    """The conditions of a net with an attribute `num_classes` (0: none); None for a net without it."""
    count = getattr(net, "num_classes", None)
    return None if count is None else classes(count)


def of_source(source: Any) -> Conditions:
    """The conditions of a source: its `conditions`, or class labels by its `num_classes`."""
    given: Conditions | None = getattr(source, "conditions", None)
    return classes(source.num_classes) if given is None else given


def _refuse_prompt(prompt: Prompt | None, instead: str = "") -> None:
    if prompt is not None:
        raise ValueError(f"prompt: found {prompt!r}, but this model takes no prompts{instead}")
