"""Feed-forward blocks."""

from __future__ import annotations

from torch import Tensor, nn

from headrace.kernels import rounding
from headrace.kernels.activation import activate, gelu_mul, gelu_tanh_mul, silu_mul
from headrace.kernels.rounding import Rounded
from headrace.layers.rounded import takes_rounded

__all__ = ["GATES", "MLP", "GatedMLP"]

GATES = {"silu": silu_mul, "gelu": gelu_mul, "gelu_tanh": gelu_tanh_mul}


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020), gate and up as one projection."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.activation, self.gate = activation, GATES[activation]

    def forward(self, x: Tensor | Rounded) -> Tensor:
        """[T, D] -> [T, D]."""
        wide = self.gate_up(x)
        inner = (
            rounding.gate(wide, None, self.activation, "fp8")
            if takes_rounded(self.down, wide)
            else self.gate(wide)
        )
        del wide  # of a step's tensors the largest: gone before the product takes its own
        return self.down(inner)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """``down(act(up(x)))``."""

    def __init__(self, up: nn.Module, down: nn.Module, activation: str) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down(activate(self.up(x), self.activation))  # type: ignore[no-any-return]
