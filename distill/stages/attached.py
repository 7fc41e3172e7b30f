"""What a recipe attaches to its trainings: loggers, callbacks and a profiler of Lightning's, or subclasses of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from distill.files import make_folder
from distill.stages.base import StageContext
from distill.stages.targets import check_options, resolve
from distill.typed import parse

# Classes of earlier versions, and what does their work now.
REPLACED = {"distill.engine.logging.Wandb": "lightning.pytorch.loggers.WandbLogger"}


def check_attached(loggers: Any, callbacks: Any, profiler: Any) -> None:
    """Raise ValueError unless the configs name classes of Lightning's kinds and options that they take. Callbacks and
    profilers are built once: what their constructors refuse is found while planning."""
    for number, config in enumerate(parse(list[dict[str, Any]], loggers or [], "loggers")):
        _check("logger", config, f"loggers[{number}]")
    for number, config in enumerate(parse(list[dict[str, Any]], callbacks or [], "callbacks")):
        _check("callback", config, f"callbacks[{number}]")
        _try(config, {}, f"callbacks[{number}]")
    if isinstance(profiler, Mapping):
        _check("profiler", profiler, "trainer.profiler")
        with TemporaryDirectory() as folder:
            _try(profiler, stage_options(profiler, Path(folder), {}), "trainer.profiler")


def _check(kind: str, config: Mapping[str, Any], where: str) -> None:
    """Check one config, without importing Lightning where there is none."""
    if (instead := REPLACED.get(str(config.get("_target_")))) is not None:
        raise ValueError(
            f"{where}._target_: found {config['_target_']!r} of an earlier version, expected {instead!r}"
        )
    target = resolve(config, where)
    check_options(target, config, where)
    from distill.engine import loggers

    checks = {
        "logger": loggers.check_logger,
        "callback": loggers.check_callback,
        "profiler": loggers.check_profiler,
    }
    checks[kind](target, config, where)


def _try(config: Mapping[str, Any], options: Mapping[str, Any], where: str) -> None:
    try:
        build(config, **options)
    except Exception as error:  # whatever the constructor raises
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        raise ValueError(f"{where}: {cause}") from error


def stage_options(
    config: Mapping[str, Any], folder: Path, settings: Mapping[str, Any], context: StageContext | None = None
) -> dict[str, Any]:
    """Options that the stage gives, without those that the config sets."""
    from distill.engine import loggers

    target: Callable[..., Any] = resolve(config, "_target_")
    assert inspect.isclass(target)
    names: dict[str, Any] = {}
    if context is not None:
        run, method = context.run_folder.name, settings.get("method")
        names = {
            "name": f"{run}/{context.name}",
            "group": run,
            "job_type": "train" if method else "evaluate",
            "tags": [context.recipe, *([method["_target_"].rpartition(".")[2]] if method else [])],
        }
        settings = {**settings, "recipe": context.recipe, "digest": context.digest, "seed": context.seed}
    given = loggers.stage_options(target, folder, settings, names)
    return {name: value for name, value in given.items() if name not in config}


def attachments(context: StageContext, settings: dict[str, Any]) -> dict[str, Any]:
    """Loggers, on the main process alone; callbacks and the profiler, on each process its own."""
    from distill.engine.loggers import Jsonl, opened, profiler_named
    from distill.engine.profiling import Recording

    logs, profiler = context.folder / "logs", context.settings.profiler
    found: dict[str, Any] = {"loggers": [], "callbacks": [build(config) for config in context.callbacks]}
    make_folder(logs)
    if context.world.main and not context.settings.fast_dev_run:
        configs = [(config, stage_options(config, logs, settings, context)) for config in context.loggers]
        found["loggers"] = [Jsonl(logs), *(opened(build(config, **given)) for config, given in configs)]
    if (window := context.settings.profile) is not None:
        found["callbacks"].append(Recording(window.start, window.steps, logs, context.world.rank))
    if isinstance(profiler, str) and context.world.main:
        found["profiler"] = profiler_named(profiler, logs)
    elif isinstance(profiler, Mapping) and context.world.main:
        found["profiler"] = build(profiler, **stage_options(profiler, logs, {}))
    return found


def log_evaluation(
    context: StageContext,
    settings: dict[str, Any],
    rows: Sequence[Mapping[str, Any]],
    picture: Path,
    facts: Mapping[str, Any],
) -> None:
    """Log an evaluation into a W&B run of its own for each W&B logger of the recipe; on the main process."""
    if not context.loggers:
        return
    from distill.engine import loggers

    logs = context.folder / "logs"
    for config in context.loggers:
        if not loggers.has_tables(resolve(config, "loggers")):
            continue
        make_folder(logs)
        logger = loggers.opened(build(config, **stage_options(config, logs, settings, context)))
        try:
            loggers.log_evaluation(logger, rows, picture)
            loggers.summarize([logger], facts)
        finally:
            loggers.close([logger])


def build(config: Mapping[str, Any], /, **options: Any) -> Any:
    """The object that a config names, and the objects that its options name; `options` are passed as they are."""
    return instantiate({**config, "_partial_": True}, _convert_="all")(**options)
