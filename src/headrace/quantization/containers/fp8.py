"""FP8 checkpoints that keep the tensor's name: DeepSeek's blocks, and scales for whole matrices or rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.errors import UnsupportedCheckpoint
from headrace.kernels.quantized_linear.formats import decode_e8m0
from headrace.quantization.containers.base import Container, Module
from headrace.quantization.scaled import Activations
from headrace.quantization.schemes.fp8 import Fp8Weight

__all__ = ["DeepSeekFp8", "FbgemmFp8", "fp8_module", "mxfp8_module"]

_MX_GROUP = 32
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")


def fp8_module(
    container: Container,
    weight: str,
    scale: str,
    block: tuple[int, int] | None,
    *,
    input_scale: str | None = None,
    dynamic: bool = True,
) -> Module:
    """One FP8 matrix and its scales, which multiply.

    Args:
        block: rows and columns that share a scale; None: by the scale's shape one for all, or one a row.
        input_scale: the tensor of a static activation scale, if there is one.
        dynamic: whether activations are rounded by their own scales, else static or not at all.
    """
    rows, columns = container.matrix(weight, ("F8_E4M3",))
    found = container.need(scale, _SCALE_TYPES).shape
    if block is not None:
        high, wide = math.ceil(rows / block[0]), math.ceil(columns / block[1])
        if found != (high, 1, wide, 1):  # as ModelOpt keeps them
            container.need(scale, _SCALE_TYPES, (high, wide))
        shared = (min(block[0], rows), min(block[1], columns))
    elif math.prod(found) == 1:
        shared = (rows, columns)
    else:
        container.need(scale, _SCALE_TYPES, (rows,) if len(found) == 1 else (rows, 1))
        shared = (1, columns)

    def read() -> Fp8Weight:
        scales = container.float(scale)
        grid = (math.ceil(rows / shared[0]), math.ceil(columns / shared[1]))
        return Fp8Weight(container.raw.load(weight), scales.reshape(grid).contiguous(), shared)

    def activations() -> Activations:
        if input_scale is not None:
            return Activations("static", _scalar(container, input_scale))
        if not dynamic:
            return Activations()
        return Activations("group" if block is not None else "token")

    tensors = (weight, scale) if input_scale is None else (weight, scale, input_scale)
    return Module((rows, columns), tensors, read, activations)


def mxfp8_module(container: Container, weight: str, scale: str) -> Module:
    """One MXFP8 matrix (OCP Microscaling Formats 1.0): 32 columns share a power of two, a byte each.

    Activations stay in 16 bits, which is more precise than the MXFP8 that such checkpoints ask for.
    """
    rows, columns = container.matrix(weight, ("F8_E4M3",))
    if columns % _MX_GROUP:
        raise container.refuse(weight, [rows, columns], f"a multiple of {_MX_GROUP} columns")
    container.need(scale, ("U8", "F8_E8M0"), (rows, columns // _MX_GROUP))

    def read() -> Fp8Weight:
        scales = decode_e8m0(container.raw.load(scale).view(torch.uint8))
        if bool(scales.isnan().any()):
            raise UnsupportedCheckpoint(f"tensor {scale!r} holds NaN (a byte of 255)", param=scale)
        return Fp8Weight(container.raw.load(weight), scales, (1, _MX_GROUP))

    return Module((rows, columns), (weight, scale), read)


def _scalar(container: Container, name: str) -> Tensor:
    value = container.float(name)
    if value.numel() != 1 or float(value.reshape(())) <= 0:
        raise container.refuse(name, value.tolist(), "one positive number")
    return value.reshape(()).to(torch.float32)


class DeepSeekFp8(Container):
    """``quant_method: fp8``: DeepSeek-V3's and Qwen 3's blocks (``weight_scale_inv``), or one scale a matrix."""

    @property
    def label(self) -> str:
        return "fp8 (blocks)" if self.settings.get("weight_block_size") else "fp8"

    def modules(self) -> dict[str, Module]:
        scheme = self.settings.get("activation_scheme", "dynamic")
        size = self.settings.get("weight_block_size")
        block = (int(size[0]), int(size[1])) if size else None
        suffix = "weight_scale_inv" if block else "weight_scale"
        found = {}
        for name in self.raw.names():
            if not name.endswith(".weight") or self.raw.info(name).dtype != "F8_E4M3":
                continue
            base = name.removesuffix("weight")
            static = f"{base}input_scale" if f"{base}input_scale" in self.names else None
            if scheme == "static" and static is None:
                self.need(f"{base}input_scale", _SCALE_TYPES)
            found[name] = fp8_module(self, name, base + suffix, block, input_scale=static)
        return found


class FbgemmFp8(Container):
    """``quant_method: fbgemm_fp8`` (Llama 3.1): a scale a row, activations rounded by token.

    The bound that it puts on activations' scales (``activation_scale_ub``) is left out: nothing is clipped.
    """

    @property
    def label(self) -> str:
        return "fbgemm_fp8"

    def modules(self) -> dict[str, Module]:
        names = [n for n in self.raw.names() if n.endswith(".weight") and self.raw.info(n).dtype == "F8_E4M3"]
        return {name: self._module(name) for name in names}

    def _module(self, name: str) -> Module:
        module = fp8_module(self, name, f"{name}_scale", None)
        bound = f"{name.removesuffix('weight')}input_scale_ub"
        spare = (bound,) if bound in self.names else ()
        return Module(module.shape, (*module.tensors, *spare), module.read, module.activations)
