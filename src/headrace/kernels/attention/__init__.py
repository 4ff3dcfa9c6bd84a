"""Attention of a packed batch: grouped heads, paged cache, sliding window, soft cap, causal or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headrace.kernels.dispatch import kernel
from headrace.kernels.rounding import Bound, Rounded

if TYPE_CHECKING:
    from headrace.layers.packed import AttentionBatch

__all__ = ["attention", "rounded_attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: AttentionBatch,
    layer: int,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write k and v to the layer's cache slots, then attend every query to its sequence's keys.

    Without a cache (``batch.caches`` empty) the keys are those of this batch alone.

    Args:
        q: [T, Hq, D]. Query head h reads key head h // (Hq / Hkv) (grouped queries, Ainslie et al. 2023).
        k, v: [T, Hkv, D]. Of q, k and v only the last dimension is sure to be contiguous.
        layer: which of ``batch.caches``.
        scale: factor of q . k.
        window: a query sees keys less than this far from it (before it, when causal); None: all.
        soft_cap: scores become ``cap * tanh(score / cap)`` before the mask (Gemma 2).
        sinks: float32 [Hq], a score for each head that joins the softmax and has no value (gpt-oss); it is neither
            scaled nor capped.

    Returns:
        [T, Hq, D], contiguous.
    """
    run = kernel("attention", "attention", q.device.type)
    return run(q, k, v, batch, layer, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks)  # type: ignore[no-any-return]


def rounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: AttentionBatch,
    bound: Bound,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Rounded:
    """The same without a cache, rounded to FP8 with one scale for all rows.

    Args:
        bound: of all values.

    Returns:
        [T, Hq * D].
    """
    run = kernel("attention", "rounded_attention", q.device.type)
    return run(q, k, v, batch, bound, scale=scale, window=window, soft_cap=soft_cap)  # type: ignore[no-any-return]
