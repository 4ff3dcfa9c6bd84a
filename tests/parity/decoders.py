"""Shared runner: one tiny random transformers model and our decoder with its weights."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from headrace.layers.packed import AttentionBatch, LayerCache, PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.models.loading import load_decoder

BLOCK = 4


class DictSource:
    """Weights of a state dict."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Iterable[str]:
        return list(self.tensors)

    def load(self, name: str) -> Tensor:
        return self.tensors[name]


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part of the model shows in the logits; norms and biases not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.dim() > 1:
            tensor.data.normal_(0, 0.4 / tensor.shape[-1] ** 0.25, generator=generator)
        elif name.endswith("bias"):
            tensor.data.normal_(0, 0.3, generator=generator)
        else:
            tensor.data.add_(torch.randn(tensor.shape, generator=generator) * 0.2)


@dataclass
class Pair:
    """A transformers model and ours with the same weights."""

    reference: Any
    model: DecoderModel


def stored(reference: Any) -> dict[str, Tensor]:
    """A transformers model's tensors by the names of its files, which differ from those in memory for experts."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def make_pair(hf_config: Any, model_class: Any, seed: int = 0, *, from_files: bool = False) -> Pair:
    """Build both, through `config.json` as transformers writes it.

    Args:
        from_files: names and shapes of tensors are those of saved files, not those in memory.
    """
    torch.manual_seed(seed)
    hf_config._attn_implementation = "eager"
    reference = model_class(hf_config).eval()
    randomize(reference, seed)
    reference.tie_weights()
    reference.config.architectures = [model_class.__name__]
    tensors = stored(reference) if from_files else dict(reference.state_dict())
    config = reference.config.to_dict()
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return Pair(reference, load_decoder(config, DictSource(tensors), dtype=torch.float32, device="cpu"))


@torch.inference_mode()
def reference_logits(pair: Pair, prompts: list[list[int]]) -> list[Tensor]:
    """Logits (or hidden states of headless models) of each prompt alone, [len, V]."""
    outputs = []
    for ids in prompts:
        out = pair.reference(torch.tensor([ids]), use_cache=False)
        outputs.append((out.logits if hasattr(out, "logits") else out.last_hidden_state)[0])
    return outputs


def our_logits(
    model: DecoderModel, prompts: list[list[int]], chunk: int | None, seed: int = 0
) -> list[Tensor]:
    """The same of our decoder, all prompts packed; ``chunk`` tokens of each a step, None: no cache at all."""
    score = (lambda hidden: hidden) if model.config.headless else model.logits
    if chunk is None:
        lens = [len(ids) for ids in prompts]
        batch = PackedBatch.for_encoding(prompts, causal=model.config.causal)
        return list(score(model(batch)).split(lens))
    pool = Pool(model, prompts, seed)
    results: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while any(d < len(ids) for d, ids in zip(done, prompts)):
        # A different chunk for every sequence, so that single tokens and longer pieces share a step.
        take = {
            i: min(chunk + (i % 2 if chunk > 1 else 0), len(ids) - done[i]) for i, ids in enumerate(prompts)
        }
        live = [i for i, n in take.items() if n > 0]
        batch = pool.batch(live, [done[i] for i in live], [take[i] for i in live])
        logits = score(model(batch)).split([take[i] for i in live])
        for i, part in zip(live, logits):
            results[i].append(part)
            done[i] += take[i]
    return [torch.cat(parts) for parts in results]


class Pool:
    """Paged caches with shuffled blocks, poisoned with NaN so that a stray read shows."""

    def __init__(
        self, model: DecoderModel, prompts: list[list[int]], seed: int, *, shuffle: bool = True
    ) -> None:
        self.prompts = prompts
        counts = [-(-len(ids) // BLOCK) for ids in prompts]
        ids = list(range(sum(counts) + 3))
        if shuffle:
            random.Random(seed).shuffle(ids)
        self.blocks = [[ids.pop() for _ in range(count)] for count in counts]
        if not shuffle:
            self.blocks = [sorted(blocks) for blocks in self.blocks]
        self.caches = [
            LayerCache(*(torch.full((sum(counts) + 3, BLOCK, heads, dim), torch.nan) for _ in "kv"))
            for heads, dim, _ in model.kv_layout
        ]

    def batch(self, live: list[int], done: list[int], take: list[int]) -> PackedBatch:
        """The next ``take`` tokens of these prompts."""
        ids, positions, slots = [], [], []
        for i, start, count in zip(live, done, take):
            span = range(start, start + count)
            ids += self.prompts[i][start : start + count]
            positions += span
            slots += [self.blocks[i][p // BLOCK] * BLOCK + p % BLOCK for p in span]
        blocks = [self.blocks[i] for i in live]
        width = max(map(len, blocks))
        seq_lens = [start + count for start, count in zip(done, take)]
        attention = AttentionBatch(
            query_starts=torch.tensor([0, *take], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_tables=torch.tensor([b + [0] * (width - len(b)) for b in blocks], dtype=torch.int32),
            slots=torch.tensor(slots),
            caches=self.caches,
            max_query_len=max(take),
            max_seq_len=max(seq_lens),
            host_query_lens=take,
            host_seq_lens=seq_lens,
            host_blocks=blocks,
        )
        lens = torch.tensor([len(self.prompts[i]) for i, count in zip(live, take) for _ in range(count)])
        return PackedBatch(torch.tensor(ids), torch.tensor(positions), attention, rope_lens=lens)


def random_prompts(vocab: int, lens: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lens]


def max_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Over all prompts; NaN if any number is."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max())
