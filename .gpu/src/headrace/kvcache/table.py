"""The blocks of one sequence, and the operations that keep them and the pool in step."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.prefix import block_hash

__all__ = ["BlockTable"]


class BlockTable:
    """Blocks of one sequence in order of position.

    Args:
        pool: where blocks come from.
        block_size: tokens of one block.
        root: name before the first block (`root_hash`).
    """

    __slots__ = ("_hashes", "_num_published", "block_size", "blocks", "pool")

    def __init__(self, pool: BlockPool, block_size: int, root: bytes) -> None:
        self.pool = pool
        self.block_size = block_size
        self.blocks: list[int] = []
        self._hashes = [root]  # _hashes[i + 1] names block i
        self._num_published = 0

    def blocks_needed(self, num_tokens: int) -> int:
        """How many more blocks it takes to hold ``num_tokens``."""
        return max(0, -(-num_tokens // self.block_size) - len(self.blocks))

    def match(self, token_ids: Sequence[int]) -> int:
        """Take the longest cached prefix; returns its tokens.

        At least one token is left to compute, since its logits are wanted. Only for an empty table.
        """
        assert not self.blocks, "match on a table that holds blocks"
        found = 0
        size = self.block_size
        while (found + 1) * size < len(token_ids):
            block = self.pool.lookup(self._name(found, token_ids))
            if block is None:
                break
            self.pool.acquire(block)
            self.blocks.append(block)
            found += 1
        self._num_published = found
        return found * size

    def grow(self, num_tokens: int) -> bool:
        """Hold ``num_tokens``; False, and nothing changed, when the pool has too few blocks."""
        needed = self.blocks_needed(num_tokens)
        if needed > self.pool.num_available:
            return False
        for _ in range(needed):
            self.blocks.append(self.pool.allocate(self.blocks[-1] if self.blocks else None))
        return True

    def publish(self, token_ids: Sequence[int], num_computed: int) -> None:
        """Make the full blocks within the first ``num_computed`` known tokens findable."""
        full = min(num_computed, len(token_ids)) // self.block_size
        while self._num_published < full:
            i = self._num_published
            self.pool.publish(self.blocks[i], self._name(i, token_ids))
            self._num_published += 1

    def release(self) -> None:
        """Give all blocks back, last first, so that a prefix outlives its tails in the cache."""
        while self.blocks:
            self.pool.release(self.blocks.pop())
        self._num_published = 0

    def _name(self, i: int, token_ids: Sequence[int]) -> bytes:
        size = self.block_size
        while len(self._hashes) <= i + 1:
            at = len(self._hashes) - 1
            self._hashes.append(block_hash(self._hashes[-1], token_ids[at * size : (at + 1) * size]))
        return self._hashes[i + 1]
