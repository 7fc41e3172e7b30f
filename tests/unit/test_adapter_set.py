"""Several adapters on one base: strength, sums, merging and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_support import mlp
from tests_support import call_verb

from distill.models.adapter_set import AdapterSet
from distill.models.adapters import adapter_of, merged, strengthened, trained_parameters
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.lora_files import write_peft
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.process.flow import Flow
from distill.stages.adapt import adapted

ANY = SamplerSpec(steps=4, any_steps=True)
ONE = SamplerSpec(steps=1, times={1: (1.0, 0.0)})


def student(folder: Path, name: str, spec: SamplerSpec = ANY, **lora: object) -> Denoiser:
    """A stored adapter whose terms are not 0."""
    torch.manual_seed(sum(map(ord, name)))
    model = adapted(load_model(folder / "base").denoiser, {"lora": {"rank": 2, **lora}})
    with torch.no_grad():
        for parameter in trained_parameters(model.net).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(folder / name, model, spec)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "base", mlp(Flow(), classes=8), ANY)
    student(tmp_path, "a", alpha=3.0)
    student(tmp_path, "b", rank=3, targets=["stem", "out"])
    return tmp_path


def room(folder: Path) -> AdapterSet:
    made = AdapterSet(folder / "base")
    made.add("a", folder / "a")
    made.add("b", folder / "b")
    return made


def deltas(generator: Generator) -> dict[str, torch.Tensor]:
    adapter = adapter_of(generator.denoiser.net)
    assert adapter is not None
    return {path: layer.delta() for path, layer in adapter.layers().items()}


def test_adapters_change_places_on_one_base(folder: Path) -> None:
    adapters = room(folder)
    assert adapters.names == ["a", "b"]
    wanted = {name: load_model(folder / name).sample(5) for name in ("base", "a", "b")}
    for name in ("a", "b", None, "a"):
        assert torch.equal(adapters.using(name).sample(5), wanted[name or "base"])
    own = {p.data_ptr() for p in adapters.base.denoiser.parameters()}
    for name in ("a", "b"):
        model = adapters.using(name, 0.5).denoiser
        rest = {p.data_ptr() for p in model.parameters()} - {p.data_ptr() for p in model.trained().values()}
        assert rest == own, "the base's tensors are in memory once"


def test_strength_scales_the_terms(folder: Path) -> None:
    a = load_model(folder / "a")
    half = a.with_strength(0.5)
    for path, delta in deltas(half).items():
        torch.testing.assert_close(delta, 0.5 * deltas(a)[path])
    assert torch.equal(a.with_strength(0.0).sample(4), load_model(folder / "base").sample(4))
    assert a.with_strength(1.0) is a
    assert a.with_strength(None) is a
    assert torch.equal(a.sample(4), load_model(folder / "a").sample(4)), "the model stays as it is"
    # A model of another strength is saved and sampled as it is.
    save_model(folder / "half", half.denoiser, half.spec)
    assert torch.equal(load_model(folder / "half").sample(4), half.sample(4))
    with pytest.raises(ValueError, match="strength: the model has no adapter"):
        load_model(folder / "base").with_strength(0.5)
    guided = adapted(load_model(folder / "base").denoiser, {"lora": {"guidance": {"width": 8}}})
    with pytest.raises(ValueError, match="strength: the adapter takes the guidance w as an input"):
        strengthened(guided.net, 0.5)
    for name, option in (("one", "strength=1"), ("zero", "strength=0")):
        call_verb(folder, "sample", "model=a", "count=4", f"out={name}.png", option, check=True)
    assert (folder / "one.png").read_bytes() != (folder / "zero.png").read_bytes()
    refused = call_verb(folder, "sample", "model=base", "count=4", "out=base.png", "strength=2")
    assert "strength: the model has no adapter; expected one" in refused.stderr


def test_a_sum_is_exact_or_says_what_it_lost(folder: Path) -> None:
    adapters, weights = room(folder), {"a": 0.7, "b": -0.4}
    parts = {name: deltas(adapters.using(name)) for name in weights}
    wanted = {
        path: sum(weights[name] * found[path] for name, found in parts.items() if path in found)
        for path in parts["a"]
    }
    whole = adapters.combined(weights)
    assert whole.error == 0
    assert adapter_of(whole.generator.denoiser.net).rank == 5
    for path, delta in deltas(whole.generator).items():
        torch.testing.assert_close(delta, wanted[path], rtol=1e-5, atol=1e-6)
    exact = adapters.combined(weights, "svd", rank=5)
    assert exact.error < 1e-7
    small = adapters.combined(weights, "svd", rank=1)
    left = {path: delta - wanted[path] for path, delta in deltas(small.generator).items()}
    norms = [sum(float(d.square().sum()) for d in found.values()) ** 0.5 for found in (left, wanted)]
    assert small.error == pytest.approx(norms[0] / norms[1], rel=1e-4)
    for path, delta in left.items():  # the best of its rank: what is left are the other singular values
        values = torch.linalg.svdvals(wanted[path].flatten(1))[1:]
        assert float(delta.norm()) == pytest.approx(float(values.norm()), rel=1e-3, abs=1e-5)
    # It is an adapter as any other.
    save_model(folder / "both", whole.generator.denoiser, whole.generator.spec)
    assert torch.equal(load_model(folder / "both").sample(3), whole.generator.sample(3))
    call_verb(folder, "export", "model=both", "format=lora", "out=exported", check=True)
    for options, words in (
        (({},), "weights: found none, expected some of a, b"),
        (({"c": 1.0},), "name: found 'c', expected one of a, b"),
        (({"a": 1.0}, "linear"), "method, rank: found 'linear' and None"),
        (({"a": 1.0}, "svd"), "method, rank: found 'svd' and None"),
        (({"a": 1.0}, "svd", 9), "rank: found 9, expected 1 .. 2"),
    ):
        with pytest.raises(ValueError, match=words):
            adapters.combined(*options)


def test_students_of_other_steps_are_not_added_but_a_style_is(folder: Path) -> None:
    model = student(folder, "one", ONE)
    adapters = room(folder)
    adapters.add("one", folder / "one")
    with pytest.raises(
        ValueError, match=r"weights: 'a' and 'one' differ in times: .* trained for the same steps"
    ):
        adapters.combined({"a": 1.0, "one": 1.0})
    adapter = adapter_of(model.net)
    assert adapter is not None
    write_peft(folder / "style.safetensors", adapter, {})
    adapters.add("style", folder / "style.safetensors")
    both = adapters.combined({"style": 0.8, "one": 1.0}).generator
    assert both.spec == ONE, "a file has no sampler of its own"
    for path, delta in deltas(both).items():
        torch.testing.assert_close(delta, 1.8 * deltas(adapters.using("one"))[path], rtol=1e-4, atol=1e-6)


def test_merging_in_place_and_back(folder: Path) -> None:
    adapters = room(folder)
    before = {k: v.clone() for k, v in adapters.base.denoiser.state_dict().items()}
    wanted = adapters.using("a", 0.5)
    whole = merged(wanted.denoiser.net)
    generator = adapters.merge("a", 0.5)
    assert generator.denoiser.net is adapters.base.denoiser.net
    torch.testing.assert_close(generator.sample(4), wanted_sample(whole, wanted), rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(before[k], v) for k, v in adapters.base.denoiser.state_dict().items())
    for call, words in (
        (
            lambda: adapters.merge("a"),
            "merging 'a': the adapter 'a' is merged into the base's weights; expected",
        ),
        (lambda: adapters.using("b"), "the adapter 'b': the adapter 'a' is merged"),
        (lambda: adapters.using(None), "the base alone: the adapter 'a' is merged"),
        (lambda: adapters.combined({"a": 1.0}), "combining adapters: the adapter 'a' is merged"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    adapters.unmerge()
    after = adapters.base.denoiser.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "bit for bit"
    assert torch.equal(adapters.using("b").sample(3), load_model(folder / "b").sample(3))
    with pytest.raises(ValueError, match="unmerge: found no merged adapter"):
        adapters.unmerge()


def wanted_sample(net: torch.nn.Module, like: Generator) -> torch.Tensor:
    model = like.denoiser.with_(net=net, conditions=like.conditions)
    return Generator(model, like.spec).sample(4)


def test_other_bases_and_names_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    adapters = room(folder)
    with pytest.raises(ValueError, match="name: found 'a' twice"):
        adapters.add("a", folder / "b")
    with pytest.raises(ValueError, match="base: found no adapter of the base"):
        adapters.add("base", folder / "base")
    other = tmp_path_factory.mktemp("other")
    save_model(other / "base", mlp(Flow(), classes=8, seed=4), ANY)
    student(other, "c")
    with pytest.raises(ValueError, match="c: found no adapter of the base"):
        adapters.add("c", other / "c")
    with pytest.raises(FileNotFoundError, match="not a file"):
        adapters.add("d", folder / "none.safetensors")
