"""Model folders whose weights are several files with an index, and exports in other types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from method_support import mlp
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.exporters.export import Options, export
from distill.files import sha256_file
from distill.models.description import DESCRIPTION, Description
from distill.models.native import load_model, model_files, read_weights, save_model, sketch_model
from distill.models.spec import SamplerSpec
from distill.models.weights import INDEX, WEIGHTS, weights_digest, weights_path
from distill.process.flow import Flow
from distill.stages.artifact import read_artifact, write_artifact
from distill.stages.load import Load

SPEC = SamplerSpec(steps=2, any_steps=True)


def saved(folder: Path, file_bytes: int = 400) -> list[str]:
    """A model in `folder`; returns the names of its files."""
    save_model(folder, mlp(Flow(), seed=3), SPEC, file_bytes=file_bytes)
    return [path.name for path in model_files(folder)]


def test_parts_hold_the_same_model(tmp_path: Path) -> None:
    assert saved(tmp_path / "whole", 10**9) == [WEIGHTS, DESCRIPTION]
    names = saved(tmp_path / "parts")
    assert names[0] == INDEX
    assert names[1].startswith("model-00001-of-0000")
    assert len(names) > 4
    whole, parts = read_weights(tmp_path / "whole"), read_weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    largest = max(tensor.nbytes for tensor in whole.values())
    stored = [load_file(tmp_path / "parts" / name) for name in names[1:-1]]
    assert max(sum(t.nbytes for t in part.values()) for part in stored) <= max(400, largest)
    assert torch.equal(load_model(tmp_path / "parts").sample(2), load_model(tmp_path / "whole").sample(2))
    sketch_model(tmp_path / "parts")
    content = {"config": {"_target_": "distill.stages.load.Load"}, "inputs": {}, "seed": 0, "fingerprint": ""}
    write_artifact(tmp_path / "parts", content, {}, Load.made(), Load.NEEDED)
    record = read_artifact(tmp_path / "parts", Load)
    assert record is not None
    assert sorted(record["files"]) == sorted(names)
    assert saved(tmp_path / "parts", 10**9) == [WEIGHTS, DESCRIPTION]
    assert not [path for path in (tmp_path / "parts").iterdir() if path.name in names[:-1]]


def test_one_file_is_that_of_earlier_versions(tmp_path: Path) -> None:
    saved(tmp_path, 10**9)
    assert Description.read(tmp_path).weights.sha256 == sha256_file(tmp_path / WEIGHTS)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Tensor]], None]) -> None:
    """Change the first two parts, and write the digests that fit."""
    index = json.loads((folder / INDEX).read_text())
    files = sorted(index["metadata"]["sha256"])[:2]
    parts = [load_file(folder / name) for name in files]
    change(*parts)
    for name, part in zip(files, parts, strict=True):
        save_file(part, folder / name)
        index["metadata"]["sha256"][name] = sha256_file(folder / name)
    (folder / INDEX).write_text(json.dumps(index))
    described = json.loads((folder / DESCRIPTION).read_text())
    described["weights"]["sha256"] = sha256_file(folder / INDEX)
    (folder / DESCRIPTION).write_text(json.dumps(described))


def test_a_tensor_that_is_missing_unexpected_or_stored_twice_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    first, second = (next(iter(load_file(path))) for path in model_files(tmp_path)[1:3])
    rewritten(tmp_path, lambda a, b: b.update({first: a[first].clone()}))
    with pytest.raises(
        ValueError, match=rf"00002-of-.*: {first}: unexpected; .*expects it in model-00001.*twice"
    ):
        load_model(tmp_path)
    rewritten(tmp_path, lambda a, b: b.update(colour=b.pop(first)))
    with pytest.raises(ValueError, match=r"00002-of-.*: colour: unexpected; .* does not list it"):
        load_model(tmp_path)

    def lose(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        del b["colour"], b[second]

    rewritten(tmp_path, lose)
    with pytest.raises(ValueError, match=rf"00002-of-.*: {second}: missing; {INDEX} expects it there"):
        read_weights(tmp_path)


def test_a_part_that_was_changed_or_is_gone_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    part = model_files(tmp_path)[2]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{part.name}: sha256: found .*, {INDEX} expects"):
        load_model(tmp_path)
    part.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{part.name}: missing; .*{INDEX} lists it"):
        weights_digest(weights_path(tmp_path))
    saved(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["other"] = "../model.safetensors"
    index["metadata"]["sha256"]["../model.safetensors"] = "0" * 64
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map"):
        weights_digest(weights_path(tmp_path))


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_an_export_in_another_type_has_the_rounded_parameters(
    tmp_path: Path, dtype: str, stored: torch.dtype
) -> None:
    saved(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", Options(export_dtype=dtype, file_bytes=200), "recipe")
    exact, found = read_weights(tmp_path / "model"), read_weights(tmp_path / "out")
    parameters = dict(load_model(tmp_path / "model").denoiser.net.named_parameters())
    assert len(model_files(tmp_path / "out")) > 3
    for name in parameters:
        assert found[name].dtype == stored
        assert torch.equal(found[name], exact[name].to(stored))
    assert Description.read(tmp_path / "out").weights.dtype == dtype
    assert load_model(tmp_path / "out").sample(2).dtype == torch.float32  # no warning: they are errors here


def test_types_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export_dtype: found 'int8', expected one of float32, "):
        Options(export_dtype="int8")
    model = mlp(Flow(), seed=3)
    name, parameter = next(iter(model.net.named_parameters()))
    parameter.data[0] = 1e6
    save_model(tmp_path / "model", model, SPEC)
    with pytest.raises(
        ValueError, match=rf"export_dtype: found 'float16', which cannot hold {name} .* 1e\+06"
    ):
        export(tmp_path / "model", tmp_path / "out", Options(export_dtype="float16"), "recipe")
