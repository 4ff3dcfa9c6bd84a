"""Triton's interpreter with its slowest detours cut short; what it computes and checks stays.

More than half of its time goes into three things: taking over triton.language again for every call of every function,
working out whether integers overflow (and then, without ``debug``, not looking at the answer), and looking up NumPy's
types.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["quick_interpreter"]


@functools.cache
def _sees(function: Any) -> frozenset[str]:
    """What a kernel's module calls triton.language and its core: each is patched for itself."""
    modules = {id(tl): "language", id(tl.core): "core"}
    return frozenset(modules[id(value)] for value in function.__globals__.values() if id(value) in modules)


_scalar = functools.cache(interpreter._get_np_dtype)


def _numpy_type(kind: Any) -> np.dtype[Any]:
    element = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else _scalar(element)


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """For kernels that run within; triton.language is the interpreter's until the end."""
    scopes: dict[frozenset[str], Any] = {}
    take_over, builder = interpreter._patch_lang, interpreter.interpreter_builder

    def take_over_once(function: Any) -> Any:
        seen = _sees(function)
        if seen not in scopes:
            scopes[seen] = take_over(function)
        return interpreter._LangPatchScope()  # nothing to give back

    assert not builder.options.debug
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", take_over_once)
        patch.setattr(interpreter, "_get_np_dtype", _numpy_type)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()
