"""Rotary position embedding (Su et al. 2021) of packed heads, with the norm that may stand before it.

``cos`` and ``sin`` are float32 [T, 1, R], R the rotated head dimensions. Both halves of the last dimension
hold the same angles, and ``sin`` is negated in its first half, so that the rotation of x [T, H, R] is
``x * cos + swap_halves(x) * sin``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headrace.kernels.dispatch import kernel

if TYPE_CHECKING:
    from headrace.layers.packed import LayerCache

__all__ = ["norm_rope_store", "qk_norm_rope", "rope"]


def rope(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head of qk [T, H, D]; ``qk`` may be overwritten.

    qk holds query and key heads side by side, usually a view of the fused projection: only its last dimension
    is sure to be contiguous.
    """
    return kernel("rotary", "rope", qk.device.type)(qk, cos, sin)  # type: ignore[no-any-return]


def qk_norm_rope(qk: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """RMS norm of every head of qk [T, H, D] with its own row of weight [H, D], then ``rope``.

    ``qk`` may be overwritten. Without cos and sin nothing is rotated.
    """
    return kernel("rotary", "qk_norm_rope", qk.device.type)(qk, weight, eps, cos, sin)  # type: ignore[no-any-return]


def norm_rope_store(
    qkv: Tensor,
    num_kv_heads: int,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slots: Tensor,
) -> bool:
    """``qk_norm_rope`` (without weight ``rope``) in place, and keys and values to the cache, all in one pass.

    Args:
        qkv: [T, Hq + 2 Hkv, D], query, key and value heads side by side.
        weight: [Hq + Hkv, D].
        slots: int64 [T], block * block_size + offset in the cache; -1: nowhere.

    Returns:
        False where there is no kernel for this: then nothing was done.
    """
    run = kernel("rotary", "norm_rope_store", qkv.device.type)
    return run(qkv, num_kv_heads, weight, eps, cos, sin, cache, slots)  # type: ignore[no-any-return]
