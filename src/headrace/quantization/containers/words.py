"""AWQ and GPTQ: 4- and 8-bit codes in 32-bit words, input features first."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from headrace.kernels.quantized_linear.formats import pack_nibbles
from headrace.quantization.containers.base import Container, Module, splits_unevenly
from headrace.quantization.containers.compressed_tensors import unpack_words
from headrace.quantization.schemes.group_int import GroupIntWeight

__all__ = ["AWQ", "GPTQ"]

_SCALES = ("F16", "BF16", "F32")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word's eight columns, where each one's four bits lie
_V1_OFFSET = 0x11111111  # what GPTQ's first format took off each four-bit zero point


def _weight(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, order: Tensor | None) -> GroupIntWeight:
    """From uint8 [in, out] and [groups, out] to rows of outputs."""
    rows = codes.t().contiguous()
    packed = pack_nibbles(rows) if bits == 4 else rows
    return GroupIntWeight(packed, scale.float().t().contiguous(), zero.float().t().contiguous(), bits, order)


def _check_even(container: Container, columns: int, groups: int) -> None:
    size = container.settings.get("group_size", container.settings.get("q_group_size"))
    if splits_unevenly(columns, groups, size):
        raise container.refuse("group_size", size, f"a divisor of {columns} input features")


class AWQ(Container):
    """``quant_method: awq``, version gemm: columns of the output interleaved within a word (Lin et al. 2023)."""

    @property
    def label(self) -> str:
        return "awq"

    def modules(self) -> dict[str, Module]:
        bases = [name.removesuffix(".qweight") for name in self.raw.names() if name.endswith(".qweight")]
        return {f"{base}.weight": self._module(base) for base in bases}

    def _module(self, base: str) -> Module:
        weight, zero, scale = (f"{base}.{part}" for part in ("qweight", "qzeros", "scales"))
        columns, _ = self.matrix(weight, ("I32",))
        groups, rows = self.matrix(scale, _SCALES)
        self.need(weight, ("I32",), (columns, rows // 8))
        self.need(zero, ("I32",), (groups, rows // 8))
        if rows % 8 or columns % 2:
            raise self.refuse(
                base, [rows, columns], "a multiple of 8 output features, and even numbers of input features"
            )
        _check_even(self, columns, groups)

        def read() -> GroupIntWeight:
            codes, zeros = self._columns(weight, rows), self._columns(zero, rows)
            return _weight(codes, self.float(scale), zeros, 4, None)

        return Module((rows, columns), (weight, zero, scale), read, fitted=lambda: columns // groups)

    def _columns(self, name: str, count: int) -> Tensor:
        """uint8 [n, count] in the order of the outputs."""
        stored = unpack_words(self.raw.load(name), 4, count)
        words: Tensor = stored.unflatten(1, (-1, 8))
        return words[:, :, torch.tensor(_AWQ_PLACES)].flatten(1)


class GPTQ(Container):
    """``quant_method: gptq``: input features packed along a word (Frantar et al. 2022), with or without desc_act.

    The first format (``checkpoint_format: gptq``) stores zero points less one; ``gptq_v2`` as they are.
    """

    @property
    def label(self) -> str:
        return "gptq"

    def modules(self) -> dict[str, Module]:
        forms = {
            str(self.settings[key]).lower()
            for key in ("checkpoint_format", "format")
            if self.settings.get(key)
        }
        bases = [name.removesuffix(".qweight") for name in self.raw.names() if name.endswith(".qweight")]
        return {
            f"{base}.weight": self._module(base, self._bits(base), forms != {"gptq_v2"}) for base in bases
        }

    def _bits(self, base: str) -> int:
        """Of one matrix: by the first rule of ``dynamic`` that matches its name, else as for all."""
        bits = self.settings.get("bits")
        rules = self.settings.get("dynamic") or {}
        for rule, changes in rules.items():
            pattern = rule.removeprefix("+:").removeprefix("-:")
            try:
                found = re.match(pattern, base)
            except re.error as error:
                raise self.refuse("dynamic", rule, f"a regular expression ({error})") from None
            if found is None:
                continue
            if rule.startswith("-:"):
                raise self.refuse("dynamic", rule, f"no rule that leaves {base} out: it is packed")
            bits = changes.get("bits", bits) if isinstance(changes, Mapping) else bits
            break
        if bits not in (4, 8):
            raise self.refuse("bits", bits, f"4 or 8 (for {base})")
        return int(bits)

    def _module(self, base: str, bits: int, offset: bool) -> Module:
        weight, zero, scale = (f"{base}.{part}" for part in ("qweight", "qzeros", "scales"))
        index = f"{base}.g_idx"
        words, rows = self.matrix(weight, ("I32",))
        groups = self.matrix(scale, _SCALES)[0]
        per_word = 32 // bits
        columns = words * per_word
        self.need(scale, _SCALES, (groups, rows))
        self.need(zero, ("I32",), (groups, rows // per_word))
        if index in self.names:
            self.need(index, ("I32", "I64"), (columns,))
        elif self.settings.get("desc_act"):
            self.need(index, ("I32",))
        else:
            _check_even(self, columns, groups)

        def read() -> GroupIntWeight:
            codes = unpack_words(self.raw.load(weight), bits, columns, dim=0)
            stored = self.raw.load(zero)
            if offset:  # word by word, as it was taken off, borrows between fields included
                stored = stored + (_V1_OFFSET if bits == 4 else 0x01010101)
            zeros = unpack_words(stored, bits, rows)
            order = self.groups(index, columns, groups) if index in self.names else None
            return _weight(codes, self.float(scale), zeros, bits, order)

        tensors = (weight, zero, scale, *([index] if index in self.names else []))

        def fitted() -> int:
            ordered = index in self.names and self.groups(index, columns, groups) is not None
            return (columns if ordered else columns // groups) if bits == 4 else 0

        return Module((rows, columns), tensors, read, fitted=fitted)
