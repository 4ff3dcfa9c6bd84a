"""Steps and passes that are taken before the first request run on any model, and leave answers and books as they were.

Whether they launch every kernel that requests launch is seen on a GPU (tests/gpu/test_start_cuda.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.execution import encode_graphs, encode_warm_up, warm_up
from headrace.execution.graphs import GraphRunner
from headrace.types import EncodeParams, EncodeTask
from parity.encoders import add_pooling, encode, make, sequences
from parity.test_encode_graphs import padded
from parity.test_graph_runner import build_core, build_model, requests
from support.cores import drain

SIZES = {"step_tokens": 24, "max_num_seqs": 6, "max_model_len": 128}


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rehearsals run their steps here, where nothing is compiled."""
    works: list[str] = []

    def run(
        work: str,
        device: torch.device,
        steps: Callable[[], None],
        aside: AbstractContextManager[None],
        progress: Any = None,
    ) -> int:
        works.append(work)
        with aside, torch.inference_mode():
            steps()
        return 0

    monkeypatch.setattr(warm_up, "rehearse", run)
    monkeypatch.setattr(encode_warm_up, "rehearse", run)
    return works


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_generating(graphs: bool, rehearsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    model = build_model("gemma3")
    work = requests(9, 12, True)
    expected = drain(build_core(model, graphs=graphs, chunk=24), work)
    core = build_core(model, graphs=graphs, chunk=24)
    runner = core.runner
    warm_up.prepare_kernels(runner, "this", **SIZES)
    assert rehearsed == ["this"]
    layers = len(model.layers)
    if isinstance(runner, GraphRunner):
        assert not runner._graphs
        with runner.rehearsing():
            assert len(model.layers) == 2
        foreseen = set(runner.ladders.all(24))
    assert len(model.layers) == layers
    monkeypatch.setattr(warm_up, "GRAPH_SECONDS", 0.0)
    warm_up.warm_up(runner, **SIZES)
    turns = 0
    while core.idle():
        turns += 1
    assert drain(core, work) == expected
    if isinstance(runner, GraphRunner):
        assert turns > 5
        assert set(runner._graphs) <= foreseen
        assert not core.idle()


def test_layers_of_each_kind_are_rehearsed() -> None:
    model = build_model("gemma3")
    kinds = [window is None for window in model.config.windows]
    with model.shortened() as count:
        assert count == len(model.layers) == 2
        assert {window is None for window in model.config.windows[:count]} == set(kinds)
    assert len(model.layers) == len(kinds)


def test_encoding(tmp_path: Path, rehearsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(encode_graphs, "TOKENS", (16, 48, 128))
    monkeypatch.setattr(encode_graphs, "LARGE", (256,))
    make(tmp_path, "bert")
    add_pooling(tmp_path)
    run = padded(tmp_path)
    assert run.graphs is not None
    ids, params = sequences(seed=3, count=9), EncodeParams(task=EncodeTask.EMBED)
    expected = encode(run, ids, params)
    before = set(run.graphs._graphs)
    encode_warm_up.prepare_kernels(run, "that", 300, 8)
    assert rehearsed == ["that"]
    assert set(run.graphs._graphs) == before
    assert sum(encode_warm_up.largest(run, 300)) == 300
    encode_warm_up.run_once(run, encode_warm_up.largest(run, 300))
    assert encode(run, ids, params) == expected
