"""What this machine's GPU does with the package: correctness, memory and speed, in one command of a few minutes.

    python scripts/gpu_check.py [--device cuda] [--tiny] [--out FOLDER] [--only NAME ...] [--shapes sd15 sdxl dit_xl2]

It writes `gpu_check-<device>-<date>.json` and a Markdown table of the same name to FOLDER (default scripts/bench/results). A
check passes, fails, or is skipped with the reason; the exit status is 1 if one fails. Networks have random weights. With
`--device cpu --tiny` everything runs in seconds with tiny networks: this tests the script, and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu_training import METHODS, TIMED, Machine, Noise, fitted, prepared, small, speed  # noqa: E402
from shaped_nets import shaped  # noqa: E402

from distill.data.cond import Cond  # noqa: E402
from distill.data.rng import sample_noise  # noqa: E402
from distill.engine import checkpoint  # noqa: E402
from distill.engine.fit import Fit, train  # noqa: E402
from distill.engine.memory import predicted  # noqa: E402
from distill.engine.module import DistillModule  # noqa: E402
from distill.engine.networks import recompute_activations  # noqa: E402
from distill.engine.nonfinite import flagged_step  # noqa: E402
from distill.launch import free_port  # noqa: E402
from distill.methods.reflow import Reflow  # noqa: E402
from distill.models.denoiser import Denoiser  # noqa: E402
from distill.process.flow import Flow  # noqa: E402


class Skipped(Exception):
    """A check cannot run here."""


def weights(method: DistillModule) -> Tensor:
    """All weights of the student and its average, as one vector on the CPU."""
    parts = [*method.student.parameters(), *method.ema.parameters()]
    return torch.cat([p.detach().flatten().cpu() for p in parts])


def near(found: float, bound: float, what: str) -> dict[str, float]:
    """A number that must be at most a bound."""
    if not found <= bound:
        raise AssertionError(f"{what}: found {found:.3g}, expected at most {bound:.3g}")
    return {what: found}


# ---- checks: each returns numbers, raises AssertionError, or Skipped ----


def collectives(machine: Machine, folder: Path) -> dict[str, Any]:
    """A process group of one rank reduces and broadcasts."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    backend = "nccl" if machine.cuda else "gloo"
    try:
        dist.init_process_group(backend)
        values = torch.arange(4.0, device=machine.device)
        dist.all_reduce(values)
        dist.broadcast(values, 0)
        assert values.tolist() == [0.0, 1.0, 2.0, 3.0], f"found {values.tolist()}"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return {"backend": backend}


def bfloat16(machine: Machine, folder: Path) -> dict[str, Any]:
    """Training in bf16-mixed is close to training in float32."""
    ends = [
        weights(
            fitted(
                machine,
                prepared(Reflow(small(machine))),
                (1, 8, 8),
                8,
                folder / name,
                fit={"precision": name},
            )
        )
        for name in ("32-true", "bf16-mixed")
    ]
    start = weights(prepared(Reflow(small(machine))))
    moved = (ends[0] - start).norm()
    return near(
        float((ends[1] - ends[0]).norm() / moved), 0.5, "difference of the weights, of what training moved"
    )


def compiled(machine: Machine, folder: Path) -> dict[str, Any]:
    """A compiled net predicts and differentiates as the plain one."""
    model = small(machine).to(machine.device)
    backend = "aot_eager" if machine.tiny else "inductor"  # without a C++ compiler in tests
    quick = torch.compile(model.net, backend=backend)
    x, t = torch.randn(4, 1, 8, 8, device=machine.device), torch.rand(4, device=machine.device)
    found = []
    for net in (model.net, quick):
        out = net(x, t, Cond.nothing(4).to(machine.device))
        model.net.zero_grad()
        out.square().mean().backward()
        found.append(torch.cat([out.detach().flatten(), *(p.grad.flatten() for p in model.net.parameters())]))
    return {"backend": backend} | near(
        float((found[0] - found[1]).norm() / found[0].norm()), 1e-3, "relative difference"
    )


def recomputed(machine: Machine, folder: Path) -> dict[str, Any]:
    """Activation checkpointing gives the same gradients with less memory."""
    name = machine.shapes[0]
    found, peaks = [], []
    for again in (False, True):
        torch.manual_seed(0)
        net, shape, batch = shaped(name, machine.device)
        model = Denoiser(net, Flow(), "velocity", shape).train()
        if again:
            recompute_activations({"student": model})
        x = sample_noise(0, "x", torch.arange(batch), shape).to(machine.device)
        t = torch.linspace(0.1, 0.9, batch, device=machine.device)

        def run(net: nn.Module = net, x: Tensor = x, t: Tensor = t, batch: int = batch) -> None:
            net(x, t, Cond.nothing(batch).to(machine.device)).square().mean().backward()

        peaks.append(machine.peak(run))
        found.append(torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None]))
        del net, model
    numbers = near(
        float((found[0] - found[1]).norm() / found[0].norm()), 1e-4, "relative difference of gradients"
    )
    return numbers | {"shape": name, "peak_bytes": peaks[0], "peak_bytes_recomputed": peaks[1]}


def fused_adam(machine: Machine, folder: Path) -> dict[str, Any]:
    """Fused AdamW steps like the plain one, and not at all where the flag is set."""
    nets = [small(machine).net.to(machine.device) for _ in range(2)]
    optimizers = [
        torch.optim.AdamW(net.parameters(), lr=1e-3, fused=fused)
        for net, fused in zip(nets, (True, False), strict=True)
    ]
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            torch.manual_seed(step)
            for parameter in net.parameters():
                # In the layout of the parameter: fused kernels walk over memory.
                parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
            optimizer.step()
    ends = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets]
    numbers = near(float((ends[0] - ends[1]).abs().max()), 1e-5, "largest difference")
    flagged_step(optimizers[0], torch.ones((), device=machine.device))
    after = torch.cat([p.detach().flatten() for p in nets[0].parameters()])
    assert torch.equal(after, ends[0]), "a flagged step changed weights"
    return numbers


def no_sync(machine: Machine, folder: Path) -> dict[str, Any]:
    """Steps of three methods make the host wait for nothing (CUDA's sync debug mode)."""
    if not machine.cuda:
        raise Skipped("needs CUDA; tests/contracts/test_host_sync.py finds reads without one")

    class Strict(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

        def on_train_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    try:
        for kind, make in METHODS.items():
            method = prepared(make(small(machine)))
            fitted(machine, method, (1, 8, 8), 4, folder / kind, callbacks=[Strict()])
    finally:  # or every later check would fail as well
        torch.cuda.set_sync_debug_mode("default")
    return {"methods": ", ".join(METHODS)}


def continued(machine: Machine, folder: Path) -> dict[str, Any]:
    """Six steps at once, and three and three with a checkpoint between, end alike: bit for bit on a CPU."""

    class Stop(Exception):
        pass

    def stop(step: int, text: str) -> None:
        if step == 4:
            raise Stop

    whole = fitted(machine, prepared(Reflow(small(machine))), (1, 8, 8), 6, folder / "whole")
    try:
        method = prepared(Reflow(small(machine)))
        options = Fit(6, 8, device=machine.device.type, checkpoint_every=3, log_every=10_000)
        train(method, Noise((1, 8, 8)), options, folder=folder / "parts", config={}, on_progress=stop)
    except Stop:
        pass
    assert checkpoint.names_in(folder / "parts") == ["step_0000003"]
    parts = fitted(machine, prepared(Reflow(small(machine))), (1, 8, 8), 6, folder / "parts")
    difference = float((weights(whole) - weights(parts)).abs().max())
    return near(difference, 0.0 if not machine.cuda else 1e-5, "largest difference of the weights")


class Kept(Callback):
    """Bytes that the GPU holds at the end of training, before Lightning moves the networks to the CPU."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Note them."""
        self.bytes = torch.cuda.memory_allocated()


def memory(machine: Machine, folder: Path) -> dict[str, Any]:
    """The bytes that a training keeps are those that `plan=true` predicts."""
    name, kept = machine.shapes[0], Kept()
    measured = machine.cuda and not machine.tiny  # the libraries' own megabytes are more than a tiny net
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated() if measured else 0
    net, shape, batch = shaped(name, machine.device)
    method = prepared(Reflow(Denoiser(net, Flow(), "velocity", shape)))
    total = predicted(method).total()

    def run() -> None:
        callbacks = [kept] if measured else []
        fitted(machine, method, shape, 2, folder / "memory", batch=batch, callbacks=callbacks)

    peak = machine.peak(run)
    if measured:
        found = kept.bytes - before
    else:
        states = (v for o in method.optimizers_by_key.values() for s in o.state.values() for v in s.values())
        networks = [*method.networks.values(), *method.ema.values()]
        tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
        found = sum(v.nbytes for v in [*tensors, *states] if isinstance(v, Tensor))
    wanted = sum(size for kind, size in total.items() if kind != "gradients")
    return near(abs(found - wanted) / wanted, 0.02, "relative difference of what is kept") | {
        "shape": name,
        "predicted_bytes": sum(total.values()),
        "kept_bytes": found,
        "peak_bytes": peak,
    }


def checks(machine: Machine) -> dict[str, Callable[[Machine, Path], dict[str, Any]]]:
    """name -> check."""
    found: dict[str, Callable[[Machine, Path], dict[str, Any]]] = {
        "collectives": collectives,
        "bfloat16": bfloat16,
        "compile": compiled,
        "activation checkpointing": recomputed,
        "fused Adam": fused_adam,
        "no sync in a step": no_sync,
        "kill and continue": continued,
        "memory": memory,
    }
    return found | {
        f"speed: {method}, {shape}": partial(speed, shape_name=shape, method_name=method)
        for shape in machine.shapes
        for method in TIMED
    }


# ---- the report ----


def run(machine: Machine, only: Sequence[str]) -> list[dict[str, Any]]:
    """Every check with its outcome."""
    rows = []
    for name, check in checks(machine).items():
        if only and not any(name.startswith(word) for word in only):
            continue
        start, row = time.perf_counter(), {"check": name}
        with tempfile.TemporaryDirectory() as place:
            try:
                row |= {"outcome": "passed", "numbers": check(machine, Path(place))}
            except Skipped as reason:
                row |= {"outcome": "skipped", "why": str(reason)}
            except Exception as error:  # whatever stops a check, the others still run
                row |= {"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:600]}
        rows.append(row | {"seconds": round(time.perf_counter() - start, 2)})
        print(f"{row['outcome']:<8} {name}  {row.get('why') or row.get('numbers')}", flush=True)
        if machine.cuda:
            torch.cuda.empty_cache()
    return rows


def table(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The report in Markdown."""
    lines = [
        f"{facts['name']}, torch {facts['torch']}, {facts['date']}{', tiny nets' if facts['tiny'] else ''}",
        "",
    ]
    lines += ["| check | outcome | numbers | seconds |", "|---|---|---|---|"]
    for row in rows:
        numbers = row.get("why") or ", ".join(
            f"{key.replace('_', ' ')} {value:.4g}"
            if isinstance(value, float)
            else f"{key.replace('_', ' ')} {value}"
            for key, value in row["numbers"].items()
            if value is not None
        )
        lines.append(
            f"| {row['check']} | {row['outcome']} | {' '.join(numbers.split()).replace('|', '/')} | {row['seconds']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the checks, write the reports; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts/bench/results")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument(
        "--shapes", nargs="*", default=["sd15", "sdxl", "dit_xl2"], choices=["sd15", "sdxl", "dit_xl2"]
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: found no CUDA device; expected one, or --device cpu --tiny")
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32
    machine = Machine(
        torch.device(options.device), options.tiny, ["tiny"] if options.tiny else options.shapes
    )
    name = torch.cuda.get_device_name() if machine.cuda else f"CPU {platform.machine()}"
    facts = {
        "name": name,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "tiny": options.tiny,
    }
    facts |= {"date": datetime.date.today().isoformat(), "cuda": torch.version.cuda if machine.cuda else None}
    rows = run(machine, options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"gpu_check-{re.sub(r'[^A-Za-z0-9]+', '_', name)}{'-tiny' if options.tiny else ''}-{facts['date']}"
    (options.out / f"{stem}.json").write_text(json.dumps({**facts, "checks": rows}, indent=2) + "\n")
    (options.out / f"{stem}.md").write_text(table(facts, rows))
    print(options.out / f"{stem}.md")
    return int(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
