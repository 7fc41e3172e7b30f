"""Distilled Decoding of a Markov source whose joint distribution is known: 4 tokens of 8 codes, each given the one before
(toys C and D)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.networks import trainable_copy
from distill.engine.update import Step
from distill.methods.distilled_decoding import DistilledDecoding
from distill.methods.distilled_decoding2 import DistilledDecoding2
from distill.methods.teacher_score import TeacherScore
from distill.models.code_flow import CodeFlow
from distill.models.decoder import Codes, indices
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.involved import Involved
from distill.models.model import Model
from distill.models.tokens import TokenTeacher
from distill.nets.code_flow import CodeFlowNet
from distill.nets.token_net import StudentAndTeacher, TokenNet
from distill.nets.token_transformer import TokenTransformer
from distill.nets.tokenizer import nearest_codes
from distill.process.prefix import Prefix

pytestmark = pytest.mark.slow
V, L, C, SAMPLES = 8, 4, 4, 50_000
SIZES = {"vocabulary": V, "size": C, "length": L, "num_classes": 0, "width": 64, "dropout": 0.0}


class Markov(TokenNet):
    """Exact conditionals: `start` [V] of the first token, `moves` [L - 1,V,V] of the others given the one before."""

    codebook: Tensor
    start: Tensor
    moves: Tensor

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        self.vocabulary, self.groups = V, (1,) * L
        draws = torch.Generator().manual_seed(seed)
        self.register_buffer("codebook", torch.randn(V, C, generator=draws))
        self.register_buffer("start", torch.randn(V, generator=draws).log_softmax(0))
        self.register_buffer("moves", (2.5 * torch.randn(L - 1, V, V, generator=draws)).log_softmax(-1))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        tokens = nearest_codes(x, self.codebook)
        rows = [self.start.expand(len(x), -1), *(move[tokens[:, i]] for i, move in enumerate(self.moves))]
        return torch.stack(rows, 1)

    def begin(self, cond: Cond) -> Any:
        return [len(cond), 0]

    def advance(self, state: Any, codes: Tensor | None) -> Tensor:
        state[1] += 0 if codes is None else codes.shape[1]
        if codes is None:
            return self.start.expand(state[0], 1, -1)
        return self.moves[state[1] - 1][nearest_codes(codes[:, -1:], self.codebook)]

    def joint(self) -> Tensor:
        """[V^L] probabilities."""
        p = self.start.double().exp()
        for move in self.moves:
            p = p[..., None] * move.double().exp()
        return p.flatten()


class Source(NamedTuple):
    """The source's model, its codes as a decoder, and what measures samples [n,L,C] of it."""

    teacher: TokenTeacher
    decoder: Codes
    joint: Tensor

    def distance(self, samples: Tensor) -> float:
        """Total variation of the joint distribution of the nearest codes; .038 for 50,000 samples of the source itself."""
        tokens = indices(self.decoder, samples)
        index = (tokens * V ** torch.arange(L - 1, -1, -1)).sum(1)
        found = torch.bincount(index, minlength=V**L).double() / len(index)
        return float((found - self.joint).abs().sum() / 2)


@pytest.fixture(scope="module")
def source() -> Source:
    net, nothing = Markov(seed=0), Cond.nothing
    decoder = Codes.of(net.codebook)
    made = Source(TokenTeacher(net, (L, C), decoder=decoder), decoder, net.joint())
    assert float(made.joint.sum()) == pytest.approx(1)
    z = noise(SAMPLES, 1)
    assert made.distance(made.teacher.transport(z, nothing(SAMPLES))[0]) < 0.05, "the map of 16 steps of Heun"
    coarse = made.teacher.transport(z, nothing(SAMPLES), solver="euler", steps=16)[0]
    assert made.distance(coarse) > 0.05, "16 steps of Euler are biased"
    return made


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, L, C, generator=torch.Generator().manual_seed(seed))


def batches(source: Source, count: int, size: int, seed: int) -> Iterator[tuple[Batch, Step]]:
    """Batches of pairs of the teacher, drawn at random."""
    z, order = noise(65_536, seed), torch.Generator().manual_seed(seed + 1)
    x0 = source.teacher.transport(z, Cond.nothing(len(z)))[0]
    tokens = indices(source.decoder, x0)
    for step in range(count):
        rows = torch.randint(0, len(z), (size,), generator=order)
        batch = Batch(rows, rows, Cond.nothing(size), x0=x0[rows], z=z[rows], tokens=tokens[rows])
        yield batch, Step(step, Draws(seed, "toy", step, torch.arange(size)))


class Descent:
    """AdamW with a rate that rises for a tenth of the steps and falls to 0, gradients of norm 1 at most, and an average."""

    def __init__(
        self, model: Model, rate: float, total: int, decay: float = 0.999, rise: float = 0.1
    ) -> None:
        self.model, self.average, self.decay, self.step = model, trainable_copy(model, model), decay, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), rate)
        self.rate = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=total + 1, pct_start=rise, cycle_momentum=False
        )

    def __call__(self, loss: Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        decay = min(self.decay, (self.step + 1) / (self.step + 10))
        self.step += 1
        with torch.no_grad():
            for old, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
        return float(loss)


def independent(source: Source) -> float:
    """The distance of tokens with the right marginals, each drawn on its own: what a student must beat."""
    joint, product = source.joint.view(V, V, V, V), torch.ones(1, dtype=torch.float64)
    for position in range(L):
        others = [p for p in range(L) if p != position]
        product = (product[:, None] * joint.sum(others)).flatten()
    return float((product - source.joint).abs().sum() / 2)


def test_one_and_two_steps_keep_what_tokens_have_in_common(source):
    """Toy C."""
    assert independent(source) == pytest.approx(0.8086, abs=1e-3)
    torch.manual_seed(0)
    net = TokenTransformer(depth=3, student=True, **SIZES)
    net.codebook.copy_(source.teacher.token_net.codebook)
    student = Denoiser(net, Prefix([1] * L), "x0", (L, C), decoder=source.decoder)
    method = DistilledDecoding(student, timesteps=(0, 2))
    descend = Descent(student, 2e-3, 2000)
    for batch, step in batches(source, 2000, 256, 3):
        descend(method.loss(batch, step).total)
    with torch.no_grad():
        z, cond = noise(SAMPLES, 1), Cond.nothing(SAMPLES)
        generator = Generator(descend.average, method.result().sampler)
        one, two = (source.distance(generator.generate(z, cond, steps)) for steps in (1, 2))
        both = StudentAndTeacher(descend.average.net, source.teacher.net)
        model = Involved(both, (L, C), [1] * L, 1, 2, decoder=source.decoder)
        involved = source.distance(model.transport(z, cond)[0])
        x0 = source.teacher.transport(z, cond)[0]
        logits, vectors = descend.average.net(z, torch.ones(SAMPLES), cond, heads=True)
        right = (logits.argmax(-1) == indices(source.decoder, x0)).float().mean(0)
        nearest = source.distance(vectors)
    print(
        f"one step {one:.3f}, two {two:.3f}, involved {involved:.3f}, second head {nearest:.3f}, {right.tolist()}"
    )
    assert one < 0.25
    assert two < 0.12
    assert involved <= two + 0.02
    assert nearest > one, "the mean of codes at the border of two cells is near to neither"
    assert bool((right.diff() < 0.01).all()), "later tokens depend on more noise"


def flow(source: Source, seed: int) -> CodeFlow:
    torch.manual_seed(seed)
    body = TokenTransformer(depth=2, logits=False, **SIZES)
    return CodeFlow(CodeFlowNet(body, C, width=96, layers=3), (L, C), decoder=source.decoder)


def test_a_generator_learns_from_scores_alone(source):
    """Toy D."""
    scores = TeacherScore(flow(source, 0), source.teacher, draws=4, t_max=0.99)
    descend, losses = Descent(scores.student, 2e-3, 1500, decay=0.995), []
    for batch, step in batches(source, 1500, 256, 5):
        losses.append(descend(scores.loss(batch, step).total))
    assert sum(losses[975:1000]) / 25 < 0.2
    first, cond = descend.average, Cond.nothing(20_000)
    z = noise(20_000, 1)
    with torch.no_grad():
        diffusion = source.distance(first.transport(z, cond, steps=10)[0])
    method = DistilledDecoding2(
        trainable_copy(first, first), source.teacher, first, fake_per_student=3, draws=4
    )
    generator, guidance = Descent(method.student, 5e-4, 500, decay=0.995), Descent(method.fake, 1e-3, 1500)

    @torch.no_grad()
    def found(model: CodeFlow) -> tuple[float, float]:
        """(distance of the joint distribution, mean distance of a vector to its nearest code)."""
        q = model.x0(z, torch.ones(len(z)), cond)
        return source.distance(q), float((q - model.nearest(q)).norm(dim=-1).mean())

    begun = found(method.student)
    for number, (batch, step) in enumerate(batches(source, 1500, 256, 7)):
        guidance(method.fake_loss(batch, step).total)
        if number % 3 == 2:
            generator(method.student_loss(batch, step).total)
    ended = found(generator.average)
    print(f"diffusion {diffusion:.3f}, generator {begun} -> {ended}, score loss {losses[-1]:.3f}")
    assert diffusion < 0.35
    assert begun[0] > 0.9, "a generator is useless at its start: it makes conditional means"
    assert ended[0] < 0.75
    assert ended[1] < 0.85 * begun[1]
