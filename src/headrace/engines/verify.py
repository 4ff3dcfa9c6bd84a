"""Is a set-up as good as the 16-bit model? Measured on text, and looked up in the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from headrace.checkpoints.base import Checkpoint
from headrace.config.spec import EngineSpec
from headrace.engines.audits import PLAIN, Bits, audits, is_packed, stored_bits
from headrace.engines.build import choose_device, choose_dtype
from headrace.engines.layer_errors import LayerErrors
from headrace.engines.quality import Measured, save_measured
from headrace.engines.scoring import piecewise_logits
from headrace.engines.weights import kv_dtype, load_weights, open_weights
from headrace.errors import ConfigError
from headrace.kernels.attention.fp4 import FP4
from headrace.models.decoder import DecoderModel
from headrace.quantization.audit import MatrixError
from headrace.quantization.containers import QuantizedCheckpoint

__all__ = ["DEFAULT_LIMITS", "Limits", "Report", "compare", "verify"]

_MIN_TOKENS = 64


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
        perplexity, reference_perplexity: of the texts.
        layer_errors: relative error of the residual stream after each layer, on the reference's own inputs to the
            model.
        matrices: of quantized matrices whose 16-bit weights were there to compare with.
        problems: what is beyond the limits, as sentences; empty: passed.
    """

    setup: str
    reference: str
    tokens: int
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    layer_errors: tuple[float, ...] = ()
    matrices: tuple[MatrixError, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems


def verify(
    spec: EngineSpec,
    tokenize: Callable[[Checkpoint], Sequence[list[int]]],
    *,
    reference: EngineSpec | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Report:
    """Load a set-up and its reference, and compare them; what is found is kept for ``spec.quality``.

    Args:
        tokenize: the texts in the tokens of the checkpoint.
        reference: what to compare with; None: the same checkpoint, unquantized where it can be, in float32 on a
            CPU and 16 bits on a GPU, with a cache of that type.

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
    report = compare(model, own, tokenize(checkpoint), cache, base_dtype, device, limits, bits)
    report = msgspec.structs.replace(
        report,
        setup=_describe(spec, checkpoint, dtype, cache),
        reference=_describe(base, base_checkpoint, base_dtype, base_dtype),
    )
    defects = tuple(problem for problem in report.problems if "pieces are not" in problem)
    kept = Measured(setup=report.setup, mean_kl=report.mean_kl, top1=report.top1, defects=defects)
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
) -> Report:
    """Run both over the texts and audit the weights of ``model`` against those of ``reference``.

    Args:
        bits: that matrices of ``model`` had on disk, where they were dequantized as they were loaded.
    """
    texts = [ids for ids in texts if len(ids) > 1]
    if sum(map(len, texts)) < _MIN_TOKENS:
        raise ConfigError(f"the texts have {sum(map(len, texts))} tokens; at least {_MIN_TOKENS} are needed")
    kl, same, losses, base_losses = [], [], [], []
    layers = LayerErrors(model.layers, reference.layers)
    with layers:
        for ids in texts:
            mine = piecewise_logits(model, ids, cache_dtype, device)
            other = piecewise_logits(reference, ids, reference_cache_dtype, device)
            at = 0
            for got, wanted in zip(mine, other, strict=True):
                layers.settle()
                p, q = got.log_softmax(-1), wanted.log_softmax(-1)
                kl.append((q.exp() * (q - p)).sum(-1).cpu())
                same.append((p.argmax(-1) == q.argmax(-1)).cpu())
                targets = torch.tensor(ids[at + 1 : at + 1 + len(got)], device=device)[:, None]
                losses.append(-p[: len(targets)].gather(1, targets).squeeze(1).cpu())
                base_losses.append(-q[: len(targets)].gather(1, targets).squeeze(1).cpu())
                at += len(got)
    divergence = torch.cat(kl).nan_to_num(nan=torch.inf)
    report = Report(
        setup="",
        reference="",
        tokens=len(divergence),
        mean_kl=float(divergence.mean()),
        p99_kl=float(divergence.sort().values[int(0.99 * (len(divergence) - 1))]),
        max_kl=float(divergence.max()),
        top1=float(torch.cat(same).float().mean()),
        perplexity=_perplexity(losses),
        reference_perplexity=_perplexity(base_losses),
        layer_errors=layers.means(),
        matrices=tuple(audits(model, reference, bits)),
    )
    return msgspec.structs.replace(report, problems=tuple(_problems(report, limits)))


def _perplexity(losses: list[Tensor]) -> float:
    mean = float(torch.cat(losses).double().mean())
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
        if matrix.where is not None:
            row, column = matrix.where
            yield (
                f"{matrix.name}: {matrix.bad_pieces} pieces are not the reference's rounded (worst off by "
                f"{matrix.worst:.2f} of itself), the first at row {row}, column {column}: a wrong scale, order or "
                "block"
            )


def _describe(spec: EngineSpec, checkpoint: Checkpoint, dtype: torch.dtype, cache: torch.dtype) -> str:
    form = spec.quantization or (checkpoint.label if isinstance(checkpoint, QuantizedCheckpoint) else "")
    names = ("fp4" if kind is FP4 else str(kind).removeprefix("torch.") for kind in (dtype, cache))
    return "{}: {}{}, cache {}".format(spec.name, form + ", " if form else "", *names)
