"""Every weight of a loaded model beside the reference's: each piece must be the same number, rounded at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import Checkpoint
from headrace.errors import ConfigError
from headrace.layers.dense import Dense
from headrace.layers.eight_bits import EightBitLinear, PlainNorm, RoundingNorm
from headrace.layers.linear import Embedding, Linear
from headrace.layers.norm import RMSNorm
from headrace.models.decoder import DecoderModel
from headrace.models.loading import linear_sources
from headrace.quantization.audit import MatrixError, audit
from headrace.quantization.containers import QuantizedCheckpoint
from headrace.quantization.ggml import PackedHead
from headrace.quantization.linear import JoinedLinear, PackedLinear
from headrace.quantization.scaled import ScaledLinear
from headrace.quantization.schemes.fp4 import Fp4Weight
from headrace.quantization.schemes.group_int import GroupIntWeight
from headrace.quantization.schemes.int8 import Int8Linear

__all__ = ["PLAIN", "Bits", "audits", "fitted_groups", "is_packed", "stored_bits"]

PLAIN = 16  # bits of a weight that was cast at most
Bits = Callable[[str], int]
"""Path within the model -> bits of the numbers that it was stored in, or another number of it."""

_UNDONE = 0.15  # of rows times columns from 1: what rounding to 4 bits leaves of their means is far less
_Packed = PackedLinear | JoinedLinear | ScaledLinear | EightBitLinear
_NORM_BEFORE = {
    "attention.qkv": "attention_norm",
    **dict.fromkeys(
        (
            "mlp.gate_up",
            "mlp.up",
            "mlp.router",
            "mlp.experts.gate_up",
            "mlp.shared.gate_up",
            "mlp.shared_gate",
        ),
        "mlp_norm",
    ),
}
_PAIRS = (
    ("attention.qkv", "attention.o"),
    ("mlp.gate_up", "mlp.down"),
    ("mlp.experts.gate_up", "mlp.experts.down"),
    ("mlp.shared.gate_up", "mlp.shared.down"),
)


@dataclass(frozen=True)
class _Held:
    """One weight of a model.

    Attributes:
        read: float32 [rows, columns]; vectors are one row.
        bits: of its numbers.
        even: they are integers with one scale a row.
    """

    read: Callable[[], Tensor]
    bits: int = PLAIN
    even: bool = False


def is_packed(module: nn.Module) -> bool:
    """Whether this is a linear over fewer bits than 16."""
    return isinstance(module, _Packed)


def audits(
    model: nn.Module, reference: nn.Module, bits: Bits = lambda _: PLAIN, *, fitted: Bits = lambda _: 0
) -> Iterator[MatrixError]:
    """Compare all weights; yields those of quantized matrices, and whatever else is wrong.

    Formats that scale activations (AWQ) move factors from one matrix into what stands before it: so the gain of a
    norm is compared as a factor of the matrices that read it, and rows whose factor the next columns undo are right.

    Args:
        reference: unquantized, of the same modules.
        bits: of matrices that were dequantized while they were loaded.
        fitted: of a path, see quantization.audit.audit.
    Raises ConfigError when the reference is another model.
    """
    both = _Both(model, reference)
    for path in both.paths:
        held = both.ours[path]
        stored = min(held.bits, bits(path))
        mine, other = both.read(path)
        # Of matrices that were dequantized nothing is known but their bits.
        even = held.even or (held.bits == PLAIN and stored == 8)
        judge = partial(audit, path, reference=other, bits=stored, even=even, fitted=fitted(path))
        result = judge(mine)
        if result.where is not None and (pair := _pair(path)) and both.has(*pair):
            factors = _moved(*map(both.read, pair))
            if factors is not None:
                mine = _without(mine, factors, rows=path == pair[0])
                result = judge(mine)
        if stored < PLAIN or result.where is not None:
            yield result


class _Both:
    """The weights of a model and its reference that belong together.

    Raises ConfigError when one has what the other has not.
    """

    def __init__(self, model: nn.Module, reference: nn.Module) -> None:
        self.ours, self.theirs = _weights(model), _weights(reference)
        gains = _gains(model), _gains(reference)
        moved = [path for path in gains[1] if path in gains[0] and _differ(gains[0][path], gains[1][path])]
        self.gains = tuple({path: side[path] for path in moved} for side in gains)
        names = {"set-up": self.ours.keys(), "reference": self.theirs.keys()}
        for mine, other in (("set-up", "reference"), ("reference", "set-up")):
            extra = [path for path in names[mine] - names[other] if path.startswith("layers.")]
            if extra:
                raise ConfigError(
                    f"the {mine} has {min(extra)} and the {other} has not: it is another model",
                    param="reference",
                )
        # A head may be tied in one of them; gains that changed are part of the matrices that follow.
        self.paths = [
            path
            for path in self.theirs
            if path in self.ours and path.removesuffix(".weight") not in self.gains[1]
        ]

    def has(self, *paths: str) -> bool:
        """Whether both have all of these."""
        return all(path in self.ours and path in self.theirs for path in paths)

    def read(self, path: str) -> tuple[Tensor, Tensor]:
        """float32 [rows, columns] of both, times the gain of the norm before, if that has changed."""
        mine, other = self.ours[path].read(), self.theirs[path].read()
        if mine.shape != other.shape:
            raise ConfigError(
                f"{path} is {list(mine.shape)}, and {list(other.shape)} in the reference: it is another model",
                param="reference",
            )
        norm = _norm_before(path)
        if norm in self.gains[0]:
            mine, other = mine * self.gains[0][norm], other * self.gains[1][norm]
        return mine, other


def _pair(path: str) -> tuple[str, str] | None:
    """The matrix whose last rows are the columns of the second one, of which this is one."""
    for first, second in _PAIRS:
        for each in (first, second):
            if path.startswith("layers.") and path.endswith(f".{each}"):
                layer = path.removesuffix(each)
                return layer + first, layer + second
    return None


def _moved(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor | None:
    """Factors of the last rows of ``first`` that the columns of ``second`` undo (AWQ), float32 [E, columns]; or None.

    Of E experts, each one's own; a linear is one. A factor that nothing undoes is a defect, and 1 here.
    """
    experts = second[1].shape[0] // first[1].shape[1]
    width = second[1].shape[1]
    if not experts or experts * first[1].shape[1] != second[1].shape[0] or first[1].shape[0] % experts:
        return None
    mine, other = (side.view(experts, -1, side.shape[1])[:, -width:] for side in first)
    if mine.shape[1] != width:
        return None  # grouped heads
    down, undone = (side.view(experts, -1, width) for side in second)
    rows = (mine * other).sum(2) / other.square().sum(2).clamp(min=1e-30)
    columns = (down * undone).sum(1) / undone.square().sum(1).clamp(min=1e-30)
    return torch.where(((rows * columns - 1).abs() < _UNDONE) & (rows > 0), rows, 1.0)


def _without(matrix: Tensor, factors: Tensor, *, rows: bool) -> Tensor:
    """The last rows of each expert without these factors, or the columns without their inverse."""
    experts, width = factors.shape
    each = matrix.clone().view(experts, -1, matrix.shape[1])
    if rows:
        each[:, -width:] /= factors[:, :, None]
    else:
        each *= factors[:, None]
    return each.view(matrix.shape)


def stored_bits(checkpoint: Checkpoint, *, decoder: bool) -> Bits:
    """How many bits the matrices of a checkpoint have on disk, whatever they are loaded as."""
    if not isinstance(checkpoint, QuantizedCheckpoint) or not checkpoint.modules:
        return lambda _: PLAIN
    return _by_path(
        checkpoint,
        {name: _bits_on_disk(checkpoint, name) for name in checkpoint.modules},
        decoder,
        min,
        PLAIN,
    )


def fitted_groups(checkpoint: Checkpoint, *, decoder: bool) -> Bits:
    """Columns that share a scale in matrices whose 4-bit integers others may have fitted to data; else 0."""
    if not isinstance(checkpoint, QuantizedCheckpoint) or not checkpoint.modules:
        return lambda _: 0
    found = {name: module.fitted() for name, module in checkpoint.modules.items()}
    return _by_path(checkpoint, found, decoder, max, 0)


def _by_path(
    checkpoint: QuantizedCheckpoint,
    on_disk: dict[str, int],
    decoder: bool,
    choose: Callable[..., int],
    otherwise: int,
) -> Bits:
    """From the names of tensors to the path within the model of the matrix that they make."""
    if decoder:
        sources = linear_sources(checkpoint.config, checkpoint)
        sources["embed"] = tuple(name for name in on_disk if name.endswith("embed_tokens.weight"))
        return lambda path: choose(
            (on_disk.get(name, otherwise) for name in sources.get(path, ())), default=otherwise
        )
    chosen = choose(on_disk.values())  # tables of encoders name tensors by module, not the other way round
    vectors = (".weight", ".bias")  # matrices are named by their module
    return lambda path: chosen if path.startswith("layers.") and not path.endswith(vectors) else otherwise


def _bits_on_disk(checkpoint: QuantizedCheckpoint, name: str) -> int:
    info, said = checkpoint.info(name), checkpoint.modules[name].bits
    return 4 if (said or info.nbytes * 8 / math.prod(info.shape)) < 6.5 else 8


def _weights(model: nn.Module) -> dict[str, _Held]:
    """By path; matrices of linears and embeddings are named by their module."""
    found: dict[str, _Held] = {}
    leaves: list[str] = []
    for full, module in model.named_modules():
        path = full.removeprefix("backbone.")  # of an EncodeModel
        if path.startswith(tuple(leaf + "." for leaf in leaves)):
            continue
        if isinstance(module, (*_Packed.__args__, PackedHead, RoundingNorm, PlainNorm)):
            leaves.append(path)
        found |= _of_module(path, module)
    return found


def _of_module(path: str, module: nn.Module) -> dict[str, _Held]:
    if isinstance(module, PackedHead):
        module = module.linear
    if isinstance(module, (RoundingNorm, PlainNorm)):
        module = module.norm
    found: dict[str, _Held] = {}
    if is_packed(module):
        found[path] = _Held(module.dequantize, _bits(module), _even(module))  # type: ignore[arg-type]
    elif isinstance(module, Dense):
        found[path] = _plain(module.unpacked)
    own = dict(module.named_parameters(recurse=False))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        own["bias"] = bias  # type: ignore[assignment]
    for name, value in own.items():
        at = path if name == "weight" and isinstance(module, (Linear, Embedding)) else f"{path}.{name}"
        if at not in found:
            found[at] = _plain(value.detach)
    return found


def _plain(read: Callable[[], Tensor]) -> _Held:
    def matrix() -> Tensor:
        value = read().float()
        return value if value.dim() == 2 else value.reshape(1, -1)

    return _Held(matrix)


def _bits(module: nn.Module) -> int:
    if isinstance(module, ScaledLinear):
        weight = module.quantized
        four = isinstance(weight, Fp4Weight) or (isinstance(weight, GroupIntWeight) and weight.bits == 4)
        return 4 if four else 8
    if isinstance(module, JoinedLinear):
        return min(_bits(part) for part in module.linears)
    return 8 if isinstance(module, (Int8Linear, EightBitLinear)) else 4


def _even(module: nn.Module) -> bool:
    if isinstance(module, ScaledLinear):
        weight = module.quantized
        if not isinstance(weight, GroupIntWeight):
            return False
        # With 8 bits a group's steps are no larger than its row's would be.
        return weight.bits == 8 or (weight.order is None and weight.group == weight.shape[1])
    if isinstance(module, JoinedLinear):
        return any(_even(part) for part in module.linears)
    return isinstance(module, Int8Linear) or (isinstance(module, EightBitLinear) and module.format == "int8")


def _gains(model: nn.Module) -> dict[str, Tensor]:
    """Norms of a decoder whose result goes into matrices and nowhere else."""
    model = getattr(model, "backbone", model)
    if not isinstance(model, DecoderModel) or model.config.norm_place == "post":
        return {}
    return {
        path: module.weight.float()
        for path, module in model.named_modules()
        if isinstance(module, RMSNorm) and path.endswith(tuple(_NORM_BEFORE.values()))
    }


def _differ(mine: Tensor, other: Tensor) -> bool:
    """By more than a cast."""
    return mine.shape != other.shape or audit("", mine[None], other[None], bits=PLAIN).where is not None


def _norm_before(path: str) -> str:
    """Path of the norm that this matrix reads; "" for none."""
    layer = ".".join(path.split(".")[:2])
    norm = _NORM_BEFORE.get(path.removeprefix(layer + "."))
    return f"{layer}.{norm}" if norm else ""
