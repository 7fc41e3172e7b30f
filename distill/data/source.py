"""The protocol of training data, and the loader of training steps."""

from __future__ import annotations

import atexit
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_all_start_methods
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.arguments import integer
from distill.data.batch import Batch
from distill.data.machine import available_cores
from distill.data.order import Order

WORKERS = 4  # of sources that read files
T = TypeVar("T")


class Source(Protocol):
    """Samples that can be fetched by row number in any order.

    To build a fresh model of the samples, a source also needs `value_range`, (-1, 1) for images or None for samples without a
    range, or a `decoder` (`models.decoder`). Conditions other than labels are in the attribute `conditions`
    (`models.conditions`). A method `order(seed, stream)` with `at(start, count)` replaces `Order`; `reads_files` says that
    fetching takes long and workers pay."""

    sample_shape: tuple[int, ...]
    num_classes: int  # 0: no labels

    def __len__(self) -> int: ...

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Return the samples at `rows` [B] (0 .. len-1); `index` [B] are their positions in the global batch."""

    def fingerprint(self) -> str:
        """Return a digest of everything that the samples depend on."""


@runtime_checkable
class Replacing(Protocol):
    """A source that reads other samples in place of broken ones, and counts them."""

    replaced: int


def replaced_in(source: Source) -> int:
    """The broken samples of a source that others were read for in this process and its finished workers; 0 without a count."""
    return source.replaced if isinstance(source, Replacing) else 0


def decoded(source: Any) -> Any:
    """Return the data to compare decoded samples with: for latents the encoded images (attribute `decoded`), else `source`."""
    return getattr(source, "decoded", source)


class StepLoader:
    """Yields this process's list of `accumulate` micro batches for each iteration in [`start`, `stop`).

    The global batch of iteration i has the positions [i * batch_size, (i + 1) * batch_size) of the order, which is
    `source.order(seed, stream)` where the source brings one, else `Order`. It is split into `accumulate` micro batches, and
    each of these into `world` equal parts, so its samples depend neither on the split nor on the workers.

    Args:
        workers: processes that fetch; 0: this one; None: see `workers_for`.
        prefetch: iterations that each worker fetches ahead.
        pin: whether workers' batches are put into page-locked memory.

    A source that is `Replacing` counts the samples of its workers too.

    Raises:
        ValueError: unless `batch_size` is a multiple of accumulate * world; names `workers` or `prefetch`.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        stream: str,
        start: int,
        stop: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int | None = 0,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(
                f"batch_size: found {batch_size}, which cannot be split into accumulate={accumulate} "
                "micro batches "
                f"on {world} processes; expected a multiple of {accumulate * world}"
            )
        self.workers = workers_for(source, workers)
        self.prefetch, self.pin = integer("prefetch", prefetch, at_least=1), pin
        own, name = getattr(source, "order", None), f"{stream}/order"
        self.order = Order(len(source), seed, name) if own is None else own(seed, name)
        self.source, self.batch_size = source, batch_size
        self.start, self.stop, self.accumulate, self.rank, self.world = start, stop, accumulate, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def batches(self, iteration: int) -> list[Batch]:
        """The micro batches of one iteration."""
        index = torch.arange(self.batch_size, device="cpu").view(self.accumulate, self.world, -1)
        rows = self.order.at(iteration * self.batch_size, self.batch_size)
        return [self.source.fetch(rows[part], part) for part in index[:, self.rank]]

    def __iter__(self) -> Iterator[list[Batch]]:
        numbers = range(self.start, self.stop)
        return prefetched(
            self.batches, numbers, self.source, workers=self.workers, prefetch=self.prefetch, pin=self.pin
        )


def workers_for(source: Source, workers: int | None) -> int:
    """The number of workers: None stands for `WORKERS`, at most one a core, where `source.reads_files`, else 0."""
    if workers is None:
        return min(WORKERS, available_cores()) if getattr(source, "reads_files", False) else 0
    return integer("workers", workers, at_least=0)


def prefetched(
    make: Callable[[Any], T], items: Sequence[Any], source: Source, *, workers: int, prefetch: int, pin: bool
) -> Iterator[T]:
    """Yield `make(item)` for each item in order, made ahead in worker processes; what `make` replaces in its copy of
    `source` is counted in this one."""
    if not workers or not len(items):
        yield from (make(item) for item in items)
        return
    with warnings.catch_warnings():
        # Python warns of forks beside threads, and torch of more workers than cores. Workers keep these filters.
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loaded: Any = iter(
            DataLoader(
                _Made(make, items, source),
                batch_size=None,
                shuffle=False,
                num_workers=workers,
                prefetch_factor=prefetch,
                pin_memory=pin,
                collate_fn=_same,
                generator=torch.Generator("cpu"),  # else it draws from the global one
                worker_init_fn=_begin_worker,
                multiprocessing_context="fork" if "fork" in get_all_start_methods() else None,
            )
        )
    _open.add(loaded)
    try:
        for made, replaced in loaded:
            if isinstance(source, Replacing):
                source.replaced += replaced
            yield made
    finally:
        loaded._shutdown_workers()


_open: WeakSet[Any] = WeakSet()  # iterators with workers


@atexit.register
def _end_workers() -> None:
    """End workers of iterators that were left open: they ignore the signal with which Python would end them, and wait for."""
    for loaded in list(_open):
        loaded._shutdown_workers()


class _Made(Dataset):
    """What `make` makes of each item, with the number of samples that were replaced in it."""

    def __init__(self, make: Callable[[Any], Any], items: Sequence[Any], source: Source) -> None:
        self.make, self.items, self.source = make, items, source

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        before = replaced_in(self.source)
        made = self.make(self.items[number])
        return made, replaced_in(self.source) - before


def _same(item: Any) -> Any:
    return item


def _begin_worker(number: int) -> None:
    """Workers end with their loader: a Ctrl-C, or a signal of a scheduler to all processes, is for the training process."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
