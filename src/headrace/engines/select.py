"""Which loop serves a checkpoint: read from what was asked for and from its files. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from headrace.config.spec import EngineSpec
from headrace.models.encode_card import lists_module

__all__ = ["loop_of"]

_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForRewardModel", "ForMaskedLM", "Model")


def loop_of(spec: EngineSpec, config: Mapping[str, Any], path: Path) -> Literal["generate", "encode"]:
    """The loop for a checkpoint.

    ``spec.engine`` decides if it names one. Else: a checkpoint that pools, classifies or scores (by its
    architecture, by `modules.json`, or because the user said how to pool) encodes; all others generate.
    """
    if spec.engine in ("bert", "embed", "encoder"):
        return "encode"
    if spec.engine in ("dense", "moe", "decoder"):
        return "generate"
    architecture = str((config.get("architectures") or [""])[0])
    if spec.pooling is not None or architecture.endswith(_HEADS) or architecture == "HF_ColBERT":
        return "encode"
    return "encode" if lists_module(path, ("Pooling", "LogitScore", "MultiVectorMask")) else "generate"
