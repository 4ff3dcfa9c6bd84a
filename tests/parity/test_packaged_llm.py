"""The packaged language model's logits equal transformers', on the same weights in float32."""

from __future__ import annotations

import pytest
import torch
import transformers

from headrace.checkpoints.base import Checkpoint
from headrace.models.loading import load_decoder
from parity.decoders import Pair, max_difference, our_logits, reference_logits


@pytest.mark.models
def test_smollm2_logits_equal_transformers(smollm2: Checkpoint) -> None:
    config = transformers.LlamaConfig(**smollm2.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config)
    weights = {name: smollm2.load(name).float() for name in smollm2.names()}
    reference.load_state_dict(weights, strict=False, assign=True)
    reference.tie_weights()
    # What is not a weight was made on the meta device too.
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    pair = Pair(reference.eval(), load_decoder(smollm2.config, smollm2, dtype=torch.float32, device="cpu"))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in (61, 5, 1, 33)]
    expected = reference_logits(pair, prompts)
    assert float(torch.cat(expected).std()) > 1.0
    for chunk in (None, 7, 64):
        assert max_difference(our_logits(pair.model, prompts, chunk), expected) <= 2e-4, f"chunk {chunk}"
