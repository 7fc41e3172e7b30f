"""A decoder says what samples are; the rank of a tensor says nothing."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import distill
from distill.cache.pairs import Header, Pairs
from distill.cache.writer import write_pairs
from distill.data.cond import Cond
from distill.data.rng import noise_checksum
from distill.data.tensors import Tensors
from distill.engine.fit import Fit, train
from distill.engine.schedule import Linear
from distill.engine.update import Optim
from distill.exporters.card import card
from distill.methods.one_step import OneStep
from distill.methods.reflow import Reflow
from distill.models.autoencoder import entry_of, load_autoencoder, save_autoencoder
from distill.models.conditions import Labels, Nothing
from distill.models.decoder import Autoencoder, Decoder, Pixels, Points, of_source
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.nets.autoencoder import ConvAutoencoder
from distill.nets.mlp import MLP
from distill.process.base import Process, expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine

ANY = SamplerSpec(steps=2, any_steps=True)
ADAM = Optim(partial(torch.optim.Adam, lr=1e-3), Linear(2))


def autoencoder(**options: Any) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(ConvAutoencoder(latent=2, width=4), **options)


def model(
    shape: tuple[int, ...], decoder: Decoder, process: Process | None = None, kind: str = "velocity"
) -> Denoiser:
    torch.manual_seed(1)
    net = MLP(shape=shape, width=8, depth=1, features=4, zero_out=False)
    return Denoiser(net, process or Flow(), kind, shape, decoder=decoder)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (5, 3), (7,)], ids=str)
def test_samples_of_any_rank_run_from_the_teacher_to_the_export(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Video and sequences: processes, solvers, pairs, losses, generator, cache and export; nothing is clamped."""
    for process, kind in ((Flow(), "velocity"), (VPCosine(), "v"), (EDM(), "x0")):
        teacher, z = model(shape, Points(), process, kind), 3 * torch.randn(2, *shape)
        for solver in ("euler", "heun", "dpmpp_2m"):
            assert teacher.transport(z, solver=solver, steps=2).shape == (1, 2, *shape)
        few = Generator(teacher, SamplerSpec(steps=2, any_steps=True, mode="sde"))
        assert few.sample(2).shape == (2, *shape)
    teacher = model(shape, Points())
    header = Header(
        shape, 8, 0, "pairs", noise_checksum(0, "pairs", shape), "t", "euler", 2, 1.0,
        Nothing().config(), Points().config(),
    )  # fmt: skip
    write_pairs(tmp_path / "pairs", teacher, header)
    pairs, rows = Pairs(tmp_path / "pairs"), torch.arange(8)
    batch = pairs.fetch(rows, rows)
    assert torch.equal(batch.x0, teacher.transport(batch.z, steps=2)[0])
    method = Reflow(copy.deepcopy(teacher))
    method.prepare({"student": ADAM}, seed=0)
    train(method, pairs, Fit(steps=2, batch_size=4), folder=tmp_path / "reflow", config={})
    student = OneStep(method.student.with_(coupling="paired"))
    student.prepare({"student": ADAM}, seed=0)
    train(student, pairs, Fit(steps=2, batch_size=4), folder=tmp_path / "student", config={})
    made = student.as_generator()
    save_model(tmp_path / "export", made.denoiser, made.spec)
    again = distill.load(tmp_path / "export")
    samples = again.sample(50)
    assert torch.equal(samples, made.sample(50))
    assert (again.shape, again.decoder.images, float(samples.abs().max()) > 1) == (shape, False, True)
    assert f"points of {'x'.join(map(str, shape))} numbers" in card("r", again, [], None, grid=False)


def test_times_may_be_given_for_every_position() -> None:
    t, x = torch.rand(2, 5), torch.randn(2, 5, 3)
    assert expand(t, x).shape == (2, 5, 1)
    noised = Flow().add_noise(x, torch.zeros_like(x), t)
    assert torch.equal(noised[1, 3], (1 - t[1, 3]) * x[1, 3])
    for wrong in (torch.rand(2, 3), torch.rand(5), torch.tensor(0.5)):
        with pytest.raises(ValueError, match="per-sample values must be"):
            expand(wrong, x)


def test_pixels_are_clamped_and_points_are_not() -> None:
    net = MLP(shape=(1, 2, 2), width=8, depth=1, features=4)  # its output is 0: z is the sample
    pixels, points = (
        Generator(Denoiser(net, Flow(), "velocity", (1, 2, 2), decoder=decoder), ANY)
        for decoder in (Pixels(), Points())
    )
    free = points.sample(100)
    assert float(free.abs().max()) > 1
    assert torch.equal(pixels.sample(100), free.clamp(-1, 1))


def test_samples_of_a_latent_model_are_decoded(tmp_path: Path) -> None:
    decoder = autoencoder(scale=0.5, shift=0.25)
    generator = Generator(model((2, 4, 4), decoder).eval(), ANY)
    latents = generator.generate(generator.noises(0, "sample", torch.arange(3))[0], Cond.nothing(3))
    images = decoder.net.decode(latents / 0.5 + 0.25).clamp(-1, 1)
    assert torch.equal(generator.sample(3), images)
    assert (generator.shape, repr(generator)[:25]) == ((1, 8, 8), "Generator(shape=(1, 8, 8)")
    torch.testing.assert_close(decoder.encode(images), (decoder.net.encode(images) - 0.25) * 0.5)
    # The decoder is no part of what is trained, copied or moved with the model, and lies beside its weights.
    assert set(generator.denoiser.trained()) == {
        f"net.{name}" for name, _ in generator.denoiser.net.named_parameters()
    }
    assert copy.deepcopy(generator.denoiser).decoder is decoder
    assert not any(p.requires_grad for p in decoder.net.parameters())
    save_model(tmp_path, generator.denoiser, ANY)
    again = load_model(tmp_path)
    assert torch.equal(again.sample(3), images)
    assert again.decoder is not decoder
    save_model(tmp_path / "b", again.denoiser, ANY)
    assert (tmp_path / "b" / "model.json").read_bytes() == (tmp_path / "model.json").read_bytes()


def test_gradients_pass_a_decoder() -> None:
    latents = torch.randn(2, 2, 4, 4, requires_grad=True)
    autoencoder().decode(latents).square().mean().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().min(0).values.max()) > 0


def test_channels_are_normalised_by_their_mean_and_std(tmp_path: Path) -> None:
    decoder = autoencoder(mean=[1.0, -2.0], std=[0.5, 4.0])
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    raw = decoder.net.encode(images)
    wanted = (raw - torch.tensor([1.0, -2.0]).view(2, 1, 1)) / torch.tensor([0.5, 4.0]).view(2, 1, 1)
    torch.testing.assert_close(decoder.encode(images), wanted)
    torch.testing.assert_close(decoder.decode(wanted), decoder.net.decode(raw))
    save_autoencoder(tmp_path, decoder)
    assert torch.equal(load_autoencoder(tmp_path).encode(images), decoder.encode(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.0]}, "scale, shift, mean, std: expected scale and shift, or mean and std"),
        ({"mean": [0.0], "std": [1.0], "scale": 2.0}, "scale, shift, mean, std: expected"),
        ({"mean": [0.0, 0.0], "std": [1.0, 0.0]}, "mean, std: found"),
        ({"scale": 0.0}, "scale: found 0.0, expected a positive number"),
    ],
)
def test_wrong_autoencoders(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder(**options)


def test_a_model_has_samples_that_its_decoder_takes() -> None:
    with pytest.raises(
        ValueError, match=r"sample_shape: found \[3, 4, 4\], but the autoencoder has latents \[2,h,w\]"
    ):
        model((3, 4, 4), autoencoder())
    with pytest.raises(ValueError, match="mean: found 3 numbers, expected 2, one a channel"):
        model((2, 4, 4), autoencoder(mean=[0.0] * 3, std=[1.0] * 3))


def test_damaged_autoencoders_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"decoder.json: missing; expected a folder with decoder.json and"
    ):
        load_autoencoder(tmp_path)
    save_autoencoder(tmp_path, autoencoder())
    path, whole = tmp_path / "decoder.json", json.loads((tmp_path / "decoder.json").read_text())
    entry = whole["decoder"]
    for changed, message in (
        (whole | {"schema": 2}, "decoder.json: schema: found 2, this version reads 1"),
        (whole | {"colour": 1}, r"decoder.json: found the entries \['colour', 'decoder', 'schema'\]"),
        (whole | {"decoder": 3}, "decoder.json: decoder: found 3, expected a mapping"),
        (whole | {"decoder": entry | {"zzz": 1}}, "decoder.json: decoder.zzz: no such key"),
        (whole | {"decoder": entry | {"sha256": "0"}}, "decoder.safetensors: sha256: found"),
        (whole | {"decoder": {k: v for k, v in entry.items() if k != "sha256"}}, "decoder.sha256: missing"),
        (
            whole | {"decoder": entry | {"net": entry["net"] | {"width": 8}}},
            "safetensors: does not fit the net",
        ),
        (
            whole | {"decoder": entry | {"net": MLP().config()}},
            "decoder.net._target_: .*an autoencoder under",
        ),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_autoencoder(tmp_path)
    path.write_text(json.dumps(whole))
    (tmp_path / "decoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"decoder.safetensors: missing"):
        load_autoencoder(tmp_path)


def test_pairs_of_latents_bring_their_decoder(tmp_path: Path) -> None:
    teacher = model((2, 4, 4), autoencoder(scale=0.5))
    shape, checksum = teacher.sample_shape, noise_checksum(0, "p", teacher.sample_shape)
    header = Header(
        shape, 4, 0, "p", checksum, "t", "euler", 2, 1.0, Nothing().config(), entry_of(teacher.decoder)
    )  # fmt: skip
    write_pairs(tmp_path, teacher, header)
    pairs, latents = Pairs(tmp_path), torch.randn(2, *shape)
    assert isinstance(of_source(pairs), Autoencoder)
    assert torch.equal(pairs.decoder.decode(latents), teacher.decoder.decode(latents))


def test_a_source_says_what_its_samples_are() -> None:
    assert isinstance(of_source(Tensors(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))), Pixels)
    assert isinstance(of_source(Tensors(torch.full((2, 4), 200.0), value_range=None)), Points)
    with pytest.raises(ValueError, match=r"data: object has neither `value_range` nor `decoder`; expected"):
        of_source(object())


def test_a_config_makes_the_model_again() -> None:
    from distill.models.build import build_model

    net = MLP(shape=(4,), width=8, depth=1, features=4, num_classes=3)
    first = Denoiser(net, VPCosine(), "v", (4,), guidable=True, coupling="few_step", decoder=Pixels())
    assert first.conditions == Labels(3)
    again = build_model(json.loads(json.dumps(first.config())))
    assert again.config() == first.config()
    assert math.prod(again.sample_shape) == 4
    for key in first.config():
        if key != "_target_":
            missing = {k: v for k, v in first.config().items() if k != key}
            with pytest.raises(ValueError, match=rf"model.{key}: missing"):
                build_model(missing)


def test_decodes_other_types_and_keeps_its_weights() -> None:
    decoder = autoencoder(scale=2.0)
    z = torch.randn(2, 2, 4, 4)
    images = decoder.decode(z)
    assert decoder.decode(z.double()).dtype == torch.float64
    assert torch.allclose(decoder.decode(z.double()).float(), images, atol=1e-6)
    with pytest.raises(ValueError, match="samples: found a tensor on the meta device"):
        decoder.decode(z.to("meta"))
    assert torch.equal(decoder.decode(z), images)
