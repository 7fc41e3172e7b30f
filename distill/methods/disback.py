"""DisBack, distribution backtracking: distribution matching with a sequence of targets, from a degraded teacher to the teacher.

Zhang et al. 2024 (arXiv 2408.15991), second stage. The first, `degrade`, stores models s_1 ... s_N (nodes) on the path from
the teacher s_0 to a model that fits the initial student. The fake score starts from s_N; the targets are s_(N-1), ..., s_1
and finally the teacher. Without nodes it equals `dmd`, bit for bit.

What the loss should look like: `student/loss` as in `dmd`, with a small step up at each change of the target
(`student/node` falls to 0, the teacher). While `student/node` is above 0, samples approach a degraded model: `eval/fd` is
then above that of `dmd` after as many steps, by intent.

Deviations: this follows the paper. The public release loads none of the node's weights (its keys do not match, with
`strict=False`), changes the target too seldom and never reaches the teacher. Switching on a plateau of the
student's loss (`backtrack.criterion: plateau`) is an addition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.engine.parallel import copy_full
from distill.engine.update import Loss, Step
from distill.methods.families.matching import SAMPLING, UPDATES, DistributionMatching, Given
from distill.methods.families.options import (
    Backtracking,
    FakeScore,
    Gan,
    Sampling,
    TeacherGuidance,
    Updates,
)
from distill.methods.families.suits import refuse_idle
from distill.methods.losses.backtrack import Backtrack
from distill.models.denoiser import Denoiser
from distill.models.description import Description
from distill.models.native import weights_for
from distill.typed import filled


class DisBack(DistributionMatching):
    """Distribution backtracking.

    Args:
        student: the initial student.
        teacher: the exact teacher; its weights are replaced by those of the node that is the target.
        nodes: model folders: the teacher's and those of s_1 ... s_N; empty for none (DMD).
        backtrack: when the next target is loaded, see `families.options.Backtracking`.
        The others: see `methods.dmd.DMD`.
    """

    replaces_teacher = True
    FOLDERS = ("nodes",)

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        nodes: Sequence[Path],
        *,
        backtrack: Backtracking | Given = Backtracking(),
        sampling: Sampling | Given = SAMPLING,
        input: str = "backward_sim",
        generator_times: Given | None = None,
        fake: FakeScore | Given = FakeScore(),
        guidance: TeacherGuidance | Given = TeacherGuidance(),
        updates: Updates | Given = UPDATES,
        reduction: str = "mean",
        normalise: bool = True,
        floor: float = 1e-3,
        gan: Gan | Given | None = None,
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__(
            student,
            teacher,
            sampling=sampling,
            input=input,
            generator_times=generator_times,
            fake=fake,
            guidance=guidance,
            updates=updates,
            reduction=reduction,
            normalise=normalise,
            floor=floor,
            gan=gan,
            noise_scale=noise_scale,
        )
        options = filled(Backtracking(), backtrack, "backtrack")
        unused = ["window", "tolerance"] if options.criterion == "steps" else ["steps_per_node"]
        refuse_idle(options, unused, "backtrack", f"with the criterion {options.criterion!r}")
        _check_guidable(self.guidance.teacher, nodes[1:])
        self.folders = [Path(folder) for folder in nodes]
        self.path = Backtrack(max(0, len(self.folders) - 1), options.steps_per_node)
        self.criterion, self.window, self.tolerance = options.criterion, options.window, options.tolerance
        self.loaded = 0  # the node whose weights the target network holds
        # Of "plateau": the target, student steps at it, the last window's mean, and [sum, count] of this one's losses. In
        # float64 sums of float32 losses are exact: their mean over processes, which is saved, continues as the sums do.
        self.node, self.stayed, self.before = max(0, self.path.nodes - 1), 0, float("inf")
        self.tally = torch.zeros(2, dtype=torch.float64)
        if self.folders[1:]:
            copy_full(self.fake.net, weights_for(self.fake.net, self.folders[-1]))

    def state(self) -> dict[str, Any]:
        """Position on the path, where it is not a function of the step. The window's sum and count are means over processes,
        so that any number of processes can continue. Collective."""
        if self.criterion == "steps":
            return {}
        total, count = self.world.mean(self.tally.to(self.device, copy=True)).tolist()
        return {
            "node": self.node,
            "stayed": self.stayed,
            "before": self.before,
            "sum": total,
            "count": count,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        if self.criterion == "plateau":
            self.node, self.stayed, self.before = (
                int(state["node"]),
                int(state["stayed"]),
                float(state["before"]),
            )
            self.tally = torch.tensor([state["sum"], state["count"]], dtype=torch.float64)

    def aim(self) -> int:
        """The target node at this number of student steps; loads its weights into the target network."""
        node = self.node if self.criterion == "plateau" else self.path.target(self.progress.step)[0]
        if node != self.loaded:
            copy_full(self.teacher.net, weights_for(self.teacher.net, self.folders[node]))
            self.loaded = node
        return node

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        """The loss of distribution matching with the target node in place of the teacher."""
        if not self.folders[1:]:
            return super().student_loss(batch, step)
        node = self.aim()
        loss = super().student_loss(batch, step)
        if self.criterion == "plateau" and node > 0:
            self._note(loss.total.detach())
        stayed = self.stayed if self.criterion == "plateau" else self.path.target(self.progress.step)[1]
        position = {"node": torch.tensor(float(node)), "node_steps": torch.tensor(float(stayed))}
        return Loss(loss.total, {**loss.logs, **position})

    def fake_loss(self, batch: Batch, step: Step) -> Loss:
        """The fake score's loss. A head on the target's features gets those of the current node, as in a run resumed here."""
        if self.gan is not None and self.gan.features == "teacher" and self.folders[1:]:
            self.aim()
        return super().fake_loss(batch, step)

    def _note(self, loss: Tensor) -> None:
        """Add a student's loss to the window. Steps that are skipped because they are not finite are not counted."""
        finite = loss.isfinite()
        seen = torch.stack([torch.where(finite, loss, 0.0).double(), finite.double()])
        self.tally = self.tally.to(loss.device) + seen

    def after_step(self) -> None:
        """On a plateau, select the next node. The host reads the loss once a window."""
        if self.criterion != "plateau" or self.node == 0 or not self.folders[1:]:
            return
        self.stayed += 1
        if self.stayed % self.window:
            return
        total, count = self.world.mean(self.tally.to(self.device, copy=True)).tolist()
        if count == 0:  # every step was skipped: another window
            return
        mean = total / count
        if not mean < self.before * (1 - self.tolerance):
            self.node, self.stayed, mean = self.node - 1, 0, float("inf")
        self.before, self.tally = mean, torch.zeros_like(self.tally)


def _check_guidable(scale: float, nodes: Sequence[Path]) -> None:
    """Raise ValueError for guidance of nodes without a null condition."""
    if scale == 1:
        return
    without = [folder for folder in nodes if not Description.read(Path(folder)).model.get("guidable")]
    if without:
        raise ValueError(
            f"guidance.teacher: found {scale}, but the node {without[0]} was recorded without a null condition; expected 1, or "
            "no nodes (method dmd)"
        )
