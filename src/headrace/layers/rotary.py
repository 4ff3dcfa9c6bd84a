"""Rotary position embedding (Su et al. 2021) and the ways to stretch it over longer contexts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from headrace.layers.packed import PackedBatch
from headrace.layers.rope_config import RopeConfig, RopeKind

__all__ = ["RopeConfig", "RopeKind", "Rotary"]


class Rotary:
    """cos and sin of a batch's positions, computed once a step in float32 (layout: kernels/rotary)."""

    def __init__(self, config: RopeConfig, device: torch.device | str) -> None:
        self.config = config
        self.frequencies = _FREQUENCIES[config.kind](config).to(device)
        self.long_frequencies: Tensor | None = None
        if config.kind == "longrope":
            self.long_frequencies = (
                (_base_powers(config) * torch.tensor(config.long_factors)).reciprocal().to(device)
            )

    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """cos and sin, each float32 [T, 1, dim]."""
        frequencies = self.frequencies
        if self.config.length_dependent:
            frequencies = self._by_length(_lengths(batch))
        angles = batch.positions.float()[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.config.attention_factor != 1.0:
            cos *= self.config.attention_factor
            sin *= self.config.attention_factor
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)

    def _by_length(self, lengths: Tensor) -> Tensor:
        """Frequencies [T, dim / 2] of tokens in sequences of these lengths [T]."""
        config = self.config
        if self.long_frequencies is not None:
            return torch.where(
                (lengths > config.original_length)[:, None], self.long_frequencies, self.frequencies
            )
        stretch = config.factor * lengths.clamp(min=config.original_length).float() / config.original_length
        theta = config.theta * (stretch - (config.factor - 1)) ** (config.dim / (config.dim - 2))
        exponents = torch.arange(0, config.dim, 2, device=lengths.device).float() / config.dim
        return theta[:, None].pow(exponents).reciprocal()


def _lengths(batch: PackedBatch) -> Tensor:
    """The length that each token's sequence is scaled for, [T]."""
    if batch.rope_lens is not None:
        return batch.rope_lens
    query_lens = batch.attention.query_starts.diff()
    return batch.attention.seq_lens.repeat_interleave(query_lens, output_size=batch.num_tokens)


def _base_powers(config: RopeConfig) -> Tensor:
    """theta ** (2 i / dim), float32 [dim / 2]."""
    return config.theta ** (torch.arange(0, config.dim, 2, device="cpu").float() / config.dim)


def _default(config: RopeConfig) -> Tensor:
    return _base_powers(config).reciprocal()


def _linear(config: RopeConfig) -> Tensor:
    return _default(config) / config.factor


def _llama3(config: RopeConfig) -> Tensor:
    """Wavelengths above original / low are stretched, below original / high kept, between them blended."""
    plain = _default(config)
    turns = config.original_length * plain / (2 * math.pi)  # rotations within the original context
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / config.factor + blend * plain


def _yarn(config: RopeConfig) -> Tensor:
    """Dimensions that turn often keep their frequency, others are interpolated (section 3.2)."""

    def border(rotations: float) -> float:
        length = config.original_length / (rotations * 2 * math.pi)
        return config.dim * math.log(length) / (2 * math.log(config.theta))

    low, high = border(config.beta_fast), border(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(config.dim // 2, device="cpu").float() - low) / width).clamp(0, 1)
    plain = _default(config)
    return plain / config.factor * ramp + plain * (1 - ramp)


def _longrope_short(config: RopeConfig) -> Tensor:
    return (_base_powers(config) * torch.tensor(config.short_factors)).reciprocal()


_FREQUENCIES: dict[str, Callable[[RopeConfig], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope_short,
}
