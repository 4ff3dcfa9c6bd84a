"""Dequantization equals the gguf package's, bit for bit, on arbitrary bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from headrace.checkpoints.gguf_blocks import DEQUANTIZABLE, dequantize, unpack
from headrace.checkpoints.gguf_header import BLOCKS
from headrace.errors import UnsupportedCheckpoint


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for name, sizes in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == sizes


@pytest.mark.filterwarnings("ignore:invalid value|overflow encountered")
@pytest.mark.parametrize("ggml_type", sorted(DEQUANTIZABLE))
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 5), (7, 130)])
def test_equals_the_gguf_package_on_random_bytes(ggml_type: str, rows: int, blocks: int) -> None:
    raw = np.random.default_rng(rows).integers(0, 256, (rows, blocks * BLOCKS[ggml_type][1]), dtype=np.uint8)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[ggml_type])
    found = dequantize(torch.from_numpy(raw), ggml_type).numpy()
    assert found.shape == expected.shape == (rows, blocks * BLOCKS[ggml_type][0])
    # Random scales may be NaN, whose payload is nobody's promise; everything else is the same bits.
    np.testing.assert_array_equal(found, expected)


def test_more_than_one_chunk() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (9, 144 * 512), dtype=np.uint8)
    raw[:, 1::144] &= 0x3B  # finite scales
    raw[:, 3::144] &= 0x3B
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_K)
    assert expected.size > 1 << 20
    np.testing.assert_array_equal(dequantize(torch.from_numpy(raw), "Q4_K").numpy(), expected)


def test_rounds_once_to_the_wanted_dtype() -> None:
    values = np.random.default_rng(1).standard_normal((4, 256), dtype=np.float32)
    raw = torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0))
    half = dequantize(raw, "Q8_0", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, dequantize(raw, "Q8_0").to(torch.bfloat16))


@pytest.mark.parametrize("ggml_type", sorted(DEQUANTIZABLE - {"MXFP4"}))
def test_groups_multiply_out_to_the_same_numbers(ggml_type: str) -> None:
    raw = torch.from_numpy(
        np.random.default_rng(2).integers(0, 60, (2, 3 * BLOCKS[ggml_type][1]), dtype=np.uint8)
    )
    values, scale, offset = unpack(raw, ggml_type)
    numbers = values.float() * scale.unsqueeze(-1)
    if offset is not None:
        numbers += offset.unsqueeze(-1)
    assert torch.equal(numbers.reshape(2, -1), dequantize(raw, ggml_type))


def test_an_unknown_type_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"IQ1_S cannot be read.*Q4_K"):
        dequantize(torch.zeros(1, 50, dtype=torch.uint8), "IQ1_S")
