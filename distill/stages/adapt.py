"""Rebuilds a trained model with other net options, another prediction kind, an adapter, or as a flow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from distill.models.adapters import Adapted, adapter_of
from distill.models.build import build_net
from distill.models.code_flow import CodeFlow
from distill.models.conditions import Conditions, of_net
from distill.models.denoiser import Denoiser
from distill.models.guidance_adapters import GuidanceTerms
from distill.models.lora_files import LoraFile, digest
from distill.models.model import Model
from distill.models.tokens import TokenTeacher, set_codebook
from distill.nets.code_flow import CodeFlowNet
from distill.nets.converted import Converted, Retimed
from distill.nets.token_net import TokenNet
from distill.process.base import KINDS
from distill.process.flow import Flow
from distill.process.prefix import Prefix
from distill.typed import parse


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, see `models.adapters.Adapted`: rank (null: 16), alpha (null: the rank), names of layers (null: those
    that the net names, or all) and dropout; or those of a LoRA file, which has a rank, an alpha and layers of its own.

    guidance: terms that take the guidance w as an input, options of `models.guidance_adapters.GuidanceTerms`; None: none. With
    them, rank 0 leaves out the low-rank ones."""

    rank: int | None = None
    alpha: float | None = None
    targets: list[str] | None = None
    dropout: float = 0.0
    file: str | None = None
    guidance: dict[str, Any] | None = None

    def options(self, base: nn.Module, file: LoraFile | None) -> dict[str, Any]:
        """Arguments of `Adapted`, without `guidance`. Raises ValueError naming the option that contradicts the file."""
        if file is None:
            rank = 16 if self.rank is None else self.rank
            return {"rank": rank, "alpha": self.alpha, "targets": self.targets, "dropout": self.dropout}
        if self.targets is not None:
            raise ValueError(
                f"targets: found {self.targets}, but {file.path} names its layers; expected null"
            )
        return file.options(base, self.rank, self.alpha) | {"dropout": self.dropout}


@dataclass(frozen=True)
class Adapt:
    """The option `adapt` of a training stage.

    Attributes:
        kind: the new prediction kind, or None to keep it.
        net: changed options of the net, or None.
        lora: train low-rank adapters on the model, which itself stays as it is; None: train all weights. Where the model has
            these adapters, they are continued.
        process: "flow" makes a flow of a model of another process; "prefix" makes a student of Distilled Decoding of a model of
            tokens, and "code_flow" a flow of its code vectors with a new head, whose options are `net`; None keeps the process.
        start: of that flow: "converted", which has the trajectories of the model, or "raw": its net, at times scaled to its
            own, read as a velocity, which it has yet to learn (InstaFlow). Models that are flows stay as they are.
    """

    kind: str | None = None
    net: dict[str, Any] | None = None
    lora: Lora | None = None
    process: Literal["flow", "prefix", "code_flow"] | None = None
    start: Literal["converted", "raw"] | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind: found {self.kind!r}, expected one of {list(KINDS)}")
        if self.start is not None and self.process != "flow":
            raise ValueError(f"start: found {self.start!r} without `process: flow`")
        if self.process in ("prefix", "code_flow") and self.lora is not None:
            raise ValueError(
                "lora: found adapters, but a student of tokens has layers that its teacher has not; expected null"
            )
        if self.process is not None and self.kind is not None:
            raise ValueError(
                f"kind: found {self.kind!r}, but a {self.process} student predicts what its process says; expected null"
            )
        if self.lora is not None and (self.net or self.kind is not None):
            changed = "net" if self.net else "kind"
            raise ValueError(
                f"{changed}: found {getattr(self, changed)!r}, but adapters keep the net's other weights and its prediction; "
                "expected null"
            )


def files_digest(changes: Mapping[str, Any] | None) -> str:
    """A digest of the files that `adapted` reads; empty for none. Raises FileNotFoundError."""
    file = ((changes or {}).get("lora") or {}).get("file")
    return "" if file is None else digest(file)


def adapted(student: Model, changes: Mapping[str, Any]) -> Model:
    """Return the model with changed net options, prediction kind or process.

    All weights are kept; new parameters have their initial values. The output of the net is not converted to the new kind:
    its predictions are wrong until the method has trained it.

    Raises:
        ValueError: if the weights do not fit the changed net.
    """
    options = parse(Adapt, changes, "adapt")
    if options.lora is not None:
        student = with_adapter(student, options.lora)
    if options.process == "flow" and not options.net:
        return as_flow(student, options.start or "converted")
    if options.lora is not None:
        return student
    if options.process == "code_flow":
        return as_code_flow(student, changes.get("net") or {})
    config = merged(student.net_config(), changes.get("net") or {})
    built = build_net(config, "adapt.net")
    state = student.net.state_dict()
    if options.process == "prefix" and isinstance(built, TokenNet):
        state = built.of_teacher(state)
    try:
        missing, unexpected = built.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"adapt.net: the weights do not fit the changed net: {error}") from error
    if unexpected or not set(missing) <= set(built.state_dict()) - set(state):
        raise ValueError(f"adapt.net: {config} has no parameters for the weights {list(unexpected)[:4]}")
    conditions = of_net(built) or student.conditions
    if options.process == "prefix":
        return as_prefix(student, built, conditions)
    meaning = {} if options.kind is None else {"kind": options.kind}
    if meaning and not isinstance(student, Denoiser):
        raise ValueError(
            f"adapt.kind: found {options.kind!r}, but {type(student).__name__} has no choice of kinds; expected null"
        )
    student = student.with_(net=built, conditions=conditions, **meaning)
    return as_flow(student, changes.get("start") or "converted") if changes.get("process") else student


def with_adapter(model: Model, lora: Lora) -> Model:
    """A model with low-rank adapters on its net, equal to it; one with the same adapters as it is.

    Raises:
        ValueError: names `adapt.lora`: see `Adapted`, or the model has other adapters.
    """
    found = adapter_of(model.net)
    try:
        file = None if lora.file is None else LoraFile.read(lora.file)
        options = lora.options(model.net if found is None else found.net, file)
        if lora.guidance is not None:
            options["guidance"] = guidance_terms(model, lora.guidance)
        if found is None:
            net = Adapted(model.net, **options)
            warn_of_rank(net)
            if file is not None:
                file.fill(net)
            return model.with_(net=net, conditions=model.conditions)
        if found.takes(**options):
            return model
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"adapt.lora.{error}") from error
    raise ValueError(
        f"adapt.lora: found {asdict(lora)}, but the model of `init` has adapters of rank {found.rank}, alpha {found.alpha} on "
        f"{len(found.paths)} layers; expected the same, or adapt: null"
    )


def warn_of_rank(net: Adapted) -> None:
    """Warn of a rank above the inputs or outputs of most adapted layers: a term of the lower of both numbers can be any matrix
    there, so the rest of the rank is memory alone."""
    widths = {path: min(layer.weight.flatten(1).shape) for path, layer in net.layers().items()}
    above = [path for path, width in widths.items() if net.rank > width]
    if 2 * len(above) > len(widths):
        warnings.warn(
            f"adapt.lora.rank: found {net.rank}, more than the inputs or outputs of {len(above)} of {len(widths)} layers, "
            f"such as {widths[above[0]]} of {above[0]}; expected at most {max(widths.values())}",
            stacklevel=4,
        )


def guidance_terms(model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of guidance terms for a model: its prompts' width, and times in [0, 1], where they are not given."""
    context = model.conditions.of(torch.zeros(1, dtype=torch.int64, device="cpu")).get("context")
    known = {"time_scale": 1 / model.process.t_max, "context": 0 if context is None else context.shape[-1]}
    return asdict(parse(GuidanceTerms, known | dict(options), "guidance"))


def as_prefix(model: Model, net: nn.Module, conditions: Conditions) -> Denoiser:
    """A student of Distilled Decoding with this net: the states of `model` are sequences of data and noise.

    Raises:
        ValueError: names `adapt.process`: a model that is none of tokens.
    """
    if model.column != "tokens":
        raise ValueError(
            f"adapt.process: found prefix, but {type(model).__name__} is no model of tokens; expected one"
        )
    if not isinstance(net, TokenNet) or not net.student:
        raise ValueError(
            f"adapt.net: found a {type(net).__name__} that is no student, expected adapt: {{process: prefix, net: {{student: "
            "true}}"
        )
    set_codebook(net, model.decoder)
    return Denoiser(
        net, Prefix(net.groups), "x0", model.sample_shape, conditions=conditions, decoder=model.decoder
    )


def as_code_flow(model: Model, options: Mapping[str, Any]) -> CodeFlow:
    """A flow of code vectors with the body of a model of tokens, all weights but the layer of logits, and a new head.
    `options`: of `nets.code_flow.CodeFlowNet`; `body`: changed options of the body.

    Raises:
        ValueError: names `adapt.process` or `adapt.net`: a model that is none of tokens, or weights that do not fit.
    """
    if not isinstance(model, TokenTeacher):
        raise ValueError(
            f"adapt.process: found code_flow, but {type(model).__name__} is no model of tokens; expected one"
        )
    target = f"{CodeFlowNet.__module__}.{CodeFlowNet.__qualname__}"
    given = {
        "_target_": target,
        "body": model.net_config() | {"logits": False},
        "size": model.sample_shape[1],
    }
    built = build_net(merged(given, options), "adapt.net")
    assert isinstance(built, CodeFlowNet)
    state = {
        name: value
        for name, value in model.net.state_dict().items()
        if not name.startswith(f"{model.token_net.last}.")
    }
    try:
        built.body.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"adapt.net: the weights do not fit the changed body: {error}") from error
    return CodeFlow(built, model.sample_shape, conditions=model.conditions, decoder=model.decoder)


def as_flow(model: Model, start: str) -> Model:
    """A model of another process as a flow, see `Adapt.start`; a flow as it is.

    Raises:
        ValueError: names `adapt.process`: a model with a boundary, or a student.
    """
    if isinstance(model.process, Flow):
        return model
    if not isinstance(model, Denoiser):
        raise ValueError(
            f"adapt.process: found flow, but {type(model).__name__} is no diffusion model; expected one"
        )
    if model.boundary is not None or model.coupling != "independent":
        raise ValueError(
            f"adapt.process: found flow, but the model is a {model.coupling} student; expected a diffusion model"
        )
    if start == "converted":
        net: nn.Module = Converted(model.net, model.process, model.kind)
    else:
        net = Retimed(model.net, model.process.t_max)
    made = model.with_(net=net, process=Flow(), kind="velocity", conditions=model.conditions)
    made.sampler = None  # its times were those of the other process
    return made


def merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `config` and its nested mappings, in place; returns `config`."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping):
            config[key] = merged(dict(config[key]), value)
        else:
            config[key] = copy.deepcopy(value)
    return config
