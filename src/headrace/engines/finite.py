"""A model that cannot answer is refused at start: its weights, and what it makes of one token, must be numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.errors import UnsupportedCheckpoint
from headrace.layers.linear import Embedding, Linear

__all__ = ["require_finite"]

_NAMED = 3


def require_finite(fine: bool, model: nn.Module, where: str, dtype: torch.dtype) -> None:
    """Raise UnsupportedCheckpoint unless all weights, and what one token gave (``fine``), are finite.

    Weights alone do not tell of those kept in few bits, nor of overflow; one token does not tell of keys, since
    attention takes minus infinity for what is not to be seen. A row of an embedding breaks only those who use it, and
    they are told so.

    Args:
        where: of the checkpoint.
    """
    broken = _broken(model)
    if broken:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise UnsupportedCheckpoint(
            f"{where}: NaN or infinity in {', '.join(broken[:_NAMED])}{more}: the file is damaged; fetch or convert "
            "it anew",
            param="model",
        )
    if not fine:
        kind = str(dtype).removeprefix("torch.")
        raise UnsupportedCheckpoint(
            f"{where}: what the model makes of one token is not finite, though its weights are: numbers overflow "
            f"{kind}, or weights of few bits are damaged; try another dtype, or fetch the file anew",
            param="model",
        )


@torch.inference_mode()
def _broken(model: nn.Module) -> list[str]:
    """Names of weights that hold something else than numbers."""
    skipped = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    skipped -= {
        id(module.weight) for module in model.modules() if isinstance(module, Linear)
    }  # a head's, too
    tensors: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        plain = tensor.is_floating_point() and tensor.itemsize > 1 and tensor.layout is torch.strided
        if plain and id(tensor) not in skipped:
            tensors[name] = tensor
    # NaN and infinity do not leave a sum again; one question to the device.
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors.values()]
    finite = torch.stack(sums).isfinite().tolist() if sums else []
    return [name for name, good in zip(tensors, finite) if not good]
