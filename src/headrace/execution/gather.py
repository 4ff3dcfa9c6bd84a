"""A loaded model's tensors laid side by side, so that what loading took beside them can be given back.

Converting weights one by one leaves each result between temporaries, in segments that hold both; a segment with one
live tensor cannot be given back.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from headrace.execution.device_memory import grow

__all__ = ["gather", "held_tensors", "move_together"]

_AT_ONCE = 1 << 30  # bytes that are there twice meanwhile
_SMALL = 1 << 20  # see device_memory.grow
_ROUND = 512  # the allocator's


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor that a model holds, once: parameters, buffers, and those of plain attributes, at any depth; of
    views also what they are views of, which lives as long as they do."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
            if value._is_view() and value._base is not None:
                found.setdefault(id(value._base), value._base)
            return
        inner = list(_inside(value))
        if inner and id(value) not in seen:
            seen.add(id(value))
            for item in inner:
                look(item)

    look(model)
    return list(found.values())


def _inside(value: object) -> Iterable[object]:
    """What a container, a module, or an object of ours holds."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, type) or not (
        isinstance(value, nn.Module) or type(value).__module__.startswith("headrace.")
    ):
        return ()
    slots = (
        getattr(value, name, None) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())
    )
    return [*getattr(value, "__dict__", {}).values(), *slots]


def gather(model: nn.Module) -> None:
    """Move a model's tensors on a GPU into as few segments as hold them; values and views stay as they are.

    Args:
        model: complete; nobody has taken addresses of its tensors.
    """
    shared: dict[int, list[Tensor]] = {}
    for tensor in held_tensors(model):
        if tensor.device.type == "cuda" and tensor.untyped_storage().nbytes():
            shared.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    device = next(model.parameters()).device
    pool = torch.cuda.MemPool()
    waiting = list(shared.values())
    while waiting:
        torch.cuda.empty_cache()
        group, small, size = _group(waiting)
        with torch.cuda.use_mem_pool(pool, device):
            grow(size, device, small)
            for tensors in group:
                move_together(tensors)
    torch.cuda.empty_cache()


def _group(waiting: list[list[Tensor]]) -> tuple[list[list[Tensor]], int, int]:
    """The next of ``waiting``, taken from there; bytes of the small ones among them, and of all."""
    group, small, size = [], 0, 0
    while waiting and size < _AT_ONCE:
        tensors = waiting.pop(0)
        nbytes = -(-tensors[0].untyped_storage().nbytes() // _ROUND) * _ROUND
        small += nbytes if nbytes <= _SMALL else 0
        size += nbytes
        group.append(tensors)
    return group, -(-small // _SMALL) * _SMALL, size + (-small % _SMALL)


def move_together(tensors: list[Tensor]) -> None:
    """Give tensors of one storage another one with the same bytes."""
    old = tensors[0].untyped_storage()
    fresh = torch.empty(old.nbytes(), dtype=torch.uint8, device=tensors[0].device)
    fresh.copy_(torch.empty(0, dtype=torch.uint8, device=fresh.device).set_(old))
    for tensor in tensors:
        moved = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.data = moved.set_(
            fresh.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
