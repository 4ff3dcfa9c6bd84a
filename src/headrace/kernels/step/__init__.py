"""The two ends of a decode step: from what the host says to embeddings, and from logits to tokens by row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = ["StepInputs", "argmax_rows", "begin_step"]


class StepInputs(NamedTuple):
    """What a step of B tokens reads, made on the device.

    Attributes:
        embedded: [B, D] rows of the embedding table, times its scale.
        token_ids, positions, slots: int64 [B].
        seq_lens: int32 [B], keys including the new one.
    """

    embedded: Tensor
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor


def begin_step(
    packed: Tensor,
    tables: Tensor,
    last_tokens: Tensor,
    embedding: Tensor | None,
    scale: float,
    block_size: int,
    log: Tensor | None = None,
) -> StepInputs:
    """Unpack a step, keep the block tables up to date, and look the tokens up.

    Args:
        packed: int32 [4, B]: row, position, token (-1: the row's last sampled one), new block: that of this position,
            or -2 - block for the one after it, or -1 for none. Moved on to the step after this one: next positions,
            tokens that were sampled, no new blocks.
        tables: int32 [rows, W], block tables by row; new blocks are written to their places.
        last_tokens: int64 [rows]; a negative one (the row has failed) counts as 0.
        embedding: [V, D]; None: nothing is looked up, and ``embedded`` is [B, 0].
        log: int64 [B, L], gets the tokens (the negative ones too) at their position modulo L.
    """
    run = kernel("step", "begin_step", packed.device.type)
    return run(packed, tables, last_tokens, embedding, scale, block_size, log)  # type: ignore[no-any-return]


def argmax_rows(logits: Tensor) -> Tensor:
    """int64 [P] of logits [P, V]: the lowest index of the largest; -1 where a row holds NaN or infinity."""
    return kernel("step", "argmax_rows", logits.device.type)(logits)  # type: ignore[no-any-return]
