"""Every family through the Triton kernels on a GPU: float32 near transformers, bfloat16 no worse than torch's own."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor

from headrace.layers.packed import LayerCache, PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.models.loading import load_decoder
from parity.decoders import DictSource, Pair, Pool, make_pair, random_prompts, reference_logits, stored
from parity.test_families import CASES, IN_FILES, SIZES, VOCAB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENS = [33, 1, 12, 26, 12]


def on_cuda(pair: Pair, dtype: torch.dtype) -> DecoderModel:
    """Our decoder with the pair's weights on the GPU."""
    names = pair.reference.config.architectures[0].startswith(("Mixtral", "GraniteMoe"))
    tensors = stored(pair.reference) if names else dict(pair.reference.state_dict())
    config = pair.reference.config.to_dict()
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return load_decoder(config, DictSource(tensors), dtype=dtype, device="cuda")


def move(batch: PackedBatch, caches: list[LayerCache]) -> PackedBatch:
    attention = batch.attention
    attention.query_starts, attention.seq_lens = attention.query_starts.cuda(), attention.seq_lens.cuda()
    assert attention.block_tables is not None
    assert attention.slots is not None
    attention.block_tables, attention.slots = attention.block_tables.cuda(), attention.slots.cuda()
    attention.caches = caches
    assert batch.rope_lens is not None
    return PackedBatch(
        batch.token_ids.cuda(), batch.positions.cuda(), attention, rope_lens=batch.rope_lens.cuda()
    )


@torch.inference_mode()
def run(model: DecoderModel, prompts: list[list[int]], chunk: int) -> Tensor:
    """Logits of all prompts, chunk by chunk over a paged cache poisoned with NaN, float32 on the CPU."""
    dtype = model.embed.weight.dtype
    pool = Pool(model, prompts, 0)
    caches = [LayerCache(c.k.to("cuda", dtype), c.v.to("cuda", dtype)) for c in pool.caches]
    score = (lambda hidden: hidden) if model.config.headless else model.logits
    parts: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while any(d < len(ids) for d, ids in zip(done, prompts)):
        live = [i for i, ids in enumerate(prompts) if done[i] < len(ids)]
        take = [min(chunk, len(prompts[i]) - done[i]) for i in live]
        logits = score(model(move(pool.batch(live, [done[i] for i in live], take), caches)))
        for i, count, part in zip(live, take, logits.float().cpu().split(take)):
            parts[i].append(part)
            done[i] += count
    return torch.cat([torch.cat(p) for p in parts])


def error(found: Tensor, expected: Tensor) -> float:
    """Relative RMS."""
    assert torch.isfinite(found).all()
    return float((found - expected).norm() / expected.norm())


def typical(found: Tensor, expected: Tensor) -> float:
    """Of half of the tokens the error is less. Near ties of a router rounding decides, in any implementation."""
    assert torch.isfinite(found).all()
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).median())


@torch.no_grad()
@pytest.mark.parametrize("name", list(CASES))
def test_logits(name: str) -> None:
    config_name, model_name, changes = CASES[name]
    settings = {**SIZES, **changes}
    config = getattr(hf, f"{config_name}Config")(**settings)
    pair = make_pair(config, getattr(hf, model_name), from_files=name.startswith(IN_FILES))
    prompts = random_prompts(VOCAB, LENS)
    expected = torch.cat(reference_logits(pair, prompts)).float()
    single = on_cuda(pair, torch.float32)
    if not single.config.causal:
        pytest.skip("bidirectional: no cache")
    for chunk in (64, 7, 1):
        assert error(run(single, prompts, chunk), expected) < 2e-3, f"float32, chunks of {chunk}"
    torch_bf16 = pair.reference.to("cuda", torch.bfloat16)
    plain = torch.cat(
        [
            (
                out.logits
                if hasattr(out := torch_bf16(torch.tensor([ids], device="cuda"), use_cache=False), "logits")
                else out.last_hidden_state
            )[0]
            .float()
            .cpu()
            .detach()
            for ids in prompts
        ]
    )
    judge = error if single.config.experts is None else typical
    allowed = 1.3 * judge(plain, expected) + 1e-3
    half = on_cuda(pair, torch.bfloat16)
    for chunk in (64, 7, 1):
        assert judge(run(half, prompts, chunk), expected) < allowed, f"bfloat16, chunks of {chunk}"
