"""Both ends of a decode step in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.step import StepInputs

__all__ = ["argmax_rows", "begin_step"]


def begin_step(
    packed: Tensor,
    tables: Tensor,
    last_tokens: Tensor,
    embedding: Tensor | None,
    scale: float,
    block_size: int,
    log: Tensor | None = None,
) -> StepInputs:
    rows, positions, tokens, blocks = packed.long()
    own, following = blocks >= 0, blocks < -1
    tables[rows[own], positions[own] // block_size] = blocks[own].int()
    tables[rows[following], positions[following] // block_size + 1] = -2 - blocks[following].int()
    tokens = torch.where(tokens >= 0, tokens, last_tokens[rows])
    if log is not None:
        log[torch.arange(len(tokens), device=log.device), positions % log.shape[1]] = tokens
    packed[1] += 1
    packed[2:] = -1
    tokens = tokens.clamp(min=0)
    slots = tables[rows, positions // block_size].long() * block_size + positions % block_size
    embedded = packed.new_empty(len(tokens), 0) if embedding is None else embedding[tokens]
    if scale != 1.0:
        embedded = embedded * scale
    return StepInputs(embedded, tokens, positions, slots, (positions + 1).int())


def argmax_rows(logits: Tensor) -> Tensor:
    values, tokens = logits.max(dim=-1)
    return torch.where(torch.isfinite(values), tokens, -1)
