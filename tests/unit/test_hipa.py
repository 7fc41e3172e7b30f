"""HiPA: the loss by hand, adapters on a frozen base, resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_support import mlp, optim, state
from torch import Tensor, nn

from distill.cache.pairs import Header, Pairs
from distill.cache.writer import write_pairs
from distill.data.batch import Batch
from distill.data.rng import Draws, noise_checksum
from distill.engine.fit import Fit, train
from distill.engine.update import Step
from distill.methods.hipa import HiPA
from distill.methods.losses.frequency import edges, high_pass
from distill.models.adapters import trained_parameters
from distill.models.autoencoder import entry_of
from distill.models.decoder import Autoencoder, Pixels
from distill.models.denoiser import Denoiser
from distill.models.extractors.inception import Inception
from distill.models.features import load_digits64
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.nets.autoencoder import ConvAutoencoder
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear
from distill.stages.adapt import adapted

SMALL: dict[str, Any] = {"width": 8, "embedding": 16, "groups": 4, "multipliers": [1]}


def teacher(process: Any = None, kind: str = "velocity", **options: Any) -> Denoiser:
    torch.manual_seed(0)
    net = UNet(**SMALL | options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    shape = (options.get("channels", 1), 8, 8)
    return Denoiser(net, process or Flow(), kind, shape, decoder=Pixels())


def pairs(folder: Path, model: Denoiser, count: int = 24) -> Pairs:
    header = Header(
        sample_shape=model.sample_shape,
        count=count,
        seed=0,
        stream="pairs",
        noise_checksum=noise_checksum(0, "pairs", model.sample_shape),
        teacher="0" * 64,
        solver="euler",
        steps=4,
        guidance_scale=1.0,
        conditions=model.conditions.config(),
        decoder=entry_of(model.decoder),
    )
    write_pairs(folder, model, header)
    return Pairs(folder)


def batch_of(model: Denoiser, count: int = 4) -> Batch:
    rows = torch.arange(count)
    x0, z = (
        torch.randn(count, *model.sample_shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2)
    )
    return Batch(rows, rows, model.conditions.of(rows), x0=x0, z=z)


def step(count: int = 4) -> Step:
    return Step(0, Draws(0, "s", 0, torch.arange(count)))


def test_the_loss_is_that_of_the_formula() -> None:
    student, features = teacher(), load_digits64()
    high = {"fourier": 0.5, "edges": 0.25, "rho": 0.5}
    method = HiPA(student, mse=2.0, perceptual=3.0, features=features, high_frequency=high)
    batch = batch_of(student)
    assert batch.x0 is not None
    assert batch.z is not None
    made = batch.z - student.net(batch.z, torch.ones(4), batch.cond)  # x0 = z - v of a flow at t = 1
    f, g = (nn.functional.normalize(features(images), dim=1) for images in (made, batch.x0))
    wanted = {
        "mse": (made - batch.x0).square().mean(),
        "perceptual": (f - g).square().sum(1).mean(),
        "fourier": (high_pass(made, 0.5) - high_pass(batch.x0, 0.5)).abs().mean(),
        "edges": (edges(made) - edges(batch.x0)).abs().mean(),
    }
    found = method.loss(batch, step())
    for name, value in wanted.items():
        torch.testing.assert_close(found.logs[name], value)
    whole = 2 * wanted["mse"] + 3 * wanted["perceptual"] + 0.5 * wanted["fourier"] + 0.25 * wanted["edges"]
    torch.testing.assert_close(found.total, whole)
    assert float(found.logs["saturated"]) == float((made.abs() > 1).float().mean())
    shown = method_diagnostics(method, batch)
    assert set(shown) == {"hf_student", "hf_teacher"}


def method_diagnostics(method: HiPA, batch: Batch) -> dict[str, Tensor]:
    method.prepare({"student": optim()}, seed=0)
    with torch.no_grad():
        return dict(method.diagnostics(batch, step().draws).scalars)


def test_the_start_is_what_is_sampled() -> None:
    """At a lower noise level the student gets noise of that level, in training and in its sampler; none of the data."""
    for process, kind, level in (
        (VPScaledLinear(), "eps", 5.0),
        (VPCosine(), "v", None),
        (Flow(), "x0", 4.0),
    ):
        method = HiPA(teacher(process, kind), level=level)
        method.prepare({"student": optim(ema=None)}, seed=0)
        batch, generator = batch_of(method.student), method.as_generator()
        assert batch.z is not None
        with torch.no_grad():
            made = method.samples(method.student, batch.z, batch.cond)
            torch.testing.assert_close(made, generator.generate(batch.z, batch.cond))
        assert method.result().coupling == ("endpoint" if level is None else "few_step")
        if level is not None:
            t = torch.tensor([method.start], dtype=torch.float64)
            assert float(process.sigma(t) / process.alpha(t)) == pytest.approx(level, rel=1e-6)


def test_latents_are_compared_as_images() -> None:
    net = ConvAutoencoder(channels=1, latent=2, levels=1)
    decoder = Autoencoder(net, scale=0.5)
    student = teacher(channels=2).with_(decoder=decoder)
    method, batch = HiPA(student), batch_of(student)
    assert method.recomputes
    assert batch.x0 is not None
    assert batch.z is not None
    loss = method.loss(batch, step())
    made = decoder.decode(student.x0(batch.z, torch.ones(4), batch.cond))
    torch.testing.assert_close(loss.logs["mse"], (made - decoder.decode(batch.x0)).square().mean())
    loss.total.backward()
    assert all(p.grad is None for p in net.parameters())
    assert student.net.out.weight.grad.abs().sum() > 0


def test_adapters_alone_are_trained_and_a_killed_training_continues_bit_equal(tmp_path: Path) -> None:
    save_model(tmp_path / "teacher", teacher(), SamplerSpec(steps=4, any_steps=True))
    source = pairs(tmp_path / "pairs", load_model(tmp_path / "teacher").denoiser)

    def method() -> HiPA:
        base = load_model(tmp_path / "teacher").denoiser
        torch.manual_seed(1)
        made = HiPA(adapted(base, {"lora": {"rank": 2}}), features=load_digits64())
        made.prepare({"student": optim(lr=0.05)}, seed=5)
        return made

    def run(made: HiPA, folder: Path, steps: int) -> dict[str, Tensor]:
        train(made, source, Fit(steps=steps, batch_size=8), folder=folder, config={})
        return state(made)

    first, whole = method(), method()
    before, after = state(first), run(whole, tmp_path / "whole", 4)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert all(".lora_" in key for key in moved)
    assert len(moved) >= len(trained_parameters(whole.student.net))
    base = load_model(tmp_path / "teacher").denoiser.net.state_dict()
    for key, value in whole.student.net.state_dict().items():
        if ".lora_" not in key:
            assert torch.equal(value, base[key.removeprefix("net.").replace(".layer.", ".")]), key
    run(method(), tmp_path / "parts", 2)
    continued = run(method(), tmp_path / "parts", 4)
    assert all(torch.equal(after[key], continued[key]) for key in after)
    shown = method_diagnostics(whole, batch_of(whole.student))
    layers = whole.student.net.layers().values()
    norm = torch.stack([layer.delta().square().sum() for layer in layers]).sum().sqrt()
    torch.testing.assert_close(shown["adapter_norm"], norm.detach())


def test_a_large_amplification_is_warned_of_and_refused() -> None:
    with pytest.warns(
        UserWarning, match=r"level: at t = 999 .* multiplies the error of its predicted eps by 37.6"
    ):
        HiPA(teacher(VPScaledLinear(beta_end=0.017), "eps"))
    with pytest.raises(
        ValueError, match=r"kind: found 'eps', .* multiplies its error by .* at the first step"
    ):
        HiPA(teacher(VPScaledLinear(beta_end=0.03), "eps"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"high_frequency": {"rho": 0}},
            "high_frequency.rho: found 0, expected a share of the Nyquist frequency",
        ),
        ({"high_frequency": {"rho": 1.5}}, "rho: found 1.5, expected a share"),
        ({"high_frequency": {"fourier": -1}}, "high_frequency.fourier: found -1, expected at least 0"),
        ({"high_frequency": {"sobel": 1}}, "high_frequency.sobel: no such key"),
        ({"mse": -1.0}, "mse: found -1.0, expected at least 0"),
        ({"mse": 0, "high_frequency": {"fourier": 0, "edges": 0}}, "found no weight above 0"),
        ({"level": 1e9}, "^level: found .* expected noise levels that"),
        ({"level": -1}, "^level: found .* expected a list of positive"),
    ],
)
def test_options_that_train_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HiPA(teacher(VPCosine(), "v"), **options)


def test_models_that_it_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match="high_frequency: the student's samples are no images"):
        HiPA(mlp(Flow()))
    with pytest.raises(
        ValueError, match=r"features: digits64 reads images \[B, 1, 8, 8\], got \[2, 2, 8, 8\]"
    ):
        HiPA(teacher(channels=2), features=load_digits64())
    inception = Inception(nn.Flatten(), resize=lambda image: image.astype("float32"), dim=3).eval()
    with pytest.raises(ValueError, match="features: inception_other measures and gives no gradient"):
        HiPA(teacher(), features=inception)
    with pytest.raises(ValueError, match="student: takes the guidance as an input"):
        HiPA(teacher(guidance_embedding=8))
