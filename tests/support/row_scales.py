"""FP4 weights whose rows have scales of their own, as fused projections do."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from headrace.quantization.schemes.fp4 import Fp4Weight

__all__ = ["times"]


def times(weight: Fp4Weight, factor: Tensor) -> Fp4Weight:
    """The same codes with every row times ``factor`` [rows]."""
    return dataclasses.replace(weight, row_scale=weight.row_scale * factor)
