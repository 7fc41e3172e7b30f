"""Predicted memory: equal to what training keeps, and to counted parameters on the shapes of Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory_table
import pytest
import torch
import torch.distributed as dist
import yaml
from hydra.utils import instantiate
from method_support import mlp, optim, trained
from test_adapters import loaded
from tests_support import ROOT, call_verb
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.engine.memory import Memory, Row, Size, optimizer_state, predicted
from distill.engine.module import DistillModule
from distill.engine.parallel import local, width
from distill.methods.consistency import Consistency
from distill.methods.dmd import DMD
from distill.methods.reflow import Reflow
from distill.methods.sid import SiD
from distill.process.flow import Flow
from distill.stages.adapt import adapted
from distill.stages.encode import Encode
from distill.stages.made import copied
from distill.stages.pretrained import Pretrained
from distill.world import World

SHAPES = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
LORA_64 = {"sd15": 67_252_224, "sdxl": 196_751_360}  # the sizes of the published LCM-LoRAs


def held(tensors: list[Tensor]) -> int:
    """Bytes of memory of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def of(*networks: nn.Module) -> list[Tensor]:
    return [t for network in networks for t in (*network.parameters(), *network.buffers())]


METHODS: dict[str, Callable[[Path], DistillModule]] = {
    "sid": lambda folder: SiD(mlp(Flow(), classes=8), mlp(Flow(), classes=8, seed=1)),
    "dmd on one base": lambda folder: DMD(**loaded(folder), gan={}),
    "a target network": lambda folder: Consistency(**loaded(folder), target_decay=0.9),
}


@pytest.mark.parametrize("name", METHODS)
def test_training_keeps_the_predicted_bytes(name: str, tmp_path: Path) -> None:
    method = METHODS[name](tmp_path)
    method.prepare({update.name: optim() for update in method.updates()}, seed=0)
    memory, gradients = predicted(method), {}
    zero = method.on_before_zero_grad
    method.on_before_zero_grad = lambda optimizer: (  # type: ignore[method-assign, assignment]
        gradients.update(
            {id(optimizer): held([p.grad for g in optimizer.param_groups for p in g["params"]])}
        ),
        zero(optimizer),
    )
    trained(method, tmp_path / "run", 1, classes=8)
    networks = [*method.frozen.values(), *method.networks.values()]
    averages = held(of(*networks, *method.ema.values())) - held(of(*networks))
    states = [o.state.values() for o in method.optimizers_by_key.values()]
    kept = [value for each in states for state in each for value in state.values()]
    assert memory.total() == {
        "weights": held(of(*networks)),
        "gradients": max(gradients.values()),
        "optimizer": sum(value.numel() * value.element_size() for value in kept),
        "averages": averages,
    }
    assert min(memory.total().values()) > 0
    rows = {row.role: row for row in memory.rows}
    assert all(
        rows[role].trained == sum(p.numel() for p in method.trained[role].parameters())
        for role in method.trained
    )


@pytest.mark.parametrize(
    ("size", "rank", "shard"), [(8, 0, "world"), (64, 0, "world"), (64, 63, "world"), (64, 0, "node")]
)
@pytest.mark.parametrize("name", ["sid", "dmd on one base"])
def test_a_process_of_many_keeps_the_predicted_bytes(
    name: str, size: int, rank: int, shard: str, tmp_path: Path
) -> None:
    """One process of a group whose others are pretended: nothing is sent, but its shards are those of a real group. The first
    process has most; where the last has no rows of a parameter, its optimizer has less than is predicted."""
    method, world = METHODS[name](tmp_path), World(rank, size, rank % 8, local_size=8)
    settings = {
        update.name: optim(ema=0.9 if "student" in update.trains else None) for update in method.updates()
    }
    method.prepare(settings, seed=0, world=world, sharded=True)
    whole, memory = predicted(method).total(), predicted(method).total(width(world, shard))
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        method.distribute(shard, torch.device("cpu"))
        method.configure_optimizers()
        gradients, states = [], list[Tensor]()
        for optimizer in method.optimizers_by_key.values():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(sum(local(p.grad).nbytes for p in parameters))
            optimizer.step()
            states += [local(value) for state in optimizer.state.values() for value in state.values()]
    finally:
        dist.destroy_process_group()
    networks = [*method.frozen.values(), *method.networks.values()]
    kept = {"weights": held([local(t) for t in of(*networks)])}
    kept["averages"] = held([local(t) for t in of(*networks, *method.ema.values())]) - kept["weights"]
    kept |= {"gradients": max(gradients), "optimizer": sum(value.nbytes for value in states)}
    for kind, found in kept.items():
        exact = rank == 0 or kind in ("weights", "averages")
        assert found == memory[kind] if exact else found <= memory[kind], kind
        assert memory[kind] < whole[kind]


def test_gradients_of_several_micro_batches_are_whole_until_the_last_unless_each_is_reduced() -> None:
    """`tests/distributed/test_two_processes.py` looks at them on two processes."""
    method = METHODS["sid"](Path())
    method.prepare({update.name: optim() for update in method.updates()}, seed=0)
    once, several = predicted(method), predicted(method, accumulate=2)
    whole, halves = once.total()["gradients"], once.total(2)["gradients"]
    assert halves < 0.6 * whole
    assert [several.total(2, each)["gradients"] for each in (False, True)] == [whole, halves]
    others = ("weights", "optimizer", "averages")
    assert [several.total(2)[kind] for kind in others] == [once.total(2)[kind] for kind in others]
    assert several.describe(2, reduce_each=True) == once.describe(2)
    assert several.describe(2) != once.describe(2)


OPTIMIZERS = {
    path.stem: yaml.safe_load(path.read_text())["optimizer"]
    for path in (ROOT / "configs/optim").glob("*.yaml")
    if path.stem != "adamw8bit"  # of a package; see tests/unit/test_eight_bits.py
}


def test_the_optimizers_of_the_configs() -> None:
    assert len(OPTIMIZERS) == 2


@pytest.mark.parametrize(
    "config",
    [
        *OPTIMIZERS.values(),
        {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        {"_target_": "torch.optim.SGD", "lr": 0.1},
        {"_target_": "torch.optim.Adafactor"},
    ],
    ids=lambda config: config["_target_"].rpartition(".")[2],
)
def test_the_state_of_an_optimizer_is_that_of_a_step(config: dict[str, Any]) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(24, 9), nn.Linear(9, 4).bfloat16()
    )
    parameters = list(net.parameters())
    make = instantiate(config, _partial_=True, _convert_="all")
    found = optimizer_state(make, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    assert found is not None
    for parameter, sizes in zip(parameters, found, strict=True):
        state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
        assert [(size.shape, size.bytes()) for size in sizes] == [
            (tuple(value.shape), value.numel() * value.element_size()) for value in state
        ]


def test_a_state_that_follows_no_parameter_is_unknown() -> None:
    class Blocks(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["blocks"] = torch.zeros(-(-p.numel() // 256))

    net = nn.Linear(4, 4)
    assert optimizer_state(lambda parameters: Blocks(parameters, lr=0.1), list(net.parameters())) is None
    row = Row("student", 20, 20, unknown=True)
    assert "?" in Memory([row], [[Size((20,), 4)]]).describe()[1]


def test_each_process_has_its_shards() -> None:
    row = Row("student", 15, 15)
    row.sizes["weights"] = [Size((5, 3), 4), Size((7,), 4, sharded=False)]
    assert Memory([row]).total(2)["weights"] == 4 * (3 * 3 + 7)  # rows are padded: FSDP pads
    assert Memory([row, row], alternate=True).total()["weights"] == 4 * 22


@pytest.fixture(scope="module")
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A teacher with the shape of a real one, on the meta device; `request.param`: its name."""
    folder = memory_table.sketched_teacher(tmp_path_factory.mktemp(request.param), request.param)
    prompts = Encode(str(folder), {"path": str(folder / "prompts.txt")}).dry_run({})
    made = Pretrained(str(folder), prompts="prompts", dtype="bfloat16").dry_run({"prompts": prompts})
    assert made.memory is not None
    network, decoder = made.memory.rows
    assert (network.parameters, network.bytes("weights")) == (
        SHAPES[request.param],
        2 * SHAPES[request.param],
    )
    assert (decoder.parameters, decoder.bytes("weights")) == (83_653_863, 4 * 83_653_863)
    return request.param, made.model


def counted(net: nn.Module, rank: int, targets: list[str]) -> tuple[int, int]:
    """(numbers, tensors) of adapters by their definition, from the layers of a network."""
    numbers = tensors = 0
    for path, layer in net.named_modules():
        if not any(path == target or path.endswith(f".{target}") for target in targets):
            continue
        weight = layer.weight
        numbers += rank * (weight[0].numel() + len(weight))
        tensors += 2
    return numbers, tensors


REFLOW, SID = "reflow", "sid"
CASES = [("sd15", REFLOW, "full"), ("sd15", SID, "LoRA 64")]
LARGER = [("sd15", REFLOW, "LoRA 16"), ("sd15", SID, "full")]
LARGER += [("sdxl", SID, "full"), ("sdxl", REFLOW, "LoRA 64"), ("sdxl", SID, "LoRA 16")]


@pytest.mark.parametrize(
    ("shape", "name", "student"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGER)],
    indirect=["shape"],
)
def test_real_shapes(shape: tuple[str, Any], name: str, student: str) -> None:
    shape_name, teacher = shape
    targets = memory_table.LCM_TARGETS
    lora = {"LoRA 64": {"rank": 64, "targets": targets}, "LoRA 16": {"rank": 16}}.get(student)
    models = copied({"init": teacher, "teacher": teacher}, adapters=lora is not None)
    changes = ({"lora": lora} if lora else {}) | ({"process": "flow"} if name == "reflow" else {})
    start = adapted(models["init"].denoiser, changes) if changes else models["init"].denoiser
    method: DistillModule = Reflow(start) if name == "reflow" else SiD(start, models["teacher"].denoiser)
    method.prepare({update.name: optim() for update in method.updates()}, seed=0)
    whole = SHAPES[shape_name]
    own, tensors = whole, len(list(teacher.denoiser.net.parameters()))
    if lora:
        own, tensors = counted(
            teacher.denoiser.net, lora["rank"], lora.get("targets", ["to_q", "to_k", "to_v", "to_out.0"])
        )
        assert (
            own
            == {"LoRA 64": LORA_64[shape_name], "LoRA 16": {"sd15": 3_188_736}.get(shape_name, own)}[student]
        )
    nets = 1 if name == "reflow" else 2
    width = 4 if lora else 2  # adapters are float32, the base is bfloat16
    base = 2 * whole if lora or name == "sid" else 0  # the teacher, or the base of all
    memory = predicted(method)
    assert [row.trained for row in memory.rows if row.trained] == [own] * nets
    decoder = 4 * 83_653_863
    assert memory.total() == {
        "weights": base + nets * width * own + decoder,
        "gradients": width * own,
        "optimizer": nets * (2 * width * own + 4 * tensors),
        "averages": nets * width * own,
    }


def test_the_plan_of_a_real_shape(tmp_path: Path) -> None:
    """Of a folder that holds no weights to load."""
    folder = memory_table.sketched_teacher(tmp_path / "teacher", "sd15")
    options = ("recipe=sid", "teacher=sd", f"teacher.path={folder}", "teacher.dtype=bfloat16", "eval=prompts")
    data = ("data=prompts", f"data.path={folder / 'prompts.txt'}", "stages.distill.monitor=null")
    shard = ("trainer.devices=2", "trainer.shard=world", "stages.distill.optim.student.ema=null")
    planned = call_verb(
        tmp_path, "train", *options, *data, *shard, "student=lora", "plan=true", check=True
    ).stdout
    lines = [line.split() for line in planned.splitlines()]
    own = ["3,188,736", "6.08", "MiB", "6.08", "MiB", "12.17", "MiB", "-"]  # half of each
    assert ["teacher", "859,520,964", "-", "819.70", "MiB", "-", "-", "-"] in lines
    assert ["fake", "862,709,700", *own] in lines
    assert ["student", "862,709,700", *own] in lines
    assert ["decoder", "83,653,863", "-", "319.11", "MiB", "-", "-", "-"] in lines
    assert "1.15 GiB on each of 2 processes, without activations" in planned
