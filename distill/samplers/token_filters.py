"""From the logits of an autoregressive model to the probabilities that are sampled: guidance of each group of tokens,
temperature, top-k and top-p, in this order, under one convention.

The public samplers agree up to their names: LlamaGen's `top_p=1` and VAR's `top_p=0` are off (`null` here); VAR's guidance
(1 + s) c - s u with s = cfg k / (K - 1) in group k of K is the schedule "linear" of the guidance scale 1 + cfg; LlamaGen's
`cfg_interval=i` is `guided_groups: i + 1`. Of tokens at the threshold of top-k all are kept, and of top-p the token that
crosses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.process.base import at_least_float32


@dataclass(frozen=True)
class Filters:
    """How tokens are drawn from logits.

    Attributes:
        temperature: logits are divided by it; 0 keeps the most likely token alone.
        top_k: keep the k most likely tokens; null or 0: all. More than there are means all.
        top_p: keep the most likely tokens up to this mass, in (0, 1]; null: all.
        guidance_schedule: guidance of group k of K: "constant" g, or "linear" 1 + (g - 1) k / (K - 1) (VAR).
        guided_groups: groups after the first so many are not guided; null: all are.

    Raises:
        ValueError: names the option.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_schedule: Literal["constant", "linear"] = "constant"
    guided_groups: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature: found {self.temperature}, expected at least 0 (0: the most likely token)"
            )
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k: found {self.top_k}, expected at least 1, or null or 0 for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: found {self.top_p}, expected a share in (0, 1], or null for all tokens")
        if self.guided_groups is not None and self.guided_groups < 0:
            raise ValueError(f"guided_groups: found {self.guided_groups}, expected at least 0, or null")
        if self.guidance_schedule not in ("constant", "linear"):
            raise ValueError(
                f"guidance_schedule: found {self.guidance_schedule!r}, expected 'constant' or 'linear'"
            )

    def scales(self, guidance_scale: float, groups: int) -> list[float]:
        """The guidance scale of each group."""
        found = [guidance_scale] * groups
        if self.guidance_schedule == "linear":
            found = [1 + (guidance_scale - 1) * k / max(groups - 1, 1) for k in range(groups)]
        guided = groups if self.guided_groups is None else self.guided_groups
        return [scale if k < guided else 1.0 for k, scale in enumerate(found)]

    def log_probs(self, logits: Tensor) -> Tensor:
        """Logits [..., V] -> log probabilities [..., V] in float32 at least, -inf for tokens that are removed."""
        logits = at_least_float32(logits)
        if self.temperature == 0:
            first = torch.zeros_like(logits, dtype=torch.bool).scatter(
                -1, logits.argmax(-1, keepdim=True), True
            )
            return torch.zeros_like(logits).masked_fill(~first, -torch.inf)
        logits = logits / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, places = logits.sort(dim=-1, descending=True)
            mass = ordered.softmax(-1)
            before = mass.cumsum(-1) - mass  # of the tokens before each
            removed = (before > self.top_p).scatter(-1, places, before > self.top_p)
            logits = logits.masked_fill(removed, -torch.inf)
        return logits.log_softmax(-1)

    def words(self, guidance_scale: float = 1.0) -> str:
        """All that changes probabilities, for cards and messages: "guidance 2, temperature 1, top-k 900, top-p off"."""
        guidance = f"guidance {guidance_scale:g}"
        if guidance_scale != 1 and self.guidance_schedule != "constant":
            guidance += f" ({self.guidance_schedule})"
        if guidance_scale != 1 and self.guided_groups is not None:
            guidance += f" in the first {self.guided_groups} groups"
        top_p = "off" if self.top_p is None else f"{self.top_p:g}"
        return f"{guidance}, temperature {self.temperature:g}, top-k {self.top_k or 'off'}, top-p {top_p}"


def check_logits(logits: Tensor, where: str = "logits") -> None:
    """Raise ValueError for NaN or +inf, or for a position of logits [B,n,V] without any token left; -inf is legal."""
    bad = (logits.isnan() | (logits == torch.inf)).any(-1)
    if bool(bad.any()):
        batch, position = bad.nonzero()[0].tolist()
        raise ValueError(f"{where}: found NaN or +inf at sample {batch}, position {position}")
    gone = (logits == -torch.inf).all(-1)
    if bool(gone.any()):
        position = gone.nonzero()[0].tolist()[1]
        raise ValueError(f"{where}: no token left after top-k/top-p at position {position}")
