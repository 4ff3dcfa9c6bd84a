"""Steps as CUDA graphs: one launch a step, captured at ladders of sizes when first needed.

All that a step needs from the host is four integers a token and three a sequence, in one copy; block tables and
last tokens stay on the device by row. In a decode step every sequence has one new token and samples: the graph runs
from there to tokens, or to logits where some row wants more than a draw. A mixed step's graph runs to hidden states.
Longer steps take the Runner's plain way, which is also the specification of these.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.execution.capture import GraphKeeper, borrowed
from headrace.execution.graph_functions import StepFunctions, StepState
from headrace.execution.graph_input import REPEATS, StepArrays, draws_size, fill, fill_draws
from headrace.execution.graph_keys import MIXED_TOKENS, GraphKey, GraphLadders, up
from headrace.execution.runner import Runner, Step, StepResult
from headrace.execution.sampler import Masks, Sampled, race_keys
from headrace.layers.packed import LayerCache, PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.scheduling.plan import StepPlan

__all__ = ["GraphRunner", "GraphStep"]

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


class GraphRunner(Runner, GraphKeeper[GraphKey, _Graph]):
    """A Runner whose steps are graphs; on a CPU the functions run that a GPU captures.

    Attributes:
        ladders: the graphs that there can be.
        functions: what they compute.

    Args:
        model: a DecoderModel without length-dependent rotary embeddings.
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
        # One more row, for padding: its table is the null block.
        self._padding = max_num_seqs
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        width = self._tables.shape[1]
        self._device_tables = torch.zeros(max_num_seqs + 1, width, dtype=torch.int32, device=device)
        self._log = torch.zeros(max_num_seqs, REPEATS, dtype=torch.int64, device=device)
        GraphKeeper.__init__(self, device)
        self.functions = StepFunctions(
            model,
            caches,
            StepState(self._device_tables, self._last_tokens, self._log),
            block_size=block_size,
            max_model_len=max_model_len,
            fast=fast,
            fixed=fixed,
        )
        config = model.config
        cuts = None if self.functions.fast is None else (config.num_kv_heads, config.head_dim)
        self.ladders = GraphLadders(max_num_seqs, max_model_len, cuts, fixed=fixed)
        self._ahead: deque[GraphKey] = deque()
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
            longest = int(arrays.starts.max()) + plan.repeats
            key = self.ladders.decode(len(chunks), longest, self._decode_kind(arrays.rows))
        else:
            key = self.ladders.mixed(plan)
        return self._stage(GraphStep(plan, chunks, None, key=key), arrays)

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
        if self.device.type == "cuda":
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

    def warm_up(self, sizes: list[int]) -> None:
        """Capture the graphs of greedy decode steps of these batch sizes now, for sequences of any length."""
        with torch.inference_mode():
            for size in sorted({up(self.ladders.decode_sizes, size) for size in sizes}, reverse=True):
                for key in self.ladders.of_decode(size, "tokens"):
                    self._graph(key)

    def foresee(self, tokens: int) -> None:
        """Have `prepare_next` make the graphs that traffic is likely to need, one by one."""
        self._ahead = deque(self.ladders.likely(tokens))

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

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """As ever, over the first layers only."""
        with super().rehearsing(), self.functions.shortened():
            yield

    def _make(self, key: GraphKey) -> _Graph:
        # All padding: what runs before the first replay touches the null block only.
        given = torch.zeros(key.size, dtype=torch.int32, device=self.device)
        packed = given[: 4 * key.tokens].view(4, key.tokens)
        packed[0], packed[3] = self._padding, -1
        if key.kind == "mixed":
            given[4 * key.tokens + 2 * key.seqs + 1 : -key.seqs] = self._padding
        output: list[Tensor] = []

        def work() -> None:
            output.clear()
            output[:] = [self.functions.compute(given, key)]

        if self._memory is None:
            return _Graph(given, work, output)
        replay = self._memory.capture(work)
        output[:] = [borrowed(result) for result in output]
        return _Graph(given, replay, output)
