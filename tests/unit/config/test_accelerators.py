from __future__ import annotations

import pytest

from headrace.cli.init import config_text
from headrace.config.accelerators import ACCELERATORS, parse_accelerator
from headrace.config.load import check_text
from headrace.engines.plan import _known_gpu, gpu_machine
from headrace.errors import ConfigError

# Of NVIDIA's data sheets: dense bf16 TFLOP/s and GB/s.
SHEETS = {
    "A100": (312, 2039),
    "A100_40GB": (312, 1555),
    "L4": (121, 300),
    "L40S": (362, 864),
    "A10G": (70, 600),
    "H100": (989, 3350),
    "H100_PCIE": (756, 2039),
    "H100_NVL": (835, 3938),
    "H200": (989, 4800),
    "B200": (2250, 8000),
    "GB200": (2500, 8000),
    "GB300": (2500, 8000),
    "RTX_4090": (165.2, 1008),
    "RTX_5090": (209.5, 1792),
}


@pytest.mark.parametrize("name", SHEETS)
def test_figures_are_those_of_the_data_sheets_without_sparsity(name: str) -> None:
    tflops, bandwidth = SHEETS[name]
    gpu = ACCELERATORS[name]
    assert gpu.flops["bfloat16"] == tflops * 1e12
    assert gpu.bandwidth == bandwidth * 1e9


def test_figures_are_consistent() -> None:
    for gpu in ACCELERATORS.values():
        if not gpu.known:
            continue
        assert ("bfloat16" in gpu.flops) == (gpu.compute >= 80), gpu.name
        assert ("fp8" in gpu.flops) == gpu.has_fp8, gpu.name
        assert ("fp4" in gpu.flops) == (gpu.compute >= 100), gpu.name
        if gpu.has_fp8:
            assert 1.9 < gpu.flops["fp8"] / gpu.flops["float16"] < 2.1, gpu.name
        assert 14 * 1024**3 < gpu.memory < 300 * 1024**3


@pytest.mark.parametrize(
    ("driver", "mib", "ours"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "H100"),
        ("NVIDIA H100 PCIe", 81559, "H100_PCIE"),
        ("NVIDIA H100 NVL", 95830, "H100_NVL"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 40448, "H100_40GB"),
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100_PCIE"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100_40GB"),
        ("NVIDIA A10G", 23028, "A10G"),
        ("NVIDIA A10", 23028, "A10"),
        ("NVIDIA L40S", 46068, "L40S"),
        ("NVIDIA L4", 23034, "L4"),
        ("Tesla T4", 15360, "T4"),
        ("Tesla V100-SXM2-16GB", 16384, "V100"),
        ("Tesla V100-SXM2-32GB", 32768, "V100_32GB"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX_4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("NVIDIA GeForce RTX 4090 D", 24564, None),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX_6000_ADA"),
        ("NVIDIA RTX A6000", 49140, "RTX_A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "RTX_PRO_6000"),
        ("NVIDIA B200", 183359, "B200"),
        ("NVIDIA GB200", 189471, "GB200"),
        ("NVIDIA GeForce GTX 1080", 8192, None),
    ],
)
def test_names_of_the_driver(driver: str, mib: int, ours: str | None) -> None:
    assert _known_gpu(driver, mib) == ours


def test_a_gpu_that_the_hosted_system_lacks_is_a_lifted_rule_and_no_file_for_it() -> None:
    report = check_text(
        "resources: {accelerator: 'RTX_4090:2'}\nmodel_metadata: {headrace: {model: m}}"
    ).report
    assert report.ok
    (notice,) = report.of_kind("lifted")
    assert "RTX_4090" in str(notice)
    assert gpu_machine("RTX_4090:2").count == 2
    with pytest.raises(ConfigError, match="hosted system, in whose format"):
        config_text("owner/name", "RTX_4090")
    with pytest.raises(ConfigError, match="T4 runs encoder_bert only"):
        config_text("owner/name", "T4")


@pytest.mark.parametrize("name", ["MI300X", "TPUv5", "Gaudi3"])
def test_other_vendors_are_named_as_such(name: str) -> None:
    with pytest.raises(ValueError, match="no NVIDIA GPU"):
        parse_accelerator(name)
