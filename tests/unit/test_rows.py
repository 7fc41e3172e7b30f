"""Rows of an evaluation: typed, with a guidance of their own, and compared with trajectories of the same guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.evaluation.rows import Row, check_follows, guidance_of
from distill.models.conditions import Labels
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.spec import SamplerSpec
from distill.process.flow import Flow
from distill.typed import parse


class Offset(nn.Module):
    """The label as a velocity, 0 for the null condition: guidance multiplies it."""

    num_classes = 3

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.get("label") is not None
        return torch.ones_like(x) * (cond.get("label") + 1).to(x.dtype)[:, None]


def generator(guidable: bool = True, **spec) -> Generator:
    model = Denoiser(Offset(), Flow(), "velocity", (2,), conditions=Labels(3), guidable=guidable)
    return Generator(model, SamplerSpec(**({"steps": 2, "any_steps": True} | spec)))


def test_a_row_samples_with_its_guidance():
    plain = generator()
    row = parse(Row, {"stage": "teacher", "steps": [2], "guidance_scale": 3})
    guided = row.sampled(plain)
    noise = plain.noises(0, "sample", torch.arange(4))[0]
    # x0 = z - g * (label + 1), exactly: the field is constant.
    labels = torch.tensor([0, 1, 2, 0])
    for made, g in ((plain, 1.0), (guided, 3.0)):
        expected = noise - g * (labels + 1).float()[:, None]
        torch.testing.assert_close(made.sample(4, labels), expected)
    assert plain.spec.guidance_scale == 1, "the model that was given is not changed"


@pytest.mark.parametrize(
    ("row", "made", "message"),
    [
        (
            {"stage": "t", "steps": [2], "guidance_scale": 2},
            {"guidable": False},
            "not trained with a null condition",
        ),
        ({"stage": "t", "steps": [4]}, {"any_steps": False, "times": {2: (1.0, 0.5, 0.0)}}, "not valid at 4"),
        ({"stage": "t", "steps": [2], "guidance_w": 2}, {}, "does not take the guidance as an input"),
        (
            {"stage": "t", "steps": [2], "guidance_w": 9},
            {"guidance_w": 3.0, "guidance_w_range": (1.0, 4.0)},
            r"expected 1.0 .. 4.0",
        ),
    ],
)
def test_guidance_and_steps_that_the_model_does_not_take_are_refused(row, made, message):
    with pytest.raises(ValueError, match=message):
        parse(Row, row).sampled(generator(**made))


@pytest.mark.parametrize("steps", [[], [0], [2, 2], [1.5], "2"])
def test_step_counts_are_counts(steps):
    with pytest.raises(ValueError, match=r"row\.steps"):
        parse(Row, {"stage": "t", "steps": steps}, "row")


def test_a_student_is_compared_with_the_guidance_that_it_learned():
    models = {"teacher": Row("t", [50], follows_teacher=True), "student": Row("s", [1], follows_teacher=True)}
    baked = {"teacher": generator(), "student": generator(guidance_baked=3.0)}
    assert guidance_of(baked["student"]) == 3
    with pytest.raises(
        ValueError, match=r"student samples with guidance 3 .* \(\+eval.models.teacher.guidance_scale=3\)"
    ):
        check_follows(baked, models, ("teacher", 50))
    guided = models | {"teacher": Row("t", [50], guidance_scale=3.0)}
    made = {label: row.sampled(baked[label]) for label, row in guided.items()}
    check_follows(made, guided, ("teacher", 50))
    # With the guidance as an input, w + 1 is what counts.
    embedded = baked | {"student": generator(guidance_w=2.0, guidance_w_range=(0.0, 4.0))}
    check_follows(embedded | {"teacher": made["teacher"]}, guided, ("teacher", 50))
    with pytest.raises(ValueError, match="samples with guidance 3"):
        check_follows(embedded, models, ("teacher", 50))
    # Who does not follow may have learned anything.
    check_follows(baked, {"teacher": Row("t", [50]), "student": Row("s", [1])}, ("teacher", 50))


def test_a_row_may_name_its_time_grid():
    row = parse(Row, {"stage": "t", "steps": [2, 4], "grid": {"name": "shifted", "factor": 3}})
    sampled = row.sampled(generator())
    # t' = s t / (1 + (s - 1) t) of even times
    assert sampled.spec.grid(Flow(), 2).tolist() == pytest.approx([1.0, 1.5 / 2, 0.0])
    with pytest.raises(ValueError, match=r"grid.name: found 'evne'"):
        parse(Row, {"stage": "t", "steps": [2], "grid": {"name": "evne"}}).sampled(generator())
    few = generator(any_steps=False, times={2: (1.0, 0.5, 0.0)})
    with pytest.raises(ValueError, match="distilled for times of its own"):
        parse(Row, {"stage": "t", "steps": [2], "grid": {"name": "shifted"}}).sampled(few)


def test_following_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"models.student.follows_teacher: found true, but `follows` names no row"
    ):
        check_follows({"student": generator()}, {"student": Row("s", [1], follows_teacher=True)}, None)


def test_samples_that_are_not_finite_are_refused():
    class Diverges(Offset):
        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return x * torch.tensor([1.0, float("inf")])

    model = Generator(
        Denoiser(Diverges(), Flow(), "velocity", (2,), conditions=Labels(3)),
        SamplerSpec(steps=1, any_steps=True),
    )
    with pytest.raises(FloatingPointError, match="found 4 of 4 with numbers that are not finite"):
        model.sample(4)
