"""Blocks, chain hashes and tables as plain data."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kvcache.blocks import AccountError, BlockPool
from headrace.kvcache.prefix import block_hash, root_hash
from headrace.kvcache.table import BlockTable

ROOT = root_hash("model")


def test_chain_hashes_depend_on_everything() -> None:
    assert block_hash(ROOT, [1, 2]) != block_hash(ROOT, [2, 1])
    assert block_hash(ROOT, [1, 2]) != block_hash(root_hash("other"), [1, 2])
    assert root_hash("ab", "c") != root_hash("a", "bc")
    assert root_hash("a", "") != root_hash("a")


def test_a_prefix_is_found_and_shared() -> None:
    pool = BlockPool(10)
    first = BlockTable(pool, 4, ROOT)
    tokens = list(range(11))
    assert first.grow(11)
    first.publish(tokens, 11)
    second = BlockTable(pool, 4, ROOT)
    assert second.match(tokens) == 8
    assert second.blocks == first.blocks[:2]
    exact = BlockTable(pool, 4, ROOT)
    assert exact.match(tokens[:8]) == 4, "one token is always left to compute"
    other = BlockTable(pool, 4, root_hash("salted"))
    assert other.match(tokens) == 0
    pool.check({"a": first.blocks, "b": second.blocks, "c": exact.blocks})


def test_evicted_content_is_not_found() -> None:
    pool = BlockPool(4)
    table = BlockTable(pool, 2, ROOT)
    table.grow(6)
    table.publish([1, 2, 3, 4, 5, 6], 6)
    table.release()
    assert pool.account().cached == 3
    other = BlockTable(pool, 2, ROOT)
    other.grow(2)  # takes the block whose content is least useful: the tail of the chain
    again = BlockTable(pool, 2, ROOT)
    assert again.match([1, 2, 3, 4, 5, 6, 7]) == 4
    pool.check({"o": other.blocks, "a": again.blocks})


def test_misuse_is_an_account_error() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AccountError, match=f"block {block}"):
        pool.release(block)
    with pytest.raises(AccountError, match="neither"):
        pool.acquire(block)
    with pytest.raises(AccountError, match="owner"):
        pool.publish(block, b"x")
    with pytest.raises(AccountError):
        pool.check({"ghost": [block]})
    pool.repair([[block]])
    pool.check({"ghost": [block]})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_trace_balances(data: st.DataObject) -> None:
    pool = BlockPool(data.draw(st.integers(2, 14)))
    size = data.draw(st.integers(1, 4))
    tables: dict[str, tuple[BlockTable, list[int]]] = {}
    contents: dict[int, tuple[int, ...]] = {}  # what each block truly holds
    for step in range(data.draw(st.integers(1, 30))):
        if tables and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(tables)))
            tables.pop(name)[0].release()
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
            table = BlockTable(pool, size, ROOT)
            matched = table.match(tokens)
            for i, block in enumerate(table.blocks):
                assert contents[block] == tuple(tokens[: (i + 1) * size]), "matched a block of other content"
            if table.grow(len(tokens)):
                for i in range(matched // size, len(table.blocks)):
                    contents[table.blocks[i]] = tuple(tokens[: (i + 1) * size])
                table.publish(tokens, len(tokens))
                tables[f"t{step}"] = (table, tokens)
            else:
                table.release()
        pool.check({name: table.blocks for name, (table, _) in tables.items()})
    for table, _ in tables.values():
        table.release()
    assert pool.account().owned == 0
