"""Loggers and profilers of a training: Lightning's own, with what a stage gives them, and the record that is always kept."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from distill.engine.hooks import check_callback_hooks
from distill.engine.logging import lines_of, read_entries
from distill.files import append_text, make_folder, write_text
from distill.typed import unknown_key

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
# What a stage gives a W&B run, so that a continued stage continues the same run.
GIVEN = ("id", "resume", "version")
# What WandbLogger passes on to `wandb.init`, as far as a recipe may say it.
WANDB_INIT = (
    *("entity", "group", "job_type", "tags", "notes", "config", "mode", "settings", "save_code"),
    *("allow_val_change", "sync_tensorboard", "config_exclude_keys", "config_include_keys"),
)

OFFLINE = ("offline", "dryrun")  # values of WANDB_MODE; Lightning sets the second one


class Jsonl(Logger):
    """One JSON object a line in `folder/metrics.jsonl` (null for what is not finite). On resume, entries after the
    checkpoint are dropped, so that no step is there twice.

    Entries of the training itself hold their "step", the number of student steps so far. Those of callbacks have the number
    that the callback gives: Lightning's callbacks count from 0, so their entry `n` is logged after the checkpoint of step `n`,
    others log it before. It is kept on resume, and replaced when it is logged again."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.repeatable: list[
            dict[str, Any]
        ] = []  # entries with the number of the step that training resumed from

    @property
    def name(self) -> str:
        """Names no folder of its own."""
        return ""

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    @property
    def save_dir(self) -> str:
        """Where the file is."""
        return str(self.folder)

    def resume(self, step: int) -> None:
        """Keep the entries up to `step`. Raises ValueError where the file holds something else, see `read_entries`."""
        kept = [entry for entry in read_entries(self.path) if entry["step"] <= step]
        write_text(self.path, lines_of(kept))
        self.repeatable = [entry for entry in kept if entry["step"] == step]

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one entry."""
        plain = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        entry = plain if "step" in plain else {"step": step or 0, **plain}
        again = [
            old for old in self.repeatable if old["step"] == entry["step"] and old.keys() == entry.keys()
        ]
        if again:
            self.repeatable.remove(again[-1])
            write_text(self.path, lines_of(old for old in read_entries(self.path) if old != again[-1]))
        append_text(self.path, lines_of([entry]))

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """The stage's `config.yaml` holds them."""


def wandb_id(folder: Path) -> str:
    """The id of the W&B run of a stage, from `folder/wandb_id`; the first call draws one."""
    path = folder / "wandb_id"
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    found = path.read_bytes().strip() if path.is_file() else b""
    if re.fullmatch(rb"[0-9a-f]{8}", found) is None:
        raise ValueError(f"{path}: found {found[:20]!r}, expected 8 hexadecimal digits")
    return found.decode()


def check(kind: type, target: Callable[..., Any], config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless `config` names a class of Lightning's `kind`, or ImportError where it needs a package that is
    not installed."""
    if not (isinstance(target, type) and issubclass(target, kind)):
        raise ValueError(
            f"{where}._target_: found {config['_target_']!r}, expected a subclass of {kind.__module__}.{kind.__name__}"
        )
    if not issubclass(target, WandbLogger):
        return
    if given := [key for key in GIVEN if key in config]:
        raise ValueError(
            f"{where}.{given[0]}: is given by the stage, which continues its own run; leave it out"
        )
    known = [*(name for name in _options(target) if name not in GIVEN), *WANDB_INIT]
    if unknown := [key for key in config if key != "_target_" and key not in known]:
        raise ValueError(unknown_key(where, unknown[0], known))
    if importlib.util.find_spec("wandb") is None:
        raise ImportError("loggers=wandb needs the extra: pip install 'distill[wandb]'")


def check_logger(target: Callable[..., Any], config: Mapping[str, Any], where: str) -> None:
    """`check` for a logger."""
    check(Logger, target, config, where)


def check_callback(target: Callable[..., Any], config: Mapping[str, Any], where: str) -> None:
    """`check` for a callback."""
    check(Callback, target, config, where)
    check_callback_hooks(cast(type[Callback], target), where)


def check_profiler(target: Callable[..., Any], config: Mapping[str, Any], where: str) -> None:
    """`check` for a profiler."""
    check(Profiler, target, config, where)


def _options(target: type) -> list[str]:
    parameters = inspect.signature(target).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def stage_options(
    target: type, folder: Path, settings: Mapping[str, Any], names: Mapping[str, Any]
) -> dict[str, Any]:
    """Options that a stage gives a logger or profiler which does not set them itself: the folder for its files, and for W&B
    `names` (name, group, job_type, tags) and a run id that is written there before the first step. W&B is offline unless
    WANDB_API_KEY or WANDB_MODE is set, so that a batch job never waits for a prompt."""
    known = _options(target)
    found: dict[str, Any] = {name: str(folder) for name in ("save_dir", "dirpath") if name in known}
    if issubclass(target, WandbLogger):
        mode = os.environ.get("WANDB_MODE")
        offline = mode in OFFLINE or (not mode and "WANDB_API_KEY" not in os.environ)
        found |= {"id": wandb_id(folder), "resume": "allow", "offline": offline, "config": dict(settings)}
        found |= names
    return found


def profiler_named(name: str, folder: Path) -> Profiler:
    """One of `PROFILERS`, which writes its table to `folder`."""
    made: Profiler = PROFILERS[name](dirpath=str(folder), filename="profile")
    return made


def opened(logger: Logger) -> Logger:
    """A logger that is ready. A W&B run is begun now, before training, and drawn over images; where that fails online, it is
    begun offline, with a warning."""
    if isinstance(logger, WandbLogger):
        _begun(logger).define_metric("*", step_metric="images")
    return logger


def _begun(logger: WandbLogger) -> Any:
    import wandb

    if not logger._offline:
        try:
            return logger.experiment
        except (wandb.Error, OSError) as error:  # no network, no account, no answer in time
            why = " ".join(str(error).split())
            warnings.warn(
                f"loggers: W&B cannot be reached ({why}); this run is logged offline in {logger.save_dir}/wandb; "
                "`wandb sync` uploads it",
                stacklevel=3,
            )
        logger._offline, logger._experiment = True, None
        logger._wandb_init["mode"] = "offline"
    _supersede(logger)
    return logger.experiment


def _supersede(logger: WandbLogger) -> None:
    """Move earlier offline runs of this id to `wandb/superseded`: `replay` logs all that they hold into the new one."""
    folder = Path(logger.save_dir or ".") / "wandb"
    for old in sorted(folder.glob(f"offline-run-*-{logger._id}")):
        make_folder(folder / "superseded")
        old.rename(folder / "superseded" / old.name)


def replay(loggers: Sequence[Logger]) -> None:
    """Log the entries of metrics.jsonl into offline W&B runs. These begin empty, and W&B may not have written the last entries
    of a process that was killed."""
    records = [logger for logger in loggers if isinstance(logger, Jsonl)]
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._offline:
            for entry in (entry for record in records for entry in read_entries(record.path)):
                found = {name: value for name, value in entry.items() if value is not None}
                logger.log_metrics(found, step=entry["step"])


def summarize(loggers: Iterable[Logger], facts: Mapping[str, Any]) -> None:
    """The facts of a stage as the summary of its W&B run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(dict(facts))


def log_evaluation(logger: Logger, rows: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """The rows of an evaluation as a table of a W&B run, and its picture, where it has one."""
    assert isinstance(logger, WandbLogger)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    logger.log_table("rows", columns=columns, data=[[row.get(name) for name in columns] for row in rows])
    if picture.is_file():
        logger.log_image("grid", [str(picture)])


def has_tables(target: Callable[..., Any]) -> bool:
    """Whether evaluations are logged to a logger of this class."""
    return isinstance(target, type) and issubclass(target, WandbLogger)


def close(loggers: Iterable[Logger]) -> None:
    """End W&B runs: the next stage's logger would go on with a run that is open."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish()
