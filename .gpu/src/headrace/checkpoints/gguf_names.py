"""From the tensors of a GGUF file to Hugging Face's names, and what llama.cpp's converter did to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from headrace.checkpoints.gguf_header import GGUFHeader, GGUFTensor
from headrace.errors import UnsupportedCheckpoint

__all__ = ["Stored", "stored_tensors"]

# Architectures whose rotary pairs llama.cpp stores interleaved: (0,1),(2,3).. where Hugging Face has halves.
_INTERLEAVED = frozenset(("llama", "granite", "smollm3"))
# Architectures whose norm weights are stored as 1 + w.
_SHIFTED_NORMS = frozenset(("gemma2", "gemma3"))
# Tensors that belong to the configuration and not to the model.
_NOT_WEIGHTS = frozenset(("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"))

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORM = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_POST_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_BLOCK: dict[str, dict[str, str]] = {
    "gemma2": _PROJECTIONS | _SANDWICH_NORM,
    "gemma3": _PROJECTIONS | _SANDWICH_NORM,
    "olmo2": _PROJECTIONS | _POST_NORM,
    "phi3": _PROJECTIONS | _PRE_NORM | _FUSED,
}
_PATTERN = re.compile(r"(?:blk\.(\d+)\.)?([a-z_0-9]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file and how to bring it back to Hugging Face's form.

    Attributes:
        interleaved_heads: heads whose rows were interleaved for rotary pairs; 0: none were.
        shift: was added to every value.
    """

    tensor: GGUFTensor
    interleaved_heads: int = 0
    shift: float = 0.0


def stored_tensors(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Stored]:
    """Hugging Face name -> stored tensor.

    Raises UnsupportedCheckpoint for a tensor that no name is known for: leaving one out silently would serve
    another model than the file holds.
    """
    arch = header.architecture
    block = _BLOCK.get(arch, _PROJECTIONS | _PRE_NORM)
    result: dict[str, Stored] = {}
    for name, tensor in header.tensors.items():
        if name in _NOT_WEIGHTS:
            continue
        match = _PATTERN.fullmatch(name)
        table = _TOP if match is None or match[1] is None else block
        if match is None or match[2] not in table:
            raise UnsupportedCheckpoint(f"{header.path}: tensor {name!r} is no part of architecture {arch}")
        layer = f"model.layers.{match[1]}." if match[1] else ""
        heads = 0
        if arch in _INTERLEAVED and match[2] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
            if tensor.shape[0] % (2 * heads):
                raise UnsupportedCheckpoint(
                    f"{header.path}: tensor {name!r}: {tensor.shape[0]} rows for {heads} heads"
                )
        shift = 1.0 if arch in _SHIFTED_NORMS and name.endswith("norm.weight") else 0.0
        result[f"{layer}{table[match[2]]}.{match[3]}"] = Stored(tensor, heads, shift)
    return result
