"""Train an autoregressive teacher on tokens: the second stage of Distilled Decoding's embedded teacher.

The net predicts each token from the code vectors of the groups before; the loss is -log p(q_i | q_<i, class), averaged over
positions (as LlamaGen, arXiv 2406.06525, and VAR, arXiv 2404.02905).

What the loss should look like: it starts at log V (3.47 of 32 codes), falls steeply in the first hundred steps and then slowly.
`held_out` is the same of samples that are not trained on: where it stops falling, longer training only learns data by heart.

Deviations: code vectors are the input in place of an embedding of indices (ours: the net then takes any vector as a prefix,
and a student of Distilled Decoding, which reads code vectors and noise, starts from all its weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.update import Diagnostics, Loss, Step, Update
from distill.methods.losses.tokens import cross_entropy, mean_where
from distill.models.model import Model
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.models.tokens import TokenTeacher


class Autoregressive(DistillModule):
    """Cross-entropy of the next group of tokens.

    Args:
        student: the teacher-to-be.
        null_prob: share of samples whose condition is dropped, so that guidance works afterwards.
        held_out: of so many samples one is not trained on, chosen by their id; 0: all are trained on.
        steps: of the flow of each token when it is sampled (Heun).
    """

    MODELS: ClassVar[tuple[type[Model], ...]] = (TokenTeacher,)
    reads = ("x0", "tokens")

    def __init__(
        self, student: Model, *, null_prob: float = 0.1, held_out: int = 20, steps: int = 16
    ) -> None:
        super().__init__(student)
        if not 0 <= null_prob < 1 or (null_prob and not student.conditions.has_null):
            raise ValueError(
                f"null_prob: found {null_prob}, expected a share in [0, 1), and 0 for a model without conditions"
            )
        if held_out < 0 or held_out == 1:
            raise ValueError(f"held_out: found {held_out}, expected 0, or at least 2")
        if steps < 1:
            raise ValueError(f"steps: found {steps}, expected at least 1")
        self.null_prob, self.held_out, self.steps = null_prob, held_out, steps

    def updates(self) -> Sequence[Update]:
        """One update: the net."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """Any number of steps of the flow of each token; guidable where conditions are dropped."""
        sampler = SamplerSpec(steps=self.steps, any_steps=True, solver="heun")
        return Result(sampler, "independent", guidable=self.null_prob > 0)

    def loss(self, batch: Batch, step: Step) -> Loss:
        """-log p(q_i | q_<i), a mean over positions and over the samples that are trained on."""
        assert batch.x0 is not None
        assert batch.tokens is not None
        cond = batch.cond.drop(step.draws.uniform("null") < self.null_prob)
        per_sample = cross_entropy(
            self.student(batch.x0, batch.x0.new_zeros(len(batch)), cond), batch.tokens
        ).mean(1)
        held = self._held(batch)
        # Divided by the share of the data that is trained on and not by the batch's count, so that parts of a batch add up.
        share = 1 - 1 / self.held_out if self.held_out else 1.0
        total = (per_sample * ~held).mean() / share
        return Loss(total, {"held_out": mean_where(per_sample, held)} if self.held_out else {})

    def _held(self, batch: Batch) -> Tensor:
        """[B] bool: which samples are not trained on."""
        if not self.held_out:
            return torch.zeros_like(batch.ids, dtype=torch.bool)
        # A multiplicative hash (Knuth): ids of data sets often go round the classes.
        return (batch.ids * 2654435761 % 2**32 >> 16) % self.held_out == 0

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Without dropout: -log p a token of held-out samples and of the others, and how often the most likely token is
        right."""
        assert batch.x0 is not None
        assert batch.tokens is not None
        logits = self.best()(batch.x0, batch.x0.new_zeros(len(batch)), batch.cond)
        per_sample, held = cross_entropy(logits, batch.tokens).mean(1), self._held(batch)
        scalars = {
            "nll": mean_where(per_sample, ~held),
            "accuracy": (logits.argmax(-1) == batch.tokens).float().mean(),
        }
        return Diagnostics(
            scalars | ({"held_out_nll": mean_where(per_sample, held)} if self.held_out else {})
        )
