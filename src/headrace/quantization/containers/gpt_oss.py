"""gpt-oss: MXFP4 experts as ``*_blocks`` and ``*_scales``."""

from __future__ import annotations

import torch

from headrace.quantization.containers.base import Container, Module
from headrace.quantization.schemes.fp4 import MXFP4_GROUP, Fp4Weight

__all__ = ["Mxfp4Experts"]


class Mxfp4Experts(Container):
    """``quant_method: mxfp4``. The logical tensor ``NAME`` is [experts, outputs, inputs] of ``NAME_blocks``.

    ``NAME_blocks`` is uint8 [experts, outputs, inputs / 32, 16]. Read as one weight, an expert's rows follow those of
    the one before.
    """

    @property
    def label(self) -> str:
        return "mxfp4"

    def modules(self) -> dict[str, Module]:
        bases = [name.removesuffix("_blocks") for name in self.raw.names() if name.endswith("_blocks")]
        return {base: self._module(base) for base in bases}

    def _module(self, base: str) -> Module:
        blocks, scales = f"{base}_blocks", f"{base}_scales"
        shape = self.need(blocks, ("U8",)).shape
        if len(shape) < 3 or shape[-1] != MXFP4_GROUP // 2:
            raise self.refuse(blocks, list(shape), "[..., outputs, groups, 16]")
        self.need(scales, ("U8",), shape[:-1])
        rows = int(torch.tensor(shape[:-2]).prod())

        def read() -> Fp4Weight:
            packed = self.raw.load(blocks).reshape(rows, -1).contiguous()
            return Fp4Weight(packed, self.raw.load(scales).reshape(rows, -1).contiguous(), torch.ones(rows))

        return Module((*shape[:-2], shape[-2] * MXFP4_GROUP), (blocks, scales), read)
