"""Decode attention, again and again over one poisoned cache: the same bits, and nothing else of the cache touched.

In every cut of decode_shapes.py and for heads of every kind, over every type of cache: what lanes hand each other
within a warp, what is loaded before the kernel before has ended, and what a compiler makes of a new key's rounding goes
wrong from time to time or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.kernels.attention import fp4
from headrace.kernels.attention.cache import as_cached
from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.triton_decode import DecodeWorkspace, QKNormRope, decode_attention
from headrace.kernels.rotary.reference import qk_norm_rope, rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BLOCK, SCALE = 16, 0.088
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """``count`` sequences of up to ``length`` keys; ``rotated`` dimensions of a head's ``dim``."""

    count: int
    length: int
    long: bool = False
    heads: int = 32
    kv: int = 8
    dim: int = 128
    rotated: int = 128
    norm: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


CASES = [
    Case(1, 100),
    Case(1, 2000, long=True),
    Case(3, 16000, long=True),
    Case(4, 600, long=True),
    Case(16, 1000),
    Case(16, 1000, long=True),
    Case(16, 9000, long=True, norm=False),
    Case(64, 1500),
    Case(40, 6000, norm=False, rotated=0),
    Case(140, 1100),
    Case(16, 1200, long=True, heads=16),
    Case(64, 700, heads=16),
    Case(20, 900, long=True, heads=8, kv=8, dim=64, rotated=64),
    Case(33, 900, heads=64, dim=64, rotated=64, norm=False, window=128, sinks=True),
    Case(5, 3000, long=True, heads=64, dim=64, rotated=64, norm=False, sinks=True),
    Case(150, 800, heads=14, kv=2, dim=64, rotated=64, norm=False),
    Case(12, 2100, heads=8, kv=4, dim=256, rotated=256, window=500, soft_cap=50.0),
    Case(90, 300, heads=8, kv=4, dim=256, rotated=64, norm=False),
    Case(9, 700, long=True, heads=6, kv=2, dim=80, rotated=32, norm=False, soft_cap=30.0),
    Case(40, 500, heads=32, kv=32, dim=96, rotated=96, norm=False, window=200),
    Case(64, 300, heads=8, kv=8, dim=32, rotated=32),
]


def wide(raw: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers of bytes of a cache."""
    return fp4.decode(raw) if kind is FP4 else raw.view(kind).float()


class Step:
    """A decode step over a cache in which all that is not an older key is NaN."""

    def __init__(self, case: Case, kind: torch.dtype) -> None:
        self.case, self.kind = case, kind
        count, heads, kv, dim = case.count, case.heads, case.kv, case.dim
        torch.manual_seed(case.length)
        with torch.device("cuda"):
            per = -(-case.length // BLOCK)
            lens = torch.randint(1, case.length + 1, (count,), dtype=torch.int32)
            for i, odd in enumerate((case.length, 1, BLOCK, BLOCK + 1)[:count]):
                lens[i] = odd
            self.lens, self.at = lens, lens.long() - 1
            self.tables = (torch.randperm(count * per).int() + 1).view(count, per)
            self.rows = torch.arange(count)
            dtype = torch.float32 if kind is torch.float32 else torch.bfloat16
            known = torch.randn(2, count * per + 1, BLOCK, kv, dim, dtype=dtype)
            self.cache = torch.stack([as_cached(part, kind).view(torch.uint8) for part in known])
            known = None
            old = torch.zeros(self.cache.shape[1:3], dtype=torch.bool)
            places = torch.arange(per * BLOCK)
            seq, place = (places < self.at[:, None]).nonzero().unbind(1)
            old[self.tables[seq, place // BLOCK].long(), place % BLOCK] = True
            self.cache[:, ~old] = 255  # NaN in every type
            self.new = torch.zeros_like(old)
            self.new[self.tables[self.rows, self.at // BLOCK].long(), self.at % BLOCK] = True
            self.qkv = torch.randn(count, heads + 2 * kv, dim, dtype=dtype)
            gain = (1 + torch.randn(2, dim) / 4).to(dtype)[[0] * heads + [1] * kv]
            angle = torch.rand(case.length, case.rotated // 2) * 6
            cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)
            self.sinks = torch.randn(heads) * 3 if case.sinks else None
            self.workspace = DecodeWorkspace.allocate(count, heads, kv, dim, lens.device)
            self.workspace.partial.fill_(torch.nan)
            self.out = torch.full((count, heads, dim), 7.0, dtype=dtype)
        turns = case.rotated > 0
        self.fused = QKNormRope(
            gain if case.norm else None, 1e-6, cos if turns else None, sin if turns else None
        )
        angles = (cos[self.at][:, None], sin[self.at][:, None]) if turns else (None, None)
        self.qk = self.qkv[:, : heads + kv].clone()
        if case.norm:
            self.qk = qk_norm_rope(self.qk, gain, 1e-6, *angles)
        elif turns:
            self.qk = rope(self.qk, *angles)

    def run(self, *, fused: bool) -> Tensor:
        case, heads, kv = self.case, self.case.heads, self.case.kv
        q = self.qkv[:, :heads] if fused else self.qk[:, :heads].contiguous()
        new: dict[str, Any] = {}
        if fused:
            new = {
                "new_k": self.qkv[:, heads : heads + kv],
                "new_v": self.qkv[:, heads + kv :],
                "fused": self.fused,
            }
        pools = self.cache.view(self.kind)
        self.out.fill_(7.0)
        decode_attention(
            q, pools[0], pools[1], self.tables, self.lens, self.workspace, scale=SCALE, window=case.window,
            soft_cap=case.soft_cap, sinks=self.sinks, long=case.long, out=self.out, **new,
        )  # fmt: skip
        return self.out.clone()

    def wanted(self) -> tuple[Tensor, Tensor]:
        """(the output in float32, the cache's bytes afterwards)."""
        case, heads, kv = self.case, self.case.heads, self.case.kv
        cache = self.cache.clone()
        for i, new in enumerate((self.qk[:, heads:], self.qkv[:, heads + kv :])):
            block = self.tables[self.rows, self.at // BLOCK].long()
            cache[i, block, self.at % BLOCK] = as_cached(new.contiguous(), self.kind).view(torch.uint8)
        out = torch.empty(self.out.shape, device="cuda")
        for s, length in enumerate(self.lens.tolist()):
            first = max(0, length - case.window) if case.window else 0
            blocks = self.tables[s, : -(-length // BLOCK)].long()
            keys, values = (wide(part[blocks], self.kind).flatten(0, 1)[first:length] for part in cache)
            q = self.qk[s, :heads].float().view(kv, -1, case.dim)
            score = torch.einsum("hgd,nhd->hgn", q, keys) * SCALE
            if case.soft_cap:
                score = case.soft_cap * torch.tanh(score / case.soft_cap)
            if self.sinks is not None:
                score = torch.cat([score, self.sinks.view(kv, -1, 1)], 2)
            weight = score.softmax(-1)[..., : length - first]
            out[s] = torch.einsum("hgn,nhd->hgd", weight, values).flatten(0, 1)
        return out, cache


@pytest.mark.parametrize("kind", [torch.bfloat16, FP8, FP4], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits(case: Case, kind: torch.dtype) -> None:
    again(case, kind, 1.2e-2)


@pytest.mark.parametrize(
    "case", [Case(5, 90, heads=4, kv=2, dim=16, rotated=16), CASES[0], CASES[-1]], ids=str
)
def test_float32(case: Case) -> None:
    again(case, torch.float32, 1e-4)


def again(case: Case, kind: torch.dtype, most: float) -> None:
    """Ten equal steps, and of an FP8 cache ten more that find the new token in it."""
    step = Step(case, kind)
    wanted, written = step.wanted()
    for fused in (True, False)[: 1 + (kind is FP8)]:  # the second finds in the cache what the first wrote
        first = step.run(fused=fused)
        error = (first.float() - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))
        assert error.max() < most, error.tolist()
        moved = step.cache != written
        assert not moved[:, ~step.new].any()
        # The norm sums in another order: a number between two of the cache's may have gone to the other one.
        apart = (wide(step.cache, kind) - wide(written, kind))[:, step.new].abs() > 1e-5
        assert apart.float().mean() < (0.02 if case.norm or case.rotated else 1e-9)
        written = step.cache.clone()
        for _ in range(9):
            assert torch.equal(step.run(fused=fused), first) and torch.equal(step.cache, written)
