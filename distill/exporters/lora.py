"""Adapters as LoRA files, read again by diffusers or peft and compared."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.exporters.pipeline import check_network
from distill.models.adapters import Adapted, adapter_of
from distill.models.build import build_net
from distill.models.lora_files import LoraFile, network_in, part_of, write_kohya, write_peft
from distill.models.model import Model
from distill.models.native import load_model
from distill.models.pretrained import INSTALL, Folder, class_named
from distill.nets.converted import Converted, Retimed

PEFT, KOHYA = FILES = ("pytorch_lora_weights.safetensors", "kohya.safetensors")
TOLERANCE = 1e-5  # of the largest output, in float32


def write(
    folder: Path,
    model: Model,
    pipeline: Folder | None,
    facts: Mapping[str, Any],
    kohya: str | None = None,
) -> dict[str, float]:
    """Write the LoRA files of a model into a folder: one with the names of diffusers, and of a U-Net one with those of kohya;
    or one file `kohya` alone, with its names, also of a transformer, as ComfyUI reads them. Each is loaded into a fresh base,
    by diffusers where its pipeline loads LoRA, else by peft, and makes the same outputs.

    Returns:
        file -> largest difference of the outputs, divided by the largest output.

    Raises:
        ValueError: names `format` or `pipeline`: no adapter, or one of another network than the pipeline's.
        RuntimeError: a file makes other outputs.
    """
    adapted = adapter_of(model.net)
    if adapted is None:
        raise ValueError(
            "format: found 'lora', but the model has no adapter; expected native, diffusers or comfyui"
        )
    pipeline = check_base(adapted, pipeline)
    files = [PEFT] if kohya is None else [kohya]
    if kohya is not None:
        write_kohya(folder / kohya, adapted, facts)
    else:
        write_peft(folder / PEFT, adapted, facts)
    if kohya is None and pipeline is not None and _loads_kohya(pipeline, adapted):
        write_kohya(folder / KOHYA, adapted, facts)
        files.append(KOHYA)
    wanted = _outputs(_with_weights(adapted, _base(adapted, pipeline)), model)
    found = {}
    for file in files:
        made = _outputs(_loaded(folder / file, adapted, pipeline), model)
        found[file] = float((made - wanted).abs().max() / wanted.abs().max())
        if not found[file] <= TOLERANCE:
            raise RuntimeError(
                f"{folder / file}: the outputs of a fresh base with this file differ by {found[file]:.2g} of the largest "
                f"from the model's, expected at most {TOLERANCE:g}"
            )
    return found


def check_base(adapted: Adapted, pipeline: Folder | None) -> Folder | None:
    """The pipeline whose network is the adapter's base; None for nets of this package.

    Raises ValueError naming `pipeline`: missing, or its network is not the adapter's base."""
    prefix, core = network_in(adapted.net)
    if core is None:
        return None
    if pipeline is None:
        raise ValueError(
            "pipeline: missing; expected the folder of the pipeline that the adapter's base is part of"
        )
    check_network(pipeline, core)
    part, config = part_of(core), core.config()
    stored = pipeline.load(part, dtype=config.get("dtype", "float32")).state_dict()
    own = {name.removeprefix(prefix): value for name, value in adapted.net.state_dict().items()}
    for path in adapted.layers():
        short = path.removeprefix(prefix)
        own |= {
            short + name.removeprefix(f"{short}.layer"): value
            for name, value in own.items()
            if name.startswith(f"{short}.layer.")
        }
    if other := next(
        (name for name, value in stored.items() if not torch.equal(value, own[name].cpu())), None
    ):
        raise ValueError(
            f"pipeline: {pipeline.path / part}: {other}: differs from the adapter's base, which is another model or was "
            "trained itself; expected format=diffusers merged=true"
        )
    return pipeline


def _base(adapted: Adapted, pipeline: Folder | None, network: nn.Module | None = None) -> nn.Module:
    """The adapter's base in float32, with a network of diffusers, or the pipeline's own."""
    _, core = network_in(adapted.net)
    if core is None or pipeline is None:
        assert adapted.origin is not None  # of every model that was loaded
        return load_model(adapted.origin.folder).denoiser.net
    with torch.device("meta"):
        net = build_net(adapted.config()["base"])
    _, fresh = network_in(net)
    assert fresh is not None
    fresh.net = pipeline.load(part_of(core)) if network is None else network
    return net.eval()


def _with_weights(adapted: Adapted, base: nn.Module) -> nn.Module:
    """The base with a copy of the adapters."""
    made = Adapted(base, adapted.rank, adapted.alpha, adapted.paths).eval()
    own = adapted.state_dict()
    made.load_state_dict({name: own[name] for name in adapted.own()}, strict=False)
    return made


def _loads_kohya(pipeline: Folder, adapted: Adapted) -> bool:
    _, core = network_in(adapted.net)
    return core is not None and part_of(core) == "unet" and _loads_lora(pipeline)


def _loads_lora(pipeline: Folder) -> bool:
    return hasattr(class_named("diffusers", pipeline.pipeline, "pipeline"), "load_lora_weights")


def _loaded(file: Path, adapted: Adapted, pipeline: Folder | None) -> nn.Module:
    """A fresh base into which others have loaded the file."""
    _, core = network_in(adapted.net)
    reads = (
        pipeline is not None
        and (_loads_kohya(pipeline, adapted) or file.name == PEFT)
        and _loads_lora(pipeline)
    )
    if core is not None and pipeline is not None and reads:
        made = pipeline.assembled(only=(part_of(core), "scheduler"))
        made.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
        return _base(adapted, pipeline, getattr(made, part_of(core)))
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(f"format: lora is checked with the package peft: {INSTALL}") from error
    base = _base(adapted, pipeline)
    prefix, inner = network_in(base)
    read = LoraFile.read(file)
    layers = {path.removeprefix(prefix): pair for path, pair in read.on(base).items()}
    config = peft.LoraConfig(r=read.rank, lora_alpha=read.alpha, target_modules=list(layers))
    tensors = {
        f"{layer}.lora_{name}.weight": tensor
        for layer, pair in layers.items()
        for name, tensor in zip("AB", pair, strict=True)
    }
    network = base if inner is None else inner.net
    peft.inject_adapter_in_model(config, network, state_dict=tensors)
    peft.set_peft_model_state_dict(network, tensors)
    return base.eval()


@torch.no_grad()
def _outputs(net: nn.Module, model: Model) -> Tensor:
    """Of two random samples at two times of the model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.sample_shape, generator=generator)
    process, outer = model.process, model.net
    last = process.t_max
    if isinstance(outer, Converted):
        last = outer.process.t_max
    elif isinstance(outer, Retimed):
        last = outer.scale * last
    cond = model.conditions.of(torch.arange(2)).with_guidance(1.0 if model.embeds_guidance else None)
    made: Tensor = net(x, torch.tensor([0.9, 0.3]) * last, cond)
    return made
