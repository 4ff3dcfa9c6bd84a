"""Tiny checkpoints in the containers that people publish, packed by plain loops that share no code with ours."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.tiny_folder import write_llama, write_moe

Written = dict[str, Tensor]
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def words(codes: list[list[int]], bits: int) -> Tensor:
    """Rows of codes, several to a 32-bit word, the first in the lowest bits."""
    per_word = 32 // bits
    rows = []
    for row in codes:
        line = []
        for start in range(0, len(row), per_word):
            word = 0
            for place, code in enumerate(row[start : start + per_word]):
                word |= code << (place * bits)
            line.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(line)
    return torch.tensor(rows, dtype=torch.int32)


def awq_words(codes: list[list[int]]) -> Tensor:
    """AWQ's order: the nibbles of a word hold columns 0, 2, 4, 6, 1, 3, 5, 7 of each eight."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    shuffled = [[row[at + column] for at in range(0, len(row), 8) for column in order] for row in codes]
    return words(shuffled, 4)


def awq(base: str, weight: Tensor, group: int, rng: random.Random) -> tuple[Written, Tensor]:
    """A random AWQ matrix of this shape and what it means."""
    rows, columns = weight.shape
    groups = columns // group
    codes = [[rng.randrange(16) for _ in range(rows)] for _ in range(columns)]
    zeros = [[rng.randrange(16) for _ in range(rows)] for _ in range(groups)]
    scales = (torch.rand(groups, rows) * 0.02 + 0.01).half()
    s = scales.tolist()
    dense = torch.tensor(
        [
            [(codes[j][i] - zeros[j // group][i]) * s[j // group][i] for j in range(columns)]
            for i in range(rows)
        ]
    )
    packed = {
        f"{base}.qweight": awq_words(codes),
        f"{base}.qzeros": awq_words(zeros),
        f"{base}.scales": scales,
    }
    return packed, dense


def gptq(
    base: str, weight: Tensor, group: int, rng: random.Random, *, bits: int, v1: bool, order: bool
) -> tuple[Written, Tensor]:
    rows, columns = weight.shape
    groups = columns // group
    index = [j // group for j in range(columns)]
    if order:
        rng.shuffle(index)
    low = 1 if v1 else 0
    codes = [[rng.randrange(2**bits) for _ in range(columns)] for _ in range(rows)]
    zeros = [[rng.randrange(low, 2**bits) for _ in range(rows)] for _ in range(groups)]
    scales = (torch.rand(groups, rows) * 0.02 + 0.01).half()
    s = scales.tolist()
    dense = torch.tensor(
        [[(codes[i][j] - zeros[index[j]][i]) * s[index[j]][i] for j in range(columns)] for i in range(rows)]
    )
    stored = [[zero - low for zero in line] for line in zeros]
    packed = {
        f"{base}.qweight": words(codes, bits).t().contiguous(),
        f"{base}.qzeros": words(stored, bits),
        f"{base}.scales": scales,
        f"{base}.g_idx": torch.tensor(index, dtype=torch.int32),
    }
    return packed, dense


def fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Random codes of this shape, and their values under a grid of scales."""
    codes = torch.randint(0, 120, weight.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = (codes.float() * torch.sign(torch.randn(weight.shape))).to(torch.float8_e4m3fn)
    rows, columns = weight.shape
    values, s = codes.float().tolist(), scale.tolist()
    dense = [[values[i][j] * s[i // block[0]][j // block[1]] for j in range(columns)] for i in range(rows)]
    return codes, torch.tensor(dense)


def fp4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Random packed codes of this shape, and their values before scales."""
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    rows, columns = weight.shape
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    assert columns % group == 0
    dense = []
    for row in packed.tolist():
        codes = [row[j // 2] >> (4 * (j % 2)) & 15 for j in range(columns)]
        dense.append([values[code & 7] * (-1.0 if code & 8 else 1.0) for code in codes])
    return packed, torch.tensor(dense)


def table_state(values: dict[str, Any]) -> Tensor:
    """bitsandbytes' settings of one matrix: JSON in bytes."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def bitsandbytes4(
    base: str, weight: Tensor, kind: str, rng: random.Random, *, nested: bool
) -> tuple[Written, Tensor]:
    """A random matrix of 4 bits by a table, scales for 64 numbers that may be places in a table of 256."""
    rows, columns = weight.shape
    count, block, wide = rows * columns, 64, 4
    table = torch.sort(torch.rand(16) * 2 - 1).values
    codes = [rng.randrange(16) for _ in range(count)]
    groups = -(-count // block)
    parts: Written = {f"{base}.weight.quant_map": table}
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": [rows, columns],
    }
    scale = torch.rand(groups) * 0.1
    parts[f"{base}.weight.absmax"] = scale
    if nested:
        places = torch.randint(0, 256, (groups,), dtype=torch.uint8)
        fine, coarse = torch.rand(256) * 2 - 1, torch.rand(-(-groups // wide)) * 0.05
        offset = 0.0625
        state |= {"nested_blocksize": wide, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {f"{base}.weight.absmax": places, f"{base}.weight.nested_absmax": coarse}
        parts[f"{base}.weight.nested_quant_map"] = fine
        scale = torch.stack([fine[int(places[i])] * coarse[i // wide] + offset for i in range(groups)])
    dense = torch.stack([table[code] * scale[i // block] for i, code in enumerate(codes)]).view(rows, columns)
    packed = [codes[i] << 4 | (codes[i + 1] if i + 1 < count else 0) for i in range(0, count, 2)]
    parts[f"{base}.weight"] = torch.tensor(packed, dtype=torch.uint8)[:, None]
    parts[f"{base}.weight.quant_state.bitsandbytes__{kind}"] = table_state(state)
    return parts, dense


def write_quantized(
    folder: Path, pack: Any, settings: dict[str, Any] | None, *, moe: bool = False
) -> dict[str, Tensor]:
    """A tiny Llama whose q, k, v, o, gate, up and down are packed by ``pack(base, weight) -> (tensors, dense)``.

    Args:
        moe: a Qwen 3 with three experts instead.

    Returns the dense tensors that the folder stands for.
    """
    if moe:
        experts = {
            "num_experts": 3,
            "moe_intermediate_size": SHAPE["intermediate_size"],
            "mlp_only_layers": [],
        }
        write_moe(folder, num_hidden_layers=1, **SHAPE, **experts)
    else:
        write_llama(folder, num_hidden_layers=1, **SHAPE)
    dense = load_file(folder / "model.safetensors")
    stored = {}
    for name, tensor in list(dense.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        parts, dense[name] = pack(name.removesuffix(".weight"), tensor)
        stored |= parts
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
        (folder / "config.json").write_text(json.dumps(config))
    return dense
