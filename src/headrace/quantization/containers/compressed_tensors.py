"""compressed-tensors (llm-compressor's format), by the fields of its ``quantization_config``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.quantized_linear.formats import pack_nibbles
from headrace.quantization.containers.base import Container, Module, splits_unevenly
from headrace.quantization.containers.fp8 import fp8_module, mxfp8_module
from headrace.quantization.scaled import Activations
from headrace.quantization.schemes.fp4 import MXFP4_GROUP, NVFP4_GROUP, Fp4Weight
from headrace.quantization.schemes.group_int import GroupIntWeight

__all__ = ["CompressedTensors", "unpack_words"]

_SCALES = ("F32", "F16", "BF16")


def unpack_words(packed: Tensor, bits: int, count: int, *, dim: int = 1) -> Tensor:
    """int32 words to uint8 codes along ``dim``, lowest bits first, ``count`` of them."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    if dim == 0:
        return unpack_words(packed.t(), bits, count).t()
    codes: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


class CompressedTensors(Container):
    """``quant_method: compressed-tensors``."""

    @property
    def label(self) -> str:
        return f"{self.settings.get('format', '?')} (compressed-tensors)"

    def modules(self) -> dict[str, Module]:
        groups: Mapping[str, Mapping[str, Any]] = self.settings["config_groups"]
        found = {}
        for base in sorted(self._bases()):
            group = self._group_of(base, groups)
            found[f"{base}.weight"] = self._module(base, group)
        return found

    def _bases(self) -> set[str]:
        """Modules that have a packed or scaled weight."""
        suffixes = (".weight_packed", ".weight_scale")
        return {n.removesuffix(s) for n in self.names for s in suffixes if n.endswith(s)}

    def _group_of(self, base: str, groups: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """The group that names the module; one whose pattern matches it else, and at last the one for all linears."""

        def named(target: str) -> bool:
            return base == target or base.endswith("." + target)

        def matched(target: str) -> bool:
            return target.startswith("re:") and re.match(target[3:], base) is not None

        for fits in (named, matched, "Linear".__eq__):
            for group in groups.values():
                if any(fits(target) for target in group["targets"]):
                    return group
        raise self.refuse("config_groups", list(groups), f"a target that covers {base}")

    def _module(self, base: str, group: Mapping[str, Any]) -> Module:
        weights = group.get("weights") or {}
        form = str(group.get("format") or self.settings.get("format"))
        if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            inputs = group.get("input_activations") or {}
            return self._fp4(base, nvfp4=form.startswith("nv"), rounds=inputs.get("num_bits") == 4)
        if form == "mxfp8-quantized":
            return mxfp8_module(self, f"{base}.weight", f"{base}.weight_scale")
        if form == "pack-quantized":
            return self._packed(base, weights, int(weights["num_bits"]))
        integers = str(weights.get("type", "int")).lower() == "int"  # a byte each, however few bits
        return self._int8(base, weights) if integers else self._fp8(base, weights, group)

    def _fp8(self, base: str, weights: Mapping[str, Any], group: Mapping[str, Any]) -> Module:
        inputs: Mapping[str, Any] | None = group.get("input_activations") or None
        block = None
        if weights.get("strategy", "tensor") == "block":
            high, wide = weights["block_structure"]
            block = (int(high), int(wide))
        static = inputs is not None and not inputs.get("dynamic", False)
        return fp8_module(
            self,
            f"{base}.weight",
            f"{base}.weight_scale",
            block,
            input_scale=f"{base}.input_scale" if static else None,
            dynamic=inputs is not None,
        )

    def _int8(self, base: str, weights: Mapping[str, Any]) -> Module:
        """Weights only: activations of 4 or 8 bits are left in 16, which is more precise."""
        name = f"{base}.weight"
        rows, columns = self.matrix(name, ("I8",))
        groups = self._num_groups(columns, weights, ordered=False)
        scale, zero = self._scales(base, rows, groups, weights, per_word=1)

        def read() -> GroupIntWeight:
            codes = (self.raw.load(name).to(torch.int16) + 128).to(torch.uint8)
            zeros = torch.zeros(rows, groups) if zero is None else self._grid(zero, rows, groups)
            return GroupIntWeight(codes, self._grid(scale, rows, groups), zeros + 128, 8)

        static = [f"{base}.input_scale", f"{base}.input_zero_point"]
        tensors = [name, scale, zero, *(extra for extra in static if extra in self.names)]
        bits = int(weights.get("num_bits") or 8)
        fitted = columns // groups if bits == 4 else 0
        found = tuple(part for part in tensors if part is not None)
        return Module((rows, columns), found, read, bits=bits, fitted=lambda: fitted)

    def _num_groups(self, columns: int, weights: Mapping[str, Any], *, ordered: bool) -> int:
        """Groups of a row; ``ordered``: a tensor says which columns are in each, however many they are."""
        size = weights.get("group_size")
        if weights.get("strategy", "tensor") != "group" or not isinstance(size, int) or size <= 0:
            return 1
        groups = math.ceil(columns / size)
        if splits_unevenly(columns, groups, size) and not ordered:
            raise self.refuse("config_groups.weights.group_size", size, f"a divisor of {columns} columns")
        return groups

    def _scales(
        self, base: str, rows: int, groups: int, weights: Mapping[str, Any], per_word: int
    ) -> tuple[str, str | None]:
        """Names of scale and zero point; ``per_word`` zero points may lie in an integer."""
        scale, zero = f"{base}.weight_scale", f"{base}.weight_zero_point"
        if math.prod(self.need(scale, _SCALES).shape) not in (1, rows * groups):
            self.need(scale, _SCALES, (rows, groups))
        if weights.get("symmetric") is not False and zero not in self.names:
            return scale, None
        info = self.need(zero, ("I32", "I8", *_SCALES))
        packed = (math.ceil(rows / per_word), groups)
        if math.prod(info.shape) not in (1, rows * groups) and (info.dtype != "I32" or info.shape != packed):
            self.need(zero, ("I32",), packed)
        return scale, zero

    def _grid(self, name: str, rows: int, groups: int) -> Tensor:
        """One number for all, or one a row and group: float32 [rows, groups]."""
        value = self.float(name)
        return (
            value.reshape(rows, groups) if value.numel() > 1 else value.reshape(1, 1).expand(rows, groups)
        ).clone()

    def _packed(self, base: str, weights: Mapping[str, Any], bits: int) -> Module:
        packed, shape = f"{base}.weight_packed", f"{base}.weight_shape"
        self.need(shape, ("I64", "I32"), (2,))
        rows, columns = (int(n) for n in self.raw.load(shape).tolist())
        per_word = 32 // bits
        if rows < 1 or columns < 1 or (bits == 4 and columns % 2):
            raise self.refuse(shape, [rows, columns], "positive numbers, of columns an even one")
        self.need(packed, ("I32",), (rows, math.ceil(columns / per_word)))
        index = f"{base}.weight_g_idx"
        order = index if index in self.names else None
        groups = self._num_groups(columns, weights, ordered=order is not None)
        scale, zero = self._scales(base, rows, groups, weights, per_word)
        if order is not None or (weights.get("actorder") in ("group", "dynamic") and groups > 1):
            self.need(index, ("I32", "I64"), (columns,))
        low = 2 ** (bits - 1)
        zeros_lie = None if zero is None else self.raw.info(zero)
        words = (math.ceil(rows / per_word), groups)
        in_words = zeros_lie is not None and zeros_lie.dtype == "I32" and zeros_lie.shape == words

        def read() -> GroupIntWeight:
            codes = unpack_words(self.raw.load(packed), bits, columns)
            zeros = torch.full((rows, groups), float(low))
            if zero is not None and in_words:
                zeros = unpack_words(self.raw.load(zero), bits, rows, dim=0).float().contiguous()
            elif zero is not None:
                zeros = self._grid(zero, rows, groups) + low
            return GroupIntWeight(
                pack_nibbles(codes) if bits == 4 else codes.contiguous(),
                self._grid(scale, rows, groups),
                zeros,
                bits,
                None if order is None else self._order(order, columns, groups, weights),
            )

        tensors = tuple(part for part in (packed, shape, scale, zero, order) if part is not None)

        def fitted() -> int:
            ordered = order is not None and self._order(order, columns, groups, weights) is not None
            return (columns if ordered else columns // groups) if bits == 4 else 0

        return Module((rows, columns), tensors, read, fitted=fitted)

    def _order(self, name: str, columns: int, groups: int, weights: Mapping[str, Any]) -> Tensor | None:
        """The group of each column; None where they follow one another, as -1 anywhere says, too."""
        if bool((self.raw.load(name) == -1).any()):
            size = int(weights["group_size"]) if groups > 1 else columns
            return torch.arange(columns) // size if columns % size else None
        return self.groups(name, columns, groups)

    def _fp4(self, base: str, *, nvfp4: bool, rounds: bool) -> Module:
        """NVFP4's global scale divides here."""
        packed, scale = f"{base}.weight_packed", f"{base}.weight_scale"
        rows, half = self.matrix(packed, ("U8",))
        group = NVFP4_GROUP if nvfp4 else MXFP4_GROUP
        self.need(scale, ("F8_E4M3",) if nvfp4 else ("U8",), (rows, half * 2 // group))
        whole = f"{base}.weight_global_scale"
        if nvfp4:
            self.single(whole, ("F32",))

        def read() -> Fp4Weight:
            row_scale = torch.ones(rows)
            if nvfp4:
                row_scale = (1.0 / self.float(whole).reshape(1)).expand(rows).clone()
            return Fp4Weight(self.raw.load(packed), self.block_scales(scale), row_scale)

        extra = (f"{base}.input_global_scale", f"{base}.input_scale")
        tensors = [
            packed,
            scale,
            *([whole] if nvfp4 else []),
            *(name for name in extra if name in self.names),
        ]
        inputs = Activations("nvfp4") if nvfp4 and rounds else Activations()
        return Module((rows, half * 2), tuple(tensors), read, lambda: inputs)
