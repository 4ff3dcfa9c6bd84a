"""bis_llm: section 1.10."""

from __future__ import annotations

from unit.config.cases.base import (
    BIS,
    DELETE,
    V1,
    C,
    Case,
)

BIS_CASES = [  # 1.10
    Case("config", BIS, {C: DELETE}, C, "required", hosted=False),
    Case(
        "backend",
        BIS,
        {f"{C}.engine_backend": DELETE},
        f"{C}.engine_backend",
        "gpuTRTImage",
        {f"{C}.engine_backend": DELETE, f"{C}.gpuTRTImage": "x"},
        hosted=False,
    ),
    Case(
        "backend-name",
        BIS,
        {f"{C}.engine_backend": "sglang"},
        f"{C}.engine_backend",
        "vllm",
        {f"{C}.engine_backend": "trtllm"},
        hosted=False,
    ),
    Case(
        "checkpoint", BIS, {f"{C}.checkpoint_name": DELETE}, f"{C}.checkpoint_name", "required", hosted=False
    ),
    Case("model-name", BIS, {f"{C}.model_name": DELETE}, f"{C}.model_name", "required", hosted=False),
    Case(
        "option",
        BIS,
        {f"{C}.engine_config": {"max_nun_seqs": 1}},
        f"{C}.engine_config.max_nun_seqs",
        "'max_num_seqs'",
        {f"{C}.engine_config": {"max_num_seqs": 1}},
        hosted=False,
    ),
    Case(
        "option-type",
        BIS,
        {f"{C}.engine_config": {"max_num_seqs": "many"}},
        f"{C}.engine_config.max_num_seqs",
        "an integer",
        {f"{C}.engine_config": {"max_batch_size": 1}},
        hosted=False,
    ),
    Case(
        "disagg-flag",
        BIS,
        {f"{C}.b10_disagg_config": {"prefill_workers_per_replica": 1, "decode_workers_per_replica": 2}},
        f"{C}.is_disaggregated",
        "must be true",
        {
            f"{C}.is_disaggregated": True,
            f"{C}.b10_disagg_config": {"prefill_workers_per_replica": 1, "decode_workers_per_replica": 2},
        },
        hosted=False,
    ),
    Case(
        "disagg-block",
        BIS,
        {f"{C}.is_disaggregated": True},
        f"{C}.b10_disagg_config",
        "both worker counts",
        {f"{C}.is_disaggregated": False},
        hosted=False,
    ),
    Case(
        "disagg-counts",
        BIS,
        {f"{C}.is_disaggregated": True, f"{C}.b10_disagg_config": {"prefill_workers_per_replica": 1}},
        f"{C}.b10_disagg_config.decode_workers_per_replica",
        "required",
        hosted=False,
    ),
    Case(
        "eagle",
        BIS,
        {f"{C}.speculative_config": {"decoding_type": "Eagle"}},
        f"{C}.speculative_config",
        "speculative_model_dir",
        {f"{C}.speculative_config": {"decoding_type": "NGram"}},
        hosted=False,
    ),
    Case(
        "drafts-misplaced",
        BIS,
        {f"{C}.engine_config": {"speculative_config": {}}},
        f"{C}.engine_config.speculative_config",
        "one level up",
        hosted=False,
    ),
    Case("both-blocks", BIS, V1, "bis_llm", "one engine", hosted=False),
    Case(
        "metrics",
        BIS,
        {"bis_llm.additional_autoscaling_config": {"metrics": [{"name": "in_flight_tokens"}]}},
        "bis_llm.additional_autoscaling_config.metrics[0].target",
        "required",
        {
            "bis_llm.additional_autoscaling_config": {
                "metrics": [{"name": "in_flight_tokens", "target": 100000}]
            }
        },
    ),
    Case(
        "autoscaling",
        BIS,
        {"bis_llm.concurrency_target": 3},
        "bis_llm.concurrency_target",
        "unknown key",
        hosted=False,
    ),
]
