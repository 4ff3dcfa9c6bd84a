"""What the inputs of a decoder's linears look like on text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import Checkpoint
from headrace.layers.experts import ExpertLinear
from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.models.loading import linear_sources, load_decoder
from headrace.quantization.compensation import Compensation

__all__ = ["Calibration", "Inputs", "input_statistics"]


@dataclass
class Inputs:
    """Of one linear, or one expert's.

    Attributes:
        gram: mean of x^T x over all rows x, float32 [in, in].
        peak: the largest magnitude seen; of an expert that met nothing, the largest that others of its layer saw.
        rows: how many were seen.
    """

    gram: Tensor
    peak: float = 0.0
    rows: int = 0

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
) -> dict[str, list[Inputs]]:
    """What linears meet, by their path within the model: one, or one for each expert.

    Experts' projections of the stream share one, over all tokens: few texts show each of them enough of its own.

    Args:
        model: unquantized.
        texts: token ids; each is one sequence.
        paths: of the linears; each takes 4 bytes times the square of its inputs.
        progress: texts done, texts in all.
    """
    found: dict[str, list[Inputs]] = {}
    handles = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            groups = [x]
            if isinstance(module, ExpertLinear) and len(x) == inputs[1].num_pairs > inputs[1].chosen.shape[0]:
                by_pair = inputs[1].chosen.flatten()
                groups = [x[by_pair == expert] for expert in range(module.num_experts)]
            width = x.shape[1]
            if path not in found:
                found[path] = [Inputs(torch.zeros(width, width, device=x.device)) for _ in groups]
            for seen, rows in zip(found[path], groups, strict=True):
                if len(rows):
                    seen.gram.addmm_(rows.T, rows)
                    seen.peak = max(seen.peak, float(rows.abs().max()))
                    seen.rows += len(rows)

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
    for every in found.values():
        peak = max(inputs.peak for inputs in every)
        for inputs in every:
            inputs.gram /= max(inputs.rows, 1)
            inputs.peak = inputs.peak if inputs.rows else peak
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
        return {
            name: every[i * len(every) // len(sources[path])]  # an expert's matrices lie side by side
            for path, every in found.items()
            for i, name in enumerate(sources[path])
            if name in names
        }
