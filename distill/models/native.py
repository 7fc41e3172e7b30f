"""Models as folders: `model.safetensors` (the weights of the net, and of a decoder that has some; of large ones several files
and an index, see `models.weights`) and `model.json` (what they mean), nothing else needed.

Of an adapted net the weights are those of the adapter alone; `model.json` names the folder of the base and the sha256 of its
weights. The base is searched in the sub-folder `base`, and where the description says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.plain import plain_torch
from distill.files import canonical_json, write_json
from distill.models.adapters import Adapted, adapter_of, own_names
from distill.models.build import REFUSALS, TARGET, at_most, build_model
from distill.models.description import DESCRIPTION, SCHEMA, Base, Description
from distill.models.generator import Generator
from distill.models.mapped import assign, without_weights
from distill.models.model import Model
from distill.models.spec import SamplerSpec
from distill.models.weights import (
    FILE_BYTES,
    check_tensors,
    files_of,
    read_header,
    read_tensors,
    remove_others,
    weights_digest,
    write_weights,
)
from distill.names import inside
from distill.nets.net import Net, Origin

DECODER = "decoder/"  # starts the names of the decoder's tensors
BASE = "base"  # sub-folder in which the base of an adapter may lie
ADAPTED = f"{Adapted.__module__}.{Adapted.__qualname__}"


def describe(model: Model, spec: SamplerSpec) -> dict[str, Any]:
    """The contents of `model.json` except the weights' digest."""
    return {"schema": SCHEMA, **model.config(), "sampler": spec.to_dict()}


def save_model(
    folder: Path,
    model: Model,
    spec: SamplerSpec,
    weights: Mapping[str, Tensor] | None = None,
    *,
    file_bytes: int = FILE_BYTES,
    dtype: str | None = None,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Write a model folder: the weights, then their description; all files atomically.

    weights: the net's own tensors, where they are not those of `model`. file_bytes, whole: see `write_weights`. dtype: the
    type that the net's parameters are stored in; None: their own.

    Raises ValueError for an adapter of a base that was not loaded from a model folder."""
    base: dict[str, Any] = {}
    if (adapter := adapter_of(model.net)) is not None:
        if (origin := adapter.origin) is None:
            raise ValueError(
                f"{folder}: base: the adapter's base was not loaded from a model folder; expected one, or a merged model"
            )
        base = {
            "base": {
                "folder": Path(os.path.relpath(origin.folder, folder.absolute())).as_posix(),
                "sha256": origin.sha256,
            }
        }
    tensors = _tensors(model, weights)
    if dtype is not None:
        kind = getattr(torch, dtype)
        tensors |= {
            name: tensors[name].to(kind) for name, _ in model.net.named_parameters() if name in tensors
        }
    path = write_weights(folder, tensors, file_bytes, whole)
    digest = {"file": path.name, "sha256": weights_digest(path)} | ({} if dtype is None else {"dtype": dtype})
    write_json(folder / DESCRIPTION, describe(model, spec) | {"weights": digest} | base)
    remove_others(path)


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder, `model.json` last. Raises FileNotFoundError or ValueError where it is none."""
    weights = inside(folder, Description.read(folder).weights.file, f"{folder / DESCRIPTION}: weights.file")
    return [*files_of(weights), folder / DESCRIPTION]


def _tensors(model: Model, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The contents of a weights file. An adapter has the decoder of its base."""
    if weights is None:
        state = model.net.state_dict()
        weights = {name: state[name] for name in own_names(model.net)}
    if adapter_of(model.net) is not None:
        return dict(weights)
    decoder = {f"{DECODER}{name}": tensor for name, tensor in model.decoder.weights().items()}
    return {**weights, **decoder}


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """The net's weights of a model folder, on the CPU: those that the description names by their sha256, floating and
    finite.

    Raises FileNotFoundError or ValueError; the message names the file and the tensor."""
    folder = Path(folder)
    path = _weights_file(folder, Description.read(folder))
    read_header(path)
    return {name: tensor for name, tensor in read_tensors(path).items() if not name.startswith(DECODER)}


def weights_for(net: nn.Module, folder: Path | str) -> dict[str, Tensor]:
    """The weights of a model folder as those of `net`: of an adapted net, an adapter's of the same base, or zeros for the
    folder of the base.

    Raises like `read_weights`, and ValueError for other weights than the net's."""
    folder, own = Path(folder), own_names(net)
    weights, adapter = read_weights(folder), adapter_of(net)
    description, state = Description.read(folder), net.state_dict()
    if adapter is not None and description.base is None:
        if adapter.origin is None or adapter.origin.sha256 != description.weights.sha256:
            raise ValueError(f"{folder}: is not the base of the adapter; expected it, or an adapter of it")
        return {name: torch.zeros(state[name].shape) for name in own}
    header = read_header(folder / description.weights.file)
    stored = {name: entry for name, entry in header.items() if not name.startswith(DECODER)}
    check_tensors({name: state[name] for name in own}, stored, folder / description.weights.file, "net")
    return weights


@plain_torch()
def load_model(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    known: MutableMapping[str, Model] | None = None,
    mapped: bool = False,
) -> Generator:
    """Read a model folder into a `Generator` in eval mode.

    The description is compared with the names and shapes in the weights file before memory is allocated;
    weights have the sha256 of the description, and are finite. Weights of another float type than the net's are converted,
    with a warning. The model is the same whatever torch's default device and type are.

    known: models by the sha256 of their weights; theirs are used and not loaded again, and this folder's model is added.
    For models whose weights nothing changes, such as the base of adapters.
    mapped: the weights of the net stay in their file until they are written to, see `models.mapped`.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""
    folder = Path(folder)
    description = Description.read(folder)
    path = _weights_file(folder, description)
    adapter = description.base is not None  # trained on: of it the base alone is shared
    model = None if known is None or adapter else _again(folder, description, known)
    if model is None:
        model = _loaded(folder, description, path, known, mapped)
        if known is not None and not adapter:
            known[description.weights.sha256] = model
    return Generator(model.eval(), description.sampler).to(device)


def load_models(folders: Mapping[str, Path], *, adapters: bool, mapped: bool = False) -> dict[str, Generator]:
    """The models of a method by role; `mapped`: see `load_model`. With `adapters` (to be added to the model "init"), or where
    "init" has some, weights of one sha256 are loaded once for all roles: nothing trains them. Raises like `load_model`."""
    if "init" in folders and Description.read(folders["init"]).base is not None:
        adapters = True
    known: dict[str, Model] | None = {} if adapters else None
    return {role: load_model(folder, known=known, mapped=mapped) for role, folder in folders.items()}


def _loaded(
    folder: Path, description: Description, path: Path, known: MutableMapping[str, Model] | None, mapped: bool
) -> Model:
    _sketch(folder, description, path)
    base = None
    if description.base is not None:
        base = load_model(base_folder(folder, description.base), known=known, mapped=mapped).denoiser
    mapped = mapped and base is None  # an adapter is small
    with without_weights() if mapped else nullcontext():
        model = _built(folder, description, base)
    weights = read_tensors(path)
    of_decoder = {name: weights.pop(name) for name in list(weights) if name.startswith(DECODER)}
    if mapped:
        assign(model.net, weights, path)
    else:
        model.net.load_state_dict(weights, strict=base is None)
    if base is None:
        model.decoder.load_weights(
            {name.removeprefix(DECODER): tensor for name, tensor in of_decoder.items()}
        )
        if isinstance(model.net, Net):
            model.net.origin = Origin(folder.absolute(), description.weights.sha256)
    return model


def _again(folder: Path, description: Description, known: Mapping[str, Model]) -> Model | None:
    """The described model with the net and decoder of a known one, where one has the same weights and the same nets."""
    other = known.get(description.weights.sha256)
    same = ("net", "decoder")
    if other is None or any(other.config()[key] != description.model.get(key) for key in same):
        return None
    shared = {key: getattr(other, key) for key in same}
    return _with_folder(
        build_model(description.model | shared, f"{folder / DESCRIPTION}: "), folder, description
    )


def sketch_model(folder: Path | str) -> Generator:
    """A model folder as `load_model` reads it, with its net on the meta device: nothing is allocated and no weight is read,
    so neither their sha256 nor their values are checked.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""
    folder = Path(folder)
    description = Description.read(folder)
    path = inside(folder, description.weights.file, f"{folder / DESCRIPTION}: weights.file")
    model = _sketch(folder, description, path)
    if description.base is None and isinstance(model.net, Net):
        model.net.origin = Origin(folder.absolute(), description.weights.sha256)
    return Generator(model.eval(), description.sampler)


def base_folder(folder: Path, base: Base) -> Path:
    """The model folder of an adapter's base. Raises FileNotFoundError or ValueError naming what is missing or differs."""
    places = [folder / BASE, Path(os.path.normpath(folder / base.folder))]
    found = next((place for place in places if (place / DESCRIPTION).is_file()), None)
    where = f"{folder / DESCRIPTION}: base"
    if found is None:
        raise FileNotFoundError(
            f"{where}: found no model in {places[0]} or {places[1]}; the weights are an adapter, expected the model folder "
            f"whose weights have the sha256 {base.sha256}: link or copy it to {places[0]}"
        )
    if (sha256 := Description.read(found).weights.sha256) != base.sha256:
        raise ValueError(
            f"{where}: found the weights {sha256[:12]} in {found}, but the adapter was trained on {base.sha256[:12]}; expected "
            "that base"
        )
    return found


def placed(description: dict[str, Any], source: Path, folder: Path) -> dict[str, Any]:
    """The contents of `source`/model.json for a copy in another folder: the base of an adapter is named from there. Raises like
    `base_folder`."""
    base = Description.read(source).base
    if base is None:
        return description
    found = os.path.relpath(base_folder(source, base).absolute(), folder.absolute())
    return description | {"base": {"folder": Path(found).as_posix(), "sha256": base.sha256}}


def _built(folder: Path, description: Description, base: Model | None = None) -> Model:
    config = description.model
    if (base is None) == (_adapted_in(config) is not None):
        found = (
            "missing; the net is an adapted one" if base is None else "found, but the net is no adapted one"
        )
        raise ValueError(f"{folder / DESCRIPTION}: base: {found}")
    if base is not None:
        inner = _adapted_in(config)
        assert inner is not None
        for entry, wanted, own in (
            ("net.base", base.net_config(), inner.get("base")),
            ("decoder", base.decoder.config(), config.get("decoder")),
        ):
            if own != wanted:
                raise ValueError(
                    f"{folder / DESCRIPTION}: {entry}: found another one than the base's, expected {wanted}"
                )
        config = _with_base(config, base.net) | {"decoder": base.decoder}
    return _with_folder(build_model(config, f"{folder / DESCRIPTION}: "), folder, description)


def _with_folder(model: Any, folder: Path, description: Description) -> Model:
    assert isinstance(model, Model)
    model.conditions = model.conditions.beside(folder)
    model.sampler = description.sampler
    return model


def _adapted_in(config: Any) -> Mapping[str, Any] | None:
    """The config of the adapted net in a model's config."""
    if not isinstance(config, Mapping):
        return None
    if config.get(TARGET) == ADAPTED:
        return config
    return next((found for value in config.values() if (found := _adapted_in(value)) is not None), None)


def without_adapter(net: Any) -> Any:
    """The config of a net, of an adapted one that of its base."""
    return net["base"] if isinstance(net, Mapping) and net.get(TARGET) == ADAPTED else net


def _with_base(config: Any, base: nn.Module) -> Any:
    """A model's config with a net as the base of its adapted net."""
    if not isinstance(config, Mapping):
        return config
    if config.get(TARGET) == ADAPTED:
        return {**config, "base": base}
    return {key: _with_base(value, base) for key, value in config.items()}


def _sketch(folder: Path, description: Description, path: Path) -> Model:
    """The described model on the meta device, where nothing is allocated, after all checks: exactly the tensors of the weights
    file, a valid process and sampler, and a forward call on samples of the described shape."""
    where, stored = f"{folder / DESCRIPTION}: ", read_header(path)
    base = None
    if description.base is not None:
        base = sketch_model(base_folder(folder, description.base)).denoiser
    with torch.device("meta"), at_most(len(stored)):
        model = _built(folder, description, base).to("meta")
    _check_sampler(model, description.sampler, where)
    check_tensors(_tensors(model), stored, path, DESCRIPTION, description.weights.dtype)
    _check_samples(model, description, where)
    return model


def _weights_file(folder: Path, description: Description) -> Path:
    """The weights, or their index, beside the description that names them, with the sha256 that it expects."""
    named = description.weights
    path = inside(folder, named.file, f"{folder / DESCRIPTION}: weights.file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {folder / DESCRIPTION} names it as the weights")
    if (found := weights_digest(path)) != named.sha256:
        raise ValueError(f"{path}: sha256: found {found}, {DESCRIPTION} expects {named.sha256}")
    return path


def _check_sampler(model: Model, spec: SamplerSpec, where: str) -> None:
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


def _check_samples(model: Model, description: Description, where: str) -> None:
    """Require that the net, on the meta device, maps samples of the described shape to the same shape."""
    shape, embeds, output = model.sample_shape, model.embeds_guidance, model.output_shape
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
    if made != (1, *output):
        raise ValueError(
            f"{where}sample_shape: found {list(shape)}, but the net makes {list(made[1:])} of it"
            + ("" if output == shape else f", expected {list(output)}")
        )
    _calls.add(call)
