"""Shards that cannot be read in any order (URLs, `pipe:` commands), as a stream that is sampled with replacement."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.decode import to_float
from distill.data.folder import size_of
from distill.data.members import Members
from distill.data.rng import stream_key
from distill.data.shard_index import braces


class Resampled:
    """Images with classes from shards that the `webdataset` package opens: URLs, or commands such as `pipe:cat x.tar`.

    **Not exact**: every process and worker draws shards with replacement and mixes their samples in a buffer. An epoch may
    have a sample several times or never, a training that is continued reads other samples, and so does one with another
    number of processes or workers. Use `Shards` where the files can be copied to a disk. Broken samples raise an error.

    Args:
        shards: patterns as in `Shards`.
        image, label, num_classes, channels: see `Members`. Captions need files: their encoding is stored by sample.
        resolution: a side or [H, W], to which all images are cropped and resized.
        samples: the nominal length of an epoch.
        buffer: samples of the buffer.
        revision: a name of the data's content, which nothing can check: change it when the shards change.

    Raises:
        ValueError: names the option, or the sample.
        ImportError: without the package: `pip install "distill[webdataset]"`.
    """

    name = "webdataset_stream"
    value_range = (-1.0, 1.0)
    reads_files = True

    def __init__(
        self,
        shards: str | Sequence[str],
        resolution: int | Sequence[int],
        samples: int,
        image: str = "jpg;jpeg;png;webp",
        label: str | None = None,
        num_classes: int = 0,
        channels: int = 3,
        buffer: int = 1000,
        revision: str = "",
    ) -> None:
        self.members = Members(image, None, label, num_classes, channels)
        size = size_of(resolution)
        if size is None:
            raise ValueError(
                "resolution: found null, expected a side or [height, width]: samples are not looked at first"
            )
        for name, value in (("samples", samples), ("buffer", buffer)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: found {value!r}, expected an integer of at least 1")
        patterns = [shards] if isinstance(shards, str) else list(shards)
        if not patterns or not all(patterns):
            raise ValueError(f"shards: found {shards!r}, expected URLs or pipe: commands")
        try:
            self.shards = [name for pattern in patterns for name in braces(pattern)]
        except ValueError as error:
            raise ValueError(f"shards: {error}") from error
        self._size, self.samples, self.buffer, self.revision = size, samples, buffer, revision
        self.sample_shape, self.num_classes = (channels, *size), num_classes
        self._stream: Iterator[dict[str, Any]] | None = None
        warnings.warn(
            "data: webdataset_stream samples with replacement and is not exact: an epoch may have a sample several times or "
            "never, and a training that is continued reads other samples",
            stacklevel=2,
        )

    def __len__(self) -> int:
        return self.samples

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """The next samples of this worker's stream; `rows` only begin it, so that processes and restarts have other ones."""
        if self._stream is None:
            worker = get_worker_info()
            self._stream = self._opened(
                stream_key(int(rows[0]), int(index[0]), 0 if worker is None else worker.id)
            )
        found = [self._decoded(next(self._stream)) for _ in range(len(rows))]
        x0 = to_float(torch.stack([pixels for pixels, _ in found]))
        labelled = self.members.label is not None
        cond = Cond.of_labels([label for _, label in found]) if labelled else Cond.nothing(len(rows))
        return Batch(ids=rows, index=index, cond=cond, x0=x0)

    def fingerprint(self) -> str:
        """A digest of the patterns, the revision and the options: what is behind a URL is not read."""
        content = [self.shards, vars(self.members), self._size, self.samples, self.buffer, self.revision]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _opened(self, seed: int) -> Iterator[dict[str, Any]]:
        try:
            import webdataset
        except ImportError as error:
            raise ImportError(
                'data=webdataset_stream needs the package webdataset: pip install "distill[webdataset]"'
            ) from error
        seed %= 2**31
        return iter(
            webdataset.DataPipeline(
                webdataset.ResampledShards(self.shards, seed=seed, worker_seed=lambda: 0, deterministic=True),
                webdataset.tarfile_to_samples(),
                webdataset.shuffle(self.buffer, initial=min(self.buffer, 100), seed=seed),
            )
        )

    def _decoded(self, sample: dict[str, Any]) -> tuple[Tensor, int]:
        where = f"{sample.get('__url__', self.shards[0])}: {sample['__key__']}"
        content = {name.lower(): value for name, value in sample.items() if isinstance(value, bytes)}
        label = 0 if self.members.label is None else self.members.number(content, where)
        return self.members.pixels(content, self._size, where), label

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None}
