"""The updates that a method declares. Optimizers, freezing, clipping, checkpoint keys and log names are derived from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from distill.data.batch import Batch
from distill.data.rng import Draws, stream_key
from distill.engine.ema import decay_at, halflife_decay
from distill.engine.networks import seeded
from distill.engine.params import Trainable


class Loss(NamedTuple):
    """A scalar to descend and scalars to log (detached or not; read only when logged)."""

    total: Tensor
    logs: Mapping[str, Tensor] = {}


@dataclass
class Step:
    """One micro batch of one iteration, passed to a loss.

    `draws` gives this update's randomness for the micro batch. `shared` holds what one update leaves for the later ones of
    the iteration on the same micro batch: tensors, a `Cond` (DMD2's fake update reuses the generator's detached images and
    their conditions). `part` numbers the parts of the global batch (micro batches of all processes)."""

    iteration: int
    draws: Draws
    shared: dict[str, Any] = field(default_factory=dict)
    part: int = 0

    def same_dropout(self, name: str = "dropout") -> AbstractContextManager[None]:
        """Inside, dropout begins with the same numbers each time: two calls of one net on batches of one shape, each in a
        context of its own, drop the same units. A function of (seed, stream, step, name, part), so that a resumed run drops
        what an uninterrupted one does."""
        draws = self.draws
        key = stream_key(draws.seed, draws.stream, draws.step, name, self.part)
        return seeded(draws.index.device, key)


LossFunction = Callable[[Batch, Step], Loss]
BeforeFunction = Callable[[Sequence[Batch], Sequence[Step]], None]


@dataclass(frozen=True)
class Update:
    """One optimizer step of an iteration.

    Attributes:
        name: names the update in logs, and its entry in the `optim` config.
        trains: role -> what receives gradients: a network (what its `trained()` returns, else all parameters), or
            (network, parameters) for a part of one, such as a head. Everything else is frozen during this update.
        loss: (micro batch, step) -> Loss.
        every, start: the update runs at iterations start, start + every, start + 2 every, ...
        before: called once before the losses, with all micro batches of this process and their steps: for a loss of the
            whole batch, whose gradient at each sample is found first and left in `Step.shared`.
        mode: "train", or "eval" for networks without dropout also while they are trained.
    """

    name: str
    trains: Mapping[str, Trainable]
    loss: LossFunction
    every: int = 1
    start: int = 0
    before: BeforeFunction | None = None
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        if self.mode not in ("train", "eval"):
            raise ValueError(f"update {self.name!r}: mode: found {self.mode!r}, expected 'train' or 'eval'")
        if self.every < 1 or self.start < 0:
            raise ValueError(
                f"update {self.name!r}: every >= 1 and start >= 0 expected, found {self.every}, {self.start}"
            )
        if not self.trains:
            raise ValueError(f"update {self.name!r}: trains no network")

    def runs_at(self, iteration: int) -> bool:
        """Whether the update runs at this iteration."""
        return iteration >= self.start and (iteration - self.start) % self.every == 0

    def runs_before(self, iteration: int) -> int:
        """How often the update has run when `iteration` begins."""
        return max(0, -(-(iteration - self.start) // self.every))

    def iterations_for(self, steps: int) -> int:
        """Iterations after which this update has run `steps` times."""
        return 0 if steps == 0 else self.start + (steps - 1) * self.every + 1


@dataclass(frozen=True)
class Average:
    """A further moving average of a trained network, with a schedule of its own: a target network (mean teacher).

    The average that is evaluated and exported is `Optim.ema`. This one is sharded and saved like it, under its name in
    `DistillModule.ema`.

    Attributes:
        of: role of the network that it follows.
        decay: optimizer step (from 0) -> share of the old average that is kept.
    """

    of: str
    decay: Callable[[int], float]


class Diagnostics(NamedTuple):
    """Diagnostics of a method at an evaluation: scalars to log, and rows (label, images [n,*S]) of a picture."""

    scalars: Mapping[str, Tensor] = {}
    rows: Sequence[tuple[str, Tensor]] = ()


@dataclass(frozen=True)
class Optim:
    """Settings of one optimizer.

    Attributes:
        optimizer: parameters -> torch optimizer (a partial of, say, torch.optim.AdamW with fused=True).
        schedule: step (from 0) -> factor on the learning rate.
        clip: largest gradient norm over all parameters of the update, or None.
        ema: decay of the exponential moving average of the trained weights, or None for no average.
        ema_halflife: half-life of that average in images instead (`ema` then has no meaning): the same for every batch size.
        ema_ramp: use min(ema, (1 + n) / (10 + n)) at step n, so that the average forgets the start; of a half-life, at most
            a twentieth of the images so far.
    """

    optimizer: Callable[[Any], Any]
    schedule: Callable[[int], float]
    clip: float | None = 1.0
    ema: float | None = 0.999
    ema_ramp: bool = True
    ema_halflife: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optim.clip: expected a positive norm or null, found {self.clip}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"optim.ema: expected a decay in [0, 1) or null, found {self.ema}")
        if self.ema_halflife is not None and self.ema_halflife < 0:
            raise ValueError(
                f"optim.ema_halflife: expected images, at least 0, or null, found {self.ema_halflife}"
            )

    @property
    def averaged(self) -> bool:
        """Whether an average is kept."""
        return self.ema is not None or self.ema_halflife is not None

    def decay_at(self, step: int, images: int) -> float:
        """Decay of the average after optimizer step `step` (from 0), each of `images` images."""
        if self.ema_halflife is not None:
            return halflife_decay(step * images, images, self.ema_halflife, 0.05 if self.ema_ramp else None)
        assert self.ema is not None
        return decay_at(step, self.ema, self.ema_ramp)
