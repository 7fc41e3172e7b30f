"""Autoregressive models of tokens as deterministic transports from noise to data (Distilled Decoding, arXiv 2412.17153), and
tokenizers while they are trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.conditions import Conditions, Nothing, of_net
from distill.models.decoder import Decoder, codebook_of
from distill.models.guidance import guide
from distill.models.model import Model
from distill.nets.token_net import TokenNet
from distill.nets.tokenizer import TokenizerNet
from distill.process.base import at_least_float32
from distill.process.flow import Flow
from distill.process.prefix import known_groups
from distill.process.times import default_grid
from distill.samplers.token_filters import Filters, check_logits
from distill.samplers.token_flow import SOLVERS, denoise, token_map


class TokenTeacher(Model):
    """A `TokenNet` over groups of tokens. Samples are code vectors [L,C] of the decoder's codebook.

    `transport` goes through the groups in order: the net gives the probabilities of a group's tokens from the codes of the
    groups before, and the group's own noise flows to one code a position (`samplers.token_flow`). So the sample is a function
    of its noise, with the distribution of ancestral sampling.

    Args:
        net: K groups of L positions in all, V tokens; a `codebook` of it becomes that of the decoder.
        sample_shape: [L,C].
        conditions: None: those of the net.
        decoder: has the codebook: `VQ` or `Codes`.
        filters: temperature, top-k, top-p and the schedule of guidance.
        coupling, guidable: as of `Model`.

    Raises:
        ValueError: names the argument: V is not the number of codes, codes that are not finite, groups that are not L
        positions, C of the codes and of the samples differ, or codes without length 1 of a tokenizer that normalises them.
    """

    column: ClassVar[Literal["x0", "tokens"]] = "tokens"
    completes: ClassVar[bool] = True
    kind = "logits"

    def __init__(
        self,
        net: nn.Module,
        sample_shape: Sequence[int],
        *,
        conditions: Conditions | None = None,
        decoder: Decoder,
        filters: Filters = Filters(),  # noqa: B008 (immutable)
        coupling: str = "independent",
        guidable: bool = False,
    ) -> None:
        shape = tuple(sample_shape)
        if not isinstance(net, TokenNet) or net.student:
            found = "a student" if isinstance(net, TokenNet) else type(net).__name__
            raise ValueError(
                f"net: found {found}, expected a network of tokens that gives logits (nets.token_net.TokenNet)"
            )
        check_codebook(net, shape, decoder)
        if hasattr(net, "codebook"):
            set_codebook(net, decoder)
        super().__init__(
            net, Flow(), shape, conditions or of_net(net) or Nothing(), decoder, coupling, guidable
        )
        self.filters = filters

    @property
    def token_net(self) -> TokenNet:
        """The net, of its type."""
        assert isinstance(self.net, TokenNet)
        return self.net

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[L,V] logits."""
        return (self.sample_shape[0], self.token_net.vocabulary)

    def config(self) -> dict[str, Any]:
        """See `Model`."""
        return {
            "_target_": f"{TokenTeacher.__module__}.{TokenTeacher.__qualname__}",
            "net": self.net_config(),
            "sample_shape": list(self.sample_shape),
            "conditions": self.conditions.config(),
            "decoder": self.decoder.config(),
            "filters": vars(self.filters),
            "coupling": self.coupling,
            "guidable": self.guidable,
        }

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits [B,L,V] of every position of codes x [B,L,C] given the groups before its own, without guidance and filters."""
        logits: Tensor = self.net(x, t, cond)
        return logits

    def log_probs(self, x: Tensor, t: Tensor, cond: Cond, guidance_scale: float = 1.0) -> Tensor:
        """Log probabilities [B,L,V] of every position given the codes x [B,L,C] of the groups before, guided and filtered."""
        logits = self(x, t, cond)
        if guidance_scale != 1:
            self.check_transport(guidance_scale)
            logits, dropped = self(torch.cat([x, x]), torch.cat([t, t]), cond.cat(cond.null())).chunk(2)
            parts = zip(logits.split(list(self.token_net.groups), 1), dropped.split(list(self.token_net.groups), 1),
                        self.filters.scales(guidance_scale, len(self.token_net.groups)), strict=True)  # fmt: skip
            logits = torch.cat([guide(u, c, scale) for c, u, scale in parts], 1)
        return self.filters.log_probs(logits)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """E[code | x_t] of every position [B,L,C], given the codes of the groups before in `context` [B,L,C] of `cond`.
        Times are [B], or [B,L], one a position.

        Raises ValueError for conditions without a context, and for a guidance scale a sample."""
        if (context := cond.get("context")) is None:
            raise ValueError("cond: context: missing; expected the code vectors [B,L,C] of the groups before")
        if isinstance(guidance_scale, Tensor):
            raise ValueError("guidance_scale: found a scale a sample, expected one number")
        times = t if t.dim() == 2 else t[:, None].expand(x_t.shape[:2])
        return self.expected(x_t, times, self.log_probs(context, times[:, 0], cond, guidance_scale))

    def expected(self, x_t: Tensor, t: Tensor, log_p: Tensor) -> Tensor:
        """E[code | x_t] of every position [B,L,C] at its time [B,L], for log probabilities [B,L,V]; differentiable in x_t."""
        x_t = at_least_float32(x_t)
        codes = codebook_of(self.decoder).to(x_t.device, x_t.dtype)
        made = denoise(x_t.flatten(0, 1), t.flatten(), log_p.flatten(0, 1).to(x_t.dtype), codes)
        return made.view_as(x_t)

    def transport(
        self,
        z: Tensor,
        cond: Cond | None = None,
        *,
        solver: str = "heun",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        grid: Tensor | None = None,
        times: Sequence[float] | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """See `Model`; `solver` ("heun" or "euler"), `steps` and `grid` are those of the flow of every token. `known`
        [B,n,C]: codes of the first positions, which are kept."""
        cond = Cond.nothing(len(z)) if cond is None else cond
        grid = default_grid(self.process, 16 if steps is None else steps) if grid is None else grid
        made, paths = self.generate(
            z, cond, solver, grid, guidance_scale, known=known, path=times is not None
        )
        if times is None:
            return made[None]
        points = grid.tolist()
        if any(min(abs(time - point) for point in points) > 1e-6 for time in times):
            raise ValueError(f"times: {list(times)} are not all points of the solver's grid {points}")
        rows = [min(range(len(points)), key=lambda i: abs(points[i] - time)) for time in times]
        return torch.stack([made if i == len(points) - 1 else paths[i] for i in rows])

    def generate(
        self,
        z: Tensor,
        cond: Cond,
        solver: str,
        grid: Tensor,
        guidance_scale: float = 1.0,
        *,
        known: Tensor | None = None,
        until: int | None = None,
        path: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(codes of the first `until` groups [B,n,C]; None: of all, with `path` the states [steps + 1,B,n,C] of their flows).

        Raises ValueError for noise of another shape or that is not finite, for logits that are not, and for known positions
        that end within a group."""
        self._check_noise(z, len(cond))
        self.check_transport(guidance_scale, solver)
        net, codes = self.token_net, codebook_of(self.decoder).to(z.device)
        if len(codes.unique(dim=0)) < len(codes):
            warnings.warn(
                "decoder: the codebook has equal codes, which no flow can tell apart: the likeliest of them gets "
                "the probability "
                "of all",
                stacklevel=2,
            )
        sizes = list(net.groups)[:until]
        scales = self.filters.scales(guidance_scale, len(net.groups))
        guided = any(scale != 1 for scale in scales)
        state = net.begin(cond.cat(cond.null()) if guided else cond)
        start = 0 if known is None else known.shape[1]
        done = known_groups(sizes, start)
        last = None if known is None else known.to(codes.dtype)
        parts, paths = [], []
        if last is not None:
            begun = z[:, :start]
            parts.append(last)
            paths.append(begun[None].expand(len(grid), *begun.shape) if path else begun)
        for size, scale in list(zip(sizes, scales, strict=False))[done:]:
            logits = net.advance(state, torch.cat([last, last]) if guided and last is not None else last)
            noise = z[:, start : start + size]
            last, flow = self._flow(logits, noise, codes, scale if guided else None, solver, grid, path)
            parts.append(last)
            paths.append(flow)
            start += size
        return torch.cat(parts, 1), torch.cat(paths, -2)

    def _flow(
        self,
        logits: Tensor,
        noise: Tensor,
        codes: Tensor,
        scale: float | None,
        solver: str,
        grid: Tensor,
        path: bool,
    ) -> tuple[Tensor, Tensor]:
        """(codes [B,n,C] that the noise of a group flows to, the end or the path); `scale`: of logits with and without
        condition."""
        if scale is not None:
            conditional, dropped = logits.chunk(2)
            logits = guide(dropped, conditional, scale) if scale != 1 else conditional
        check_logits(logits)
        log_p = self.filters.log_probs(logits)
        shape = noise.shape
        index, flow = token_map(
            noise.reshape(-1, shape[-1]), log_p.flatten(0, 1), codes, grid, solver=solver, return_path=path
        )
        return codes[index].view(shape), flow.view(*((len(grid),) if path else ()), *shape)

    def _check_noise(self, z: Tensor, conditions: int) -> None:
        if tuple(z.shape[1:]) != self.sample_shape or conditions != len(z):
            raise ValueError(
                f"z: found shape {list(z.shape)} for {conditions} conditions, expected {[conditions, *self.sample_shape]}"
            )
        if not bool((finite := z.isfinite().all(-1)).all()):
            batch, position = (~finite).nonzero()[0].tolist()
            raise ValueError(f"z: found NaN or infinity at sample {batch}, position {position}")

    def check_transport(self, guidance_scale: float = 1.0, solver: str | None = None) -> None:
        """See `Model`; solvers are those of the flow of tokens, and guidance of tokens extrapolates from the unconditional
        logits."""
        if solver is not None and solver not in SOLVERS:
            raise ValueError(
                f"solver: found {solver!r}, expected one of {list(SOLVERS)} for a model of tokens"
            )
        if guidance_scale < 1:
            raise ValueError(
                f"guidance_scale: found {guidance_scale:g}, expected at least 1 for a model of tokens"
            )
        super().check_transport(guidance_scale, solver)

    def calls(self, solver: str, steps: int, guidance_scale: float = 1.0) -> int | None:
        """One a group; steps of the flow call no network."""
        return len(self.token_net.groups) * (1 if guidance_scale == 1 else 2)

    def transport_settings(self) -> dict[str, Any] | None:
        """The filters."""
        return {"filters": dict(vars(self.filters))}

    def baked(self, guidance_scale: float) -> str:
        """What pairs of this model contain, in words."""
        return self.filters.words(guidance_scale)


def check_codebook(net: TokenNet, shape: tuple[int, ...], decoder: Decoder) -> None:
    """Raise ValueError where net, samples and codebook do not fit; see `TokenTeacher`."""
    book = codebook_of(decoder)
    if net.vocabulary != len(book):
        raise ValueError(
            f"decoder: the teacher's vocabulary is {net.vocabulary}, expected that of the codebook, {len(book)}"
        )
    if len(shape) != 2 or shape[1] != book.shape[1]:
        raise ValueError(
            f"sample_shape: found {list(shape)}, expected [L,C] with the C = {book.shape[1]} of the codebook"
        )
    if sum(net.groups) != shape[0] or min(net.groups) < 1:
        raise ValueError(
            f"net.groups: found {sum(net.groups)} positions in groups, expected the {shape[0]} of sample_shape"
        )
    if book.is_meta:
        return
    if not bool(book.isfinite().all()):
        row = int((~book.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"decoder: code {row} of the codebook is not finite")
    lengths = book.norm(dim=1)
    if getattr(getattr(decoder, "net", None), "l2_norm", False) and bool(((lengths - 1).abs() > 1e-3).any()):
        raise ValueError(
            f"decoder: found a code of length {float(lengths[(lengths - 1).abs().argmax()]):.4g}, expected 1 +- "
            f"1e-3: this tokenizer "
            "normalises its codes"
        )


def set_codebook(net: TokenNet, decoder: Decoder) -> None:
    """Make the codes of a net those of a decoder. Raises ValueError naming `net` for another number or size of codes."""
    own, book = net.codebook, codebook_of(decoder)
    if own.shape != book.shape:
        raise ValueError(
            f"net: found {len(own)} codes of {own.shape[1]} numbers, expected those of the codebook, {len(book)} of "
            f"{book.shape[1]}"
        )
    if not (own.is_meta or book.is_meta):
        with torch.no_grad():
            own.copy_(book)


class Tokenizer(Model):
    """A tokenizer as what is trained: its samples are images, which it reconstructs. It has no transport; models of its tokens
    have it as their decoder (`VQ`).

    Args:
        net: a `TokenizerNet`. sample_shape: of the images. Others: as of `Model`.
    """

    kind = "reconstruction"

    def __init__(
        self,
        net: nn.Module,
        sample_shape: Sequence[int],
        *,
        conditions: Conditions | None = None,
        decoder: Decoder,
        coupling: str = "endpoint",
        guidable: bool = False,
    ) -> None:
        if not isinstance(net, TokenizerNet):
            raise ValueError(
                f"net: found {type(net).__name__}, expected a tokenizer (nets.tokenizer.TokenizerNet)"
            )
        super().__init__(net, Flow(), sample_shape, conditions or Nothing(), decoder, coupling, guidable)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Reconstructed images of images x [B,*S]."""
        images: Tensor = self.net(x, t, cond)
        return images

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """Reconstructed images."""
        return self(x_t, t, cond)

    def transport(self, z: Tensor, cond: Cond | None = None, **options: Any) -> Tensor:
        """Raises ValueError: see the class."""
        raise ValueError(
            "coupling: found a tokenizer, which makes no samples from noise; expected a model of its tokens"
        )

    def check_transport(self, guidance_scale: float = 1.0, solver: str | None = None) -> None:
        """Raises ValueError: see the class."""
        self.transport(torch.zeros(0))

    def calls(self, solver: str, steps: int, guidance_scale: float = 1.0) -> int | None:
        """One."""
        return 1
