"""How far a model's residual stream is from the reference's after each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from headrace.kernels.rounding import Rounded

__all__ = ["LayerErrors"]


class LayerErrors:
    """Hooks on both models' layers; ``settle`` compares what both did to one piece of text."""

    def __init__(self, layers: Iterable[nn.Module], reference: Iterable[nn.Module]) -> None:
        self._layers = (list(layers), list(reference))
        self._streams: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._errors: list[list[float]] = [[] for _ in self._layers[0]]
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for layers, streams in zip(self._layers, self._streams):
            self._handles += [layer.register_forward_hook(_hook(streams)) for layer in layers]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def settle(self) -> None:
        """Compare and forget what both have done since the last time."""
        mine, other = self._streams
        for errors, a, b in zip(self._errors, mine, other, strict=True):
            errors.append(float((a - b).norm() / b.norm().clamp(min=1e-30)))
        mine.clear()
        other.clear()

    def means(self) -> tuple[float, ...]:
        """One number a layer."""
        return tuple(sum(errors) / max(len(errors), 1) for errors in self._errors)


def _hook(streams: list[Tensor]) -> Callable[..., None]:
    def keep(_: nn.Module, __: object, output: tuple[Tensor | Rounded, Tensor | None]) -> None:
        x, residual = output
        if isinstance(x, Rounded):  # what the next residual sum will take
            assert x.full is not None
            x = x.full
        streams.append((x.float() if residual is None else x.float() + residual.float()).clone())

    return keep
