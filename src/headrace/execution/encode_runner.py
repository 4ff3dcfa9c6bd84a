"""One device, one pass: requests to a packed batch, the model, and all results in one copy back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.execution.encode_batch import buffer_size, fill, upload, view
from headrace.execution.encode_graphs import EncodeGraphs, capturable
from headrace.execution.threads import ThreadGovernor
from headrace.layers.packed import AttentionBatch, PackedBatch
from headrace.models.encode_model import EncodeModel
from headrace.types import EncodeOutput, EncodeParams, EncodeTask, Request

__all__ = ["EncodeRunner", "LaunchedPass"]

Array = npt.NDArray[np.float32]

_POOLED = (EncodeTask.EMBED, EncodeTask.CLASSIFY, EncodeTask.SCORE)  # one result a sequence


class EncodeRunner:
    """Runs an EncodeModel on one device.

    Args:
        model: loaded, on ``device``.
        graphs: small batches are CUDA graphs; None: on GPUs, where the model can be captured.
    """

    def __init__(self, model: EncodeModel, device: torch.device, *, graphs: bool | None = None) -> None:
        self.model, self.device = model, device
        self.tasks = frozenset(model.card.tasks)
        self.vocab_size, self.max_tokens = model.vocab_size, model.max_tokens
        self.dimensions, self.token_types = model.dimensions, model.token_types
        self.threads: ThreadGovernor | None = None  # chooses the CPU threads of each step
        self.pooled_task = next((task for task in model.card.tasks if task in _POOLED), None)
        self.graphs: EncodeGraphs | None = None
        if capturable(model) and (device.type == "cuda" if graphs is None else graphs):
            pooled = None if self.pooled_task is None else self._pooled
            self.graphs = EncodeGraphs(model, pooled, device, types=self.token_types > 1)

    def prepare_next(self) -> bool:
        """Called in moments without work: capture one more graph; true if another is left."""
        return self.graphs is not None and self.graphs.capture_next()

    def run(self, requests: Sequence[Request]) -> list[EncodeOutput]:
        """One forward pass over all requests, and what each of them asked for, in their order."""
        return self.launch(requests).finish()

    @torch.inference_mode()
    def launch(self, requests: Sequence[Request]) -> LaunchedPass:
        """The same; on a GPU this returns when all is queued there."""
        if self.threads is not None:
            self.threads.adjust()
        requests = list(requests)
        lengths = [len(request.token_ids) for request in requests]
        total = sum(lengths)
        pooled: Tensor | None = None
        if self.graphs is not None and self.graphs.covers(total, len(requests)):
            done = self.graphs.run(requests, total)
            pooled, hidden = done.pooled, done.hidden[:total]
            batch = _unpadded(done.batch, total, len(requests))
        else:
            batch = self._pack(requests, lengths, total)
            hidden = self.model.hidden(batch)
        out = _Collector(self.device)
        wanted = [_tasks(request) for request in requests]
        for task in dict.fromkeys(task for tasks in wanted for task in tasks):
            if pooled is not None and task is self.pooled_task:
                out.add(task, pooled[: len(requests)])
                continue
            rows = [i for i, tasks in enumerate(wanted) if task in tasks]
            self._compute(task, rows, hidden, batch, lengths, out)
        out.begin()
        return LaunchedPass(self.model, requests, wanted, out)

    def _pack(self, requests: list[Request], lengths: list[int], total: int) -> PackedBatch:
        types: list[Sequence[int]] | None = None
        if self.token_types > 1 and any(request.token_types for request in requests):
            types = [request.token_types or bytes(len(request.token_ids)) for request in requests]
        kinds, seqs = types is not None, len(requests)
        flat = np.empty(buffer_size(total, seqs, types=kinds), np.int32)
        fill(flat, total, seqs, [request.token_ids for request in requests], types, self.vocab_size)
        given = upload(flat, self.device)
        batch = view(given, total, seqs, types=kinds, causal=self.model.causal, longest=max(lengths))
        batch.attention.host_query_lens, batch.attention.host_seq_lens = lengths, list(lengths)
        return batch

    def _pooled(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        if self.pooled_task is EncodeTask.EMBED:
            return self.model.embed(hidden, batch.attention)
        return self.model.classify(hidden, batch)

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
        if task in _POOLED:
            embeds = task is EncodeTask.EMBED
            out.add(task, model.embed(hidden, batch.attention) if embeds else model.classify(hidden, batch))
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


class LaunchedPass:
    """A pass whose results are on their way to the host."""

    def __init__(
        self, model: EncodeModel, requests: list[Request], wanted: list[list[EncodeTask]], out: _Collector
    ) -> None:
        self.model, self._requests, self._wanted, self._out = model, requests, wanted, out

    def done(self) -> bool:
        """Whether `finish` would not wait."""
        return self._out.done()

    def finish(self) -> list[EncodeOutput]:
        """Outputs in the order of the requests."""
        arrays = self._out.fetch()
        pooled = {task: _Pooled.of(arrays[task]) for task in _POOLED if task in arrays}
        pairs = zip(self._requests, self._wanted)
        return [self._output(request, i, tasks, arrays, pooled) for i, (request, tasks) in enumerate(pairs)]

    def _output(
        self,
        request: Request,
        row: int,
        tasks: list[EncodeTask],
        arrays: dict[object, Array],
        pooled: dict[EncodeTask, _Pooled],
    ) -> EncodeOutput:
        assert request.encode is not None
        results = []
        for task in tasks:
            whole = pooled.get(task)
            if whole is not None:
                finite, values = whole.finite[row], whole.values[row]
            else:
                values = arrays[row, task]
                finite = bool(np.isfinite(values).all())
            if not finite:
                return EncodeOutput(request.id, error="the model's output was not finite for this input")
            values = self._finished(task, values, request.encode, whole, row)
            indices = arrays[row, "indices"].tobytes() if task is EncodeTask.SPARSE else b""
            results.append(EncodeOutput(request.id, values.tobytes(), values.shape, indices))
        first, *also = results
        return msgspec.structs.replace(first, also=tuple(also)) if also else first

    def _finished(
        self, task: EncodeTask, values: Array, params: EncodeParams, whole: _Pooled | None, row: int
    ) -> Array:
        """Per-request choices, on the host: they are small and differ between requests."""
        if task is EncodeTask.EMBED:
            assert whole is not None
            normalize = self.model.card.normalized if params.normalize is None else params.normalize
            if params.dimensions is not None:
                values = values[: params.dimensions]
                return _normalized(values) if normalize else values
            return whole.unit()[row] if normalize else values
        if task is EncodeTask.EMBED_ALL:
            return _normalized(values) if params.normalize else values
        card = self.model.card
        if (
            params.raw_scores
            or task is EncodeTask.SPARSE
            or (task is EncodeTask.CLASSIFY and card.regression)
        ):
            return values
        if task is EncodeTask.SCORE or values.shape[-1] == 1 or card.multi_label:
            return _sigmoid(values)
        return _softmax(values)


@dataclass(slots=True)
class _Pooled:
    """One row a sequence, checked and normalized together: numpy's price is by the call."""

    values: Array
    finite: list[bool]
    _unit: Array | None = None

    @staticmethod
    def of(values: Array) -> _Pooled:
        finite = cast(list[bool], np.isfinite(values).all(-1).tolist())
        return _Pooled(values, finite)

    def unit(self) -> Array:
        """Each row at length 1."""
        if self._unit is None:
            with np.errstate(invalid="ignore", over="ignore"):  # of rows that are not finite
                self._unit = _normalized(self.values)
        return self._unit


class _Collector:
    """Gathers device tensors (float32) and brings them to the host as one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.keys: list[object] = []
        self.parts: list[Tensor] = []
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def add(self, key: object, values: Tensor) -> None:
        self.keys.append(key)
        self.parts.append(values)

    def begin(self) -> None:
        """Queue the copy."""
        if self.device.type == "cpu":
            return
        parts = self.parts
        flat = parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
        self._host = flat.to("cpu", non_blocking=True)  # pinned, so this does not wait
        self._event = torch.cuda.Event()
        self._event.record()

    def done(self) -> bool:
        return self._event is None or self._event.query()

    def fetch(self) -> dict[object, Array]:
        if self._host is None or self._event is None:
            return {key: part.numpy() for key, part in zip(self.keys, self.parts)}
        self._event.synchronize()
        flat = self._host.numpy()
        arrays, first = {}, 0
        for key, part in zip(self.keys, self.parts):
            arrays[key] = flat[first : first + part.numel()].reshape(part.shape)
            first += part.numel()
        return arrays


def _unpadded(batch: PackedBatch, tokens: int, seqs: int) -> PackedBatch:
    """A padded batch without its padding, as views."""
    padded = batch.attention
    attention = AttentionBatch(
        query_starts=padded.query_starts[: seqs + 1],
        seq_lens=padded.seq_lens[:seqs],
        causal=padded.causal,
        max_query_len=padded.max_query_len,
        max_seq_len=padded.max_seq_len,
    )
    types = None if batch.token_types is None else batch.token_types[:tokens]
    return PackedBatch(batch.token_ids[:tokens], batch.positions[:tokens], attention, types)


def _tasks(request: Request) -> list[EncodeTask]:
    params = request.encode
    assert params is not None
    return list(dict.fromkeys((params.task, *params.also))) if params.also else [params.task]


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
