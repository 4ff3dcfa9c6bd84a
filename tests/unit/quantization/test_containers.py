"""Every container against packing by plain loops, and through the loader into a model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.engines.audits import fitted_groups, stored_bits
from headrace.engines.inspect import inspect
from headrace.errors import HeadraceError, UnsupportedCheckpoint
from headrace.layers.experts import ExpertLinear
from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.models.loading import load_decoder
from headrace.quantization.containers import METHODS, QuantizedCheckpoint, open_quantized
from headrace.quantization.experts import ScaledExperts
from headrace.quantization.scaled import ScaledLinear
from support import quantized_folder as write

Pack = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
RNG = random.Random(3)


def fp8_pack(block: tuple[int, int] | None, suffix: str, static: bool = False) -> Pack:
    """``block`` None: one scale; (1, 0): one a row."""

    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        high, wide = block or (rows, columns)
        wide = wide or columns
        scale = torch.rand(-(-rows // high), -(-columns // wide)) * 1e-3 + 1e-3
        codes, dense = write.fp8(weight, scale, (high, wide))
        stored = scale if block is not None else scale.reshape(1)
        parts = {f"{base}.weight": codes, f"{base}.{suffix}": stored}
        if static:
            parts[f"{base}.input_scale"] = torch.rand(()) + 0.1
        return parts, dense

    return pack


def nvfp4_pack(names: tuple[str, str, str], divides: bool) -> Pack:
    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, dense = write.fp4(weight, 16)
        scale = (torch.rand(weight.shape[0], weight.shape[1] // 16) * 300).to(torch.float8_e4m3fn)
        whole = torch.tensor([2.0**-13 * (1 + int(torch.randint(0, 3, ())))])
        dense = dense * (scale.float() * whole).repeat_interleave(16, 1)
        kept = (1 / whole.double()).float() if divides else whole.reshape(())
        return dict(zip((f"{base}.{name}" for name in names), (packed, scale, kept))), dense

    return pack


def mxfp4_pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    packed, dense = write.fp4(weight, 32)
    scale = torch.randint(117, 124, (weight.shape[0], weight.shape[1] // 32), dtype=torch.uint8)
    dense = dense * torch.exp2(scale.double() - 127).float().repeat_interleave(32, 1)
    return {f"{base}.weight_packed": packed, f"{base}.weight_scale": scale}, dense


def mxfp8_pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    exponents = torch.randint(110, 122, (weight.shape[0], weight.shape[1] // 32), dtype=torch.uint8)
    codes, dense = write.fp8(weight, torch.exp2(exponents.double() - 127).float(), (1, 32))
    return {f"{base}.weight": codes, f"{base}.weight_scale": exponents}, dense


def block_pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As ModelOpt writes blocks: four dimensions of scales."""
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // 128), 1, -(-columns // 128), 1) * 1e-3 + 1e-3
    codes, dense = write.fp8(weight, scale[:, 0, :, 0], (128, 128))
    return {f"{base}.weight": codes, f"{base}.weight_scale": scale}, dense


def mxfp4_modelopt(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts, dense = mxfp4_pack(base, weight)
    return {name.replace("_packed", ""): part for name, part in parts.items()}, dense


def int8_rows(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A scale a row, of one dimension."""
    parts, dense = int8_pack(base, weight)
    return {**parts, f"{base}.weight_scale": parts[f"{base}.weight_scale"][:, 0]}, dense


def bnb_int8(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    peak = torch.rand(weight.shape[0])
    parts = {
        f"{base}.weight": codes,
        f"{base}.SCB": peak,
        f"{base}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, codes.float() * (peak / 127)[:, None]


def modelopt(algorithm: str, **others: Any) -> dict[str, Any]:
    producer = {"name": "modelopt", "version": "0.47.0"}
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head"],
        "producer": producer,
        **others,
    }


def packed_int(bits: int, group: int, zeros: bool) -> Pack:
    """compressed-tensors' pack-quantized."""

    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        groups = columns // group
        codes = [[RNG.randrange(2**bits) for _ in range(columns)] for _ in range(rows)]
        low = 2 ** (bits - 1)
        zero = [[RNG.randrange(2**bits) if zeros else low for _ in range(rows)] for _ in range(groups)]
        scale = (torch.rand(rows, groups) * 0.02 + 0.01).bfloat16()
        s = scale.float().tolist()
        dense = torch.tensor(
            [
                [(codes[i][j] - zero[j // group][i]) * s[i][j // group] for j in range(columns)]
                for i in range(rows)
            ]
        )
        parts = {
            f"{base}.weight_packed": write.words(codes, bits),
            f"{base}.weight_shape": torch.tensor([rows, columns]),
            f"{base}.weight_scale": scale,
        }
        if zeros:
            parts[f"{base}.weight_zero_point"] = write.words(zero, bits).t().contiguous()
        return parts, dense

    return pack


def int8_pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
    scale = torch.rand(weight.shape[0], 1) * 0.01
    return {f"{base}.weight": codes, f"{base}.weight_scale": scale}, codes.float() * scale


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FLOAT8 = {"num_bits": 8, "type": "float"}
DYNAMIC = {**FLOAT8, "strategy": "token", "dynamic": True}
CASES: dict[str, tuple[Pack, dict[str, Any] | None]] = {
    "deepseek": (
        fp8_pack((48, 32), "weight_scale_inv"),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 32], "activation_scheme": "dynamic"},
    ),
    "fp8_static": (
        fp8_pack(None, "weight_scale", static=True),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "ct_fp8_tensor": (
        fp8_pack(None, "weight_scale", static=True),
        compressed("float-quantized", {**FLOAT8, "strategy": "tensor"}, {**FLOAT8, "dynamic": False}),
    ),
    "ct_fp8_channel": (
        fp8_pack((1, 0), "weight_scale"),
        compressed("float-quantized", {**FLOAT8, "strategy": "channel"}, DYNAMIC),
    ),
    "ct_fp8_block": (
        fp8_pack((16, 32), "weight_scale"),
        compressed("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [16, 32]}, DYNAMIC),
    ),
    "ct_int4": (
        packed_int(4, 32, zeros=False),
        compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    ),
    "ct_int4_zeros": (
        packed_int(4, 16, zeros=True),
        compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
    ),
    "ct_int8_packed": (
        packed_int(8, 32, zeros=False),
        compressed("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}),
    ),
    "ct_int8": (
        int8_pack,
        compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    ),
    "ct_nvfp4": (
        nvfp4_pack(("weight_packed", "weight_scale", "weight_global_scale"), divides=True),
        compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16}),
    ),
    "ct_mxfp4": (
        mxfp4_pack,
        compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32}),
    ),
    "modelopt_fp8": (
        fp8_pack(None, "weight_scale", static=True),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "modelopt_nvfp4": (nvfp4_pack(("weight", "weight_scale", "weight_scale_2"), divides=False), None),
    "ct_mxfp8": (
        mxfp8_pack,
        compressed("mxfp8-quantized", {**FLOAT8, "strategy": "group", "group_size": 32}),
    ),
    "modelopt_mxfp8": (mxfp8_pack, modelopt("MXFP8", group_size=32)),
    "modelopt_fp8_pb_wo": (block_pack, modelopt("fp8_pb_wo")),
    "modelopt_mxfp4": (mxfp4_modelopt, modelopt("mxfp4")),
    "modelopt_w4a16_nvfp4": (
        nvfp4_pack(("weight", "weight_scale", "weight_scale_2"), divides=False),
        modelopt("W4A16_NVFP4", group_size=16),
    ),
    "modelopt_w8a16": (int8_rows, modelopt("W8A16")),
    "bnb_nf4": (
        lambda base, weight: write.bitsandbytes4(base, weight, "nf4", RNG, nested=True),
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_threshold": 6.0,
        },
    ),
    "bnb_f4": (  # its name is fp4; the cases' names say which round activations
        lambda base, weight: write.bitsandbytes4(base, weight, "fp4", RNG, nested=False),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ),
    "bnb_int8": (
        bnb_int8,
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
    ),
    "awq_sym": (
        lambda base, weight: write.awq(base, weight, 32, RNG),
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "zero_point": False,
            "sym": True,
            "format": "gemm",
        },
    ),
    "awq": (
        lambda base, weight: write.awq(base, weight, 32, RNG),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ),
    "gptq": (
        lambda base, weight: write.gptq(base, weight, 32, RNG, bits=4, v1=True, order=False),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    ),
    "gptq_v2_order": (
        lambda base, weight: write.gptq(base, weight, 16, RNG, bits=4, v1=False, order=True),
        {"quant_method": "gptq", "bits": 4, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "gptq_8": (
        lambda base, weight: write.gptq(base, weight, 32, RNG, bits=8, v1=True, order=False),
        {"quant_method": "gptq", "bits": 8, "group_size": 32},
    ),
}


BY_TABLE = ("bnb_nf4", "bnb_f4")  # no kernel reads them: they are held in 16 bits


def load_kept(folder: Path) -> DecoderModel:
    checkpoint = open_quantized(FolderCheckpoint(folder))
    return load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", keep_packed=True)


def make(tmp_path: Path, case: str, *, moe: bool = False) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(1)
    pack, settings = CASES[case]
    dense = write.write_quantized(tmp_path / case, pack, settings, moe=moe)
    if settings is None:
        block = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        (tmp_path / case / "hf_quant_config.json").write_text(json.dumps({"quantization": block}))
    return tmp_path / case, dense


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_is_what_the_loops_say(case: str, tmp_path: Path) -> None:
    folder, dense = make(tmp_path, case)
    checkpoint = open_quantized(FolderCheckpoint(folder))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert set(checkpoint.names()) == set(dense)
    assert "quantization_config" not in checkpoint.config
    for name, expected in dense.items():
        got = checkpoint.load(name)
        assert checkpoint.info(name).shape == tuple(expected.shape)
        # NVFP4 with a dividing scale: 1 / x is rounded, and so is the product with it.
        torch.testing.assert_close(got.float(), expected, rtol=3e-7 if case == "ct_nvfp4" else 0, atol=0)


def test_what_verify_takes_them_for(tmp_path: Path) -> None:
    """Bits that bytes do not tell, and which integers others may have fitted, each matrix by itself."""
    fitted = {"ct_int4": 32, "ct_int4_zeros": 16, "awq": 32, "awq_sym": 32, "gptq": 32, "gptq_v2_order": 64}
    for case in CASES:
        folder, _ = make(tmp_path, case)
        checkpoint = open_quantized(FolderCheckpoint(folder))
        assert isinstance(checkpoint, QuantizedCheckpoint)
        of = checkpoint.modules["model.layers.0.self_attn.q_proj.weight"]
        assert of.fitted() == fitted.get(case, 0), case
        found = fitted_groups(checkpoint, decoder=True)
        assert found("layers.0.attention.qkv") == fitted.get(case, 0)
        assert found("norm.weight") == 0
    four = compressed("int-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"})
    write.write_quantized(tmp_path / "few", int8_pack, four)
    checkpoint = open_quantized(FolderCheckpoint(tmp_path / "few"))
    bits = stored_bits(checkpoint, decoder=True)
    assert bits("layers.0.mlp.down") == 4  # in a byte each
    assert fitted_groups(checkpoint, decoder=True)("layers.0.mlp.down") > 0
    assert bits("layers.0.mlp_norm.weight") == 16
    assert stored_bits(checkpoint, decoder=False)("layers.0.attention_norm.weight") == 16
    assert stored_bits(checkpoint, decoder=False)("layers.0.attention.qkv") == 4


@pytest.mark.parametrize("case", CASES)
def test_models_keep_the_numbers(case: str, tmp_path: Path) -> None:
    folder, _ = make(tmp_path, case)
    checkpoint = open_quantized(FolderCheckpoint(folder))
    plain = load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu")
    kept = load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", keep_packed=True)
    linears = [name for name, module in kept.named_modules() if isinstance(module, Linear)]
    assert linears == ["head"] or case in BY_TABLE
    ids = [[3, 7, 150, 22], [9, 9]]
    want, got = (model.logits(model(PackedBatch.for_encoding(ids, causal=True))) for model in (plain, kept))
    assert torch.isfinite(want).all()
    rounds = any(isinstance(m, ScaledLinear) and m.activations.kind != "none" for m in kept.modules())
    error = float((got - want).norm() / want.norm())
    assert error < (0.3 if rounds else 1e-5)
    by_weight_alone = "mxfp8" in case or case == "modelopt_fp8_pb_wo"
    assert rounds == (("fp8" in case or case == "deepseek") and not by_weight_alone)


def test_projections_that_are_exchanged_are_refused(tmp_path: Path) -> None:
    """Together q and k have the rows of k and q."""
    folder, _ = make(tmp_path, "ct_fp8_channel")
    tensors = load_file(folder / "model.safetensors")
    exchanged = {"q_proj": "k_proj", "k_proj": "q_proj"}
    for name, tensor in list(tensors.items()):
        part = name.split(".")[-2]
        if part in exchanged:
            tensors[name.replace(part, exchanged[part])] = tensor.clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=r"q_proj.weight' has shape"):
        load_kept(folder)


@pytest.mark.parametrize("case", CASES)
def test_experts_keep_the_numbers(case: str, tmp_path: Path) -> None:
    """Each expert's matrices, where they can be multiplied as they are; those of another order each are dequantized."""
    folder, dense = make(tmp_path, case, moe=True)
    checkpoint = open_quantized(FolderCheckpoint(folder))
    plain = load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu")
    kept = load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", keep_packed=True)
    experts = kept.layers[0].mlp.experts
    own_order = case == "gptq_v2_order" or case in BY_TABLE  # then they are dequantized
    assert isinstance(experts.gate_up, ExpertLinear if own_order else ScaledExperts)
    at = "model.layers.0.mlp.experts."
    both = torch.cat([dense[f"{at}{e}.{part}_proj.weight"] for e in range(3) for part in ("gate", "up")])
    got = experts.gate_up.weight if own_order else experts.gate_up.dequantize()
    torch.testing.assert_close(got, both, rtol=3e-7, atol=0)
    down = plain.layers[0].mlp.experts.down.weight
    torch.testing.assert_close(
        down, torch.cat([dense[f"{at}{e}.down_proj.weight"] for e in range(3)]), rtol=3e-7, atol=0
    )
    x = torch.randn(7, both.shape[1])
    rounds = not own_order and experts.gate_up.activations.kind != "none"
    want, got = (model.layers[0].mlp(x) for model in (plain, kept))
    assert float((got - want).norm() / want.norm()) < (0.1 if rounds else 1e-5)


def test_plain_checkpoints_pass_through(tmp_path: Path) -> None:
    from support.tiny_folder import write_llama

    checkpoint = FolderCheckpoint(write_llama(tmp_path / "m"))
    assert open_quantized(checkpoint) is checkpoint


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("awq", {"quant_method": "hqq"}, "quant_method is 'hqq'.*awq"),
        ("bnb_nf4", {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'; expected nf4 or fp4"),
        ("awq", {"version": "gemv"}, "version is 'gemv'; expected gemm"),
        ("awq", {"bits": 3}, "bits is 3"),
        ("gptq", {"bits": 3}, "bits is 3"),
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("deepseek", {"fmt": "e5m2"}, "e5m2"),
        ("deepseek", {"weight_block_size": [16, 16]}, r"weight_scale_inv.*calls for"),
        ("ct_fp8_channel", {"format": "marlin-24"}, "marlin-24"),
        ("ct_fp8_channel", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ("ct_fp8_channel", {"transform_config": {"x": 1}}, "transform_config"),
        ("modelopt_fp8", {"quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ("modelopt_w4a16_nvfp4", {"group_size": 32}, "group_size is 32; expected 16"),
        (
            "modelopt_w4a16_nvfp4",
            {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}},
            "group_size is 32",
        ),
        ("modelopt_fp8", {"pre_quant_scale": True}, "pre_quant_scale"),
        ("awq", {"checkpoint_format": "gemv_fast"}, "checkpoint_format is 'gemv_fast'; expected gemm"),
        ("awq", {"pack_dtype": "int16"}, "pack_dtype"),
        ("awq", {"data_type": "nv_fp"}, "data_type is 'nv_fp'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = make(tmp_path, case)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        open_quantized(FolderCheckpoint(folder))
    if "weight_block_size" not in changes:  # that one shows in the tensors alone
        with pytest.raises(UnsupportedCheckpoint, match=message):  # as plan looks at it
            inspect(folder)


@pytest.mark.parametrize("case", ["ct_int4", "awq", "gptq"])
def test_groups_that_do_not_divide_the_columns_are_refused(case: str, tmp_path: Path) -> None:
    """64 columns in groups of 40 have as many scales as in groups of 32, and must not be read so."""
    folder, _ = make(tmp_path, case)
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    groups = settings.get("config_groups")
    (settings if groups is None else groups["group_0"]["weights"])["group_size"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}, path)
    with pytest.raises(UnsupportedCheckpoint, match=r"group_size.*expected a divisor of (64|96)"):
        open_quantized(FolderCheckpoint(folder))


@pytest.mark.parametrize(
    "case", ["ct_mxfp8", "ct_mxfp4", "ct_nvfp4", "modelopt_mxfp8", "modelopt_mxfp4", "modelopt_nvfp4"]
)
def test_scales_of_blocks_that_are_nan_are_refused(case: str, tmp_path: Path) -> None:
    folder, _ = make(tmp_path, case)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("weight_scale"))
    tensors[name].view(torch.uint8)[3, 0] = RNG.choice((127, 255)) if "nvfp4" in case else 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match="NaN"):
        open_quantized(FolderCheckpoint(folder)).load(name.removesuffix("_scale").removesuffix("_packed"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [4]}, r"shape is \[4\]; expected \[rows, columns\]"),
        ({"blocksize": 0}, "blocksize is 0"),
        ({"quant_type": "af4"}, "'af4'; expected nf4 or fp4"),
        ({"shape": [64, 640]}, "is U8"),
        ({"nested_blocksize": None}, "nested_blocksize is None"),
    ],
)
def test_bitsandbytes_says_what_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder, _ = make(tmp_path, "bnb_nf4")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "quant_state" in n)
    state = json.loads(bytes(tensors[name].tolist())) | changes
    save_file(tensors | {name: write.table_state(state)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=message):
        open_quantized(FolderCheckpoint(folder))
    save_file(tensors | {name: torch.tensor([1, 2, 3], dtype=torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match="no valid JSON"):
        open_quantized(FolderCheckpoint(folder))


def test_modelopt_layers_of_different_formats(tmp_path: Path) -> None:
    """MIXED_PRECISION: each by its own algorithm."""

    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return (mxfp8_pack if "mlp" in base else fp8_pack(None, "weight_scale", static=True))(base, weight)

    layers = {
        f"model.layers.0.{name}_proj": {"quant_algo": "MXFP8" if "mlp" in name else "FP8"}
        for name in (
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "mlp.gate",
            "mlp.up",
            "mlp.down",
        )
    }
    dense = write.write_quantized(tmp_path, pack, modelopt("MIXED_PRECISION", quantized_layers=layers))
    checkpoint = open_quantized(FolderCheckpoint(tmp_path))
    for name, expected in dense.items():
        torch.testing.assert_close(checkpoint.load(name).float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_missing_tensor_is_named(case: str, tmp_path: Path) -> None:
    """A packed tensor or its scale taken away is noticed before a forward."""
    folder, dense = make(tmp_path, case)
    tensors = load_file(folder / "model.safetensors")
    spare = ("g_idx", "zero_point", "input_scale", "weight_format")
    target = next(n for n in tensors if n not in dense and not n.endswith(spare))
    del tensors[target]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(HeadraceError):
        load_kept(folder)


def test_scales_must_be_finite(tmp_path: Path) -> None:
    folder, _ = make(tmp_path, "ct_fp8_channel")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("weight_scale"))
    tensors[name][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_quantized(FolderCheckpoint(folder))
    with pytest.raises(UnsupportedCheckpoint, match="NaN"):
        checkpoint.load(name.removesuffix("_scale"))


@pytest.mark.parametrize(
    ("name", "order"), [("m.down_proj", [0, 1, 2, 3, 4, 5]), ("m.gate_up_proj", [0, 2, 4, 1, 3, 5])]
)
def test_gpt_oss_experts(name: str, order: list[int], tmp_path: Path) -> None:
    """Gates and ups alternate in the file."""
    folder, _ = make(tmp_path, "awq")
    experts, outputs, groups = 2, 6, 3
    blocks = torch.randint(0, 256, (experts, outputs, groups, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (experts, outputs, groups), dtype=torch.uint8)
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    got = open_quantized(FolderCheckpoint(folder)).load(name)
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for e in range(experts):
        for at, o in enumerate(order):
            for j in range(groups * 32):
                code = int(blocks[e, o, j // 32, j % 32 // 2]) >> 4 * (j % 2) & 15
                value = values[code & 7] * (-1 if code > 7 else 1) * 2.0 ** (int(scales[e, o, j // 32]) - 127)
                assert got[e, at, j].item() == value


def test_modelopt_asks_for_its_cache(tmp_path: Path) -> None:
    checkpoint = open_quantized(FolderCheckpoint(make(tmp_path, "modelopt_nvfp4")[0]))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert checkpoint.container.kv_cache == "fp8"
    assert set(METHODS) >= {"awq", "gptq", "fp8", "mxfp4", "modelopt", "compressed-tensors"}
