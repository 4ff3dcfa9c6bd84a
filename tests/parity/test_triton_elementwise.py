"""Triton norms, rotary embedding and gates against their references."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.activation import reference as gate_reference
from headrace.kernels.activation import triton as gates
from headrace.kernels.attention.triton import write_cache
from headrace.kernels.norm import reference as norm_reference
from headrace.kernels.norm import triton as norms
from headrace.kernels.rotary import reference as rotary_reference
from headrace.kernels.rotary import triton as rotary
from headrace.layers.packed import LayerCache
from triton_device import DEVICE, DTYPES, error, randn, tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 65, 576])
def test_norms(dim: int, dtype: torch.dtype) -> None:
    x, residual = randn(3, dim, dtype=dtype, seed=0), randn(3, dim, dtype=dtype, seed=1)
    weight, bias = randn(dim, dtype=dtype, seed=2), randn(dim, dtype=dtype, seed=3)
    near = tolerance(dtype)
    assert error(norms.rms_norm(x, weight, 1e-6), norm_reference.rms_norm(x, weight, 1e-6)) < near
    for b in (None, bias):
        ours, theirs = norms.layer_norm(x, weight, b, 1e-3), norm_reference.layer_norm(x, weight, b, 1e-3)
        assert error(ours, theirs) < near or theirs.abs().max() == 0
    expected, total = norm_reference.add_rms_norm(x, residual.clone(), weight, 1e-6)
    ours, ours_total = norms.add_rms_norm(x, residual, weight, 1e-6)
    assert error(ours, expected) < near
    assert torch.equal(ours_total, total)


def test_float32_gain_and_strided_rows() -> None:
    wide = randn(5, 96, dtype=DTYPES[-1], seed=0)
    weight = randn(40, dtype=torch.float32, seed=1)
    x = wide[:, 10:50]
    assert error(norms.rms_norm(x, weight, 1e-6), norm_reference.rms_norm(x, weight, 1e-6)) < tolerance(
        x.dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "width"), [(5, 64, 64), (3, 80, 32), (12, 128, 0)])
def test_qk_norm_rope(heads: int, dim: int, width: int, dtype: torch.dtype) -> None:
    """A strided view of a fused projection, in place; the values beside it stay."""
    fused = randn(4, heads + 2, dim, dtype=dtype, seed=0)
    before = fused.clone()
    weight = randn(heads, dim, dtype=dtype, seed=1)
    angles = randn(4, 1, max(width // 2, 1), dtype=torch.float32, seed=2)
    cos = torch.cat([angles.cos()] * 2, -1) if width else None
    sin = torch.cat([-angles.sin(), angles.sin()], -1) if width else None
    expected = rotary_reference.qk_norm_rope(fused[:, :heads], weight, 1e-6, cos, sin)
    assert error(rotary.qk_norm_rope(fused[:, :heads], weight, 1e-6, cos, sin), expected) < 2 * tolerance(
        dtype
    )
    assert torch.equal(fused[:, heads:], before[:, heads:])
    if cos is not None and sin is not None:
        plain = before.clone()
        expected = rotary_reference.rope(before[:, :heads], cos, sin)
        assert error(rotary.rope(plain[:, :heads], cos, sin), expected) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul", "gelu_tanh_mul"])
def test_gates(name: str, dtype: torch.dtype) -> None:
    x = randn(3, 2 * 1100, dtype=dtype, seed=0).to(DEVICE)
    assert error(getattr(gates, name)(x), getattr(gate_reference, name)(x)) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "norm"), [(4, 2, 64, True), (7, 1, 16, False), (16, 8, 128, True)]
)
def test_norm_rope_store(heads: int, kv_heads: int, dim: int, norm: bool, dtype: torch.dtype) -> None:
    """Equal to norm, rotation and cache write one after another; nothing else is written."""
    tokens, block, every = 5, 4, heads + 2 * kv_heads
    qkv = randn(tokens, every, dim, dtype=dtype, seed=0)
    weight = randn(heads + kv_heads, dim, dtype=dtype, seed=1) if norm else None
    angle = randn(tokens, 1, dim // 2, dtype=torch.float32, seed=2)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    slots = torch.tensor([5, -1, 0, 11, 6], device=qkv.device)
    cache = LayerCache(
        *torch.full((2, 3, block, kv_heads, dim), 7.0, dtype=dtype, device=qkv.device).unbind()
    )
    wanted = LayerCache(cache.k.clone(), cache.v.clone())
    expected = qkv.clone()
    qk = expected[:, : heads + kv_heads]
    qk = rotary.rope(qk, cos, sin) if weight is None else rotary.qk_norm_rope(qk, weight, 1e-6, cos, sin)
    write_cache(qk[:, heads:], expected[:, heads + kv_heads :], wanted.k, wanted.v, slots)
    assert rotary.norm_rope_store(qkv, kv_heads, weight, 1e-6, cos, sin, cache, slots)
    assert torch.equal(qkv, expected)
    assert torch.equal(cache.k, wanted.k) and torch.equal(cache.v, wanted.v)
    assert (cache.k[0, 1] == 7).all() and (cache.k[2, 3] != 7).any()
    narrow = LayerCache(cache.k.to(torch.float8_e4m3fn), cache.v.to(torch.float8_e4m3fn))
    assert not rotary.norm_rope_store(qkv, kv_heads, weight, 1e-6, cos, sin, narrow, slots)
    assert torch.equal(qkv, expected)
