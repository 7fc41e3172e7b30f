"""A sampler as numbers: every sampler here but rk45 is linear in its noise and in the outputs of the network."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.conditions import Nothing
from distill.models.decoder import Points
from distill.models.families.flux import Flux
from distill.models.generator import Generator
from distill.models.lora_files import network_in
from distill.nets.net import Net


@dataclass(frozen=True)
class Program:
    """Calls of a diffusers network.

    Attributes:
        times: of the calls, in the unit of the pipeline's timesteps. first: the first input is `first` times the noise z.
        rows: after each call, (of z, of the outputs so far, of the fresh noises so far): their sum is the next input, after
            the last call the sample.
    """

    times: list[float]
    first: float
    rows: list[tuple[float, list[float], list[float]]]


class _Probe(Net):
    """In place of the network: output i is the unit vector 1 + i."""

    def __init__(self, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.times: list[float] = []
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        made = torch.zeros_like(x)
        made[:, 1 + len(self.times)] = 1
        self.times.append(self.time_scale * float(t[0]))
        self.inputs.append(x[0])
        return made


def program(generator: Generator) -> Program | None:
    """The calls of a model's sampler with its default steps; None for "rk45", whose steps depend on the samples."""
    model, spec = generator.denoiser, generator.spec
    _, core = network_in(model.net)
    assert core is not None
    if spec.mode == "ode" and spec.solver == "rk45":
        return None
    most = 4 * spec.steps + 4  # calls of "heun" and of predictor and corrector
    probe = _Probe(1000.0 if isinstance(core, Flux) else core.time_scale)
    net: nn.Module = copy.deepcopy(model.net, {id(core): probe})
    shape = (1 + most + spec.steps,)
    stub = model.with_(net=net, sample_shape=shape, conditions=Nothing(), guidable=False, decoder=Points())
    basis = torch.eye(shape[0], dtype=torch.float64)
    plain = replace(spec, guidance_scale=1.0)
    with torch.no_grad():
        made = Generator(stub, plain).generate(basis[:1], Cond.nothing(1), noise=basis[1 + most :, None])[0]
    rows = []
    for i, state in enumerate([*probe.inputs[1:], made]):
        outputs, noises = state[1 : 2 + i].tolist(), state[1 + most :].tolist()
        while noises and noises[-1] == 0:
            noises.pop()
        rows.append((float(state[0]), outputs, noises))
    return Program(probe.times, float(probe.inputs[0][0]), rows)


SCRIPT = '''"""Samples this folder exactly as it was trained, with plain diffusers. No stock scheduler takes these steps.

    from diffusers import DiffusionPipeline
    from pipeline import ExactScheduler  # this file

    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.scheduler = ExactScheduler()
    images = pipe({call}).images
"""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config

TIMES = {times}
FIRST = {first}  # the network's first input is this times the noise
# After each call, factors of the noise, of the outputs so far and of the fresh noises so far, whose sum is the next input.
ROWS = {rows}


class ExactScheduler(SchedulerMixin, ConfigMixin):
    order = 1
    init_noise_sigma = FIRST

    @register_to_config
    def __init__(self):
        self.set_timesteps()

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        self.timesteps = torch.tensor(TIMES, device=device)
        self.start, self.outputs, self.noises = None, [], []

    def set_begin_index(self, index=0):
        pass

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **ignored):
        if self.start is None:
            self.start = sample.float() / FIRST
        of_start, of_outputs, of_noises = ROWS[len(self.outputs)]
        self.outputs.append(model_output.float())
        while len(self.noises) < len(of_noises):
            device = model_output.device if generator is None else generator.device
            noise = torch.randn(sample.shape, generator=generator, device=device)
            self.noises.append(noise.to(model_output.device))
        made = of_start * self.start
        for factor, term in [*zip(of_outputs, self.outputs), *zip(of_noises, self.noises)]:
            made = made + factor * term
        made = made.to(sample.dtype)
        return Step(made) if return_dict else (made,)


class Step:
    def __init__(self, prev_sample):
        self.prev_sample = prev_sample
'''


def script(made: Program, call: str) -> str:
    """pipeline.py for a folder of diffusers. `call`: arguments of the pipeline as Python."""
    rows = "[\n" + "".join(f"    {json.dumps(row)},\n" for row in made.rows) + "]"
    return SCRIPT.format(call=call, times=made.times, first=made.first, rows=rows)
