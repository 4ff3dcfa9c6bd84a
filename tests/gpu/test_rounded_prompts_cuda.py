"""FP8 prompts: norms and gates that round the rows they make give the same numbers as rounding on its own."""

from __future__ import annotations

import pytest
import torch

from headrace.engines.bench.cores import random_model
from headrace.kernels.launch import supports_pdl
from headrace.layers.packed import AttentionBatch, PackedBatch
from headrace.quantization.scaled import ScaledLinear

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not supports_pdl(CUDA), reason="needs a GPU with FP8 products"
    ),
]
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 640, "head_dim": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.mark.parametrize("tokens", [65, 300])
def test_same_numbers(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG, dtype=torch.bfloat16, device=CUDA, quantization="fp8")
    ids = torch.randint(0, 512, (tokens,), device=CUDA, generator=torch.Generator("cuda").manual_seed(1))
    positions = torch.arange(tokens, device=CUDA)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=CUDA)
    lens = starts[1:].clone()
    taken: list[int] = []
    takes = ScaledLinear.takes_rounded
    monkeypatch.setattr(ScaledLinear, "takes_rounded", lambda self, x: taken.append(1) or takes(self, x))

    def run() -> torch.Tensor:
        attention = AttentionBatch(starts, lens, max_query_len=tokens, max_seq_len=tokens, fresh=True)
        return model(PackedBatch(ids, positions, attention))

    fused = run()
    assert taken and all(takes(m, fused) for m in model.modules() if isinstance(m, ScaledLinear))
    monkeypatch.setattr(ScaledLinear, "takes_rounded", lambda *_: False)
    apart = run()
    assert fused.isfinite().all() and torch.equal(fused, apart)
