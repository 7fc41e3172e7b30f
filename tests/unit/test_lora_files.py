"""LoRA files in all forms of names: what is written is read as the same adapters, and what fits no base is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import teacher_support
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.files import sha256_file
from distill.models.adapters import Adapted, trained_parameters
from distill.models.denoiser import Denoiser
from distill.models.families.sd import SD
from distill.models.lora_files import CONFIG, HEADER, LoraFile, pairs_of, write_kohya, write_peft
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.process.vp import VPScaledLinear
from distill.stages.adapt import adapted, files_digest

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def net() -> SD:
    torch.manual_seed(0)
    return SD(dict(teacher_support.unet().config) | {"_class_name": "UNet2DConditionModel"})


def trained(net: nn.Module, **options: Any) -> Adapted:
    """Adapters that are not 0."""
    made = Adapted(net, **({"rank": 2, "alpha": 3.0, "targets": TARGETS} | options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(made).values():
            parameter.normal_()
    return made


def student(net: nn.Module, **lora: Any) -> Denoiser:
    model = Denoiser(net, VPScaledLinear(), "eps", (4, 8, 8))
    return adapted(model, {"lora": lora})


def standalone(folder: Path, made: Adapted, **config: Any) -> Path:
    tensors = {
        f"base_model.model.{k}.lora_{n}.weight": t
        for k, p in pairs_of(made).items()
        for n, t in zip("AB", p, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 3, **config}))
    return folder / "adapter_model.safetensors"


def of_one_network(folder: Path, made: Adapted) -> Path:
    write_peft(folder / "a.safetensors", made, {})
    tensors = {key.removeprefix("unet."): t for key, t in load_file(folder / "a.safetensors").items()}
    save_file(tensors, folder / "b.safetensors", {HEADER: json.dumps({"r": 2, "lora_alpha": 3.0})})
    return folder / "b.safetensors"


def old(folder: Path, made: Adapted) -> Path:
    names = ("down", "up")
    tensors = {
        f"unet.{k}.lora.{n}.weight": t
        for k, p in pairs_of(made).items()
        for n, t in zip(names, p, strict=True)
    }
    save_file(tensors, folder / "old.safetensors")
    return folder / "old.safetensors"


def pipeline(folder: Path, made: Adapted) -> Path:
    write_peft(folder / "p.safetensors", made, {"steps": 4})
    return folder / "p.safetensors"


def kohya(folder: Path, made: Adapted) -> Path:
    write_kohya(folder / "k.safetensors", made, {})
    return folder / "k.safetensors"


FORMS: dict[str, Callable[[Path, Adapted], Path]] = {
    **{"peft": standalone, "network": of_one_network, "old": old, "pipeline": pipeline, "kohya": kohya}
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_the_adapters_that_were_written(net: SD, tmp_path: Path, form: str) -> None:
    made = trained(net)
    path = FORMS[form](tmp_path, made)
    given = {"alpha": 3.0} if form == "old" else {}
    read = student(net, file=str(path), **given).net
    assert isinstance(read, Adapted)
    assert (read.rank, read.alpha, read.paths) == (2, 3.0, made.paths)
    for name, parameter in trained_parameters(made).items():
        assert torch.equal(trained_parameters(read)[name], parameter), name
    if form == "old":
        with pytest.raises(
            ValueError, match=r"adapt.lora.alpha: missing, also in .*old.safetensors; expected the number"
        ):
            student(net, file=str(path))


def test_a_net_of_the_package_has_plain_names(tmp_path: Path) -> None:
    net = UNet(width=8, embedding=16, groups=4)
    made = trained(net, targets=["conv1"])
    write_peft(tmp_path / "a.safetensors", made, {"steps": 1})
    layers = {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "a.safetensors")}
    assert layers == set(made.paths)
    model = Denoiser(net, Flow(), "velocity", (1, 8, 8))
    read = adapted(model, {"lora": {"file": str(tmp_path / "a.safetensors")}, "process": "flow"})
    for name, parameter in trained_parameters(made).items():
        assert torch.equal(trained_parameters(read.net)[name], parameter)
    # Students that have these adapters are continued.
    assert adapted(read, {"lora": {"file": str(tmp_path / "a.safetensors")}, "process": "flow"}) is read


def test_files_of_equal_adapters_are_equal_and_name_their_options(net: SD, tmp_path: Path) -> None:
    made = trained(net)
    digests = set()
    for name in ("a", "b"):
        write_peft(tmp_path / name, made, {"steps": 4, "times": [999.0, 0.0]})
        digests.add(sha256_file(tmp_path / name))
    assert len(digests) == 1
    with safe_open(tmp_path / "a", framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
    assert (header["unet.r"], header["unet.lora_alpha"]) == (2, 3)
    assert header["unet.target_modules"] == sorted(pairs_of(made))


def edited(change: Callable[[Tensors], None], form: Callable[[Path, Adapted], Path] = kohya) -> Any:
    def write(folder: Path, net: SD) -> Path:
        path = form(folder, trained(net))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return path

    return write


def rename(new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        layer = min(tensors).partition(".")[0]
        for key in [key for key in tensors if key.startswith(f"{layer}.")]:
            tensors[new + key.removeprefix(layer)] = tensors.pop(key)

    return change


def ranked(tensors: Tensors) -> None:
    for key in sorted(tensors)[:3]:
        if "lora_" in key:
            tensors[key] = tensors[key].repeat(
                *((1, 2) if "lora_up" in key else (2, 1)), *[1] * (tensors[key].ndim - 2)
            )


@pytest.mark.parametrize(
    ("write", "options", "words"),
    [
        (
            edited(rename("lora_unet_input_blocks_1")),
            {},
            r"1 of \d+ layers, as 'input_blocks_1', .* for another base",
        ),
        (edited(rename("lora_te1_x")), {}, "lora_te1_x.*: belongs to a text encoder"),
        (edited(rename("layer")), {}, "named as kohya's, expected all or none"),
        (edited(ranked), {}, r"rank: found 2 and 4 \(lora_unet_.*\), expected one for all layers"),
        (edited(lambda t: t.update({min(t): torch.tensor(7.0)})), {}, "alpha: found 3 and 7"),
        (edited(lambda t: t.pop(min(t))), {}, "alpha: missing of lora_unet"),
        (
            edited(lambda t: t.pop(min(k for k in t if "lora_up" in k))),
            {},
            r"found \['A', 'alpha'\], expected both factors",
        ),
        (
            edited(lambda t: t.update({"x.dora_scale": torch.ones(1)})),
            {},
            "x.dora_scale: not a tensor of a LoRA",
        ),
        (
            edited(
                lambda t: t.update(
                    {k: torch.cat([t[k], t[k]], 1) for k in [min(k for k in t if "lora_down" in k)]}
                )
            ),
            {},
            r"found the shape \[.*\], expected \[.*\]: a LoRA for another base",
        ),
        (
            lambda f, n: kohya(f, trained(n)),
            {"rank": 4},
            "lora.rank: found 4, but .* has rank 2; expected null",
        ),
        (lambda f, n: kohya(f, trained(n)), {"alpha": 4.0}, "lora.alpha: found 4.0, but .* has alpha 3.0"),
        (lambda f, n: kohya(f, trained(n)), {"targets": ["to_q"]}, r"lora.targets: found \['to_q'\], but"),
        (
            lambda f, n: standalone(f, trained(n), use_dora=True),
            {},
            "use_dora: found True, which is not supported",
        ),
        (lambda f, n: standalone(f, trained(n), r=5), {}, "r: found 5, but the tensors have rank 2"),
        (
            lambda f, n: standalone(f, trained(n), lora_alpha="x"),
            {},
            "lora_alpha: found 'x', expected a positive",
        ),
        (lambda f, n: f / "none.safetensors", {}, r"lora.file: .*none.safetensors: not a file"),
    ],
)
def test_what_fits_no_base_is_refused(
    net: SD, tmp_path: Path, write: Any, options: dict[str, Any], words: str
) -> None:
    path = write(tmp_path, net)
    with pytest.raises(ValueError, match=words) as caught:
        student(net, file=str(path), **options)
    assert re.match(r"adapt\.lora\.(file|rank|alpha|targets): ", str(caught.value))


def test_the_file_s_content_is_part_of_the_digest(net: SD, tmp_path: Path) -> None:
    path = standalone(tmp_path, trained(net))
    found = {files_digest({"lora": {"file": str(path)}}), files_digest({"lora": {}}), files_digest(None)}
    (tmp_path / CONFIG).write_text("{}")
    assert len(found | {files_digest({"lora": {"file": str(path)}})}) == 3
    with pytest.raises(FileNotFoundError, match=r"adapt.lora.file: .*gone"):
        files_digest({"lora": {"file": "gone"}})
    with pytest.raises(FileNotFoundError, match=r"file: .*: not a file"):
        LoraFile.read(tmp_path)
