"""What graphs compute: hidden states, logits or tokens of a step, from the integers that the host sends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.execution.graph_keys import GraphKey
from headrace.kernels.sampling import Draws, draw_rows
from headrace.kernels.step import StepInputs, argmax_rows, begin_step
from headrace.layers.packed import AttentionBatch, LayerCache, PackedBatch
from headrace.models.decoder import DecoderModel

if TYPE_CHECKING:
    from headrace.models.decoder_fast import DecodeBatch, FastDecoder

__all__ = ["StepFunctions", "StepState"]


@dataclass(frozen=True, slots=True)
class StepState:
    """What stays on the device between steps, by row.

    Attributes:
        tables: block tables, int32 [R, blocks].
        last_tokens: int64 [R].
        log: tokens by position of the steps that repeat, int64 [R, REPEATS].
    """

    tables: Tensor
    last_tokens: Tensor
    log: Tensor


class StepFunctions:
    """Functions of one model over one state.

    Attributes:
        fast: takes the place of the model's plain forward in decode steps; None: it does not cover the model.

    Args:
        fast: look for it.
        Others: see Runner.
    """

    def __init__(
        self,
        model: DecoderModel,
        caches: list[LayerCache],
        state: StepState,
        *,
        block_size: int,
        max_model_len: int,
        fast: bool,
        fixed: bool,
    ) -> None:
        self.fast = _fast_decoder(model, max_model_len) if fast and not fixed else None
        self._model, self._caches, self._state = model, caches, state
        self._block_size, self._max_model_len, self._fixed = block_size, max_model_len, fixed
        self._workspace = None if self.fast is None else self.fast.workspace(len(state.log))

    def compute(self, given: Tensor, key: GraphKey) -> Tensor:
        """Hidden states [T, D] of a mixed step; of a decode step tokens int64 [B], or logits float32 [B, V].

        Args:
            given: int32 [key.size], see graph_input.py.
        """
        packed = given[: 4 * key.tokens].view(4, key.tokens)
        return self._mixed(given, packed, key) if key.kind == "mixed" else self._decode(given, packed, key)

    @contextlib.contextmanager
    def shortened(self) -> Iterator[None]:
        """Within, models have their first layers only."""
        fast = self.fast
        layers = [] if fast is None else fast.layers
        try:
            with self._model.shortened() as count:
                if fast is not None:
                    fast.layers = layers[:count]
                yield
        finally:
            if fast is not None:
                fast.layers = layers

    def _decode(self, given: Tensor, packed: Tensor, key: GraphKey) -> Tensor:
        state, model, rows = self._state, self._model, packed[0]
        embedding = None if self.fast is None else model.embed.weight
        inputs = begin_step(
            packed, state.tables, state.last_tokens, embedding, model.embed.scale, self._block_size,
            state.log[: key.tokens],
        )  # fmt: skip
        if self.fast is not None:
            batch = self._decode_batch(inputs, rows, key)
            if key.kind == "tokens":
                return self.fast.tokens(batch, state.last_tokens)
            logits = self.fast.logits(batch)
        else:
            attention = AttentionBatch(
                query_starts=torch.arange(key.seqs + 1, dtype=torch.int32, device=given.device),
                seq_lens=inputs.seq_lens,
                block_tables=state.tables[rows.long()],
                slots=inputs.slots,
                caches=self._caches,
                max_query_len=1,
                max_seq_len=self._max_model_len,
                fixed=self._fixed,
            )
            logits = model.logits(model(PackedBatch(inputs.token_ids, inputs.positions, attention)))
        if key.kind == "logits":
            return logits
        if key.draws:
            return draw_rows(logits, _draws(given, key), last_tokens=state.last_tokens, rows=rows)
        tokens = argmax_rows(logits)
        state.last_tokens[rows.long()] = tokens
        return tokens

    def _decode_batch(self, inputs: StepInputs, rows: Tensor, key: GraphKey) -> DecodeBatch:
        from headrace.models.decoder_fast import DecodeBatch

        assert self._workspace is not None
        return DecodeBatch(
            inputs.embedded,
            inputs.seq_lens,
            rows,
            self._state.tables,
            self._caches,
            self._workspace,
            key.long,
        )

    def _mixed(self, given: Tensor, packed: Tensor, key: GraphKey) -> Tensor:
        state = self._state
        inputs = begin_step(packed, state.tables, state.last_tokens, None, 1.0, self._block_size)
        sizes = [key.seqs + 1, key.seqs, key.seqs, key.seqs]
        query_starts, seq_lens, rows, _ = given[4 * key.tokens :].split(sizes)
        attention = AttentionBatch(
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_tables=state.tables[rows.long()],
            slots=inputs.slots,
            caches=self._caches,
            max_query_len=key.tokens,
            max_seq_len=self._max_model_len,
            some_single=key.some_single,
            fresh=key.fresh,
            fixed=self._fixed,
        )
        return self._model(PackedBatch(inputs.token_ids, inputs.positions, attention))  # type: ignore[no-any-return]


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
