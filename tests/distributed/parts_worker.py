"""Jobs on networks of which a part is trained, or that share a part; see `worker`. No test itself."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning as L
import token_support
import torch
import torch.distributed as dist
from engine_support import Points, head_only, two_heads
from lightning.pytorch.loggers.logger import DummyLogger
from method_support import mlp, optim
from torch import nn

from distill.data.batch import Batch
from distill.data.digits import Digits
from distill.data.points import Points as RingPoints
from distill.engine.fit import Fit, train
from distill.engine.loggers import Jsonl
from distill.engine.logging import read_entries
from distill.engine.module import DistillModule
from distill.engine.parallel import full, full_state, is_sharded, make_mesh, shard_net, whole
from distill.methods.agd import AGD
from distill.methods.autoregressive import Autoregressive
from distill.methods.distilled_decoding import DistilledDecoding
from distill.methods.distilled_decoding2 import DistilledDecoding2
from distill.methods.mmd import MMD
from distill.methods.sid import SiD
from distill.methods.teacher_score import TeacherScore
from distill.methods.tokenizer import Tokenizer
from distill.models.conditions import Labels
from distill.models.denoiser import Denoiser
from distill.models.native import load_models, model_files, read_weights, save_model
from distill.models.spec import SamplerSpec
from distill.nets.mlp import MLP
from distill.process.flow import Flow
from distill.stages.adapt import adapted
from distill.world import World

CPU = torch.device("cpu")


def ring() -> RingPoints:
    return RingPoints(ring={"count": 8, "radius": 1.5}, count=64, labelled=True)


class Block(nn.Module):
    """A block that holds a list of blocks, as those of diffusers' U-Nets do."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scale = nn.Linear(6, 6)
        self.layers = nn.ModuleList([Block(depth - 1) for _ in range(2)] if depth else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + torch.tanh(self.scale(x))


class Nested(nn.Module):
    """Lists in lists of blocks, and a method beside `forward`."""

    entries = ("logits",)

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block(2), Block(1)])
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.down:
            x = block(x)
        return self.out(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x).log_softmax(-1)


def job_nested(world: World, folder: Path) -> None:
    """Outputs and gradients of a net whose lists nest, each block a unit, beside the same net whole."""
    torch.manual_seed(0)
    whole = Nested()
    net = copy.deepcopy(whole)
    shard_net(net, make_mesh(world, "world", CPU), least=1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    part = x.chunk(world.size)[world.rank]
    found = {}
    for name in ("forward", "logits"):
        for model, rows in ((whole, x), (net, part)):
            model.zero_grad()
            getattr(model, "__call__" if name == "forward" else name)(rows).square().mean().backward()
        pairs = zip(whole.named_parameters(), net.parameters(), strict=True)
        found[name] = {
            key: float((p.grad - full(q.grad)).abs().max()) for (key, p), q in pairs if p.grad is not None
        }
    if world.main:
        torch.save(found, folder / "nested.pt")


def job_parts(world: World, folder: Path) -> None:
    """Methods that train a head, and two heads on one base; weights and averages at the end."""
    for shard in ("none", "world"):
        for name, make in (("head", head_only), ("heads", two_heads)):
            method = make(world)
            place = folder / f"{name}-{shard}-{world.size}"
            train(method, Points(), Fit(8, 16, accumulate=2, shard=shard), folder=place)
            found = {
                f"{part}.{role}.{key}": value
                for part, networks in (("net", method.networks), ("ema", method.ema))
                for role, network in networks.items()
                for key, value in full_state(network).items()
            }
            if world.main:
                torch.save(found, folder / f"{place.name}.pt")


def job_lora(world: World, folder: Path) -> None:
    """SiD with adapters on one base for student, fake score and averages, and the base itself as the teacher."""
    for shard in ("none", "world"):
        teacher = mlp(Flow(), classes=8)
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        student = adapted(teacher, {"lora": {"rank": 2}})
        method = SiD(student, teacher, sampling={"labels": "uniform"})
        method.prepare({name: optim(lr=0.05) for name in ("student", "fake")}, seed=5, world=world)
        place = folder / f"lora-{shard}-{world.size}"
        train(method, ring(), Fit(6, 16, shard=shard), folder=place)
        networks = [*method.networks.values(), *method.ema.values(), *method.frozen.values()]
        held = {id(p): p for network in networks for p in network.parameters()}
        local = [p.to_local() if is_sharded(p) else p for p in held.values()]
        found = {
            f"{part}.{role}.{key}": full(value).clone()
            for part, group in (("net", method.networks), ("ema", method.ema), ("frozen", method.frozen))
            for role, network in group.items()
            for key, value in network.state_dict().items()
        }
        counts = {"whole": sum(p.numel() for p in held.values()), "local": sum(p.numel() for p in local)}
        numbers = {"teacher": sum(p.numel() for p in teacher.parameters()), **counts}
        if world.main:
            found |= {f"before.{key}": value for key, value in before.items()}
            torch.save({"weights": found, "numbers": numbers}, folder / f"{place.name}.pt")


class Trajectories:
    """Guided trajectories of two states, at random."""

    sample_shape, num_classes = (2,), 8

    def __len__(self) -> int:
        return 64

    def fetch(self, rows: torch.Tensor, index: torch.Tensor) -> Batch:
        path = torch.randn(64, 3, 2, generator=torch.Generator().manual_seed(1))[rows]
        times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
        cond = Labels(8).of(rows % 8)
        return Batch(rows, index, cond, path=path, times=times, guidance=1.0 + rows % 4)

    def fingerprint(self) -> str:
        return "trajectories"


def job_guidance(world: World, folder: Path) -> None:
    """AGD with guidance terms on the base that is its teacher; the terms at the end."""
    for shard in ("none", "world"):
        for kind in ("embedding", "offset"):
            teacher = mlp(Flow(), classes=8)
            student = adapted(teacher, {"lora": {"rank": 2, "guidance": {"kind": kind, "width": 8}}})
            method = AGD(student, teacher)
            method.prepare({"student": optim(lr=0.05)}, seed=5, world=world)
            place = folder / f"guidance-{kind}-{shard}-{world.size}"
            train(method, Trajectories(), Fit(6, 16, shard=shard), folder=place)
            found = full_state(method.student.net)
            if world.main:
                torch.save(found, folder / f"{place.name}.pt")


class Ranks(L.Callback):
    """Notes what Lightning says of this process and of all, and stops on the last process alone."""

    def __init__(self, stop_at: int) -> None:
        self.seen: list[tuple[int, bool, int, int]] = []
        self.together: list[tuple[Any, ...]] = []
        self.stop_at = stop_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.loggers[0].log_metrics({"a": 1.0}, step=trainer.global_step)  # dropped where nothing logs
        writes = sum(not isinstance(logger, DummyLogger) for logger in trainer.loggers)
        rank, strategy = trainer.global_rank, trainer.strategy
        self.seen.append((rank, trainer.is_global_zero, trainer.global_step, writes))
        self.together.append(
            (
                strategy.broadcast(f"of {rank}"),
                strategy.broadcast(f"of {rank}", src=1),
                [strategy.reduce_boolean_decision(rank == 1, all=every) for every in (False, True)],
                [float(strategy.reduce(torch.tensor(rank + 1.0), reduce_op=how)) for how in ("mean", "sum")],
                strategy.all_gather(torch.tensor([rank])).tolist(),
                float(trainer.callback_metrics["eval/a"]),
            )
        )
        trainer.should_stop = rank == 1 and trainer.global_step == self.stop_at


class Measuring:
    """An evaluation of which only the main process has the result."""

    def due(self, before: int, now: int) -> bool:
        return True

    def resume(self, step: int) -> None:
        """Nothing is kept."""

    def __call__(self, module: DistillModule) -> dict[str, float]:
        return {"eval/a": 10.0 + module.progress.step} if module.world.main else {}


class Stopping(L.Callback):
    """Stops on the last process alone, in one hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.stop)

    def stop(self, trainer: L.Trainer, *rest: Any, **named: Any) -> None:
        trainer.should_stop = trainer.global_rank == 1


def job_callbacks(world: World, folder: Path) -> None:
    """A callback on every process, a logger and an evaluation on the main one; and stops of one process."""
    ranks, told = Ranks(stop_at=2), []
    hooks = ("setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")
    for place, callback in [("c", ranks), *((hook, Stopping(hook)) for hook in hooks)]:
        options = {"loggers": [Jsonl(folder)] if world.main else [], "evaluation": Measuring()}
        try:
            train(
                head_only(world),
                Points(),
                Fit(4, 16, log_every=1),
                folder=folder / place,
                callbacks=[callback],
                **(options if callback is ranks else {}),
            )
        except ValueError as error:
            told.append((place, re.search(r"step \d of 4", str(error))[0]))
    found = [world.gather(value) for value in (ranks.seen, ranks.together, told)]
    if world.main:
        logged = [e["step"] for e in read_entries(folder / "metrics.jsonl")]
        names = ("seen", "together", "told")
        torch.save(dict(zip(names, found, strict=True)) | {"logged": logged}, folder / "ranks.pt")


def job_mmd(world: World, folder: Path) -> None:
    """The gradient of one MMD over all processes and micro batches: with batches or a bank as the real side, two steps with
    fresh noise. One step of gradient descent of rate 1 shows it."""
    spec = SamplerSpec(steps=2, times={2: (1.0, 0.5, 0.0)}, mode="sde")
    options = {"classes": True, "kernel": {"name": "rbf_mixture", "gamma": "median"}}
    for shard in ("none", "world"):
        for bank in (0, 40):
            for accumulate in (1, 2):
                student = mlp(Flow(), classes=8)
                student.sampler = spec
                before = {key: value.clone() for key, value in student.net.state_dict().items()}
                method = MMD(student, bank=bank, **options)
                descent = optim(lr=1.0, kind=torch.optim.SGD, clip=None, ema=None)
                method.prepare({"student": descent}, seed=5, world=world)
                name = f"mmd-{shard}-{bank}-{accumulate}"
                place = folder / f"{name}-{world.size}"
                train(method, ring(), Fit(1, 16, accumulate=accumulate, shard=shard), folder=place)
                after = full_state(method.student.net)
                found = {key: before[key] - after[key] for key in before}
                found["loss"] = torch.as_tensor(method.latest["student/loss"]).float()
                if world.main:
                    torch.save(found, folder / f"{place.name}.pt")


def job_rows(world: World, folder: Path) -> None:
    """A loss of the rows of all processes, |mean f(x)|^2: its gradient on each process, and their mean."""
    weight = torch.arange(6.0).reshape(3, 2).requires_grad_(True)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    out = x.chunk(world.size)[world.rank] @ weight
    rows = world.rows(out)
    rows.mean(0).square().sum().backward()
    gradient = world.mean(weight.grad.clone())
    labels = world.rows(torch.arange(4).chunk(world.size)[world.rank])
    if world.main:
        torch.save(
            {"rows": rows.detach(), "gradient": gradient, "labels": labels}, folder / f"rows-{world.size}.pt"
        )
    if world.size > 1:
        dist.barrier()


def job_tokens(world: World, folder: Path) -> None:
    """A tokenizer, a model of its tokens and a student of Distilled Decoding; weights and averages at the end."""
    for shard in ("none", "world"):
        for name, (make, source) in TOKENS.items():
            method = make()
            settings = {update.name: optim(lr=1e-3) for update in method.updates()}
            method.prepare(settings, seed=5, world=world)
            place = folder / f"{name}-{shard}-{world.size}"
            train(method, source(), Fit(6, 16, shard=shard), folder=place)
            found = {
                f"{part}.{key}": value
                for part, networks in (("net", method.networks), ("ema", method.ema))
                for key, value in full_state(networks["student"]).items()
            }
            if world.main:
                torch.save(found, folder / f"{place.name}.pt")


TOKENS = {
    "tokenizer": (lambda: Tokenizer(token_support.tokenizer()), Digits),
    "autoregressive": (lambda: Autoregressive(token_support.teacher()), token_support.TokenDigits),
    "distilled_decoding": (
        lambda: DistilledDecoding(token_support.student(split=2), timesteps=[0, 2], perceptual=0.5),
        token_support.TokenDigits,
    ),
    "teacher_score": (lambda: TeacherScore(**token_support.scores()), token_support.TokenDigits),
    "distilled_decoding2": (
        lambda: DistilledDecoding2(**token_support.generator()),
        token_support.TokenDigits,
    ),
}


def anonymous() -> int:
    """Bytes of this process's memory that is not a file's pages."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0])


def job_mapped(world: World, folder: Path) -> None:
    """SiD on networks in files, sharded: memory that a process takes for them, and the weights afterwards."""
    place = folder / f"mapped-model-{world.size}"
    torch.manual_seed(5)
    net = MLP(shape=(2,), width=512, depth=36, features=8, num_classes=8, time_scale=30.0)
    size = 4 * sum(p.numel() for p in net.parameters())
    if world.main:
        save_model(place, Denoiser(net, Flow(), "velocity", (2,)), SamplerSpec(steps=4, any_steps=True))
    del net
    world.barrier()
    before, sharded, taken = anonymous(), world.size > 1, []

    class Placed(L.Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            taken.append(anonymous() - before)

    models = load_models({"init": place, "teacher": place}, adapters=False, mapped=sharded)
    method = SiD(models["init"].denoiser, models["teacher"].denoiser)
    # Adam's first steps follow the signs of gradients, of which some are rounding alone.
    plain = optim(lr=1e-3, kind=torch.optim.SGD)
    method.prepare({"student": plain, "fake": plain}, seed=1, world=world, sharded=sharded)
    taken.append(anonymous() - before)
    fit = Fit(steps=2, batch_size=8, shard="world")
    train(method, ring(), fit, folder=folder / f"mapped-{world.size}", config={}, callbacks=[Placed()])
    shares = world.gather([bytes_ / size for bytes_ in taken])
    found = {
        f"{role}.{name}": value
        for role, network in {"student": method.student, "fake": method.fake, "ema": method.best()}.items()
        for name, value in full_state(network.net, keep=world.main).items()
    }
    stored = folder / f"mapped-stored-{world.size}"
    if world.main:
        save_model(
            stored,
            method.as_generator().denoiser,
            SamplerSpec(steps=1, any_steps=True),
            whole=whole,
            file_bytes=2**22,
        )
        assert len(model_files(stored)) > 4
        for name, value in read_weights(stored).items():
            assert torch.equal(value, found[f"ema.{name}"]), name
    else:
        full_state(method.best().net, keep=False)
    if world.main:
        torch.save({"memory": torch.tensor(shares), "weights": found}, folder / f"mapped-{world.size}.pt")
