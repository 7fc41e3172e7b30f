"""Checks a composed config: unused keys at the top level, and values of the environment in `stages`, raise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from distill.recipe.plan import Changed
from distill.recipe.profile import TYPED, VALUES
from distill.stages.attached import check_attached
from distill.stages.base import Settings
from distill.typed import parse, unknown_key

GROUPS = ("data", "teacher", "features", "gates", "eval", "monitor")
CHANGES = ("student",)  # groups that are null by default, and change what a recipe reads of them
RUN = ("seed", "runs_dir", "name", "plan", "redo", "trainer", "loggers", "callbacks")
# Keys that determine the files of a run.
STAGES = ("stages", "repeat", "halve", "profile")
# Resolvers that read only the config.
INNER = ("oc.select", "oc.decode", "oc.create", "oc.deprecated", "oc.dict.keys", "oc.dict.values")


def read(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the composed config of a run as plain containers. `overrides`: those of the command line, which values of a
    profile do not change.

    Raises:
        ValueError: for a top-level key that nothing reads, for an interpolation below `STAGES` that reads values from
            outside the config, and for wrong options of `trainer`, `loggers`, `callbacks`
            and `plan`.
    """
    refuse_outside(cfg, STAGES)
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(found, dict)
    plain = {str(key): value for key, value in found.items()}
    refuse_unread(cfg, plain)
    parse(bool, plain["plan"], "plan")
    parse(Settings, plain["trainer"], "trainer")
    check_attached(plain["loggers"], plain["callbacks"], plain["trainer"].get("profiler"))
    if any(plain["profile"].get(name) for name in VALUES):
        keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
        plain["profile"][TYPED] = [key for key in keys if "." in key]  # the others choose options of groups
    return plain


def refuse_outside(cfg: DictConfig, keys: tuple[str, ...]) -> None:
    """Raise ValueError if a value below `keys` uses a resolver that reads from outside the config.

    The environment may contain secrets, and a run writes its stages to files."""
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
        pass  # raised again when `read` resolves the config
    finally:
        BaseContainer._resolvers.update(kept)
    if seen:
        name, place = seen[0]
        raise ValueError(
            f"{place}: found ${{{name}:...}}; stages are written to plan.json, config.yaml and logs, and must not contain "
            f"values of the environment; type the value, as in {place}=..."
        )


def refuse_unread(cfg: DictConfig, plain: Mapping[str, Any]) -> None:
    """Raise ValueError for a top-level key that is not an option of a run and that no interpolation reads, or a chosen option
    of `CHANGES` that none reads.

    A key is read if the rest of the config resolves differently, or not at all, without it."""
    known = [*STAGES, *GROUPS, *RUN, *(key for key in CHANGES if plain.get(key) is None)]
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    for key in raw:
        if key in known or _named(str(key), raw):  # fast path: the rest resolves the whole config
            continue
        others = OmegaConf.create({other: value for other, value in raw.items() if other != key})
        try:
            same = OmegaConf.to_container(others, resolve=True)
        except OmegaConfBaseException:
            continue  # an interpolation reads it
        if same == {other: value for other, value in plain.items() if other != key}:
            name = str(key)
            if name in CHANGES:
                raise ValueError(
                    f"{name}: found {plain[name]}, but no stage of this recipe reads ${{{name}}}, so that it has no effect; "
                    f"remove {name}=..."
                )
            message = unknown_key("", name, known)
            raise ValueError(f"{message}, or a key that an interpolation ${{{name}}} reads")


def _named(key: str, raw: Any) -> bool:
    """Return whether a value below `raw` is ${key} or ${key.<...>}."""
    if isinstance(raw, Mapping):
        return any(_named(key, value) for value in raw.values())
    if isinstance(raw, list):
        return any(_named(key, value) for value in raw)
    return isinstance(raw, str) and re.fullmatch(rf"\$\{{{re.escape(key)}(\.[\w.]+)?\}}", raw) is not None


@contextmanager
def typed_places(cfg: DictConfig) -> Iterator[None]:
    """Append to messages the key to type, if an interpolation sets the option: `stages.evaluate.k` is typed as `eval.k`."""
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
    """Return the key that sets the value at a dotted place by interpolation, or None."""
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
