"""Parallelism, applied from outside and only here: FSDP2 (`fully_shard`) a network on one (replicate, shard)
mesh.

Methods know nothing of it, and nets at most name `entries`, methods called beside `forward`.
`shard` says how the mesh is cut: "none" replicates (replicate = world, shard = 1), "world" shards over all processes, "node"
shards within a machine and replicates between machines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from distill.models.adapters import own_names
from distill.models.model import Model
from distill.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

# torch.distributed's tensor and fsdp packages take a second to import: only runs of several processes pay for them.

SHARD = ("none", "world", "node")
# Parts of a net with at least this many parameters are gathered on their own, so that never the whole net is.
UNIT_PARAMETERS = 1_000_000


def width(world: World, shard: str) -> int:
    """Processes that one copy of a network is sharded over. Raises ValueError for an unknown `shard`."""
    if shard not in SHARD:
        raise ValueError(f"trainer.shard: found {shard!r}, expected one of {list(SHARD)}")
    return {"none": 1, "world": world.size, "node": world.local_size}[shard]


def make_mesh(world: World, shard: str, device: torch.device) -> DeviceMesh | None:
    """The mesh: (replicate, shard), or (shard) alone where all processes share one copy; None for one process."""
    shards = width(world, shard)
    if world.size == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if shards == world.size:  # in two dimensions every unit would be reduced over groups of one as well
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard")
    )


def units(net: nn.Module, least: int = UNIT_PARAMETERS) -> list[nn.Module]:
    """The blocks of a net that are worth a unit of their own, with at least `least` parameters: those of the classes that it
    names, as networks of diffusers do in `_no_split_modules`, else members of module lists. Inner blocks stand before those
    that contain them."""
    named = {name for m in net.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    if named:
        found = [module for module in net.modules() if type(module).__name__ in named]
    else:
        lists = [module for module in net.modules() if isinstance(module, nn.ModuleList)]
        found = [block for each in lists for block in each if not isinstance(block, nn.ModuleList)]
    large = [block for block in found if sum(p.numel() for p in block.parameters()) >= least]
    return large[::-1]  # `modules` gives parents first, sharding wants children first


def place(
    trained: Sequence[nn.Module],
    frozen: Sequence[nn.Module],
    world: World,
    shard: str,
    device: torch.device,
    receiving: Container[int],
) -> None:
    """Shard the networks of a training over its processes, or with `shard` "none" the trained ones, and move them to their
    device: of a sharded network one block at a time, so that no process has it whole.

    `receiving`: ids of the parameters that receive gradients. Raises like `make_mesh` and `shard_networks`."""
    mesh = make_mesh(world, shard, device)
    # A network that shares modules with a sharded one runs within it.
    own = {module for network in trained for module in network.modules()}
    placed = [n for n in frozen if shard != "none" or any(module in own for module in n.modules())]
    shard_networks([*trained, *placed], mesh, receiving)
    for network in [*trained, *frozen]:
        network.to(device)


def shard_networks(
    networks: Sequence[nn.Module], mesh: DeviceMesh | None, trained: Container[int] = frozenset()
) -> None:
    """Shard networks in place (of a denoiser, its net). A module that several of them contain, such as the base of adapters, is
    sharded once, before them.

    `trained`: ids of the parameters that receive gradients. Raises ValueError where one of them cannot be sharded."""
    if mesh is None:
        return
    nets = list({net_of(network): None for network in networks})
    for net in [*common_modules(nets, trained), *nets]:
        shard_net(net, mesh, trained=trained)


def net_of(network: nn.Module) -> nn.Module:
    """What is sharded of a network: of a denoiser, which only reads its net's output, the net."""
    return network.net if isinstance(network, Model) else network


def common_modules(nets: Sequence[nn.Module], trained: Container[int]) -> list[nn.Module]:
    """The outermost modules with parameters that several nets contain.

    Raises ValueError where nets hold one trained parameter in different modules: each would shard a copy of its own and
    train it apart from the others, without an error."""
    holders: dict[int, list[set[nn.Module]]] = {}
    owners: dict[nn.Module, int] = {}
    for net in nets:
        own: dict[int, set[nn.Module]] = {}
        for module in net.modules():
            owners[module] = owners.get(module, 0) + 1
            for parameter in module.parameters(recurse=False):
                if id(parameter) in trained:
                    own.setdefault(id(parameter), set()).add(module)
        for key, modules in own.items():
            holders.setdefault(key, []).append(modules)
    for net in nets:
        for name, parameter in net.named_parameters():
            if any(modules != holders[id(parameter)][0] for modules in holders.get(id(parameter), ())):
                raise ValueError(
                    f"{name} of {type(net).__name__}: found a trained parameter in different modules of several networks; "
                    "expected one module that all of them hold"
                )
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        if owners[module] > 1 and next(module.parameters(), None) is not None:
            found[module] = None
        else:
            for child in module.children():
                visit(child)

    for net in nets:
        visit(net)
    return list(found)


def shard_net(
    net: nn.Module,
    mesh: DeviceMesh | None,
    *,
    least: int = UNIT_PARAMETERS,
    trained: Container[int] = frozenset(),
) -> None:
    """Shard a net in place: blocks first, then the root. Methods that the net names in `entries` may be called beside
    `forward`. Of a net that contains modules that are sharded already, and of a list of modules, the modules without such ones
    are sharded.

    The root is resharded after its forward like every other unit. By default it is not, and then a forward
    under no_grad followed by an optimizer step leaves the next forward with the old weights, silently."""
    own = [p for module in net.modules() for p in module.parameters(recurse=False)]
    placed = {p for p in own if bool(is_sharded(p))}  # within a module that is shared
    if mesh is None or len(placed) == len(own):
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(net, FSDPModule):
        return
    uncalled = isinstance(net, nn.ModuleList | nn.ModuleDict)  # no forward, at which it would be gathered
    if uncalled or any(isinstance(module, FSDPModule) for module in net.modules()):
        for name, parameter in net.named_parameters(recurse=False):
            if id(parameter) in trained:
                raise ValueError(
                    f"{name} of {type(net).__name__}: found a trained parameter beside a module that several networks share; "
                    "expected it in a module of its own"
                )
        for child in net.children():
            shard_net(child, mesh, least=least, trained=trained)
        return
    for parameter in own:
        if parameter not in placed:
            parameter.data = parameter.data.contiguous()  # channels-last weights cannot be sharded
    for block in [*units(net, least), net]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=placed)
    for name in getattr(net, "entries", ()):
        register_fsdp_forward_method(net, name)


def sharded_modules(networks: Iterable[nn.Module]) -> list[FSDPModule]:
    """All units of networks; none can exist before their package is imported."""
    if (package := sys.modules.get("torch.distributed.fsdp")) is None:
        return []
    modules = {module: None for network in networks for module in network.modules()}
    return [m for m in modules if isinstance(m, package.FSDPModule)]


def sync_gradients(modules: Iterable[FSDPModule], now: bool) -> None:
    """Whether the coming backward reduces gradients over processes: only the last micro batch of a step needs to."""
    for module in modules:
        module.set_requires_gradient_sync(now, recurse=False)


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor; none can exist before their package is imported."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(value, package.DTensor)


def local(value: Tensor) -> Tensor:
    """What this process has of a tensor: of a plain one, all."""
    return value.to_local() if is_sharded(value) else value


def full(value: Tensor) -> Tensor:
    """A tensor with all its shards, on its device; of sharded gradients' norms, the norm over all shards. Collective."""
    return value.full_tensor() if is_sharded(value) else value


def whole(value: Tensor) -> Tensor:
    """A tensor with all its shards, on the CPU. Collective."""
    return full(value).detach().to("cpu")


def full_state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """`state_dict` of a module as plain CPU tensors, sharded or not; of an adapted net, the adapter's. One tensor at a time is
    gathered, in the order of names. Collective; on processes without `keep` nothing is copied, and the result is empty."""
    state, found = module.state_dict(), {}
    for name in sorted(own_names(module)):
        value = full(state[name])
        if keep:
            found[name] = value.detach().to("cpu", copy=True)
    return found


@torch.no_grad()
def copy_full(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module, sharded or not, whole weights: a state dict, or of an adapted net the adapter's; strict. Each process
    keeps its own shards."""
    state_dict = module.state_dict()
    own = {name: state_dict[name] for name in own_names(module)}
    if set(own) != set(state):
        raise ValueError(f"weights: found {sorted(set(state) ^ set(own))[:4]} in one of the two models alone")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"weights: {name}: found shape {list(state[name].shape)}, expected {list(value.shape)}"
            )
        if is_sharded(value):
            value.copy_(laid_out_like(value, partial(_rows, state[name])))
        else:
            value.copy_(state[name])


class Rows(NamedTuple):
    """Rows `start` .. `stop` - 1 of a sharded tensor, that a process has. `first`: of the processes that have them."""

    start: int
    stop: int
    first: bool


def own_rows(value: DTensor) -> Rows | None:
    """The rows of this process; None where a tensor is not cut along its first dimension, once, into parts as `torch.chunk`
    makes them, on every process."""
    cuts = [number for number, placement in enumerate(value.placements) if not placement.is_replicate()]
    if value.dim() == 0 or len(cuts) > 1 or (cuts and not value.placements[cuts[0]].is_shard(0)):
        return None
    coordinate, rows = value.device_mesh.get_coordinate(), value.shape[0]
    assert coordinate is not None
    first = all(place == 0 for number, place in enumerate(coordinate) if number not in cuts)
    if not cuts:
        return Rows(0, rows, first)
    share = -(-rows // value.device_mesh.size(cuts[0]))
    return Rows(min(rows, share * coordinate[cuts[0]]), min(rows, share * (coordinate[cuts[0]] + 1)), first)


def part_to_save(value: Tensor, main: bool) -> tuple[Tensor, int] | None:
    """(rows, number of the first) of a tensor that this process saves, on the CPU; None where others save them all. Of a
    tensor on one process, or that each has, the main one saves it. Collective for tensors that are cut in another way."""
    if is_sharded(value):
        if (rows := own_rows(value)) is not None:
            saves = rows.first and rows.stop > rows.start
            return (value.to_local().detach().to("cpu"), rows.start) if saves else None
        value = value.full_tensor()
    return (value.detach().to("cpu"), 0) if main else None


def _rows(whole: Tensor, start: int, stop: int) -> Tensor:
    return whole[start:stop]


def laid_out_like(value: Tensor, rows: Callable[[int, int], Tensor]) -> Tensor:
    """A tensor with the device and layout of `value`, from `rows(start, stop)` of it: sharded like it, or with its strides
    (fused optimizers walk over memory, and channels-last weights lie there in another order)."""
    length = value.shape[0] if value.dim() else 1
    if not is_sharded(value):
        found = rows(0, length)
        return torch.empty_like(value, dtype=found.dtype).copy_(found)
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = value.device_mesh, value.placements
    if (own := own_rows(value)) is None:
        return distribute_tensor(
            rows(0, length).to(value.device).contiguous(), mesh, placements, src_data_rank=None
        )
    local = rows(own.start, own.stop).to(value.device, copy=True)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )
