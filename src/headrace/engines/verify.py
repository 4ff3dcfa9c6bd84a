"""Is a set-up as good as the 16-bit model? Measured on text, and looked up in the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from headrace.checkpoints.base import Checkpoint
from headrace.config.spec import EngineSpec
from headrace.engines.audits import PLAIN, Bits, audits, fitted_groups, is_packed, stored_bits
from headrace.engines.choices import choose_device, choose_dtype
from headrace.engines.layer_errors import LayerErrors
from headrace.engines.quality import Measured, blind_spots, describe, save_measured, too_small
from headrace.engines.same_model import unlike_reference
from headrace.engines.scoring import piecewise_logits
from headrace.engines.weights import kv_dtype, load_weights, open_weights
from headrace.errors import ConfigError
from headrace.models.decoder import DecoderModel
from headrace.quantization.audit import MatrixError

__all__ = ["DEFAULT_LIMITS", "Limits", "Report", "compare", "verify"]

_MIN_TOKENS = 64
NEAR_TIE = 0.1  # nats between the two likeliest tokens


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a set-up may differ by.

    Attributes:
        max_kl: mean Kullback-Leibler divergence of the next-token distributions from the reference's, in nats.
        min_top1: share of positions where the likeliest token is the same.
        max_perplexity_ratio: perplexity over the reference's.
    """

    max_kl: float = 0.05
    min_top1: float = 0.9
    max_perplexity_ratio: float = 1.05


DEFAULT_LIMITS = Limits()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison with the reference.

    Attributes:
        setup, reference: for people.
        tokens: positions compared.
        mean_kl, p99_kl, max_kl: KL(reference || set-up) in nats.
        top1: share of positions with the same likeliest token.
        decided: share of positions where the reference prefers its likeliest token by a tenth (NEAR_TIE); at others
            any rounding may turn the order.
        top1_decided: as top1, of these.
        floor: KL, top1 and top1_decided of the reference's own weights in bfloat16, if that was asked for.
        perplexity, reference_perplexity: of the texts.
        layer_errors: relative error of the residual stream after each layer, on the reference's own inputs to the
            model.
        matrices: of quantized matrices whose 16-bit weights were there to compare with.
        problems: what is beyond the limits, as sentences; empty: passed.
        notes: what this comparison cannot see, and whether it is too small for ``quality``, as sentences.
    """

    setup: str
    reference: str
    tokens: int
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1: float
    decided: float
    top1_decided: float
    perplexity: float
    reference_perplexity: float
    floor: tuple[float, float, float] | None = None
    layer_errors: tuple[float, ...] = ()
    matrices: tuple[MatrixError, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems


def verify(
    spec: EngineSpec,
    tokenize: Callable[[Checkpoint], Sequence[list[int]]],
    *,
    reference: EngineSpec | None = None,
    limits: Limits = DEFAULT_LIMITS,
    floor: bool = False,
) -> Report:
    """Load a set-up and its reference, and compare them; what is found is kept for ``spec.quality``, unless the
    reference is the quantized checkpoint itself.

    Args:
        tokenize: the texts in the tokens of the checkpoint.
        reference: what to compare with; None: the same checkpoint, unquantized where it can be, in float32 on a
            CPU and 16 bits on a GPU, with a cache of that type.
        floor: measure the reference's own weights in bfloat16, too: what no 16-bit model can be better than.

    Raises ModelError or ConfigError, also when the set-up is the reference.
    """
    device = choose_device(spec)
    checkpoint = open_weights(spec)
    dtype = choose_dtype(spec, checkpoint, device, packs=True)
    base = reference or msgspec.structs.replace(spec, quantization="", kv_cache_dtype="auto")
    base_checkpoint = open_weights(base)
    base_dtype = torch.float32 if device.type == "cpu" else choose_dtype(base, base_checkpoint, device)
    model = load_weights(spec, checkpoint, dtype, device, as_stored=True)
    cache = kv_dtype(spec, checkpoint, model.config, dtype)
    own = load_decoder_dense(base, base_checkpoint, base_dtype, device)
    same = checkpoint.fingerprint == base_checkpoint.fingerprint
    if same and cache == base_dtype and dtype == base_dtype and not any(map(is_packed, model.modules())):
        raise ConfigError(
            f"{spec.name} in {dtype} is the reference itself: nothing is quantized, and the cache is {cache}; give "
            "--quantization, --kv-cache-dtype or --dtype",
            param="quantization",
        )
    bits = stored_bits(checkpoint, decoder=True)
    texts = tokenize(checkpoint)
    report = compare(
        model,
        own,
        texts,
        cache,
        base_dtype,
        device,
        limits,
        bits,
        fitted=fitted_groups(checkpoint, decoder=True),
    )
    others = unlike_reference(model, own, checkpoint, base_checkpoint)
    del model
    blind, few = blind_spots(checkpoint, base_checkpoint), too_small(report.tokens)
    report = msgspec.structs.replace(
        report,
        floor=_floor(base, base_checkpoint, own, texts, device) if floor else None,
        setup=describe(spec, checkpoint, dtype, cache),
        reference=describe(base, base_checkpoint, base_dtype, base_dtype),
        notes=(*blind, f"this {few}") if few else blind,
        problems=(*others, *report.problems),
    )
    defects = (*others, *(matrix.problem for matrix in report.matrices if matrix.problem))
    kept = Measured(
        setup=report.setup, tokens=report.tokens, mean_kl=report.mean_kl, top1=report.top1, defects=defects
    )
    if not blind:
        save_measured(spec, checkpoint, dtype, cache, kept)
    return report


def load_decoder_dense(
    spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> DecoderModel:
    """The plain decoder; matrices that are stored in few bits are dequantized."""
    from headrace.models.loading import load_decoder

    return load_decoder(checkpoint.config, checkpoint, dtype=dtype, device=device)


def compare(
    model: DecoderModel,
    reference: DecoderModel,
    texts: Sequence[list[int]],
    cache_dtype: torch.dtype,
    reference_cache_dtype: torch.dtype,
    device: torch.device,
    limits: Limits = DEFAULT_LIMITS,
    bits: Bits = lambda _: PLAIN,
    *,
    fitted: Bits = lambda _: 0,
) -> Report:
    """Run both over the texts and audit the weights of ``model`` against those of ``reference``.

    Args:
        bits: that matrices of ``model`` had on disk, where they were dequantized as they were loaded.
        fitted: of a path, see quantization.audit.audit.
    """
    matrices = tuple(audits(model, reference, bits, fitted=fitted))
    layers = LayerErrors(model.layers, reference.layers)
    with layers:
        found = _distances(
            model, reference, texts, (cache_dtype, reference_cache_dtype), device, layers.settle
        )
    divergence = found.kl
    report = Report(
        setup="",
        reference="",
        tokens=len(divergence),
        mean_kl=float(divergence.mean()),
        p99_kl=float(divergence.sort().values[int(0.99 * (len(divergence) - 1))]),
        max_kl=float(divergence.max()),
        top1=float(found.same.float().mean()),
        decided=float(found.decided.float().mean()),
        top1_decided=found.top1_decided,
        perplexity=_perplexity(found.losses),
        reference_perplexity=_perplexity(found.base_losses),
        layer_errors=layers.means(),
        matrices=matrices,
    )
    return msgspec.structs.replace(report, problems=tuple(_problems(report, limits)))


@dataclass
class _Distances:
    """Of each position.

    Attributes:
        kl: float32 [P], nats; infinite where the set-up gives no numbers.
        same: bool [P], the likeliest token is the same.
        decided: bool [P], the reference prefers its own by NEAR_TIE nats.
        losses, base_losses: of the set-up and the reference, float32, for the text's next tokens.
    """

    kl: Tensor
    same: Tensor
    decided: Tensor
    losses: Tensor
    base_losses: Tensor

    @property
    def top1_decided(self) -> float:
        """Share of decided positions with the same likeliest token."""
        return float((self.same & self.decided).sum() / self.decided.sum().clamp(min=1))


def _distances(
    model: DecoderModel,
    reference: DecoderModel,
    texts: Sequence[list[int]],
    caches: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    settle: Callable[[], None] = lambda: None,
) -> _Distances:
    """Run both over the texts; ``settle`` is called when both have done a piece."""
    texts = [ids for ids in texts if len(ids) > 1]
    if sum(map(len, texts)) < _MIN_TOKENS:
        raise ConfigError(f"the texts have {sum(map(len, texts))} tokens; at least {_MIN_TOKENS} are needed")
    pieces: list[tuple[Tensor, ...]] = []
    for ids in texts:
        mine = piecewise_logits(model, ids, caches[0], device)
        other = piecewise_logits(reference, ids, caches[1], device)
        at = 0
        for got, wanted in zip(mine, other, strict=True):
            settle()
            p, q = got.log_softmax(-1), wanted.log_softmax(-1)
            targets = torch.tensor(ids[at + 1 : at + 1 + len(got)], device=device)[:, None]
            best = q.topk(2, -1).values
            piece = (
                (q.exp() * (q - p)).sum(-1).nan_to_num(nan=torch.inf),
                p.argmax(-1) == q.argmax(-1),
                best[:, 0] - best[:, 1] >= NEAR_TIE,
                -p[: len(targets)].gather(1, targets).squeeze(1),
                -q[: len(targets)].gather(1, targets).squeeze(1),
            )
            pieces.append(tuple(part.cpu() for part in piece))
            at += len(got)
    return _Distances(*(torch.cat(parts) for parts in zip(*pieces)))


def _floor(
    spec: EngineSpec,
    checkpoint: Checkpoint,
    reference: DecoderModel,
    texts: Sequence[list[int]],
    device: torch.device,
) -> tuple[float, float, float]:
    """What bfloat16 alone costs: KL, top1 and top1_decided."""
    if device.type != "cpu":
        raise ConfigError("--floor is for CPUs: here the reference itself is in 16 bits", param="floor")
    plain = load_decoder_dense(spec, checkpoint, torch.bfloat16, device)
    found = _distances(plain, reference, texts, (torch.bfloat16, torch.float32), device)
    return float(found.kl.mean()), float(found.same.float().mean()), found.top1_decided


def _perplexity(losses: Tensor) -> float:
    mean = float(losses.double().mean())
    return math.exp(mean) if mean < 700 else math.inf


def _problems(report: Report, limits: Limits) -> Iterator[str]:
    if not report.mean_kl <= limits.max_kl:
        yield f"mean KL divergence is {report.mean_kl:.4f} nats; the limit is {limits.max_kl:g}"
    if not report.top1 >= limits.min_top1:
        yield f"the likeliest token is the same at {report.top1:.1%} of positions; the limit is {limits.min_top1:.1%}"
    ratio = report.perplexity / report.reference_perplexity
    if not ratio <= limits.max_perplexity_ratio:
        yield (
            f"perplexity is {report.perplexity:.3f}, {ratio:.3f} times the reference's "
            f"{report.reference_perplexity:.3f}; the limit is {limits.max_perplexity_ratio:g} times"
        )
    for matrix in report.matrices:
        if matrix.problem:
            yield matrix.problem
