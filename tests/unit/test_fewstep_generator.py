"""Few-step generators: what a sample depends on, which steps and guidance are valid, gradients with respect to the noise."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_support import GaussianMap, mlp, noise
from torch import Tensor

from distill import sample as sample_verb
from distill.data.cond import Cond
from distill.data.rng import sample_noise
from distill.engine.module import DistillModule
from distill.exporters.card import card
from distill.methods.consistency import Consistency
from distill.methods.lcm import LCM
from distill.methods.progressive import Progressive
from distill.methods.reflow import Reflow
from distill.models.boundary import Boundary
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.native import save_model
from distill.models.spec import SamplerSpec
from distill.nets.layers import GuidanceEmbedding
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear
from distill.stages.base import Settings, StageContext
from distill.stages.display import Display
from distill.stages.evaluate import Evaluate
from distill.stages.generate import Generate

TABLE = VPScaledLinear()


def generator_of(method: DistillModule) -> Generator:
    """The untrained student, read as the method's result says."""
    result = method.result()
    student = method.student.with_(coupling=result.coupling, guidable=result.guidable)
    return Generator(student.eval(), result.sampler)


def consistency(process: Process, kind: str, double: bool = False) -> Generator:
    student, teacher = (mlp(process, kind, seed=seed, double=double) for seed in (1, 0))
    method = Consistency(student, teacher)
    return generator_of(method)


def latent(double: bool = False) -> Generator:
    """With 8 classes and w in 2 .. 6 as an input that is no longer 0."""
    student = mlp(TABLE, "v", classes=8, w=8, seed=1, double=double)
    method = LCM(student, mlp(TABLE, "v", classes=8), w_min=2.0, w_max=6.0)
    assert any(isinstance(m, GuidanceEmbedding) and bool(m.out.weight.any()) for m in student.modules())
    return Generator(student.eval(), method.result().sampler)


def progressive(steps: int, double: bool = False) -> Generator:
    process = VPCosine()
    student = mlp(process, "v", seed=1, double=double)
    return generator_of(Progressive(student, mlp(process, "v"), steps=steps))


CASES = [
    pytest.param(lambda double=False: consistency(EDM(), "x0", double), (1, 2, 4), id="edm"),
    pytest.param(lambda double=False: consistency(Flow(), "velocity", double), (1, 2, 4), id="flow"),
    pytest.param(latent, (1, 2, 4), id="lcm"),
    pytest.param(lambda double=False: progressive(4, double), (4,), id="progressive"),
]
every_student = pytest.mark.parametrize(("make", "counts"), CASES)


# ---- what a sample depends on ----


@every_student
def test_a_sample_is_a_function_of_seed_stream_and_number_alone(make: Any, counts: tuple[int, ...]) -> None:
    generator = make()
    for steps in counts:
        whole = generator.sample(24, seed=3, steps=steps)
        # Neither of how many are drawn together, nor of how many there are.
        torch.testing.assert_close(
            generator.sample(24, seed=3, steps=steps, batch_size=5), whole, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(generator.sample(9, seed=3, steps=steps), whole[:9], atol=1e-5, rtol=1e-5)
        some = generator.sample_ids(torch.tensor([17, 2]), seed=3, stream="sample", steps=steps)
        torch.testing.assert_close(some, whole[[17, 2]], atol=1e-5, rtol=1e-5)
        assert torch.equal(generator.sample(24, seed=3, steps=steps), whole)
        for changed in ({"seed": 4}, {"stream": "other"}):
            other = generator.sample(24, **{"seed": 3, "steps": steps} | changed)
            assert not bool(torch.isclose(other, whole).all(1).any()), changed


def test_fresh_noise_has_streams_of_its_own() -> None:
    """The noise that is added again is neither the first nor that of another step."""
    generator, ids = consistency(EDM(), "x0"), torch.arange(6)
    z, fresh = generator.noises(3, "sample", ids)
    drawn = [z, fresh(0), fresh(1), fresh(2)]
    assert torch.equal(z, sample_noise(3, "sample", ids, (2,)))
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert not bool(torch.isclose(one, other).any())
    assert torch.equal(generator.noises(3, "sample", ids[3:])[1](1), fresh(1)[3:])
    # What is added: sqrt(sigma^2 - floor^2) of it.
    grid, cond = generator.spec.grid(EDM(), 2), Cond.nothing(6)
    state = generator.denoiser.x0(80.0 * z, grid[:1].expand(6), cond)
    for floor, scale in ((0.002, 1.0), (1.0, 0.9)):
        spec = replace(generator.spec, noise_floor=floor, noise_scale=scale)
        again = state + scale * (grid[1] ** 2 - floor**2).sqrt() * fresh(0)
        expected = generator.denoiser.x0(again.float(), grid[1:2].expand(6), cond)
        found = Generator(generator.denoiser, spec).sample(6, seed=3, steps=2)
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


def test_fresh_noise_is_scaled_when_sampling() -> None:
    generator = consistency(EDM(), "x0")
    plain = generator.sample(6, seed=3, steps=4)
    assert torch.equal(generator.sample(6, seed=3, steps=4, noise_scale=1.0), plain)
    scaled = replace(generator.spec, noise_scale=0.8)
    found = generator.sample(6, seed=3, steps=4, noise_scale=0.8)
    assert torch.equal(found, Generator(generator.denoiser, scaled).sample(6, seed=3, steps=4))
    assert not bool(torch.isclose(found, plain).all(1).any())
    # One step adds none.
    assert torch.equal(generator.sample(6, steps=1, noise_scale=0.8), generator.sample(6, steps=1))
    with pytest.raises(ValueError, match=r"noise_scale: found 1.6, expected a number in \(0, 1.5\]"):
        generator.sample(6, noise_scale=1.6)
    one = Generator(generator.denoiser, SamplerSpec(steps=1, times={1: (80.0, 0.002)}, mode="sde"))
    for still in (progressive(4), one):
        with pytest.raises(
            ValueError, match=r"noise_scale: found 0\.8, but this model's sampler draws no fresh noise"
        ):
            still.sample(6, noise_scale=0.8)


def test_the_label_of_a_sample_is_its_own() -> None:
    generator = latent()
    whole = generator.sample(8, label=[0, 1, 2, 3, 4, 5, 6, 7], seed=1, steps=2)
    torch.testing.assert_close(
        generator.sample(8, label=5, seed=1, steps=2)[5], whole[5], atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(generator.sample(8, label=5, seed=1, steps=2)[:5], whole[:5])


# ---- steps ----


@every_student
def test_other_step_counts_are_refused_unless_forced(make: Any, counts: tuple[int, ...]) -> None:
    generator = make()
    valid = sorted(generator.spec.times)
    assert set(counts) <= set(valid)
    for steps in (3, 5, 50):
        message = f"steps: this model was distilled for {valid} step(s) and is not valid at {steps}"
        with pytest.raises(ValueError, match=re.escape(message)):
            generator.sample(4, steps=steps)
        assert bool(generator.sample(4, steps=steps, force=True).isfinite().all())
    with pytest.raises(ValueError, match=r"steps: expected 1 .. 100000, found 0"):
        generator.sample(4, steps=0)
    assert torch.equal(generator.sample(4), generator.sample(4, steps=generator.spec.steps))


def test_one_step_is_the_prediction_at_t_max() -> None:
    for generator in (consistency(EDM(), "x0"), consistency(Flow(), "velocity"), latent()):
        z, cond = (
            noise(5, dtype=torch.float32),
            generator.conditions.of(torch.arange(5)),
        )
        torch.testing.assert_close(
            generator.generate(z, cond, 1), generator.one_step(z, cond), atol=1e-5, rtol=1e-5
        )


def test_several_steps_need_fresh_noise() -> None:
    generator, z = consistency(Flow(), "velocity"), noise(5, dtype=torch.float32)
    with pytest.raises(
        ValueError, match="noise: missing; this model's sampler draws fresh noise in each of 2 steps"
    ):
        generator.generate(z, Cond.nothing(5), 2)
    given = torch.stack([noise(5, 7), noise(5, 8)]).float()
    as_function = generator.generate(z, Cond.nothing(5), 2, noise=lambda i: given[i])
    assert torch.equal(generator.generate(z, Cond.nothing(5), 2, noise=given), as_function)
    assert not torch.equal(generator.generate(z, Cond.nothing(5), 2, noise=given.flip(0)), as_function)


@every_student
def test_the_path_ends_in_the_sample(make: Any, counts: tuple[int, ...]) -> None:
    generator, most = make(), max(counts)
    cond = generator.conditions.of(torch.arange(5))
    z, given = noise(5, dtype=torch.float32), torch.stack([noise(5, i) for i in range(4)]).float()
    path = generator.generate(z, cond, most, noise=given, return_path=True)
    assert path.shape == (most + 1, 5, 2)
    assert torch.equal(path[0], generator.denoiser.process.prior(z))
    assert torch.equal(path[-1], generator.generate(z, cond, most, noise=given))


# ---- guidance as an input ----


def test_w_is_the_spec_s_unless_another_is_asked_for() -> None:
    generator = latent()
    plain = generator.sample(6, steps=2)
    assert torch.equal(generator.sample(6, steps=2, guidance_w=2.0), plain)
    assert not torch.allclose(generator.sample(6, steps=2, guidance_w=6.0), plain)
    higher = Generator(generator.denoiser, replace(generator.spec, guidance_w=6.0))
    assert torch.equal(higher.sample(6, steps=2), generator.sample(6, steps=2, guidance_w=6.0))
    for w in (1.9, 6.1, 7.5):
        with pytest.raises(
            ValueError, match=rf"guidance_w: found {w}, expected 2.0 .. 6.0, what the model was trained"
        ):
            generator.sample(4, steps=1, guidance_w=w)
    for other in (consistency(Flow(), "velocity"), progressive(2)):
        with pytest.raises(
            ValueError, match=r"guidance_w: found 1.0, but this model does not take the guidance"
        ):
            other.sample(4, guidance_w=1.0)
    with pytest.raises(
        ValueError, match=r"guidance_scale: found 2.0, but this model was not trained with a null"
    ):
        Generator(consistency(Flow(), "velocity").denoiser, consistency(Flow(), "velocity").spec).denoiser.x0(
            noise(2).float(), torch.ones(2), Cond.nothing(2), 2.0
        )


# ---- the amount of fresh noise ----


def exact(process: Process, kind: str, boundary: Boundary | None, end: float) -> Generator:
    """A perfect consistency model of one Gaussian, in 1, 2 and 4 steps."""
    student = Denoiser(GaussianMap(process, kind, boundary, end), process, kind, (2,))
    spec = Consistency(mlp(process, kind), mlp(process, kind)).result().sampler
    student.boundary = boundary
    return Generator(student, spec)


@pytest.mark.slow
def test_a_perfect_student_draws_the_data_in_any_number_of_steps() -> None:
    for generator in (
        exact(EDM(), "x0", Boundary("cm", sigma_min=0.002), 0.002),
        exact(Flow(), "velocity", None, 0.0),
        exact(VPCosine(), "v", Boundary("cm", sigma_min=4.5399929762484854e-05), 0.0),
    ):
        for steps in (1, 2, 4):
            found = generator.sample(4000, steps=steps, batch_size=4000)
            assert found.mean(0).tolist() == pytest.approx([0.4, -0.2], abs=0.02)
            assert found.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.012), (generator, steps)
        # With less noise than it was trained for, samples crowd together.
        calm = Generator(generator.denoiser, replace(generator.spec, noise_scale=0.5))
        assert float(calm.sample(4000, steps=4, batch_size=4000).std(0).max()) < 0.25
        torch.testing.assert_close(calm.sample(9, steps=1), generator.sample(9, steps=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "pde"}, "mode: found 'pde', expected one of 'ode', 'sde'"),
        ({"noise_scale": 0.0}, r"noise_scale: found 0.0, expected a number in \(0, 1.5\]"),
        ({"noise_scale": 2.0}, r"noise_scale: found 2.0"),
        ({"guidance_w": 1.0}, "guidance_w, guidance_w_range: expected both or neither"),
        ({"guidance_w_range": (0.0, 1.0)}, "guidance_w, guidance_w_range: expected both or neither"),
        ({"steps": 3}, r"steps: 3 is not among the valid step counts \[1\]"),
        ({"times": {1: (0.0, 1.0)}}, r"times\[1\]: expected 2 descending times"),
        ({"times": {1: (1.0,)}}, r"times\[1\]: expected 2 descending times"),
    ],
)
def test_wrong_samplers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSpec(**{"steps": 1, "times": {1: (1.0, 0.0)}, "mode": "sde"} | options)


def test_samplers_survive_json() -> None:
    spec = replace(latent().spec, noise_scale=0.8, noise_floor=0.01)
    again = SamplerSpec.from_dict(spec.to_dict())
    assert again == spec
    assert (again.guidance_w_range, again.noise_scale, again.noise_floor) == ((2.0, 6.0), 0.8, 0.01)
    old = {k: v for k, v in spec.to_dict().items() if not k.startswith(("noise", "guidance_w"))}
    assert SamplerSpec.from_dict(old).guidance_w is None  # a file from before there was such an input


# ---- gradients with respect to the noise ----


@every_student
def test_samples_are_differentiable_with_respect_to_the_noise(make: Any, counts: tuple[int, ...]) -> None:
    """No hidden no_grad: the sample's Jacobian is that of central differences, at every step count."""
    generator = make(double=True)
    cond = generator.conditions.of(torch.arange(3))
    given = torch.stack([noise(3, 20 + i) for i in range(4)])
    for steps in counts:

        def run(z: Tensor, steps: int = steps) -> Tensor:
            return generator.generate(z, cond, steps, noise=given)

        z = noise(3).requires_grad_()
        assert torch.autograd.gradcheck(run, (z,), eps=1e-6, atol=1e-6, rtol=1e-4)
        (slope,) = torch.autograd.grad(run(z).sum(), z)
        assert bool((slope.abs() > 1e-8).all()), "every number of the noise has a say"


def test_the_noise_can_be_optimised_through_several_steps() -> None:
    """Inference-time optimisation: gradient descent on z brings a sample to a wanted place."""
    generator = exact(Flow(), "velocity", None, 0.0)
    generator.denoiser.requires_grad_(False)
    given, wanted = torch.stack([noise(1, 30), noise(1, 31)]), torch.tensor([[0.7, 0.1]], dtype=torch.float64)
    z = noise(1).requires_grad_()
    start = (generator.generate(z, Cond.nothing(1), 1) - wanted).norm().item()
    optimizer = torch.optim.SGD([z], lr=1.0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (generator.generate(z, Cond.nothing(1), 1, noise=given) - wanted).square().sum()
        loss.backward()
        optimizer.step()
    assert loss.sqrt().item() < 0.01 * start


# ---- what a few-step student is not ----


def test_a_few_step_student_is_no_score() -> None:
    model = consistency(Flow(), "velocity").denoiser
    x, t, cond = noise(3).float(), torch.full((3,), 0.5), Cond.nothing(3)
    for kind in ("eps", "score"):
        with pytest.raises(
            ValueError, match=f"{kind}: a model trained on few_step noise and data is a transport"
        ):
            model.predict(kind, x, t, cond)
    assert model.x0(x, t, cond).shape == (3, 2)
    with pytest.raises(ValueError, match=r"coupling: found 'some_step', expected one of"):
        mlp(Flow(), coupling="some_step")


def test_reflow_and_pairs_need_an_ode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init: reflow cannot start from a few-step student"):
        Reflow(consistency(Flow(), "velocity").denoiser)
    stage = Generate(teacher="student", count=4, sampler={"solver": "euler", "steps": 2})
    for generator, message in (
        (
            consistency(Flow(), "velocity"),
            "teacher: 'student': coupling: found 'few_step', a few-step student",
        ),
        (
            Generator(
                mlp(Flow(), w=8),
                SamplerSpec(steps=5, any_steps=True, guidance_w=0.0, guidance_w_range=(0.0, 1.0)),
            ),
            "teacher: 'student': guidance_w: the net takes the guidance",
        ),
    ):
        folder = saved(generator, tmp_path / message[:31])
        with pytest.raises(ValueError, match=message):
            stage.run(room(tmp_path / "pairs", teacher=folder))


def saved(generator: Generator, folder: Path) -> Path:
    """The model as a stage would leave it."""
    denoiser = generator.denoiser
    folder.mkdir()
    save_model(folder, denoiser, generator.spec)
    return folder


def room(folder: Path, **inputs: Path) -> StageContext:
    folder.mkdir(exist_ok=True)
    return StageContext(
        name=folder.name,
        folder=folder,
        inputs=inputs,
        seed=0,
        settings=Settings(accelerator="cpu"),
        loggers=(),
        display=Display(silent=True),
        run_folder=folder.parent,
        recipe="toy",
        digest="0",
    )


def test_evaluation_draws_and_measures_it_as_it_is_sampled(tmp_path: Path) -> None:
    """No straightness of an ODE that it has not; the picture shows the sampler's own states; w is given to a net that asks."""
    few, many = (
        consistency(Flow(), "velocity"),
        Generator(
            mlp(Flow(), w=8),
            SamplerSpec(steps=4, any_steps=True, guidance_w=1.0, guidance_w_range=(0.0, 2.0)),
        ),
    )
    folders = {"few": saved(few, tmp_path / "few"), "many": saved(many, tmp_path / "many")}
    data = {"_target_": "distill.data.points.Points", "ring": {"count": 8, "radius": 1.5}, "count": 64}
    stage = Evaluate(
        models={name: {"stage": name, "steps": [2]} for name in folders},
        meter={"_target_": "distill.evaluation.meters.points.PointMeter", "data": data},
        count=32,
        straightness={"steps": 4, "count": 16},
    )
    here = room(tmp_path / "evaluate", **folders)
    stage.run(here)
    assert (here.folder / "grid.png").stat().st_size > 0
    rows = {row["model"]: row for row in json.loads((here.folder / "metrics.json").read_text())["rows"]}
    assert rows["few"]["straightness"] is None
    assert rows["many"]["straightness"] >= 0


def test_the_sample_verb_takes_w(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, seen = saved(latent(), tmp_path / "model"), []
    original = Generator.sample
    monkeypatch.setattr(
        Generator, "sample", lambda self, *a, **k: seen.append(k["guidance_w"]) or original(self, *a, **k)
    )
    for given, expected in (("guidance_w=4.5", 4.5), ("seed=1", None)):
        monkeypatch.setattr(
            sys, "argv", ["distill.sample", f"model={folder}", f"out={tmp_path / 'a.png'}", "count=4", given]
        )
        sample_verb.main()
        assert seen[-1] == expected
    assert f"4 samples of {folder}, 4 step(s)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["distill.sample", f"model={folder}", "guidance_w=7"])
    with pytest.raises(SystemExit, match=r"guidance_w: found 7.0, expected 2.0 .. 6.0"):
        sample_verb.main()


def test_the_card_says_what_it_is_not() -> None:
    generator = consistency(EDM(), "x0")
    text = card("toy", generator, [], None, grid=False)
    assert (
        "valid for 1 or 2 or 4 step(s); default 1; predicts, adds fresh noise, predicts again (sde)" in text
    )
    assert "knows its sampler's times alone" in text
    generator.denoiser.coupling = "independent"
    assert "alone" not in card("toy", generator, [], None, grid=False)
