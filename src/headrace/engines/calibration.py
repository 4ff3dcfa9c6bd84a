"""What the inputs of a decoder's linears look like on text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import Checkpoint
from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.models.loading import linear_sources, load_decoder
from headrace.quantization.compensation import Compensation

__all__ = ["Calibration", "Inputs", "input_statistics"]


@dataclass
class Inputs:
    """Of one linear.

    Attributes:
        gram: mean of x^T x over all tokens x, float32 [in, in].
        peak: the largest magnitude seen.
    """

    gram: Tensor
    peak: float = 0.0
    rows: int = 0

    @property
    def mean_square(self) -> Tensor:
        """Of each input column, float32 [in]."""
        return self.gram.diagonal()

    @cached_property
    def compensation(self) -> Compensation:
        """For all matrices that meet these."""
        return Compensation(self.gram)


@torch.inference_mode()
def input_statistics(
    model: DecoderModel,
    texts: Sequence[list[int]],
    paths: Collection[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Inputs]:
    """What linears meet, by their path within the model.

    Args:
        model: unquantized.
        texts: token ids; each is one sequence.
        paths: of the linears; each takes 4 bytes times the square of its inputs.
        progress: texts done, texts in all.
    """
    found: dict[str, Inputs] = {}
    handles = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            width = x.shape[1]
            seen = found.setdefault(path, Inputs(torch.zeros(width, width, device=x.device)))
            seen.gram.addmm_(x.T, x)
            seen.peak = max(seen.peak, float(x.abs().max()))
            seen.rows += x.shape[0]

        return add

    for path, module in model.named_modules():
        if path in paths:
            assert isinstance(module, Linear)
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
        inputs.gram /= inputs.rows
    return found


class Calibration:
    """What the matrices of a checkpoint meet on texts: the unquantized decoder runs over them for each shard.

    The model is loaded when it is first asked for, so that a finished shard costs nothing.

    Args:
        checkpoint: with 16- or 32-bit weights of a decoder.
        texts: token ids; each is one sequence.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[list[int]],
        device: torch.device,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.texts = [ids for ids in texts if ids]
        self.fingerprint = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:32]
        self._progress = progress
        self._model: DecoderModel | None = None

    def __call__(self, names: Collection[str]) -> dict[str, Inputs]:
        """By tensor name; of the names that belong to no linear, nothing.

        Raises UnknownArchitecture or UnsupportedCheckpoint when no decoder reads the checkpoint.
        """
        checkpoint = self.checkpoint
        if self._model is None:
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            self._model = load_decoder(checkpoint.config, checkpoint, dtype=dtype, device=self.device)
        sources = linear_sources(checkpoint.config, checkpoint)
        paths = {path for path, tensors in sources.items() if any(name in names for name in tensors)}
        tell = None if self._progress is None else partial(self._progress, "calibration")
        found = input_statistics(self._model, self.texts, paths, progress=tell)
        return {name: inputs for path, inputs in found.items() for name in sources[path] if name in names}
