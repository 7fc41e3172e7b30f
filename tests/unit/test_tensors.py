"""Tensors as a data source, and what training in a notebook leans on."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from distill.data.tensors import Tensors
from distill.engine.fit import Fit, train
from distill.engine.schedule import Constant
from distill.engine.update import Optim
from distill.methods.one_step import OneStep
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.spec import SamplerSpec
from distill.nets.mlp import MLP
from distill.process.flow import Flow


def test_rows_labels_and_fingerprint():
    x0, z, labels = torch.randn(5, 2), torch.randn(5, 2), torch.tensor([0, 2, 1, 0, 2])
    source = Tensors(x0, z, labels)
    rows = torch.tensor([3, 1])
    batch = source.fetch(rows, rows)
    assert torch.equal(batch.x0, x0[rows])
    assert torch.equal(batch.z, z[rows])
    assert batch.cond.get("label").tolist() == [0, 2]
    assert (source.num_classes, source.sample_shape, len(source)) == (3, (2,), 5)
    assert source.fingerprint() == Tensors(x0.clone(), z, labels).fingerprint()
    assert source.fingerprint() != Tensors(x0 + 1, z, labels).fingerprint()
    assert Tensors(x0).fetch(rows, rows).cond.get("label") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(3),), "x0: expected"),
        ((torch.randn(3, 2), torch.randn(2, 2)), "z: expected the shape of x0"),
        ((torch.randn(3, 2), None, torch.randn(3)), "labels: expected 3 integers"),
        ((torch.randn(3, 2), None, torch.tensor([0, -1, 1])), "labels: expected classes of at least 0"),
    ],
)
def test_bad_tensors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tensors(*arguments)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    torch.manual_seed(0)
    net, source = MLP(), Tensors(torch.randn(8, 2), torch.randn(8, 2))

    def run(config, steps=2):
        method = OneStep(Denoiser(copy.deepcopy(net), Flow(), "velocity", (2,)))
        method.prepare({"student": Optim(partial(torch.optim.AdamW, lr=1e-3), Constant())}, seed=0)
        train(method, source, Fit(steps=steps, batch_size=4), folder=tmp_path, config=config)

    run({"lr": 1e-3})
    run({"lr": 1e-3}, steps=3)  # longer is the same training
    with pytest.raises(
        ValueError,
        match=r"step_\d{7}: is the checkpoint of another training: config.lr: found 0.001, expected 0.1",
    ):
        run({"lr": 0.1}, steps=3)


def test_a_users_net_gets_times_of_its_own_precision():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, t, cond):
            seen.append(t.dtype)
            return torch.cat([x, t[:, None]], 1)[:, :2]

    model = Denoiser(Net(), Flow(), "velocity", (2,))
    samples = model.transport(torch.randn(4, 2), steps=3)[0]
    assert samples.shape == (4, 2)
    assert set(seen) == {torch.float32}
    assert Generator(model, SamplerSpec(steps=3, any_steps=True)).sample(3).shape == (3, 2), (
        "no weights, no device"
    )
