"""Bytes of weights by kind, as they lie on disk and as they will lie in memory under a scheme."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import msgspec

from headrace.config.plan.facts import DTYPE_BYTES, Facts, Tensor
from headrace.config.plan.shape import ModelShape
from headrace.config.quantization import quantization_type

__all__ = [
    "KEPT_BLOCKS",
    "KEPT_GROUPS",
    "KINDS",
    "Weights",
    "classify",
    "expected_tensors",
    "packed_format",
    "weigh",
]

KINDS = ("embedding", "attention", "mlp", "experts", "norm", "head", "vision", "other")

_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("vision", r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|audio_tower|mm_projector)\."),
        ("experts", r"\.(experts|shared_experts?|block_sparse_moe\.experts|expert_bias)\b"),
        (
            "embedding",
            r"(embed_tokens|(word|token_type|position)_embeddings|tok_embeddings|wte|wpe)\.weight$",
        ),
        ("head", r"(^|\.)(lm_head|classifier|score|pooler|pre_classifier|dense_head)\.|^(model\.)?(output|cls)\."),
        ("norm", r"(norm|ln_\d|ln_f|LayerNorm|layernorm|layer_norm)[\w.]*\.(weight|bias)$"),
        ("attention", r"\.(self_attn|attention|attn|mixer|linear_attn|Wqkv|qkv_proj|o_proj)\b"),
        ("mlp", r"\.(mlp|feed_forward|ffn|intermediate|output|gate|router|fc1|fc2)\b"),
    )
)  # fmt: skip
_BERT_FFN = re.compile(r"\.layer\.\d+\.(intermediate|output)\.dense\.")
_LINEAR = ("attention", "mlp", "experts")

# ggml's block types that a CPU multiplies with as they are: planes of 4-bit codes, columns that share a scale.
KEPT_BLOCKS: dict[str, tuple[int, int]] = {
    "Q4_0": (1, 32), "Q4_1": (1, 32), "Q4_K": (1, 32),
    "Q2_K": (2, 16), "Q3_K": (2, 16), "Q5_0": (2, 32), "Q5_1": (2, 32), "Q5_K": (2, 32), "Q6_K": (2, 16),
    "Q8_0": (2, 32), "IQ4_NL": (2, 32), "IQ4_XS": (2, 32), "MXFP4": (2, 32),
}  # fmt: skip
KEPT_GROUPS = (32, 64, 128, 256)
"""Columns of 4-bit integers that may share a scale where a CPU multiplies with them as they are."""
_PACKED_SCALE = re.compile(
    r"(scale|scales|zeros|qzeros|g_idx|absmax|_scale_inv|input_scale|weight_scale_2|weight_shape|zero_point|"
    r"quant_map|bitsandbytes__nf4|bitsandbytes__fp4|SCB|weight_format)$"
)
_FLOATS = ("F64", "F32", "F16", "BF16")


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """Weights of one copy of the model.

    Attributes:
        parameters: numbers, tied tables counted once, scales not counted.
        active: those that one token uses (fewer with experts).
        by_kind: bytes in memory.
        disk: bytes in the files.
        read_step: bytes that a decode step of one sequence reads: no rows of the embedding but one, the head once,
            and only the chosen experts.
        estimated: no weights were there; sizes follow from config.json.
    """

    parameters: int
    active: int
    by_kind: dict[str, int]
    disk: int
    read_step: int
    estimated: bool = False

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def classify(name: str) -> str:
    """What a tensor is for, by its name."""
    if _BERT_FFN.search(name):
        return "mlp"
    for kind, pattern in _PATTERNS:
        if pattern.search(name):
            return kind
    return "other"


def weigh(
    facts: Facts,
    shape: ModelShape,
    dtype_bytes: int,
    scheme: str,
    *,
    keep_blocks: bool = False,
    unpack: bool = False,
) -> Weights:
    """Add up a checkpoint.

    Args:
        dtype_bytes: of what is not quantized.
        scheme: that the linears are converted to at load; "" keeps the checkpoint's own format.
        unpack: matrices of a quantized checkpoint are dequantized as they load.
        keep_blocks: matrices of a GGUF file stay in few bits; the table of embeddings stays in the file's map.
    """
    estimated = not facts.tensors
    tensors = expected_tensors(shape, dtype_bytes) if estimated else facts.tensors
    by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
    parameters, expert_parameters = 0, 0
    per_word = 4 if facts.quantized.bits == 8 else 8
    for name, tensor in tensors.items():
        kind = classify(name)
        if shape.tied and kind == "head" and "lm_head" in name:
            continue  # stored, but the embedding table is used
        count = _logical(name, tensor, per_word)
        parameters += count
        expert_parameters += count if kind == "experts" and ".shared_expert" not in name else 0
        if kind == "norm" and shape.wide_norms:
            by_kind[kind] += count * 4
        elif keep_blocks and len(tensor.shape) == 2 and tensor.dtype in KEPT_BLOCKS:
            table = kind == "embedding"  # it stays in the file's map and takes no memory of its own
            by_kind["head" if table else kind] += 0 if table and not shape.tied else _kept_bytes(tensor)
        else:
            dense = unpack and (tensor.dtype not in _FLOATS or _PACKED_SCALE.search(name))
            by_kind[kind] += (
                count * dtype_bytes if dense else _in_memory(name, tensor, kind, dtype_bytes, scheme)
            )
    share = shape.chosen / shape.experts if shape.experts and shape.chosen else 1.0
    active = round(parameters - expert_parameters * (1 - share))
    expert_bytes = by_kind["experts"] * (expert_parameters / max(_count(tensors, "experts"), 1))
    head = by_kind["head"] or (by_kind["embedding"] if shape.tied else 0)
    step = by_kind["attention"] + by_kind["mlp"] + by_kind["norm"] + by_kind["other"] + head
    step += round(by_kind["experts"] - expert_bytes * (1 - share))
    return Weights(
        parameters=parameters,
        active=active,
        by_kind={kind: size for kind, size in by_kind.items() if size},
        disk=0 if estimated else sum(tensor.nbytes for tensor in tensors.values()),
        read_step=step,
        estimated=estimated,
    )


def _count(tensors: Mapping[str, Tensor], kind: str) -> int:
    return sum(_logical(name, tensor) for name, tensor in tensors.items() if classify(name) == kind)


def _logical(name: str, tensor: Tensor, per_word: int = 8) -> int:
    """Numbers that a tensor stands for: packed 4-bit values count two a byte, scales none."""
    if _PACKED_SCALE.search(name):
        return 0
    if tensor.dtype in ("I32", "U32") and ("qweight" in name or name.endswith("weight_packed")):
        return tensor.numel * per_word
    if tensor.dtype == "U8" and (name.endswith("weight") or "blocks" in name or "packed" in name):
        return tensor.numel * 2
    return tensor.numel


def _in_memory(name: str, tensor: Tensor, kind: str, dtype_bytes: int, scheme: str) -> int:
    floats = tensor.dtype in _FLOATS or tensor.dtype not in DTYPE_BYTES  # ggml's blocks
    if not floats or _PACKED_SCALE.search(name):
        return tensor.nbytes  # already quantized: kept as it is
    if scheme and len(tensor.shape) >= 2 and _converted(kind, scheme, name):
        return packed_bytes(tensor.shape, scheme)
    return tensor.numel * dtype_bytes


def _kept_bytes(tensor: Tensor) -> int:
    """Codes, and a 16-bit scale and offset for each group."""
    planes, group = KEPT_BLOCKS[tensor.dtype]
    return tensor.numel * planes // 2 + tensor.numel // group * 4


def _converted(kind: str, scheme: str, name: str) -> bool:
    if kind == "head" and scheme.startswith("int") and name.endswith("lm_head.weight"):
        return True
    if kind not in _LINEAR or re.search(r"\.(gate|router|shared_expert_gate)\.weight$", name):
        return False  # routers stay exact
    return kind != "attention" or quantization_type(scheme).layers == "all"


def packed_format(facts: Facts, scheme: str) -> str:
    """What matrices are kept in: a type's weights or a container's method; "" for 16 or 32 bits. FP8 whose products
    PyTorch does not take as they are (blocks, static scales) is ``fp8_block``."""
    if scheme:
        return quantization_type(scheme).weights
    method = facts.quantized.method
    apart = any(name.endswith(("_scale_inv", "input_scale")) for name in facts.tensors)
    return "fp8_block" if method == "fp8" and apart else method


def packed_bytes(shape: tuple[int, ...], scheme: str) -> int:
    """Bytes of one matrix [..., out, in] under a scheme, scales included.

    fp8: float32 a row; fp8_block: float32 a 128 x 128 tile; nvfp4: one byte for 16 and a float32 a row; mxfp4: one
    byte for 32 and a float32 a row; int8: a 16-bit scale a row (on GPUs six bytes more); int4: a 16-bit scale and
    offset for 32 (``-g64``, ``-g128``: for so many; on GPUs a float32 scale).
    """
    numel, columns = math.prod(shape), shape[-1]
    rows = numel // max(columns, 1)
    name = quantization_type(scheme).weights
    if name == "fp8_block":
        return numel + 4 * -(-rows // 128) * -(-columns // 128)
    if name == "int8":
        return numel + 2 * rows
    if name == "fp8":
        return numel + 4 * rows
    if name == "nvfp4":
        return -(-numel // 2) + rows * (-(-columns // 16) + 4)
    if name == "mxfp4":
        return -(-numel // 2) + rows * (-(-columns // 32) + 4)
    assert name.startswith("int4"), scheme
    group = int(name.removeprefix("int4").removeprefix("-g") or 32)
    return -(-numel // 2) + rows * -(-columns // group) * 4


def expected_tensors(shape: ModelShape, dtype_bytes: int) -> dict[str, Tensor]:
    """The tensors that a model of this shape has, where no weights are there to be counted."""
    sizes = dict(_encoder(shape) if shape.bidirectional else _decoder(shape))
    dtype = {4: "F32", 2: "BF16"}.get(dtype_bytes, "BF16")
    return {name: Tensor(size, dtype, math.prod(size) * dtype_bytes) for name, size in sizes.items()}


Sizes = Iterator[tuple[str, tuple[int, ...]]]


def _decoder(shape: ModelShape) -> Sizes:
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield from _attention(shape, f"{prefix}.self_attn")
        if shape.experts and layer >= shape.dense_layers:
            yield from _experts(shape, f"{prefix}.mlp")
        else:
            yield from _mlp(shape, f"{prefix}.mlp", shape.intermediate)
        feed = ("pre_feedforward", "post_feedforward") if shape.sandwich else ()
        for place in ("input", "post_attention", *feed):
            yield f"{prefix}.{place}_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied and not shape.encoder:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def _attention(shape: ModelShape, prefix: str) -> Sizes:
    if shape.latent:
        yield from _latent_attention(shape, prefix)
        return
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{prefix}.{name}_proj.weight", (rows, shape.hidden)
        if shape.qkv_bias:
            yield f"{prefix}.{name}_proj.bias", (rows,)
    yield f"{prefix}.o_proj.weight", (shape.hidden, queries)
    if shape.qk_norm:
        yield f"{prefix}.q_norm.weight", (shape.head_dim,)
        yield f"{prefix}.k_norm.weight", (shape.head_dim,)


def _latent_attention(shape: ModelShape, prefix: str) -> Sizes:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    queries = shape.heads * (shape.nope_dim + shape.rope_dim)
    rank = shape.latent - shape.rope_dim
    if shape.q_rank:
        yield f"{prefix}.q_a_proj.weight", (shape.q_rank, shape.hidden)
        yield f"{prefix}.q_a_layernorm.weight", (shape.q_rank,)
    yield f"{prefix}.q_b_proj.weight", (queries, shape.q_rank or shape.hidden)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (shape.latent, shape.hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (rank,)
    yield f"{prefix}.kv_b_proj.weight", (shape.heads * (shape.nope_dim + shape.value_dim), rank)
    yield f"{prefix}.o_proj.weight", (shape.hidden, shape.heads * shape.value_dim)


def _mlp(shape: ModelShape, prefix: str, size: int) -> Sizes:
    for name in ("gate", "up") if shape.gated else ("up",):
        yield f"{prefix}.{name}_proj.weight", (size, shape.hidden)
    yield f"{prefix}.down_proj.weight", (shape.hidden, size)


def _experts(shape: ModelShape, prefix: str) -> Sizes:
    yield f"{prefix}.gate.weight", (shape.experts, shape.hidden)
    yield f"{prefix}.experts.gate_up_proj", (shape.experts, 2 * shape.expert_size, shape.hidden)
    yield f"{prefix}.experts.down_proj", (shape.experts, shape.hidden, shape.expert_size)
    if shape.shared_expert_size:
        yield from _mlp(shape, f"{prefix}.shared_expert", shape.shared_expert_size)


def _encoder(shape: ModelShape) -> Sizes:
    yield "embeddings.word_embeddings.weight", (shape.vocab, shape.hidden)
    yield "embeddings.position_embeddings.weight", (shape.context, shape.hidden)
    yield "embeddings.token_type_embeddings.weight", (2, shape.hidden)
    yield from _norm("embeddings.LayerNorm", shape.hidden)
    for layer in range(shape.layers):
        prefix = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            yield from _biased(f"{prefix}.attention.self.{name}", shape.hidden, shape.hidden)
        yield from _biased(f"{prefix}.attention.output.dense", shape.hidden, shape.hidden)
        yield from _norm(f"{prefix}.attention.output.LayerNorm", shape.hidden)
        yield from _biased(f"{prefix}.intermediate.dense", shape.intermediate, shape.hidden)
        yield from _biased(f"{prefix}.output.dense", shape.hidden, shape.intermediate)
        yield from _norm(f"{prefix}.output.LayerNorm", shape.hidden)


def _biased(name: str, rows: int, columns: int) -> Sizes:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _norm(name: str, size: int) -> Sizes:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)
