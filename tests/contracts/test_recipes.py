"""Every recipe and every method on disk: composes, builds, trains one step, saves what it declares, exports and comes back."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path

import pytest
import token_support
import torch
import yaml
from checkpoint_support import checkpoint_of
from tests_support import call_verb

import distill
from distill.data.cond import Cond
from distill.data.digits import Digits
from distill.data.rng import sample_noise
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant
from distill.engine.update import Optim
from distill.evaluation.protocol import Protocol
from distill.models.build import build_net
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.models.model import Model
from distill.models.native import load_model, save_model
from distill.models.result import Result
from distill.process.base import Process
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear

ROOT = Path(__file__).resolve().parents[2]
# Those on other data than the package has are run by tests of the data.
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.yaml") if not p.stem.startswith("fashion_"))
METHOD_CONFIGS = sorted((ROOT / "configs" / "method").glob("*.yaml"))
NET = {"_target_": "distill.nets.unet.UNet", "width": 8, "embedding": 16, "groups": 4}


def test_counts():
    """What this file covers; a new recipe or method raises the number here, and nothing else."""
    assert len(RECIPES) == 17
    assert len(METHOD_CONFIGS) == 21
    on_disk = {path.stem for path in (ROOT / "distill" / "methods").glob("*.py")} - {"__init__"}
    assert on_disk == {path.stem for path in METHOD_CONFIGS}, (
        "every method has a config of its name, and no other has"
    )


# Methods of models of tokens, and tiny models of each by role.
TOKENS: dict[str, Callable[[], dict[str, Model]]] = {
    "tokenizer": lambda: {"student": token_support.tokenizer()},
    "autoregressive": lambda: {"student": token_support.teacher()},
    "distilled_decoding": lambda: {"student": token_support.student()},
    "teacher_score": token_support.scores,
    "distilled_decoding2": token_support.generator,
}


def method_class(path: Path) -> tuple[type[DistillModule], dict]:
    config = yaml.safe_load(path.read_text())
    module, _, name = config.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name), config


def setting(path: Path) -> tuple[Process, str, dict]:
    """Process, kind and options of the student's net for a method; a flow where nothing is said."""
    known: dict[str, tuple[Process, str, dict]] = {
        "progressive": (VPCosine(), "v", {}),
        "guided": (VPCosine(), "v", {}),
        "lcm": (VPScaledLinear(), "v", {"guidance_embedding": 8}),
        "agd": (Flow(), "velocity", {"guidance_embedding": 8}),
    }
    process, kind, options = known.get(path.stem, (Flow(), "velocity", {}))
    return process, kind, NET | options


class PairedDigits(Digits):
    """Digits with a noise each, states between and a guidance scale, as a pair cache would give them."""

    def fetch(self, rows, index):
        batch = super().fetch(rows, index)
        z = sample_noise(0, "pairs", rows, (1, 8, 8))
        times = torch.tensor([1.0, 0.5, 0.0])
        more = {"path": torch.stack([z, (z + batch.x0) / 2, batch.x0], 1), "guidance": 1.0 + rows % 3}
        return batch.__class__(**vars(batch) | {"z": z, "times": times} | more)


def build(path: Path) -> DistillModule:
    cls, options = method_class(path)
    if "total_steps" in options:
        options["total_steps"] = 4  # as a training stage does
    if path.stem in TOKENS:
        options |= {"timesteps": [0, 2]} if "timesteps" in options else {}
        return prepared(cls(**TOKENS[path.stem](), **options))
    process, kind, net = setting(path)
    torch.manual_seed(0)
    roles = {
        role: Denoiser(
            build_net(net if role == "student" else NET),
            process,
            kind,
            (1, 8, 8),
            guidable=True,
            decoder=Pixels(),
        )
        for role in ("student", "teacher", "generator")
        if role in inspect.signature(cls).parameters
    }
    nodes = {"nodes": []} if "nodes" in inspect.signature(cls).parameters else {}
    for network in roles.values():
        for parameter in network.parameters():  # a zero output layer would hide missing gradients
            torch.nn.init.normal_(parameter, std=0.1)
    method = cls(**roles, **nodes, **options)
    if hasattr(
        method, "fake"
    ):  # it starts as the teacher, where distribution matching has no gradient at all
        for parameter in method.fake.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return prepared(method)


def prepared(method: DistillModule) -> DistillModule:
    optim = Optim(partial(torch.optim.AdamW, lr=1e-3), Constant())
    method.prepare({update.name: optim for update in method.updates()}, seed=0)
    return method


@pytest.mark.parametrize("path", METHOD_CONFIGS, ids=lambda path: path.stem)
def test_config_is_the_constructor(path):
    cls, options = method_class(path)
    parameters = inspect.signature(cls).parameters

    def plain(default):
        if isinstance(default, tuple):
            return list(default)
        return asdict(default) if is_dataclass(default) else default

    defaults = {
        k: plain(p.default) for k, p in parameters.items() if p.default is not inspect.Parameter.empty
    }
    assert options == defaults, (
        "configs/method/<name>.yaml spells out every option with the constructor's default"
    )
    assert "Deviations" in (inspect.getdoc(inspect.getmodule(cls)) or "")


@pytest.mark.parametrize("path", METHOD_CONFIGS, ids=lambda path: path.stem)
def test_one_step_trains_what_the_updates_name_alone_and_is_exported(path, tmp_path, monkeypatch):
    """The engine runs one iteration; at every optimizer step it is noted which parameters of which network have gradients."""
    method, found = build(path), {}
    before = [p.clone() for p in method.student.parameters()]
    everything = {**method.networks, **method.frozen, **{f"ema of {k}": v for k, v in method.ema.items()}}
    for network in everything.values():
        network.requires_grad_(True)  # whatever was left switched on must be switched off by the engine
    order = iter([update.name for update in method.plan])
    configure = method.configure_optimizers

    def note(*_):
        found[next(order)] = {
            role: [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters()]
            for role, network in everything.items()
        }

    def watched():
        optimizers = configure()
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(note)
        return optimizers

    monkeypatch.setattr(method, "configure_optimizers", watched)
    tokens = path.stem in TOKENS and path.stem != "tokenizer"
    train(
        method,
        token_support.TokenDigits() if tokens else PairedDigits(),
        Fit(steps=1, batch_size=8),
        folder=tmp_path,
        config={},
    )
    assert list(found) == [update.name for update in method.plan]
    for update in method.plan:
        for role, reached in found[update.name].items():
            if role in update.trains:
                assert all(reached), (
                    f"{update.name}: {reached.count(False)} parameters of {role} get no gradient"
                )
            else:
                assert not any(reached), f"{update.name}: gradient reaches {role}"

    # What was trained is saved and comes back.
    assert any(not torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True))
    assert method.best() is method.ema["student"]
    state = checkpoint_of(tmp_path)
    assert sorted(state["networks"]) == sorted({role for update in method.plan for role in update.trains})
    assert not set(state["networks"]) & set(method.frozen)
    assert state["progress"]["step"] == 1
    original = method.as_generator()
    save_model(tmp_path / "model", original.denoiser, original.spec)
    again, result = load_model(tmp_path / "model"), method.result()
    read = again.denoiser
    assert Result(again.spec, read.coupling, read.guidable, read.boundary) == result
    if path.stem == "tokenizer":  # makes no samples from noise
        images = Digits().images[:3]
        given = (images, torch.zeros(3), Cond.nothing(3))
        assert torch.equal(original.denoiser.eval().x0(*given), read.x0(*given))
        return
    assert torch.equal(original.sample(3), again.sample(3))


# Of each kind of recipe: pairs, given data, score distillation with a second network, tokens. Every method is also
# trained below, every recipe composed and planned by test_docs.py.
DEFAULT = ("instaflow", "lcm", "disback", "distilled_decoding")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
        for name in (path.stem for path in RECIPES)
    ],
)
def smoke(request, shared):
    """A recipe, run once with tiny numbers; the run folder."""
    return shared(request.param)


def test_recipe_ends_in_an_exported_evaluated_student(smoke):
    run = smoke / "runs" / "run"
    for name in (
        "metrics.json",
        "report.md",
        "grid.png",
        "plan.json",
        "export/model.safetensors",
        "export/README.md",
    ):
        assert (run / name).stat().st_size > 0, name
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["schema"] == 1
    names = Protocol.from_dict(metrics["protocol"]).names()
    assert metrics["protocol"]["names"] == names
    assert names["sliced_wasserstein"] == "sliced_wasserstein@20", "a smoke run's numbers have no plain name"
    for page in ("report.md", "export/README.md"):
        assert "| sliced_wasserstein@20 ↓ |" in (run / page).read_text(encoding="utf-8")
    required = {
        "model",
        "steps",
        "nfe",
        "guidance_scale",
        "fd",
        "kid",
        "cmmd",
        "sliced_wasserstein",
        "precision",
        "recall",
        "density",
        "coverage",
        "class_std",
        "teacher_mse",
        "straightness",
        "nn_train",
        "class_accuracy",
        "pixel_std",
        "images_per_second",
        "train_seconds",
        "peak_memory_bytes",
    }
    for row in metrics["rows"]:
        assert required <= set(row)
    assert not list(run.rglob("*.part")), "temporary files stay behind"
    student = distill.load(run / "export")
    points = json.loads((run / "plan.json").read_text())["recipe"].startswith("toy_")
    samples = student.sample(6, label=None if points else 3)
    assert samples.shape == ((6, 2) if points else (6, 1, 8, 8))
    assert points or samples.abs().max() <= 1


def test_an_export_needs_nothing_else(smoke, tmp_path):
    """But an adapter its base."""
    run = smoke / "runs" / "run"
    shutil.copytree(run / "export", tmp_path / "elsewhere")
    if "base" in json.loads((run / "export" / "model.json").read_text()):
        shutil.copytree(run / "teacher", tmp_path / "elsewhere" / "base")
    call_verb(tmp_path, "sample", "model=elsewhere", "count=12", "out=out.png", check=True)
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
