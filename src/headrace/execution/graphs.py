"""Decode steps as CUDA graphs: one launch a step, captured at a ladder of batch sizes when first needed.

A step in which every sequence has one new token and samples is a decode step. All that it needs from the host is
four integers a sequence, in one copy; block tables and last tokens stay on the device by row. Everything else is
the Runner's plain way, which is also the specification of this one.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.execution.runner import Runner, Step
from headrace.execution.sampler import Masks, Sampled
from headrace.kernels.step import argmax_rows, begin_step
from headrace.layers.packed import AttentionBatch, LayerCache, PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.scheduling.plan import Chunk, StepPlan
from headrace.scheduling.sequence import Sequence

__all__ = ["LADDER", "DecodeStep", "GraphRunner"]

LADDER = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    160,
    192,
    224,
    256,
    320,
    384,
    448,
    512,
    640,
    768,
    896,
    1024,
)
_STAGES = 4  # pinned buffers in turn; at most two steps are in flight


@dataclass(slots=True)
class DecodeStep(Step):
    """A decode step: its input waits in pinned memory.

    Attributes:
        size: batch size of the graph; rows past the sequences' number are padding.
        packed: int32 [4, size], pinned on a GPU (see kernels/step).
        greedy: the graph itself chooses the most likely tokens.
        updates: rows of the block tables that changed in more than one place, int64 [N], and their contents.
        tokens: int64 [P], with ``greedy``.
    """

    size: int = 0
    packed: Tensor | None = None
    greedy: bool = False
    updates: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tokens: Tensor | None = None


@dataclass(slots=True)
class _Graph:
    """A captured step, or on a CPU the function itself."""

    packed: Tensor
    replay: Callable[[], object]
    output: list[Tensor]


class GraphRunner(Runner):
    """A Runner whose decode steps are graphs.

    Args:
        model: a DecoderModel; without length-dependent rotary embeddings.
        capture: False runs the captured function directly (for tests on a CPU).
        fast: use FastDecoder where it covers the model.
        Others: see Runner.
    """

    def __init__(
        self,
        model: DecoderModel,
        caches: list[LayerCache],
        *,
        device: torch.device,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        capture: bool = True,
        fast: bool = True,
    ) -> None:
        super().__init__(
            model,
            caches,
            device=device,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        self.decoder = model
        self.max_model_len = max_model_len
        self.capture = capture
        # One more row, for padding: it owns the null block.
        self._padding = max_num_seqs
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._device_tables = torch.zeros(
            max_num_seqs + 1, self._tables.shape[1], dtype=torch.int32, device=device
        )
        self._ladder = [size for size in LADDER if size < max_num_seqs] + [max_num_seqs]
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._pool: tuple[int, int] | None = None
        self._stages = [self._pinned(4, max_num_seqs) for _ in range(_STAGES)]
        self._turn = 0
        self._plain = np.zeros(max_num_seqs, bool)
        self._changed: list[tuple[int, int]] = []
        self._fast = _fast_decoder(model, max_model_len) if fast else None
        self._workspace = None if self._fast is None else self._fast.workspace(self._ladder[-1])

    # --- preparing -------------------------------------------------------------------------------

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> Step:
        for sequence in plan.admitted:
            self._plain[sequence.row] = _is_plain(sequence)
        self._changed = []
        decode = plan.num_tokens == len(plan.chunks) and all(chunk.samples for chunk in plan.chunks)
        step = self._prepare_decode(plan) if decode else super().prepare(plan)
        return step

    def _prepare_decode(self, plan: StepPlan) -> DecodeStep:
        chunks = plan.chunks
        num = len(chunks)
        for sequence in plan.admitted:
            self.sampler.admit(sequence)
            self._num_blocks[sequence.row] = 0
        size = self._ladder[bisect.bisect_left(self._ladder, num)]
        self._turn = (self._turn + 1) % _STAGES
        packed = self._stages[self._turn].view(-1)[: 4 * size].view(4, size)
        host = packed.numpy()
        rows = np.fromiter((c.row for c in chunks), np.int32, num)
        starts = np.fromiter((c.start for c in chunks), np.int32, num)
        host[0, :num], host[0, num:] = rows, self._padding
        host[1, :num], host[1, num:] = starts, 0
        host[2, :num] = [-1 if c.from_device else c.sequence.token_ids[c.start] for c in chunks]
        host[2, num:] = 0
        host[3] = -1
        self._update_tables(chunks)
        step = DecodeStep(plan, chunks, None, size=size, packed=packed, greedy=bool(self._plain[rows].all()))
        if self._changed:
            self._place_blocks(step, host, rows, starts)
        return step

    def _place_blocks(self, step: DecodeStep, host: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> None:
        """One new block where the new token goes travels with the step; any other change is a row's upload."""
        at = {int(row): i for i, row in enumerate(rows)}
        whole = []
        for row, have in self._changed:
            i = at[row]
            if have == self._num_blocks[row] - 1 and have == starts[i] // self.block_size:
                host[3, i] = self._tables[row, have]
            else:
                whole.append(row)
        if whole:
            step.updates.append(self._row_update(np.asarray(whole, np.int64)))

    def _row_update(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        width = int(self._num_blocks[rows].max())
        return self._upload(rows), self._upload(self._tables[rows, :width])

    def _update_tables(self, chunks: list[Chunk]) -> None:
        before = [(chunk.row, int(self._num_blocks[chunk.row])) for chunk in chunks]
        super()._update_tables(chunks)
        self._changed = [(row, have) for row, have in before if have != self._num_blocks[row]]

    # --- running ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, step: Step) -> Step:
        if not isinstance(step, DecodeStep):
            return super().run(step)
        for rows, blocks in step.updates:
            self._device_tables[rows, : blocks.shape[1]] = blocks
        graph = self._graph(step.size, step.greedy)
        assert step.packed is not None
        graph.packed.copy_(step.packed, non_blocking=True)
        graph.replay()
        output = graph.output[0][: len(step.chunks)]
        if step.greedy:
            step.tokens = output
        else:
            step.logits = output
        return step

    @torch.inference_mode()
    def sample(self, step: Step, masks: Masks | None = None) -> Step:
        if not isinstance(step, DecodeStep) or step.tokens is None:
            return super().sample(step, masks)
        assert not masks, "constrained rows are not plain"
        step.sampled = Sampled(step.tokens, {})
        # Pinned on a GPU, so the copy does not wait.
        step.host_tokens = step.tokens.to("cpu", non_blocking=True)
        step.tokens = None
        if self.device.type == "cuda":
            step.done = torch.cuda.Event()
            step.done.record()
        else:
            step.host_tokens = step.host_tokens.clone()
        return step

    # --- graphs ----------------------------------------------------------------------------------

    def warm_up(self, sizes: list[int] | None = None) -> None:
        """Capture the graphs of greedy steps now, at these batch sizes or on the whole ladder."""
        with torch.inference_mode():
            for size in sorted(sizes or self._ladder, reverse=True):
                self._graph(self._ladder[bisect.bisect_left(self._ladder, size)], True)

    def _graph(self, size: int, greedy: bool) -> _Graph:
        found = self._graphs.get((size, greedy))
        if found is None:
            found = self._graphs[size, greedy] = self._make(size, greedy)
        return found

    def _make(self, size: int, greedy: bool) -> _Graph:
        packed = torch.full((4, size), -1, dtype=torch.int32, device=self.device)
        packed[0], packed[1] = self._padding, 0
        output: list[Tensor] = []

        def compute() -> None:
            output[:] = [self._compute(packed, greedy)]

        if not self.capture or self.device.type != "cuda":
            return _Graph(packed, compute, output)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            compute()  # compiles and takes scratch; writes to the null block only
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            side.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                compute()
            finally:
                graph.capture_end()
        current.wait_stream(side)
        return _Graph(packed, graph.replay, output)

    def _compute(self, packed: Tensor, greedy: bool) -> Tensor:
        """The step itself: tokens int64 [B], or logits float32 [B, V]."""
        model = self.decoder
        inputs = begin_step(
            packed,
            self._device_tables,
            self._last_tokens,
            model.embed.weight,
            model.embed.scale,
            self.block_size,
        )
        rows = packed[0]
        if self._fast is not None:
            from headrace.models.decoder_fast import DecodeBatch

            assert self._workspace is not None
            batch = DecodeBatch(
                inputs.embedded, inputs.seq_lens, rows, self._device_tables, self.caches, self._workspace
            )
            if greedy:
                return self._fast.tokens(batch, self._last_tokens)
            return self._fast.logits(batch)
        num = packed.shape[1]
        attention = AttentionBatch(
            query_starts=torch.arange(num + 1, dtype=torch.int32, device=self.device),
            seq_lens=inputs.seq_lens,
            block_tables=self._device_tables[rows.long()],
            slots=inputs.slots,
            caches=self.caches,
            max_query_len=1,
            max_seq_len=self.max_model_len,
        )
        logits = model.logits(model(PackedBatch(inputs.token_ids, inputs.positions, attention)))
        if not greedy:
            return logits
        tokens = argmax_rows(logits)
        self._last_tokens[rows.long()] = tokens
        return tokens

    def _pinned(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    # --- the plain way's tables, kept on the device too ---------------------------------------------

    def _pack(self, plan: StepPlan) -> PackedBatch:
        batch = super()._pack(plan)
        if self._changed:
            rows, blocks = self._row_update(np.asarray([row for row, _ in self._changed], np.int64))
            self._device_tables[rows, : blocks.shape[1]] = blocks
        return batch


def _is_plain(sequence: Sequence) -> bool:
    """The next token is the most likely one and nothing else is asked for."""
    s = sequence.sampling
    return (
        s.greedy
        and s.logprobs is None
        and not s.logit_bias
        and not (s.min_tokens and sequence.stop_ids)
        and not sequence.needs_history
    )


def _fast_decoder(model: DecoderModel, max_model_len: int):  # type: ignore[no-untyped-def]
    """A FastDecoder, or None where it does not cover the model or there is no Triton."""
    try:
        from headrace.models.decoder_fast import FastDecoder, reason_against
    except ImportError:
        return None
    return FastDecoder(model, max_model_len) if reason_against(model) is None else None
