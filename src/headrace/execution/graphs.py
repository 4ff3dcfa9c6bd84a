"""Steps as CUDA graphs: one launch a step, captured at ladders of sizes when first needed.

All that a step needs from the host is four integers a token and three a sequence, in one copy; block tables and
last tokens stay on the device by row. In a decode step every sequence has one new token and samples: the graph runs
from there to tokens, or to logits where some row wants more than a draw. A mixed step's graph runs to hidden states.
Longer steps take the Runner's plain way, which is also the specification of these.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.config.plan.scratch import DECODE_GRAPHS
from headrace.execution.capture import GraphMemory, borrowed
from headrace.execution.graph_input import (
    MIXED_SEQS,
    MIXED_TOKENS,
    REPEATS,
    GraphKey,
    StepArrays,
    draws_size,
    fill,
    fill_draws,
    ladder,
    up,
)
from headrace.execution.runner import Runner, Step, StepResult
from headrace.execution.sampler import Masks, Sampled, race_keys
from headrace.kernels.attention.decode_shapes import is_long
from headrace.kernels.sampling import Draws, draw_rows
from headrace.kernels.step import argmax_rows, begin_step
from headrace.layers.packed import AttentionBatch, LayerCache, PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.scheduling.plan import StepPlan

if TYPE_CHECKING:
    from headrace.models.decoder_fast import DecodeBatch, FastDecoder

__all__ = ["GraphRunner", "GraphStep"]

_FORESEEN_TOKENS = 1024  # of a step whose graph is made before it is needed
logger = logging.getLogger("headrace.core")

_STAGES = 4  # pinned buffers in turn; the overlapped loop has two steps in flight


_NO_GRAPH = GraphKey(0, 0, "")


@dataclass(slots=True)
class GraphStep(Step):
    """A step that a graph runs; its input waits in pinned memory.

    Attributes:
        input: int32 [key.size], of the runner's buffer number ``turn``.
        updates: rows of the block tables that changed, int64 [N], and their contents.
        tokens: int64 [P], of a decode graph that ends there.
        again: int32 [R, ...], what changes in the input with each repetition.
        log, starts: tokens of repetitions on the host, int64 [P, REPEATS] by position, and first positions [P].
        begun: when the device began.
    """

    key: GraphKey = _NO_GRAPH
    input: Tensor | None = None
    turn: int = 0
    updates: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tokens: Tensor | None = None
    again: Tensor | None = None
    log: Tensor | None = None
    starts: np.ndarray | None = None
    begun: torch.cuda.Event | None = None

    def result(self) -> StepResult:
        result = super(GraphStep, self).result()
        if self.begun is not None and self.done is not None:
            result.device_ms = self.begun.elapsed_time(self.done)
        return result

    def _tokens(self) -> list[int]:
        last = super(GraphStep, self)._tokens()
        if self.log is None or self.starts is None:
            return last
        at = (self.starts[:, None] + np.arange(1, self.plan.repeats)) % REPEATS
        before: list[int] = np.take_along_axis(self.log.numpy(), at, axis=1).T.ravel().tolist()
        return before + last


@dataclass(slots=True)
class _Graph:
    """A captured step, or on a CPU the function itself."""

    input: Tensor
    replay: Callable[[], object]
    output: list[Tensor]


class GraphRunner(Runner):
    """A Runner whose steps are graphs.

    Attributes:
        decode_sizes: batches that decode steps are padded to.

    Args:
        model: a DecoderModel without length-dependent rotary embeddings.
        capture: False runs the captured functions directly.
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
        fixed: bool = False,
    ) -> None:
        super().__init__(
            model,
            caches,
            device=device,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            fixed=fixed,
        )
        self.decoder = model
        self.max_model_len = max_model_len
        # One more row, for padding: its table is the null block.
        self._padding = max_num_seqs
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        width = self._tables.shape[1]
        self._device_tables = torch.zeros(max_num_seqs + 1, width, dtype=torch.int32, device=device)
        self.decode_sizes = ladder(DECODE_GRAPHS, max_num_seqs)
        self._seq_sizes = ladder(MIXED_SEQS, max_num_seqs)
        self._graphs: dict[GraphKey, _Graph] = {}
        self._memory = GraphMemory(device) if capture and device.type == "cuda" else None
        self._log = torch.zeros(max_num_seqs, REPEATS, dtype=torch.int64, device=device)
        drawn = GraphKey(max_num_seqs, max_num_seqs, "drawn")
        largest = max(
            drawn.size + (REPEATS - 1) * draws_size(drawn),
            GraphKey(MIXED_TOKENS[-1], max_num_seqs, "mixed").size,
        )
        pinned = device.type == "cuda"
        self._stages = [torch.zeros(largest, dtype=torch.int32, pin_memory=pinned) for _ in range(_STAGES)]
        # Recorded behind the copy of each buffer: it is not written again before.
        self._copied = [torch.cuda.Event() for _ in self._stages] if pinned else []
        self._turn = 0
        self._ahead: deque[GraphKey] = deque()
        self._fast = _fast_decoder(model, max_model_len) if fast and not fixed else None
        self._workspace = None if self._fast is None else self._fast.workspace(max_num_seqs)

    # --- preparing -------------------------------------------------------------------------------

    def most_repeats(self, plan: StepPlan) -> int:
        """Where all rows have one new token and their draws are part of the graph."""
        if plan.admitted or len(plan.sampling) != plan.num_tokens:
            return 1
        rows = np.fromiter((chunk.row for chunk in plan.chunks), np.int64, len(plan.chunks))
        return min(REPEATS, self.block_size) if self.sampler.simple[rows].all() else 1

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> Step:
        if plan.num_tokens > MIXED_TOKENS[-1]:
            return super().prepare(plan)
        for sequence in plan.admitted:
            self.sampler.admit(sequence)
            self._num_blocks[sequence.row] = 0
        chunks = plan.sampling
        arrays = StepArrays.of(plan.chunks)
        if len(chunks) == plan.num_tokens:
            size = up(self.decode_sizes, len(chunks))
            long = self._is_long(size, int(arrays.starts.max()) + plan.repeats)
            key = GraphKey(size, size, self._decode_kind(arrays.rows), long=long)
            return self._stage(GraphStep(plan, chunks, None, key=key), arrays)
        key = GraphKey(
            up(MIXED_TOKENS, plan.num_tokens),
            up(self._seq_sizes, len(plan.chunks)),
            "mixed",
            # In a fixed order all sequences are attended to in one way.
            some_single=self.fixed or plan.chunks[0].count == 1,
            fresh=not self.fixed and all(chunk.start == 0 or chunk.count == 1 for chunk in plan.chunks),
        )
        return self._stage(GraphStep(plan, chunks, None, key=key), arrays)

    def _is_long(self, num_seqs: int, longest: int) -> bool:
        """Whether a decode step of so many sequences takes the graph for long ones."""
        if self._fast is None:
            return False
        config = self.decoder.config
        return is_long(num_seqs * config.num_kv_heads, config.head_dim, longest)

    def _decode_kind(self, rows: np.ndarray) -> str:
        """Where a decode step's graph ends: where nothing else is asked for, in tokens."""
        sampler = self.sampler
        if not sampler.simple[rows].all():
            return "logits"
        if not sampler.temperature[rows].any():
            return "tokens"
        return "filtered" if any(sampler.filters(rows)) else "drawn"

    def _stage(self, step: GraphStep, arrays: StepArrays) -> GraphStep:
        """Write the step's input."""
        step.turn = self._turn = (self._turn + 1) % _STAGES
        if self._copied:
            self._copied[step.turn].synchronize()
        step.input = self._stages[step.turn][: step.key.size]
        flat = step.input.numpy()
        packed = fill(flat, step.key, step.plan.chunks, arrays, self._padding)
        if step.key.draws:
            draws = self.sampler.draw_arrays(arrays.rows, step.chunks)
            fill_draws(flat, step.key, draws)
            step.again = self._keys_of_repeats(step, arrays)
        if step.plan.repeats > 1:
            step.starts = arrays.starts
        self._update_tables(step.plan.chunks)
        if self._changed:
            self._place_blocks(step, packed, arrays)
        return step

    def _keys_of_repeats(self, step: GraphStep, arrays: StepArrays) -> Tensor | None:
        """Random keys of the repetitions, int32 [repeats - 1, 2 lanes]."""
        more, size, key = step.plan.repeats - 1, draws_size(step.key), step.key
        if more == 0:
            return None
        keys = self._stages[self._turn][key.size : key.size + more * size].view(more, size)
        flat, seeds = keys.numpy(), self.sampler.seed[arrays.rows]
        for i in range(more):
            flat[i, : 2 * len(seeds)] = race_keys(seeds, arrays.starts + 2 + i).ravel()
            flat[i, 2 * len(seeds) :] = 0
        return keys

    def _place_blocks(self, step: GraphStep, packed: np.ndarray, arrays: StepArrays) -> None:
        """New blocks travel with the tokens that go there, and with the token before; else a row is uploaded."""
        size = self.block_size
        at = {int(row): i for i, row in enumerate(arrays.rows)}
        whole = []
        for row, have in self._changed:
            i = at[row]
            start, count, end = int(arrays.starts[i]), int(arrays.counts[i]), int(arrays.ends[i])
            first, last, following = (
                start // size,
                (start + count - 1) // size,
                self._num_blocks[row] - 1,
            )
            if first <= have <= last == following:
                positions = np.arange(max(start, have * size), start + count)
                packed[3, end - len(positions) : end] = self._tables[row, positions // size]
            elif last < have == following == last + 1:
                packed[3, end - 1] = -2 - self._tables[row, have]
            else:
                whole.append(row)
        if whole:
            step.updates.append(self._row_update(np.asarray(whole, np.int64)))

    def _row_update(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        width = max(self._num_blocks[row] for row in rows)
        return self._upload(rows), self._upload(self._tables[rows, :width])

    def _pack(self, plan: StepPlan) -> PackedBatch:
        """The plain way; the tables on the device follow."""
        batch = super()._pack(plan)
        if self._changed:
            rows, blocks = self._row_update(np.asarray([row for row, _ in self._changed], np.int64))
            self._device_tables[rows, : blocks.shape[1]] = blocks
        return batch

    # --- running ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, step: Step) -> Step:
        if not isinstance(step, GraphStep) or step.key.kind == "mixed":
            return super().run(step)
        output = self._replay(step)[: len(step.chunks)]
        if step.key.kind == "logits":
            step.logits = output
        else:
            step.tokens = output
        return step

    def _hidden(self, step: Step) -> Tensor:
        if not isinstance(step, GraphStep):
            return super()._hidden(step)
        hidden = self._replay(step)[: step.plan.num_tokens]
        if step.chunks:
            places = self._graph(step.key).input[-step.key.seqs :]
            step.last = places[: len(step.chunks)]
        return hidden

    def _replay(self, step: GraphStep) -> Tensor:
        for rows, blocks in step.updates:
            self._device_tables[rows, : blocks.shape[1]] = blocks
        graph = self._graph(step.key)
        assert step.input is not None
        if self.device.type == "cuda" and step.key.kind != "mixed":
            step.begun = torch.cuda.Event(enable_timing=True)
            step.begun.record()
        graph.input.copy_(step.input, non_blocking=True)
        graph.replay()
        for i in range(step.plan.repeats - 1):  # the graph has moved its input on
            if step.again is not None:
                graph.input[-step.again.shape[1] :].copy_(step.again[i], non_blocking=True)
            graph.replay()
        if self._copied:
            self._copied[step.turn].record()
        return graph.output[0]

    @torch.inference_mode()
    def sample(self, step: Step, masks: Masks | None = None) -> Step:
        if not isinstance(step, GraphStep) or step.tokens is None:
            return super().sample(step, masks)
        assert not masks, "constrained rows are not simple"
        step.sampled = Sampled(step.tokens, [], None)
        step.tokens = None
        if step.plan.repeats > 1:
            step.log = self._log[: len(step.chunks)].to("cpu", non_blocking=True, copy=True)
        self._send(step)
        return step

    # --- graphs ----------------------------------------------------------------------------------

    def reserve(self, size: int, small: int) -> None:
        """Take ``size`` bytes for all graphs together, ``small`` of them for tensors up to a MiB."""
        if self._memory is not None:
            self._memory.grow(size, small)

    def warm_up(self, sizes: list[int]) -> None:
        """Capture the graphs of greedy decode steps of these batch sizes now, for sequences of any length."""
        with torch.inference_mode():
            for size in sorted({up(self.decode_sizes, size) for size in sizes}, reverse=True):
                for key in self._decode_keys(size, "tokens"):
                    self._graph(key)

    def _decode_keys(self, size: int, kind: str) -> list[GraphKey]:
        """Of decode steps of short sequences, and of long ones where they have a graph of their own."""
        long = self._is_long(size, self.max_model_len)
        return [GraphKey(size, size, kind, long=cut) for cut in (False, True)[: 1 + long]]

    def keys(self, tokens: int) -> Iterator[GraphKey]:
        """Of every graph that steps of up to ``tokens`` tokens can need."""
        for size, kind in itertools.product(self.decode_sizes, ("tokens", "drawn", "filtered", "logits")):
            yield from self._decode_keys(size, kind)
        flags = [(True, False)] if self.fixed else list(itertools.product((True, False), repeat=2))
        for size in ladder(MIXED_TOKENS, up(MIXED_TOKENS, min(tokens, MIXED_TOKENS[-1]))):
            for below, seqs in zip((0, *self._seq_sizes), self._seq_sizes):
                if below < size:
                    yield from (GraphKey(size, seqs, "mixed", *flag) for flag in flags)

    def foresee(self, tokens: int) -> None:
        """Have `prepare_next` make the graphs that traffic is likely to need, one by one: single requests first."""
        drawn = [
            GraphKey(size, size, kind) for size in self.decode_sizes[:5] for kind in ("drawn", "filtered")
        ]
        prompts = [size for size in MIXED_TOKENS if size <= min(tokens, _FORESEEN_TOKENS)]
        seqs = self._seq_sizes[0]
        kinds = [(True, False)] if self.fixed else [(False, True), (True, True)]
        self._ahead = deque(
            [
                *drawn[:2],
                *(GraphKey(size, seqs, "mixed", *kinds[0]) for size in prompts),
                *(GraphKey(size, size, "tokens") for size in self.decode_sizes),
                *drawn[2:],
                *(GraphKey(size, seqs, "mixed", *kind) for kind in kinds[1:] for size in prompts),
                *(key for size in self.decode_sizes for key in self._decode_keys(size, "tokens")[1:]),
            ]
        )

    def prepare_next(self) -> bool:
        """Capture one of the graphs that are foreseen; see Runner."""
        while self._ahead:
            key = self._ahead.popleft()
            if key in self._graphs:
                continue
            try:
                self.capture(key)
            except torch.OutOfMemoryError as error:  # the step that needs it will say so
                logger.warning("a graph was not captured ahead: %s", error)
                self._ahead.clear()
            break
        return bool(self._ahead)

    def capture(self, key: GraphKey) -> None:
        """Make this graph now, if it is not there yet."""
        with torch.inference_mode():
            graph = self._graph(key)
            if self._memory is None:
                graph.replay()

    def forget(self) -> None:
        """Let go of all graphs in a rehearsal: hundreds hold their results, which captured ones share."""
        assert self._memory is None, "captured graphs stay"
        self._graphs.clear()

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Within, graphs are not captured but run as they are, over the first layers, and forgotten afterwards."""
        memory, graphs, fast = self._memory, self._graphs, self._fast
        layers = [] if fast is None else fast.layers
        self._memory, self._graphs = None, {}
        try:
            with self.decoder.shortened() as count:
                if fast is not None:
                    fast.layers = layers[:count]
                yield
        finally:
            self._memory, self._graphs = memory, graphs
            if fast is not None:
                fast.layers = layers

    def _graph(self, key: GraphKey) -> _Graph:
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._make(key)
        return found

    def _make(self, key: GraphKey) -> _Graph:
        # All padding: what runs before the first replay touches the null block only.
        given = torch.zeros(key.size, dtype=torch.int32, device=self.device)
        packed = given[: 4 * key.tokens].view(4, key.tokens)
        packed[0], packed[3] = self._padding, -1
        if key.kind == "mixed":
            given[4 * key.tokens + 2 * key.seqs + 1 : -key.seqs] = self._padding
        compute = self._compute_mixed if key.kind == "mixed" else self._compute_decode
        output: list[Tensor] = []

        def work() -> None:
            output.clear()
            output[:] = [compute(given, packed, key)]

        if self._memory is None:
            return _Graph(given, work, output)
        replay = self._memory.capture(work)
        output[:] = [borrowed(result) for result in output]
        return _Graph(given, replay, output)

    def _compute_decode(self, given: Tensor, packed: Tensor, key: GraphKey) -> Tensor:
        """Tokens int64 [B], or logits float32 [B, V]."""
        model, rows = self.decoder, packed[0]
        embedding = None if self._fast is None else model.embed.weight
        inputs = begin_step(
            packed, self._device_tables, self._last_tokens, embedding, model.embed.scale, self.block_size,
            self._log[: key.tokens],
        )  # fmt: skip
        if self._fast is not None:
            batch = self._decode_batch(inputs.embedded, inputs.seq_lens, rows, key.long)
            if key.kind == "tokens":
                return self._fast.tokens(batch, self._last_tokens)
            logits = self._fast.logits(batch)
        else:
            attention = AttentionBatch(
                query_starts=torch.arange(key.seqs + 1, dtype=torch.int32, device=self.device),
                seq_lens=inputs.seq_lens,
                block_tables=self._device_tables[rows.long()],
                slots=inputs.slots,
                caches=self.caches,
                max_query_len=1,
                max_seq_len=self.max_model_len,
                fixed=self.fixed,
            )
            logits = model.logits(model(PackedBatch(inputs.token_ids, inputs.positions, attention)))
        if key.kind == "logits":
            return logits
        if key.draws:
            return draw_rows(logits, _draws(given, key), last_tokens=self._last_tokens, rows=rows)
        tokens = argmax_rows(logits)
        self._last_tokens[rows.long()] = tokens
        return tokens

    def _decode_batch(self, embedded: Tensor, seq_lens: Tensor, rows: Tensor, long: bool) -> DecodeBatch:
        from headrace.models.decoder_fast import DecodeBatch

        assert self._workspace is not None
        return DecodeBatch(embedded, seq_lens, rows, self._device_tables, self.caches, self._workspace, long)

    def _compute_mixed(self, given: Tensor, packed: Tensor, key: GraphKey) -> Tensor:
        """Hidden states [T, D]."""
        inputs = begin_step(packed, self._device_tables, self._last_tokens, None, 1.0, self.block_size)
        sizes = [key.seqs + 1, key.seqs, key.seqs, key.seqs]
        query_starts, seq_lens, rows, _ = given[4 * key.tokens :].split(sizes)
        attention = AttentionBatch(
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_tables=self._device_tables[rows.long()],
            slots=inputs.slots,
            caches=self.caches,
            max_query_len=key.tokens,
            max_seq_len=self.max_model_len,
            some_single=key.some_single,
            fresh=key.fresh,
            fixed=self.fixed,
        )
        return self.decoder(PackedBatch(inputs.token_ids, inputs.positions, attention))  # type: ignore[no-any-return]


def _draws(given: Tensor, key: GraphKey) -> Draws:
    """What fill_draws wrote."""
    numbers = given[4 * key.tokens :].split([key.lanes] * 4 + [2 * key.lanes])
    temperature, top_k, top_p, min_p, keys = numbers
    return Draws(
        temperature.view(torch.float32),
        top_k,
        top_p.view(torch.float32),
        min_p.view(torch.float32),
        keys.view(-1, 2),
        *[key.kind == "filtered"] * 3,
    )


def _fast_decoder(model: DecoderModel, max_model_len: int) -> FastDecoder | None:
    """None where it does not cover the model, or there is no Triton."""
    try:
        from headrace.models.decoder_fast import FastDecoder, reason_against
    except ImportError:
        return None
    return FastDecoder(model, max_model_len) if reason_against(model) is None else None
