"""The interface of every model: all that caches, stages, evaluation, exporters and the engine use of one."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.adapters import trained_parameters
from distill.models.boundary import Boundary
from distill.models.conditions import Conditions
from distill.models.decoder import Decoder
from distill.models.guidance import check_guidance_scale
from distill.models.spec import SamplerSpec
from distill.nets.layers import embeds_guidance
from distill.nets.net import Net
from distill.process.base import Process

COUPLINGS = ("independent", "paired", "endpoint", "few_step")
LARGEST_SAMPLE = 2**26  # numbers; an image of 8 megapixels has 2**25


class Model(nn.Module, ABC):
    """A deterministic transport from Gaussian noise to data, and a prediction of the data at every noise level.

    Its constructor's arguments are attributes of the same names, and the entries of `config`.

    Attributes:
        net: the network, whose parameters are the model's. kind: what its output is: a prediction ("x0", "eps", "v",
            "velocity"), or "logits" of tokens.
        boundary: turns the predicted x0 into a consistency function; None: none is needed.
        column: what a pair cache stores of its samples: "x0", or "tokens" where all samples are codes of the decoder's
            codebook.
        embeds_guidance: whether the net takes the guidance w as an input (`guidance_w` of `Cond`).
        completes: whether `transport` takes `known`, the first part of the samples.
        sample_shape: S of noise, data and every state between them.
        process: the noise process of its states.
        conditions: what it is conditioned on.
        decoder: turns samples into data: images, points, or images from latents. No submodule: its weights are
            never trained, averaged or sharded with the model's.
        coupling: which pairs of noise and data it was trained on: "independent" (its velocity is a score in other
            coordinates), "paired" (reflow; it has no score), "endpoint" (a one-step student, valid at t_max alone) or
            "few_step" (valid at its sampler's times alone).
        guidable: trained with dropped conditions, so guidance scales other than 1 make sense.
        sampler: the sampler of its model file; None for models that were not loaded.

    Raises:
        ValueError: names `sample_shape` or `coupling`.
    """

    sampler: SamplerSpec | None = None
    column: ClassVar[Literal["x0", "tokens"]] = "x0"
    kind: str = "x0"
    boundary: Boundary | None = None
    completes: ClassVar[bool] = False

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        sample_shape: Sequence[int],
        conditions: Conditions,
        decoder: Decoder,
        coupling: str,
        guidable: bool,
    ) -> None:
        super().__init__()
        shape = tuple(sample_shape)
        if not shape or min(shape) < 1 or math.prod(shape) > LARGEST_SAMPLE:
            raise ValueError(
                f"sample_shape: found {list(shape)}, expected positive sizes of at most {LARGEST_SAMPLE} numbers in all"
            )
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling: found {coupling!r}, expected one of {list(COUPLINGS)}")
        decoder.shape(shape)  # raises for samples that it does not decode
        self.process, self.sample_shape, self.conditions, self.decoder = process, shape, conditions, decoder
        self.coupling, self.guidable = coupling, guidable
        self.net = net
        # Once: guided predictions ask at every call, and a large net has thousands of modules.
        self.embeds_guidance = embeds_guidance(net)

    @abstractmethod
    def transport(
        self,
        z: Tensor,
        cond: Cond | None = None,
        *,
        solver: str = "euler",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        grid: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> Tensor:
        """Noise z [B,*S] -> [K,B,*S]: the states at `times`, or with K = 1 the data alone."""

    @abstractmethod
    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """Predicted data [B,*S] of states x_t [B,*S] at times t."""

    @abstractmethod
    def calls(self, solver: str, steps: int, guidance_scale: float = 1.0) -> int | None:
        """Network calls that `transport` makes for a sample; None where the solver chooses."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the net's output for one sample."""
        return self.sample_shape

    def net_config(self) -> dict[str, Any]:
        """What `models.build.build_net` makes the net from. Raises ValueError for a net that keeps no config."""
        if not isinstance(self.net, Net):
            raise ValueError(
                f"net: {type(self.net).__name__} keeps no config; expected a subclass of distill.nets.net.Net"
            )
        return self.net.config()

    def config(self) -> dict[str, Any]:
        """What `models.build.build_model` makes the same model from, without its weights, in plain containers; classes with
        further arguments write it anew. Raises like `net_config`."""
        return {
            "_target_": f"{type(self).__module__}.{type(self).__qualname__}",
            "net": self.net_config(),
            "sample_shape": list(self.sample_shape),
            "conditions": self.conditions.config(),
            "decoder": self.decoder.config(),
            "coupling": self.coupling,
            "guidable": self.guidable,
        }

    def with_(self, **meaning: Any) -> Self:
        """The same net, shared and not copied, with another meaning; `self` stays as it is.

        meaning: constructor arguments to change; None for one that the class does not have."""
        names = [*inspect.signature(type(self)).parameters]
        meaning = {name: value for name, value in meaning.items() if name in names or value is not None}
        other = type(self)(**({name: getattr(self, name) for name in names} | meaning))
        other.sampler, other.training = self.sampler, self.training
        return other

    def transport_settings(self) -> dict[str, Any] | None:
        """What samples of `transport` depend on beside the weights and its arguments, for the record of pairs; None:
        nothing."""
        return None

    def check_transport(self, guidance_scale: float = 1.0, solver: str | None = None) -> None:
        """Raise ValueError where `transport` has no ODE to solve, or not with this guidance or solver."""
        if self.coupling in ("endpoint", "few_step"):
            student = (
                "one-step student, valid only at t_max"
                if self.coupling == "endpoint"
                else "few-step student, valid only at its sampler's times"
            )
            raise ValueError(f"coupling: found {self.coupling!r}, a {student}; expected an ODE model")
        check_guidance_scale(self.guidable, guidance_scale)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name: all, or of an adapted net those of the adapter."""
        return {f"net.{name}": p for name, p in trained_parameters(self.net).items()}
