"""Which engine serves a checkpoint: decided from the checkpoint alone, explained in one sentence. No torch."""

from __future__ import annotations

import re

import msgspec

from headrace.config.plan.facts import Facts
from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError, UnsupportedCheckpoint

__all__ = ["Selection", "select"]

# Families whose attention sees both sides; other names are causal unless config.json says otherwise.
_BIDIRECTIONAL = re.compile(
    r"bert|xlm|mpnet|electra|nomic|^New(Model|For)|GTE|Jina|Ernie|Camembert|XLNet|Funnel|Longformer|BigBird|"
    r"NeoBERT|Bidirectional|T5Encoder|UMT5Encoder",
    re.IGNORECASE,
)
_GENERATE = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
_SPEECH = ("Whisper",)
_ALLOWED = {
    "auto": ("dense", "moe", "embed", "bert", "speech"),
    "decoder": ("dense", "moe"),
    "encoder": ("embed", "bert"),
}


class Selection(msgspec.Struct, frozen=True):
    """The engine and why.

    Attributes:
        engine: ``dense``, ``moe``, ``embed``, ``bert`` or ``speech``.
        reason: one sentence.
    """

    engine: str
    reason: str


def select(facts: Facts, spec: EngineSpec | None = None) -> Selection:
    """Decide, and hold an explicit choice against it.

    Raises:
        UnsupportedCheckpoint: config.json names no architecture.
        ConfigError: the explicit choice is wrong; the message names the right one.
    """
    found = _decide(facts, spec)
    asked = "auto" if spec is None else spec.engine
    if found.engine in _ALLOWED.get(asked, (asked,)):
        return found
    raise ConfigError(
        f"engine: is {asked!r}, but {found.reason}: leave it out, or write {_named(found.engine)}{_way(facts, asked)}",
        param="engine",
    )


def _named(engine: str) -> str:
    hosted = {
        "dense": "decoder",
        "moe": "decoder",
        "embed": "encoder",
        "bert": "encoder_bert",
        "speech": "whisper",
    }
    return f"engine: {engine} (base_model: {hosted[engine]})"


def _way(facts: Facts, asked: str) -> str:
    if asked in ("embed", "encoder") and _GENERATE.search(facts.architecture):
        return "; to embed with it, give --pooling or add 1_Pooling/config.json"
    return ""


def _decide(facts: Facts, spec: EngineSpec | None) -> Selection:
    name = facts.architecture
    if not name:
        raise UnsupportedCheckpoint(
            f'{facts.where}: config.json names no architecture; add "architectures": ["…ForCausalLM"]',
            param="architectures",
        )
    if name.startswith(_SPEECH):
        return Selection("speech", f"{name} turns speech into text")
    asked_pooling = spec is not None and spec.pooling is not None
    pools = facts.has_pooling or asked_pooling
    why = "sentence-transformers' files are there" if facts.has_pooling else "pooling is asked for"
    both_sides = _both_sides(facts)
    if _GENERATE.search(name) and not pools and not both_sides:
        return _generator(facts, name)
    if both_sides:
        return Selection("bert", f"{name} sees both sides of a token ({both_sides}){_head(name)}")
    if pools:
        return Selection("embed", f"{name} is causal, and {why}: it returns vectors")
    return Selection("embed", f"{name} is causal and has no language-model head{_head(name)}")


def _both_sides(facts: Facts) -> str:
    """What says that attention is bidirectional; "" when it is causal."""
    config = facts.text_config
    if config.get("is_causal") is False or config.get("use_bidirectional_attention") in (True, "all"):
        return "config.json says so"
    if config.get("is_decoder") is True and _GENERATE.search(facts.architecture):
        return ""
    return "its family" if _BIDIRECTIONAL.search(facts.architecture) else ""


def _head(name: str) -> str:
    heads = {
        "ForSequenceClassification": ", and classifies texts",
        "ForTokenClassification": ", and labels tokens",
        "ForMaskedLM": ", with a masked language-model head",
    }
    return next((text for ending, text in heads.items() if name.endswith(ending)), "")


def _generator(facts: Facts, name: str) -> Selection:
    config = facts.text_config
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = [config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 1]
    quantized = f", quantized as {facts.quantized.method}" if facts.quantized.method else ""
    if counts:
        return Selection("moe", f"{name} generates text with {counts[0]} experts a layer{quantized}")
    return Selection("dense", f"{name} generates text with one MLP a layer{quantized}")
