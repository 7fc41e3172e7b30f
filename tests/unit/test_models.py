"""Denoisers, generators, sampler specs and the native format."""

from __future__ import annotations

import json

import pytest
import torch

import distill
from distill.data.cond import Cond
from distill.models.conditions import Labels, Nothing
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.flow import Flow

NET = {"_target_": "distill.nets.unet.UNet", "width": 8, "embedding": 16, "groups": 4, "num_classes": 3}
ONE = SamplerSpec(steps=1, times={1: (1.0, 0.0)})


class Counting(torch.nn.Module):
    """v = (label + 1) * x, counting forwards; the null label (-1) gives v = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.one = [], torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        self.calls.append(len(x))
        return self.one * (cond.get("label") + 1.0)[:, None] * x


def denoiser(**options) -> Denoiser:
    return Denoiser(
        Counting(), Flow(), "velocity", (2,), **({"guidable": True, "conditions": Labels(3)} | options)
    )


def make(folder, spec: SamplerSpec = ONE) -> Generator:
    torch.manual_seed(0)
    net = UNet(**{k: v for k, v in NET.items() if k != "_target_"})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = Denoiser(net, Flow(), "velocity", (1, 8, 8), coupling="endpoint", decoder=Pixels())
    save_model(folder, model, spec)
    return Generator(model.eval(), spec)


def test_guidance_is_one_batched_forward_and_none_at_scale_one():
    model, x, t = denoiser(), torch.randn(4, 2), torch.rand(4)
    cond = Cond.of_labels(torch.tensor([0, 1, 2, 2]))
    plain = model.velocity(x, t, cond)
    assert model.net.calls == [4]
    guided = model.velocity(x, t, cond, 2.5)
    assert model.net.calls == [4, 8]
    assert torch.allclose(guided, 2.5 * plain)  # u = 0
    per_sample = torch.tensor([1.0, 0.0, 2.0, 3.0])
    assert torch.allclose(model.velocity(x, t, cond, per_sample), per_sample[:, None] * plain)
    with pytest.raises(
        ValueError, match=r"guidance_scale: found 2.0, but this model was not trained with a null"
    ):
        Denoiser(Counting(), Flow(), "velocity", (2,)).velocity(x, t, cond, 2.0)


def test_transport_returns_the_sample_or_the_states_at_times():
    model, z, cond = denoiser(), torch.randn(3, 2), Cond.of_labels(torch.zeros(3, dtype=torch.int64))
    sample = model.transport(z, cond, steps=4)
    assert sample.shape == (1, 3, 2)
    assert torch.allclose(sample[0], z * 0.75**4)  # Euler on dx/dt = x from 1 to 0
    states = model.transport(z, cond, steps=4, times=[1.0, 0.5, 0.0])
    assert torch.allclose(states, torch.stack([z, z * 0.75**2, z * 0.75**4]))
    with pytest.raises(ValueError, match="not all points of the solver's grid"):
        model.transport(z, cond, steps=4, times=[0.3])
    with pytest.raises(ValueError, match="solver: found 'rk', expected one of"):
        model.transport(z, cond, steps=4, solver="rk")
    for solver in ("heun", "ddim"):
        assert model.transport(z, cond, steps=64, solver=solver)[0].allclose(z * torch.e**-1, rtol=1e-2)


def test_one_step_equals_generate_and_is_differentiable_in_the_noise():
    generator = Generator(denoiser(), ONE)
    z, cond = torch.randn(3, 2, requires_grad=True), Cond.of_labels(torch.tensor([0, 1, 2]))
    images = generator.generate(z, cond)
    assert torch.allclose(images, generator.one_step(z, cond))
    (gradient,) = torch.autograd.grad(images.sum(), z)
    assert torch.allclose(gradient, torch.tensor([[0.0], [-1.0], [-2.0]]).expand(3, 2))


def test_samples_do_not_depend_on_batches_or_neighbours(tmp_path):
    generator = make(tmp_path)
    images = generator.sample(9)
    assert torch.allclose(images, generator.sample(9, batch_size=2), atol=1e-6)
    assert torch.allclose(images[:4], generator.sample(4), atol=1e-6)
    assert not torch.allclose(images, generator.sample(9, seed=1))
    assert torch.allclose(generator.sample(3, label=[0, 1, 2]), images[:3], atol=1e-6)


def test_spec_refuses_other_step_counts_and_round_trips():
    with pytest.raises(ValueError, match=r"distilled for \[1\] step\(s\) and is not valid at 4"):
        ONE.grid(Flow(), 4)
    assert ONE.grid(Flow(), 4, force=True).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert SamplerSpec.from_dict(json.loads(json.dumps(ONE.to_dict()))) == ONE
    free = SamplerSpec(steps=8, any_steps=True)
    assert free.valid(3)
    assert not ONE.valid(2)
    with pytest.raises(ValueError, match=r"times\[2\]: expected 3 descending times"):
        SamplerSpec(steps=2, times={2: (0.0, 0.5, 1.0)})
    with pytest.raises(ValueError, match=r"steps: 3 is not among"):
        SamplerSpec(steps=3, times={1: (1.0, 0.0)})


def test_saved_and_loaded_models_make_the_same_images(tmp_path):
    original = make(tmp_path / "a")
    assert torch.equal(original.sample(4), distill.load(tmp_path / "a").sample(4))
    make(tmp_path / "b")
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "a" / name).read_bytes() == (
            tmp_path / "b" / name
        ).read_bytes()  # equal runs, equal bytes


def edit(folder, **changes) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_broken_model_folders_are_named(tmp_path):
    make(tmp_path)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    edit(tmp_path, schema=3)
    with pytest.raises(ValueError, match=r"model.json: schema: found 3, this version reads 2"):
        load_model(tmp_path)
    edit(tmp_path, schema=2, net={"_target_": "os.system", "command": "true"})
    with pytest.raises(ValueError, match=r"_target_: found 'os.system', expected a net under distill.nets"):
        load_model(tmp_path)
    edit(tmp_path, net=NET | {"width": 16})
    with pytest.raises(ValueError, match=r"model.safetensors: does not fit the net"):
        load_model(tmp_path)
    edit(tmp_path, net=NET)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"model.safetensors: sha256: found"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: missing"):
        load_model(tmp_path)


def test_labels_are_checked(tmp_path):
    generator = make(tmp_path)
    assert generator.conditions.ask(count=5).get("label").tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match=r"label: expected classes 0 .. 2, found \[7\]"):
        generator.sample(2, label=7)
    with pytest.raises(ValueError, match="label: expected one label or 3 of them, found 2"):
        generator.sample(3, label=[0, 1])
    with pytest.raises(ValueError, match="this model takes no class labels"):
        Generator(denoiser(conditions=Nothing()), ONE).sample(1, label=0)
    with pytest.raises(
        ValueError, match=r"prompt: found 'a cat', but this model takes no prompts; expected label=0 .. 2"
    ):
        generator.sample(1, prompt="a cat")


def test_scores_are_read_off_independent_couplings_alone():
    x, t, cond = torch.randn(2, 2), torch.rand(2), Cond.of_labels(torch.tensor([0, 1]))
    denoiser().score(x, t, cond)
    with pytest.raises(ValueError, match=r"score: a model trained on paired noise and data is a transport"):
        denoiser(coupling="paired").score(x, t, cond)
