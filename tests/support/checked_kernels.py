"""Triton's interpreter as a memory checker: every address that a kernel touches must lie in one of its arguments.

What sanitizers do on a GPU, without one and for every element: a load, store, atomic, or prefetch outside the memory of
the tensors that a kernel was given is an error that names them. Kernels that start early (headrace/kernels/launch.py)
write nothing before they have waited for the kernel before, and read only what no kernel of a step writes, but for
what kernels/step promises. New tensors begin as NaN, or integers that are no index of anything.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import headrace.kernels
from headrace.kernels import launch
from support.quick_interpreter import quick_interpreter

__all__ = ["Checker", "checked_kernels"]


# Arguments that may be read before the wait: weights; and of decode attention what the step began with, and older keys.
_WEIGHTS = frozenset({"w_ptr", "w_scale_ptr", "gain_ptr", "bias_ptr", "next_gain_ptr"})
_STEP = frozenset(
    {"lens_ptr", "tables_ptr", "rows_ptr", "k_cache", "v_cache", "cos_ptr", "sin_ptr", "gain_ptr"}
)


class Checker:
    """The kernel that runs now: its arguments' memory, and whether it has waited."""

    def __init__(self) -> None:
        self.kernel = ""
        self.waits = self.waited = False
        self._starts = self._ends = np.zeros(0, np.uint64)
        self._names: list[frozenset[str]] = []

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        """Take the memory of a launch's tensors."""
        self.kernel = kernel
        self.waits = bool(arguments.get("PDL"))
        spans: dict[tuple[int, int], set[str]] = {}
        for name, value in arguments.items():
            base = getattr(value, "base", value)
            if isinstance(base, torch.Tensor) and base.numel():
                last = sum((n - 1) * s for n, s in zip(base.shape, base.stride()))
                span = (base.data_ptr(), base.data_ptr() + (last + 1) * base.itemsize)
                spans.setdefault(span, set()).add(name)
        merged: list[list[Any]] = []
        for (start, end), names in sorted(spans.items()):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
                merged[-1][2] |= names
            else:
                merged.append([start, end, set(names)])
        self._starts = np.asarray([span[0] for span in merged], np.uint64)
        self._ends = np.asarray([span[1] for span in merged], np.uint64)
        self._names = [frozenset(span[2]) for span in merged]

    def touch(self, pointers: Any, mask: Any, what: str, itemsize: int = 0) -> None:
        """Check addresses, all or those that a mask takes. ``itemsize`` 0: of the pointers' type."""
        at = np.asarray(pointers.data, np.uint64)
        if mask is not None:
            at = at[np.broadcast_to(np.asarray(mask.data, bool), at.shape)]
        at = at.reshape(-1)
        if not at.size:
            return
        size = itemsize or max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        which = np.searchsorted(self._starts, at, side="right").astype(np.int64) - 1
        inside = which >= 0
        inside[inside] = at[inside] + np.uint64(size) <= self._ends[which[inside]]
        if not inside.all():
            bad = int(at[~inside][0])
            near = [
                f"{'/'.join(sorted(names))}{bad - int(start):+d} of {int(end) - int(start)} bytes"
                for start, end, names in zip(self._starts, self._ends, self._names)
                if -4096 < bad - int(start) < int(end) - int(start) + 4096
            ]
            raise IndexError(
                f"{self.kernel}: {what} of {int((~inside).sum())} elements outside all arguments; near {near}"
            )
        if self.waits and not self.waited and what != "prefetch":
            if what != "load":
                raise RuntimeError(f"{self.kernel}: {what} before the wait for the kernel before")
            allowed = _STEP if self.kernel == "_decode" else _WEIGHTS
            for i in set(which.tolist()):
                if not self._names[i] & allowed:
                    names = "/".join(sorted(self._names[i]))
                    raise RuntimeError(
                        f"{self.kernel}: {names} is read before the wait for the kernel before"
                    )


def _patch_interpreter(checker: Checker, patch: pytest.MonkeyPatch) -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    take = executor._init_args_hst

    def begin(self: Any, args: Any, kwargs: Any) -> Any:
        found = take(self, args, kwargs)
        checker.begin(self.fn.__name__, {**dict(zip(self.arg_names, found[0])), **found[1]})
        return found

    patch.setattr(executor, "_init_args_hst", begin)

    def checked(name: str, what: str, pointer: int, mask: int | None) -> None:
        original = getattr(builder, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            checker.touch(args[pointer], None if mask is None else args[mask], what)
            return original(self, *args, **kwargs)

        patch.setattr(builder, name, call)

    checked("create_masked_load", "load", 0, 1)
    checked("create_masked_store", "store", 0, 2)
    checked("create_atomic_rmw", "atomic", 1, 3)
    checked("create_atomic_cas", "atomic", 0, None)
    place = builder.set_grid_idx

    def start(self: Any, *index: int) -> None:
        checker.waited = False
        place(self, *index)

    patch.setattr(builder, "set_grid_idx", start)

    def assembly(self: Any, text: str, _: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        if "prefetch" in text:
            checker.touch(values[0], None, "prefetch", itemsize=1)
        else:
            assert "fence" in text, text
        shape = values[0].data.shape if values else (1,)
        result = interpreter.TensorHandle(np.zeros(shape, np.int32), tl.int32)
        return SimpleNamespace(get_result=lambda _: result)

    patch.setattr(builder, "create_inline_asm", assembly)


def _patch_waits(checker: Checker, patch: pytest.MonkeyPatch) -> None:
    """Kernels take their way of GPUs that start kernels early."""
    patch.setattr(launch, "supports_pdl", lambda device: True)

    def wait() -> None:
        checker.waited = True

    for module in pkgutil.walk_packages(headrace.kernels.__path__, "headrace.kernels."):
        if ".triton" in module.name:
            loaded = importlib.import_module(module.name)
            if hasattr(loaded, "gdc_wait"):
                patch.setattr(loaded, "gdc_wait", wait)
                patch.setattr(loaded, "gdc_launch_dependents", lambda: None)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        if made.device.type == "cpu" and made.numel() and not kwargs.get("pin_memory"):
            if made.dtype.is_floating_point and made.itemsize > 1:
                made.fill_(torch.nan)
            elif made.dtype in (torch.int32, torch.int64):
                made.fill_(0x7F7F7F7F)
        return made

    return call


@contextmanager
def checked_kernels() -> Iterator[Checker]:
    """Check every kernel that Triton's interpreter runs."""
    checker = Checker()
    with quick_interpreter(), pytest.MonkeyPatch.context() as patch:
        _patch_interpreter(checker, patch)
        _patch_waits(checker, patch)
        patch.setattr(torch, "empty", _poisoned(torch.empty))
        patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        yield checker
