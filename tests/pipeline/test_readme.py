"""The README's marked commands run as they stand (with `profile=smoke` where they train)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests_support import ROOT, run_verb

README = (ROOT / "README.md").read_text()


def marked_commands() -> list[list[str]]:
    """Lines of the code blocks that follow a `<!-- run -->`, split as a shell would."""
    blocks = re.findall(r"<!-- run -->\n```\n(.*?)```", README, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_marked_commands(tmp_path: Path):
    commands = marked_commands()
    assert len(commands) == 8
    for command in commands:
        assert command[:2] == ["python", "-m"], command
        package, _, verb = command[2].partition(".")
        assert package == "distill"
        arguments = command[3:]
        if verb == "train" and "--help" not in arguments:
            arguments = [a for a in arguments if not a.startswith("profile=")] + ["profile=smoke"]
            if not any(a.startswith("name=") for a in arguments):
                arguments.append("name=instaflow")  # the folder that later commands read
        run_verb(tmp_path, verb, *arguments)
    assert (tmp_path / "grid.png").exists()
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"instaflow", "straighter", "wide", "again"}


def test_the_example_method_is_a_method(tmp_path: Path, monkeypatch):
    """The code of "Writing a method" trains, given the imports that every method file has."""
    source = re.search(r"```python\n(class Regression.*?)```", README, flags=re.DOTALL)
    assert source is not None
    from functools import partial

    import torch

    from distill.data.digits import Digits
    from distill.engine.fit import Fit, train
    from distill.engine.schedule import Constant
    from distill.engine.update import Loss, Optim, Step, Update
    from distill.methods.reflow import Batch, Denoiser, DistillModule, SamplerSpec
    from distill.nets.unet import UNet
    from distill.process.flow import Flow

    names = {
        "Batch": Batch,
        "Denoiser": Denoiser,
        "DistillModule": DistillModule,
        "SamplerSpec": SamplerSpec,
        "Loss": Loss,
        "Step": Step,
        "Update": Update,
        "torch": torch,
    }
    exec(source.group(1), names)
    nets = [Denoiser(UNet(width=8, embedding=16), Flow(), "velocity", (1, 8, 8)) for _ in range(2)]
    torch.nn.init.normal_(nets[1].net.out.weight)
    method = names["Regression"](*nets)
    method.prepare({"student": Optim(partial(torch.optim.AdamW, lr=1e-3), Constant())}, seed=0)
    train(method, Digits(), Fit(steps=2, batch_size=8), folder=tmp_path, config={})
    assert method.progress.step == 2


def test_the_picture_is_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
