"""Small passes as CUDA graphs: padded to a ladder of sizes, captured when first needed.

A pass over few tokens is a few hundred launches of kernels that take microseconds each, so that the host would be
what it waits for. Full batches are graphs, too: the host then has its time for texts and results. What lies between
is launched as it is, since padding would cost more than launches.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.config.plan.scratch import ENCODE_FULL_GRAPHS, ENCODE_GRAPH_WASTE
from headrace.execution.capture import GraphKeeper, borrowed
from headrace.execution.encode_batch import buffer_size, fill, view
from headrace.layers.packed import PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.models.encode_model import EncodeModel
from headrace.models.encoder import EncoderModel
from headrace.types import Request

__all__ = ["EncodeGraphs", "GraphPass", "GraphSize", "capturable", "graph_sizes"]

TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
LARGE = ENCODE_FULL_GRAPHS
_SEQS = 64  # at most, beside the padding
_LARGE_SEQS = 256
_LONG = 256  # tokens of a text, on average, from which full batches have graphs of their own
_STAGES = 4  # host buffers in turn; two passes at most are under way


class GraphSize(NamedTuple):
    """The most tokens and texts of a graph, without those that pad it."""

    tokens: int
    texts: int


def graph_sizes() -> list[GraphSize]:
    """Every graph there may be, smallest first.

    Kernels are chosen by what a graph can hold, so full batches of long texts have graphs that hold few of them.
    """
    small = [GraphSize(size, min(size, _SEQS)) for size in TOKENS]
    return small + [
        GraphSize(size, texts) for size in LARGE for texts in (size // _LONG, _LARGE_SEQS) if texts
    ]


@dataclass(slots=True)
class GraphPass:
    """What a captured pass leaves on the device until the next captured one.

    Attributes:
        batch: padded.
        hidden: [T, D].
        pooled: float32 [S, X], of models that give one vector or one set of logits a sequence; else None.
    """

    batch: PackedBatch
    hidden: Tensor
    pooled: Tensor | None


@dataclass(slots=True)
class _Graph:
    given: Tensor
    stages: list[Tensor]
    seqs: int
    replay: Callable[[], object]
    output: list[GraphPass]
    turn: int = 0


def capturable(model: EncodeModel) -> bool:
    """Whether a pass does not depend on the lengths of its sequences."""
    backbone = model.backbone
    if isinstance(backbone, EncoderModel):
        return True
    assert isinstance(backbone, DecoderModel)
    ropes = (backbone.config.rope, backbone.config.local_rope)
    return not any(rope is not None and rope.length_dependent for rope in ropes)


class EncodeGraphs(GraphKeeper[GraphSize, _Graph]):
    """Graphs of one model; on a CPU the functions run that a GPU captures.

    Args:
        model: capturable.
        pooled: from hidden states and batch to ``GraphPass.pooled``, or None.
        types: whether the model tells segments apart.
    """

    def __init__(
        self,
        model: EncodeModel,
        pooled: Callable[[Tensor, PackedBatch], Tensor] | None,
        device: torch.device,
        *,
        types: bool,
    ) -> None:
        super().__init__(device)
        self.model, self.pooled, self.device, self.types = model, pooled, device, types
        self.captures = device.type == "cuda"

    def covers(self, tokens: int, seqs: int) -> bool:
        """Whether a batch of this size has a graph."""
        if tokens <= TOKENS[-1]:
            return seqs <= _SEQS
        return seqs <= _LARGE_SEQS and any(0 <= size - tokens <= size // ENCODE_GRAPH_WASTE for size in LARGE)

    def run(self, requests: list[Request], tokens: int) -> GraphPass:
        """A pass over these; its tensors hold until the next one."""
        key = _smallest(tokens, len(requests))
        size = key.tokens
        graph = self._graph(key)
        graph.turn = (graph.turn + 1) % _STAGES
        stage = graph.stages[graph.turn]
        types = None
        if self.types:
            stage[2 * size : 3 * size] = 0
            if any(request.token_types for request in requests):
                types = [request.token_types or bytes(len(request.token_ids)) for request in requests]
        ids = [request.token_ids for request in requests]
        fill(stage.numpy(), size, graph.seqs, ids, types, self.model.vocab_size)
        graph.given.copy_(stage, non_blocking=True)
        graph.replay()
        return graph.output[0]

    def capture_next(self) -> bool:
        """Make the smallest graph that is not there; true if another one is missing."""
        missing = [size for size in graph_sizes() if size not in self._graphs] if self.captures else []
        if missing:
            self.capture(missing[0])
        return len(missing) > 1

    @torch.inference_mode()
    def warm_up(self, seconds: float) -> None:
        """Capture graphs for about so long, the smallest first: a short question must not wait for a capture."""
        began = time.perf_counter()
        for size in graph_sizes()[: len(TOKENS)]:
            if time.perf_counter() - began > seconds:
                break
            self._graph(size)

    def _make(self, key: GraphSize) -> _Graph:
        size, seqs = key.tokens, key.texts + 1
        given = torch.zeros(buffer_size(size, seqs, types=self.types), dtype=torch.int32, device=self.device)
        stages = [
            torch.zeros(given.shape, dtype=torch.int32, pin_memory=self.captures) for _ in range(_STAGES)
        ]
        # One sequence, so that what runs before the first replay is a pass like any other.
        fill(stages[0].numpy(), size, seqs, [[0]], [[0]] if self.types else None, 1)
        given.copy_(stages[0])
        output: list[GraphPass] = []

        def work() -> None:
            output.clear()
            batch = view(given, size, seqs, types=self.types, causal=self.model.causal, longest=size)
            hidden = self.model.hidden(batch)
            output[:] = [GraphPass(batch, hidden, self.pooled(hidden, batch) if self.pooled else None)]

        replay: Callable[[], object] = work
        if self._memory is not None:
            replay = self._memory.capture(work)
            output[:] = [_borrowed(output[0])]
        return _Graph(given, stages, seqs, replay, output)


def _smallest(tokens: int, texts: int) -> GraphSize:
    """Of the graphs that hold so many; there is one."""
    if tokens <= TOKENS[-1]:
        size = TOKENS[bisect.bisect_left(TOKENS, tokens)]
        return GraphSize(size, min(size, _SEQS))
    size = LARGE[bisect.bisect_left(LARGE, tokens)]
    return GraphSize(size, size // _LONG if texts <= size // _LONG else _LARGE_SEQS)


def _borrowed(done: GraphPass) -> GraphPass:
    pooled = None if done.pooled is None else borrowed(done.pooled)
    return GraphPass(done.batch, borrowed(done.hidden), pooled)
