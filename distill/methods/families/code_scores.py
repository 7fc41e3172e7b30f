"""What both stages of Distilled Decoding 2 share: noisy codes at a time a position, and the teacher's exact predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.models.code_flow import CodeFlow
from distill.models.denoiser import check_same
from distill.models.model import Model
from distill.models.tokens import TokenTeacher
from distill.process.base import expand


class CodeScores:
    """Noisy states and the teacher's predictions of them.

    Args:
        student: a `CodeFlow`. teacher: a `TokenTeacher` of the same groups and codebook.
        draws: states of a sequence. t_min, t_max: range of the times, within (0, 1]. guidance_scale: of the teacher.

    Raises:
        ValueError: names the argument.
    """

    def __init__(
        self, student: Model, teacher: Model, draws: int, t_min: float, t_max: float, guidance_scale: float
    ) -> None:
        if not isinstance(student, CodeFlow):
            raise ValueError(
                f"student: found a {type(student).__name__}, expected a flow of codes: adapt: {{process: code_flow}} of a "
                "model of tokens"
            )
        if not isinstance(teacher, TokenTeacher):
            raise ValueError(f"teacher: found a {type(teacher).__name__}, expected a model of tokens")
        check_same("teacher", teacher, "student", student)
        own, wanted = list(student.code_net.groups), list(teacher.token_net.groups)
        if own != wanted:
            raise ValueError(f"teacher: found groups {wanted}, expected the student's {own}")
        if draws < 1:
            raise ValueError(f"draws: found {draws}, expected at least 1")
        if not 0 < t_min < t_max <= 1:
            raise ValueError(f"t_min, t_max: found {t_min} and {t_max}, expected 0 < t_min < t_max <= 1")
        teacher.check_transport(guidance_scale)
        self.process, self.draws, self.guidance_scale = student.process, draws, guidance_scale
        self.t_min, self.t_max, self.baked = t_min, t_max, teacher.baked(guidance_scale)

    def record(self) -> dict[str, Any]:
        """What a sampler says of the teacher's guidance and filters."""
        return {"guidance_baked": self.guidance_scale, "baked": self.baked}

    def noisy(self, q: Tensor, draws: Draws, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(q_t [n B,L,C], times [n B,L], noise) of code vectors q [B,L,C], n states of each; `count`: n, None: `draws`."""
        count = self.draws if count is None else count
        length, size = q.shape[1:]
        share = draws.uniform("t", (count, length)).flatten(0, 1)
        t = self.t_min + (self.t_max - self.t_min) * share
        eps = draws.normal("eps", (count, length, size)).flatten(0, 1)
        return self.process.add_noise(q.repeat_interleave(count, 0), eps, t), t, eps

    def teacher_x0(self, teacher: Model, codes: Tensor, q_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """E[code | q_t] [n B,L,C] given the codes [B,L,C] before each position, which get no gradient; q_t does."""
        assert isinstance(teacher, TokenTeacher)
        with torch.no_grad():
            log_p = teacher.log_probs(codes, t[: len(codes), 0], cond, self.guidance_scale)
        return teacher.expected(q_t, t, log_p.repeat_interleave(len(q_t) // len(codes), 0))

    def teacher_velocity(self, teacher: Model, codes: Tensor, q_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(q_t - E[code | q_t]) / t, without a gradient."""
        with torch.no_grad():
            return (q_t - self.teacher_x0(teacher, codes, q_t, t, cond)) / expand(t, q_t)
