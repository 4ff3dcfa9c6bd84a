"""Is a set-up of an embedder, classifier or reranker as good as the unquantized model?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from headrace.checkpoints.base import Checkpoint
from headrace.config.spec import EngineSpec
from headrace.engines.audits import PLAIN, Bits, audits, fitted_groups, is_packed, stored_bits
from headrace.engines.choices import choose_device, choose_encode_dtype
from headrace.engines.encode_build import load_encode
from headrace.engines.layer_errors import LayerErrors
from headrace.engines.quality import MAX_DIFFERENCE, Measured, blind_spots, describe, save_measured, too_small
from headrace.engines.same_model import unlike_reference
from headrace.engines.texts import Row
from headrace.engines.weights import open_weights
from headrace.errors import ConfigError
from headrace.execution.encode_runner import EncodeRunner
from headrace.models.encode_model import EncodeModel
from headrace.quantization.audit import MatrixError
from headrace.text.encoding import Encoded, EncodeText, Truncate
from headrace.text.tokenizer import Tokenizer
from headrace.types import EncodeOutput, EncodeParams, EncodeTask, Request

__all__ = [
    "DEFAULT_ENCODE_LIMITS",
    "Change",
    "EncodeLimits",
    "EncodeReport",
    "compare_encoders",
    "encode_inputs",
    "verify_encode",
]

Array = npt.NDArray[np.float32]

_MIN_INPUTS = 4
_BATCH = 16  # inputs of one pass
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_PROBABILITIES = (EncodeTask.CLASSIFY, EncodeTask.SCORE, EncodeTask.TOKEN_CLASSIFY)


class EncodeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a set-up may differ by.

    Attributes:
        min_cosine: least cosine of any pooled or sparse vector with the reference's; of vectors for single
            tokens (ColBERT), the mean.
        max_difference: of any probability or score from the reference's.
    """

    min_cosine: float = 0.999
    max_difference: float = MAX_DIFFERENCE


DEFAULT_ENCODE_LIMITS = EncodeLimits()


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one kind of result.

    Attributes:
        task: see EncodeTask.
        results: vectors, or rows of probabilities, that were compared.
        mean_cosine, min_cosine: of vectors.
        max_difference: of probabilities.
        same_label: share of rows in which the likeliest label is the same; None where there is one label.
    """

    task: str
    results: int
    mean_cosine: float | None = None
    min_cosine: float | None = None
    max_difference: float | None = None
    same_label: float | None = None


class EncodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison with the reference.

    Attributes:
        setup, reference: for people.
        inputs, tokens: that were compared.
        changes: one for each kind of result.
        layer_errors: relative error of the hidden states after each layer.
        matrices: of quantized matrices whose unquantized weights were there to compare with.
        problems: what is beyond the limits, as sentences; empty: passed.
        notes: what this comparison cannot see, and whether it is too small for ``quality``, as sentences.
    """

    setup: str
    reference: str
    inputs: int
    tokens: int
    changes: tuple[Change, ...]
    layer_errors: tuple[float, ...] = ()
    matrices: tuple[MatrixError, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems


def verify_encode(
    spec: EngineSpec,
    rows: Sequence[Row],
    max_tokens: int,
    *,
    reference: EngineSpec | None = None,
    limits: EncodeLimits = DEFAULT_ENCODE_LIMITS,
) -> EncodeReport:
    """Load a set-up and its reference, and compare them; what is found is kept for ``spec.quality``.

    Args:
        rows, max_tokens: texts, and how much of each is used.
        reference: what to compare with; None: the same checkpoint, unquantized where it can be, in float32 on a
            CPU and 16 bits on a GPU.

    Raises ModelError or ConfigError, also when the set-up is the reference.
    """
    device = choose_device(spec)
    checkpoint = open_weights(spec)
    dtype = choose_encode_dtype(spec, checkpoint, device)
    base = reference or msgspec.structs.replace(spec, quantization="")
    base_checkpoint = open_weights(base)
    base_dtype = torch.float32 if device.type == "cpu" else choose_encode_dtype(base, base_checkpoint, device)
    model = load_encode(spec, checkpoint, device, dtype, any_device=True)
    own = load_encode(base, base_checkpoint, device, base_dtype)
    same = checkpoint.fingerprint == base_checkpoint.fingerprint
    if same and dtype == base_dtype and not any(map(is_packed, model.modules())):
        raise ConfigError(
            f"{spec.name} in {dtype} is the reference itself: nothing is quantized; give --quantization or --dtype",
            param="quantization",
        )
    inputs = encode_inputs(checkpoint, model, rows, max_tokens)
    bits = stored_bits(checkpoint, decoder=False)
    report = compare_encoders(
        model, own, inputs, device, limits, bits, fitted=fitted_groups(checkpoint, decoder=False)
    )
    others = unlike_reference(model, own, checkpoint, base_checkpoint)
    blind, few = blind_spots(checkpoint, base_checkpoint), too_small(report.tokens, report.inputs)
    report = msgspec.structs.replace(
        report,
        setup=describe(spec, checkpoint, dtype),
        reference=describe(base, base_checkpoint, base_dtype),
        notes=(*blind, f"this {few}") if few else blind,
        problems=(*others, *report.problems),
    )
    cosines = [each.min_cosine for each in report.changes if each.min_cosine is not None]
    differences = [each.max_difference for each in report.changes if each.max_difference is not None]
    kept = Measured(
        setup=report.setup,
        tokens=report.tokens,
        inputs=report.inputs,
        min_cosine=min(cosines, default=None),
        max_difference=max(differences, default=None),
        defects=(*others, *(matrix.problem for matrix in report.matrices if matrix.problem)),
    )
    if not blind:
        save_measured(spec, checkpoint, dtype, dtype, kept)
    return report


def encode_inputs(
    checkpoint: Checkpoint, model: EncodeModel, rows: Sequence[Row], max_tokens: int
) -> list[Encoded]:
    """Texts as requests would have them: each row whole, and each of its sentences; for rerankers, pairs of both.

    Of chats, the messages are the texts.
    """
    text = EncodeText(Tokenizer.from_path(checkpoint.path), model.card, model.max_tokens)
    cut = Truncate(limit=max_tokens)
    whole, pairs, found = [], [], []
    for row in rows:
        texts = [row] if isinstance(row, str) else [str(message.get("content", "")) for message in row]
        for one in filter(str.strip, texts):
            sentences = [part for part in _SENTENCE.split(one) if part.strip()]
            whole.append(one)
            found += sentences if len(sentences) > 1 else []
            pairs += [(sentence, one) for sentence in sentences]
    if EncodeTask.SCORE in model.card.tasks:
        return text.pairs(pairs, truncate=cut)
    return text.texts(list(dict.fromkeys(whole + found)), truncate=cut)


def compare_encoders(
    model: EncodeModel,
    reference: EncodeModel,
    inputs: Sequence[Encoded],
    device: torch.device,
    limits: EncodeLimits = DEFAULT_ENCODE_LIMITS,
    bits: Bits = lambda _: PLAIN,
    *,
    fitted: Bits = lambda _: 0,
) -> EncodeReport:
    """Run both over the inputs and audit the weights of ``model`` against those of ``reference``.

    Args:
        bits: that matrices of ``model`` had on disk, where they were dequantized as they were loaded.
        fitted: of a path, see quantization.audit.audit.
    Raises ConfigError for too few inputs, and for a reference that gives no numbers.
    """
    if len(inputs) < _MIN_INPUTS:
        raise ConfigError(f"the texts make {len(inputs)} inputs; at least {_MIN_INPUTS} are needed")
    matrices = tuple(audits(model, reference, bits, fitted=fitted))
    card = reference.card
    tasks = card.tasks if card.kind == "m3" else card.tasks[:1]
    params = EncodeParams(task=tasks[0], also=tuple(tasks[1:]))
    runners = [EncodeRunner(each, device, graphs=False) for each in (model, reference)]
    pairs: dict[EncodeTask, list[tuple[Array, Array]]] = {task: [] for task in tasks}
    layers = LayerErrors(model.backbone.layers, reference.backbone.layers)  # type: ignore[arg-type]
    with layers:
        for start in range(0, len(inputs), _BATCH):
            batch = [
                Request(id=str(i), token_ids=each.ids, token_types=each.types, encode=params)
                for i, each in enumerate(inputs[start : start + _BATCH])
            ]
            ours, theirs = (runner.run(batch) for runner in runners)
            layers.settle()
            for mine, other in zip(ours, theirs, strict=True):
                if other.error:
                    raise ConfigError(f"the reference fails: {other.error}")
                for task, a, b in zip(tasks, _results(mine, len(tasks)), _results(other, len(tasks))):
                    pairs[task].append(_comparable(task, a, b, reference.vocab_size))
    changes = tuple(_change(task, found) for task, found in pairs.items())
    report = EncodeReport(
        setup="",
        reference="",
        inputs=len(inputs),
        tokens=sum(len(each.ids) for each in inputs),
        changes=changes,
        layer_errors=layers.means(),
        matrices=matrices,
    )
    return msgspec.structs.replace(report, problems=tuple(_problems(report, limits)))


def _results(output: EncodeOutput, count: int) -> list[EncodeOutput | None]:
    """Of each task; None where the pass failed (its numbers were not finite)."""
    return [None] * count if output.error else [output, *output.also]


def _comparable(
    task: EncodeTask, mine: EncodeOutput | None, other: EncodeOutput | None, vocab: int
) -> tuple[Array, Array]:
    """Both results as float32 [rows, numbers]; what failed is NaN."""
    assert other is not None
    if task is EncodeTask.SPARSE:
        wanted = _dense(other, vocab)
        return (np.full_like(wanted, np.nan) if mine is None else _dense(mine, vocab)), wanted
    wanted = _rows(other)
    return (np.full_like(wanted, np.nan) if mine is None else _rows(mine)), wanted


def _rows(output: EncodeOutput) -> Array:
    found = np.frombuffer(output.data, "<f4").reshape(output.shape)
    return found.reshape(1, -1) if found.ndim < 2 else found


def _dense(output: EncodeOutput, vocab: int) -> Array:
    found = np.zeros((1, vocab), np.float32)
    found[0, np.frombuffer(output.indices, "<u4")] = np.frombuffer(output.data, "<f4")
    return found


def _change(task: EncodeTask, found: Sequence[tuple[Array, Array]]) -> Change:
    mine, other = (np.concatenate(side).astype(np.float64) for side in zip(*found))
    if task in _PROBABILITIES:
        difference = np.nan_to_num(np.abs(mine - other), nan=np.inf)
        several = other.shape[1] > 1
        same = float((np.nan_to_num(mine).argmax(1) == other.argmax(1)).mean()) if several else None
        return Change(
            task=task.value, results=len(other), max_difference=float(difference.max()), same_label=same
        )
    lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(other, axis=1)
    both_empty = (mine == 0).all(1) & (other == 0).all(1)
    cosine = np.where(both_empty, 1.0, (mine * other).sum(1) / np.maximum(lengths, 1e-30))
    cosine = np.nan_to_num(cosine, nan=-1.0)
    return Change(
        task=task.value, results=len(other), mean_cosine=float(cosine.mean()), min_cosine=float(cosine.min())
    )


def _problems(report: EncodeReport, limits: EncodeLimits) -> Iterator[str]:
    for change in report.changes:
        per_token = change.task == EncodeTask.EMBED_ALL.value
        cosine, which = (change.mean_cosine, "mean") if per_token else (change.min_cosine, "lowest")
        if cosine is not None and not cosine >= limits.min_cosine:
            yield f"{change.task}: the {which} cosine is {cosine:.5f}; the limit is {limits.min_cosine:g}"
        if change.max_difference is not None and not change.max_difference <= limits.max_difference:
            yield (
                f"{change.task}: a probability is off by {change.max_difference:.4f}; the limit is "
                f"{limits.max_difference:g}"
            )
    for matrix in report.matrices:
        if matrix.problem:
            yield matrix.problem
