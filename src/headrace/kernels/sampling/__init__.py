"""From logits to tokens: edits, masks, filters and draws of independent rows, without asking the device anything."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from headrace.kernels.dispatch import kernel

__all__ = ["Draws", "Edits", "Scores", "draw_rows", "edit_rows", "forbid_rows", "score_rows"]


class Edits(NamedTuple):
    """Changes of R rows of logits. Within one row no id occurs twice among the biases, nor in the history.

    Attributes:
        rows: int32 [R].
        bias_starts: int32 [R + 1], into bias_ids int32 [B] and bias float32 [B]; -inf forbids a token.
        history_starts: int32 [R + 1], into history_ids int32 [H] (tokens of prompt and output) and
            history_counts int32 [H] (how often each is in the output).
        penalties: float32 [3, R]: repetition (Keskar et al. 2019), presence and frequency (OpenAI's).
    """

    rows: Tensor
    bias_starts: Tensor
    bias_ids: Tensor
    bias: Tensor
    history_starts: Tensor
    history_ids: Tensor
    history_counts: Tensor
    penalties: Tensor


class Draws(NamedTuple):
    """How a token is drawn from each of P rows.

    Attributes:
        temperature: float32 [P]; 0 takes the most likely token and ignores all that follows.
        top_k: int32 [P]; 0 is off.
        top_p: float32 [P]; 1 is off (Holtzman et al. 2020).
        min_p: float32 [P]; 0 is off (Nguyen et al. 2024).
        keys: int32 [P, 2], of the row's random numbers.
        any_top_k, any_top_p, any_min_p: whether some row uses it, known to the host.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool


class Scores(NamedTuple):
    """Log-probabilities of P rows.

    Attributes:
        own: float32 [P], of the row's token.
        ranks: int64 [P], 1 for the most likely token.
        ids, values: int64 and float32 [P, k], the most likely tokens; among equals always the same ones.
    """

    own: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor


def edit_rows(logits: Tensor, edits: Edits) -> None:
    """Add biases to logits float32 [P, V], then take penalties off, in place."""
    kernel("sampling", "edit_rows", logits.device.type)(logits, edits)


def forbid_rows(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Set what is not allowed to -inf in logits float32 [P, V].

    Args:
        rows: int32 [M].
        bits: int32 [M, ceil(V / 32)], little-endian; a set bit allows its token.
    """
    kernel("sampling", "forbid_rows", logits.device.type)(logits, rows, bits)


def draw_rows(
    logits: Tensor, draws: Draws, *, last_tokens: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """One token for each row of logits float32 [P, V]: temperature, top-k, top-p over what is left, min-p, a race.

    Tokens with equal logits share their fate. The race: token i arrives after E_i / p_i, with E_i exponential and a
    pure function of the row's key and i, and the first wins; that is a draw from p (Maddison et al. 2014).

    Args:
        last_tokens, rows: int64 [R] and int32 [P]; if given, last_tokens[rows] becomes the result, too.

    Returns:
        int64 [P]; -1 where a row holds NaN or infinity, or nothing is allowed.
    """
    run = kernel("sampling", "draw_rows", logits.device.type)
    return run(logits, draws, last_tokens=last_tokens, rows=rows)  # type: ignore[no-any-return]


def score_rows(logits: Tensor, tokens: Tensor, k: int) -> Scores:
    """Log-probability and rank of ``tokens`` int64 [P] (-1: nonsense comes out), and of the k most likely ones.

    Args:
        logits: float32 [P, V].
    """
    return kernel("sampling", "score_rows", logits.device.type)(logits, tokens, k)  # type: ignore[no-any-return]
