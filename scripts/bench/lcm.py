"""The step of latent consistency distillation through the engine against the same step written by hand.

    python scripts/bench/lcm.py [--runs 3] [--blocks 8] [--block-steps 12]

The hand-written loop does the arithmetic that a training script does: tables of alpha and sigma in float32, one guided call of
the teacher on a doubled batch, a DDIM step, the target network without gradients, the student, Huber loss, clipping, fused
AdamW, and two averages. Both sides use the same nets, batch and number of network calls. Blocks take turns in one process; see
`overhead.py` for what is measured.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial

import torch
from overhead import CLIP, EMA, HEADER, LOG_EVERY, Case, Clock, measure, positive, rows
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.data.digits import Digits
from distill.engine.schedule import Constant
from distill.engine.update import Optim
from distill.methods.lcm import LCM
from distill.models.denoiser import Denoiser
from distill.nets.unet import UNet
from distill.process.vp import VPScaledLinear

LR, LEVELS, DECAY, HUBER_C, W_MAX = 3e-4, 20, 0.9, 0.1, 1.0
CASE = Case("LCM, U-Net, width 16, batch 64", lambda: UNet(width=16, guidance_embedding=64), 64, 12)


def method(case: Case) -> LCM:
    """A prepared distillation: the engine's side."""
    torch.manual_seed(0)
    process, shape = VPScaledLinear(), (1, 8, 8)
    teacher = Denoiser(UNet(width=16), process, "v", shape, guidable=True)
    student = Denoiser(case.net(), process, "v", shape)
    made = LCM(
        student,
        teacher,
        w_max=W_MAX,
        ddim_steps=LEVELS,
        target_decay=DECAY,
        huber_c=HUBER_C,
        sample_steps=[1, 4],
    )
    adamw = partial(torch.optim.AdamW, lr=LR, fused=True)
    made.prepare({"student": Optim(adamw, Constant(), clip=CLIP, ema=EMA, ema_ramp=False)}, seed=0)
    return made


class ByHand:
    """The same step without the package's processes, losses and engine."""

    def __init__(self, own: LCM, data: Digits, batch_size: int) -> None:
        self.teacher, self.student = own.teacher.net, own.student.net.train().requires_grad_(True)
        self.data, self.batch_size, self.done, self.logged = data, batch_size, 0, 0.0
        self.target, self.average = (copy.deepcopy(self.student).requires_grad_(False) for _ in range(2))
        self.parameters = list(self.student.parameters())
        self.followers = [
            (list(net.parameters()), share)
            for net, share in ((self.target, 1 - DECAY), (self.average, 1 - EMA))
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, fused=True)
        cumulative = VPScaledLinear().alphas_cumprod.float()
        self.alphas, self.sigmas = cumulative.sqrt(), (1 - cumulative).sqrt()
        self.rows = torch.empty(0, dtype=torch.int64)

    def steps(self, count: int) -> None:
        """Train for `count` steps."""
        for _ in range(count):
            loss = self.loss()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                for averaged, share in self.followers:
                    torch._foreach_lerp_(averaged, self.parameters, share)
            self.done += 1
            if self.done % LOG_EVERY == 0:
                self.logged = loss.item()

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) [B,1,1,1] at indices of the table."""
        return self.alphas[t][:, None, None, None], self.sigmas[t][:, None, None, None]

    def consistency(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """f(x, t, w) from a net that predicts v."""
        alpha, sigma = self.weights(t)
        q = 10.0 * t.float()[:, None, None, None]
        skip, out = 0.25 / (q.square() + 0.25), q / (q.square() + 0.25).sqrt()
        return skip * x + out * (alpha * x - sigma * net(x, t.float(), cond))

    def loss(self) -> Tensor:
        """Huber distance of f(x_t, t, w) to the target's f(x_u, u, w)."""
        if len(self.rows) < self.batch_size:
            self.rows = torch.randperm(len(self.data))
        rows, self.rows = self.rows[: self.batch_size], self.rows[self.batch_size :]
        x0, label, n = self.data.images[rows], self.data.labels[rows], self.batch_size
        index = torch.randint(LEVELS, (n,))
        t, stride = (index + 1) * (1000 // LEVELS) - 1, 1000 // LEVELS
        u, w = (t - stride).clamp(min=0), torch.rand(n) * W_MAX
        alpha, sigma = self.weights(t)
        x_t = alpha * x0 + sigma * torch.randn_like(x0)
        cond = Cond.of_labels(label)
        with torch.no_grad():
            both = self.teacher(torch.cat([x_t, x_t]), torch.cat([t, t]).float(), cond.cat(cond.null()))
            conditional, unconditional = both.chunk(2)
            v = conditional + w[:, None, None, None] * (conditional - unconditional)
            alpha_u, sigma_u = self.weights(u)
            x_u = alpha_u * (alpha * x_t - sigma * v) + sigma_u * (sigma * x_t + alpha * v)
            target = self.consistency(self.target, x_u, u, cond.with_guidance(w))
        prediction = self.consistency(self.student, x_t, t, cond.with_guidance(w))
        return (((prediction - target).square() + HUBER_C**2).sqrt() - HUBER_C).mean()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=positive, default=3)
    parser.add_argument("--blocks", type=positive, default=8, help="timed blocks a loop in each run")
    parser.add_argument("--block-steps", type=positive, help="steps a block (default: about 0.5 s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case, data, clock = CASE.with_block(options.block_steps), Digits(), Clock()
    for _ in range(options.runs):
        loops = {name: ByHand(method(case), data, case.batch_size) for name in ("bare", "bare, again")}
        measure(case, data, loops, options.blocks, clock, method)
    print(
        f"torch {torch.__version__}, 1 thread, {options.runs} runs of {options.blocks} blocks a loop\n\n{HEADER}"
    )
    print("\n".join(rows(case, clock, [("engine", "bare"), ("bare", "bare, again")])))


if __name__ == "__main__":
    main()
