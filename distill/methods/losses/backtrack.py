"""DisBack's path: when nodes are stored, and which of them is the target (arXiv 2408.15991).

Recording trains a copy of the teacher, s_0, on the samples of the initial student and stores the nodes s_1 ..
s_N, the most degraded last. Backtracking starts the fake score from s_N and distils with the
targets s_(N-1), ..., s_1 and at last the teacher itself, s_0, which is never stored and never left. With N =
0 or 1 the only target is the teacher; N = 0 is DMD.

Everything is a function of the step, so resuming needs no saved state.

Deviation: the released code compares the growing step with a falling checkpoint number; it switches too
seldom, stops before the teacher, and loads none of the node's weights (its keys do not match, with
`strict=False`). Here the teacher is always reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


def node_steps(steps: int, every: int) -> list[int]:
    """Steps of the recording after which a node is stored: every, 2 every, ..., and always ``steps``, the last.

    The released SDXL run: 1000 steps and a node every 100. On EDM teachers the paper is said to use 200 and 50 (not checked).

    Raises:
        ValueError: steps < 0, or every < 1.
    """
    if steps < 0:
        raise ValueError(f"steps: found {steps}, expected at least 0")
    if every < 1:
        raise ValueError(f"node_every: found {every}, expected at least 1")
    regular = list(range(every, steps + 1, every))
    return regular if steps % every == 0 else [*regular, steps]


@dataclass(frozen=True)
class Backtrack:
    """The targets of ``nodes`` stored nodes in reverse order, ``steps_per_node`` generator steps at each.

    Attributes:
        nodes: N, at least 0.
        steps_per_node: one number for all N - 1 stored targets, or their N - 1 numbers in the order of the
            targets (node N - 1 first). The teacher needs none.
    """

    nodes: int
    steps_per_node: int | Sequence[int] = 1000

    def __post_init__(self) -> None:
        if self.nodes < 0:
            raise ValueError(f"nodes: found {self.nodes}, expected at least 0")
        stored, given = max(self.nodes - 1, 0), self.steps_per_node
        if isinstance(given, str) or not isinstance(given, int | Sequence):
            raise ValueError(
                f"backtrack.steps_per_node: found {given!r}, expected a whole number, or one for each node"
            )
        if not isinstance(given, int) and len(given) != stored:
            raise ValueError(
                f"backtrack.steps_per_node: found {len(given)} numbers for the {stored} stored targets of a "
                f"path of {self.nodes} nodes; expected one for each, or one number for all"
            )
        if any(steps < 1 for steps in self._stays()) or (isinstance(given, int) and given < 1):
            raise ValueError(f"backtrack.steps_per_node: found {given}, expected at least 1 each")

    def switches(self) -> list[tuple[int, int]]:
        """(first generator step, target node) of every target, in order; the last is the teacher, node 0."""
        starts = [0, *accumulate(self._stays())]
        return [(start, len(starts) - 1 - i) for i, start in enumerate(starts)]

    def target(self, step: int) -> tuple[int, int]:
        """(node, steps already made with it) at generator step ``step`` (from 0); node 0 is the teacher.

        Raises:
            ValueError: step < 0.
        """
        if step < 0:
            raise ValueError(f"step: found {step}, expected at least 0")
        start, node = next(pair for pair in reversed(self.switches()) if pair[0] <= step)
        return node, step - start

    def _stays(self) -> list[int]:
        given = self.steps_per_node
        return [given] * max(self.nodes - 1, 0) if isinstance(given, int) else list(given)
