"""Sequences of groups of tokens, the first of which are data and the others noise: the states of Distilled Decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32


class Prefix(Process):
    """X_t = [q_1 .. q_k, eps_{k+1} .. eps_K] for K groups of positions, k of them data: t = 1 - k / K (arXiv 2412.17153,
    section 3.3).

    alpha and sigma are [B,L], a number a position: alpha is 1 in the first k groups and 0 in the others, sigma = 1 - alpha.
    Times between two multiples of 1 / K count as the nearer one. States are no mixture of data and noise, so a prediction is of
    kind x0 alone, and there is no velocity.

    Args:
        groups: positions in each group, in the order of generation.
    """

    t_min = 0.0
    t_max = 1.0

    def __init__(self, groups: Sequence[int]) -> None:
        self.groups = [int(size) for size in groups]
        if not self.groups or min(self.groups) < 1:
            raise ValueError(f"groups: found {list(groups)}, expected sizes of at least 1")
        numbers = torch.arange(len(self.groups), device="cpu")
        self._group = numbers.repeat_interleave(torch.tensor(self.groups, device="cpu"))

    @property
    def length(self) -> int:
        """L, positions in all."""
        return len(self._group)

    def time(self, data: int) -> float:
        """The time at which the first `data` groups are data. Raises ValueError unless it is 0 .. K."""
        if not 0 <= data <= len(self.groups):
            raise ValueError(f"groups: found {data} groups of data, expected 0 .. {len(self.groups)}")
        return 1 - data / len(self.groups)

    def known_time(self, count: int) -> float:
        """See `Process`; known positions end where a group ends."""
        return self.time(known_groups(self.groups, count))

    def alpha(self, t: Tensor) -> Tensor:
        """[B] -> [B,L]."""
        t = at_least_float32(t)
        return (self._group.to(t.device) < data_groups(t, len(self.groups))[..., None]).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """[B] -> [B,L]."""
        return 1 - self.alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """0: states change at single times alone."""
        return torch.zeros_like(self.alpha(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(self.alpha(t))

    def log_ratio(self, t: Tensor) -> Tensor:
        """log of the groups of data over those of noise, [B] -> [B]."""
        data = data_groups(at_least_float32(t), len(self.groups))
        return torch.log(data) - torch.log(len(self.groups) - data)

    def time_of(self, log_ratio: Tensor) -> Tensor:
        """Inverse of `log_ratio`, between its values too."""
        return torch.sigmoid(-at_least_float32(log_ratio))

    def check_kind(self, kind: str) -> None:
        """Raise ValueError for another kind than x0."""
        super().check_kind(kind)
        if kind != "x0":
            raise ValueError(
                f"kind {kind!r}: states of Prefix are data or noise and no mixture; expected 'x0'"
            )


def data_groups(t: Tensor, groups: int) -> Tensor:
    """k, the groups of data at times t [B], in the type of t."""
    return ((1 - t) * groups).round()


def known_groups(groups: Sequence[int], count: int) -> int:
    """How many of the first groups the first `count` positions are. Raises ValueError naming `known` for a count that ends
    within a group, or at the end of all."""
    ends = [sum(groups[:k]) for k in range(len(groups))]
    if count not in ends:
        shown = ends if len(ends) <= 20 else [*ends[:20], "..."]
        raise ValueError(
            f"known: found {count} positions, expected as many as the first groups have: one of {shown}"
        )
    return ends.index(count)
