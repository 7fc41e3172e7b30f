"""Golden of EDM's noise levels, preconditioning, loss and average (data/score_distillation/README.md).

float32 losses to rtol 1e-4, gradients to 1e-3; the tables, float64 or float32, to their rounding.
"""

from __future__ import annotations

import torch
from conftest import Load
from torch import Tensor, nn
from torch.nn import functional as F
from translate import close, numbers

from distill.data.cond import Cond
from distill.engine.ema import halflife_decay
from distill.nets.precond import EDMPrecond
from distill.process.base import expand
from distill.process.edm import EDM
from distill.process.scalings import edm_scalings, edm_weight
from distill.process.times import karras_index_level, karras_levels, lognormal_level, sid_level

FAMILY, FILE = "score_distillation", "edm_sigma_ema"


class Tiny(nn.Module):
    """The README's F: conv(tanh(conv(x; W1, b1) + c_noise e); W2, b2)."""

    def __init__(self, file: dict[str, Tensor]) -> None:
        super().__init__()
        for name in ("W1", "b1", "e", "W2", "b2"):
            self.register_parameter(name, nn.Parameter(file[f"net.{name}"].clone()))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        bias = expand(c_noise, x) * self.e.reshape(1, -1, 1, 1)
        hidden = torch.tanh(F.conv2d(x, self.W1, self.b1, padding=1) + bias)
        return F.conv2d(hidden, self.W2, self.b2, padding=1)


def test_preconditioned_loss_and_its_gradient(load: Load) -> None:
    file = load(FAMILY, FILE)
    sigma = lognormal_level(file["z_normal"].flatten())
    close(sigma, file["sigma"].flatten(), 0.0, 1e-6)
    net = Tiny(file)
    x_t = EDM().add_noise(file["x"], file["noise"], sigma)
    denoised = EDMPrecond(net)(x_t, sigma, Cond.nothing(len(x_t)))
    assert denoised.dtype == torch.float32
    elements = expand(edm_weight(sigma), x_t) * (denoised - file["x"]).square()
    close(elements, file["loss_elem"], 1e-5, 1e-4)
    loss = elements.sum() / len(x_t)
    close(loss, file["loss"], 1e-5, 1e-4)
    loss.backward()
    for name, parameter in net.named_parameters():
        expected = file[f"grad.{name}"]
        close(parameter.grad, expected, 1e-5 * expected.abs().max().item(), 1e-3)


def test_precond_scalings(load: Load) -> None:
    file = load(FAMILY, FILE)
    found = edm_scalings(file["precond_sigma"])
    for name in found._fields:
        close(getattr(found, name), file[f"precond_{name}"], 1e-7, 1e-6)
    # lambda c_out^2 = 1: the weight makes the loss of F one of unit size at every level
    close(
        edm_weight(file["precond_sigma"]) * file["precond_c_out"] ** 2,
        torch.ones(len(found.c_out)),
        0.0,
        1e-5,
    )


def test_sid_levels(load: Load) -> None:
    file = load(FAMILY, FILE)
    for t_max in numbers(file, r"sid_sigma_tmax(\d+)"):
        close(sid_level(file["sid_u"], t_max), file[f"sid_sigma_tmax{t_max}"], 0.0, 1e-9)


def test_karras_table(load: Load) -> None:
    file = load(FAMILY, FILE)
    expected = file["karras_1000"]  # rising
    count = len(expected)
    close(karras_levels(count).flip(0).float(), expected, 0.0, 1e-5)
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    close(karras_index_level(middles, 0, count - 1, count).float(), expected, 0.0, 1e-5)
    low, high = round(0.02 * count), round(0.98 * count)
    ends = karras_index_level(torch.tensor([0.0, 1.0]), low, high, count)
    close(ends.float(), expected[[low, high]], 0.0, 1e-5)


def test_halflife_decay(load: Load) -> None:
    file = load(FAMILY, FILE)
    keys = [key for key in file if key.startswith("ema_beta_")]
    assert keys
    for key in keys:
        thousands, batch = (int(part[2:] if part[0] == "h" else part[1:]) for part in key.split("_")[2:])
        found = [halflife_decay(seen, batch, 1000 * thousands, 0.05) for seen in file["ema_nimg"].tolist()]
        close(torch.tensor(found, dtype=torch.float64), file[key], 0.0, 1e-9)
