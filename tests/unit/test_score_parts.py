"""Parts of score distillation: the few-step student's states, adversarial losses and their head, DisBack's path."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.methods.losses.backtrack import Backtrack, node_steps
from distill.methods.losses.gan import discriminator_loss, generator_loss
from distill.methods.losses.score_times import times_of, usual_times
from distill.models.analytic import exact_denoiser
from distill.nets.heads import GanHead
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear
from distill.samplers.fewstep import few_step
from distill.samplers.student_rollout import few_step_output, mixture_output, visited_state

TIMES = (1.0, 0.7, 0.4, 0.2)
BATCH = 5


class Student:
    """A few-step student that counts its calls and can be differentiated through one number."""

    def __init__(self) -> None:
        self.exact = exact_denoiser(Flow())
        self.scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.with_graph: list[bool] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        assert t.dtype == torch.float64
        self.with_graph.append(torch.is_grad_enabled())
        return self.scale * self.exact.x0(x, t, Cond.nothing(len(x)))


@pytest.fixture
def start() -> Tensor:
    return torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(len(TIMES) - 1, BATCH, 2, generator=torch.Generator().manual_seed(1)).double()


def by_hand(student: Student, start: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(state, output) of every step."""
    found, x = [], start
    for i, time in enumerate(TIMES):
        t = torch.full((BATCH,), time, dtype=torch.float64)
        x0 = student(x, t)
        found.append((x, x0))
        if i < len(TIMES) - 1:
            x = (1 - TIMES[i + 1]) * x0 + TIMES[i + 1] * noise[i]
    return found


def test_states_and_outputs_are_those_of_the_sampler(start: Tensor, noise: Tensor) -> None:
    student = Student()
    for k, (state, x0) in enumerate(by_hand(student, start, noise)):
        student.with_graph.clear()
        found = visited_state(student, Flow(), start, TIMES, noise, k)
        torch.testing.assert_close(found, state, rtol=1e-12, atol=1e-12)
        assert student.with_graph == [False] * k
        assert not found.requires_grad
        student.with_graph.clear()
        output = few_step_output(student, Flow(), start, TIMES, noise, k)
        torch.testing.assert_close(output, x0, rtol=1e-12, atol=1e-12)
        assert student.with_graph == [False] * k + [True]
        # The last step alone: d output / d scale = output / scale, though scale made its input as well.
        (slope,) = torch.autograd.grad(output.sum(), student.scale)
        torch.testing.assert_close(slope, output.detach().sum(), rtol=1e-10, atol=1e-10)


def test_the_last_output_is_the_sample_bit_for_bit(start: Tensor, noise: Tensor) -> None:
    """What is trained is what is sampled; float32, where rounding would show."""
    start, noise = start.float(), noise.float()
    exact = exact_denoiser(Flow())

    def predict_x0(x: Tensor, t: Tensor) -> Tensor:
        return exact.x0(x, t, Cond.nothing(len(x)))

    times = torch.tensor([*TIMES, 0.0], dtype=torch.float64)
    sample = few_step(predict_x0, Flow(), start, times, noise)
    last = len(TIMES) - 1
    assert torch.equal(few_step_output(predict_x0, Flow(), start, TIMES, noise, last), sample)
    assert torch.equal(few_step_output(predict_x0, Flow(), start, TIMES, lambda i: noise[i], last), sample)
    k = torch.full((BATCH,), last)
    assert torch.equal(mixture_output(predict_x0, Flow(), start, TIMES, noise, k), sample)


def test_mixture_takes_every_sample_at_its_own_step(start: Tensor, noise: Tensor) -> None:
    student = Student()
    outputs = torch.stack([x0 for _, x0 in by_hand(student, start, noise)])
    k = torch.tensor([2, 0, 3, 1, 2])
    student.with_graph.clear()
    found = mixture_output(student, Flow(), start, TIMES, noise, k)
    torch.testing.assert_close(found, outputs[k, torch.arange(BATCH)].detach(), rtol=1e-12, atol=1e-12)
    assert student.with_graph == [False] * len(TIMES)
    assert not found.requires_grad
    found = mixture_output(student, Flow(), start, TIMES, noise, torch.tensor([0, 4, 1, -1, 3]))
    assert found.isfinite().all(1).tolist() == [True, False, True, False, True]


def test_states_are_at_least_float32(start: Tensor, noise: Tensor) -> None:
    def half(x: Tensor, t: Tensor) -> Tensor:
        return x.bfloat16()

    inputs = (start.bfloat16(), TIMES, noise.bfloat16())
    assert visited_state(half, Flow(), *inputs, 2).dtype == torch.float32
    assert few_step_output(half, Flow(), *inputs, 2).dtype == torch.float32
    assert mixture_output(half, Flow(), *inputs, torch.zeros(BATCH)).dtype == torch.float32


@pytest.mark.parametrize(
    ("times", "k", "message"),
    [
        ((1.0, 0.4, 0.7), 0, "times: found .* descending"),
        ((1.0, 1.0), 0, "times: found .* descending"),
        ((), 0, "times: found .* at least one time"),
        ((2.0, 0.5), 0, "times: found .* expected times of Flow"),
        ((1.0, 0.0), 0, "times: found .* above 0"),
        ((1.0, math.nan), 0, "times: found"),
        (TIMES, 4, "k: found 4, expected a step of 0 .. 3"),
        (TIMES, -1, "k: found -1"),
        ((*TIMES, 0.1), 4, "noise: found 3 tensors, expected at least 4"),
    ],
)
def test_bad_steps(start: Tensor, noise: Tensor, times: tuple[float, ...], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visited_state(Student(), Flow(), start, times, noise, k)


def test_bad_mixture(start: Tensor, noise: Tensor) -> None:
    with pytest.raises(ValueError, match="k: found shape"):
        mixture_output(Student(), Flow(), start, TIMES, noise, torch.tensor(1))
    with pytest.raises(ValueError, match="noise: found 2"):
        mixture_output(Student(), Flow(), start, TIMES, noise[:2], torch.zeros(BATCH))
    with pytest.raises(ValueError, match="times of VPScaledLinear"):
        mixture_output(Student(), VPScaledLinear(), start, (1000.0,), noise, torch.zeros(BATCH))


# --- adversarial ---------------------------------------------------------------------------------------------


def test_adversarial_losses_are_log_likelihoods() -> None:
    """With p = sigmoid(logit): -log(1 - p_fake) - log p_real, and -log p_fake."""
    real, fake = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    found = discriminator_loss(real, fake)
    torch.testing.assert_close(found, -(real.sigmoid().log() + (1 - fake.sigmoid()).log()).mean(1))
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean(1))
    far = torch.tensor([[1e4]])
    assert discriminator_loss(-far, far).item() == 2e4
    assert generator_loss(far.bfloat16()).dtype == torch.float32


def test_logits_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"real \(4, 1\), fake \(3, 1\)"):
        discriminator_loss(torch.zeros(4, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="logits must be"):
        generator_loss(torch.zeros(()))


@pytest.mark.parametrize(("size", "halvings"), [(4, 0), (8, 1), (32, 3)])
def test_gan_head(size: int, halvings: int) -> None:
    torch.manual_seed(0)
    head = GanHead(8, size, groups=4)
    strides = [layer.stride for layer in head.layers if isinstance(layer, torch.nn.Conv2d)]
    assert strides == [(2, 2)] * halvings + [(4, 4), (1, 1)]
    features = torch.randn(3, 8, size, size, requires_grad=True)
    logits = head(features)
    assert logits.shape == (3, 1)
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()
    with pytest.raises(ValueError, match="features: found shape"):
        head(features[:, :, 1:])


@pytest.mark.parametrize(
    ("channels", "size", "groups", "message"),
    [
        (8, 2, 4, "features of 2 x 2, expected at least 4 x 4"),
        (8, 12, 4, "size: found 12, expected 4 times a power of two"),
        (8, 8, 3, "groups: 8 channels cannot be split into 3"),
        (8, 8, 32, "groups: 8 channels cannot be split into 32"),
    ],
)
def test_gan_head_refuses(channels: int, size: int, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GanHead(channels, size, groups=groups)


# --- DisBack's path ------------------------------------------------------------------------------------------


def test_node_steps() -> None:
    assert node_steps(200, 50) == [50, 100, 150, 200]
    assert node_steps(170, 50) == [50, 100, 150, 170]
    assert node_steps(30, 50) == [30]
    assert node_steps(0, 50) == []
    with pytest.raises(ValueError, match="node_every: found 0"):
        node_steps(100, 0)
    with pytest.raises(ValueError, match=r"steps: found -1"):
        node_steps(-1, 10)


@pytest.mark.parametrize(
    ("nodes", "stays", "switches"),
    [
        (0, 100, [(0, 0)]),
        (1, 100, [(0, 0)]),
        (4, 100, [(0, 3), (100, 2), (200, 1), (300, 0)]),
        (4, [5, 20, 10], [(0, 3), (5, 2), (25, 1), (35, 0)]),
    ],
)
def test_the_way_back(nodes: int, stays: int | list[int], switches: list[tuple[int, int]]) -> None:
    way = Backtrack(nodes, stays)
    assert way.switches() == switches
    followed = [way.target(step) for step in range(1000)]
    events = [(i, node) for i, (node, made) in enumerate(followed) if made == 0]
    assert events == switches, "a switch is where nothing was made with the target"
    assert all(b[1] in (0, a[1] + 1) for a, b in pairwise(followed))
    assert way.target(10**9)[0] == 0, "the teacher is reached and kept"


@pytest.mark.parametrize(
    ("nodes", "stays", "message"),
    [
        (-1, 10, "nodes: found -1"),
        (3, 0, "steps_per_node: found 0"),
        (0, 0, "steps_per_node: found 0"),
        (3, [10, 0], "steps_per_node"),
        (3, 10.5, "steps_per_node: found 10.5, expected a whole number"),
        (3, "10", "steps_per_node: found .10., expected a whole number"),
        (3, [10], "found 1 numbers for the 2 stored targets"),
        (0, [10], "found 1 numbers for the 0 stored targets"),
    ],
)
def test_the_way_back_refuses(nodes: int, stays: int | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backtrack(nodes, stays)
    with pytest.raises(ValueError, match="step: found -1"):
        Backtrack(2, 10).target(-1)


def test_times_that_nobody_chose_suit_the_process() -> None:
    """Half of a flow's noise levels lie below 1; EDM's times, which are levels, are the paper's and not spread over 80."""
    paper = {"name": "lognormal"}
    draws = Draws(0, "t", 0, torch.arange(4000))
    for process, middle in ((Flow(), 1.0), (EDM(), math.exp(-1.2))):
        times = times_of(process, usual_times(process, None, paper, fake=True), "fake_times")(draws)
        level = torch.exp(-process.log_ratio(times)).median()
        assert 0.9 * middle < float(level) < 1.1 * middle
    for fake, share in ((False, 0.02), (True, 0.0)):
        times = times_of(VPCosine(), usual_times(VPCosine(), None, paper, fake=fake), "times")(draws)
        assert abs(float(times.min()) - share) < 2e-3
        assert abs(float(times.max()) - (1 - share)) < 2e-3
    given = {"name": "uniform", "low": 0.5}
    assert usual_times(Flow(), given, paper, fake=False) is given
