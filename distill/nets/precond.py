"""EDM's preconditioning around any net: what makes it a denoiser over noise levels from 0.002 to 80."""

from __future__ import annotations

from torch import Tensor, nn

from distill.data.cond import Cond
from distill.nets.net import Net
from distill.process.base import at_least_float32, combine, expand
from distill.process.scalings import edm_scalings


class EDMPrecond(Net):
    """D(x_t; sigma) = c_skip x_t + c_out F(c_in x_t, c_noise, cond) (arXiv 2206.00364, eq. 7 and table 1).

    [B,*S] at noise levels sigma [B] (the time of the ``EDM`` process, above 0) -> predicted data x0 [B,*S]: a net for
    ``Denoiser(net, EDM(...), "x0", ...)``. The scalings, F's output and D are float32 at least; only F itself runs in lower
    precision under autocast. F's time input is c_noise = ln(sigma) / 4, about -1.6 to 1.1 over EDM's levels, so its own
    ``time_scale`` should be tens at least.

    Args:
        net: F, (x [B,*S], c_noise [B], Cond) -> [B,*S].
        sigma_data: the standard deviation of the data that the scalings assume.

    Raises:
        ValueError: ``sigma_data`` is not positive.
    """

    def __init__(self, net: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data: found {sigma_data}, expected a positive number")
        self.net, self.sigma_data = net, sigma_data
        self.num_classes: int | None = getattr(net, "num_classes", None)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoised [B,*S] from x_t [B,*S] at noise levels t = sigma [B] under `cond`."""
        scalings = edm_scalings(t, self.sigma_data)
        x = at_least_float32(x)
        scaled = expand(scalings.c_in.to(x.dtype), x) * x
        return combine(scalings.c_skip, x, scalings.c_out, self.net(scaled, scalings.c_noise, cond))
