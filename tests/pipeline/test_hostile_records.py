"""Records beside models: nodes, numbers of evaluations and settings of extractors are read by their types, too."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cache.pairs import Pairs
from distill.evaluation.comparison import read
from distill.models.analytic import exact_denoiser
from distill.models.extractors.transformer import _normalisation, _sha256
from distill.process.flow import Flow
from distill.process.times import karras_grid
from distill.stages.generate import Generate
from distill.stages.nodes import read_nodes

PROTOCOL = {
    "features": "digits64", "features_sha256": None, "count": 10, "class_balanced": True, "reference": "digits",
    "reference_count": 10, "reference_digest": "a", "resolution": [1, 8, 8],
}  # fmt: skip
NODES = {"schema": 1, "start": "a", "nodes": [{"number": 1, "step": 5, "sha256": "b"}]}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": None}, "nodes: found None, expected a list of a mapping"),
        (
            {"nodes": [{"number": "../x", "step": 5, "sha256": "b"}]},
            r"nodes\[0\].number: found '../x', expected int",
        ),
        (
            {"nodes": [{"number": 2, "step": 5, "sha256": "b"}]},
            r"nodes: found the numbers \[2\], expected 1 .. 1",
        ),
        ({"nodes": [{"number": 1, "step": 5}]}, r"nodes\[0\].sha256: missing"),
        ({"zzz": 1}, "zzz: no such key"),
        ({"schema": True}, "schema: found True, this version reads 1"),
    ],
)
def test_nodes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "nodes.json", NODES | change)
    with pytest.raises(ValueError, match=message) as error:
        read_nodes(tmp_path, tmp_path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [5]}, r"rows\[0\]: found 5, expected a mapping"),
        ({"rows": [{"model": "a", "steps": "1"}]}, r"rows\[0\].steps: found '1', expected int or null"),
        ({"rows": [{"model": "a", "steps": 1, "fd": [1]}]}, r"rows\[0\].fd: found \[1\], expected"),
        ({"protocol": PROTOCOL | {"count": "10"}}, "protocol.count: found '10', expected int"),
        ({"protocol": PROTOCOL | {"floor": {"fd": None}}}, "protocol.floor.fd: found None, expected float"),
        ({"real": {"fd": "x"}}, "real.fd: found 'x'"),
        ({"note": 5}, "note: found 5, expected str"),
    ],
)
def test_numbers_of_an_evaluation(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    whole = {"schema": 1, "protocol": PROTOCOL, "rows": [{"model": "a", "steps": 1, "fd": 0.5}]}
    assert read([written(tmp_path / "metrics.json", whole)])[0].rows[0]["fd"] == 0.5
    path = written(tmp_path / "metrics.json", whole | change)
    with pytest.raises(ValueError, match=message) as error:
        read([path])
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "content", [5, {"image_mean": "x"}, {"image_mean": [1, 2]}, {"image_std": [0, 1, 1]}]
)
def test_settings_of_an_extractor(content: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "preprocessor_config.json", content)
    with pytest.raises(ValueError, match=str(path)):
        _normalisation(tmp_path, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_shards_of_an_extractor_stay_in_its_folder(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "../../etc/passwd"}})
    with pytest.raises(ValueError, match=f"{path}: weight_map: found '../../etc/passwd', expected a name"):
        _sha256(tmp_path)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"solver": "euler"}, r"sampler.steps: found None, expected an integer of 1 .. 100000"),
        ({"solver": "euler", "steps": True}, r"sampler.steps: found True"),
        ({"solver": "euler", "steps": 10**9}, r"sampler.steps: found 1000000000"),
        ({"solver": "rk9", "steps": 2}, r"sampler.solver: found 'rk9', expected one of \['euler'"),
        ({"solver": "euler", "steps": 2, "grd": {}}, r"sampler.grd: no such key, did you mean sampler.grid"),
        (
            {"solver": "euler", "steps": 2, "grid": "karras"},
            r"sampler.grid: found 'karras', expected a mapping",
        ),
        ({"solver": "euler", "steps": 2, "grid": {"name": "cosine"}}, r"sampler.grid.name: found 'cosine'"),
        (
            {"solver": "euler", "steps": 2, "grid": {"name": "karras", "rho": "7"}},
            r"sampler.grid.rho: found '7'",
        ),
    ],
)
def test_wrong_samplers_of_pairs(sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generate(teacher="teacher", count=4, sampler=sampler)


def test_pairs_on_a_named_grid(tmp_path: Path) -> None:
    """They end where Euler's method on that grid ends; the header names the grid, and only where one was named."""
    from distill.cache.pairs import Header
    from distill.cache.writer import write_pairs
    from distill.data.rng import noise_checksum
    from distill.models.conditions import Nothing
    from distill.models.decoder import Points as PointDecoder

    made = {
        "sample_shape": (2,), "count": 6, "seed": 0, "stream": "pairs", "noise_checksum": noise_checksum(0, "pairs", (2,)),
        "teacher": "t", "solver": "euler", "steps": 4, "guidance_scale": 1.0,
        "conditions": Nothing().config(), "decoder": PointDecoder().config(),
    }  # fmt: skip
    teacher = exact_denoiser(Flow(), [[0.7, -0.4]], 0.3)
    write_pairs(tmp_path / "named", teacher, Header(**made, grid={"name": "karras", "rho": 3.0}))
    write_pairs(tmp_path / "own", teacher, Header(**made))
    rows = torch.arange(6)
    batch = Pairs(tmp_path / "named").fetch(rows, rows)
    x = batch.z
    times = karras_grid(Flow(), 4, rho=3.0).tolist()
    for t, s in pairwise(times):
        mean = torch.tensor([0.7, -0.4])  # of x0 given x: by hand
        gain = (1 - t) * 0.09 / ((1 - t) ** 2 * 0.09 + t**2)
        x0 = mean + gain * (x - (1 - t) * mean)
        x = x + (s - t) * (x - x0) / t
    torch.testing.assert_close(batch.x0, x, atol=1e-5, rtol=1e-5)
    headers = [json.loads((tmp_path / n / "manifest.json").read_text())["header"] for n in ("named", "own")]
    assert headers[0].get("grid") == {"name": "karras", "rho": 3.0}
    assert "grid" not in headers[1]
    assert not torch.equal(Pairs(tmp_path / "own").fetch(rows, rows).x0, batch.x0)
