"""Model folders and pair caches are data: whatever stands in them, they load or are refused by file and entry."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distill.cache.pairs import MANIFEST, Header, Pairs
from distill.cache.writer import write_pairs
from distill.data.rng import noise_checksum
from distill.files import sha256_file, write_json, write_safetensors
from distill.models.boundary import Boundary
from distill.models.build import build_net, build_process
from distill.models.conditions import Labels
from distill.models.decoder import Points
from distill.models.denoiser import Denoiser
from distill.models.native import load_model, read_weights, save_model
from distill.models.spec import SamplerSpec
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPScaledLinear

OLD = Path(__file__).parent / "data" / "old_format"
MLP = {
    "_target_": "distill.nets.mlp.MLP",
    "shape": [2],
    "width": 8,
    "depth": 2,
    "features": 4,
    "num_classes": 3,
}
UNET = {"_target_": "distill.nets.unet.UNet", "width": 8, "embedding": 16, "groups": 4, "num_classes": 3}
PRECOND = {"_target_": "distill.nets.precond.EDMPrecond", "net": UNET, "sigma_data": 0.5}
MIXTURE = {
    "_target_": "distill.models.analytic.GaussianMixture",
    "means": [[0.0, 1.0], [1.0, 0.0]],
    "std": 0.1,
    "process": {"_target_": "distill.process.flow.Flow"},
    "labelled": True,
}
FEW = SamplerSpec(steps=2, times={1: (1.0, 0.0), 2: (1.0, 0.5, 0.0)}, mode="sde")
CASES: dict[str, tuple[dict[str, Any], Any, str, tuple[int, ...], dict[str, Any], SamplerSpec]] = {
    "few_step": (MLP, Flow(), "velocity", (2,), {"coupling": "few_step"}, FEW),
    "edm": (
        PRECOND,
        EDM(),
        "x0",
        (1, 4, 4),
        {"coupling": "few_step", "boundary": Boundary("cm")},
        SamplerSpec(steps=1, times={1: (80.0, 0.0)}, mode="sde", noise_floor=0.002),
    ),
    "guided": (
        MLP | {"guidance_embedding": 4},
        VPScaledLinear(),
        "v",
        (2,),
        {},
        SamplerSpec(steps=2, any_steps=True, solver="ddim", guidance_w=1.0, guidance_w_range=(0.0, 2.0)),
    ),
    "exact": (MIXTURE, Flow(), "x0", (2,), {"guidable": True}, SamplerSpec(steps=3, any_steps=True)),
}
WRONG: tuple[Any, ...] = (
    None, 5, "x", [], {}, -1, 0, 1e30, 10**18, True, [[1]], {"zzz": 1}, "distill.nets.layers.GroupNorm", [0], 1.5, "../x",
)  # fmt: skip
DELETED = object()


def made(folder: Path, case: str) -> Path:
    net, process, kind, shape, options, spec = CASES[case]
    torch.manual_seed(0)
    built = build_net(net)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = Denoiser(built, process, kind, shape, **options)
    save_model(folder, model, spec)
    return folder


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of plain containers, the whole first."""
    yield place
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield from places(entry, (*place, key))


def mutations(value: Any) -> Iterator[tuple[str, Any]]:
    """(what was done, the contents after it): every entry deleted, replaced, or given an unknown one beside it."""
    for place in places(value):
        for wrong in (*WRONG, DELETED):
            changed = copy.deepcopy(value)
            if not place:
                if wrong is not DELETED:
                    yield f"all = {wrong!r}", wrong
                continue
            at = changed
            for key in place[:-1]:
                at = at[key]
            if wrong is DELETED:
                del at[place[-1]]
            else:
                at[place[-1]] = wrong
            yield f"{place} = {'deleted' if wrong is DELETED else repr(wrong)}", changed


def chosen(value: Any, count: int, seed: str) -> list[tuple[str, Any]]:
    found = list(mutations(value))
    return random.Random(seed).sample(found, min(count, len(found)))


COUNT = int(os.environ.get("DISTILL_FUZZ", "60"))  # of each file; raise it to try more


def refusal(read: Callable[[], Any], what: str) -> tuple[str | None, Any]:
    """(None, what `read` returns) or (the message, None) of an error that users are shown; any other error is a failure."""
    try:
        return None, read()
    except (ValueError, FileNotFoundError) as error:
        return str(error), None
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_wrong_description_loads_or_is_refused_by_its_entry(case: str, tmp_path: Path) -> None:
    path = made(tmp_path, case) / "model.json"
    whole = json.loads(path.read_text())
    expected = load_model(tmp_path).sample(2)
    refused = 0
    for what, changed in chosen(whole, COUNT, case):
        path.write_text(json.dumps(changed))
        message, generator = refusal(lambda: load_model(tmp_path), what)
        if message is not None:
            refused += 1
            assert message.startswith(str(tmp_path)), what
            assert len(message) < 1500, what
            continue
        message, samples = refusal(lambda model=generator: model.sample(2), what)
        assert message is None, f"{what}: loads, but does not sample: {message}"
        if changed == whole:
            assert torch.equal(samples, expected), what
    assert refused > COUNT / 2


@pytest.mark.parametrize("noise", ["seed", "stored"])
def test_a_wrong_manifest_loads_or_is_refused_by_its_entry(noise: str, tmp_path: Path) -> None:
    path = cache(tmp_path, noise) / "manifest.json"
    whole = json.loads(path.read_text())
    refused = 0
    for what, changed in chosen(whole, 4 * COUNT, noise):
        path.write_text(json.dumps(changed))
        message, pairs = refusal(lambda: Pairs(tmp_path), what)
        if message is not None:
            refused += 1
            assert message.startswith(str(tmp_path)), what
            continue
        rows = torch.arange(len(pairs))
        assert pairs.fetch(rows, rows).z is not None
    assert refused > COUNT


def cache(folder: Path, noise: str = "seed") -> Path:
    """A pair cache of 10 points in two shards, with its noise as seeds or as a column."""
    model = load_model(OLD / "export").denoiser
    header = Header(
        sample_shape=(2,), count=10, seed=3, stream="pairs", noise_checksum=noise_checksum(3, "pairs", (2,)),
        teacher="t", solver="euler", steps=2, guidance_scale=1.0, conditions=Labels(3).config(),
        decoder=Points().config(),
    )  # fmt: skip
    write_pairs(folder, model, header, shard_bytes=5 * 20)
    if noise == "stored":
        manifest = json.loads((folder / MANIFEST).read_text())
        for number, shard in enumerate(manifest["shards"]):
            table = safetensors.torch.load_file(folder / shard["file"])
            z = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
            write_safetensors(folder / shard["file"], table | {"z": z * (1 + 0.01 * number)})
            shard["sha256"] = sha256_file(folder / shard["file"])
        manifest["header"]["noise"] = "stored"
        write_json(folder / MANIFEST, manifest)
    return folder


def edit(folder: Path, *place: Any, value: Any, file: str = "model.json") -> None:
    content = json.loads((folder / file).read_text())
    at = content
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("case", "place", "value", "message"),
    [
        ("few_step", ("net",), None, "net: found None, expected a mapping"),
        ("few_step", ("sampler", "zzz"), 1, "sampler.zzz: no such key"),
        ("few_step", ("sampler", "kind"), "x0", "sampler.kind: found 'x0', expected the model's 'velocity'"),
        ("few_step", ("sampler", "times", "2"), [1.0, 1.0, 0.0], "sampler.times.2.: expected 3 descending"),
        ("few_step", ("sampler", "times", "2"), [1.0, 0.5, -0.5], "sampler.times.2.: found -0.5 .. 1.0"),
        ("few_step", ("sampler", "times", "2"), [0.9, 0.5, 0.0], r"sampler.times: start at \[0.9, 1.0\]"),
        ("few_step", ("sampler", "times", "02"), [1.0, 0.5, 0.0], "sampler.times: found the key '02'"),
        ("few_step", ("sample_shape",), "x", "sample_shape: found 'x', expected a list of int"),
        ("few_step", ("sample_shape",), [0], r"sample_shape: found \[0\], expected positive sizes"),
        ("few_step", ("sample_shape",), [-2], r"sample_shape: found \[-2\], expected positive sizes"),
        ("few_step", ("sample_shape",), [3], r"sample_shape: the net does not take \[3\]"),
        ("edm", ("sample_shape",), [1, 3, 3], r"sample_shape: the net does not take \[1, 3, 3\]"),
        ("edm", ("sample_shape",), [1, 10**6, 10**6], "sample_shape: found .* of at most 67108864 numbers"),
        ("few_step", ("conditions", "num_classes"), 10**9, "conditions: found 1000000000 classes, but the net takes 3"),
        ("few_step", ("conditions", "num_classes"), True, "conditions.num_classes: found True, expected int"),
        ("few_step", ("kind",), "v", "kind: kind 'v' needs"),
        ("few_step", ("value_range",), None, "value_range: no such key"),
        ("few_step", ("decoder", "_target_"), "os.system", "decoder._target_: found 'os.system', expected a decoder"),
        ("few_step", ("conditions",), None, "conditions: found None, expected a mapping"),
        ("few_step", ("_target_",), "distill.models.model.Model", "_target_: found .*, expected a model under"),
        ("edm", ("boundary",), {"form": "zzz"}, "boundary.form: found 'zzz', expected one of"),
        ("edm", ("boundary", "sigma_data"), 0.25, r"boundary.sigma_data: found 0.25, .*sigma_data is 0.5"),
        ("edm", ("net", "net", "blocks"), 10_000_000, "net.net: asks for more than the"),
        ("edm", ("net", "net", "width"), 10**9, "net.net: Storage size calculation overflowed"),
        ("few_step", ("net", "depth"), 10**9, "net: asks for more than the 11 tensors"),
        ("few_step", ("sampler", "steps"), 10**9, "steps: found 1000000000, expected 1 .. 100000"),
        ("guided", ("process", "num_timesteps"), 10**9, "num_timesteps .*at most"),
        ("few_step", ("net", "_target_"), "distill.nets.layers.add_guidance", "net._target_: found .*a net under"),
        ("few_step", ("net", "_target_"), "distill.nets.layers.GroupNorm", "net._target_: found .*a net under"),
        ("few_step", ("net", "_target_"), "distill.nets.unet.partial", "net._target_: found .*a net under"),
        ("few_step", ("net", "_target_"), "distill.nets.unet.torch.nn.Linear", "net._target_: found .*a net under"),
        ("few_step", ("net", "_target_"), "distill.recipe.run.Run", "net._target_: found .*a net under"),
        ("few_step", ("process", "_target_"), "distill.process.base.Process", "process._target_: found"),
        ("few_step", ("process", "_target_"), "distill.process.times.grid", "process._target_: found"),
        ("few_step", ("net", "width"), "8", "net.width: found '8', expected int"),
        ("few_step", ("net", "wdth"), 8, "net.wdth: no such key, did you mean net.width"),
        ("few_step", ("weights", "file"), "/etc/passwd", "weights.file: found '/etc/passwd', expected a name"),
        ("few_step", ("weights", "file"), "../x", "weights.file: found '../x', expected a name"),
        ("few_step", ("weights", "sha256"), "x", "weights.sha256: found 'x', expected 64 hexadecimal digits"),
        ("guided", ("sampler", "guidance_w"), 9.0, "sampler.guidance_w, guidance_w_range: found 9.0"),
        ("few_step", ("sampler", "guidance_scale"), 2.0, "sampler.guidance_scale: found 2.0, but the model"),
    ],
)  # fmt: skip
def test_messages(case: str, place: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    made(tmp_path, case)
    edit(tmp_path, *place, value=value)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


def test_duplicate_keys_and_numbers_that_are_none(tmp_path: Path) -> None:
    path = made(tmp_path, "few_step") / "model.json"
    text = path.read_text()
    for old, new in (
        ('"kind": "velocity"', '"kind": "velocity", "kind": "x0"'),
        ('"start_scale": 1.0', '"start_scale": NaN'),
        ('"start_scale": 1.0', '"start_scale": 1e999'),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"model.json: not valid JSON"):
            load_model(tmp_path)


def test_a_net_without_end_takes_no_memory(tmp_path: Path) -> None:
    """Refused while nothing has been allocated for it: not the tensors, and no more layers than the file has tensors."""
    made(tmp_path, "edm")
    edit(tmp_path, "net", "net", "blocks", value=10_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="asks for more than"):
        load_model(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


def reweighted(folder: Path, change: Any) -> str:
    """Change the first tensor, with the right sha256 in the description; its name."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name])
    safetensors.torch.save_file(tensors, path)
    edit(folder, "weights", "sha256", value=sha256_file(path))
    return name


def nan_of(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan_of, "found 1 of .* numbers that are not finite"),
        (lambda t: t / 0, "numbers that are not finite"),
        (lambda t: t.to(torch.int32), "found the type I32, expected one of"),
        (lambda t: t.to(torch.bool), "found the type BOOL, expected one of"),
        (lambda t: t.to(torch.complex64), "found the type C64, expected one of"),
        (lambda t: t.to(torch.float8_e4m3fn), "found the type F8_E4M3, expected one of"),
        (lambda t: torch.cat([t, t]), "does not fit the net that model.json describes"),
    ],
)
def test_weights_that_are_none(change: Any, message: str, tmp_path: Path) -> None:
    name = reweighted(made(tmp_path, "few_step"), change)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert f"{tmp_path / 'model.safetensors'}: " in str(error.value)
    assert name in str(error.value)
    if "fit" not in message:  # what a method reads of another model's weights
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_float_type_are_converted_with_a_word(dtype: torch.dtype, tmp_path: Path) -> None:
    made(tmp_path, "few_step")
    before = {k: v.clone() for k, v in load_model(tmp_path).denoiser.net.state_dict().items()}
    name = reweighted(tmp_path, lambda t: t.to(dtype))
    with pytest.warns(
        UserWarning, match=f"1 tensors are {str(dtype).split('.')[1]} and are converted to float32"
    ):
        after = load_model(tmp_path).denoiser.net.state_dict()
    assert torch.equal(after[name], before[name].to(dtype).float())
    assert all(tensor.dtype == torch.float32 for tensor in after.values())


def test_a_model_does_not_depend_on_the_callers_torch(tmp_path: Path) -> None:
    """Every tensor and buffer, also those that no file holds, under other defaults than torch's."""
    made(tmp_path, "guided")
    wanted = load_model(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            found = load_model(tmp_path)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in (
        (wanted.denoiser.named_parameters(), found.denoiser.named_parameters()),
        (wanted.denoiser.named_buffers(), found.denoiser.named_buffers()),
    ):
        for (name, a), (again, b) in zip(one, other, strict=True):
            assert name == again
            assert not b.is_inference()
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert any(name.endswith("frequencies") for name, _ in found.denoiser.named_buffers())


def test_files_that_are_none(tmp_path: Path) -> None:
    made(tmp_path / "a", "few_step")
    (tmp_path / "a" / "model.json").unlink()
    os.mkfifo(tmp_path / "a" / "model.json")
    with pytest.raises(ValueError, match=r"model.json: not a regular file"):
        load_model(tmp_path / "a")
    made(tmp_path / "b", "few_step")
    (tmp_path / "b" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "b" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: missing"):
        load_model(tmp_path / "b")
    edit(made(tmp_path / "c", "few_step"), "weights", "file", value="model.json")
    edit(tmp_path / "c", "weights", "sha256", value="0" * 64)
    with pytest.raises(ValueError, match=r"model.json: sha256"):
        load_model(tmp_path / "c")


def test_links_are_followed(tmp_path: Path) -> None:
    """The names are checked; what they link to may lie elsewhere, as in the cache of Hugging Face."""
    made(tmp_path / "blobs", "few_step")
    (tmp_path / "snapshot").mkdir()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    assert torch.equal(load_model(tmp_path / "snapshot").sample(3), load_model(tmp_path / "blobs").sample(3))


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("ids", lambda t: t.float(), "ids: found torch.float32, expected torch.int64"),
        ("ids", lambda t: -1 - t, "ids: found -10, expected at least 0"),
        ("label", lambda t: t.float(), "label: found torch.float32, expected torch.int32"),
        ("x0", lambda t: t.double(), "x0: found torch.float64, expected torch.float32"),
        ("x0", lambda t: t / 0, "x0: found values up to nan"),
        ("x0", lambda t: t[:, :1].contiguous(), r"x0: found \(5, 1\), expected \(5, 2\)"),
        ("z", lambda t: t / 0, "z: .*found (nan|inf)"),
        ("z", lambda t: t.half(), "z: found torch.float16, expected torch.float32"),
        ("extra", lambda t: torch.zeros(5), "extra: unexpected column"),
    ],
)
def test_columns_of_another_type_are_refused(column: str, change: Any, message: str, tmp_path: Path) -> None:
    cache(tmp_path, "stored")
    shard = tmp_path / "pairs-00001.safetensors"
    table = safetensors.torch.load_file(shard)
    table[column] = change(table.get(column))
    safetensors.torch.save_file(table, shard)
    edit(tmp_path, "shards", 1, "sha256", value=sha256_file(shard), file="manifest.json")
    with pytest.raises(ValueError, match=message) as error:
        Pairs(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("shards", 0, "file"), "/etc/passwd", r"shards\[0\].file: found '/etc/passwd', expected a name"),
        (("shards", 0, "file"), "../pairs-00000.safetensors", r"shards\[0\].file: found"),
        (("shards", 0, "count"), True, r"shards\[0\].count: found True, expected int"),
        (("header", "seed"), "0", "header.seed: found '0', expected int"),
        (("header", "sample_shape"), [10**9, 10**9], "header.sample_shape: found .* numbers in all"),
        (("header", "latent_scaling"), 0.18, "header.latent_scaling: found 0.18, expected 1"),
        (("header", "zzz"), 1, "header.zzz: no such key"),
        (("zzz",), 1, "zzz: no such key"),
    ],
)
def test_manifests(place: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    cache(tmp_path)
    edit(tmp_path, *place, value=value, file="manifest.json")
    with pytest.raises(ValueError, match=message) as error:
        Pairs(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "manifest.json"))


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    """An export whose sampler repeats the kind, and a cache with a latent scaling of 1: to the samples that were made then."""
    expected = safetensors.torch.load_file(OLD / "samples.safetensors")
    old = json.loads((OLD / "export" / "model.json").read_text())
    assert old["sampler"]["kind"] == old["kind"]
    generator = load_model(OLD / "export")
    torch.testing.assert_close(generator.sample(6), expected["steps2"])
    torch.testing.assert_close(generator.sample(6, steps=1), expected["steps1"])
    assert json.loads((OLD / "pairs" / "manifest.json").read_text())["header"]["latent_scaling"] == 1.0
    pairs = Pairs(OLD / "pairs")
    rows = torch.arange(5)
    batch = pairs.fetch(rows, rows)
    again = generator.denoiser.transport(batch.z, batch.cond, solver="euler", steps=3)[0]
    torch.testing.assert_close(again, batch.x0)
    shutil.copytree(OLD / "pairs", tmp_path / "begun")
    header = json.loads((tmp_path / "begun" / "manifest.json").read_text())["header"]
    (tmp_path / "begun" / "header.json").write_text(json.dumps(header))
    write_pairs(
        tmp_path / "begun", generator.denoiser, pairs.header
    )  # begun by an older version, and continued


def test_configs_from_python_are_checked_alike() -> None:
    with pytest.raises(ValueError, match=r"net.width: found '8', expected int"):
        build_net(MLP | {"width": "8"})
    with pytest.raises(
        ValueError, match=r"stages.teacher.process._target_: found 'os.system', expected a process"
    ):
        build_process({"_target_": "os.system"}, "stages.teacher.process")
    with pytest.raises(ValueError, match=r"net.net._target_: found None, expected a net"):
        build_net(PRECOND | {"net": {"width": 8}})
    with pytest.raises(ValueError, match=r"process.alphas_cumprod: found a value for a tensor"):
        build_process({"_target_": "distill.process.tables.VPTable", "alphas_cumprod": [0.9, 0.5]})
