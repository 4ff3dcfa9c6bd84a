"""Checkpoints, quantization and speculators: sections 1.5 to 1.7."""

from __future__ import annotations

from unit.config.cases.base import (
    V1,
    B,
    Case,
    R,
    encoder,
    look,
)

CHECKPOINT_CASES = [  # 1.5
    Case(
        "source-case",
        V1,
        {f"{B}.checkpoint_repository.source": "s3"},
        f"{B}.checkpoint_repository.source",
        "upper case: S3",
        {f"{B}.checkpoint_repository": {"source": "S3", "repo": "s3://b/p"}},
    ),
    Case(
        "source-required",
        V1,
        {f"{B}.checkpoint_repository": {"repo": "o/n"}},
        f"{B}.checkpoint_repository.source",
        "required",
    ),
    Case(
        "repo-required",
        V1,
        {f"{B}.checkpoint_repository": {"source": "HF"}},
        f"{B}.checkpoint_repository.repo",
        "required",
    ),
    Case(
        "hf-id",
        V1,
        {f"{B}.checkpoint_repository.repo": "a/b/c"},
        f"{B}.checkpoint_repository.repo",
        "repository id",
        {f"{B}.checkpoint_repository.repo": "a/b.c"},
    ),
    Case(
        "hf-dashes",
        V1,
        {f"{B}.checkpoint_repository.repo": "a/b--c"},
        f"{B}.checkpoint_repository.repo",
        "repository id",
        {f"{B}.checkpoint_repository.repo": "a/b-c"},
    ),
    Case(
        "gcs-form",
        V1,
        {f"{B}.checkpoint_repository": {"source": "GCS", "repo": "s3://b"}},
        f"{B}.checkpoint_repository.repo",
        "gs://",
        {f"{B}.checkpoint_repository": {"source": "GCS", "repo": "gs://b/p"}},
        hosted=False,
    ),
    Case(
        "s3-form",
        V1,
        {f"{B}.checkpoint_repository": {"source": "S3", "repo": "gs://b/p"}},
        f"{B}.checkpoint_repository.repo",
        "s3://",
        {f"{B}.checkpoint_repository": {"source": "S3", "repo": "s3://b/p"}},
        hosted=False,
    ),
    Case(
        "azure-form",
        V1,
        {f"{B}.checkpoint_repository": {"source": "AZURE", "repo": "b"}},
        f"{B}.checkpoint_repository.repo",
        "az://",
        {f"{B}.checkpoint_repository": {"source": "AZURE", "repo": "az://b/p"}},
        hosted=False,
    ),
    Case(
        "url-form",
        V1,
        {f"{B}.checkpoint_repository": {"source": "REMOTE_URL", "repo": "b"}},
        f"{B}.checkpoint_repository.repo",
        "https://",
        {f"{B}.checkpoint_repository": {"source": "REMOTE_URL", "repo": "https://x/y.tgz"}},
        hosted=False,
    ),
    Case(
        "lora-repo",
        V1,
        {f"{B}.lora_adapters": {"a": {"source": "HF", "repo": "x//y"}}},
        f"{B}.lora_adapters.a.repo",
        "repository id",
        {f"{B}.lora_adapters": {"a": {"source": "HF", "repo": "x/y"}}},
    ),
]

QUANTIZATION_CASES = [  # 1.6
    Case(
        "type",
        V1,
        {f"{B}.quantization_type": "fp9"},
        f"{B}.quantization_type",
        "fp8_mlp_only",
        {f"{B}.quantization_type": "fp8_mlp_only"},
    ),
    *(
        Case(
            f"calibration-{key}-{bad}",
            V1,
            {f"{B}.quantization_config.{key}": bad},
            f"{B}.quantization_config.{key}",
            says,
            {f"{B}.quantization_config.{key}": good},
        )
        for key in ("calib_size", "calib_max_seq_length")
        for bad, says, good in (
            (100, "multiple of 64", 128),
            (0, "64 to 16384", 64),
            (16448, "64 to 16384", 16384),
        )
    ),
]

SPECULATOR_CASES = [  # 1.7
    Case(
        "no-mode",
        V1,
        {
            f"{B}.speculator": {
                "num_draft_tokens": 4,
                "checkpoint_repository": {"source": "HF", "repo": "o/n"},
            }
        },
        f"{B}.speculator.speculative_decoding_mode",
        "discontinued",
        look(),
    ),
    Case(
        "external",
        V1,
        look(speculative_decoding_mode="DRAFT_TOKENS_EXTERNAL"),
        f"{B}.speculator.speculative_decoding_mode",
        "discontinued",
        look(),
    ),
    Case(
        "sizes",
        V1,
        {f"{B}.speculator": {"speculative_decoding_mode": "LOOKAHEAD_DECODING", "lookahead_ngram_size": 3}},
        f"{B}.speculator",
        "lookahead_windows_size",
        look(),
    ),
    *(
        Case(f"sizes-{name}", V1, look(**{name: None}), f"{B}.speculator", name, look())
        for name in ("lookahead_ngram_size", "lookahead_verification_set_size")
    ),
    *(
        Case(
            f"zero-{name}",
            V1,
            look(**{name: 0}),
            f"{B}.speculator.{name}",
            "at least 1",
            look(**{name: good}),
        )
        for name, good in (
            ("lookahead_ngram_size", 2),
            ("lookahead_verification_set_size", 1),
            ("num_draft_tokens", 41),
        )
    ),
    Case(
        "window-zero",
        V1,
        look(lookahead_windows_size=0),
        f"{B}.speculator.lookahead_windows_size",
        "at least 1",
        look(lookahead_windows_size=1),
    ),
    Case(
        "draft-short",
        V1,
        look(num_draft_tokens=40),
        f"{B}.speculator.num_draft_tokens",
        "41 draft tokens",
        look(num_draft_tokens=41),
    ),
    Case(
        "draft-long",
        V1,
        look(num_draft_tokens=2049),
        f"{B}.speculator.num_draft_tokens",
        "at most 2048",
        look(num_draft_tokens=2048),
    ),
    Case(
        "draft-computed",
        V1,
        look(lookahead_windows_size=50, lookahead_ngram_size=50, lookahead_verification_set_size=50),
        f"{B}.speculator",
        "4899",
        look(lookahead_windows_size=7),
    ),
    Case(
        "reuse",
        V1,
        {
            **look(),
            f"{B}.plugin_configuration.use_paged_context_fmha": False,
            f"{R}.enable_chunked_context": False,
        },
        f"{B}.plugin_configuration",
        "block reuse",
        look(),
    ),
    Case("encoder", V1, {**look(), **encoder()}, f"{B}.speculator", "for decoders"),
]
