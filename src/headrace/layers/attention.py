"""Self-attention: fused projection, norms of queries and keys, rotary embedding, paged attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.attention import attention, rounded_attention
from headrace.kernels.norm import rms_norm
from headrace.kernels.rotary import qk_norm_rope, rope
from headrace.kernels.rounding import Bound, Rounded
from headrace.layers.norm import RMSNorm
from headrace.layers.packed import AttentionBatch

__all__ = ["Attention", "FullNorm", "HeadNorm"]

CosSin = tuple[Tensor, Tensor]


class HeadNorm(nn.Module):
    """RMS norm of each query and key head (Qwen 3, Gemma 3), then the rotary embedding."""

    def __init__(self, q: RMSNorm, k: RMSNorm, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.q, self.k = q, k
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.stacked: Tensor | None = None

    def finish(self) -> None:
        """One row of weights a head, so that queries and keys are normed together."""
        rows = (self.q.weight.expand(self.num_heads, -1), self.k.weight.expand(self.num_kv_heads, -1))
        self.stacked = torch.cat(rows).contiguous()

    def forward(self, qk: Tensor, cos_sin: CosSin | None) -> Tensor:
        """[T, Hq + Hkv, D] -> the same."""
        assert self.stacked is not None, "finish() was not called"
        return qk_norm_rope(qk, self.stacked, self.q.eps, *(cos_sin or (None, None)))


class FullNorm(nn.Module):
    """RMS norm over all query heads, and over all key heads, together (OLMo 2), then the rotary embedding."""

    def __init__(self, q: RMSNorm, k: RMSNorm, num_heads: int) -> None:
        super().__init__()
        self.q, self.k = q, k
        self.num_heads = num_heads

    def forward(self, qk: Tensor, cos_sin: CosSin | None) -> Tensor:
        """[T, Hq + Hkv, D] -> the same."""
        q, k = qk[:, : self.num_heads].flatten(1), qk[:, self.num_heads :].flatten(1)
        q, k = rms_norm(q, self.q.weight, self.q.eps), rms_norm(k, self.k.weight, self.k.eps)
        qk = torch.cat((q, k), dim=1).view(qk.shape)
        return qk if cos_sin is None else rope(qk, *cos_sin)


class Attention(nn.Module):
    """Multi-head attention with grouped keys (Ainslie et al. 2023).

    Args:
        qkv: D -> (Hq + 2 Hkv) * head_dim; o: Hq * head_dim -> D.
        norm: HeadNorm or FullNorm, or None.
        layer: index of this layer's cache.
        sinks: float32 [Hq], a learned score for each head that joins the softmax and has no value (gpt-oss).

    Attributes:
        bound: of values, where o takes FP8 with one scale.
    """

    def __init__(
        self,
        qkv: nn.Module,
        o: nn.Module,
        *,
        norm: HeadNorm | FullNorm | None,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sinks: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.o, self.qk_norm = qkv, o, norm
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.layer, self.scale, self.window, self.soft_cap = layer, scale, window, soft_cap
        self.sinks = sinks
        self.bound: Bound | None = None

    def forward(self, x: Tensor | Rounded, cos_sin: CosSin | None, batch: AttentionBatch) -> Tensor:
        """x [T, D] -> [T, D]. ``cos_sin`` None: no rotary embedding in this layer."""
        hq, hkv = self.num_heads, self.num_kv_heads
        heads = self.qkv(x).view(x.shape[0], hq + 2 * hkv, self.head_dim)
        qk, v = heads[:, : hq + hkv], heads[:, hq + hkv :]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk, cos_sin)
        elif cos_sin is not None:
            qk = rope(qk, *cos_sin)
        if self.bound is not None and self.sinks is None and not batch.caches:
            return self.o(  # type: ignore[no-any-return]
                rounded_attention(
                    qk[:, :hq],
                    qk[:, hq:],
                    v,
                    batch,
                    self.bound,
                    scale=self.scale,
                    window=self.window,
                    soft_cap=self.soft_cap,
                )
            )
        out = attention(
            qk[:, :hq],
            qk[:, hq:],
            v,
            batch,
            self.layer,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
        )
        return self.o(out.flatten(1))  # type: ignore[no-any-return]
