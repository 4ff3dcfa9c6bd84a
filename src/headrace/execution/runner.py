"""One device, one forward: a StepPlan becomes a packed batch, hidden states, logits and tokens.

`prepare` is host work; `run` and `sample` only launch; `Step.result` waits. What stays on the device between
steps is the KV cache and, by row, the last sampled token: the next step can start before the host has seen it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.config.plan.scratch import PROMPT_ROWS
from headrace.execution.sampler import HostScores, Masks, Sampled, Sampler
from headrace.execution.threads import ThreadGovernor
from headrace.layers.packed import AttentionBatch, LayerCache, PackedBatch
from headrace.scheduling.plan import Chunk, StepPlan
from headrace.scheduling.sequence import Sequence
from headrace.types import TokenLogprobs

__all__ = ["CausalModel", "Runner", "Step", "StepResult"]


class CausalModel(Protocol):
    """What the runner needs from a model."""

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, D]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [P, V] of hidden states [P, D]."""
        ...


@dataclass(slots=True)
class StepResult:
    """What the host learns from a step.

    Attributes:
        tokens: one for each sampling chunk in order, once for each time that the step ran; -1 where the logits were
            not finite.
        logprobs: by index of the sampling chunk, for those that asked.
        prompt_logprobs: by request id: the first position computed in this step, and its and its followers'
            entries. Position i speaks of prompt token i + 1.
        device_ms: milliseconds that the device took, where that is measured.
    """

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    device_ms: float | None = None


@dataclass(slots=True)
class Step:
    """A step on its way through the device."""

    plan: StepPlan
    chunks: list[Chunk]
    batch: PackedBatch | None  # None: a captured step (graphs.py)
    last: Tensor | None = None  # int64 [P] positions to sample; None: all of them, or none
    unseen: tuple[Tensor, Tensor] | None = None  # positions whose token only the device knows, and their rows
    logits: Tensor | None = None
    prompt_scores: list[_PromptScores] = field(default_factory=list)
    sampled: Sampled | None = None
    host_tokens: Tensor | None = None
    done: torch.cuda.Event | None = None

    def result(self) -> StepResult:
        """Wait for the device."""
        if self.done is not None:
            self.done.synchronize()
        result = StepResult(self._tokens())
        if self.sampled is not None and self.sampled.scores is not None:
            rows = self.sampled.scored
            entries = self.sampled.scores.read([result.tokens[row] for row in rows])
            result.logprobs = {row: entry for row, entry in zip(rows, entries) if entry.token_id >= 0}
        for prompt in self.prompt_scores:
            read = [entry for targets, scores in prompt.parts for entry in scores.read(targets)]
            result.prompt_logprobs[prompt.request_id] = (prompt.start, read)
        return result

    def _tokens(self) -> list[int]:
        return [] if self.host_tokens is None else self.host_tokens.tolist()


@dataclass(slots=True)
class _PromptScores:
    """Log-probabilities of prompt tokens after ``start``: some tokens and their scores at a time."""

    request_id: str
    start: int
    parts: list[tuple[list[int], HostScores]]


class Runner:
    """Runs a causal model over its paged cache.

    Attributes:
        threads: chooses the CPU threads of each step; None: they stay as they are.
        prompt_rows: prompt positions whose logits are made at once.

    Args:
        model: see CausalModel.
        caches: one LayerCache a layer.
        block_size: tokens of one block.
        max_num_seqs: rows of per-sequence state.
        max_model_len: tokens of the longest sequence.
        rope_by_length: the model's rotary embedding depends on a sequence's (prompt) length.
        fixed: attention sums every row in the same order, whatever the batch (see FixedLinear for the rest).
    """

    def __init__(
        self,
        model: CausalModel,
        caches: list[LayerCache],
        *,
        device: torch.device,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        rope_by_length: bool = False,
        fixed: bool = False,
    ) -> None:
        self.model = model
        self.fixed = fixed
        self.threads: ThreadGovernor | None = None
        self.prompt_rows = PROMPT_ROWS
        self.rope_by_length = rope_by_length
        self.caches = caches
        self.device = device
        self.block_size = block_size
        self.sampler = Sampler(max_num_seqs, device)
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_blocks = [0] * max_num_seqs  # that the tables hold, by row
        self._changed: list[tuple[int, int]] = []  # rows that the last step gave blocks to, and what they had
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def prepare_next(self) -> bool:
        """Called in moments without work: do a little of what would make a later step wait; true if more is left."""
        return False

    def most_repeats(self, plan: StepPlan) -> int:
        """How often in a row a step may run without the host."""
        return 1

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> Step:
        """Pack the plan. All that is read of its sequences is read here, so that they may change afterwards."""
        for sequence in plan.admitted:
            self.sampler.admit(sequence)
            self._num_blocks[sequence.row] = 0
        chunks = plan.sampling
        every = len(chunks) == plan.num_tokens
        last = None if every or not chunks else self._last(plan)
        return Step(plan, chunks, self._pack(plan), last, self._unseen(plan))

    @torch.inference_mode()
    def run(self, step: Step) -> Step:
        """Launch the model."""
        hidden = self._hidden(step)
        step.prompt_scores = self._score_prompts(step.plan, hidden)
        if step.chunks:
            step.logits = self.model.logits(hidden if step.last is None else hidden[step.last])
        return step

    def _hidden(self, step: Step) -> Tensor:
        """Hidden states [T, D] of the step's tokens."""
        batch = step.batch
        assert batch is not None
        if self.threads is not None:
            self.threads.adjust()
        if step.unseen is not None:
            at, rows = step.unseen
            # A row whose logits were not finite has -1; it ends when the host sees that.
            batch.token_ids[at] = self._last_tokens[rows].clamp(min=0)
        return self.model(batch)

    @torch.inference_mode()
    def sample(self, step: Step, masks: Masks | None = None) -> Step:
        """Launch sampling and the copy of what the host must know."""
        if step.logits is not None:
            step.sampled = self.sampler.sample(step.logits, step.chunks, masks, self._last_tokens)
            step.logits = None
        self._send(step)
        return step

    def _send(self, step: Step) -> None:
        """Copy the tokens to the host."""
        if step.sampled is not None:
            step.host_tokens = step.sampled.tokens.to(
                "cpu", non_blocking=True
            )  # pinned, so this does not wait
        if self.device.type == "cuda":
            step.done = torch.cuda.Event(enable_timing=True)
            step.done.record()

    # --- packing ---------------------------------------------------------------------------------

    def _pack(self, plan: StepPlan) -> PackedBatch:
        chunks = plan.chunks
        num = len(chunks)
        rows = np.fromiter((c.row for c in chunks), np.int64, num)
        starts = np.fromiter((c.start for c in chunks), np.int64, num)
        counts = np.fromiter((c.count for c in chunks), np.int64, num)
        self._update_tables(chunks)
        query_starts = np.zeros(num + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        ends = starts + counts
        decode = plan.num_tokens == num
        positions = starts if decode else _ranges(starts, counts, query_starts)
        token_rows = rows if decode else np.repeat(rows, counts)
        tables = self._tables
        blocks = tables[token_rows, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        max_seq_len = int(ends.max())
        width = -(-max_seq_len // self.block_size)
        host = self.device.type == "cpu"
        attention = AttentionBatch(
            query_starts=self._upload(query_starts),
            seq_lens=self._upload(ends.astype(np.int32)),
            block_tables=self._upload(tables[rows, :width]),
            slots=self._upload(slots),
            caches=self.caches,
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
            some_single=bool((counts == 1).any()),
            fresh=not starts[counts > 1].any(),
            fixed=self.fixed,
            host_query_lens=counts.tolist() if host else None,
            host_seq_lens=ends.tolist() if host else None,
            host_blocks=[list(c.sequence.table.blocks) for c in chunks] if host else None,
        )
        batch = PackedBatch(self._token_ids(plan), self._upload(positions), attention)
        if self.rope_by_length:
            prompts = np.fromiter((c.sequence.num_prompt for c in chunks), np.int64, num)
            batch.rope_lens = self._upload(np.repeat(prompts, counts))
        return batch

    def _token_ids(self, plan: StepPlan) -> Tensor:
        """int64 [T]; 0 where only the device knows the token."""
        flat: list[int] = []
        for chunk in plan.chunks:
            flat.extend(chunk.sequence.token_ids[chunk.start : chunk.start + chunk.count])
            if chunk.from_device:
                flat.append(0)
        return self._upload(np.asarray(flat, np.int64))

    def _unseen(self, plan: StepPlan) -> tuple[Tensor, Tensor] | None:
        ends = np.cumsum([chunk.count for chunk in plan.chunks]) - 1
        which = [i for i, chunk in enumerate(plan.chunks) if chunk.from_device]
        if not which:
            return None
        rows = np.asarray([plan.chunks[i].row for i in which], np.int64)
        return self._upload(ends[which]), self._upload(rows)

    def _update_tables(self, chunks: list[Chunk]) -> None:
        """Write the blocks that a sequence got since its last step."""
        self._changed = []
        for chunk in chunks:
            row, blocks = chunk.row, chunk.sequence.table.blocks
            have = self._num_blocks[row]
            if have != len(blocks):
                self._tables[row, have : len(blocks)] = blocks[have:]
                self._num_blocks[row] = len(blocks)
                self._changed.append((row, have))

    def _last(self, plan: StepPlan) -> Tensor:
        """Positions in the batch whose logits are sampled, int64 [P]."""
        ends = np.cumsum([chunk.count for chunk in plan.chunks]) - 1
        return self._upload(ends[[chunk.samples for chunk in plan.chunks]])

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    # --- prompt log-probabilities ----------------------------------------------------------------

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> list[_PromptScores]:
        """Log-probabilities of the prompt tokens that follow each position of this step."""
        found = []
        at = 0
        for chunk in plan.chunks:
            k = chunk.sequence.sampling.prompt_logprobs
            count = min(chunk.count, chunk.sequence.num_prompt - 1 - chunk.start)
            if k is not None and count > 0:
                parts = self._score(hidden[at : at + count], chunk.sequence, chunk.start + 1, k)
                found.append(_PromptScores(chunk.sequence.id, chunk.start, parts))
            at += chunk.count
        return found

    def _score(
        self, hidden: Tensor, sequence: Sequence, first: int, k: int
    ) -> list[tuple[list[int], HostScores]]:
        """Scores of the tokens from ``first`` on, those that hidden states [N, D] precede."""
        parts = []
        for at in range(0, hidden.shape[0], self.prompt_rows):
            rows = hidden[at : at + self.prompt_rows]
            targets = sequence.token_ids[first + at : first + at + len(rows)]
            parts.append((targets, self.sampler.score(self.model.logits(rows), targets, k)))
        return parts


def _ranges(starts: np.ndarray, counts: np.ndarray, query_starts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each chunk, one after another."""
    steps = np.arange(query_starts[-1], dtype=np.int64)
    positions: np.ndarray = steps + np.repeat(starts - query_starts[:-1], counts)
    return positions
