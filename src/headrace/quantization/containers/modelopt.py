"""NVIDIA ModelOpt checkpoints: FP8, FP4 and INT8 beside ``hf_quant_config.json``."""

from __future__ import annotations

import torch

from headrace.checkpoints.quantization_rules import modelopt_algorithm
from headrace.quantization.containers.base import Container, Module
from headrace.quantization.containers.fp8 import fp8_module, mxfp8_module
from headrace.quantization.scaled import Activations
from headrace.quantization.schemes.fp4 import MXFP4_GROUP, NVFP4_GROUP, Fp4Weight
from headrace.quantization.schemes.group_int import GroupIntWeight

__all__ = ["ModelOpt"]

_BLOCK = 128
_MXFP4 = ("MXFP4", "W4A8_MXFP4_FP8")


class ModelOpt(Container):
    """Each matrix by ``quant_algo`` (its own under MIXED_PRECISION), and as its tensors say."""

    @property
    def label(self) -> str:
        return f"{self._algorithm.lower()} (ModelOpt)"

    @property
    def _algorithm(self) -> str:
        return modelopt_algorithm(self.settings.get("quant_algo"))

    def modules(self) -> dict[str, Module]:
        readers = {"U8": self._fp4, "F8_E4M3": self._fp8, "I8": self._int8}
        found = {}
        for name in self.raw.names():
            reader = readers.get(self.raw.info(name).dtype)
            if name.endswith(".weight") and reader is not None:
                base = name.removesuffix("weight")
                if f"{base}pre_quant_scale" in self.names:
                    raise self.refuse(
                        f"{base}pre_quant_scale", "set", "none (scaled inputs are not supported)"
                    )
                found[name] = reader(name, base, self._algorithm_of(base.removesuffix(".")))
        return found

    def _algorithm_of(self, module: str) -> str:
        if self._algorithm != "MIXED_PRECISION":
            return self._algorithm
        own = (self.settings.get("quantized_layers") or {}).get(module) or {}
        return modelopt_algorithm(own.get("quant_algo"))

    def _fp8(self, name: str, base: str, algorithm: str) -> Module:
        scale = f"{base}weight_scale"
        if algorithm == "MXFP8":
            return mxfp8_module(self, name, scale)
        static = f"{base}input_scale" if f"{base}input_scale" in self.names else None
        block = (_BLOCK, _BLOCK) if algorithm == "FP8_PB_WO" else None
        dynamic = algorithm == "FP8_PER_CHANNEL_PER_TOKEN"
        return fp8_module(self, name, scale, block, input_scale=static, dynamic=dynamic)

    def _fp4(self, name: str, base: str, algorithm: str) -> Module:
        rows, half = self.matrix(name, ("U8",))
        scale, whole = f"{base}weight_scale", f"{base}weight_scale_2"
        nvfp4 = algorithm not in _MXFP4
        group = NVFP4_GROUP if nvfp4 else MXFP4_GROUP
        self.need(scale, ("F8_E4M3",) if nvfp4 else ("U8",), (rows, half * 2 // group))
        if nvfp4:
            self.single(whole, ("F32",))

        def read() -> Fp4Weight:
            row_scale = torch.ones(rows)
            if nvfp4:
                row_scale = self.float(whole).reshape(1).expand(rows).clone()
            return Fp4Weight(self.raw.load(name), self.block_scales(scale), row_scale)

        tensors = (name, scale, whole, f"{base}input_scale")
        inputs = Activations("nvfp4") if algorithm == "NVFP4" else Activations()
        return Module((rows, half * 2), tuple(t for t in tensors if t in self.names), read, lambda: inputs)

    def _int8(self, name: str, base: str, algorithm: str) -> Module:
        rows, columns = self.matrix(name, ("I8",))
        scale = f"{base}weight_scale"
        if algorithm != "W8A16":
            raise self.refuse(name, "I8", f"no integers under {algorithm}")
        self.need(scale, ("F32", "F16", "BF16"), (rows,))

        def read() -> GroupIntWeight:
            codes = (self.raw.load(name).to(torch.int16) + 128).to(torch.uint8)
            return GroupIntWeight(codes, self.float(scale)[:, None], torch.full((rows, 1), 128.0), 8)

        return Module((rows, columns), (name, scale), read)
