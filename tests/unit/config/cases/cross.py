"""Rules between sections: 1.8."""

from __future__ import annotations

from unit.config.cases.base import (
    V1,
    B,
    Case,
    R,
    encoder,
    look,
)

CROSS_CASES = [  # 1.8
    Case(
        "world",
        V1,
        {"resources.accelerator": "H100:2"},
        f"{B}.tensor_parallel_count",
        "has 2 GPU",
        {"resources.accelerator": "H100:2", f"{B}.tensor_parallel_count": 2},
    ),
    Case(
        "world-pp",
        V1,
        {
            "resources.accelerator": "H100:2",
            f"{B}.tensor_parallel_count": 2,
            f"{B}.pipeline_parallel_count": 2,
        },
        f"{B}.tensor_parallel_count",
        "= 4",
        {
            "resources.accelerator": "H100:4",
            f"{B}.tensor_parallel_count": 2,
            f"{B}.pipeline_parallel_count": 2,
        },
    ),
    Case(
        "world-sp",
        V1,
        {"resources.accelerator": "H100:2", f"{B}.sequence_parallel_count": 4},
        f"{B}.tensor_parallel_count",
        "= 4",
        {"resources.accelerator": "H100:4", f"{B}.sequence_parallel_count": 4},
    ),
    Case(
        "encoder-gpus",
        V1,
        {f"{B}.tensor_parallel_count": 8},
        f"{B}.tensor_parallel_count",
        "has 1 GPU",
        {"resources.accelerator": "H100:8", **encoder(tensor_parallel_count=8)},
    ),
    *(
        Case(
            f"{gpu}-{base}",
            V1,
            {"resources.accelerator": gpu, f"{B}.base_model": base},
            "resources.accelerator",
            "encoder_bert only",
            {"resources.accelerator": gpu, f"{B}.base_model": "encoder_bert"},
        )
        for gpu in ("T4", "V100")
        for base in ("decoder", "encoder")
    ),
    *(
        Case(
            f"{gpu}-{quant}",
            V1,
            {"resources.accelerator": gpu, f"{B}.quantization_type": quant},
            f"{B}.quantization_type",
            "no_quant",
            {
                "resources.accelerator": "L4" if quant.startswith("fp8") else "B200",
                f"{B}.quantization_type": quant,
            },
        )
        for gpu in ("A10G", "A100", "A100_40GB")
        for quant in ("fp8", "fp8_kv", "fp8_mlp_only", "fp4", "fp4_kv", "fp4_mlp_only")
    ),
    Case(
        "bert-T4-fp8",
        V1,
        {"resources.accelerator": "T4", f"{B}.base_model": "encoder_bert", f"{B}.quantization_type": "fp8"},
        f"{B}.quantization_type",
        "no_quant",
        {"resources.accelerator": "T4", f"{B}.base_model": "encoder_bert"},
        hosted=False,
    ),
    Case(
        "tags",
        V1,
        {"model_metadata": {"tags": ["openai-compatible", "force-legacy-api-non-openai-compatible"]}},
        "model_metadata.tags",
        "exclude each other",
        {"model_metadata": {"tags": ["openai-compatible"]}},
    ),
    Case(
        "legacy-speculator",
        V1,
        {**look(), "model_metadata": {"tags": ["force-legacy-api-non-openai-compatible"]}},
        "model_metadata.tags",
        "speculator",
        {**look(), "model_metadata": {"tags": ["openai-compatible"]}},
        hosted=False,
    ),
    Case("unknown-top", V1, {"resource": {}}, "resource", "'resources'", hosted=False),
    Case("unknown-trt", V1, {"trt_llm.runtim": {}}, "trt_llm.runtim", "'runtime'", hosted=False),
    Case(
        "unknown-runtime",
        V1,
        {f"{R}.served_model_nam": "x"},
        f"{R}.served_model_nam",
        "'served_model_name'",
        {f"{R}.served_model_name": "x"},
        hosted=False,
    ),
]
