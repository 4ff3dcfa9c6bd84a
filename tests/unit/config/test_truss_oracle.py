"""The official package as a witness: it refuses what we refuse, and reads what we let pass."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from unit.config.cases import CASES, Case, build

truss_config = pytest.importorskip("truss.base.truss_config")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from truss.base import trt_llm_config

    monkeypatch.setattr(trt_llm_config, "get_hf_config", lambda repo, revision: None)
    warnings.simplefilter("ignore")


def parse(tmp_path: Path, text: str) -> object:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return truss_config.TrussConfig.from_yaml(file)


@pytest.mark.parametrize("case", [case for case in CASES if case.hosted], ids=str)
def test_hosted_package_refuses_it_too(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017  it raises ValueError, TypeError and pydantic's own
        parse(tmp_path, build(case.base, case.bad))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hosted_package_reads_the_neighbour(case: Case, tmp_path: Path) -> None:
    assert parse(tmp_path, build(case.base, case.good)) is not None
