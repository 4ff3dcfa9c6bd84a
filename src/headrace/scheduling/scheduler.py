"""Who runs next: plain Python over plain data, so that a whole trace replays in a CPU test.

There is no prefill phase and no decode phase. Each running sequence catches up with its own token count; what
is left of the step's token budget goes to those that wait. When blocks run out the last in order gives its own
back and computes them again later.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable

from headrace.errors import ContextLengthExceeded, InvalidRequest
from headrace.kvcache.blocks import AccountError, BlockPool
from headrace.kvcache.prefix import root_hash
from headrace.kvcache.table import BlockTable
from headrace.scheduling.plan import Chunk, StepPlan
from headrace.scheduling.sequence import Sequence, Status
from headrace.types import FinishReason, Request

__all__ = ["Scheduler"]

_WATERMARK = 0.01  # share of blocks left to running sequences when a new one is let in


class Scheduler:
    """Queues, budget and blocks of one core.

    Attributes:
        is_ready: asked before a sequence runs in a step (its grammar may still be compiling, or its mask be made).

    Args:
        pool: the KV blocks.
        block_size: tokens of one block.
        max_num_seqs: sequences in one step.
        max_num_batched_tokens: tokens in one step; longer prompts are computed in chunks.
        max_model_len: tokens of one sequence, prompt and output together.
        eos_ids: tokens that end a sequence unless it ignores them.
        fingerprint: what cached keys depend on besides tokens (model, dtype, ...).
        prefix_caching: look new prompts up in the prefix index.
        reserve: let a sequence in only when all running ones can reach their limits, so that none is preempted.
        prefix_regime: from a prompt's length to whatever else its keys depend on (length-dependent rope).
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_ids: Iterable[int] = (),
        fingerprint: str = "",
        prefix_caching: bool = True,
        reserve: bool = False,
        prefix_regime: Callable[[int], str] = lambda _: "",
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = min(max_model_len, pool.num_usable * block_size)
        self.eos_ids = frozenset(eos_ids)
        self.fingerprint = fingerprint
        self.prefix_caching = prefix_caching
        self.reserve = reserve
        self.prefix_regime = prefix_regime
        self.is_ready: Callable[[Sequence], bool] = lambda _: True
        self.sequences: dict[str, Sequence] = {}
        self.running: list[Sequence] = []
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._arrivals = 0
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    # --- requests in and out ---------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises InvalidRequest for what can never run; nothing is kept then."""
        if request.sampling is None:
            raise InvalidRequest(f"request {request.id!r} has no sampling parameters", param="sampling")
        if request.id in self.sequences:
            raise InvalidRequest(f"request id {request.id!r} is already live; ids must be unique", param="id")
        if not request.token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        num_prompt = len(request.token_ids)
        if num_prompt >= self.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens; this model serves {self.max_model_len} tokens of prompt and "
                "output together, so shorten the prompt or start the server with a larger max_model_len",
                param="prompt",
            )
        limit = self.max_model_len
        if request.sampling.max_tokens is not None:
            limit = min(limit, num_prompt + request.sampling.max_tokens)
        root = root_hash(
            self.fingerprint, request.adapter, request.cache_salt, self.prefix_regime(num_prompt)
        )
        sequence = Sequence(
            request,
            BlockTable(self.pool, self.block_size, root),
            arrival=self._arrivals,
            limit=limit,
            eos_ids=self.eos_ids,
        )
        self._arrivals += 1
        self.sequences[request.id] = sequence
        self._enqueue(sequence)
        return sequence

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence now: its blocks and its row are free for the next step.

        A step in flight may still write to them; that is harmless, since steps run on the device in order.
        """
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._rows.append(sequence.row)
        sequence.table.release()
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        del self.sequences[sequence.id]

    def abort(self, request_id: str) -> Sequence | None:
        """End a request whose client left; None when it is not live."""
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence, FinishReason.ABORT)
        return sequence

    @property
    def num_waiting(self) -> int:
        """Sequences without a row."""
        return len(self.sequences) - len(self.running)

    # --- one step --------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run."""
        plan = StepPlan()
        short, long = self._behind()
        preempted = False
        for sequence in (*short, *long):
            if sequence.status is not Status.RUNNING or plan.num_tokens >= self.max_num_batched_tokens:
                continue
            if not self.is_ready(sequence):
                continue
            count = sequence.length - sequence.num_computed
            if sequence.num_computed + count > len(sequence.table.blocks) * self.block_size:
                preempted |= not self._make_room(sequence, plan)
            if sequence.status is Status.RUNNING:
                self._take(plan, sequence, count)
        if not preempted:
            self._admit(plan)
        if plan.num_tokens > len(plan.chunks):  # some are longer: lone tokens go first, whoever came last
            plan.chunks.sort(key=lambda chunk: chunk.count > 1)
        return plan if plan.chunks else None

    def _behind(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that lack the keys of one token, and of more.

        Not those whose tokens in flight already reach the limit: another step would be thrown away.
        """
        short, long = [], []
        for sequence in self.running:
            length = len(sequence.token_ids) + sequence.in_flight
            missing = length - sequence.num_computed
            if missing > 1:
                long.append(sequence)
            elif missing == 1 and length < sequence.limit:
                short.append(sequence)
        return short, long

    def repeat(self, plan: StepPlan, times: int) -> None:
        """Let a step in which everybody gets one token run so many times, if nobody can notice.

        Less often where a sequence reaches its limit; once while somebody waits, or without blocks for all.
        """
        sequences = [chunk.sequence for chunk in plan.chunks]
        alone = plan.num_tokens == len(plan.sampling) == len(self.running) == len(self.sequences)
        if not alone or plan.admitted:
            return
        more = min(times - 1, *(s.limit - s.length for s in sequences))
        needed = sum(s.table.blocks_needed(s.num_computed + more) for s in sequences)
        if more < 1 or needed > self.pool.num_available:
            return
        plan.repeats += more
        for sequence in sequences:
            sequence.table.grow(sequence.num_computed + more)
            sequence.num_computed += more
            sequence.in_flight += more

    def settle(
        self, plan: StepPlan, tokens: list[int], on_token: Callable[[Sequence], None] | None = None
    ) -> list[Sequence]:
        """Take a finished step's tokens, one for each sampling chunk in order, once for each time that it ran.

        Returns the sequences that got tokens. Those with a finish_reason have ended and own nothing any more;
        those that ended before (aborted while the step ran) are left out. A token of -1 marks a sequence whose
        logits were not finite: it ends with ERROR. ``on_token`` may end a sequence by giving it a finish_reason.
        """
        advanced: list[Sequence] = []
        num = len(tokens) // plan.repeats
        at = 0
        for chunk in plan.chunks:
            sequence = chunk.sequence
            own = tokens[at::num] if chunk.samples else []
            at += chunk.samples
            if sequence.status is Status.FINISHED:
                continue
            if chunk.samples:
                sequence.in_flight -= plan.repeats
                advanced.append(sequence)
                self._append(sequence, own, on_token)
            if sequence.status is Status.RUNNING and sequence.epoch == chunk.epoch and self.prefix_caching:
                sequence.table.publish(sequence.token_ids, chunk.start + chunk.count + plan.repeats - 1)
            if sequence.finish_reason is not None:
                self._end(sequence)
        return advanced

    def _append(
        self, sequence: Sequence, tokens: list[int], on_token: Callable[[Sequence], None] | None
    ) -> None:
        """Sampled tokens, up to the one that ends the sequence."""
        for token in tokens:
            if token < 0:
                self.finish(sequence, FinishReason.ERROR)
                return
            sequence.append(token)
            if on_token is not None:
                on_token(sequence)
            if sequence.finish_reason is not None:
                return

    def fail(self, plan: StepPlan) -> list[Sequence]:
        """A step broke: its sequences end with ERROR, all others go on. Returns those that ended."""
        failed = [chunk.sequence for chunk in plan.chunks if chunk.sequence.status is not Status.FINISHED]
        for sequence in failed:
            self.finish(sequence, FinishReason.ERROR)
        return failed

    def expire(self, now: float | None = None) -> list[Sequence]:
        """End sequences whose deadline passed (monotonic seconds)."""
        now = time.monotonic() if now is None else now
        late = [
            s for s in self.sequences.values() if s.request.deadline is not None and s.request.deadline < now
        ]
        for sequence in late:
            self.finish(sequence, FinishReason.ABORT)
        return late

    def check(self) -> None:
        """Balance the books. On a violation everything is rebuilt from the owners, then AccountError is raised."""
        owners = {name: sequence.table.blocks for name, sequence in self.sequences.items()}
        try:
            self.pool.check(owners)
        except AccountError:
            self.pool.repair(owners.values())
            raise

    # --- inside a step ---------------------------------------------------------------------------

    def _take(self, plan: StepPlan, sequence: Sequence, missing: int) -> None:
        """``missing``: tokens without keys."""
        start, count = sequence.num_computed, min(missing, self.max_num_batched_tokens - plan.num_tokens)
        end, samples = start + count, count == missing
        from_device = end > len(sequence.token_ids)
        plan.chunks.append(Chunk(sequence, start, count, samples, from_device, sequence.row, sequence.epoch))
        sequence.num_computed = end
        sequence.in_flight += samples
        plan.num_tokens += count

    def _make_room(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Blocks for the sequence's next chunk, taken from the last in order if need be.

        Returns False when somebody was preempted (perhaps the sequence itself).
        """
        count = min(sequence.length - sequence.num_computed, self.max_num_batched_tokens - plan.num_tokens)
        untouched = True
        while not sequence.table.grow(sequence.num_computed + count):
            untouched = False
            planned = {id(chunk.sequence) for chunk in plan.chunks}
            victim = max((s for s in self.running if id(s) not in planned), key=lambda s: s.order)
            self._preempt(victim)
            if victim is sequence:
                break
        return untouched

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue; its keys are computed again (or found in the prefix index)."""
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        sequence.epoch += 1
        sequence.table.release()
        self.num_preemptions += 1
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _admit(self, plan: StepPlan) -> None:
        held: list[Sequence] = []
        while self._waiting and self._rows and plan.num_tokens < self.max_num_batched_tokens:
            sequence = self._waiting[0][1]
            if sequence.status is not Status.WAITING:  # aborted while it waited
                heapq.heappop(self._waiting)
            elif sequence.in_flight or not self.is_ready(sequence):
                heapq.heappop(self._waiting)
                held.append(sequence)
            elif self._start(sequence, plan):
                heapq.heappop(self._waiting)
            else:
                break
        for sequence in held:
            self._enqueue(sequence)

    def _start(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Give a waiting sequence a row and blocks for all its tokens; False when they are not to be had."""
        table = sequence.table
        cached = 0
        if self.prefix_caching and sequence.sampling.prompt_logprobs is None:
            cached = table.match(sequence.token_ids)
        if self.reserve:
            needed = sum(s.table.blocks_needed(s.limit - 1) for s in (*self.running, sequence))
        else:
            spare = int(self.pool.num_usable * _WATERMARK) if self.running else 0
            needed = table.blocks_needed(len(sequence.token_ids)) + spare
        if needed > self.pool.num_available or not table.grow(len(sequence.token_ids)):
            table.release()
            return False
        if sequence.num_cached < 0:
            sequence.num_cached = min(cached, sequence.num_prompt)
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_cached
        sequence.num_computed = cached
        sequence.row = self._rows.pop()
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        plan.admitted.append(sequence)
        self._take(plan, sequence, len(sequence.token_ids) - cached)
        return True

    def _end(self, sequence: Sequence) -> None:
        reason = sequence.finish_reason
        assert reason is not None
        if sequence.status is Status.WAITING:
            # Preempted with its last token in flight: nothing is left to compute again.
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
        self.finish(sequence, reason)
