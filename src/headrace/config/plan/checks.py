"""Warnings about a checkpoint and how it will be served, from its headers and file names."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.config.plan.facts import Facts
from headrace.config.plan.shape import ModelShape
from headrace.config.quantization import known_harm
from headrace.config.spec import EngineSpec
from headrace.config.support import gaps

__all__ = ["harms", "licence_files", "warnings"]

_LICENCES = ("license", "licence", "notice", "use_policy", "copying")
_ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "mrope", "proportional", "ntk")


def licence_files(facts: Facts) -> tuple[str, ...]:
    """Files at the top level that state terms."""
    return tuple(sorted(name for name in facts.files if name.lower().startswith(_LICENCES)))


def warnings(facts: Facts, shape: ModelShape, spec: EngineSpec, engine: str, dtype: str) -> list[str]:
    """Everything worth a look, as sentences with the way out."""
    parts = (
        facts.quantized.strangers,
        _files(facts, engine, spec),
        _rope(shape),
        _numbers(facts, shape, spec, engine, dtype),
    )
    return [sentence for part in parts for sentence in part]


def _files(facts: Facts, engine: str, spec: EngineSpec) -> Iterator[str]:
    generates = engine in ("dense", "moe")
    if facts.container != "gguf" and facts.files and not licence_files(facts):
        yield "no licence file beside the weights: look up the model's terms before serving it to others"
    if generates and not facts.chat_template and spec.chat_template is None:
        yield "no chat template: /v1/chat/completions will be refused; give one with --chat-template"
    if facts.container == "safetensors" and facts.files and "tokenizer.json" not in facts.files:
        yield "no tokenizer.json: the server needs the fast tokenizer's file"
    pools = engine in ("embed", "bert") and "For" not in facts.architecture.removesuffix("ForMaskedLM")
    if pools and not facts.has_pooling and spec.pooling is None:
        yield "no modules.json and 1_Pooling/config.json: how to pool is unknown; give --pooling"
    if "Classification" in facts.architecture and not isinstance(facts.config.get("id2label"), dict):
        yield "config.json has no id2label: labels would be LABEL_0, LABEL_1, …"
    if facts.container == "config":
        yield "no weights here: sizes follow from config.json alone"


def _rope(shape: ModelShape) -> Iterator[str]:
    rope = shape.rope or {}
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if any(isinstance(value, dict) for value in rope.values()):
        return  # one block a layer type
    if kind not in _ROPES:
        yield f"rope scaling of type {kind!r} is unknown: long prompts may answer nonsense"
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if kind == "yarn" and not original:
        yield "yarn without original_max_position_embeddings: the context before scaling is guessed"
    if not (isinstance(factor, (int, float)) and isinstance(original, int) and shape.context):
        pass
    elif original * factor < shape.context * 0.99:
        yield (
            f"rope scaling reaches {original} x {factor:g} = {original * factor:.0f} tokens, but "
            f"max_position_embeddings is {shape.context}: answers past the first are doubtful"
        )
    if kind == "dynamic":
        yield "dynamic rope scaling: prefixes are shared only between prompts of the same length"


def harms(shape: ModelShape, spec: EngineSpec, engine: str) -> Iterator[str]:
    """What fewer bits are known to cost this model."""
    if spec.quantization:
        encodes = engine in ("embed", "bert")
        harm = known_harm(spec.quantization, layers=shape.layers, hidden=shape.hidden, encodes=encodes)
        if harm:
            yield harm


def _numbers(facts: Facts, shape: ModelShape, spec: EngineSpec, engine: str, dtype: str) -> Iterator[str]:
    for gap, sentence in gaps(spec):
        if gap.blocks:
            yield f"serve will refuse this: {sentence}"
    if dtype == "float16" and facts.architecture.startswith("Gemma"):
        yield "Gemma overflows in float16: use bfloat16 or float32"
    yield from harms(shape, spec, engine)
    if shape.context and spec.max_model_len is None and shape.context > 131_072:
        yield f"the checkpoint allows {shape.context} tokens: set --max-model-len to what requests need"
