"""Denoising score matching of a score model on generated samples: the fake score's loss, and that of `degrade`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.methods.families.options import FakeScore
from distill.methods.families.suits import check_clean_end, refuse_idle
from distill.methods.losses.score import FAKE_SCORE_KINDS, fake_score_loss, fake_score_weight
from distill.methods.losses.score_times import times_of, usual_times
from distill.models.conditions import Conditions
from distill.models.denoiser import Denoiser, check_sigma_data

AUTO = {"x0": "edm", "eps": "eps", "v": "v", "velocity": "flow"}


class ScoreMatching:
    """`losses.score.fake_score_loss` with its options, checked for one model.

    Args:
        model: gives process and kind. options: see `FakeScore`.
        paper: times under EDM where `options` has none.
        reduction: over the dimensions of a sample, "sum" or "mean".
        guidance_scale: of the prediction. null_prob: share of dropped conditions.

    Raises:
        ValueError: an option that is unknown, outside its range, not defined under the model's process, or without effect.
    """

    def __init__(
        self,
        model: Denoiser,
        options: FakeScore,
        paper: Mapping[str, Any],
        reduction: str,
        guidance_scale: float = 1.0,
        null_prob: float = 0.0,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: found {reduction!r}, expected 'sum' or 'mean'")
        given = usual_times(model.process, options.times, paper, fake=True)
        self.times = times_of(model.process, given, "fake.times")
        self.weighting, self.sigma_data = _weighting(model, options), options.sigma_data
        self.reduction, self.guidance_scale, self.null_prob = reduction, guidance_scale, null_prob
        if self.weighting != "edm":
            refuse_idle(options, ["sigma_data"], "fake", f"with the weighting {self.weighting!r}")
        if given.get("name") == "uniform" and given.get("low", 0.0) == 0:
            check_clean_end(
                model.process,
                model.kind,
                FAKE_SCORE_KINDS[self.weighting],
                lambda t: fake_score_weight(model.process, t, self.weighting),
                "fake.weighting",
            )

    def __call__(self, model: Denoiser, x: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """[B]: the loss of `model` on samples x [B,*S], which get no gradient, at drawn times and noise."""
        t, eps = self.times(draws), draws.normal("eps", x.shape[1:])
        x_t = model.process.add_noise(x.detach(), eps, t)
        if self.null_prob > 0:
            cond = cond.drop(draws.uniform("null") < self.null_prob)
        prediction = model.predict(FAKE_SCORE_KINDS[self.weighting], x_t, t, cond, self.guidance_scale)
        return fake_score_loss(
            prediction,
            x,
            eps,
            t,
            model.process,
            weighting=self.weighting,
            sigma_data=self.sigma_data,
            reduction=self.reduction,
        )


def _weighting(model: Denoiser, options: FakeScore) -> str:
    """The weighting of the loss; for "auto" that of the model's kind."""
    kind, given = model.kind, options.weighting
    found = AUTO.get(kind) if given == "auto" else given
    if found is None:
        raise ValueError(
            f"fake.weighting: found 'auto' for a model that predicts {kind!r}, expected one of {sorted(FAKE_SCORE_KINDS)}"
        )
    try:
        model.process.check_kind(FAKE_SCORE_KINDS[found])
    except ValueError as error:
        raise ValueError(f"fake.weighting: found {given!r}: {error}") from error
    if found == "edm":
        try:
            check_sigma_data(model, options.sigma_data)
        except ValueError as error:
            raise ValueError(f"fake.{error}") from error
    return found


def conditions_of(labels: str, conditions: Conditions, batch: Batch, draws: Draws) -> Cond:
    """Conditions of samples: those of the batch ("data"), or conditions drawn uniformly ("uniform").

    Raises:
        ValueError: "data" where the model is conditional and the batch is not.
    """
    if labels == "uniform" and conditions.has_null:
        return conditions.draw(draws)
    if conditions.has_null and not batch.cond.values:
        raise ValueError(
            f"sampling.labels: found 'data', but the data source has none and the model has {conditions.words()}; expected "
            "'uniform'"
        )
    return batch.cond
