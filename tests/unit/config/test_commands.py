from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.main import main
from headrace.errors import ConfigError
from unit.config.cases import V1, build
from unit.config.shapes import BGE_LARGE, DEEPSEEK_V3, LLAMA_70B, QWEN3_06B, QWEN3_8B, write_config


def run(command: str, *arguments: str) -> int:
    module = importlib.import_module(f"headrace.cli.{command}")
    parser = argparse.ArgumentParser(prog=command, epilog=module.EXAMPLES)
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(arguments))
    return code


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(build(V1, {}))
    bad.write_text("resources:\n  accelerator: H1000\ntrt_llm: 3\n")
    assert run("config", "check", str(good)) == 0
    assert capsys.readouterr().out == f"{good}: ok\n"
    assert run("config", "check", str(good), str(bad)) == 2
    out = capsys.readouterr().out
    assert f"{bad}:2: resources.accelerator: " in out
    assert f"{bad}:3: trt_llm: is 3; expected a mapping" in out
    assert "2 problems" in out
    assert run("config", "check", str(tmp_path / "none.yaml"), str(good)) == 2
    assert "no such file" in capsys.readouterr().out


def test_check_json_and_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(build(V1, {"resources.node_count": 2}))
    assert run("config", "check", str(tmp_path), "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["ok"]
    assert result["notices"][0]["kind"] == "not_yet"
    assert result["notices"][0]["line"] == 3
    assert run("config", "check", str(file), "--strict", "--json") == 2
    assert not json.loads(capsys.readouterr().out)[0]["ok"]


def test_custom_code_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(build(V1, {}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.py").write_text("raise SystemExit('never imported')")
    assert run("config", "check", str(tmp_path)) == 0
    assert "model.py is not run" in capsys.readouterr().out


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        build(V1, {"environment_variables": {"MY_TOKEN": "hf_value"}, "secrets": {"hf_access_token": None}})
    )
    assert run("config", "show", str(file)) == 0
    text = capsys.readouterr().out
    assert "owner/name" in text
    assert "checkpoint_repository.repo" in text
    assert "hf_value" not in text
    assert run("config", "show", str(file), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["spec"]["model"] == "owner/name"
    assert shown["accelerator"] == "H100"
    file.write_text("trt_llm: 3")
    assert run("config", "show", str(file)) == 2


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "m", QWEN3_8B)
    assert run("plan", str(folder), "--gpu", "H100", "--max-model-len", "8192") == 0
    text = capsys.readouterr().out
    for part in ("8.19 B", "dense", "KV 144.0 KiB a token", "tokens/s", "fp8 weights", "licence"):
        assert part in text
    assert run("plan", str(folder), "--gpu", "H100:2", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ranks"] == 2
    assert data["engine"] == "dense"
    big = write_config(tmp_path / "big", LLAMA_70B)
    assert run("plan", str(big), "--gpu", "H100") == 1
    assert "does not fit" in capsys.readouterr().out
    assert run("plan", str(write_config(tmp_path / "e", BGE_LARGE)), "--gpu", "L4") == 0
    assert "no KV cache" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="max-model-len"):
        run("plan", str(folder), "--max-model-len", "many")
    with pytest.raises(ConfigError, match="engine: is 'bert'"):
        run("plan", str(folder), "--engine", "bert")


def test_plan_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "m", QWEN3_8B)
    changes = {
        "trt_llm.build.checkpoint_repository": {"source": "LOCAL", "repo": str(folder)},
        "trt_llm.build.quantization_type": "fp8_kv",
    }
    (tmp_path / "config.yaml").write_text(build(V1, changes))
    assert run("plan", str(tmp_path / "config.yaml"), "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["machine"], data["quantization"], data["kv_dtype"]) == ("H100", "fp8", "fp8")
    assert {notice["kind"] for notice in data["notices"]} == {"lifted"}


def children_times() -> float:
    """Processor seconds of the processes that were started here and have ended: others do not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_plan_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", DEEPSEEK_V3)
    code = (
        "import sys, argparse; from headrace.cli import plan; p = argparse.ArgumentParser(); plan.add_arguments(p); "
        f"plan.run(p.parse_args([{str(folder)!r}, '--gpu', 'B200:8', '--json'])); "
        "assert not {'torch', 'transformers', 'pydantic', 'aiohttp'} & set(sys.modules), 'heavy'"
    )
    start = children_times()
    src = Path(__file__).parents[3] / "src"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=src)
    assert done.returncode in (0, 1), done.stderr
    assert "heavy" not in done.stderr
    assert children_times() - start < 6  # 0.6 s on a quiet machine


def test_what_cannot_be_served_yet_is_not_called_ok(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `check`; and `plan` says the same, instead of looking for a folder of that name."""
    file = tmp_path / "config.yaml"
    file.write_text(
        "resources: {accelerator: H100}\n"
        "trt_llm: {build: {checkpoint_repository: {source: S3, repo: 's3://bucket/model'}}}\n"
    )
    assert run("config", "check", str(file)) == 0
    assert (
        f"{file}: well formed, but this version does not serve it: 1 setting above" in capsys.readouterr().out
    )
    assert run("config", "check", str(file), "--strict") == 2
    capsys.readouterr()
    with pytest.raises(ConfigError, match="source 'S3' is not in this version"):
        run("plan", str(file))


@pytest.mark.parametrize("gpu", ["", "L4", "H100:2"])
@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "folder", "bert", "odd: name # here"])
def test_init_is_read_by_us_and_by_truss(
    model: str, gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.cli.init import config_text
    from headrace.config.load import check_text
    from headrace.config.resolve import resolve_view

    if model in ("folder", "bert", "odd: name # here"):
        model = str(write_config(tmp_path / model, BGE_LARGE if model == "bert" else QWEN3_06B))
    text = config_text(model, gpu)
    view = check_text(text)
    assert [str(problem) for problem in view.report.problems] == []
    kinds = {notice.kind for notice in view.report.notices}
    assert kinds <= {"lifted"} | ({"not_yet", "differs"} if ":" in gpu else set())  # two GPUs
    spec = resolve_view(view).spec
    assert spec.model == model
    assert spec.engine == ("bert" if "bert" in model else "decoder")
    if "Qwen/" not in model and "bert" not in model:
        assert spec.max_model_len == 40960
    assert text.count("#") > 10
    truss_config = pytest.importorskip("truss.base.truss_config")
    from truss.base import trt_llm_config

    monkeypatch.setattr(trt_llm_config, "get_hf_config", lambda repo, revision: None)
    (tmp_path / "config.yaml").write_text(text)
    parsed = truss_config.TrussConfig.from_yaml(tmp_path / "config.yaml")
    assert parsed.trt_llm.build.checkpoint_repository.repo == model
    parsed.validate_forbid_extra()


def test_init_writes_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    assert run("init", "o/n", "-o", str(file)) == 0
    assert "headrace plan" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--force"):
        run("init", "o/n", "-o", str(file))
    assert run("init", "o/m", "-o", str(file), "--force") == 0
    assert "o/m" in file.read_text()
    assert run("init", "o/n", "-o", "-") == 0
    assert "o/n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="unsupported accelerator"):
        run("init", "o/n", "--gpu", "X1", "-o", "-")
    with pytest.raises(ConfigError, match="no name"):
        run("init", "a\nb", "-o", "-")


def test_a_file_without_a_model_is_told_beside_its_other_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("python_version: py38\n")
    assert main(["config", "check", str(file)]) == 2
    told = capsys.readouterr().out
    assert "py38" in told
    assert "names no model" in told
    assert "2 problems" in told


def test_what_is_not_in_this_version_is_refused_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "resources: {accelerator: H100}\ntrt_llm:\n  build:\n    checkpoint_repository: {source: GCS, repo: gs://b/p}\n"
        "    lora_adapters: {a: {source: HF, repo: o/n}}\n"
    )
    assert main(["serve", str(file)]) == 2
    told = capsys.readouterr().err
    assert "lora_adapters" in told
    assert "GCS" in told
    assert f"{file}:4" in told
