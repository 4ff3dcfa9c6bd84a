"""Accelerators as data: memory, bandwidth and dense arithmetic, from NVIDIA's data sheets.

Rates are peaks without sparsity (data sheets print those with it: half), of boards at full power; of racks (GB200,
GB300 NVL72) one part in 72. What is reached in practice is lower (docs/config.md). Memory is what the driver
reports, not the marketing size.
"""

from __future__ import annotations

import re

import msgspec

from headrace.errors import nearest

__all__ = ["ACCELERATORS", "Accelerator", "GpuCount", "parse_accelerator"]

MIB = 1024**2


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of GPU.

    Attributes:
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        compute: compute capability, 10 x major + minor.
        flops: dense operations a second by format of the operands; a format that is absent has no such units.
        known: False where no public data exist; such a GPU can be named, not planned for.
    """

    name: str
    memory: int
    bandwidth: float
    compute: int
    flops: dict[str, float]
    known: bool = True

    @property
    def hosted(self) -> bool:
        """Whether the hosted system offers it."""
        return self.name in _HOSTED

    @property
    def has_fp8(self) -> bool:
        return self.compute >= 89


def _gpu(
    name: str, mib: int, gb_s: float, compute: int, *, f16: float, fp8: float = 0, fp4: float = 0
) -> Accelerator:
    """Memory in MiB as the driver reports it, GB/s, TFLOP/s."""
    flops = {"float16": f16 * 1e12}
    if compute >= 80:
        flops["bfloat16"] = f16 * 1e12
    if fp8:
        flops["fp8"] = fp8 * 1e12
    if fp4:
        flops["fp4"] = fp4 * 1e12
    return Accelerator(name=name, memory=mib * MIB, bandwidth=gb_s * 1e9, compute=compute, flops=flops)


_HOSTED = (
    *("B10", "T4", "L4", "A10G", "V100", "A100", "A100_40GB", "H100", "H200", "H100_40GB", "B200", "L40S"),
    *("RTX_PRO_6000", "B300", "GB300"),
)
# The names of the hosted system mean the SXM boards. Of GeForce cards: products that add up in float32.
_TABLE = (
    _gpu("T4", 15_360, 320, 75, f16=65),
    _gpu("V100", 16_384, 900, 70, f16=125),
    _gpu("V100_32GB", 32_768, 900, 70, f16=125),
    _gpu("A10", 23_028, 600, 86, f16=125),
    _gpu("A10G", 23_028, 600, 86, f16=70),
    _gpu("A30", 24_576, 933, 80, f16=165),
    _gpu("A40", 46_068, 696, 86, f16=149.7),
    _gpu("A100", 81_920, 2_039, 80, f16=312),
    _gpu("A100_PCIE", 81_920, 1_935, 80, f16=312),
    _gpu("A100_40GB", 40_960, 1_555, 80, f16=312),
    _gpu("RTX_3090", 24_576, 936, 86, f16=71),
    _gpu("RTX_A6000", 49_140, 768, 86, f16=154.8),
    _gpu("L4", 23_034, 300, 89, f16=121, fp8=242),
    _gpu("L40", 46_068, 864, 89, f16=181, fp8=362),
    _gpu("L40S", 46_068, 864, 89, f16=362, fp8=733),
    _gpu("RTX_4090", 24_564, 1_008, 89, f16=165.2, fp8=330.3),
    _gpu("RTX_6000_ADA", 49_140, 960, 89, f16=364, fp8=728.5),
    _gpu("H100", 81_559, 3_350, 90, f16=989, fp8=1_979),
    _gpu("H100_PCIE", 81_559, 2_039, 90, f16=756, fp8=1_513),
    _gpu("H100_NVL", 95_830, 3_938, 90, f16=835, fp8=1_671),
    # A MIG slice 3g.40gb: half the memory and its bandwidth, 60 of 132 multiprocessors.
    _gpu("H100_40GB", 40_448, 1_675, 90, f16=450, fp8=900),
    _gpu("H200", 143_771, 4_800, 90, f16=989, fp8=1_979),
    _gpu("H200_NVL", 143_771, 4_800, 90, f16=835, fp8=1_671),
    _gpu("GH200", 97_871, 4_000, 90, f16=989, fp8=1_979),
    _gpu("RTX_5090", 32_607, 1_792, 120, f16=209.5, fp8=419, fp4=1_676),
    _gpu("RTX_PRO_6000", 97_887, 1_597, 120, f16=500, fp8=1_000, fp4=2_000),
    _gpu("B200", 183_359, 8_000, 100, f16=2_250, fp8=4_500, fp4=9_000),
    _gpu("GB200", 189_471, 8_000, 100, f16=2_500, fp8=5_000, fp4=10_000),
    _gpu("B300", 275_040, 8_000, 103, f16=2_250, fp8=4_500, fp4=13_500),
    _gpu("GB300", 284_208, 8_000, 103, f16=2_500, fp8=5_000, fp4=15_000),
    Accelerator(name="B10", memory=0, bandwidth=0, compute=0, flops={}, known=False),
)
ACCELERATORS: dict[str, Accelerator] = {gpu.name: gpu for gpu in _TABLE}
_OTHER_VENDORS = re.compile(r"MI\d{3}|GAUDI|TPU|TRN|INF\d", re.IGNORECASE)


class GpuCount(msgspec.Struct, frozen=True):
    """So many of one kind, written ``H100:2``. An empty name is none."""

    name: str = ""
    count: int = 1

    @property
    def gpu(self) -> Accelerator | None:
        return ACCELERATORS.get(self.name)

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.name}:{self.count}"


def parse_accelerator(text: str) -> GpuCount:
    """``TYPE`` or ``TYPE:count``.

    Raises:
        ValueError: with a sentence that names what is known.
    """
    name, *rest = text.strip().split(":")
    if not name:
        raise ValueError("the accelerator's type is empty; expected TYPE or TYPE:count, such as H100:2")
    if name not in ACCELERATORS and _OTHER_VENDORS.match(name):
        raise ValueError(f"{name[:40]!r} is no NVIDIA GPU, and the engine runs on no others")
    if name not in ACCELERATORS:
        hint = nearest(name.upper(), ACCELERATORS, 1)
        raise ValueError(
            f"unsupported accelerator type {name[:40]!r}{hint}; known: {', '.join(ACCELERATORS)}"
        )
    if not rest:
        return GpuCount(name)
    if len(rest) > 1 or not rest[0].isascii() or not rest[0].isdigit() or not 0 < int(rest[0]) <= 4096:
        raise ValueError(
            f"invalid count {':'.join(rest)[:20]!r} in {text[:60]!r}; "
            f"must be a positive integer, as in {name}:2"
        )
    return GpuCount(name, int(rest[0]))
