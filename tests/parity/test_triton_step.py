"""Both ends of a decode step against plain torch."""

from __future__ import annotations

import torch

from headrace.kernels.step import reference
from headrace.kernels.step import triton as fast
from triton_device import DEVICE, DTYPES, randn


def test_begin_step() -> None:
    embedding = randn(30, 70, dtype=DTYPES[-1], seed=0)
    # row, position, token, new block (the first two: of the next position, of this one); the last two are padding
    packed = [[3, 17, 5, -11], [0, 31, -1, 6], [2, 16, -1, 4], [4, 0, 0, -1], [4, 0, 0, -1]]
    packed = torch.tensor(packed, dtype=torch.int32, device=DEVICE).T.contiguous()
    last = torch.tensor([7, 1, -1, 2, 0], device=DEVICE)
    tables = torch.arange(20, dtype=torch.int32, device=DEVICE).view(5, 4).contiguous()
    tables[4] = 0
    for scale in (1.0, 2.5):
        ours, theirs = tables.clone(), tables.clone()
        after, following = packed.clone(), packed.clone()
        log, logged = (torch.full((5, 8), -7, device=DEVICE) for _ in range(2))
        got = fast.begin_step(after, ours, last, embedding, scale, 16, log)
        expected = reference.begin_step(following, theirs, last, embedding, scale, 16, logged)
        assert torch.equal(ours, theirs)
        assert ours[3].tolist() == [12, 13, 9, 15]
        assert ours[0].tolist() == [0, 6, 2, 3]
        assert torch.equal(after, following)
        assert torch.equal(log, logged)
        assert log[2].tolist() == [-1, *[-7] * 7]  # a failed row's token is told
        for a, b in zip(got, expected):
            assert torch.equal(a, b)
        assert got.token_ids.tolist() == [5, 7, 0, 0, 0]


def test_argmax_rows() -> None:
    logits = randn(6, 333, dtype=torch.float32, seed=0)
    logits[1, 17] = logits[1, 300] = 9.0
    logits[2, 4] = torch.nan
    logits[3, 332] = torch.inf
    logits[4] = -torch.inf
    logits[5, 10:20] = -torch.inf
    got = fast.argmax_rows(logits)
    assert got[1] == 17
    assert got[2:5].tolist() == [-1, -1, -1]
    assert torch.equal(got, reference.argmax_rows(logits))
    last = torch.full((9,), 5, device=DEVICE)
    rows = torch.tensor([8, 0, 2, 4, 6, 1], dtype=torch.int32, device=DEVICE)
    assert torch.equal(fast.reduce_best(logits, None, last_tokens=last, rows=rows), got)
    assert torch.equal(last[rows.long()], got)
    assert last[[3, 5, 7]].tolist() == [5, 5, 5]
