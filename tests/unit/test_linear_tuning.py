"""The measured tile shapes are well-formed, and the rule gives a sound shape for everything else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from headrace.kernels.linear import tuning
from headrace.kernels.linear.tuning import (
    GemvShape,
    RingShape,
    SkinnyShape,
    StreamShape,
    gemv_shape,
    ring_rule,
    skinny_shape,
    stream_shape,
)

TABLES = sorted((Path(tuning.__file__).parent / "tuned").glob("*.json"))


def power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_measured_shapes(path: Path) -> None:
    table = json.loads(path.read_text())
    assert table
    for key, numbers in table.items():
        found = re.fullmatch(r"[rs]?(1|8|16|32|64|128|256):(\d+)x(\d+)(g?)", key)
        assert found, key
        rows = int(found[1])
        if key.startswith("r"):
            check_ring(RingShape(*numbers), rows, int(found[3]), gated=bool(found[4]))
            continue
        if key.startswith("s"):
            check_stream(StreamShape(*numbers), rows, int(found[3]), gated=bool(found[4]))
            continue
        shape = GemvShape(*numbers) if rows == 1 else SkinnyShape(*numbers)
        assert power_of_two(shape.bn), key
        assert power_of_two(shape.bk), key
        if isinstance(shape, SkinnyShape):
            assert shape.bm == rows, key
            assert shape.splits * shape.bk <= int(found[3]), key
            assert shared_bytes(shape, gated=bool(found[4])) <= 227 << 10, key


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("n", "k"), [(96, 32), (576, 576), (49152, 576), (6144, 4096), (151936, 1024), (4096, 14336)]
)
def test_rule(n: int, k: int, gated: bool) -> None:
    unknown = torch.device("cpu")
    shape = gemv_shape(unknown, n, k, gated)
    assert power_of_two(shape.bk)
    assert shape.bn * shape.bk <= 8192
    for rows in (2, 16, 17, 33, 64):
        shape = skinny_shape(unknown, rows, n, k, gated)
        assert rows <= shape.bm
        assert shape.splits == 1 or shape.splits * shape.bk <= k
        assert shared_bytes(shape, gated) <= 113 << 10  # two programs a multiprocessor


def check_stream(shape: StreamShape, rows: int, k: int, gated: bool) -> None:
    assert all(power_of_two(size) for size in (shape.bm, shape.bn, shape.bk)), shape
    assert shape.x_first or shape.bn >= 64, shape
    assert 16 <= shape.bm < 2 * max(rows, 16), shape
    assert shape.splits == 1 or shape.splits * shape.bk <= k, shape
    assert shared_bytes(shape, gated) <= 227 << 10, shape


def check_ring(shape: RingShape, rows: int, k: int, gated: bool) -> None:
    """Tiles that the tensor cores take, a ring that is not deeper than its work, and shared memory for it."""
    assert all(power_of_two(size) for size in (shape.bm, shape.bn, shape.bk, shape.fold)), shape
    assert shape.bm == max(rows, 8), shape
    first, second = (shape.bm, shape.bn) if shape.x_first else (shape.bn, shape.bm)
    assert first * shape.fold in (64, 128), shape
    assert 8 <= second * shape.fold <= 256, shape
    assert k % (8 * shape.fold) == 0, shape
    assert 1 <= shape.stages <= -(-k // (shape.fold * shape.splits * shape.bk)), shape
    stage = 2 * shape.bk * shape.fold * (shape.bn * (2 if gated else 1) + shape.bm)
    assert stage * shape.stages <= 226 << 10, shape


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("n", "k"), [(96, 1032), (1024, 1048), (6144, 4096), (151936, 1024), (4096, 14336), (28672, 8192)]
)
def test_rule_of_rings(n: int, k: int, gated: bool) -> None:
    for rows in (8, 16):
        shape = ring_rule(rows, n, k, gated)
        check_ring(shape, rows, k, gated)
        assert 2 * shape.bk * shape.fold * shape.stages * (shape.bn * (1 + gated) + shape.bm) <= 76 << 10


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(96, 32), (576, 576), (6144, 4096), (151936, 1024), (4096, 14336)])
def test_rule_of_streams(n: int, k: int, gated: bool) -> None:
    for rows in (2, 16, 17, 64, 65, 256, 300):
        check_stream(stream_shape(torch.device("cpu"), rows, n, k, gated), rows, k, gated)


def shared_bytes(shape: SkinnyShape | StreamShape, gated: bool) -> int:
    """Pipeline buffers in 16 bits a number."""
    return 2 * shape.stages * shape.bk * (shape.bn * (2 if gated else 1) + shape.bm)


@pytest.mark.parametrize("fold", [1, 2, 4, 8])
def test_rings_take_no_width_whose_folded_rows_are_not_whole_16_bytes(fold: int) -> None:
    """The copy engine's strides: anything else goes to the Triton kernel."""
    gluon_ring = pytest.importorskip("headrace.kernels.linear.gluon_ring")
    shape = RingShape(16, 64 // fold, 64, fold, 1, 2)
    for k in range(8, 1024, 8):
        weight = torch.empty(64, k, dtype=torch.bfloat16, device="meta")
        x = torch.empty(5, k, dtype=torch.bfloat16, device="meta")
        assert gluon_ring.covers(x, weight, shape) == (k // fold * 2 % 16 == 0 and k % fold == 0)
        ruled = ring_rule(16, 64, k, False)
        assert gluon_ring.covers(x, weight, ruled)


def test_odd_widths_never_reach_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table says: 328 columns folded four times are rows of 164 bytes."""
    triton_stream = pytest.importorskip("headrace.kernels.linear.triton_stream")
    monkeypatch.setattr(triton_stream, "supports_gluon", lambda device: True)
    monkeypatch.setattr(triton_stream, "ring_shape", lambda *_: RingShape(16, 16, 64, 4, 1, 2))
    for k, kind in ((328, StreamShape), (352, RingShape)):
        x, weight = torch.empty(5, k, device="meta"), torch.empty(136, k, device="meta")
        assert type(triton_stream._shape(x, weight, False)) is kind
