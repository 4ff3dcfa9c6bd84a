"""A decoder over a checkpoint that stores its matrices in blocks: kept packed, it computes what the file says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.checkpoints.base import PackedTensor, TensorInfo
from headrace.checkpoints.gguf_blocks import dequantize
from headrace.config.quantization import TYPES, quantization_type
from headrace.errors import ConfigError, UnsupportedCheckpoint
from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.loading import load_decoder
from headrace.quantization.ggml import PackedEmbedding, PackedHead
from headrace.quantization.linear import JoinedLinear
from headrace.quantization.registry import can_keep, keeps_packed, load_time

CPU = torch.device("cpu")
ERRORS = {
    "int8": 0.03,
    "fp8": 0.15,
    "fp8_mlp_only": 0.15,
    "fp8_block": 0.15,
    "int4": 0.2,
    "nvfp4": 0.4,
    "mxfp4": 0.5,
}


def q8_0(weight: Tensor) -> PackedTensor:
    """Round to ggml's Q8_0."""
    groups = weight.view(-1, 32)
    scale = (groups.abs().amax(1, keepdim=True) / 127).half()
    values = (groups / scale.float()).round().clamp(-127, 127).to(torch.int8)
    raw = torch.cat((scale.view(torch.uint8).view(-1, 2), values.view(torch.uint8)), dim=1)
    return PackedTensor("Q8_0", raw.view(weight.shape[0], -1), tuple(weight.shape))


def q4_0(weight: Tensor) -> PackedTensor:
    """Round to ggml's Q4_0."""
    groups = weight.view(-1, 32)
    scale = (groups.abs().amax(1, keepdim=True) / 7).half()
    codes = ((groups / scale.float()).round().clamp(-8, 7) + 8).to(torch.uint8)
    raw = torch.cat((scale.view(torch.uint8).view(-1, 2), codes[:, :16] | codes[:, 16:] << 4), dim=1)
    return PackedTensor("Q4_0", raw.view(weight.shape[0], -1), tuple(weight.shape))


class Blocks:
    """A checkpoint in memory; matrices of v_proj and the embedding in Q8_0, the others in Q4_0."""

    def __init__(self, tied: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden, inner, heads, kv_heads, dim, vocab = 64, 96, 4, 2, 16, 160
        self.config = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": tied,
            "hidden_act": "silu",
        }
        shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        if not tied:
            shapes["lm_head.weight"] = (vocab, hidden)
        for layer in range(2):
            p = f"model.layers.{layer}."
            for name, rows in (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)):
                shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, hidden)
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{p}self_attn.o_proj.weight"] = (hidden, heads * dim)
            shapes[f"{p}mlp.gate_proj.weight"] = shapes[f"{p}mlp.up_proj.weight"] = (inner, hidden)
            shapes[f"{p}mlp.down_proj.weight"] = (hidden, inner)
            shapes[f"{p}input_layernorm.weight"] = shapes[f"{p}post_attention_layernorm.weight"] = (hidden,)
        self.tensors: dict[str, Tensor | PackedTensor] = {}
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator) * (
                0.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.2
            )
            if len(shape) == 1:
                self.tensors[name] = tensor + 1 if "norm" in name else tensor
            else:
                self.tensors[name] = (q8_0 if "v_proj" in name or "embed" in name else q4_0)(tensor)

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        if isinstance(tensor, PackedTensor):
            return TensorInfo(tensor.shape, tensor.ggml_type, tensor.raw.nbytes)
        return TensorInfo(tuple(tensor.shape), "F32", tensor.nbytes)

    def load(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.tensors[name]
        return dequantize(tensor.raw, tensor.ggml_type, dtype) if isinstance(tensor, PackedTensor) else tensor

    def load_packed(self, name: str) -> PackedTensor:
        tensor = self.tensors[name]
        assert isinstance(tensor, PackedTensor)
        return tensor


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_dense_weights(tied: bool, dtype: torch.dtype) -> None:
    blocks = Blocks(tied)
    dense = load_decoder(blocks.config, blocks, dtype=torch.float32, device="cpu")
    packed = load_decoder(blocks.config, blocks, dtype=dtype, device="cpu", keep_packed=True)
    assert isinstance(packed.embed, PackedEmbedding)
    assert isinstance(packed.head, PackedHead)
    assert isinstance(packed.layers[0].attention.qkv, JoinedLinear)
    assert not any(isinstance(module, Linear) for module in packed.modules())
    batch = PackedBatch.for_encoding([[5, 7, 11, 13, 150], [3, 2, 1]], causal=True)
    expected = dense.logits(dense(batch))
    logits = packed.logits(packed(PackedBatch.for_encoding([[5, 7, 11, 13, 150], [3, 2, 1]], causal=True)))
    assert logits.dtype == torch.float32
    bound = 0.03 * expected.std()
    assert (logits - expected).square().mean().sqrt() < bound
    # A wrong order of rows or halves would be far off: neighbouring rows are unlike.
    assert (logits.roll(1, -1) - expected).square().mean().sqrt() > 10 * bound


def test_shapes_are_checked() -> None:
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    blocks = Blocks(tied=True)
    tensors = blocks.tensors
    changes = [
        (
            {"model.layers.1.mlp.up_proj.weight": q4_0(torch.randn(64, 64))},
            r"up_proj.*\[64, 64\].*\[96, 64\]",
        ),
        # Together they have the rows of q, k and v.
        (
            {f"{q}.weight": tensors[f"{k}.weight"], f"{k}.weight": tensors[f"{q}.weight"]},
            r"q_proj.weight' has shape",
        ),
        ({f"{q}.bias": tensors[f"{k}.bias"], f"{k}.bias": tensors[f"{q}.bias"]}, r"q_proj.bias' has shape"),
    ]
    for change, message in changes:
        blocks.tensors = tensors | change
        with pytest.raises(UnsupportedCheckpoint, match=message):
            load_decoder(blocks.config, blocks, dtype=torch.bfloat16, device="cpu", keep_packed=True)


def test_when_packed_linears_are_chosen() -> None:
    blocks = Blocks(tied=True)
    assert keeps_packed(blocks, torch.bfloat16, CPU) == (torch.backends.cpu.get_cpu_capability() != "DEFAULT")
    assert not keeps_packed(blocks, torch.float32, CPU)
    assert not keeps_packed(blocks, torch.bfloat16, torch.device("cuda"))
    assert not keeps_packed(object(), torch.bfloat16, CPU)
    assert not can_keep(TensorInfo((32,), "Q8_0", 34))
    assert not can_keep(TensorInfo((32, 32), "F16", 2048))


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "fp8_mlp_only", "fp8_block", "nvfp4", "mxfp4"])
def test_quantized_while_loading(scheme: str) -> None:
    blocks = Blocks(tied=False)
    dense = load_decoder(blocks.config, blocks, dtype=torch.float32, device="cpu")
    model = load_decoder(
        blocks.config,
        blocks,
        dtype=torch.bfloat16,
        device="cpu",
        transform=load_time(quantization_type(scheme), CPU),
    )
    dense_left = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    everything = {name for name, module in dense.named_modules() if isinstance(module, Linear)}
    if scheme.startswith("int"):
        assert not dense_left
    elif scheme == "fp8_mlp_only":
        assert dense_left == {name for name in everything if ".mlp." not in name}
    else:
        assert dense_left == {"head"}
    logits, expected = (
        m.logits(m(PackedBatch.for_encoding([[5, 7, 11, 13]], causal=True))) for m in (model, dense)
    )
    assert (logits - expected).square().mean().sqrt() < ERRORS[scheme] * expected.std()


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'int5' is unknown; did you mean .*int8"):
        quantization_type("int5")
    assert set(TYPES) >= {"int8", "int4", "fp8", "fp8_kv", "fp8_mlp_only", "fp4", "fp4_kv", "fp4_mlp_only"}
