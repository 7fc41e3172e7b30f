"""Distilled Decoding: one-step and few-step sampling of autoregressive models.

Liu et al. 2024 (arXiv 2412.17153). The teacher's tokens q are a function of noise eps (`samplers.token_flow`). The student
reads X_k = [q_1 .. q_k, eps_{k+1} .. eps_K], data in the first k of K groups and the noise of the pair in the others, and
predicts all tokens at once; a sample in n steps begins with X_0 = eps, and each step reads what the step before predicted of
its first groups, and the same noise.

What the loss should look like: the cross-entropy starts near that of the teacher's marginals (3 on the digits) and falls for as
long as training lasts. `accuracy` falls with the position (the first token depends on one noise vector, the last on all), and
samples are good long before it is high: wrong tokens are mostly those of neighbouring cells of noise. Judge by samples.

Deviations: no training code was published, and what the paper does not say is ours: the loss below (two heads are in the
published network, and a distance of decoded images among its options), its weights, and the times, which are drawn evenly. With
`perceptual` the decoded images are compared in pixels: LPIPS has weights that no package ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.update import Diagnostics, Loss, Step, Update
from distill.methods.losses.tokens import code_error, cross_entropy, mean_behind
from distill.models.decoder import codebook_of
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.nets.token_net import TokenNet
from distill.nets.token_transformer import student_output
from distill.process.prefix import Prefix


class DistilledDecoding(DistillModule):
    """L = ce CE(logits_i, q_i) + emb |tokens_i - c_{q_i}|^2 / C + perceptual |decode(z) - decode(c_q)|^2, the first two
    averaged over the positions of noise of a sample, z as in sampling (the logits' argmax has no gradient).

    Args:
        student: predicts x0 under `Prefix` with two heads, `adapt: {process: prefix}` of a model of tokens.
        timesteps: groups of data k of the states that it is trained on, rising from 0.
        sample_steps: numbers of steps that it is sampled with, 1 .. the number of `timesteps`; n steps start at the first n.
        ce, emb, perceptual: weights of the three terms.
    """

    reads = ("tokens", "z")

    def __init__(
        self,
        student: Denoiser,
        *,
        timesteps: Sequence[int] = (0, 8),
        sample_steps: Sequence[int] = (1, 2),
        ce: float = 1.0,
        emb: float = 1.0,
        perceptual: float = 0.0,
    ) -> None:
        super().__init__(student)
        process = student.process
        if not isinstance(process, Prefix):
            raise ValueError(
                f"student: lives under {process!r}, expected Prefix: adapt: {{process: prefix}} of a model of tokens"
            )
        self.process: Prefix = process
        self.timesteps = check_timesteps(timesteps, len(process.groups))
        steps = list(sample_steps)
        if not steps or any(not isinstance(n, int) or not 1 <= n <= len(self.timesteps) for n in steps):
            raise ValueError(
                f"sample_steps: found {steps}, expected counts in 1 .. {len(self.timesteps)}, the number of timesteps"
            )
        self.sample_steps = steps
        for name, weight in (("ce", ce), ("emb", emb), ("perceptual", perceptual)):
            if not weight >= 0:
                raise ValueError(f"{name}: found {weight}, expected at least 0")
        if ce == emb == 0:
            raise ValueError("ce, emb: found 0 and 0, expected a loss of tokens")
        self.ce, self.emb, self.perceptual = ce, emb, perceptual
        self._check_net(student)

    def _check_net(self, student: Denoiser) -> None:
        """The net has two heads, and its codes are the decoder's: what its logits are the probabilities of."""
        book, net = codebook_of(student.decoder), student.net
        if not isinstance(net, TokenNet) or not net.student:
            raise ValueError(
                f"student: the net {type(net).__name__} has no codebook and no two heads; expected adapt: "
                "{process: prefix, net: {student: true}}"
            )
        own = net.codebook
        if own.shape != book.shape:
            raise ValueError(
                f"student: the teacher's vocabulary is {len(own)}, expected that of the codebook, {len(book)} of "
                f"{book.shape[1]} numbers"
            )
        if not (own.is_meta or book.is_meta) and not torch.equal(own.to(book.device), book):
            raise ValueError("student: the net has another codebook than its decoder; expected the same")
        self.split = net.split
        if self.perceptual and self.split >= self.process.length:
            raise ValueError(
                f"perceptual: found {self.perceptual}, but all tokens come from the logits, whose argmax has no "
                "gradient; expected 0, or a smaller `split` of the net"
            )

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """At the times that it was trained at, with the same noise in all steps; guidance is baked into the pairs."""
        times = [self.process.time(k) for k in self.timesteps]
        sampler = SamplerSpec(
            steps=self.sample_steps[0],
            times={n: (*times[:n], 0.0) for n in self.sample_steps},
            mode="sde",
            renoise="same",
        )
        return Result(sampler, "few_step")

    def loss(self, batch: Batch, step: Step) -> Loss:
        """See the class."""
        assert batch.x0 is not None
        assert batch.tokens is not None
        assert batch.z is not None
        times = torch.tensor([self.process.time(k) for k in self.timesteps], device=batch.z.device)
        which = step.draws.integer("t", len(self.timesteps))
        t = times[which]
        data = self.process.alpha(t) > 0
        x = self.process.add_noise(batch.x0, batch.z, t).to(batch.z.dtype)
        logits, tokens = self.student.net(x, t, batch.cond, heads=True)
        ce = mean_behind(cross_entropy(logits, batch.tokens), data)
        emb = mean_behind(code_error(tokens, batch.x0), data)
        total = self.ce * ce + self.emb * emb
        logs = {"ce": ce.mean(), "emb": emb.mean()}
        if self.perceptual:
            made = student_output(
                x, logits.detach(), tokens, codebook_of(self.student.decoder), data, self.split
            )
            decode = self.student.decoder.decode
            pixels = (decode(made) - decode(batch.x0)).square().flatten(1).mean(1)
            total, logs = total + self.perceptual * pixels, logs | {"perceptual": pixels.mean()}
        right = mean_behind((logits.detach().argmax(-1) == batch.tokens).to(emb.dtype), data)
        return Loss(total.mean(), logs | {"accuracy": right.mean()})

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """From pure noise: the accuracy of tokens at a quarter of the positions each, whole sequences that are right, the
        error of the second head and how often its nearest code is the token."""
        assert batch.x0 is not None
        assert batch.tokens is not None
        assert batch.z is not None
        best = self.best()
        assert isinstance(best, Denoiser)
        t = torch.ones(len(batch), device=batch.z.device)
        logits, tokens = best.net(batch.z, t, batch.cond, heads=True)
        right = (logits.argmax(-1) == batch.tokens).float()
        book = codebook_of(self.student.decoder).to(tokens.device)
        nearest = torch.cdist(tokens.float(), book.expand(len(batch), *book.shape)).min(-1)
        scalars = {f"accuracy_{i + 1}": part.mean() for i, part in enumerate(_quarters(right))}
        scalars |= {"exact": right.prod(1).mean(), "emb": code_error(tokens, batch.x0).mean()}
        scalars |= {
            "nearest": (nearest.indices == batch.tokens).float().mean(),
            "distance": nearest.values.mean(),
        }
        return Diagnostics(
            scalars, [("teacher", batch.x0), ("student, 1 step", best(batch.z, t, batch.cond))]
        )


def _quarters(values: Tensor) -> Sequence[Tensor]:
    """Values [B,L] by up to four parts of the positions."""
    return values.chunk(min(4, values.shape[1]), 1)


def check_timesteps(timesteps: Sequence[int], groups: int) -> list[int]:
    """The groups of data of the student's states. Raises ValueError naming `timesteps`."""
    found = list(timesteps)
    rising = all(isinstance(k, int) for k in found) and all(a < b for a, b in pairwise(found))
    if not found or not rising or found[0] != 0 or found[-1] >= groups:
        raise ValueError(
            f"timesteps: found {found}, expected numbers of groups that rise from 0 to less than {groups}"
        )
    return found
