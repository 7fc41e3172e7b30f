"""The tiny networks that the files of data/score_distillation were made with (its README), and its tolerances."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.nets.heads import GanHead
from distill.process.base import expand
from distill.process.scalings import edm_scalings
from distill.process.vp import VPScaledLinear

Weights = Mapping[str, Tensor]
SIGMA_DATA = 0.5
HEAD_GROUPS = 4


def part(file: Weights, prefix: str, trained: bool = False) -> dict[str, Tensor]:
    """Tensors under ``prefix.``, without it; as leaves that want gradients where they are trained."""
    found = {
        key.removeprefix(f"{prefix}."): value.clone().requires_grad_(trained)
        for key, value in file.items()
        if key.startswith(f"{prefix}.")
    }
    assert found, f"no key starts with {prefix}."
    return found


def edm_features(w: Weights, x_t: Tensor, sigma: Tensor) -> Tensor:
    """h of Tiny at noise levels sigma [B]."""
    scale = edm_scalings(sigma.to(x_t.dtype), SIGMA_DATA)
    hidden = _conv(expand(scale.c_in, x_t) * x_t, w["W1"], w["b1"])
    return torch.tanh(hidden + expand(scale.c_noise, hidden) * _channels(w["e"]))


def edm_x0(w: Weights, x_t: Tensor, sigma: Tensor) -> Tensor:
    """D of Tiny."""
    scale = edm_scalings(sigma.to(x_t.dtype), SIGMA_DATA)
    out = _conv(edm_features(w, x_t, sigma), w["W2"], w["b2"])
    return expand(scale.c_skip, x_t) * x_t + expand(scale.c_out, x_t) * out


def eps_features(w: Weights, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """h of TinyEps at table times t [B]."""
    hidden = _conv(x_t, w["W1"], w["b1"])
    time, prompt = expand(t.to(x_t.dtype) / 1000, hidden), expand(text.mean((1, 2)), hidden)
    return torch.tanh(hidden + time * _channels(w["e"]) + prompt * _channels(w["c"]))


def eps_prediction(w: Weights, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """eps of TinyEps."""
    return _conv(eps_features(w, x_t, t, text), w["W2"], w["b2"])


def eps_x0(process: VPScaledLinear, w: Weights, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """TinyEps's prediction of the data."""
    return process.convert("eps", eps_prediction(w, x_t, t, text), x_t, t.double(), "x0")


def table(file: Weights) -> VPScaledLinear:
    """Our process for a file's ``alphas_cumprod``, after a look that it is the file's."""
    expected = file["alphas_cumprod"]
    process = VPScaledLinear(num_timesteps=len(expected))
    found = process.alpha(torch.arange(len(expected)).double()) ** 2
    torch.testing.assert_close(found, expected.double(), rtol=2e-5, atol=0)
    return process


def gan_head(file: Weights, features: Tensor) -> GanHead:
    """Our head with a file's weights; its layers are numbered as the reference numbers them."""
    head = GanHead(features.shape[1], features.shape[-1], groups=HEAD_GROUPS)
    head.layers.load_state_dict(part(file, "head"))
    return head


def close_loss(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def close_gradient(actual: Tensor | None, expected: Tensor, share: float = 1e-5) -> None:
    """Also for predictions and states, whose size varies as that of gradients does."""
    assert actual is not None
    assert expected.abs().max() > 0
    atol = share * expected.abs().max().item()
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=1e-3, atol=atol)


def close_gradients(found: Weights, file: Weights, prefix: str, share: float = 1e-5) -> None:
    """The gradients of all ``found`` leaves against the keys ``prefix.*``, no more and no fewer."""
    expected = part(file, prefix)
    assert set(found) == set(expected)
    for name, leaf in found.items():
        close_gradient(leaf.grad, expected[name], share)


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
