"""What stands on top of the hidden states in one pass: classifiers, sparse weights, token vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headrace.kernels.dense.reference import activated
from headrace.layers.dense import Dense
from headrace.layers.norm import LayerNorm
from headrace.layers.packed import AttentionBatch
from headrace.layers.pooling import pool

__all__ = ["Activation", "Chain", "Projection", "SequenceHead", "SpladeHead", "UnitLength", "lexical_weights"]

_LOGIT_ELEMENTS = 1 << 25  # of a masked-LM head's logits held at once


class Activation(nn.Module):
    """One of ``identity``, ``tanh``, ``gelu``, ``gelu_tanh``, ``relu``, ``silu`` and ``sigmoid``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "sigmoid":
            return torch.sigmoid(x)
        return x if self.name == "identity" else activated(x, self.name)


class Chain(nn.Sequential):
    """Linear maps, activations and norms one after another: [N, D] -> [N, C]."""

    def __init__(self, *steps: Dense | Activation | LayerNorm | Projection) -> None:
        super().__init__(*steps)


class Projection(nn.Module):
    """A sentence-transformers Dense module, with its optional residual connection."""

    def __init__(self, linear: Dense, activation: str, residual: Dense | None, add_input: bool) -> None:
        super().__init__()
        self.linear, self.activation = linear, Activation(activation)
        self.residual, self.add_input = residual, add_input

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        out: Tensor = self.activation(self.linear(x))
        if self.add_input:
            out = out + (x if self.residual is None else self.residual(x))
        return out


class UnitLength(nn.Module):
    """L2 normalization between other modules."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return nn.functional.normalize(x, dim=-1)


class SequenceHead(nn.Module):
    """Logits of a whole sequence.

    Args:
        pooling: how token vectors become one; ``late_mean`` averages the logits of all tokens (EuroBERT),
            ``last_real`` takes the last token that is no padding (causal models).
    """

    def __init__(self, pooling: str, chain: Chain) -> None:
        super().__init__()
        self.pooling, self.chain = pooling, chain

    def forward(self, hidden: Tensor, batch: AttentionBatch, last: Tensor) -> Tensor:
        """hidden [T, D] -> float32 [S, C]. ``last``: int64 [S], the row that ``last_real`` takes."""
        if self.pooling == "last_real":
            return self.chain(hidden[last]).float()  # type: ignore[no-any-return]
        if self.pooling == "late_mean":
            return pool(self.chain(hidden), batch, "mean")
        pooled = pool(hidden, batch, self.pooling).to(hidden.dtype)
        return self.chain(pooled).float()  # type: ignore[no-any-return]


class SpladeHead(nn.Module):
    """Vocabulary weights of a sequence from a masked language model (Formal et al. 2021, 2022).

    Args:
        chain: hidden states to vocabulary logits.
        reduction: over tokens, ``max`` or ``sum``.
        activation: ``relu``: log(1 + relu(x)); ``log1p_relu``: the logarithm twice (Geng et al. 2025).
    """

    def __init__(self, chain: Chain, vocab_size: int, reduction: str, activation: str) -> None:
        super().__init__()
        assert reduction in ("max", "sum")
        assert activation in ("relu", "log1p_relu")
        self.chain, self.vocab_size = chain, vocab_size
        self.reduction, self.twice = reduction, activation == "log1p_relu"

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """hidden [T, D] of sequences of these lengths -> float32 [S, V]."""
        out = torch.zeros(len(lengths), self.vocab_size, device=hidden.device)
        step = max(1, _LOGIT_ELEMENTS // self.vocab_size)
        row = 0
        for i, length in enumerate(lengths):
            for first in range(row, row + length, step):
                logits = self.chain(hidden[first : min(first + step, row + length)]).float()
                if self.reduction == "max":
                    torch.maximum(out[i], logits.amax(0), out=out[i])
                else:
                    out[i] += self._weigh(logits).sum(0)
            row += length
        return self._weigh(out) if self.reduction == "max" else out

    def _weigh(self, logits: Tensor) -> Tensor:
        weights = logits.relu().log1p()
        return weights.log1p() if self.twice else weights


def lexical_weights(weights: Tensor, token_ids: Tensor, unused: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Largest weight of each token id of one sequence (BGE-M3, Chen et al. 2024).

    Args:
        weights: float32 [n], not negative; token_ids: int64 [n]; unused: ids left out (special tokens).
    Returns:
        ids int64 [k], ascending, and their weights [k], all above zero.
    """
    ids, place = token_ids.unique(return_inverse=True)
    best = torch.zeros(ids.shape[0], device=weights.device).scatter_reduce_(0, place, weights, "amax")
    keep = best > 0
    for id in unused:
        keep &= ids != id
    return ids[keep], best[keep]
