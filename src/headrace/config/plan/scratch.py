"""What a server takes of its device beside weights and KV: results of a step, tables, and graphs.

The core takes these bytes at start, by the same functions, and works within them.
"""

from __future__ import annotations

import msgspec

from headrace.config.plan.shape import ModelShape
from headrace.config.spec import EngineSpec

__all__ = [
    "DECODE_SPLITS",
    "DRAW_ELEMENTS",
    "ENCODE_GRAPH_TOKENS",
    "GRAPH_TOKENS",
    "SMALL_BYTES",
    "Load",
    "Scratch",
    "forward_bytes",
    "largest_load",
    "scratch",
]

MIB = 1024**2
GRAPH_TOKENS = 8192  # of the longest generate step that is a graph
ENCODE_GRAPH_TOKENS = 4096  # of the longest encode pass that is one
DRAW_ELEMENTS = 1 << 24  # logits that the sampler filters and draws from at once
DECODE_SPLITS = 32  # parts that decode attention cuts a sequence's keys into, at most
_PROMPT_LOGPROB_ROWS = 64
_SPLADE_ELEMENTS = 1 << 25
SMALL_BYTES = 32 * MIB  # for tensors up to a MiB, which the allocator keeps apart
_GRAPH_SMALL_BYTES = 48 * MIB  # the same, in the graphs' own memory


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The largest step that a server must be able to take.

    Attributes:
        tokens: rows of a step (an encoder's longest sequence, where that is more).
        rows: sequences at once.
        context: tokens of one sequence.
        graphs: steps are CUDA graphs.
    """

    tokens: int
    rows: int
    context: int
    dtype_bytes: int
    cuda: bool
    graphs: bool
    ranks: int = 1
    block_size: int = 16


class Scratch(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one rank.

    Attributes:
        state: tables that live as long as the server.
        plain: what lives at once in a step outside graphs.
        pooled: what lives at once in a graph; all graphs share it.
        objects: the driver's, for the graphs themselves.
    """

    state: int = 0
    plain: int = 0
    pooled: int = 0
    objects: int = 0


def largest_load(
    spec: EngineSpec,
    shape: ModelShape,
    *,
    tokens: int,
    context: int,
    dtype_bytes: int,
    cuda: bool,
    ranks: int = 1,
) -> Load:
    """What a server must be able to take.

    Args:
        tokens: of a step, as set or by default.
        context: of one sequence; encoders take one that is longer than a step in a step of its own.
    """
    rope = shape.rope or {}
    by_length = str(rope.get("rope_type", rope.get("type", ""))) in ("dynamic", "longrope", "su")
    return Load(
        tokens=max(tokens, context) if shape.encoder else tokens,
        rows=spec.max_num_seqs,
        context=context,
        dtype_bytes=dtype_bytes,
        cuda=cuda,
        graphs=cuda and not spec.eager and not by_length,
        ranks=ranks,
        block_size=spec.block_size,
    )


def scratch(shape: ModelShape, load: Load) -> Scratch:
    """All of it for a server with this load."""
    if shape.encoder:
        return _encode(shape, load)
    return _generate(shape, load)


def forward_bytes(shape: ModelShape, tokens: int, dtype_bytes: int, ranks: int = 1) -> int:
    """Largest set of results that lives at once in a pass over ``tokens`` rows, up to the last norm.

    The stream before the layer and its sum; cos and sin in float32; and either the norm's result, q, k and v,
    their rotated copy and the attention's output, or the norm's result, the two halves of the MLP and their
    product; for experts one row for each chosen one.
    """
    queries = shape.heads * shape.head_dim
    attention = 2 * shape.attention_width - shape.kv_heads * shape.head_dim + queries
    halves = 3 if shape.gated else 2
    feed = halves * shape.intermediate
    if shape.experts:
        routed = (
            shape.chosen * (halves * shape.expert_size + shape.hidden) + halves * shape.shared_expert_size
        )
        feed = max(routed, feed if shape.dense_layers else 0)
    row = (3 * shape.hidden + max(attention, feed) // ranks) * dtype_bytes
    rotary = 0 if shape.encoder else 2 * shape.head_dim * 4
    return tokens * (row + rotary)


def logits_bytes(shape: ModelShape, rows: int, dtype_bytes: int, ranks: int = 1) -> int:
    """The head's product, and the same in float32."""
    return rows * shape.vocab * (dtype_bytes + 4) // ranks


def sampling_bytes(shape: ModelShape, rows: int) -> int:
    """Beside logits: a tempered copy, and for some rows at a time their sorted values, orders and random numbers."""
    at_once = min(rows * shape.vocab, max(DRAW_ELEMENTS, shape.vocab))
    return rows * shape.vocab * 4 + at_once * 32


def _generate(shape: ModelShape, load: Load) -> Scratch:
    size, ranks = load.dtype_bytes, load.ranks
    forward = forward_bytes(shape, load.tokens, size, ranks)
    last = load.tokens * shape.hidden * size
    logits = logits_bytes(shape, load.rows, size, ranks)
    after = last + max(logits + sampling_bytes(shape, load.rows), 3 * _PROMPT_LOGPROB_ROWS * shape.vocab * 4)
    if not load.cuda:
        return Scratch(plain=max(forward, after))
    plain = after if load.graphs and load.tokens <= GRAPH_TOKENS else max(forward, after)
    if not load.graphs:
        return Scratch(plain=plain + SMALL_BYTES)
    tokens = min(load.tokens, GRAPH_TOKENS)
    decode = forward_bytes(shape, load.rows, size, ranks) + logits
    return Scratch(
        state=_tables(shape, load),
        plain=plain + SMALL_BYTES,
        pooled=max(forward_bytes(shape, tokens, size, ranks), decode) + _GRAPH_SMALL_BYTES,
        objects=_decode_graphs(load.rows) * shape.layers * _GRAPH_BYTES_A_LAYER,
    )


def _tables(shape: ModelShape, load: Load) -> int:
    """Block tables, cos and sin by position, and decode attention's partial sums."""
    blocks = (load.rows + 1) * -(-load.context // load.block_size) * 4
    rotary = load.context * 2 * shape.head_dim * 4 * (2 if shape.windows else 1)
    padded = max(16, 1 << (shape.head_dim - 1).bit_length())
    partial = load.rows * DECODE_SPLITS * (shape.heads // load.ranks) * (padded + 2) * 4
    return blocks + rotary + partial


def _encode(shape: ModelShape, load: Load) -> Scratch:
    size = load.dtype_bytes
    last = load.tokens * shape.hidden
    plain = max(forward_bytes(shape, load.tokens, size), last * (size + 3 * 4))
    if not load.cuda:
        return Scratch(plain=plain)
    if not load.graphs:
        return Scratch(plain=plain + SMALL_BYTES)
    tokens = min(load.tokens, ENCODE_GRAPH_TOKENS)
    return Scratch(
        plain=plain + SMALL_BYTES,
        pooled=forward_bytes(shape, tokens, size) + _GRAPH_SMALL_BYTES,
        objects=_ENCODE_GRAPHS * shape.layers * _GRAPH_BYTES_A_LAYER,
    )


_GRAPH_BYTES_A_LAYER = 16 * 1024  # of one captured size
_ENCODE_GRAPHS = 16


def _decode_graphs(rows: int) -> int:
    """Sizes that decode graphs are made for, twice: to tokens and to logits."""
    return 2 * (min(rows, 64).bit_length() + rows // 32)
