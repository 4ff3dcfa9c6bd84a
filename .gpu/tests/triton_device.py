"""Where kernel tests run: on the GPU if there is one, else under Triton's interpreter.

Import this before any ``headrace.kernels.*.triton``. The interpreter gets ``tl.dot`` on bf16 operands wrong, so
bf16 is tested on a GPU only.
"""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative root-mean-square error; NaN never passes a comparison."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return float((out - expected).norm() / expected.norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """What rounding once or twice to ``dtype`` may cost."""
    return {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}[dtype]


def randn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)
