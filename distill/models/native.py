"""Models as folders: `model.safetensors` (the weights of the net, and of a decoder that has some) and `model.json` (what they
mean), nothing else needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.plain import plain_torch
from distill.files import canonical_json, sha256_file, write_json, write_safetensors
from distill.models.build import REFUSALS, at_most, build_model
from distill.models.denoiser import Denoiser
from distill.models.description import DESCRIPTION, SCHEMA, WEIGHTS, Description
from distill.models.generator import Generator
from distill.models.spec import SamplerSpec
from distill.models.weights import check_tensors, read_header, read_tensors
from distill.names import inside

DECODER = "decoder/"  # starts the names of the decoder's tensors


def describe(model: Denoiser, spec: SamplerSpec) -> dict[str, Any]:
    """The contents of `model.json` except the weights' digest."""
    return {"schema": SCHEMA, **model.config(), "sampler": spec.to_dict()}


def save_model(
    folder: Path, model: Denoiser, spec: SamplerSpec, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model folder: the weights, then their description; both atomically.

    weights: the net's state dict, where it is not that of `model` (a sharded net's whole tensors)."""
    write_safetensors(folder / WEIGHTS, _tensors(model, weights))
    digest = {"file": WEIGHTS, "sha256": sha256_file(folder / WEIGHTS)}
    write_json(folder / DESCRIPTION, describe(model, spec) | {"weights": digest})


def _tensors(model: Denoiser, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The contents of a weights file."""
    decoder = {f"{DECODER}{name}": tensor for name, tensor in model.decoder.weights().items()}
    return {**(model.net.state_dict() if weights is None else weights), **decoder}


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """The net's weights of a model folder, on the CPU: those that the description names by their sha256, floating and
    finite.

    Raises FileNotFoundError or ValueError; the message names the file and the tensor."""
    folder = Path(folder)
    path = _weights_file(folder, Description.read(folder))
    read_header(path)
    return {name: tensor for name, tensor in read_tensors(path).items() if not name.startswith(DECODER)}


@plain_torch()
def load_model(folder: Path | str, *, device: torch.device | str = "cpu") -> Generator:
    """Read a model folder into a `Generator` in eval mode.

    The description is compared with the names and shapes in the weights file before memory is allocated;
    weights have the sha256 of the description, and are finite. Weights of another float type than the net's are converted,
    with a warning. The model is the same whatever torch's default device and type are.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""
    folder = Path(folder)
    description = Description.read(folder)
    path = _weights_file(folder, description)
    _sketch(folder, description, path)
    model = _built(folder, description)
    weights = read_tensors(path)
    of_decoder = {name: weights.pop(name) for name in list(weights) if name.startswith(DECODER)}
    model.net.load_state_dict(weights)
    model.decoder.load_weights({name.removeprefix(DECODER): tensor for name, tensor in of_decoder.items()})
    return Generator(model.eval(), description.sampler).to(device)


def sketch_model(folder: Path | str) -> Generator:
    """A model folder as `load_model` reads it, with its net on the meta device: nothing is allocated and no weight is read,
    so neither their sha256 nor their values are checked.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""
    folder = Path(folder)
    description = Description.read(folder)
    path = inside(folder, description.weights.file, f"{folder / DESCRIPTION}: weights.file")
    return Generator(_sketch(folder, description, path).eval(), description.sampler)


def _built(folder: Path, description: Description) -> Denoiser:
    model = build_model(description.model, f"{folder / DESCRIPTION}: ")
    assert isinstance(model, Denoiser)
    model.conditions = model.conditions.beside(folder)
    model.sampler = description.sampler
    return model


def _sketch(folder: Path, description: Description, path: Path) -> Denoiser:
    """The described model on the meta device, where nothing is allocated, after all checks: exactly the tensors of the weights
    file, a valid process and sampler, and a forward call on samples of the described shape."""
    where, stored = f"{folder / DESCRIPTION}: ", read_header(path)
    with torch.device("meta"), at_most(len(stored)):
        model = _built(folder, description).to("meta")
    _check_sampler(model, description.sampler, where)
    check_tensors(_tensors(model), stored, path, DESCRIPTION)
    _check_samples(model, description, where)
    return model


def _weights_file(folder: Path, description: Description) -> Path:
    """The weights beside the description that names them, with the sha256 that it expects."""
    named = description.weights
    path = inside(folder, named.file, f"{folder / DESCRIPTION}: weights.file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {folder / DESCRIPTION} names it as the weights")
    if (found := sha256_file(path)) != named.sha256:
        raise ValueError(f"{path}: sha256: found {found}, {DESCRIPTION} expects {named.sha256}")
    return path


def _check_sampler(model: Denoiser, spec: SamplerSpec, where: str) -> None:
    """The process is one from data to noise, and the sampler's times, guidance and inputs are the model's."""
    process = model.process
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    weights = torch.stack([process.alpha(ends), process.sigma(ends)])
    clean, noisy = process.log_ratio(ends).tolist()
    if not bool(weights.isfinite().all()) or not clean > noisy:
        raise ValueError(
            f"{where}process: found {process!r}, whose weights of data and noise at its ends are {weights.T.tolist()}; "
            "expected finite ones, from clean to noisy"
        )
    try:
        spec.check_process(process)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    if spec.guidance_scale != 1 and not model.guidable:
        raise ValueError(
            f"{where}sampler.guidance_scale: found {spec.guidance_scale}, but the model is not guidable; expected 1"
        )
    if model.embeds_guidance != (spec.guidance_w is not None):
        found = "takes" if model.embeds_guidance else "does not take"
        raise ValueError(
            f"{where}sampler.guidance_w: found {spec.guidance_w}, but the net {found} the guidance as an input"
        )


_calls: set[str] = set()  # of nets that take their samples: a run loads the same ones again and again


def _check_samples(model: Denoiser, description: Description, where: str) -> None:
    """Require that the net, on the meta device, maps samples of the described shape to the same shape."""
    shape, embeds = model.sample_shape, model.embeds_guidance
    call = canonical_json({"model": description.model, "w": embeds})
    if call in _calls:
        return
    ids = torch.zeros(1, dtype=torch.int64)
    cond = model.conditions.of(ids).with_guidance(0.0 if embeds else None).to("meta")
    x, t = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    try:
        with torch.no_grad():
            made = tuple(model.net(x, t, cond).shape)
    except REFUSALS as error:
        raise ValueError(f"{where}sample_shape: the net does not take {list(shape)}: {error}") from error
    if made != (1, *shape):
        raise ValueError(
            f"{where}sample_shape: found {list(shape)}, but the net makes {list(made[1:])} of it"
        )
    _calls.add(call)
