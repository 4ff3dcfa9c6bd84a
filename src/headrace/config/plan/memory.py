"""Where the bytes of a device go: weights, activations, graphs, the process itself, and the KV pool.

The rules by which the core sizes its pool stand here, without torch, so that a plan and the core agree.
"""

from __future__ import annotations

import msgspec

from headrace.config.plan.shape import ModelShape

__all__ = [
    "CPU_ENCODE_TOKENS",
    "CPU_POOL_BYTES",
    "CPU_POOL_SHARE",
    "CPU_STEP_TOKENS",
    "CUDA_ENCODE_TOKENS",
    "CUDA_STEP_TOKENS",
    "MIN_RESERVE_BYTES",
    "Budget",
    "activation_bytes",
    "graph_bytes",
    "pool_budget",
    "shard",
]

GIB = 1024**3
CPU_POOL_BYTES = 2 * GIB
CPU_POOL_SHARE = 0.3  # of the memory that is free once the weights are there
CPU_STEP_TOKENS = 512
CUDA_STEP_TOKENS = 8192
CPU_ENCODE_TOKENS = 2048  # a few hundred rows keep the cores busy; more only delays the first result
CUDA_ENCODE_TOKENS = 16384
MIN_RESERVE_BYTES = GIB  # left for activations and graphs, at least
CUDA_CONTEXT_BYTES = (
    600 * 1024**2
)  # driver context, kernels and library workspaces of one process: an estimate
_GRAPH_BYTES_A_LAYER = 48 * 1024  # of one captured batch size: an estimate


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one rank.

    Attributes:
        total: of the device (CPU: what is available now).
        usable: the share that the server may take.
        process: taken by the process before any tensor.
        weights, activations, graphs: as planned.
        reserve: left free for activations and graphs; at least their sum.
        pool: for KV; negative when something is missing.
    """

    total: int
    usable: int
    process: int
    weights: int
    activations: int
    graphs: int
    reserve: int
    pool: int


def activation_bytes(shape: ModelShape, tokens: int, sequences: int, dtype_bytes: int, ranks: int = 1) -> int:
    """Largest set of intermediate results that lives at once in a step of ``tokens`` rows.

    The residual and its norm, and either q, k, v and the attention's output, or the MLP's two halves and their
    product; for experts one row for each chosen one. Then float32 logits of ``sequences`` rows and one copy.
    """
    attention = shape.attention_width + shape.heads * shape.head_dim
    halves = 3 if shape.gated else 2
    feed = halves * shape.intermediate
    if shape.experts:
        routed = (
            shape.chosen * (halves * shape.expert_size + shape.hidden) + halves * shape.shared_expert_size
        )
        feed = max(routed, feed if shape.dense_layers else 0)
    rows = tokens * (2 * shape.hidden + max(attention, feed) // ranks) * dtype_bytes
    logits = 0 if shape.encoder else 2 * sequences * shape.vocab * 4 // ranks
    return rows + logits


def graph_bytes(shape: ModelShape, max_num_seqs: int) -> int:
    """Graphs of decode at a ladder of batch sizes (1, 2, 4, 8, then every 8); they share one pool."""
    sizes = sum(1 for size in (1, 2, 4) if size <= max_num_seqs) + max_num_seqs // 8
    return 16 * 1024**2 + sizes * shape.layers * _GRAPH_BYTES_A_LAYER


def shard(by_kind: dict[str, int], ranks: int) -> int:
    """Bytes of weights on one of ``ranks``: norms are on all, the rest is split."""
    whole = by_kind.get("norm", 0)
    return whole + -(-(sum(by_kind.values()) - whole) // ranks)


def pool_budget(
    *, cuda: bool, total: int, fraction: float, weights: int, activations: int, graphs: int, fixed: int | None
) -> Budget:
    """Split a device.

    Args:
        total: bytes of the device; on a CPU those available now.
        fixed: ``kv_cache_bytes`` when it was set.
    """
    process = CUDA_CONTEXT_BYTES if cuda else 0
    reserve = max(MIN_RESERVE_BYTES, activations + graphs) if cuda else activations
    usable = int(total * fraction) if cuda else total
    if fixed is not None:
        left = total - process - weights - reserve
        pool = fixed if fixed <= left else left - fixed
    elif cuda:
        pool = usable - process - weights - reserve
    else:
        pool = min(CPU_POOL_BYTES, int((total - weights) * CPU_POOL_SHARE))
    return Budget(
        total=total,
        usable=usable,
        process=process,
        weights=weights,
        activations=activations,
        graphs=graphs,
        reserve=reserve,
        pool=pool,
    )
