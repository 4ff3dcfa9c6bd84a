"""gpt-oss: MXFP4 experts as ``*_blocks`` and ``*_scales``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.quantization.containers.base import Container, Module
from headrace.quantization.schemes.fp4 import MXFP4_GROUP, Fp4Weight

__all__ = ["Mxfp4Experts"]


class Mxfp4Experts(Container):
    """``quant_method: mxfp4``. The logical tensor ``NAME`` is [experts, outputs, inputs] of ``NAME_blocks``.

    ``NAME_blocks`` is uint8 [experts, outputs, inputs / 32, 16]. Gates and ups alternate in the file's outputs; read,
    all gates of an expert come before its ups, and an expert's rows follow those of the one before.
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
        both = base.endswith("gate_up_proj")
        if len(shape) != 4 or shape[-1] != MXFP4_GROUP // 2 or (both and shape[1] % 2):
            raise self.refuse(
                blocks, list(shape), "[experts, outputs, groups, 16], of gates and ups as many outputs"
            )
        self.need(scales, ("U8",), shape[:-1])
        rows = math.prod(shape[:2])

        def ordered(tensor: Tensor) -> Tensor:
            if both:
                tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2)
            return tensor.reshape(rows, -1).contiguous()

        def read() -> Fp4Weight:
            return Fp4Weight(ordered(self.raw.load(blocks)), ordered(self.raw.load(scales)), torch.ones(rows))

        return Module((*shape[:2], shape[2] * MXFP4_GROUP), (blocks, scales), read)
