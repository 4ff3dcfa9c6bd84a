"""What the inputs of a decoder's linears look like on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.decoder import DecoderModel

__all__ = ["Inputs", "input_statistics"]


@dataclass(slots=True)
class Inputs:
    """Of one linear.

    Attributes:
        mean_square: of each input column, float32 [in].
        peak: the largest magnitude seen.
    """

    mean_square: Tensor
    peak: float = 0.0
    rows: int = 0


@torch.inference_mode()
def input_statistics(
    model: DecoderModel,
    texts: Sequence[list[int]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Inputs]:
    """What each linear meets, by its path within the model.

    Args:
        model: unquantized.
        texts: token ids; each is one sequence.
        progress: texts done, texts in all.
    """
    found: dict[str, Inputs] = {}
    handles = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            seen = found.setdefault(path, Inputs(torch.zeros(x.shape[1], device=x.device)))
            seen.mean_square += x.square().sum(0)
            seen.peak = max(seen.peak, float(x.abs().max()))
            seen.rows += x.shape[0]

        return add

    for path, module in model.named_modules():
        if isinstance(module, Linear) and path != "head":
            handles.append(module.register_forward_pre_hook(hook(path)))
    device = next(model.parameters()).device
    try:
        for done, ids in enumerate(texts, 1):
            model(PackedBatch.for_encoding([ids], device=device, causal=model.config.causal))
            if progress is not None:
                progress(done, len(texts))
    finally:
        for handle in handles:
            handle.remove()
    for inputs in found.values():
        inputs.mean_square = (inputs.mean_square / inputs.rows).cpu()
    return found
