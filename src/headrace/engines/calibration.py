"""What the inputs of a decoder's linears look like on text: the mean square of every column."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.decoder import DecoderModel

__all__ = ["column_importance"]


@torch.inference_mode()
def column_importance(
    model: DecoderModel,
    texts: Sequence[list[int]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Mean square of each input column, float32 [in], by the linear's path within the model.

    Args:
        model: unquantized.
        texts: token ids; each is one sequence.
        progress: texts done, texts in all.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    handles = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            total = x.square().sum(0)
            sums[path] = sums[path] + total if path in sums else total
            rows[path] = rows.get(path, 0) + x.shape[0]

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
    return {path: (total / rows[path]).cpu() for path, total in sums.items()}
