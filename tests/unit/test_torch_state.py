"""What is a function of its arguments does not depend on what the caller has set in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import distill
from distill.cache.pairs import Header, Pairs
from distill.cache.writer import write_pairs
from distill.data.cond import Cond
from distill.data.digits import Digits
from distill.data.folder import ImageFolder
from distill.data.order import Order
from distill.data.plain import plain_torch
from distill.data.points import Points
from distill.data.rng import Draws, noise_checksum, sample_noise
from distill.evaluation.measure import Reference, measure
from distill.evaluation.metrics.energy import energy_distance
from distill.evaluation.metrics.frechet import fd
from distill.evaluation.metrics.kid import kid
from distill.evaluation.metrics.precision import manifold
from distill.evaluation.metrics.sliced import sliced_wasserstein
from distill.evaluation.samples import stratified_split
from distill.models.conditions import Labels
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.models.features import load_digits64
from distill.models.generator import Generator
from distill.models.native import save_model
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.process.vp import VPLinearBetas

NET = {"_target_": "distill.nets.unet.UNet", "width": 16, "embedding": 16, "groups": 4, "num_classes": 10}


@contextmanager
def dtype(value: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def device(value: str) -> Iterator[None]:
    torch.set_default_device(value)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def products(value: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def convolutions(value: str) -> Iterator[None]:
    torch.backends.mkldnn.conv.fp32_precision = value  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.mkldnn.conv.fp32_precision = "none"  # type: ignore[attr-defined]


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def attention() -> Iterator[None]:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@contextmanager
def others() -> Iterator[None]:
    """Numpy's errors and both global generators."""
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    with np.errstate(all="raise"):
        yield


STATES: dict[str, Callable] = {
    "float64": partial(dtype, torch.float64),
    "float16": partial(dtype, torch.float16),
    "bfloat16": partial(dtype, torch.bfloat16),
    "default device": partial(device, "meta"),
    "device context": partial(torch.device, "meta"),
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "products": partial(products, "medium"),
    "convolutions": partial(convolutions, "bf16"),
    "deterministic": deterministic,
    "attention": attention,
    "others": others,
}
state = pytest.mark.parametrize("name", list(STATES))


def exported(folder: Path, mode: str) -> Path:
    """A model folder of a net with random weights, whose sampler is deterministic or draws fresh noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(**{key: value for key, value in NET.items() if key != "_target_"})
        for parameter in net.parameters():  # zero layers would hide the others
            torch.nn.init.normal_(parameter, std=0.1)
    process = Flow() if mode == "ode" else VPLinearBetas(num_timesteps=20)
    kind = "velocity" if mode == "ode" else "eps"
    denoiser = Denoiser(net, process, kind, (1, 8, 8), guidable=True)
    spec = SamplerSpec(steps=3, any_steps=True, mode=mode, guidance_scale=1.5)
    folder.mkdir()
    save_model(folder, denoiser, spec)
    return folder


@pytest.fixture(scope="module", params=["ode", "sde"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """(a model folder, its samples)."""
    folder = exported(tmp_path_factory.mktemp("models") / request.param, request.param)
    return folder, distill.load(folder).sample(6, seed=3)


@state
def test_sampling(model: tuple[Path, Tensor], name: str) -> None:
    folder, expected = model
    student = distill.load(folder)
    with STATES[name]():
        assert torch.equal(student.sample(6, seed=3), expected)
        for label in (3, [3] * 2, np.array([3, 3]), torch.tensor([3, 3], device="cpu")):
            assert torch.equal(student.sample(2, label, seed=3), student.sample(2, 3, seed=3))


@state
def test_loading(model: tuple[Path, Tensor], name: str) -> None:
    folder, expected = model
    with STATES[name]():
        student = distill.load(folder)
    assert {p.dtype for p in student.denoiser.parameters()} == {torch.float32}
    assert not any(p.is_inference() for p in student.denoiser.parameters())
    assert torch.equal(student.sample(6, seed=3), expected)


def pairs(folder: Path, teacher: Denoiser) -> tuple[bytes, Tensor]:
    """(the shard, its noise) of a small cache."""
    folder.mkdir()
    checksum = noise_checksum(0, "pairs", (1, 8, 8))
    header = Header(
        (1, 8, 8), 5, 0, "pairs", checksum, "teacher", "euler", 2, 1.0, Labels(10).config(), Pixels().config()
    )
    write_pairs(folder, teacher, header)
    z = Pairs(folder).fetch(torch.arange(5, device="cpu"), torch.arange(5, device="cpu")).z
    assert z is not None
    return (folder / "pairs-00000.safetensors").read_bytes(), z


@state
def test_pairs(model: tuple[Path, Tensor], name: str, tmp_path: Path) -> None:
    teacher = distill.load(model[0]).denoiser
    expected = pairs(tmp_path / "plain", teacher)
    with STATES[name]():
        found = pairs(tmp_path / "other", teacher)
        equal = torch.equal(found[1], expected[1])
    assert equal
    assert found[0] == expected[0]


def drawn() -> dict[str, Tensor]:
    """Everything that is drawn or read, by name."""
    index = torch.arange(7, device="cpu")
    draws = Draws(1, "train", 5, index)
    points = Points(ring={"count": 3, "radius": 1.0}, count=9, seed=2)
    return {
        "noise": sample_noise(1, "x", index, (3, 5)),
        "little noise": sample_noise(1, "x", index, (2,)),
        "uniform": draws.uniform("a", (3,)),
        "normal": draws.normal("b", (5,)),
        "integer": draws.integer("c", 10),
        "order": Order(20, 3).at(5, 40),
        "points": points.images,
        "components": points.labels,
        "digits": Digits().images,
        "split": torch.cat(stratified_split(None, 20, 7, torch.Generator("cpu").manual_seed(1))),
    }


@state
def test_draws_and_data(name: str) -> None:
    expected = drawn()
    with STATES[name]():
        found = drawn()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].device.type == "cpu", key
        assert torch.equal(found[key], value), key


def measured(images: Tensor, labels: Tensor, more: Tensor) -> list[object]:
    """A row, its floor and the single measures."""
    extractor = load_digits64()
    reference = Reference(images, labels, extractor)
    x, y = more.flatten(1).double()[:30], images.flatten(1).double()[:35]
    return [
        measure(more, labels[: len(more)], reference, extractor),
        reference.floor(),
        reference.references(),
        reference.digest,
        (kid(x, y), fd(x, y), sliced_wasserstein(x, y), energy_distance(x, y)),
        manifold(x, y),
    ]


@pytest.mark.filterwarnings("ignore:.*singular")
@state
def test_measuring(name: str) -> None:
    digits = Digits()
    images, labels = digits.images[:120], digits.labels[:120]
    more = (digits.images[300:340] + 0.2 * sample_noise(0, "x", torch.arange(40), (1, 8, 8))).clamp(-1, 1)
    expected = measured(images, labels, more)
    with STATES[name]():
        found = measured(images, labels, more)
    assert found == expected


@state
def test_folders(name: str, tmp_path: Path) -> None:
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = tmp_path / str(i % 2) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    expected = ImageFolder(str(tmp_path))
    with STATES[name]():
        found = ImageFolder(str(tmp_path), resolution=4)
        images, labels, fingerprint = found.images, found.labels, found.fingerprint()
    assert torch.equal(images, expected.images)
    assert torch.equal(labels, expected.labels)
    assert fingerprint == expected.fingerprint()


def test_plain_torch_restores_what_it_changes() -> None:
    def seen() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_default_device().type,
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled("cpu"),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
        )

    @plain_torch()
    def fails() -> None:
        assert seen() == (torch.float32, "cpu", "medium", False, False, False)
        raise KeyError

    plain = seen()
    with (
        dtype(torch.float64),
        device("meta"),
        products("medium"),
        torch.autocast("cpu"),
        torch.inference_mode(),
    ):
        before = seen()
        with pytest.raises(KeyError):
            fails()
        assert seen() == before == (torch.float64, "meta", "medium", True, True, False)
    assert seen() == plain


def test_gradients_through_a_generator_are_the_callers_choice() -> None:
    """`generate` is differentiable: only what samples by number is without gradients."""
    model = Generator(
        Denoiser(UNet(width=8, embedding=16, groups=4), Flow(), "velocity", (1, 8, 8)),
        SamplerSpec(steps=1, any_steps=True),
    )
    z, _ = model.noises(0, "x", torch.arange(2))
    assert model.generate(z.requires_grad_(), Cond.of_labels(torch.tensor([1, 2]))).requires_grad
    assert not model.sample(2).requires_grad
