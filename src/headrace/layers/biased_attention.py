"""Self-attention whose scores get a bias by distance instead of a rotary embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from headrace.kernels.biased_attention import biased_attention
from headrace.layers.linear import parameter
from headrace.layers.packed import AttentionBatch

__all__ = ["BiasedAttention", "DistanceBias"]


class BiasedAttention(nn.Module):
    """Bidirectional multi-head attention with a bias by distance.

    Args:
        qkv: D -> 3 * D; o: D -> D.
    """

    def __init__(self, qkv: nn.Module, o: nn.Module, *, num_heads: int, scale: float) -> None:
        super().__init__()
        self.qkv, self.o = qkv, o
        self.num_heads, self.scale = num_heads, scale

    def forward(self, x: Tensor, bias: Tensor, batch: AttentionBatch) -> Tensor:
        """x [T, D], bias [H, 2 R + 1] -> [T, D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (part.unflatten(-1, heads) for part in (q, k, v))
        out = biased_attention(q, k, v, bias, batch, scale=self.scale)
        return self.o(out.flatten(1))  # type: ignore[no-any-return]


class DistanceBias(nn.Module):
    """What is added to the score of a key at each distance, [H, 2 * reach + 1].

    Args:
        kind: ``alibi`` (Press et al. 2022, in its symmetric form -slope * |distance|), or ``buckets``
            (Raffel et al. 2020: learned, logarithmic beyond a quarter of the buckets).
        reach: farthest distance that differs from those beyond it.
    """

    def __init__(
        self,
        kind: str,
        num_heads: int,
        reach: int,
        num_buckets: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.num_heads, self.reach, self.device = num_heads, reach, device
        self.weight = (
            parameter(num_buckets, num_heads, dtype=dtype, device=device) if kind == "buckets" else None
        )
        self.table: Tensor | None = None

    def finish(self) -> None:
        """Called once, when the weights are there."""
        distance = torch.arange(-self.reach, self.reach + 1, device="cpu")
        if self.weight is None:
            slopes = torch.tensor(alibi_slopes(self.num_heads), device="cpu")
            self.table = (-slopes[:, None] * distance.abs()).to(self.device)
        else:
            rows = bucket(distance, self.weight.shape[0]).to(self.weight.device)
            self.table = self.weight[rows].T.float().contiguous()


def alibi_slopes(num_heads: int) -> list[float]:
    """Geometric slopes; between powers of two, every other one of the next power's (Press et al.)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def bucket(distance: Tensor, num_buckets: int, max_distance: int = 128) -> Tensor:
    """Bucket of each distance key - query (int64): half of them behind, exact when near, then logarithmic."""
    half = num_buckets // 2
    exact = half // 2
    far = distance.abs()
    log = (far.clamp(min=1).float() / exact).log() / math.log(max_distance / exact) * (half - exact)
    large = (exact + log.long()).clamp(max=half - 1)
    return torch.where(far < exact, far, large) + (distance > 0) * half
