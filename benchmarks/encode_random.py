"""Embeddings from token ids, random weights of a real shape made on the device: the engine's own rate.

    python -m benchmarks.encode --shapes bge-large qwen3-embedding-0.6b --record

A case is texts x tokens (`2048x512`), or `2048x16..512` for lengths drawn evenly. All requests are added at
once; the clock runs from there to the last unit vector on the host, after a warm-up of the same case, best of the
runs. One text alone is `latency_ms`, the median of many. The floor takes products and attention at the rate of
cuBLAS and every batch's weights at the copy rate, whichever is slower.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch

from benchmarks.common import Recorder, ceilings, model_config
from headrace.config.plan.memory import CUDA_ENCODE_TOKENS
from headrace.engines.encode import EncodeCore
from headrace.execution.encode_runner import EncodeRunner
from headrace.kernels.rounding import Format
from headrace.models.decoder import DecoderModel
from headrace.models.encode_backbone import Backbone
from headrace.models.encode_card import EncodeCard, ModuleSpec
from headrace.models.encode_eight_bits import EightBits, round_to_eight_bits
from headrace.models.encode_model import EncodeModel
from headrace.models.encoder_families import encoder_family, read_encoder_config
from headrace.models.encoder_weights import random_encoder
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.types import EncodeParams, EncodeTask, Request

CASES = ["1x16", "2048x512", "2048x128", "4096x32", "2048x16..512"]


def random_model(
    name: str, device: torch.device, dtype: torch.dtype | None = None, eight_bits: Format | None = None
) -> EncodeModel:
    """Encoders in float16 with their first token's vector, decoders in bfloat16 with their last one's."""
    config = model_config(name)
    bert = config.get("model_type") == "bert"
    dtype = dtype or (torch.float16 if bert else torch.bfloat16)
    module: torch.nn.Module
    if bert:
        shape: Any = read_encoder_config(config, encoder_family(config))
        module = random_encoder(shape, dtype=dtype, device=device)
        longest = shape.max_tokens
    else:
        shape = read_config(config)
        module = random_weights(shape, dtype=dtype, device=device)
        longest = shape.max_position_embeddings
    if eight_bits is not None:
        round_to_eight_bits(module, EightBits(eight_bits))
    normalize = ModuleSpec("normalize", "", shape.hidden_size, shape.hidden_size)
    card = EncodeCard(
        config["architectures"][0], "embed", (EncodeTask.EMBED, EncodeTask.EMBED_ALL),
        pooling=("cls",) if bert else ("last",), modules=(normalize,),
    )  # fmt: skip
    backbone = Backbone(module, shape.vocab_size, shape.hidden_size, longest, not bert, "", "", 1e-6)
    return EncodeModel(card, backbone).eval()


def lengths_of(case: str) -> list[int]:
    """Of the texts of a case."""
    count, _, tokens = case.partition("x")
    low, _, high = tokens.partition("..")
    draw = random.Random(7)
    return [draw.randint(int(low), int(high or low)) for _ in range(int(count))]


class Case:
    """One model's core and the requests of one case."""

    def __init__(self, core: EncodeCore[EncodeRunner], lengths: list[int]) -> None:
        self.core, self.lengths = core, lengths
        draw = random.Random(len(lengths))
        vocab = core.runner.vocab_size
        self.ids = [tuple(draw.choices(range(vocab), k=length)) for length in lengths]
        self.params = EncodeParams(normalize=True)

    def seconds(self) -> float:
        """From requests to all vectors."""
        requests = [Request(id=str(i), token_ids=ids, encode=self.params) for i, ids in enumerate(self.ids)]
        began = time.perf_counter()
        self.core.add(requests)
        seen = 0
        while self.core.has_work():
            for output in self.core.step():
                if output.error:
                    raise RuntimeError(output.error)
                seen += 1
        seconds = time.perf_counter() - began
        if seen != len(requests):
            raise RuntimeError(f"{seen} vectors came out, expected {len(requests)}")
        return seconds


def floor_seconds(model: EncodeModel, lengths: list[int], batch_tokens: int) -> float | None:
    """The least time for texts of these lengths on this device."""
    rates = ceilings()
    if rates is None:
        return None
    bandwidth, flops = rates
    backbone = model.backbone
    config: Any = backbone.config
    weights = sum(
        module.in_features * module.out_features
        for module in backbone.layers.modules()  # type: ignore[union-attr]
        if hasattr(module, "in_features")  # packed weights have other shapes, or none
    )
    seen = 0.5 if isinstance(backbone, DecoderModel) and model.causal else 1.0
    pairs = seen * sum(length * length for length in lengths)
    work = 2 * weights * sum(lengths) + 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    batches = -(-sum(lengths) // batch_tokens)
    return max(work / flops, batches * 2 * weights / bandwidth)


def measure(record: Recorder, args: Any) -> None:
    """A row a shape and case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in args.shapes:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = random_model(name, device, dtype, eight_bits=args.eight_bits)
        runner = EncodeRunner(model, device)
        tokens = args.batch_tokens or CUDA_ENCODE_TOKENS
        core = EncodeCore(
            runner, max_tokens=tokens, max_seqs=args.max_num_seqs, overlap=device.type == "cuda"
        )
        precision = args.eight_bits or str(next(model.parameters()).dtype).removeprefix("torch.")
        for case in args.cases or CASES:
            lengths = lengths_of(case)
            work = Case(core, lengths)
            work.seconds()
            floor = floor_seconds(model, lengths, tokens)
            common: dict[str, Any] = {"model": name, "precision": precision, "case": case}
            if len(lengths) == 1:
                times = [work.seconds() for _ in range(args.latency_runs)]
                record.row(
                    **common, metric="latency_ms", value=statistics.median(times) * 1e3,
                    floor=None if floor is None else floor * 1e3,
                )  # fmt: skip
                continue
            best = min(work.seconds() for _ in range(args.runs))
            record.row(
                **common, metric="embeddings_s", value=len(lengths) / best,
                floor=None if floor is None else len(lengths) / floor, tokens_s=round(sum(lengths) / best),
            )  # fmt: skip
        del model, runner, core, work
