"""What the kernels of few rows share, as for 16 bits."""

from __future__ import annotations

import triton.language as tl

from headrace.kernels.linear.triton_parts import finish, gather_parts

__all__ = ["FP8_MAX", "finish", "gather_parts"]

FP8_MAX = tl.constexpr(448.0)
