"""Triton's interpreter with its slowest detours cut short; what it computes and checks stays.

More than half of its time goes into three things: finding again at every launch what triton.language has, working out
whether integers overflow (and then, without ``debug``, not looking at the answer), and looking up NumPy's types.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["quick_interpreter"]


@functools.cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


_scalar = functools.cache(interpreter._get_np_dtype)


def _numpy_type(kind: Any) -> np.dtype[Any]:
    element = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else _scalar(element)


def quick_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone."""
    patch.setattr(interpreter, "_patch_builtin", _patch_builtin)
    patch.setattr(interpreter, "_get_np_dtype", _numpy_type)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
