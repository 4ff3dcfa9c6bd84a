"""What a server takes of its device beside weights and KV: results of a step, tables, and graphs.

The core takes these bytes at start, by the same functions, and works within them.
"""

from __future__ import annotations

import msgspec

from headrace.config.plan.shape import ModelShape
from headrace.config.spec import EngineSpec

__all__ = [
    "DECODE_GRAPHS",
    "DECODE_SPLITS",
    "DRAW_ELEMENTS",
    "ENCODE_FULL_GRAPHS",
    "ENCODE_GRAPH_TOKENS",
    "ENCODE_GRAPH_WASTE",
    "GRAPH_TOKENS",
    "LONG_GRAPH_HEADS",
    "PROMPT_ROWS",
    "SCORE_ELEMENTS",
    "SMALL_BYTES",
    "Load",
    "Scratch",
    "decode_graphs",
    "forward_bytes",
    "largest_load",
    "prompt_rows",
    "scratch",
]

MIB = 1024**2
GRAPH_TOKENS = 8192  # of the longest generate step that is a graph
# Batches that decode steps are padded to. Finer than powers of two: a padded row costs as much as a real one.
DECODE_GRAPHS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64),
    *range(96, 257, 32),
    *range(320, 513, 64),
    *range(640, 1025, 128),
)
ENCODE_GRAPH_TOKENS = 4096  # of the longest encode pass that is one however full it is
ENCODE_FULL_GRAPHS = (8192, 16384)  # and of those that are one when they are nearly full
ENCODE_GRAPH_WASTE = 16  # of which one part in so many may be padding
# Sequences times key heads up to which decode steps of long sequences have graphs of their own.
LONG_GRAPH_HEADS = 256
SCORE_ELEMENTS = 1 << 22  # logits whose order is found at once, for log-probabilities
DRAW_ELEMENTS = 1 << 23  # logits that a CPU filters and draws from at once
DECODE_SPLITS = 32  # parts that decode attention cuts a sequence's keys into, at most
SMALL_BYTES = 32 * MIB  # for tensors up to a MiB, which the allocator keeps apart
_WORKSPACE_BYTES = 32 * MIB  # cuBLAS's, for each of the two streams
_SPLIT_BYTES = 24 * MIB  # partial sums of products of few rows
_PIECES = 1.25  # room that a step needs in one piece of memory, over what lives at once
PROMPT_ROWS = 64  # prompt positions whose logits are made at once, on a GPU
_ORDER_BYTES = 40  # of each logit whose order is found, on a GPU
_CPU_SCORE_BYTES = 5  # of each logit on a CPU: exponentials, and whether it is larger than the token's own
_CPU_PACK_BYTES = 5  # of each result of the head in float32: what the library packs and cannot use again
_CPU_DRAW_BYTES = 20  # of each logit that is filtered and drawn from on a CPU: its order, masses, race
# Seen on an H200: 0.4 to 0.7 MiB a graph of 28 to 36 layers.
_GRAPH_BYTES_A_LAYER = 18 * 1024
_DECODE_KINDS = 4  # where a decode graph ends: see GraphKey
# Formats whose products of many rows take the whole matrix in 16 bits.
_DENSE_FORMATS = ("nvfp4", "mxfp4", "int8", "int4", "int4-g64", "int4-g128", "awq", "gptq")
_GATHERED_FORMATS = ("nvfp4", "mxfp4")  # of experts whose products of many rows copy these first
_EXPERT_ROWS = 127  # that a block of 128 may lack
_FP8_DENSE_BYTES = (
    14  # of each number that is made dense from FP8 in blocks: codes, scales and product in float32
)
_ROUND_BYTES = (
    17  # of each number that is rounded to FP8 and back: 13 at once, and a piece that none of them fits
)
_FEW_ROWS = 64  # that kernels multiply without unpacking
_ENCODE_STATE_BYTES = 24 * MIB  # buffers of passes
_MIXED_GRAPHS = 64  # captured as traffic needs them
_ENCODE_GRAPHS = 20


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The largest step that a server must be able to take.

    Attributes:
        tokens: rows of a step (an encoder's longest sequence, where that is more).
        rows: sequences at once.
        context: tokens of one sequence.
        graphs: steps are CUDA graphs.
        packed: format that matrices are kept in, see packed_format; "" for 16 or 32 bits.
        packed_head: the head is, too.
    """

    tokens: int
    rows: int
    context: int
    dtype_bytes: int
    cuda: bool
    graphs: bool
    ranks: int = 1
    block_size: int = 16
    packed: str = ""
    packed_head: bool = False

    @property
    def eight_bits(self) -> bool:
        """Encoders then round activations, too."""
        return self.cuda and self.packed in ("fp8", "int8")


class Scratch(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one rank.

    Attributes:
        state: tables that live as long as the server.
        plain: what lives at once in a step outside graphs: also of one that is about to be captured.
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
    packed: str = "",
) -> Load:
    """What a server must be able to take.

    Args:
        packed: see Load.
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
        packed=packed,
        packed_head=spec.quantization.startswith("int") and not shape.tied and not shape.encoder,
    )


def scratch(shape: ModelShape, load: Load) -> Scratch:
    """All of it for a server with this load."""
    if shape.encoder:
        return _encode(shape, load)
    return _generate(shape, load)


def forward_bytes(shape: ModelShape, tokens: int, dtype_bytes: int, ranks: int = 1) -> int:
    """Largest set of results that lives at once in a pass over ``tokens`` rows, up to the last norm.

    Of a decoder: the stream before the layer, its sum, and the norm's result; cos and sin in float32; and either
    q, k and v, their rotated copy and the attention's output, or the two halves of the MLP and their product; for
    experts, of each chosen one, its product, the same in 8 bits, and its row of the sum. Of an encoder that norms
    sums: its input, the attention's norm and the MLP's two results.
    """
    queries = shape.heads * shape.head_dim
    attention = shape.attention_width + queries
    if shape.encoder and not shape.gated:
        feed = shape.chosen * (2 * shape.expert_size + shape.hidden) if shape.experts else shape.intermediate
        return tokens * (3 * shape.hidden + max(attention, feed)) * dtype_bytes
    attention += shape.attention_width - shape.kv_heads * shape.head_dim
    halves = 3 if shape.gated else 2
    feed = halves * shape.intermediate
    if shape.experts:
        routed = (
            shape.chosen * (3 * shape.expert_size // 2 + shape.hidden) + halves * shape.shared_expert_size
        )
        feed = max(routed, feed if shape.dense_layers else 0)
    row = (3 * shape.hidden + max(attention, feed) // ranks) * dtype_bytes
    return tokens * (row + 2 * shape.head_dim * 4)


def _step_bytes(shape: ModelShape, load: Load, tokens: int) -> int:
    """forward_bytes, and what products over many rows unpack for the time of one: matrices of few bits into 16, and
    of FP8 in blocks (or with static scales) also inputs, by way of float32."""
    size, hidden, inner = load.dtype_bytes, shape.hidden, shape.intermediate // load.ranks
    plain = forward_bytes(shape, tokens, size, load.ranks)
    if load.cuda and shape.experts and load.packed in _GATHERED_FORMATS:
        return max(plain, tokens * 3 * hidden * size + _gathered_numbers(shape, tokens) * size)
    if not load.cuda or shape.experts:
        return plain
    matrix, stream = hidden * inner, tokens * 3 * hidden * size
    wide = 2 if shape.gated else 1
    if load.packed in _DENSE_FORMATS:
        return max(plain, stream + wide * (tokens * inner + matrix) * size)
    if load.packed == "fp8_block":
        rounded = max(_ROUND_BYTES * tokens * inner, tokens * inner * size + _FP8_DENSE_BYTES * matrix)
        return max(plain, stream + tokens * inner * size + rounded, stream + wide * _FP8_DENSE_BYTES * matrix)
    return plain


def _gathered_numbers(shape: ModelShape, tokens: int) -> int:
    """What lives at once where rows are copied expert by expert, in blocks of which the last is not full, before each
    of the two products."""
    pairs = tokens * shape.chosen
    rows = pairs + shape.experts * _EXPERT_ROWS
    return max(rows * shape.hidden + pairs * shape.expert_size,
               rows * shape.expert_size + pairs * (shape.expert_size + shape.hidden))  # fmt: skip


def logits_bytes(shape: ModelShape, rows: int, dtype_bytes: int, ranks: int = 1) -> int:
    """The head's product, and the same in float32, where it is not."""
    return rows * shape.vocab * (dtype_bytes + 4 if dtype_bytes < 4 else 4) // ranks


def prompt_rows(vocab: int, *, cuda: bool) -> int:
    """Prompt positions whose logits are made at once; a GPU reads its weights for each time, a CPU computes."""
    return PROMPT_ROWS if cuda else min(PROMPT_ROWS, max(1, SCORE_ELEMENTS // vocab))


def sampling_bytes(shape: ModelShape, rows: int, *, cuda: bool) -> int:
    """Beside logits: those before any change, and on a GPU the order of some rows at a time, for log-probabilities;
    on a CPU what is drawn from."""
    before = rows * shape.vocab * 4
    if cuda:
        return before + _order_bytes(shape, rows)
    return before + min(rows * shape.vocab, max(DRAW_ELEMENTS, shape.vocab)) * _CPU_DRAW_BYTES


def _order_bytes(shape: ModelShape, rows: int) -> int:
    return min(rows * shape.vocab, max(SCORE_ELEMENTS, shape.vocab)) * _ORDER_BYTES


def _generate(shape: ModelShape, load: Load) -> Scratch:
    size, ranks = load.dtype_bytes, load.ranks
    logits = logits_bytes(shape, load.rows, size, ranks)
    scored = prompt_rows(shape.vocab, cuda=load.cuda)
    prompts = logits_bytes(shape, scored, size, ranks)
    if load.cuda:
        prompts += _order_bytes(shape, scored)
    else:
        prompts += scored * shape.vocab * (_CPU_SCORE_BYTES + (_CPU_PACK_BYTES if size == 4 else 0))
    head = _head_bytes(shape, load)
    after = max(logits + sampling_bytes(shape, load.rows, cuda=load.cuda), prompts, head)
    forward = _step_bytes(shape, load, load.tokens)
    if not load.cuda:
        return Scratch(plain=max(forward, after))
    partial = _partial_sums(shape, load)
    step = max(forward + partial, load.tokens * shape.hidden * size + after)
    if not load.graphs:
        return Scratch(plain=_in_pieces(step))
    in_graph = _step_bytes(shape, load, min(load.tokens, GRAPH_TOKENS)) + partial
    decode = _step_bytes(shape, load, load.rows) + partial + max(logits, head)
    return Scratch(
        state=_tables(shape, load) + partial,
        plain=_in_pieces(max(forward + partial, after) if load.tokens <= GRAPH_TOKENS else step),
        pooled=_in_pieces(max(in_graph, decode)) + _SPLIT_BYTES,
        objects=(decode_graphs(shape, load) + _MIXED_GRAPHS) * shape.layers * _GRAPH_BYTES_A_LAYER,
    )


def _head_bytes(shape: ModelShape, load: Load) -> int:
    """The head in 16 bits with its product, where it is packed and there are many rows."""
    if not (load.cuda and load.packed_head) or load.rows <= _FEW_ROWS:
        return 0
    return shape.vocab * (shape.hidden + load.rows) * load.dtype_bytes // load.ranks


def decode_graphs(shape: ModelShape, load: Load) -> int:
    """How many there may be: of every size and end, and where few sequences are, of short and of long ones."""
    sizes: list[int] = [size for size in DECODE_GRAPHS if size < load.rows] + [load.rows]
    heads = max(1, shape.kv_heads // load.ranks)
    twice: int = sum(shape.head_dim <= 128 and size * heads <= LONG_GRAPH_HEADS for size in sizes)
    return _DECODE_KINDS * (len(sizes) + twice)


def _in_pieces(size: int) -> int:
    return int(size * _PIECES) + SMALL_BYTES + _WORKSPACE_BYTES


def _tables(shape: ModelShape, load: Load) -> int:
    """Block tables, and cos and sin by position."""
    blocks = (load.rows + 1) * -(-load.context // load.block_size) * 4
    return blocks + load.context * 2 * shape.head_dim * 4 * (2 if shape.windows else 1)


def _partial_sums(shape: ModelShape, load: Load) -> int:
    """Of decode attention: float32, with a maximum and a denominator each."""
    padded = max(16, 1 << (shape.head_dim - 1).bit_length())
    return load.rows * DECODE_SPLITS * (shape.heads // load.ranks) * (padded + 4) * 4


def _encode(shape: ModelShape, load: Load) -> Scratch:
    size = load.dtype_bytes
    every = (
        load.tokens * shape.hidden * (size + 3 * 4)
    )  # a vector a token, in float32, and once more in one piece
    eight = load.eight_bits and shape.bidirectional

    def forward(tokens: int) -> int:
        """In eight bits the MLP's product lives beside its codes, and every sum beside its own."""
        if eight:
            return tokens * (6 * shape.hidden + 3 * shape.intermediate)
        return forward_bytes(shape, tokens, size)

    plain = max(forward(load.tokens), every)
    if not load.cuda:
        return Scratch(plain=plain)
    state = _ENCODE_STATE_BYTES + (
        0 if load.eight_bits else _WORKSPACE_BYTES
    )  # which exists before it is reserved
    if not load.graphs:
        return Scratch(state=state, plain=_in_pieces(plain))
    full = [tokens for tokens in ENCODE_FULL_GRAPHS if tokens - load.tokens <= tokens // ENCODE_GRAPH_WASTE]
    in_graph = forward(max([min(load.tokens, ENCODE_GRAPH_TOKENS), *full]))
    return Scratch(
        state=state,
        plain=_in_pieces(plain),
        pooled=_in_pieces(in_graph),
        objects=_ENCODE_GRAPHS * shape.layers * _GRAPH_BYTES_A_LAYER,
    )
