"""Where the bytes of a device go: weights, what steps need, graphs, the process itself, and the KV pool.

The rules by which the core sizes its pool stand here, without torch, so that a plan and the core agree.
"""

from __future__ import annotations

import msgspec

from headrace.config.plan.scratch import Scratch
from headrace.config.plan.shape import ModelShape

__all__ = [
    "CPU_ENCODE_TOKENS",
    "CPU_POOL_BYTES",
    "CPU_POOL_SHARE",
    "CPU_PROCESS_BYTES",
    "CPU_STEP_TOKENS",
    "CUDA_ENCODE_TOKENS",
    "CUDA_PROCESS_BYTES",
    "CUDA_STEP_TOKENS",
    "Budget",
    "pool_blocks",
    "pool_budget",
    "process_bytes",
    "shard",
]

GIB = 1024**3
MIB = 1024**2
CPU_POOL_BYTES = 2 * GIB
CPU_POOL_SHARE = 0.3  # of the memory that is free once the weights are there
CPU_STEP_TOKENS = 512
CUDA_STEP_TOKENS = 8192
CPU_ENCODE_TOKENS = 2048  # a few hundred rows keep the cores busy; more only delays the first result
CUDA_ENCODE_TOKENS = 16384
# Of one process, seen on an H200: the driver's context (527 MiB), PyTorch's kernels (92), cuBLAS's (66), streams
# (70), and our own (12).
CUDA_PROCESS_BYTES = 767 * MIB
_CUBLAS_BYTES = 72 * MIB  # with what it takes of streams

# The same without a GPU, seen with PyTorch 2.13 on Linux: what Python, PyTorch, oneDNN and the engine keep beside
# files, for encoders and for decoders.
CPU_PROCESS_BYTES = (165 * MIB, 178 * MIB)
# Of an entry of the vocabulary: WordPiece of encoders, byte pairs with their merges, pieces with scores.
_TOKENIZER_BYTES = (230, 650, 446)


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one rank.

    Attributes:
        total: of the device (CPU: what is available now).
        usable: the share that the server may take.
        process: taken by the process before any tensor.
        weights, activations, graphs: as planned.
        pool: for KV, in whole blocks; negative when something is missing.
    """

    total: int
    usable: int
    process: int
    weights: int
    activations: int
    graphs: int
    pool: int

    @property
    def reserve(self) -> int:
        """Kept free of KV for steps and graphs."""
        return self.activations + self.graphs

    @property
    def used(self) -> int:
        """What the server will have taken once it is ready."""
        return self.process + self.weights + self.reserve + max(self.pool, 0)


def shard(by_kind: dict[str, int], ranks: int) -> int:
    """Bytes of weights on one of ``ranks``: norms are on all, the rest is split."""
    whole = by_kind.get("norm", 0)
    return whole + -(-(sum(by_kind.values()) - whole) // ranks)


def pool_blocks(room: int, block_bytes: int, *, max_num_seqs: int, context: int, block_size: int) -> int:
    """Blocks of the pool, the null block included: no more than all sequences can use."""
    most = max_num_seqs * -(-context // block_size) + 1
    return min(room // block_bytes, most)


def process_bytes(shape: ModelShape, *, cuda: bool, pieces: bool = False, eight_bits: bool = False) -> int:
    """What a core takes of the device before any tensor; without a GPU its tokenizer lies there, too.

    Args:
        pieces: the tokenizer has pieces with scores, and no merges.
        eight_bits: activations are rounded, too: encoders then load nothing of cuBLAS.
    """
    if cuda:
        return CUDA_PROCESS_BYTES - (_CUBLAS_BYTES if eight_bits and shape.bidirectional else 0)
    decoder = not shape.bidirectional
    entry = _TOKENIZER_BYTES[2 if decoder and pieces else decoder]
    return CPU_PROCESS_BYTES[decoder] + shape.vocab * entry


def pool_budget(
    *,
    cuda: bool,
    total: int,
    fraction: float,
    process: int,
    weights: int,
    scratch: Scratch,
    fixed: int | None,
) -> Budget:
    """Split a device; the pool is what is left.

    Args:
        process: see process_bytes.
        total: bytes of the device; on a CPU those available now.
        fixed: ``kv_cache_bytes`` when it was set.
    """
    activations = scratch.state + scratch.plain + scratch.pooled
    usable = int(total * fraction) if cuda else total
    taken = process + weights + activations + scratch.objects
    if fixed is not None:
        left = total - taken
        pool = fixed if fixed <= left else left - fixed
    elif cuda:
        pool = usable - taken
    elif taken > total:
        pool = total - taken
    else:
        pool = min(CPU_POOL_BYTES, int((total - weights) * CPU_POOL_SHARE))
    return Budget(
        total=total,
        usable=usable,
        process=process,
        weights=weights,
        activations=activations,
        graphs=scratch.objects,
        pool=pool,
    )
