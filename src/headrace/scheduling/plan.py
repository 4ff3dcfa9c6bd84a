"""What one step will do: the only thing that the scheduler tells the runner."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.scheduling.sequence import Sequence

__all__ = ["Chunk", "StepPlan"]


@dataclass(slots=True)
class Chunk:
    """Tokens ``start .. start + count`` of one sequence.

    Attributes:
        samples: the chunk reaches the sequence's end, so its last position yields a token.
        from_device: the last token is one that only the device knows yet.
        row, epoch: the sequence's own at planning; it may be preempted before the device gets here.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    from_device: bool
    row: int
    epoch: int


@dataclass(slots=True)
class StepPlan:
    """One packed batch.

    Attributes:
        chunks: in batch order: one-token chunks first, then longer ones.
        admitted: sequences that got a row in this step; the runner sets their state up.
        num_tokens: sum of the chunks' counts.
        repeats: how often the step runs, each time on the token that every chunk got the time before.
    """

    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    repeats: int = 1

    @property
    def sampling(self) -> list[Chunk]:
        """Chunks that yield a token, in batch order."""
        return [chunk for chunk in self.chunks if chunk.samples]

    @property
    def needs_history(self) -> bool:
        """Sampling must wait until the host has seen the previous step's tokens."""
        return any(chunk.samples and chunk.sequence.needs_history for chunk in self.chunks)

    @property
    def needs_output(self) -> bool:
        """Sampling itself looks at the previous step's tokens, not only the grammars do."""
        return any(chunk.samples and chunk.sequence.looks_back for chunk in self.chunks)
