"""One case a rule: a change to a good configuration that breaks it, and one that just passes."""

from __future__ import annotations

from unit.config.cases.base import BIS, V1, V2, B, C, Case, P, R, build, encoder, look
from unit.config.cases.bis import BIS_CASES
from unit.config.cases.checkpoints import CHECKPOINT_CASES, QUANTIZATION_CASES, SPECULATOR_CASES
from unit.config.cases.cross import CROSS_CASES
from unit.config.cases.rest import REST_CASES
from unit.config.cases.runtime import RUNTIME_CASES, V2_CASES
from unit.config.cases.top import BUILD_CASES, TOP_CASES

__all__ = ["BIS", "CASES", "V1", "V2", "B", "C", "Case", "P", "R", "build", "encoder", "look"]

CASES = [
    *TOP_CASES, *BUILD_CASES, *RUNTIME_CASES, *V2_CASES, *CHECKPOINT_CASES, *QUANTIZATION_CASES,
    *SPECULATOR_CASES, *CROSS_CASES, *REST_CASES, *BIS_CASES,
]  # fmt: skip
