"""Blocks of the paged KV cache: who owns which, as plain integers.

Every block is in exactly one account:

    free    no content worth keeping
    cached  no owner, content known by its chain hash, evicted oldest first
    owned   by one or more named sequences (reference counted)

Block 0 belongs to nobody: padding rows of a captured graph read and write it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["NULL_BLOCK", "Account", "AccountError", "BlockPool"]

NULL_BLOCK = 0


class AccountError(AssertionError):
    """The books do not balance: a bug, named by block and sequence."""


@dataclass(frozen=True, slots=True)
class Account:
    """Number of blocks in each state; they add up to the pool (without the null block)."""

    free: int
    cached: int
    owned: int

    @property
    def total(self) -> int:
        return self.free + self.cached + self.owned


class BlockPool:
    """Reference-counted blocks with a prefix index.

    Args:
        num_blocks: size of the pool, the null block included; at least 2.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs the null block and at least one more")
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can still hand out."""
        return len(self._free) + len(self._cached)

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return self.num_blocks - 1

    def account(self) -> Account:
        """How many blocks are free, cached and owned."""
        free, cached = len(self._free), len(self._cached)
        return Account(free, cached, self.num_usable - free - cached)

    def allocate(self, after: int | None = None) -> int:
        """A block with one reference and no content; the neighbour of ``after`` when that is free.

        Neighbours let the CPU path read a sequence's keys as one view. Raises AccountError when none is
        left: callers look at `num_available` first.
        """
        if after is not None and after + 1 in self._free:
            block = after + 1
            del self._free[block]
        elif self._free:
            block, _ = self._free.popitem(last=False)
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            raise AccountError("allocate: no block is free or cached")
        self._refs[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """One more reference to an owned or cached block."""
        if self._refs[block] == 0:
            if block not in self._cached:
                raise AccountError(f"acquire: block {block} is neither owned nor cached")
            del self._cached[block]
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one returns the block to the cached or the free account."""
        if block == NULL_BLOCK or self._refs[block] <= 0:
            raise AccountError(f"release: block {block} has no reference to give back")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            (self._free if self._hash[block] is None else self._cached)[block] = None

    def lookup(self, chain_hash: bytes) -> int | None:
        """The block that holds this content, or None."""
        return self._index.get(chain_hash)

    def publish(self, block: int, chain_hash: bytes) -> None:
        """Make a full, computed, owned block findable. The first block with a content keeps the name."""
        if self._refs[block] <= 0:
            raise AccountError(f"publish: block {block} has no owner")
        if self._hash[block] is None and chain_hash not in self._index:
            self._hash[block] = chain_hash
            self._index[chain_hash] = block

    def check(self, owners: Mapping[str, Sequence[int]]) -> None:
        """Raise AccountError unless the references are exactly those of the named owners."""
        counts: Counter[int] = Counter()
        for name, blocks in owners.items():
            for block in blocks:
                if not 0 < block < self.num_blocks:
                    raise AccountError(
                        f"sequence {name!r} owns block {block}, outside 1..{self.num_blocks - 1}"
                    )
                counts[block] += 1
        for block in range(1, self.num_blocks):
            states = (block in self._free) + (block in self._cached) + (self._refs[block] > 0)
            if self._refs[block] != counts[block] or states != 1:
                who = [name for name, blocks in owners.items() if block in blocks]
                raise AccountError(
                    f"block {block}: {self._refs[block]} references, {counts[block]} owners {who}, "
                    f"free={block in self._free}, cached={block in self._cached}"
                )

    def repair(self, owners: Iterable[Sequence[int]]) -> None:
        """Rebuild every account from the owners, after a violation: the server goes on, the cache starts anew."""
        counts: Counter[int] = Counter(block for blocks in owners for block in blocks)
        self._refs = [counts[block] for block in range(self.num_blocks)]
        self._hash = [None] * self.num_blocks
        self._index.clear()
        self._cached.clear()
        self._free = OrderedDict.fromkeys(b for b in range(1, self.num_blocks) if not counts[b])

    def _forget(self, block: int) -> None:
        name = self._hash[block]
        self._hash[block] = None
        if name is not None and self._index.get(name) == block:
            del self._index[name]
