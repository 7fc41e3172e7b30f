"""A composed config, checked: every key at the top is read by somebody, and `stages` hold no value of the environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from distill.recipe.plan import Changed
from distill.stages.base import Settings
from distill.stages.targets import check_options, resolve
from distill.typed import parse, unknown_key

GROUPS = ("data", "teacher", "features", "eval", "monitor")
RUN = ("seed", "runs_dir", "name", "plan", "redo", "trainer", "loggers")
# What a run's files are made of.
STAGES = ("stages", "repeat", "halve", "profile")
# Resolvers that see the config alone.
INNER = ("oc.select", "oc.decode", "oc.create", "oc.deprecated", "oc.dict.keys", "oc.dict.values")
GIVEN_TO_LOGGERS = ("folder", "settings")


def read(cfg: DictConfig) -> dict[str, Any]:
    """The composed config of a run as plain containers.

    Raises ValueError for a key at the top that nothing reads, for an interpolation in `stages` (or in what they
    interpolate) whose value comes from outside the config, and for wrong options of `trainer`, `loggers` and `plan`."""
    refuse_outside(cfg, STAGES)
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(found, dict)
    plain = {str(key): value for key, value in found.items()}
    refuse_unread(cfg, plain)
    parse(bool, plain["plan"], "plan")
    parse(Settings, plain["trainer"], "trainer")
    check_loggers(plain["loggers"])
    return plain


def refuse_outside(cfg: DictConfig, keys: tuple[str, ...]) -> None:
    """Raise ValueError where a value below `keys` comes through a resolver that looks outside of the config: the
    environment may hold secrets, and a run writes its stages down."""
    seen: list[tuple[str, str]] = []

    def note(name: str) -> Callable[..., str]:
        def resolver(config: Any, parent: Any, node: Any, args: Any, args_str: Any) -> str:
            seen.append((name, str(node._get_full_key(None)) if node is not None else keys[0]))
            return ""

        return resolver

    kept = dict(BaseContainer._resolvers)
    outside = {name: note(name) for name in kept if name not in INNER}
    try:
        BaseContainer._resolvers.update(outside)
        for key in keys:
            node = cfg._get_node(key)
            if isinstance(node, Container):
                OmegaConf.to_container(node, resolve=True)
            elif node is not None:
                _ = cfg[key]
    except OmegaConfBaseException:
        pass  # told when the config is resolved for good, unless one of these was the reason
    finally:
        BaseContainer._resolvers.update(kept)
    if seen:
        name, place = seen[0]
        raise ValueError(
            f"{place}: found ${{{name}:...}}; stages are written to plan.json, config.yaml and logs, so they take no value "
            f"from the environment; give the value on the command line, as in {place}=..."
        )


def refuse_unread(cfg: DictConfig, plain: Mapping[str, Any]) -> None:
    """Raise ValueError for a key at the top that is no option of a run and that no interpolation reads: without it,
    everything else would be the same."""
    known = [*STAGES, *GROUPS, *RUN]
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    for key in raw:
        if key in known or _named(str(key), raw):  # the usual case; what follows resolves the whole config
            continue
        others = OmegaConf.create({other: value for other, value in raw.items() if other != key})
        try:
            same = OmegaConf.to_container(others, resolve=True)
        except OmegaConfBaseException:
            continue  # something needs it
        if same == {other: value for other, value in plain.items() if other != key}:
            name = str(key)
            told = unknown_key("", name, known)
            raise ValueError(f"{told}; a key of your own is one that some ${{{name}}} reads")


def _named(key: str, raw: Any) -> bool:
    """Whether ${key} or a part of it stands as a whole value somewhere below `raw`."""
    if isinstance(raw, Mapping):
        return any(_named(key, value) for value in raw.values())
    if isinstance(raw, list):
        return any(_named(key, value) for value in raw)
    return isinstance(raw, str) and re.fullmatch(rf"\$\{{{re.escape(key)}(\.[\w.]+)?\}}", raw) is not None


def check_loggers(loggers: Any) -> None:
    """Raise ValueError unless `loggers` is a list of configs whose options their classes take."""
    for number, logger in enumerate(parse(list[dict[str, Any]], loggers or [], "loggers")):
        where = f"loggers[{number}]"
        target = resolve(logger, where)
        check_options(target, logger, where)
        if (needs := getattr(target, "check", None)) is not None:
            needs()  # a package that is not installed
        if given := [key for key in GIVEN_TO_LOGGERS if key in logger]:
            raise ValueError(f"{where}.{given[0]}: is given by the stage; leave it out")


@contextmanager
def typed_places(cfg: DictConfig) -> Iterator[None]:
    """Messages about an option that a group or a key of the recipe sets end with where it is set: `stages.evaluate.k` is
    typed as `eval.k`."""
    try:
        yield
    except Changed:
        raise
    except ValueError as error:
        place = re.match(r"[\w.]+", str(error))
        typed = None if place is None else _origin(cfg, place[0].rstrip("."))
        if typed is None:
            raise
        raise ValueError(f"{error} (typed as {typed})") from error


def _origin(cfg: DictConfig, place: str) -> str | None:
    """Where the value at a dotted place is set, when an interpolation puts it there."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    top, node, parts, moved = raw, raw, place.split("."), False
    done: list[str] = []
    for part in parts:
        node = node.get(part) if isinstance(node, Mapping) else None
        done.append(part)
        if isinstance(node, str) and (one := re.fullmatch(r"\$\{([\w.]+)\}", node)):
            node, done, moved = top, [], True
            for step in one[1].split("."):
                node = node.get(step) if isinstance(node, Mapping) else None
                done.append(step)
    return ".".join(done) if moved and len(parts) > 1 and ".".join(done) != place else None
