"""The base of networks that give probabilities of tokens, group by group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.nets.layers import class_rows, label_of
from distill.nets.net import Net


class TokenNet(Net, ABC):
    """An autoregressive network over K groups of positions, L in all; the positions of one group are independent of each other.

    Attributes:
        vocabulary: V. groups: positions of each group, in the order of generation.
        codebook: [V,C] of nets that have one, zeros until the model of the net sets it: the codes of its decoder.
        student: whether it is a student of Distilled Decoding. Then it has a codebook, its output are code vectors [B,L,C] in
            place of logits, and `heads=True` gives both heads (logits [B,L,V], code vectors [B,L,C]). Tokens before position
            `split` come from the logits, the others from the second head.
        last: name of the linear layer that makes the logits. Where it is left out (`logits=False`), `forward` and `advance`
            give what it would read, [...,width].
    """

    vocabulary: int
    groups: Sequence[int]
    codebook: Tensor
    student: bool = False
    split: int
    last: ClassVar[str] = "head"
    width: int

    def last_layer(self, logits: bool, bias: bool = True) -> nn.Module:
        """The layer `last`, or one that changes nothing."""
        return nn.Linear(self.width, self.vocabulary, bias=bias) if logits else nn.Identity()

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Code vectors x [B,L,C] of all positions -> logits [B,L,V] of each position given the groups before its own. Times are
        not read."""

    def of_teacher(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that a student starts with, of those of its teacher."""
        return dict(state)

    @abstractmethod
    def begin(self, cond: Cond) -> Any:
        """The state of generation, before the first group."""

    @abstractmethod
    def advance(self, state: Any, codes: Tensor | None) -> Tensor:
        """Add the code vectors [B,n,C] of the last group to the state, in place; returns the logits [B,n,V] of the next group.
        In the first call, None, or the codes of as many groups as are known."""


class TokenTable(TokenNet):
    """Logits of each position that depend on the class alone: tokens are independent, in one group.

    Args:
        vocabulary: V. length: L. num_classes: rows of the table; 0 for one row.
    """

    def __init__(self, *, vocabulary: int, length: int, num_classes: int = 0) -> None:
        super().__init__()
        if vocabulary < 1 or length < 1 or num_classes < 0:
            raise ValueError(
                f"vocabulary, length, num_classes: found {vocabulary}, {length}, {num_classes}, expected at least 1, 1 and 0"
            )
        self.vocabulary, self.length, self.num_classes = vocabulary, length, num_classes
        self.groups = (length,)
        self.table = nn.Embedding(num_classes or 1, length * vocabulary)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.advance(self.begin(cond), None)

    def begin(self, cond: Cond) -> Any:
        device = self.table.weight.device
        if not self.num_classes:
            return torch.zeros(len(cond), dtype=torch.int64, device=device)
        return label_of(cond, self.num_classes).to(device)

    def advance(self, state: Any, codes: Tensor | None) -> Tensor:
        rows = class_rows(state, self.table, self.table.num_embeddings)
        return rows.view(len(state), self.length, self.vocabulary)


class StudentAndTeacher(Net):
    """Two networks of one sequence of tokens; a call is the student's."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See the student."""
        out: Tensor = self.student(x, t, cond)
        return out
