"""StableLM 2 (Bellagente et al. 2024): Llama with layer norms and rotary embedding on a quarter of each head."""

from __future__ import annotations

from headrace.models.declaration import DecoderConfig
from headrace.models.family import Family, standard, standard_names
from headrace.models.reading import ConfigReader
from headrace.models.rope import read_ropes


def read(config: ConfigReader) -> DecoderConfig:
    config.only("use_parallel_residual", [False])
    config.only("qk_layernorm", [False])
    config.get("hidden_dropout")  # of training
    return standard(
        config,
        ropes=lambda head_dim: read_ropes(config, head_dim, partial=True),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        qkv_bias=config.flag("use_qkv_bias"),
    )


FAMILY = Family(
    architectures=("StableLmForCausalLM", "StableLmModel"),
    read=read,
    names=standard_names(),
    defaults={"partial_rotary_factor": 0.25, "max_position_embeddings": 4096},
)
