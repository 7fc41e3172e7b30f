"""Weights that stay in their file until they are written to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from method_support import mlp, optim

from distill.engine.ema import EmaUpdater
from distill.engine.networks import trainable_copy
from distill.methods.reflow import Reflow
from distill.models.denoiser import Denoiser
from distill.models.native import load_model, read_weights, save_model
from distill.models.spec import SamplerSpec
from distill.nets.mlp import MLP
from distill.nets.unet import UNet
from distill.process.flow import Flow

SPEC = SamplerSpec(steps=2, any_steps=True)


def anonymous() -> int:
    """Bytes of this process's memory that is not a file's pages."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_mapped_model_and_its_copy_take_no_memory_until_they_are_written_to(tmp_path: Path) -> None:
    net = MLP(shape=(2,), width=512, depth=40, features=8, time_scale=30.0)
    size = 4 * sum(p.numel() for p in net.parameters())
    save_model(tmp_path, Denoiser(net, Flow(), "velocity", (2,)), SPEC)
    before = anonymous()
    model = load_model(tmp_path, mapped=True).denoiser
    fake = trainable_copy(model, model)
    assert anonymous() - before < 0.4 * size
    state, copied = model.net.state_dict(), fake.net.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
        assert torch.equal(value, copied[name])
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(1)
    assert anonymous() - before > 0.6 * size
    for name, value in read_weights(tmp_path).items():
        assert torch.equal(value, model.net.state_dict()[name]), (
            "a copy's writes reached the model or the file"
        )
    again = trainable_copy(fake, fake)
    assert torch.equal(next(again.parameters()), next(fake.parameters())), "of a model that was written to"


def test_it_samples_the_same_with_all_its_buffers(tmp_path: Path) -> None:
    model = Denoiser(UNet(width=8, multipliers=(1, 2)), Flow(), "velocity", (1, 8, 8))
    save_model(tmp_path, model, SPEC, dtype="bfloat16")
    plain, mapped = load_model(tmp_path), load_model(tmp_path, mapped=True)
    assert not any(t.is_meta for t in (*mapped.denoiser.parameters(), *mapped.denoiser.buffers()))
    assert {p.dtype for p in mapped.denoiser.parameters()} == {torch.float32}
    assert [p.requires_grad for p in mapped.denoiser.parameters()] == [
        p.requires_grad for p in plain.denoiser.parameters()
    ]
    assert torch.allclose(mapped.sample(2), plain.sample(2), atol=1e-5)


def test_an_average_on_the_memory_of_its_network_is_refused_unless_they_are_sharded() -> None:
    method = Reflow(mlp(Flow()))
    method.prepare({"student": optim(ema=0.5)}, seed=0, sharded=True)
    kept = next(method.ema["student"].parameters())
    assert kept.data_ptr() == next(method.student.parameters()).data_ptr()
    with pytest.raises(ValueError, match="expected sharded=False"):
        EmaUpdater(method.averaged["student"], method.trained["student"])
