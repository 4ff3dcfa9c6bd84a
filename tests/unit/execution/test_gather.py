"""Tensors of a loaded model are found wherever they are held, and move without changing."""

from __future__ import annotations

import torch

from headrace.config.quantization import quantization_type
from headrace.execution.gather import held_tensors, move_together
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}  # fmt: skip


def test_all_are_found_once_and_keep_values_and_ties() -> None:
    """Of plain modules, packed linears, tied tables and rotary embeddings, which are no modules."""
    model = random_weights(read_config(CONFIG), dtype=torch.float32, device="cpu", seed=3)
    swap = load_time(quantization_type("fp8"), torch.device("cpu"))
    for path, module in list(model.named_modules()):
        if hasattr(module, "parts") and path != "head":
            model.set_submodule(path, swap(path, module))
    packed = [module for module in model.modules() if isinstance(module, ScaledLinear)]
    assert len(packed) == 8
    found = held_tensors(model)
    addresses = {tensor.data_ptr() for tensor in found}
    wanted = [
        model.embed.weight,
        model.norm.weight,
        *(m.held.codes for m in packed),
        *(m.held.scale for m in packed),
    ]
    assert {tensor.data_ptr() for tensor in wanted} <= addresses
    assert model.rope is not None
    rotary = [value.data_ptr() for value in vars(model.rope).values() if isinstance(value, torch.Tensor)]
    assert rotary and set(rotary) <= addresses
    assert len({id(tensor) for tensor in found}) == len(found)

    kept = [tensor.untyped_storage() for tensor in found]  # else their places are taken again
    before = [tensor.clone() for tensor in found]
    shared: dict[int, list[torch.Tensor]] = {}
    for tensor in found:
        shared.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for tensors in shared.values():
        move_together(tensors)
    assert not {tensor.data_ptr() for tensor in found} & addresses
    assert len(kept) == len(found)
    for old, new in zip(before, found):
        assert old.dtype is new.dtype and torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    assert model.head is not None and model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def test_what_a_view_is_of_moves_with_it() -> None:
    """Packed codes are often a flattened view; nobody else holds the tensor that it is of, with the memory."""
    module = torch.nn.Module()
    module.codes = torch.randint(0, 255, (3, 1, 8), dtype=torch.uint8).flatten(1)
    found = held_tensors(module)
    assert [tuple(tensor.shape) for tensor in found] == [(3, 8), (3, 1, 8)]
    values, old = module.codes.clone(), found[0].untyped_storage().data_ptr()
    move_together(found)
    assert torch.equal(module.codes, values)
    assert {tensor.untyped_storage().data_ptr() for tensor in found} != {old}
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1


def test_views_of_one_storage_stay_views_of_one() -> None:
    whole = torch.randn(6, 10)
    views = [whole[1:3, 2:], whole.t()]
    wanted = [view.clone() for view in views]
    old = whole.untyped_storage().data_ptr()
    move_together([whole, *views])
    assert whole.untyped_storage().data_ptr() != old
    assert {view.untyped_storage().data_ptr() for view in views} == {whole.untyped_storage().data_ptr()}
    assert all(torch.equal(view, want) and view.stride() == (10, 1)[:: 1 - 2 * i] for i, (view, want) in
               enumerate(zip(views, wanted)))  # fmt: skip
