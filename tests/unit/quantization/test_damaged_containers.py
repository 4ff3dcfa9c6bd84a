"""Files that are not what their container calls for: each misfit is refused by name, none is read as other numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_container_settings import compressed
from test_containers import CASES
from torch import Tensor

from headrace.checkpoints.base import TensorInfo
from headrace.errors import HeadraceError, MissingFile, UnsupportedCheckpoint
from headrace.quantization.containers import QuantizedCheckpoint, open_quantized
from support import quantized_folder as write

RNG = random.Random(5)
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
WEIGHT = "layer.q_proj.weight"


class InMemory:
    """A checkpoint of a few tensors."""

    path = Path("checkpoint")
    fingerprint = "0" * 32

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = {"quantization_config": settings}
        self.tensors, self.generation_config = tensors, {}

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise MissingFile(name)
        tensor = self.tensors[name]
        return TensorInfo(tuple(tensor.shape), NAMES[tensor.dtype], tensor.nbytes)

    def load(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensors[name] if dtype is None else self.tensors[name].to(dtype)


def read(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    checkpoint = open_quantized(InMemory(settings, tensors))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    found = checkpoint.load(WEIGHT)
    checkpoint.modules[WEIGHT].activations()
    return found


def packed(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    pack, settings = CASES[case]
    tensors, _ = pack(WEIGHT.removesuffix(".weight"), torch.randn(16, 64))
    return settings or {"quant_algo": "NVFP4"}, tensors


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Numbers of the same type, of another shape."""
    flat = tensor.reshape(-1).view(torch.uint8)
    wanted = torch.Size(shape).numel() * tensor.element_size()
    return flat.repeat(wanted // len(flat) + 1)[:wanted].view(tensor.dtype).view(shape)


@pytest.mark.parametrize("case", CASES)
def test_tensors_of_other_shapes_are_refused(case: str) -> None:
    """A scale may have a dimension more or less; that is read as what it was, or refused, never a traceback."""
    settings, whole = packed(case)
    plain = read(settings, whole)
    for name, tensor in whole.items():
        for shape in ((), (1,), (2, 3), (0,), (tensor.numel(),), (*tensor.shape, 1), (*tensor.shape, 2)):
            if shape == tuple(tensor.shape):
                continue
            try:
                found = read(settings, whole | {name: reshaped(tensor, shape)})
            except HeadraceError:
                continue
            if name == WEIGHT and found.shape == shape:  # a smaller matrix, whose one scale is right
                continue
            same = torch.Size(shape).numel() == tensor.numel()
            one_for_all = torch.Size(shape).numel() == 1 and ("scale" in name or "zero_point" in name)
            assert found.shape == plain.shape and (one_for_all or same), (name, shape)
            assert one_for_all or torch.equal(found, plain), (name, shape)


@pytest.mark.parametrize("case", CASES)
def test_tensors_of_other_types_are_refused(case: str) -> None:
    settings, whole = packed(case)
    for name, tensor in whole.items():
        for dtype in NAMES:
            try:
                found = read(settings, whole | {name: tensor.to(torch.float32).to(dtype)})
            except HeadraceError:
                continue
            assert found.shape == (16, 64), (name, dtype)


def grouped(size: int, columns: int, *, extra: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """compressed-tensors of four rows, groups of ``size`` of which the last may be smaller."""
    codes = [[RNG.randrange(16) for _ in range(columns)] for _ in range(4)]
    base = WEIGHT.removesuffix(".weight")
    return {
        f"{base}.weight_packed": write.words(codes, 4),
        f"{base}.weight_shape": torch.tensor([4, columns]),
        f"{base}.weight_scale": torch.rand(4, -(-columns // size)) + 0.5,
        **{f"{base}.{name}": tensor for name, tensor in (extra or {}).items()},
    }


def int4(size: int, **others: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size, **others}
    return compressed("pack-quantized", weights)


def test_a_smaller_last_group_is_refused() -> None:
    """Groups of 64 among 96 columns are two; they are not two of 48."""
    with pytest.raises(UnsupportedCheckpoint, match="group_size is 64; expected a divisor of 96 columns"):
        read(int4(64), grouped(64, 96))
    for method, pack in (("awq", awq), ("gptq", gptq)):
        settings = {"quant_method": method, "bits": 4, "group_size": 64}
        with pytest.raises(UnsupportedCheckpoint, match="group_size is 64; expected a divisor of 96"):
            read(settings, pack(48, 96))
        assert read(settings | {"group_size": 48}, pack(48, 96)).shape == (16, 96)


def awq(size: int, columns: int) -> dict[str, Tensor]:
    return write.awq(WEIGHT.removesuffix(".weight"), torch.zeros(16, columns), size, RNG)[0]


def gptq(size: int, columns: int) -> dict[str, Tensor]:
    """Without the tensor that tells each column's group, as some writers leave it out."""
    base = WEIGHT.removesuffix(".weight")
    tensors, _ = write.gptq(base, torch.zeros(16, columns), size, RNG, bits=4, v1=True, order=False)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}


def test_columns_in_groups_of_their_own_order() -> None:
    order = torch.randperm(96) // 32
    ordered = grouped(32, 96, extra={"weight_g_idx": order.int()})
    plain = dict(ordered)
    plain.pop("layer.q_proj.weight_g_idx")
    settings = int4(32, actorder="group")
    scale = ordered["layer.q_proj.weight_scale"]
    straight = read(int4(32), plain) / scale.repeat_interleave(32, 1)
    torch.testing.assert_close(read(settings, ordered), straight.round() * scale[:, order], rtol=1e-6, atol=0)
    for wrong in (3, -2, 1 << 20):
        order[17] = wrong
        with pytest.raises(UnsupportedCheckpoint, match=r"weight_g_idx.*names groups"):
            read(settings, plain | {"layer.q_proj.weight_g_idx": order.int()})
    with pytest.raises(UnsupportedCheckpoint, match="weight_g_idx"):
        read(settings, plain | {"layer.q_proj.weight_g_idx": order[:95].int()})


def test_an_order_that_was_never_set_is_none() -> None:
    """The format's library fills it with -1, and takes columns as they lie wherever one is left."""
    unset = torch.full((96,), -1, dtype=torch.int32)
    tensors = grouped(32, 96, extra={"weight_g_idx": unset})
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    assert torch.equal(read(int4(32), tensors), read(int4(32), plain))


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.float32])
def test_one_zero_point_for_all(kind: torch.dtype) -> None:
    base = WEIGHT.removesuffix(".weight")
    codes = torch.randint(-128, 128, (4, 32), dtype=torch.int8)
    tensors = {WEIGHT: codes, f"{base}.weight_scale": torch.tensor([0.25])}
    tensors[f"{base}.weight_zero_point"] = torch.tensor([-7]).to(kind)
    weights = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False}
    assert torch.equal(read(compressed("int-quantized", weights), tensors), (codes.float() + 7) * 0.25)
    tensors[f"{base}.weight_zero_point"] = torch.zeros(3).to(kind)
    with pytest.raises(UnsupportedCheckpoint, match="weight_zero_point"):
        read(compressed("int-quantized", weights), tensors)


@pytest.mark.parametrize("value", [[], {}, 7, None])
def test_a_format_that_is_no_word_is_refused(value: Any) -> None:
    settings = int4(32)
    settings["format"] = value
    with pytest.raises(UnsupportedCheckpoint, match="format is"):
        read(settings, grouped(32, 96))


@pytest.mark.parametrize("value", [[128, "a"], [128], [0, 128], None])
def test_blocks_are_two_numbers(value: Any) -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": value}
    with pytest.raises(UnsupportedCheckpoint, match="block_structure is"):
        read(compressed("float-quantized", weights), grouped(32, 96))
