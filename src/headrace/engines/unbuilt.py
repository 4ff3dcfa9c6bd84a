"""What an EngineSpec may ask for and no engine does yet: refused by name, never dropped in silence."""

from __future__ import annotations

from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError

__all__ = ["refuse_unbuilt"]


def refuse_unbuilt(spec: EngineSpec) -> None:
    """Raise ConfigError with every setting of ``spec`` that would have no effect on what is served."""
    asked = {
        "speculation": spec.speculation is not None,
        "adapters": bool(spec.adapters),
        "host_kv_bytes": spec.host_kv_bytes > 0,
        "tensor_parallel_size": spec.tensor_parallel_size > 1,
        "pipeline_parallel_size": spec.pipeline_parallel_size > 1,
        "expert_parallel_size": (spec.expert_parallel_size or 1) > 1,
        "chunked_prefill": not spec.chunked_prefill,
        "seed": spec.seed != 0,
        "allow_patterns": bool(spec.allow_patterns),
        "ignore_patterns": bool(spec.ignore_patterns),
        "source": spec.source not in ("auto", "HF", "LOCAL"),
    }
    problems = [
        f"{name} is {getattr(spec, name)!r}; this is not built yet, so the server would run without it: leave it out"
        for name, wanted in asked.items()
        if wanted
    ]
    if spec.engine in ("moe", "speech"):
        problems.append(f"engine is {spec.engine!r}; this engine is not built yet")
    if problems:
        raise ConfigError(problems, param=problems[0].split()[0])
