"""What a rotary embedding is made of: plain data, so that planning reads configurations without torch."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["RopeConfig", "RopeKind"]

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A rotary embedding, completely resolved.

    Attributes:
        dim: rotated dimensions of each head, from the first.
        theta: base of the frequencies.
        kind: ``linear`` divides positions; ``dynamic`` raises theta with the sequence's length (NTK-aware);
            ``llama3`` scales long wavelengths; ``yarn``: Peng et al. 2023; ``longrope``: Ding et al. 2024.
        factor: of the stretch.
        original_length: context before stretching; for ``dynamic`` the length from which it starts.
        attention_factor: multiplies cos and sin.
        low_freq_factor, high_freq_factor: llama3's borders, in wavelengths per original length.
        beta_fast, beta_slow, truncate: yarn's borders, in rotations per original length.
        short_factors, long_factors: longrope's divisor of each frequency, up to and beyond original_length.
    """

    dim: int
    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def length_dependent(self) -> bool:
        """Frequencies change when a sequence is longer than ``original_length``."""
        return self.kind in ("dynamic", "longrope")
