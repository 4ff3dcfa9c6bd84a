"""Linear maps, and the one embedding table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.kernels.dense import product
from headrace.kernels.linear import fixed_linear

__all__ = ["Embedding", "FixedLinear", "Linear", "parameter"]


def parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """An uninitialized weight that no gradient will reach."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """``x @ weight.T + bias``. A quantization scheme replaces the whole module by one of the same signature.

    Args:
        in_features, out_features: of weight [out, in].
        parts: rows of each projection fused into this one, in order; they add up to out_features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        parts: tuple[int, ...] | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.parts = parts or (out_features,)
        assert sum(self.parts) == out_features
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return product(x, self.weight, self.bias)


class FixedLinear(Linear):
    """A Linear whose every row is summed in the same order, whatever the batch (deterministic mode)."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return fixed_linear(x, self.weight, bias=self.bias)

    @staticmethod
    def fix(model: nn.Module) -> None:
        """Make every Linear of a model one of these, sharing its weights."""
        for module in model.modules():
            if type(module) is Linear:
                module.__class__ = FixedLinear


class Embedding(nn.Module):
    """Rows of a table [V, D], times ``scale``."""

    def __init__(
        self, vocab_size: int, dim: int, *, scale: float = 1.0, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, dim, dtype=dtype, device=device)
        # Gemma rounds its scale to the weights' type before multiplying; others' scales are exact anyway.
        self.scale = torch.tensor(scale, dtype=dtype).item()

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, D], a fresh tensor."""
        rows = F.embedding(token_ids, self.weight)
        return rows if self.scale == 1.0 else rows.mul_(self.scale)
