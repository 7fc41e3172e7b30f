"""The few-step generator: a denoiser together with the sampler that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distill.data.arguments import device as torch_device
from distill.data.arguments import finite, flag, integer
from distill.data.cond import Cond
from distill.data.plain import plain_torch
from distill.data.rng import sample_noise
from distill.models.adapters import strengthened
from distill.models.conditions import Conditions, Label, Prompt
from distill.models.decoder import Decoder, codes_of
from distill.models.model import Model
from distill.models.spec import SamplerSpec
from distill.process.base import Process
from distill.samplers.fewstep import few_step
from distill.samplers.integrate import Noise


class Generator:
    """z ~ N(0, I) -> data, in the few steps that `spec` names. `generate` returns the model's own samples [B,*S]; `sample`
    returns data: samples decoded and clamped by the model's decoder."""

    def __init__(self, denoiser: Model, spec: SamplerSpec) -> None:
        self.denoiser, self.spec = denoiser, spec

    def __repr__(self) -> str:
        shape, valid = self.shape, sorted(self.spec.times) or "any"
        return f"Generator(shape={shape}, {self.conditions.words()}, steps={self.spec.steps}, valid steps={valid})"

    @property
    def conditions(self) -> Conditions:
        """The conditions of the model."""
        return self.denoiser.conditions

    @property
    def decoder(self) -> Decoder:
        """What the model's samples are."""
        return self.denoiser.decoder

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample as `sample` returns it: [C,H,W] of images."""
        return self.decoder.shape(self.denoiser.sample_shape)

    @property
    def device(self) -> torch.device:
        """Where the weights lie; the CPU for a net without any."""
        return next(chain(self.denoiser.parameters(), self.denoiser.buffers()), torch.empty(0)).device

    def to(self, device: torch.device | str) -> Generator:
        """Move the weights to `device` (in place) and return self."""
        self.denoiser.to(torch_device("device", device))
        return self

    def with_strength(self, strength: float | None) -> Generator:
        """The same model with the terms of its adapter times `strength` (0: the base's weights), sharing the base; None or 1:
        as it is. Raises ValueError naming `strength` for a model without an adapter, or whose adapter takes the guidance."""
        if strength is None or finite("strength", strength) == 1:
            return self
        model = self.denoiser
        net = strengthened(model.net, float(strength))
        return Generator(model.with_(net=net, conditions=model.conditions), self.spec)

    def one_step(self, z: Tensor, cond: Cond) -> Tensor:
        """[B,*S] noise -> [B,*S] samples in one step: what `generate` makes with `steps=1`, also where the model is not
        valid for it. Differentiable with respect to z."""
        self._check(z, cond)
        model, spec = self.denoiser, self.spec
        if spec.mode == "ode":
            return self.generate(z, cond, 1, force=True)
        # Its sample is the first prediction of the data, at the time where sampling starts.
        cond = cond.with_guidance(spec.embedded()).to(z.device)
        t = torch.full((len(z),), spec.start(model.process), dtype=torch.float32, device=z.device)
        return model.x0(model.process.prior(spec.start_scale * z), t, cond, spec.guidance_scale)

    def _check(self, z: Tensor, cond: Cond) -> None:
        shape = tuple(self.denoiser.sample_shape)
        if not z.is_floating_point() or tuple(z.shape[1:]) != shape:
            raise ValueError(
                f"z: expected noise [B, {', '.join(map(str, shape))}], found {z.dtype} {list(z.shape)}"
            )
        if len(cond) != len(z):
            raise ValueError(f"cond: found {len(cond)} conditions for {len(z)} samples, expected as many")

    def network_calls(self, steps: int | None = None, guidance_scale: float | None = None) -> int | None:
        """Network calls that `generate` makes for a sample, of its arguments; guidance counts twice. None: the solver chooses
        ("rk45")."""
        spec = self.spec
        steps = spec.steps if steps is None else steps
        scale = spec.guidance_scale if guidance_scale is None else guidance_scale
        if spec.mode == "sde":
            return steps * (1 if scale == 1 else 2)
        return self.denoiser.calls(spec.solver, steps, scale)

    def generate(
        self,
        z: Tensor,
        cond: Cond,
        steps: int | None = None,
        *,
        force: bool = False,
        guidance_scale: float | None = None,
        guidance_w: float | None = None,
        noise_scale: float | None = None,
        noise: Noise | None = None,
        known: Tensor | None = None,
        return_path: bool = False,
    ) -> Tensor:
        """[B,*S] noise -> [B,*S] samples in `steps` steps (default: the spec's); refuses counts that the
        model is not valid for. `guidance_scale`, `guidance_w` (the input of a net that embeds it) and `noise_scale` (in
        (0, 1.5], of the fresh noise of "sde") replace the spec's.

        `noise` [steps, B,*S], or step -> [B,*S], is the fresh noise of stochastic samplers ("sde") with more than one
        step. `known` [B,n,C] are the first n positions of the samples, which models of tokens complete. With `return_path`,
        all states [steps + 1, B,*S] from the noise to the samples. Differentiable with respect to z."""
        self._check(z, cond)
        model, spec = self.denoiser, self.spec.with_noise_scale(noise_scale)
        grid = spec.grid(model.process, steps, force=force)
        cond = cond.with_guidance(spec.embedded(guidance_w)).to(z.device)
        scale = spec.guidance_scale if guidance_scale is None else finite("guidance_scale", guidance_scale)
        spec.check_asked(scale)
        given: dict[str, Any] = {} if known is None else {"known": self._known(known, z)}
        if spec.mode == "ode":
            if given and not model.completes:
                model.process.known_time(given["known"].shape[1])  # raises
            states = model.transport(
                spec.start_scale * z,
                cond,
                solver=spec.solver,
                grid=grid,
                guidance_scale=scale,
                times=grid.tolist() if return_path else None,
                **given,
            )
            return states if return_path else states[0]
        start = model.process.prior(spec.start_scale * z)
        if spec.renoise == "same":
            noise = lambda step: z  # noqa: E731
        if given:
            start, grid = self._completing(start, given["known"], grid, force)
        if noise is None and len(grid) > 2:
            raise ValueError(
                f"noise: missing; this model's sampler draws fresh noise in each of {len(grid) - 1} steps"
            )
        return few_step(
            lambda x, t: model.x0(x, t, cond, scale),
            model.process,
            start,
            grid,
            torch.zeros_like(z)[None] if noise is None else noise,
            noise_scale=spec.noise_scale,
            noise_floor=spec.noise_floor,
            return_path=return_path,
        )

    def _known(self, known: Tensor, z: Tensor) -> Tensor:
        """The known first positions in type and place of z."""
        size = z.shape[2:]
        if known.shape[:1] != z.shape[:1] or known.shape[2:] != size or not 0 < known.shape[1] < z.shape[1]:
            raise ValueError(
                f"known: found shape {list(known.shape)}, expected the first positions of samples {list(z.shape)}"
            )
        return known.to(z.device, z.dtype)

    def _completing(self, start: Tensor, known: Tensor, grid: Tensor, force: bool) -> tuple[Tensor, Tensor]:
        """(the state with its first positions known, the rest of the grid from its time on)."""
        process, spec = self.denoiser.process, self.spec
        begin, count = process.known_time(known.shape[1]), known.shape[1]
        trained = sorted({time for times in spec.times.values() for time in times[:-1]})
        if not force and all(abs(begin - time) > 1e-9 for time in trained):
            counts = [n for n in range(1, start.shape[1]) if _time_of(process, n) in trained]
            raise ValueError(
                f"known: found {count} positions, but this student was trained with {counts or 'no'} known positions; expected "
                "one of them (force=true samples all the same)"
            )
        rest = grid[grid < begin - 1e-9]
        return torch.cat([known, start[:, count:]], 1), torch.cat([grid.new_tensor([begin]), rest])

    @plain_torch()
    @torch.no_grad()
    def sample(
        self,
        count: int,
        label: Label | None = None,
        *,
        prompt: Prompt | None = None,
        seed: int = 0,
        stream: str = "sample",
        steps: int | None = None,
        force: bool = False,
        guidance_scale: float | None = None,
        guidance_w: float | None = None,
        noise_scale: float | None = None,
        known: Tensor | None = None,
        batch_size: int = 500,
    ) -> Tensor:
        """`count` decoded samples [count, ...] on the CPU, images in [-1, 1]; sample i is a function of (seed, stream, i) and
        its condition alone.

        known: the first tokens [count,n] int64 of the samples, for models of tokens: indices of the codebook. The samples are
        completed, and the tokens kept.

        label: one class for all, one a sample, or None: classes 0, 1, 2, ... in turn. prompt: the same, of models that take
        prompts. Raises ValueError for what the model does not take."""
        count, batch_size = integer("count", count, at_least=1), integer("batch_size", batch_size, at_least=1)
        cond = self.conditions.ask(count=count, label=label, prompt=prompt)
        if known is not None and (known.dim() != 2 or len(known) != count or known.is_floating_point()):
            raise ValueError(
                f"known: found {known.dtype} {list(known.shape)}, expected tokens [{count},n] int64"
            )
        codes = None if known is None else codes_of(self.decoder, known)
        parts = [
            self.sample_ids(
                ids,
                cond,
                seed=seed,
                stream=stream,
                steps=steps,
                force=force,
                guidance_scale=guidance_scale,
                guidance_w=guidance_w,
                noise_scale=noise_scale,
                known=None if codes is None else codes[ids],
            )
            for ids in torch.arange(count, device="cpu").split(batch_size)
        ]
        return torch.cat(parts)

    @plain_torch()
    @torch.no_grad()
    def sample_ids(
        self,
        ids: Tensor,
        cond: Cond | None = None,
        *,
        seed: int,
        stream: str,
        steps: int | None = None,
        force: bool = False,
        guidance_scale: float | None = None,
        guidance_w: float | None = None,
        noise_scale: float | None = None,
        known: Tensor | None = None,
        decode: bool = True,
    ) -> Tensor:
        """The samples `ids` [n] of `sample`, in one batch, decoded or as the model's own. `cond` holds the conditions of all
        samples, 0 and up; None: the defaults of these ids. `known`: see `generate`. Raises FloatingPointError for samples
        that are not finite."""
        seed, force = integer("seed", seed), flag("force", force)
        limit = None if cond is None else len(cond)
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
            raise ValueError(f"ids: expected int64 numbers of samples [n], found {ids!r}")
        if len(ids) and (int(ids.min()) < 0 or (limit is not None and int(ids.max()) >= limit)):
            raise ValueError(
                f"ids: found {int(ids.min())} .. {int(ids.max())}, expected numbers of samples, 0 "
                f"{'and up' if limit is None else f'.. {limit - 1}, those that have a condition'}"
            )
        z, fresh = self.noises(seed, stream, ids)
        cond = (self.conditions.of(ids) if cond is None else cond.rows(ids)).to(self.device)
        samples = self.generate(
            z,
            cond,
            steps,
            force=force,
            guidance_scale=guidance_scale,
            guidance_w=guidance_w,
            noise_scale=noise_scale,
            noise=fresh,
            known=known,
        )
        return self.decoded(samples) if decode else samples.cpu()

    @torch.no_grad()
    def decoded(self, samples: Tensor) -> Tensor:
        """The model's own samples [n,*S] as `sample` returns them. Raises FloatingPointError for some that are not finite."""
        samples = self.decoder.decode(samples.to(self.device))
        # Before clamping makes a number of an infinity.
        if bad := int((~samples.isfinite()).flatten(1).any(1).sum()):
            raise FloatingPointError(
                f"samples: found {bad} of {len(samples)} with numbers that are not finite: the model or its sampler diverges"
            )
        return self.decoder.clamp(samples).cpu()

    def noises(self, seed: int, stream: str, ids: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
        """(the initial noise [n,*S] of samples `ids` [n], step -> the fresh noise that is added after it): functions of
        (seed, stream, i), both."""
        shape, device = self.denoiser.sample_shape, self.device

        def fresh(step: int) -> Tensor:
            return sample_noise(seed, f"{stream}/renoise{step}", ids, shape).to(device)

        return sample_noise(seed, stream, ids, shape).to(device), fresh


def _time_of(process: Process, count: int) -> float | None:
    """The time at which `count` positions are data; None where there is none."""
    try:
        return process.known_time(count)
    except ValueError:
        return None
