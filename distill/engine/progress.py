"""Progress of a training, in units that do not depend on accumulation and world size."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Progress:
    """`iteration`: passes of the loop (they key the random draws); `step`: optimizer steps of the student;
    `images`: samples that the student's updates consumed; `seconds`: time spent training, over all
    interruptions."""

    iteration: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """JSON-able form."""
        return asdict(self)
