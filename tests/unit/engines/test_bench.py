"""headrace bench: cases, step times, windows of a profile, and its page, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headrace.cli.main import main
from headrace.config.shapes import SHAPES
from headrace.engines.bench import profile
from headrace.engines.bench.cases import Case, Measurement, StepTime, measure, parse_case
from headrace.engines.bench.cores import build_core, random_model, read_shape
from headrace.engines.bench.floors import Work
from headrace.engines.bench.profile import Kernel, Window, WindowProfiler, kind_of
from headrace.engines.bench.report import summary
from headrace.engines.generate import GenerateCore
from headrace.errors import ConfigError
from headrace.models.decoder import DecoderModel

RATES = (1e12, 1e14)


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return random_model(SHAPES["tiny"], dtype=torch.float32, device=torch.device("cpu"))


def core_of(model: DecoderModel, case: Case, step_tokens: int = 32) -> GenerateCore:
    return build_core(model, [case], eager=True, step_tokens=step_tokens)


@pytest.mark.parametrize("text", ["64", "64x512", "0x5/5", "3x4/-1", "axb/c", "1x2/3/4"])
def test_cases_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="REQUESTSxINPUT/OUTPUT"):
        parse_case(text)


def test_every_step_is_timed_and_split_into_parts(model: DecoderModel) -> None:
    case = parse_case("3x20/6")
    core = core_of(model, case)
    found = measure(core, case, 512)
    prefill = [step for step in found.steps if step.prefill]
    assert sum(step.tokens for step in found.steps) == 3 * (20 + 6 - 1)
    assert len(prefill) == 2 and prefill[0].tokens == 32  # 60 prompt tokens in steps of 32
    assert len(found.first) == 3 and len(found.gaps) == 3 * 5
    assert found.decode_ms() is not None
    assert abs(sum(step.seconds for step in found.steps) - found.seconds) < 0.2 * found.seconds + 1e-3
    host = dict(found.host)
    assert host["wait"] >= 0 and host.pop("total") == pytest.approx(sum(host.values()) - host["wait"])
    assert "schedule" not in vars(core.scheduler)  # the clocks are gone
    facts = found.as_dict()
    assert facts["device_busy"] == {"prefill": None, "decode": None}  # a CPU has no clock of its own
    assert facts["case"] == "3x20/6" and facts["prefill_steps"] == 2
    json.dumps(facts)


def test_busy_share_is_the_devices_time_over_that_of_its_steps() -> None:
    steps = [
        StepTime(0.5, 64, 2, True, 1, 0.25),
        StepTime(0.004, 2, 2, False, 4, 0.003),
        StepTime(0.006, 2, 2, False, 1, 0.0055),
        StepTime(9.0, 2, 2, False),  # not measured
    ]
    found = Measurement(Case(2, 32, 8), 10.0, [0.5], [0.1], steps)
    assert found.busy(prefill=True) == 0.5
    assert found.busy(prefill=False) == pytest.approx(0.85)
    assert found.as_dict()["device_busy"] == {"prefill": 0.5, "decode": 0.85}
    found.fill = 0.125  # the device had the first step before it was waited for
    assert found.busy(prefill=True) == 0.4 and found.busy(prefill=False) == pytest.approx(0.85)
    found.steps = steps[3:]
    assert found.busy(prefill=True) is None and found.busy(prefill=False) is None


def test_windows_hold_prefill_and_full_decode_steps(model: DecoderModel, tmp_path: Path) -> None:
    case = Case(2, 40, 12)
    core = core_of(model, case)
    profiler = WindowProfiler(core, tmp_path, limit=4, case=case)
    measure(core, case, 512, on_step=profiler.on_step)
    profiler.close()
    prefill, decode = profiler.windows
    assert (prefill.name, prefill.steps, prefill.tokens) == ("prefill", 3, 81)  # one request decodes already
    assert (decode.name, decode.steps, decode.tokens) == ("decode", 4, 8)
    assert 4 * 2 * 40 < decode.keys < 4 * 2 * 52
    for window in (prefill, decode):
        assert window.by_kind()["linear"].seconds > 0
        events = json.loads((tmp_path / f"{window.name}.trace.json").read_text())["traceEvents"]
        assert any(event.get("name") == "aten::mm" for event in events)


def test_busy_time_counts_overlapping_kernels_once() -> None:
    span, busy, gap = profile._cover([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)])
    assert (span, busy, gap) == (7.0, 5.0, 2.0)
    assert profile._cover([]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_decode", "attention"),
        ("_fresh", "attention"),
        ("_skinny", "linear"),
        ("nvjet_tst_128x256", "linear"),
        ("_best", "sampling"),
        ("_rms_norm", "norms, rotary, gates, cache write"),
        ("Memcpy HtoD", "copies"),
        ("aten::sin", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_page(model: DecoderModel) -> None:
    case = Case(2, 16, 4)
    core = core_of(model, case)
    work, found = Work.of(model, core.runner.caches), measure(core, case, 512)
    window = Window("decode", steps=2, tokens=4, keys=80, span=4e-3, busy=3e-3, largest_gap=5e-4)
    window.kernels = [Kernel("_skinny", 10, 2e-3), Kernel("_decode", 4, 1e-3)]
    page = summary("tiny", found, [window], work, RATES)
    assert "busy 75.0% of 2.000 ms a step; idle 500 us a step, 500 us at most" in page
    moved = work.weight_bytes + work.key_bytes * 40
    assert f"floor      {moved / RATES[0] * 1e3:.3f} ms a step" in page
    rate = work.weight_bytes * 2 / 2e-3 / 1e12
    assert f"1.000  66.7%         5.0  {rate:5.2f}  linear" in page


def test_work_is_that_of_the_shape(model: DecoderModel) -> None:
    core, c = core_of(model, Case(1, 8, 3)), SHAPES["tiny"]
    work = Work.of(model, core.runner.caches)
    layer = 64 * (4 + 2 * 2) * 16 + 4 * 16 * 64 + 3 * 64 * 128
    assert work.body == 2 * layer
    assert work.weight_bytes == 4 * (2 * layer + c["vocab_size"] * 64)
    assert work.key_bytes == 2 * 2 * 2 * 16 * 4
    small = build_core(model, [Case(1, 8, 3)], eager=True, step_tokens=32, cache=torch.float8_e4m3fn)
    assert Work.of(model, small.runner.caches).key_bytes == work.key_bytes // 4
    longer = work.case_seconds(Case(1, 8, 3), RATES) - work.case_seconds(Case(1, 8, 2), RATES)
    assert longer == pytest.approx((work.weight_bytes + work.key_bytes * 10) / RATES[0])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--random", "tiny", "--cases", "2x8/8", "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"] == "2x8/8" and found["floor_share"] is None and found["output_tok_s"] > 0
    assert main([*arguments, "--profile", str(tmp_path), "--profile-steps", "2"]) == 0
    page = (tmp_path / "2x8-8" / "summary.txt").read_text()
    out = capsys.readouterr().out
    assert page in out and "device = cpu" in page and "decode: 2 steps of 2 tokens" in page
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(SHAPES["tiny"]))
    assert read_shape(str(shape)) == read_shape(str(tmp_path)) == SHAPES["tiny"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either MODEL or --random"),
        (["model", "--random", "tiny"], "give either MODEL or --random"),
        (["--random", "qwen3-0.6"], "did you mean 'qwen3-0.6b'"),
        (["--random", "tiny", "--prompt", "0"], "REQUESTSxINPUT/OUTPUT"),
        (["--random", "tiny-bert"], "BertModel"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    assert words in capsys.readouterr().err
