"""bitsandbytes checkpoints: 4 bits by a table (NF4, FP4), scales in 8 bits or not, and INT8 with a scale a row."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from headrace.errors import UnsupportedCheckpoint
from headrace.quantization.containers.base import Container, Module
from headrace.quantization.schemes.group_int import GroupIntWeight
from headrace.quantization.schemes.table import TableWeight

__all__ = ["BitsAndBytes"]

_STATE = ".quant_state.bitsandbytes__"


class BitsAndBytes(Container):
    """``quant_method: bitsandbytes``, as ``save_pretrained`` of transformers writes it.

    Activations stay in 16 bits: what LLM.int8 (Dettmers et al. 2022) does to those below ``llm_int8_threshold`` is
    left out, which is more precise.
    """

    @property
    def label(self) -> str:
        eight = self.settings.get("load_in_8bit") or self.settings.get("_load_in_8bit")
        return f"{'int8' if eight else self.settings.get('bnb_4bit_quant_type', 'fp4')} (bitsandbytes)"

    def modules(self) -> dict[str, Module]:
        found = {}
        for name in self.raw.names():
            if _STATE in name:
                base = name.split(_STATE)[0]
                found[base] = self._four_bits(base, name)
            elif name.endswith(".SCB"):
                base = name.removesuffix(".SCB")
                found[f"{base}.weight"] = self._eight_bits(base, name)
        return found

    def _four_bits(self, weight: str, state: str) -> Module:
        said = self._state(state)
        kind = state.split(_STATE)[1]
        shape = said.get("shape")
        if kind not in ("nf4", "fp4") or said.get("quant_type") != kind:
            raise self.refuse(state, said.get("quant_type"), "nf4 or fp4, as its name says")
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(isinstance(n, int) and n > 0 for n in shape)
        ):
            raise self.refuse(f"{state}: shape", shape, "[rows, columns]")
        block = self._positive(state, said, "blocksize")
        rows, columns = shape
        count = rows * columns
        if weight not in self.names or self.raw.info(weight).nbytes != -(-count // 2):
            self.need(weight, ("U8",), (-(-count // 2), 1))  # says so
        absmax, table = f"{weight}.absmax", f"{weight}.quant_map"
        groups = math.ceil(count / block)
        nested = [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"] if "nested_offset" in said else []
        offset = said.get("nested_offset", 0.0)
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise self.refuse(f"{state}: nested_offset", offset, "a number")
        self.need(absmax, ("U8",) if nested else ("F32",), (groups,))
        self.need(table, ("F32",), (16,))
        wide = self._positive(state, said, "nested_blocksize") if nested else 1
        if nested:
            self.need(nested[0], ("F32",), (math.ceil(groups / wide),))
            self.need(nested[1], ("F32",), (256,))

        def scale() -> Tensor:
            if not nested:
                return self.float(absmax)
            coarse = self.float(nested[0]).repeat_interleave(wide)[:groups]
            fine = self.float(nested[1])[self.raw.load(absmax).long()]
            return fine * coarse + torch.tensor(float(offset))

        def read() -> TableWeight:
            codes = self.raw.load(weight).contiguous().view(torch.uint8).flatten()
            return TableWeight(codes, self.float(table), scale(), block, (rows, columns))

        return Module((rows, columns), (weight, state, absmax, table, *nested), read)

    def _state(self, name: str) -> dict[str, Any]:
        """JSON in bytes."""
        self.need(name, ("U8",))
        try:
            said = json.loads(bytes(self.raw.load(name).flatten().tolist()))
        except ValueError as error:
            raise UnsupportedCheckpoint(f"tensor {name!r} holds no valid JSON: {error}", param=name) from None
        if not isinstance(said, dict):
            raise self.refuse(name, said, "a JSON object")
        return said

    def _positive(self, state: str, said: dict[str, Any], key: str) -> int:
        value = said.get(key)
        if not isinstance(value, int) or value < 1:
            raise self.refuse(f"{state}: {key}", value, "a positive number")
        return value

    def _eight_bits(self, base: str, scale: str) -> Module:
        name, order = f"{base}.weight", f"{base}.weight_format"
        rows, columns = self.matrix(name, ("I8",))
        self.need(scale, ("F32",), (rows,))
        layout = (order,) if order in self.names else ()
        if layout:
            self.single(order, ("U8", "I8", "I32", "I64"))
            if int(self.raw.load(order)) != 0:
                raise self.refuse(order, int(self.raw.load(order)), "0 (rows one after another)")

        def read() -> GroupIntWeight:
            codes = (self.raw.load(name).to(torch.int16) + 128).to(torch.uint8)
            return GroupIntWeight(codes, (self.float(scale) / 127)[:, None], torch.full((rows, 1), 128.0), 8)

        return Module((rows, columns), (name, scale, *layout), read)
