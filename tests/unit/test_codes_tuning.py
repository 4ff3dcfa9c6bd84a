"""Measured shapes of products over 4-bit codes are well-formed, and rules give sound ones for everything else."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from headrace.kernels.experts import tuning as experts
from headrace.kernels.experts.tuning import FEW, WIDE, ExpertCodesShape
from headrace.kernels.quantized_linear import tuning as dense
from headrace.kernels.quantized_linear.tuning import CodesShape, WideShape

CPU = torch.device("cpu")


def tables(module: object) -> list[Path]:
    return sorted((Path(str(module.__file__)).parent / "tuned").glob("*.json"))  # type: ignore[attr-defined]


def power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def check_wide(tiles: int, rows: int, warps: int, stages: int) -> None:
    """One warp has 16 rows of weights, and x's places fit in shared memory."""
    assert warps in (4, 8) and tiles % warps == 0 and 16 * tiles <= 256
    assert stages * rows * 128 <= 200_000 and power_of_two(rows)


def check_experts(shape: ExpertCodesShape, block: int, *, gated: bool) -> None:
    assert all(power_of_two(v) for v in (shape.bm, shape.tiles, shape.warps))
    assert not gated or shape.tiles >= 2
    if shape.kind == FEW:
        assert shape.bm <= block
        return
    assert shape.bm == block
    if shape.kind == WIDE:
        check_wide(shape.tiles, shape.bm, shape.warps, shape.stages)
        assert not gated or shape.tiles == 2 * shape.warps


@pytest.mark.parametrize("path", tables(experts), ids=lambda path: path.stem)
def test_measured_shapes_of_experts(path: Path) -> None:
    table = json.loads(path.read_text())
    assert table
    for key, numbers in table.items():
        found = re.fullmatch(r"(1|4|16|32|64|128):(\d+)x(\d+)/(\d+)(g?)", key)
        assert found, key
        check_experts(ExpertCodesShape(*numbers), max(16, int(found[1])), gated=bool(found[5]))


@pytest.mark.parametrize("wide", [False, True])
def test_rule_of_experts(wide: bool) -> None:
    for tokens, top, count, gated, itemsize in product(
        (1, 2, 5, 16, 60, 300, 5000), (1, 4, 8), (8, 32, 128), (False, True), (2, 4)
    ):
        pairs = tokens * top
        block = experts.block_rows(pairs, count)
        rows, most = experts.codes_rows(pairs, count, block), min(block, tokens)
        for k in (64, 192, 768, 2880):
            shape = experts.codes_shape(
                CPU, rows, block, most, 5760, k, 32, gated=gated, itemsize=itemsize, wide=wide
            )
            check_experts(shape, block, gated=gated)
            assert wide or shape.kind != WIDE


@pytest.mark.parametrize("path", tables(dense), ids=lambda path: path.stem)
def test_measured_shapes_of_dense_layers(path: Path) -> None:
    for key, numbers in json.loads(path.read_text()).items():
        form, rows, n, k, gated = re.fullmatch(r"(\w+):(\d+):(\d+)x(\d+)(g?)", key).groups()  # type: ignore[union-attr]
        if form in ("fp4", "int4"):
            shape = CodesShape(*numbers)
            assert int(rows) in (8, 16, 32, 64), key
            assert not gated or shape.tiles >= 2
            assert shape.warps * shape.splits <= -(-int(k) // 128), key
        elif form == "wide" and numbers:
            check_wide(*(numbers[i] for i in (0, 1, 3, 4)))
            assert int(n) % 16 == 0 and numbers[2] <= -(-int(k) // 128), key


def test_rule_of_wide_products() -> None:
    for rows, n, k in product((17, 40, 65, 128, 500, 1024), (48, 4096, 24576), (64, 2880, 12288)):
        shape = dense.wide_shape(CPU, rows, n, k)
        assert isinstance(shape, WideShape)
        check_wide(shape.tiles, shape.bm, shape.warps, shape.stages)
    assert dense.wide_shape(CPU, dense.WIDE_ROWS + 1, 4096, 4096) is None
