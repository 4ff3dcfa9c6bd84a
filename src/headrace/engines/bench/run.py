"""What `headrace bench` does: a core, its cases, and a profile of each if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headrace.config.spec import EngineSpec
from headrace.engines.bench.cases import Case, Measurement, measure
from headrace.engines.bench.cores import build_core, random_model, read_shape
from headrace.engines.bench.floors import Work, ceilings, device_name
from headrace.engines.bench.profile import WindowProfiler
from headrace.engines.bench.report import summary
from headrace.engines.build import build
from headrace.engines.choices import choose_device
from headrace.engines.generate import GenerateCore
from headrace.engines.weights import kv_dtype
from headrace.errors import ConfigError
from headrace.models.decoder import DecoderModel

__all__ = ["Bench", "Result"]

_STEP_TOKENS = {"cuda": 8192, "cpu": 512}


@dataclass(slots=True)
class Result:
    """A case, measured; with a profile also its page and its files."""

    title: str
    measured: Measurement
    floor_seconds: float | None
    page: str = ""
    files: list[Path] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        least = self.floor_seconds
        return {
            "setup": self.title,
            **self.measured.as_dict(),
            "floor_seconds": None if least is None else round(least, 5),
            "floor_share": None if least is None else round(least / self.measured.seconds, 4),
        }


class Bench:
    """A core that cases are run through.

    Args:
        title: model, precision, device.
        vocab: ids below this are prompts.
    """

    def __init__(self, core: GenerateCore, title: str, vocab: int) -> None:
        self.core, self.title, self.vocab = core, title, vocab
        self.rates = ceilings() if core.runner.device.type == "cuda" else None
        model = core.runner.model
        self.work = Work.of(model, core.runner.caches) if isinstance(model, DecoderModel) else None

    @classmethod
    def random(cls, spec: EngineSpec, shape: str, cases: Sequence[Case]) -> Bench:
        """Random weights of a shape; the cache holds each of the cases."""
        device = choose_device(spec)
        auto = "bfloat16" if device.type == "cuda" else "float32"
        name = auto if spec.dtype == "auto" else spec.dtype
        model = random_model(
            read_shape(shape), dtype=getattr(torch, name), device=device, quantization=spec.quantization
        )
        cache = kv_dtype(spec, None, model.config, getattr(torch, name))
        core = build_core(
            model, cases, eager=spec.eager, cache=cache,
            step_tokens=spec.max_num_batched_tokens or _STEP_TOKENS[device.type],
        )  # fmt: skip
        return cls(core, _title(shape, spec.quantization or name, device), model.config.vocab_size)

    @classmethod
    def load(cls, spec: EngineSpec, cases: Sequence[Case]) -> Bench:
        """A real model, as it is served. Raises ConfigError for one that does not generate or a case too long."""
        core, ready = build(spec)
        if not isinstance(core, GenerateCore):
            core.close()
            raise ConfigError(f"{spec.model} is an encoder; only generation is measured here", param="model")
        longest = max(case.inputs + case.outputs for case in cases)
        if longest > ready.max_model_len:
            core.close()
            raise ConfigError(
                f"a case has {longest} tokens; {spec.model} serves {ready.max_model_len}", param="cases"
            )
        precision = spec.quantization or str(ready.summary["dtype"])
        return cls(core, _title(spec.name, precision, core.runner.device), ready.vocab_size)

    def run(
        self,
        case: Case,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        folder: Path | None = None,
        limit: int = 16,
    ) -> Result:
        """Warm up, measure, and with ``folder`` run once more under the profiler for ``limit`` steps a window."""
        self.warm_up(case, temperature)
        measured = measure(self.core, case, self.vocab, seed=seed, temperature=temperature)
        known = self.work is not None and self.rates is not None
        least = self.work.case_seconds(case, self.rates) if known else None  # type: ignore[union-attr, arg-type]
        result = Result(self.title, measured, least)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            profiler = WindowProfiler(self.core, folder, limit=limit, case=case)
            measure(
                self.core, case, self.vocab, seed=seed + 1, temperature=temperature, on_step=profiler.on_step
            )
            profiler.close()
            result.page = summary(self.title, measured, profiler.windows, self.work, self.rates)
            (folder / "summary.txt").write_text(result.page)
            result.files = sorted(folder.iterdir())
        return result

    def warm_up(self, case: Case, temperature: float = 0.0) -> None:
        """Compile and capture what the case needs: a run of it meets all the sizes of its steps."""
        measure(self.core, case, self.vocab, seed=-1, temperature=temperature)

    def close(self) -> None:
        """Stop the core's threads."""
        self.core.close()


def _title(model: str, precision: str, device: torch.device) -> str:
    where = device_name() if device.type == "cuda" else f"device = {device.type}"
    return f"{model} in {precision} on {where}"
