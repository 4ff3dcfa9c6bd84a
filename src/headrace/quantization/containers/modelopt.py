"""NVIDIA ModelOpt checkpoints: FP8 and NVFP4 beside ``hf_quant_config.json``."""

from __future__ import annotations

import torch

from headrace.quantization.containers.base import Container, Module
from headrace.quantization.containers.fp8 import fp8_module
from headrace.quantization.scaled import Activations
from headrace.quantization.schemes.fp4 import NVFP4_GROUP, Fp4Weight

__all__ = ["ModelOpt"]

_ALGORITHMS = ("FP8", "NVFP4", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")


class ModelOpt(Container):
    """``quant_algo`` FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO or NVFP4; each matrix as its tensors say."""

    @property
    def label(self) -> str:
        return f"{self._algorithm.lower()} (ModelOpt)"

    @property
    def _algorithm(self) -> str:
        return str(self.settings.get("quant_algo") or "")

    @property
    def kv_cache(self) -> str:
        wanted = self.settings.get("kv_cache_quant_algo")
        if wanted is None:
            scheme = self.settings.get("kv_cache_scheme")
            wanted = (
                "FP8" if scheme and scheme.get("num_bits") == 8 and scheme.get("type") == "float" else scheme
            )
        if wanted not in (None, "", "FP8"):
            raise self.refuse_cache("kv_cache_quant_algo", wanted)
        return "fp8" if wanted else "auto"

    def modules(self) -> dict[str, Module]:
        if self._algorithm not in (*_ALGORITHMS, "MIXED_PRECISION"):
            raise self.refuse("quant_algo", self._algorithm, f"one of {', '.join(_ALGORITHMS)}")
        group = self.settings.get("group_size", NVFP4_GROUP)
        if self._algorithm == "NVFP4" and group not in (None, NVFP4_GROUP):
            raise self.refuse("group_size", group, str(NVFP4_GROUP))
        found = {}
        for name in self.raw.names():
            if not name.endswith(".weight"):
                continue
            kind, base = self.raw.info(name).dtype, name.removesuffix("weight")
            if kind == "U8":
                found[name] = self._nvfp4(name, base)
            elif kind == "F8_E4M3":
                found[name] = self._fp8(name, base)
        return found

    def _fp8(self, name: str, base: str) -> Module:
        scale = f"{base}weight_scale"
        static = f"{base}input_scale" if f"{base}input_scale" in self.names else None
        rows, columns = self.raw.info(name).shape
        shape = self.raw.info(scale).shape if scale in self.names else ()
        block = None
        if self._algorithm == "FP8_PB_WO":
            high, wide = (shape[0], shape[-1]) if shape else (1, 1)
            block = (-(-rows // high), -(-columns // wide))
            if block != (min(rows, 128), min(columns, 128)):
                raise self.refuse(scale, list(shape), "one scale for each 128 x 128 block")
        dynamic = self._algorithm == "FP8_PER_CHANNEL_PER_TOKEN"
        return fp8_module(self, name, scale, block, input_scale=static, dynamic=dynamic)

    def _nvfp4(self, name: str, base: str) -> Module:
        rows, half = self.need(name, ("U8",)).shape
        scale, whole = f"{base}weight_scale", f"{base}weight_scale_2"
        self.need(scale, ("F8_E4M3",), (rows, half * 2 // NVFP4_GROUP))
        self.need(whole, ("F32",))

        def read() -> Fp4Weight:
            row_scale = self.float(whole).reshape(1).expand(rows).clone()
            return Fp4Weight(self.raw.load(name).view(torch.uint8), self.raw.load(scale), row_scale)

        static = [extra for extra in (f"{base}input_scale", f"{base}pre_quant_scale") if extra in self.names]
        if f"{base}pre_quant_scale" in static:
            raise self.refuse(f"{base}pre_quant_scale", "set", "none (scaled inputs are not supported)")
        return Module((rows, half * 2), (name, scale, whole, *static), read, lambda: Activations("nvfp4"))
