"""Adapters as students of every method: one base in memory, checkpoints and model folders of the adapters alone, the base as it
was, identity at the start, and resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_support import checkpoint_of
from method_support import mlp, optim, state, trained
from torch import nn

from distill.engine.module import DistillModule
from distill.methods.consistency import Consistency
from distill.methods.degrade import Degrade
from distill.methods.disback import DisBack
from distill.methods.dmd import DMD
from distill.methods.flow_matching import FlowMatching
from distill.methods.lcm import LCM
from distill.methods.progressive import Progressive
from distill.methods.sid import SiD
from distill.models.adapters import Adapted, adapter_of, merged, own_names, trained_parameters
from distill.models.denoiser import Denoiser
from distill.models.native import load_model, load_models, save_model
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear
from distill.stages.adapt import adapted
from distill.stages.load import Load
from distill.world import World

ANY = SamplerSpec(steps=4, any_steps=True)
LORA = {"lora": {"rank": 2}}


def loaded(folder: Path, process: Any = None, kind: str = "velocity", **options: Any) -> dict[str, Denoiser]:
    """A stored teacher, and a student with adapters on it; read as a stage reads them."""
    teacher = mlp(process or Flow(), kind, classes=8, **options)
    save_model(folder / "teacher", teacher, ANY)
    known: dict[str, Denoiser] = {}
    models = [load_model(folder / "teacher", known=known).denoiser for _ in range(2)]
    assert models[0].net is models[1].net
    torch.manual_seed(1)
    return {"student": adapted(models[0], LORA), "teacher": models[1]}


def nodes(folder: Path) -> list[str]:
    """A path of two nodes: the teacher, and adapters on it that are not 0."""
    node = loaded(folder)["student"]
    with torch.no_grad():
        for parameter in trained_parameters(node.net).values():
            parameter.add_(0.1)
    save_model(folder / "node", node, ANY)
    return [str(folder / "teacher"), str(folder / "node")]


def degrade(folder: Path) -> DistillModule:
    models = loaded(folder)
    return Degrade(models["student"], models["teacher"], total_steps=6, node_every=3)


# Each trains adapters (and an average of them); those of score distillation also a fake score.
METHODS: dict[str, Callable[[Path], DistillModule]] = {
    "flow_matching": lambda folder: FlowMatching(loaded(folder)["student"]),
    "consistency": lambda folder: Consistency(**loaded(folder), target_decay=0.9),
    "progressive": lambda folder: Progressive(**loaded(folder, VPCosine(), "v"), steps=2),
    "lcm": lambda folder: LCM(
        **loaded(folder, VPScaledLinear(), "v"), ddim_steps=20, embed_w=False, w_max=2.0
    ),
    "sid": lambda folder: SiD(**loaded(folder)),
    "dmd": lambda folder: DMD(**loaded(folder), gan={}),
    "disback": lambda folder: DisBack(**loaded(folder), nodes=nodes(folder), backtrack={"steps_per_node": 2}),
    "degrade": degrade,
}


def ready(method: DistillModule) -> DistillModule:
    method.prepare({update.name: optim(lr=0.05) for update in method.updates()}, seed=5)
    return method


def places(networks: list[nn.Module]) -> dict[int, int]:
    """Place in memory of every tensor -> its numbers."""
    tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    return {t.data_ptr(): t.numel() for t in tensors if t.numel()}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_adapters_alone_and_resumes_bit_equal(name, tmp_path):
    make = METHODS[name]
    whole = ready(make(tmp_path))
    teacher = load_model(tmp_path / "teacher").denoiser.net
    base = {k: v.clone() for k, v in teacher.state_dict().items()}
    before = state(whole)
    trained(whole, tmp_path / "whole", 6, classes=8)
    after = state(whole)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    own = {key for key in before if ".lora_" in key or "head." in key}
    assert moved <= own
    assert len([key for key in moved if key.startswith("student.") and key.endswith("lora_B.weight")]) >= 3
    # One base: of student, fake score, averages and teacher, all tensors but the adapters lie in one place.
    networks = [*whole.networks.values(), *whole.ema.values(), *whole.frozen.values()]
    denoisers = [network for network in networks if isinstance(network, Denoiser)]
    adapters = [p for d in denoisers if adapter_of(d.net) for p in trained_parameters(d.net).values()]
    numbers = sum(places(denoisers).values()) - sum(p.numel() for p in adapters)
    assert numbers == sum(places([teacher]).values())
    for network in denoisers:
        for key, value in network.net.state_dict().items():
            if ".lora_" not in key:
                assert torch.equal(value, base[key.removeprefix("net.").replace(".layer.", ".")]), key
    # Checkpoints hold the adapters, and what a GAN's head has.
    stored = checkpoint_of(tmp_path / "whole")
    for role, values in [*stored["networks"].items(), *stored["ema"].items()]:
        assert values
        assert role == "head" or all(".lora_" in key for key in values)
    halves = ready(make(tmp_path))
    trained(halves, tmp_path / "halves", 3, classes=8)
    continued = trained(ready(make(tmp_path)), tmp_path / "halves", 6, classes=8)
    assert all(torch.equal(after[k], v) for k, v in state(continued).items())


def test_a_model_folder_holds_the_adapter_and_finds_its_base(tmp_path):
    student = loaded(tmp_path, seed=3)["student"]
    with torch.no_grad():
        for parameter in trained_parameters(student.net).values():
            parameter.add_(0.1)
    save_model(tmp_path / "student", student, ANY)
    stored = load_model(tmp_path / "student")
    z, cond = torch.randn(4, 2), student.conditions.of(torch.arange(4))
    wanted = student.transport(z, cond, steps=3)
    assert torch.equal(stored.denoiser.transport(z, cond, steps=3), wanted)
    assert (tmp_path / "student" / "model.safetensors").stat().st_size < 0.9 * (
        tmp_path / "teacher" / "model.safetensors"
    ).stat().st_size
    # A next round, whose student and teacher are this student: adapters of their own on one base.
    init, teacher = load_models(
        {"init": tmp_path / "student", "teacher": tmp_path / "student"}, adapters=False
    ).values()
    assert not set(init.denoiser.trained().values()) & set(teacher.denoiser.parameters())
    shared = set(init.denoiser.parameters()) & set(teacher.denoiser.parameters())
    assert len(shared) == len(list(load_model(tmp_path / "teacher").denoiser.parameters()))
    # A Load stage of another run names the base from where the copy lies.
    copied = tmp_path / "far" / "runs" / "taken" / "student"
    copied.mkdir(parents=True)
    stage = Load(str(tmp_path / "student"))
    stage.fingerprint()
    stage.run(SimpleNamespace(folder=copied, world=World()))
    assert torch.equal(load_model(copied).denoiser.transport(z, cond, steps=3), wanted)
    # A run that was moved; an adapter alone; its base beside it; another base.
    shutil.copytree(tmp_path / "student", tmp_path / "alone" / "deep" / "student")
    with pytest.raises(
        FileNotFoundError, match=r"base: found no model in .*deep/student/base .*link or copy it to"
    ):
        load_model(tmp_path / "alone" / "deep" / "student")
    shutil.copytree(tmp_path / "teacher", tmp_path / "alone" / "deep" / "student" / "base")
    again = load_model(tmp_path / "alone" / "deep" / "student").denoiser
    assert torch.equal(again.transport(z, cond, steps=3), wanted)
    save_model(tmp_path / "teacher", mlp(Flow(), classes=8, seed=4), ANY)
    with pytest.raises(
        ValueError, match=r"base: found the weights \w+ in .*teacher, but the adapter was trained on"
    ):
        load_model(tmp_path / "student")


def test_merged_weights_give_the_same_samples(tmp_path):
    student = loaded(tmp_path)["student"]
    with torch.no_grad():
        for parameter in trained_parameters(student.net).values():
            parameter.add_(0.1)
    whole = student.with_(net=merged(student.net), conditions=student.conditions)
    assert adapter_of(whole.net) is None
    z, cond = torch.randn(4, 2), student.conditions.of(torch.arange(4))
    assert torch.allclose(whole.transport(z, cond, steps=3), student.transport(z, cond, steps=3), atol=1e-5)
    assert own_names(whole.net) == list(loaded(tmp_path)["teacher"].net.state_dict())


def test_an_adapted_flow_of_another_process_is_its_teacher_at_the_start(tmp_path):
    models = loaded(tmp_path, VPCosine(), "v")
    for start in ("converted", "raw"):
        flow = adapted(models["teacher"], {**LORA, "process": "flow", "start": start})
        plain = adapted(models["teacher"], {"process": "flow", "start": start})
        assert all(".lora_" in name for name in flow.trained())
        z, cond = torch.randn(4, 2), flow.conditions.of(torch.arange(4))
        assert torch.equal(flow.transport(z, cond, steps=3), plain.transport(z, cond, steps=3))
        save_model(tmp_path / start, flow, ANY)
        again = load_model(tmp_path / start).denoiser
        assert torch.equal(again.transport(z, cond, steps=3), plain.transport(z, cond, steps=3))


NET = UNet(width=8, embedding=16, groups=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "adapt.lora.rank: found 0, expected at least 1"),
        ({"alpha": -1.0}, "adapt.lora.alpha: found -1.0, expected a positive number"),
        ({"dropout": 1.0}, r"adapt.lora.dropout: found 1.0, expected a number in \[0, 1\)"),
        ({"targets": []}, "adapt.lora.targets: found none, expected names of layers such as embed.0"),
        (
            {"targets": ["conv1", "to_q"]},
            "adapt.lora.targets: found 'to_q', which names no layer; expected some of embed.0, .*conv1",
        ),
        (
            {"targets": ["norm1"]},
            "adapt.lora.targets: found 'norm1', which names .*norm1, a GroupNorm; expected linear",
        ),
        ({"rnak": 2}, "adapt.lora.rnak: no such key, did you mean adapt.lora.rank?"),
    ],
)
def test_wrong_adapters_are_refused(options, words):
    model = Denoiser(NET, Flow(), "velocity", (1, 8, 8))
    with pytest.raises(ValueError, match=words):
        adapted(model, {"lora": options})


def test_a_rank_above_that_of_most_layers_is_warned_of():
    model = Denoiser(NET, Flow(), "velocity", (1, 8, 8))
    with pytest.warns(
        UserWarning, match=r"adapt.lora.rank: found 12, more than .* of 2 of 3 layers, such as 8 of"
    ):
        adapted(model, {"lora": {"rank": 12, "targets": ["embed.0", "shrink.0", "stem"]}})


def test_other_adapters_and_other_changes_are_refused():
    model = adapted(Denoiser(NET, Flow(), "velocity", (1, 8, 8)), {"lora": {"rank": 2}})
    assert adapted(model, {"lora": {"rank": 2}}) is model
    with pytest.raises(ValueError, match=r"adapt.lora: found .*'rank': 3.* has adapters of rank 2"):
        adapted(model, {"lora": {"rank": 3}})
    with pytest.raises(ValueError, match=r"adapt.net: found .*adapters keep"):
        adapted(model, {"lora": {}, "net": {"width": 3}})
    with pytest.raises(ValueError, match="base: found a net with an adapter"):
        Adapted(model.net)
    with pytest.raises(ValueError, match="base: the adapter's base was not loaded from a model folder"):
        save_model(Path("nowhere"), model, ANY)
    assert not Path("nowhere").exists()
