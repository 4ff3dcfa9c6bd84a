"""A plan: what a server will take and reach, before it loads anything."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.config.accelerators import Accelerator
from headrace.config.plan.checks import licence_files, warnings
from headrace.config.plan.facts import Facts
from headrace.config.plan.floors import Floors, floors
from headrace.config.plan.memory import (
    CPU_ENCODE_TOKENS,
    CPU_STEP_TOKENS,
    CUDA_ENCODE_TOKENS,
    CUDA_STEP_TOKENS,
    Budget,
    pool_blocks,
    pool_budget,
    process_bytes,
    shard,
)
from headrace.config.plan.refusals import refusals
from headrace.config.plan.scratch import largest_load, scratch
from headrace.config.plan.shape import ModelShape, read_shape
from headrace.config.plan.weights import KEPT_BLOCKS, KEPT_GROUPS, Weights, packed_format, weigh
from headrace.config.quantization import quantization_type
from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError, DoesNotFit, UnsupportedCheckpoint

__all__ = ["Machine", "Option", "Plan", "draw_plan", "human_bytes"]

_UNKNOWN = 1 << 17  # tokens of a context that config.json says nothing of
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp4": 0.5625}


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What to plan for.

    Attributes:
        memory: bytes of one device.
        gpu: its data; None on a CPU, or when nothing is known of it.
        count: devices.
        packs: a CPU that multiplies with weights of few bits as they are.
        features: of a CPU, as Linux names them; None: not known.
    """

    name: str
    memory: int
    cuda: bool
    gpu: Accelerator | None = None
    count: int = 1
    packs: bool = False
    features: frozenset[str] | None = None


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """Another way to serve the same model, and what it would hold.

    Attributes:
        served: whether this version serves a model so; it plans for several GPUs, and uses one.
    """

    what: str
    weights: int
    fits: bool
    context: int
    tokens: int
    served: bool = True


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. Bytes are of one rank where ``ranks`` is above 1, but for ``weights``.

    Attributes:
        reason: one sentence: why this engine.
        kv_token_bytes: one token of one sequence, on one rank.
        pool_tokens: tokens that the KV pool holds; 0 for encoders.
        max_model_len: the context that will be served.
        largest_context: of one sequence alone.
        batch: sequences of full ``max_model_len`` at once.
        fits: it can start, with the asked context.
        shortage: bytes that are missing on a rank; 0 when it fits.
        estimates: which of the numbers are estimates.
    """

    model: str
    engine: str
    reason: str
    architecture: str
    machine: str
    ranks: int
    dtype: str
    quantization: str
    kv_dtype: str
    weights: Weights
    budget: Budget
    kv_token_bytes: int
    step_tokens: int
    pool_tokens: int
    max_model_len: int
    largest_context: int
    batch: int
    fits: bool
    shortage: int
    floors: Floors | None
    options: tuple[Option, ...] = ()
    warnings: tuple[str, ...] = ()
    licence_files: tuple[str, ...] = ()
    estimates: tuple[str, ...] = ()

    def short(self) -> str:
        """One line for the start of a server."""
        parts = [
            f"{self.engine} ({self.architecture}) on {self.machine}",
            f"{self.parameters_text} parameters in {self.quantization or self.dtype}",
            f"weights {human_bytes(self.weights.total)}",
        ]
        if self.pool_tokens:
            parts.append(
                f"KV {human_bytes(self.kv_token_bytes)} a token, room for {self.pool_tokens:,} tokens"
            )
        parts.append(f"context {self.max_model_len:,}")
        if self.floors is not None and self.floors.token:
            parts.append(f"no faster than {self.floors.single:,.0f} tokens/s alone")
        if not self.fits:
            parts.append(f"DOES NOT FIT: {human_bytes(self.shortage)} too much")
        return ", ".join(parts)

    @property
    def parameters_text(self) -> str:
        count = self.weights.parameters
        return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"

    def check_fits(self) -> None:
        """Raises DoesNotFit, saying what would fit, when the server could not start."""
        if self.fits:
            return
        ways = [option.what for option in self.options if option.fits and option.served]
        later = [option.what for option in self.options if option.fits and not option.served]
        if 0 < self.largest_context < self.max_model_len:
            ways.insert(0, f"max_model_len {self.largest_context}")
        hint = (
            f"; what would fit: {'; '.join(ways[:4])}"
            if ways
            else "; use a larger GPU or a smaller model, or another kv_cache_bytes where it is set"
        )
        hint += f". It would fit {later[0]}, which this version plans and does not serve" if later else ""
        least = self.budget.weights + self.budget.reserve + self.budget.process
        raise DoesNotFit(
            f"{self.model} does not fit {self.machine}: weights {human_bytes(self.budget.weights)}, "
            f"activations and graphs {human_bytes(self.budget.reserve)}, process {human_bytes(self.budget.process)} "
            f"make {human_bytes(least)}, with {self._kv_need()}; usable are {human_bytes(self.budget.usable)} of "
            f"{human_bytes(self.budget.total)}{hint}",
            param="model",
        )

    def _kv_need(self) -> str:
        if not self.kv_token_bytes:
            return "no KV cache"
        need = self.max_model_len * self.kv_token_bytes
        return f"{human_bytes(need)} of KV for one sequence of {self.max_model_len:,} tokens"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        shown["weights"]["total"] = self.weights.total
        return shown


def human_bytes(count: float) -> str:
    """``15.3 GiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class _Layout(msgspec.Struct, frozen=True, kw_only=True):
    """One way to place the model: what varies between a plan and its options.

    Attributes:
        keep_blocks, unpack: see weigh.
    """

    scheme: str
    kv_dtype: str
    ranks: int
    dtype: str
    keep_blocks: bool = False
    unpack: bool = False


def draw_plan(
    spec: EngineSpec, facts: Facts, machine: Machine, *, engine: str, reason: str, prompt: int = 1024
) -> Plan:
    """Plan one model on one machine.

    Args:
        engine: as selected; ``bert`` and ``embed`` keep no KV cache.
        prompt: tokens of the prompts that the floors are for.
    Raises:
        UnsupportedCheckpoint: config.json lacks a size.
        ConfigError: a context beyond the checkpoint's, or ranks that do not divide the heads.
    """
    shape = read_shape(facts, encoder=engine in ("bert", "embed"))
    layout = _layout(spec, facts, shape, machine)
    dtype = layout.dtype
    _check_request(spec, facts, shape, machine, layout)
    weights = weigh(
        facts, shape, int(_BYTES[dtype]), layout.scheme, keep_blocks=layout.keep_blocks, unpack=layout.unpack
    )
    budget, kv_token = _budget(spec, facts, shape, machine, layout)
    pool_tokens = _pool_tokens(spec, budget, kv_token)
    context, largest = _context(spec, shape, pool_tokens)
    fits, shortage = _fits(spec, budget, kv_token, context, pool_tokens)
    batch = spec.max_num_seqs if not kv_token else min(spec.max_num_seqs, pool_tokens // max(context, 1))
    room = pool_tokens // max(prompt, 1) if kv_token else spec.max_num_seqs
    bounds = None
    if machine.gpu is not None and machine.gpu.known:
        bounds = floors(
            machine.gpu, layout.ranks, shape, weights,
            arithmetic=_arithmetic(layout.scheme or facts.quantized.method, dtype, machine.gpu),
            kv_bytes=kv_token * layout.ranks,
            batch=max(1, min(spec.max_num_seqs, room)),
            prompt=min(prompt, shape.context or prompt),
        )  # fmt: skip
    return Plan(
        model=spec.name,
        engine=engine,
        reason=reason,
        architecture=facts.architecture,
        machine=machine.name,
        ranks=layout.ranks,
        dtype=dtype,
        quantization=layout.scheme
        or facts.quantized.method.removeprefix("gguf"),  # blocks are unpacked at load
        kv_dtype=layout.kv_dtype if kv_token else "",
        weights=weights,
        budget=budget,
        kv_token_bytes=kv_token,
        step_tokens=_step_tokens(spec, machine, shape),
        pool_tokens=pool_tokens,
        max_model_len=context,
        largest_context=largest,
        batch=batch,
        fits=fits,
        shortage=shortage,
        floors=bounds,
        options=_options(spec, facts, shape, machine, layout),
        warnings=tuple(warnings(facts, shape, spec, engine, dtype)),
        licence_files=licence_files(facts),
        estimates=_estimates(weights, machine, spec),
    )


def _layout(spec: EngineSpec, facts: Facts, shape: ModelShape, machine: Machine) -> _Layout:
    """As the core chooses: bfloat16 over weights of few bits on a CPU, float32 over others, and on a GPU the
    checkpoint's 16-bit type, but float16 for encoders; GPUs before Ampere know no bfloat16."""
    blocks = any(tensor.dtype in KEPT_BLOCKS and len(tensor.shape) == 2 for tensor in facts.tensors.values())
    packs = machine.packs and not shape.encoder
    keep = packs and blocks and not spec.quantization and spec.dtype in ("auto", "bfloat16")
    quantized = facts.quantized.method not in ("", "gguf")
    ints = quantized and packs and _cpu_keeps(facts) and spec.dtype in ("auto", "bfloat16")
    old = machine.gpu is not None and machine.gpu.known and machine.gpu.compute < 80
    stored = facts.text_config.get("dtype") or facts.text_config.get("torch_dtype")
    if spec.dtype != "auto":
        dtype: str = spec.dtype
    elif not machine.cuda:
        dtype = "bfloat16" if keep or ints or (spec.quantization and not shape.encoder) else "float32"
    elif shape.bidirectional or stored == "float16" or old:
        dtype = "float16"
    else:
        dtype = "bfloat16"
    no_kernel = facts.quantized.method in ("mxfp8", "bitsandbytes")  # see quantization/keep.py
    return _Layout(
        scheme=spec.quantization,
        kv_dtype=_kv_dtype(spec, facts, shape, dtype),
        ranks=spec.tensor_parallel_size,
        dtype=dtype,
        keep_blocks=keep,
        unpack=quantized and (shape.encoder or not machine.cuda or no_kernel) and not ints,
    )


def _cpu_keeps(facts: Facts) -> bool:
    """Whether a CPU multiplies with the checkpoint's own numbers: 4-bit integers (see quantization/keep.py)."""
    found = facts.quantized
    packed = found.method in ("awq", "gptq", "int4") and found.bits != 8
    return packed and not found.reordered and found.group in (0, *KEPT_GROUPS)


def _kv_dtype(spec: EngineSpec, facts: Facts, shape: ModelShape, dtype: str) -> str:
    """As asked, else as the quantization says, or the checkpoint where no bias forbids it; else dtype."""
    if spec.kv_cache_dtype != "auto":
        return spec.kv_cache_dtype
    wanted = quantization_type(spec.quantization).kv_cache if spec.quantization else "auto"
    if wanted == "auto" and facts.quantized.kv_problem and not shape.bidirectional:
        raise UnsupportedCheckpoint(facts.quantized.kv_problem, param="kv_cache_dtype")
    if facts.quantized.kv.startswith("fp8") and not shape.qkv_bias:
        wanted = "fp8"
    return dtype if wanted == "auto" else wanted


def _check_request(
    spec: EngineSpec, facts: Facts, shape: ModelShape, machine: Machine, layout: _Layout
) -> None:
    problems = list(refusals(spec, facts, shape, machine))
    if spec.max_model_len is not None and shape.context and spec.max_model_len > shape.context:
        problems.append(
            f"max_model_len: is {spec.max_model_len}; the checkpoint was made for {shape.context} tokens "
            "(config.json, max_position_embeddings): lower it"
        )
    if shape.heads % layout.ranks:
        problems.append(
            f"tensor_parallel_size: is {layout.ranks}, which does not divide {shape.heads} attention heads"
        )
    if layout.ranks > machine.count:
        problems.append(f"tensor_parallel_size: is {layout.ranks}, but the plan is for {machine.name}")
    if layout.scheme and facts.quantized.method not in ("", "gguf"):
        problems.append(
            f"quantization: is {layout.scheme}, but the checkpoint is already quantized "
            f"({facts.quantized.method}, {facts.quantized.source}); leave it out"
        )
    if problems:
        raise ConfigError(problems)


def _step_tokens(spec: EngineSpec, machine: Machine, shape: ModelShape) -> int:
    if spec.max_num_batched_tokens:
        return spec.max_num_batched_tokens
    if shape.encoder:
        return CUDA_ENCODE_TOKENS if machine.cuda else CPU_ENCODE_TOKENS
    return CUDA_STEP_TOKENS if machine.cuda else CPU_STEP_TOKENS


def _budget(
    spec: EngineSpec, facts: Facts, shape: ModelShape, machine: Machine, layout: _Layout
) -> tuple[Budget, int]:
    """The split of one rank, and bytes of KV a token."""
    size = int(_BYTES[layout.dtype])
    weights = weigh(facts, shape, size, layout.scheme, keep_blocks=layout.keep_blocks, unpack=layout.unpack)
    context = _length(spec, shape)
    load = largest_load(
        spec,
        shape,
        tokens=_step_tokens(spec, machine, shape),
        context=context,
        dtype_bytes=size,
        cuda=machine.cuda,
        ranks=layout.ranks,
        packed="" if layout.unpack else packed_format(facts, layout.scheme),
    )
    budget = pool_budget(
        cuda=machine.cuda,
        total=machine.memory,
        fraction=spec.memory_fraction,
        process=process_bytes(shape, cuda=machine.cuda, pieces=facts.pieces, eight_bits=load.eight_bits),
        weights=shard(weights.by_kind, layout.ranks),
        scratch=scratch(shape, load),
        fixed=spec.kv_cache_bytes,
    )
    kv_token = int(shape.kv_elements(layout.ranks) * _BYTES[layout.kv_dtype])
    return msgspec.structs.replace(budget, pool=_whole_blocks(spec, budget.pool, kv_token, context)), kv_token


def _length(spec: EngineSpec, shape: ModelShape) -> int:
    """Tokens of one sequence."""
    return min(spec.max_model_len or shape.context, shape.context or spec.max_model_len or 0) or _UNKNOWN


def _whole_blocks(spec: EngineSpec, room: int, kv_token: int, context: int) -> int:
    """Bytes of the pool, the null block included; what is missing stays negative."""
    if not kv_token or room < 0:
        return min(room, 0)
    block = kv_token * spec.block_size
    blocks = pool_blocks(
        room, block, max_num_seqs=spec.max_num_seqs, context=context, block_size=spec.block_size
    )
    return blocks * block


def _pool_tokens(spec: EngineSpec, budget: Budget, kv_token: int) -> int:
    """Tokens of the pool, without the null block's."""
    if not kv_token or budget.pool <= 0:
        return 0
    return max(budget.pool // kv_token - spec.block_size, 0)


def _context(spec: EngineSpec, shape: ModelShape, pool_tokens: int) -> tuple[int, int]:
    """(context served, largest context of one sequence)."""
    own = shape.context or spec.max_model_len or 0
    if shape.encoder:
        return min(spec.max_model_len or own, own), own
    largest = min(own, pool_tokens)
    return (spec.max_model_len or (largest or own)), largest


def _fits(
    spec: EngineSpec, budget: Budget, kv_token: int, context: int, pool_tokens: int
) -> tuple[bool, int]:
    if budget.pool < 0:
        return False, -budget.pool
    if not kv_token:
        return True, 0
    if pool_tokens < (context if spec.max_model_len is not None else spec.block_size):
        return False, max(context * kv_token - budget.pool, kv_token * spec.block_size)
    return True, 0


def _arithmetic(scheme: str, dtype: str, gpu: Accelerator) -> str:
    """What is multiplied: FP4 and integer weights are decoded to the activations' 16 bits."""
    if scheme.startswith(("fp8", "modelopt")) and "fp8" in gpu.flops:
        return "fp8"
    return "float16" if dtype == "float32" else dtype


def _options(
    spec: EngineSpec, facts: Facts, shape: ModelShape, machine: Machine, now: _Layout
) -> tuple[Option, ...]:
    """Fewer bits for weights and cache, and more GPUs: what each would hold."""
    if not machine.cuda:
        return ()
    found = []
    for layout, what in _layouts(facts, shape, machine, now):
        budget, kv_token = _budget(spec, facts, shape, machine, layout)
        tokens = _pool_tokens(spec, budget, kv_token)
        context, largest = _context(spec, shape, tokens)
        fits, _ = _fits(spec, budget, kv_token, context, tokens)
        found.append(
            Option(
                what=what,
                weights=budget.weights,
                fits=fits,
                context=largest if fits else 0,
                tokens=tokens,
                served=layout.ranks == 1,
            )
        )
    return tuple(found)


def _layouts(facts: Facts, shape: ModelShape, machine: Machine, now: _Layout) -> list[tuple[_Layout, str]]:
    replace = msgspec.structs.replace
    options = []
    free = facts.quantized.method in ("", "gguf")
    gpu = machine.gpu
    if shape.bidirectional:  # with activations in eight bits, or not at all
        fp8 = free and gpu is not None and gpu.compute >= 90 and not now.scheme
        return [(replace(now, scheme="fp8"), "fp8")] if fp8 else []
    if free and (gpu is None or gpu.has_fp8) and not now.scheme.startswith("fp8"):
        options.append((replace(now, scheme="fp8"), "fp8 weights"))
    if free and (gpu is None or gpu.has_fp8) and not now.scheme.startswith("nvfp4"):
        options.append((replace(now, scheme="nvfp4"), "fp4 weights"))
    if free and gpu is not None and not gpu.has_fp8 and now.scheme != "int4":
        options.append((replace(now, scheme="int4"), "int4 weights"))
    if not shape.encoder and now.kv_dtype not in ("fp8", "fp4") and not shape.qkv_bias:  # serve would refuse
        options.append((replace(now, kv_dtype="fp8"), "fp8 KV cache"))
        options += [
            (replace(layout, kv_dtype="fp8"), f"{what} and KV cache")
            for layout, what in options[:1]
            if layout.scheme == "fp8"
        ]
    if not shape.encoder:
        for ranks in (2, 4, 8):
            if ranks > now.ranks and shape.heads % ranks == 0:
                name = machine.name.split(":")[0]
                options.append((replace(now, ranks=ranks), f"{name}:{ranks} (tensor_parallel_size {ranks})"))
    return options


def _estimates(weights: Weights, machine: Machine, spec: EngineSpec) -> tuple[str, ...]:
    found = ["activations", "process"]
    if machine.cuda and not spec.eager:
        found.append("graphs")
    if weights.estimated:
        found.append("weights")
    return tuple(found)
