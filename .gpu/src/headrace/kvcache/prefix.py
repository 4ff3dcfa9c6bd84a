"""Chain hashes: the name of a full block is everything that its content depends on.

    name(block i) = H(name(block i - 1), token ids of block i),  name(-1) = H(model, adapter, cache dtype, salt, ...)

128 bits of BLAKE2b: two different prefixes never meet by chance, and tenants cannot construct a collision cheaply.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

__all__ = ["block_hash", "root_hash"]

_SIZE = 16


def root_hash(*parts: str) -> bytes:
    """The name before the first block: model fingerprint, adapter, cache dtype, tenant salt, media digests."""
    digest = blake2b(digest_size=_SIZE)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of the full block that holds ``token_ids`` after ``parent``."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=_SIZE).digest()
