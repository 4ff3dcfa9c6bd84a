"""Triton norms, rotary embedding and gates against their references."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, DTYPES, error, randn, tolerance

from headrace.kernels.activation import reference as gate_reference
from headrace.kernels.activation import triton as gates
from headrace.kernels.norm import reference as norm_reference
from headrace.kernels.norm import triton as norms
from headrace.kernels.rotary import reference as rotary_reference
from headrace.kernels.rotary import triton as rotary


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
    assert error(norms.rms_norm(x, weight, 1e-6), norm_reference.rms_norm(x, weight, 1e-6)) < tolerance(x.dtype)


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
    assert error(rotary.qk_norm_rope(fused[:, :heads], weight, 1e-6, cos, sin), expected) < 2 * tolerance(dtype)
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
