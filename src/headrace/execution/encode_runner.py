"""One device, one pass: requests to a packed batch, the model, and all results in one copy back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.execution.threads import ThreadGovernor
from headrace.layers.packed import PackedBatch
from headrace.models.encode_model import EncodeModel
from headrace.types import EncodeOutput, EncodeParams, EncodeTask, Request

__all__ = ["EncodeRunner"]

Array = npt.NDArray[np.float32]


class EncodeRunner:
    """Runs an EncodeModel on one device.

    Args:
        model: loaded, on ``device``.
    """

    def __init__(self, model: EncodeModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.tasks = frozenset(model.card.tasks)
        self.vocab_size, self.max_tokens = model.vocab_size, model.max_tokens
        self.dimensions, self.token_types = model.dimensions, model.token_types
        self.threads: ThreadGovernor | None = None  # chooses the CPU threads of each step

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> list[EncodeOutput]:
        """One forward pass over all requests, and what each of them asked for, in their order."""
        if self.threads is not None:
            self.threads.adjust()
        lengths = [len(request.token_ids) for request in requests]
        batch = self._pack(requests)
        hidden = self.model.hidden(batch)
        out = _Collector(self.device)
        wanted = [_tasks(request) for request in requests]
        for task in dict.fromkeys(task for tasks in wanted for task in tasks):
            rows = [i for i, tasks in enumerate(wanted) if task in tasks]
            self._compute(task, rows, hidden, batch, lengths, out)
        arrays = out.fetch()
        return [
            self._output(request, i, tasks, arrays)
            for i, (request, tasks) in enumerate(zip(requests, wanted))
        ]

    def _pack(self, requests: Sequence[Request]) -> PackedBatch:
        types: list[list[int]] | None = None
        if self.token_types > 1 and any(request.token_types for request in requests):
            types = [list(r.token_types) or [0] * len(r.token_ids) for r in requests]
        ids = [list(request.token_ids) for request in requests]
        return PackedBatch.for_encoding(ids, device=self.device, causal=self.model.causal, token_types=types)

    def _compute(
        self,
        task: EncodeTask,
        rows: list[int],
        hidden: Tensor,
        batch: PackedBatch,
        lengths: list[int],
        out: _Collector,
    ) -> None:
        """Results of one task for these requests."""
        model = self.model
        if task in (EncodeTask.EMBED, EncodeTask.CLASSIFY, EncodeTask.SCORE):
            if task is EncodeTask.EMBED:
                values = model.embed(hidden, batch.attention)
            else:
                values = model.classify(hidden, batch)
            for row in rows:
                out.add((row, task), values[row])
            return
        starts = np.concatenate(([0], np.cumsum(lengths))).tolist()
        if task is EncodeTask.SPARSE:
            for row, (ids, weights) in enumerate(model.sparse(hidden, batch, lengths)):
                out.add((row, task), weights)
                out.add((row, "indices"), ids.to(torch.int32).view(torch.float32))
            return
        per_token = model.token_classify if task is EncodeTask.TOKEN_CLASSIFY else model.token_vectors
        values = per_token(hidden)
        # BGE-M3 gives no vector for its first token, which carries the dense one.
        skip = 1 if model.card.kind == "m3" else 0
        for row in rows:
            out.add((row, task), values[starts[row] + skip : starts[row + 1]])

    def _output(
        self, request: Request, row: int, tasks: list[EncodeTask], arrays: dict[object, Array]
    ) -> EncodeOutput:
        assert request.encode is not None
        results = []
        for task in tasks:
            values = arrays[row, task]
            if not np.isfinite(values).all():
                return EncodeOutput(request.id, error="the model's output was not finite for this input")
            values = self._finish(task, values, request.encode)
            indices = arrays[row, "indices"].tobytes() if task is EncodeTask.SPARSE else b""
            results.append(EncodeOutput(request.id, values.tobytes(), values.shape, indices))
        first, *also = results
        return msgspec.structs.replace(first, also=tuple(also)) if also else first

    def _finish(self, task: EncodeTask, values: Array, params: EncodeParams) -> Array:
        """Per-request choices, on the host: they are small and differ between requests."""
        if task is EncodeTask.EMBED:
            if params.dimensions is not None:
                values = values[: params.dimensions]
            normalize = self.model.card.normalized if params.normalize is None else params.normalize
            return _normalized(values) if normalize else values
        if task is EncodeTask.EMBED_ALL:
            return _normalized(values) if params.normalize else values
        if params.raw_scores or task is EncodeTask.SPARSE:
            return values
        if task is EncodeTask.SCORE or values.shape[-1] == 1 or self.model.card.multi_label:
            return _sigmoid(values)
        return _softmax(values)


class _Collector:
    """Gathers device tensors and brings them to the host as one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.keys: list[object] = []
        self.parts: list[Tensor] = []

    def add(self, key: object, values: Tensor) -> None:
        self.keys.append(key)
        self.parts.append(values)

    def fetch(self) -> dict[object, Array]:
        if self.device.type == "cpu":
            return {key: part.numpy() for key, part in zip(self.keys, self.parts)}
        flat = torch.cat([part.flatten() for part in self.parts]).cpu().numpy()
        arrays, first = {}, 0
        for key, part in zip(self.keys, self.parts):
            arrays[key] = flat[first : first + part.numel()].reshape(part.shape)
            first += part.numel()
        return arrays


def _tasks(request: Request) -> list[EncodeTask]:
    assert request.encode is not None
    return list(dict.fromkeys((request.encode.task, *request.encode.also)))


def _normalized(values: Array) -> Array:
    norms = np.sqrt(np.square(values).sum(-1, keepdims=True))
    result: Array = np.divide(values, np.maximum(norms, 1e-12), dtype=np.float32)
    return result


def _sigmoid(values: Array) -> Array:
    # Half of 1 + tanh(x / 2): no overflow at either end.
    result: Array = np.multiply(0.5, 1 + np.tanh(0.5 * values), dtype=np.float32)
    return result


def _softmax(values: Array) -> Array:
    shifted = np.exp(values - values.max(-1, keepdims=True))
    result: Array = np.divide(shifted, shifted.sum(-1, keepdims=True), dtype=np.float32)
    return result
