"""What a method was given stays as it was, but for the weights of its student; and what its student is follows from the method.

Every method on disk is walked: constructed, prepared, trained for one iteration.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipes import METHOD_CONFIGS, NET, TOKENS, PairedDigits, method_class, setting
from token_support import TokenDigits

from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant
from distill.engine.update import Optim
from distill.models.build import build_net
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.models.native import save_model
from distill.models.spec import SamplerSpec

# By the loss: what each method trains. "of the teacher": as the teacher's.
RESULTS = {
    "agd": ("independent", False),
    "autoregressive": ("independent", True),
    "consistency": ("few_step", False),
    "consistency_training": ("few_step", False),
    "degrade": ("independent", False),
    "denoising": ("independent", True),
    "disback": ("endpoint", False),
    "distilled_decoding": ("few_step", False),
    "distilled_decoding2": ("endpoint", False),
    "dmd": ("endpoint", False),
    "flow_matching": ("independent", True),
    "guided": ("independent", False),
    "hipa": ("endpoint", False),
    "lcm": ("few_step", False),
    "mmd": ("few_step", False),
    "one_step": ("endpoint", False),
    "progressive": ("few_step", False),
    "reflow": ("paired", True),
    "sid": ("endpoint", False),
    "teacher_score": ("independent", False),
    "tokenizer": ("endpoint", False),
}
ROLES = ("student", "teacher", "generator")
every_method = pytest.mark.parametrize("path", METHOD_CONFIGS, ids=lambda path: path.stem)


def networks(path: Path) -> dict[str, Denoiser]:
    """The models that a method takes, as they come from a run: guidable, with a sampler; the student in training mode."""
    if path.stem in TOKENS:
        models = TOKENS[path.stem]()
        for model in models.values():
            model.sampler = SamplerSpec(steps=50, any_steps=True)
        models["student"].train()
        return models
    process, kind, net = setting(path)
    taken = inspect.signature(method_class(path)[0]).parameters
    found = {}
    for role in (role for role in ROLES if role in taken):
        torch.manual_seed(len(role))
        config = net if role == "student" else NET
        model = Denoiser(build_net(config), process, kind, (1, 8, 8), guidable=True, decoder=Pixels())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.sampler = SamplerSpec(steps=50, any_steps=True)
        found[role] = model
    return found


def made(path: Path, given: dict[str, Denoiser], **options: Any) -> DistillModule:
    cls, known = method_class(path)
    if "total_steps" in known:
        known["total_steps"] = 4
    if "timesteps" in known:
        known["timesteps"] = [0, 2]
    if "nodes" in inspect.signature(cls).parameters:
        options = {"nodes": []} | options
    return cls(**given, **{**known, **options})


def prepared(method: DistillModule, **settings: Any) -> DistillModule:
    optim = Optim(**{"optimizer": partial(torch.optim.AdamW, lr=1e-3), "schedule": Constant()} | settings)
    method.prepare({update.name: optim for update in method.updates()}, seed=0)
    return method


def record(model: Denoiser, *, weights: bool = True) -> dict[str, Any]:
    """Everything that can be seen of a model: attributes and modes of all its modules, hooks, what its tensors are and hold."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.endswith("_hooks") or not key.startswith("_"):
                seen[f"{name}:{key}"] = (
                    repr(value) if isinstance(value, torch.nn.Module) else copy.deepcopy(value)
                )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[name] = (
            tensor.requires_grad,
            tensor.device,
            tensor.dtype,
            tensor.data_ptr(),
            tensor.grad is None,
        )
        if weights:
            seen[f"{name}:values"] = tensor.tolist()
    for name in ("coupling", "guidable", "boundary", "sampler", "kind", "conditions", "sample_shape"):
        seen[f"model.{name}"] = copy.deepcopy(getattr(model, name))
    seen["process"] = model.process.config()
    del seen[":process"]
    return {key: value for key, value in seen.items() if not key.endswith(":process")}


@every_method
def test_a_method_changes_nothing_that_it_was_given(path: Path, tmp_path: Path) -> None:
    given = networks(path)
    before = {role: record(model) for role, model in given.items()}
    method = made(path, given)
    assert {role: record(model) for role, model in given.items()} == before
    source = TokenDigits() if given["student"].decoder.codebook is not None else PairedDigits()
    train(prepared(method), source, Fit(steps=1, batch_size=8), folder=tmp_path, config={})
    for role, model in given.items():
        if role != "student":
            assert record(model) == before[role], role
    weights = {key for key in before["student"] if key.endswith(":values")}
    after = record(given["student"])
    assert {k: v for k, v in after.items() if k not in weights} == {
        k: v for k, v in before["student"].items() if k not in weights
    }
    assert any(after[key] != before["student"][key] for key in weights), (
        "the student's net is trained in place"
    )


@every_method
def test_what_a_student_is_follows_from_the_method(path: Path) -> None:
    given = networks(path)
    result = made(path, given).result()
    assert (result.coupling, result.guidable) == RESULTS[path.stem]
    assert result.boundary == (prepared(made(path, networks(path))).student.boundary)
    generator = prepared(made(path, networks(path))).as_generator()
    read = generator.denoiser
    assert (read.coupling, read.guidable, read.boundary, read.sampler) == (
        *RESULTS[path.stem],
        result.boundary,
        generator.spec,
    )


@pytest.mark.parametrize("stem", ["denoising", "flow_matching", "reflow"])
def test_a_null_condition_is_there_where_it_was_trained(stem: str) -> None:
    path = next(p for p in METHOD_CONFIGS if p.stem == stem)
    assert not made(path, networks(path), null_prob=0.0).result().guidable
    given = networks(path)
    net = build_net(NET | {"num_classes": 0})
    unconditional = Denoiser(net, given["student"].process, given["student"].kind, (1, 8, 8), guidable=True)
    assert not made(path, {"student": unconditional}).result().guidable


def test_a_student_of_several_steps_is_valid_at_its_sampler_s_times() -> None:
    path = next(p for p in METHOD_CONFIGS if p.stem == "one_step")
    assert made(path, networks(path), steps=4).result().coupling == "few_step"
    assert made(path, networks(path), t_eps=1e-3).result().coupling == "few_step"


@every_method
def test_a_frozen_model_that_shares_weights_with_the_student_is_refused(path: Path) -> None:
    given = networks(path)
    for role in set(given) - {"student", "guidance"}:  # of the guidance network a copy is trained
        alike = setting(path)[2] == NET and path.stem not in TOKENS
        shared = given["student"].with_() if alike else None
        if (
            shared is None
        ):  # a student with inputs that its teacher has not: they share what they have in common
            shared = given[role]
            own = dict(shared.net.named_parameters())
            named = dict(given["student"].net.named_parameters())
            name = next(n for n in named if n.removeprefix("body.") in own)
            module, _, leaf = name.removeprefix("body.").rpartition(".")
            setattr(shared.net.get_submodule(module), leaf, named[name])
        with pytest.raises(ValueError, match=f"{role}: shares weights with the student"):
            made(path, given | {role: shared})


def test_the_walk_back_leaves_the_teacher_s_weights(tmp_path: Path) -> None:
    path = next(p for p in METHOD_CONFIGS if p.stem == "disback")
    given = networks(path)
    folders = []
    for number in range(3):
        node = networks(path)["teacher"]
        torch.manual_seed(number)
        for parameter in node.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        save_model(tmp_path / str(number), node, node.sampler)
        folders.append(tmp_path / str(number))
    before = record(given["teacher"])
    method = prepared(made(path, given, nodes=folders, gan={"features": "teacher"}))
    train(method, PairedDigits(), Fit(steps=1, batch_size=8), folder=tmp_path / "run", config={})
    assert method.loaded == 1, "the target holds a node's weights"
    assert record(given["teacher"]) == before
