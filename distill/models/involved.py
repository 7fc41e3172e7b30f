"""A student of Distilled Decoding whose early tokens its teacher draws again (arXiv 2412.17153, section 3.3)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.conditions import Conditions, Nothing
from distill.models.decoder import Decoder, codebook_of, indices
from distill.models.denoiser import Denoiser
from distill.models.model import Model
from distill.models.tokens import TokenTeacher
from distill.nets.token_net import StudentAndTeacher, TokenNet
from distill.process.prefix import Prefix
from distill.process.times import default_grid
from distill.samplers.token_filters import Filters
from distill.samplers.token_flow import SOLVERS


class Involved(Model):
    """Teacher-involved sampling: the student makes all tokens, of which the first `first` groups are kept; the teacher makes
    the groups up to `last` from there; the student makes the rest, from the original noise. With `first` 0 the teacher begins.

    Ours: the teacher maps the original noise of its groups (the paper draws its tokens), so the sample is a function of z.

    Args:
        net: student and teacher. sample_shape: [L,C]. groups: positions of each group. first, last: groups, 0 <= first <
            last < K.
        filters: of the teacher. Others: as of `Model`.

    Raises:
        ValueError: names the argument.
    """

    column: ClassVar[Literal["x0", "tokens"]] = "x0"
    kind = "x0"
    parts: tuple[Denoiser, TokenTeacher]

    def __init__(
        self,
        net: nn.Module,
        sample_shape: Sequence[int],
        groups: Sequence[int],
        first: int,
        last: int,
        *,
        conditions: Conditions | None = None,
        decoder: Decoder,
        filters: Filters = Filters(),  # noqa: B008 (immutable)
        coupling: str = "paired",
        guidable: bool = False,
    ) -> None:
        if not isinstance(net, StudentAndTeacher) or not isinstance(net.teacher, TokenNet):
            raise ValueError(
                f"net: found {type(net).__name__}, expected a StudentAndTeacher with a teacher of tokens"
            )
        process = Prefix(groups)
        if not 0 <= first < last < len(process.groups):
            raise ValueError(
                f"first, last: found {first} and {last}, expected groups 0 <= first < last < {len(process.groups)}"
            )
        super().__init__(net, process, sample_shape, conditions or Nothing(), decoder, coupling, guidable)
        shared: dict[str, Any] = {"conditions": self.conditions, "decoder": decoder}
        teacher = TokenTeacher(net.teacher, sample_shape, filters=filters, guidable=guidable, **shared)
        if list(net.teacher.groups) != process.groups:
            raise ValueError(
                f"groups: found {process.groups}, expected the teacher's {list(net.teacher.groups)}"
            )
        student = Denoiser(net.student, process, "x0", sample_shape, coupling="few_step", **shared)
        # No submodules: their networks are those of `net`.
        self.__dict__["parts"] = (student, teacher)
        self.groups, self.first, self.last, self.filters = process.groups, first, last, filters

    def config(self) -> dict[str, Any]:
        """See `Model`."""
        return {
            "_target_": f"{Involved.__module__}.{Involved.__qualname__}",
            "net": self.net_config(),
            "sample_shape": list(self.sample_shape),
            "groups": self.groups,
            "first": self.first,
            "last": self.last,
            "conditions": self.conditions.config(),
            "decoder": self.decoder.config(),
            "filters": vars(self.filters),
            "coupling": self.coupling,
            "guidable": self.guidable,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Involved:
        return self.with_(net=copy.deepcopy(self.net, memo))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The student's samples of states x [B,L,C]."""
        out: Tensor = self.net(x, t, cond)
        return out

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """See the student."""
        return self._student(x_t, float(t[0]), cond)

    def _student(self, x: Tensor, time: float, cond: Cond) -> Tensor:
        t = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        return self.parts[0].x0(x, t, cond)

    def transport(
        self,
        z: Tensor,
        cond: Cond | None = None,
        *,
        solver: str = "heun",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        grid: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> Tensor:
        """See `Model`; solver and steps are those of the teacher's flow of tokens, and there is no path."""
        if times is not None and len(times) > 1:
            raise ValueError("times: found several, but teacher-involved sampling has no path; expected none")
        cond = Cond.nothing(len(z)) if cond is None else cond
        grid = default_grid(self.parts[1].process, 16 if steps is None else steps) if grid is None else grid
        process, kept = self.process, None
        assert isinstance(process, Prefix)
        if self.first:
            begun = self._student(z, 1.0, cond)[:, : sum(self.groups[: self.first])]
            kept = codebook_of(self.decoder).to(z.device)[indices(self.decoder, begun)]
        made, _ = self.parts[1].generate(z, cond, solver, grid, guidance_scale, known=kept, until=self.last)
        state = torch.cat([made, z[:, made.shape[1] :]], 1)
        return self._student(state, process.time(self.last), cond)[None]

    def check_transport(self, guidance_scale: float = 1.0, solver: str | None = None) -> None:
        """See `Model`."""
        if solver is not None and solver not in SOLVERS:
            raise ValueError(
                f"solver: found {solver!r}, expected one of {list(SOLVERS)} for a model of tokens"
            )
        super().check_transport(guidance_scale, solver)

    def calls(self, solver: str, steps: int, guidance_scale: float = 1.0) -> int | None:
        """Those of the student, and one a group of the teacher's, two with guidance."""
        groups = self.last - self.first
        return (2 if self.first else 1) + groups * (1 if guidance_scale == 1 else 2)
