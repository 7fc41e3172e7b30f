"""The flow of tokens has the probabilities that it is given (toy A), and a student that learns it keeps what tokens have in
common (toy B), which independent tokens do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.samplers.token_flow import token_map


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def distance(index: Tensor, p: Tensor) -> float:
    """Total variation between frequencies and probabilities."""
    return float((torch.bincount(index, minlength=len(p)).double() / len(index) - p.double()).abs().sum() / 2)


def source() -> tuple[Tensor, Tensor, Tensor]:
    """(noise [20000,4], log p, codes) of 16 codes, a quarter of which have probability 0."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(16, 4, generator=generator)
    logits = torch.randn(16, generator=generator)
    logits[torch.randperm(16, generator=generator)[:4]] = -torch.inf
    noise = torch.randn(20_000, 4, generator=generator)
    return noise, logits.log_softmax(0).expand(len(noise), -1), codes


def test_frequencies_are_the_probabilities():
    noise, log_p, codes = source()
    p = log_p[0].exp()
    index, _ = token_map(noise, log_p, codes, grid(16))
    assert distance(index, p) <= 0.02, "the sampling error alone is .010"
    assert not bool((p[index] == 0).any()), "no code of probability 0"
    coarse, _ = token_map(noise, log_p, codes, grid(4), solver="euler")
    assert distance(coarse, p) > 0.1, "four steps of Euler are visibly biased"
    fine, _ = token_map(noise[:5000], log_p[:5000], codes, grid(64))
    assert float((index[:5000] == fine).double().mean()) >= 0.99


class Copies(nn.Module):
    """Two tokens of 4 codes: one net a position; the second sees both noises, or its own alone."""

    def __init__(self, *, blind: bool) -> None:
        super().__init__()
        self.blind = blind
        sizes = (2, 2 if blind else 4)
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(n, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
            for n in sizes
        )

    def forward(self, noise: Tensor) -> Tensor:
        second = noise[:, 1] if self.blind else noise.flatten(1)
        return torch.stack([self.nets[0](noise[:, 0]), self.nets[1](second)], 1)


P = torch.tensor([0.4, 0.3, 0.2, 0.1])
CODES = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])


def copied(noise: Tensor) -> Tensor:
    """The teacher's tokens [n,2]: the second repeats the first."""
    first, _ = token_map(noise[:, 0], P.log().expand(len(noise), -1), CODES, grid(16))
    second, _ = token_map(noise[:, 1], F.one_hot(first, 4).float().log(), CODES, grid(16))
    return torch.stack([first, second], 1)


def trained(blind: bool, steps: int = 400) -> Tensor:
    """Tokens [20000,2] of a student that was trained for some steps."""
    torch.manual_seed(0)
    net = Copies(blind=blind)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        noise = torch.randn(256, 2, 2)
        loss = F.cross_entropy(net(noise).flatten(0, 1), copied(noise).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return net(torch.randn(20_000, 2, 2)).argmax(-1)


def joint_distance(tokens: Tensor) -> float:
    """Total variation to the pairs (i, i) of probability P[i]."""
    return distance(tokens[:, 0] * 4 + tokens[:, 1], torch.diag(P).flatten())


@pytest.mark.slow
def test_a_student_learns_what_independent_tokens_cannot():
    torch.manual_seed(1)
    independent = torch.multinomial(P, 40_000, replacement=True).view(-1, 2)
    assert joint_distance(independent) == pytest.approx(0.7, abs=0.02)
    assert joint_distance(copied(torch.randn(20_000, 2, 2))) < 0.02
    tokens = trained(blind=False)
    assert joint_distance(tokens) < 0.05
    assert float((tokens[:, 0] == tokens[:, 1]).double().mean()) > 0.98
    assert joint_distance(trained(blind=True, steps=100)) > 0.5, "the second token must see the first noise"
