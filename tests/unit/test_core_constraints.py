"""Constraints in the generate loop: a model of random logits can only write what its grammar allows."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from typing import Any

import jsonschema
import pytest

from headrace.engines.generate import GenerateCore
from headrace.execution.constraints import compiler as compiler_module
from headrace.execution.constraints.compiler import ConstraintCompiler
from headrace.execution.constraints.table import ConstraintTable
from headrace.types import ConstraintSpec, FinishReason, Judged, Output, Request, SamplingParams
from support.byte_vocabulary import EOS, THINK, UNTHINK, VOCAB, tokenizer_json
from support.prefix_model import make_core

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": -5, "maximum": 99}, "ok": {"enum": ["yes", "nö"]}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
JSON = ConstraintSpec("json_schema", json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}}))
SETUPS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "preempting": {"num_blocks": 34, "max_model_len": 64},
    "few rows": {"max_num_seqs": 2},
}


def core_with(**setup: Any) -> GenerateCore:
    core = make_core(vocab_size=VOCAB, eos_ids=(EOS,), **setup)
    compiler = ConstraintCompiler(tokenizer_json, vocab_size=VOCAB, eos_ids=(EOS,))
    core.constraints = ConstraintTable(compiler, core.runner.device)
    core.scheduler.is_ready = core.constraints.is_ready
    return core


def run(core: GenerateCore, requests: list[Request], seconds: float = 60.0) -> dict[str, list[Output]]:
    core.add(requests)
    outputs: dict[str, list[Output]] = {}
    end = time.monotonic() + seconds
    while core.has_work():
        assert time.monotonic() < end, "the core did not drain"
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    core.scheduler.check()
    assert core.scheduler.pool.account().owned == 0
    assert not core.constraints._live
    return outputs


def ids(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(outputs: list[Output]) -> str:
    return bytes(token for token in ids(outputs) if token < 256).decode()


def request(i: int, constraint: ConstraintSpec | None, **sampling: Any) -> Request:
    prompt = tuple(random.Random(i).randrange(97) for _ in range(3 + 5 * (i % 4)))
    params = {"max_tokens": 36, "temperature": 1.0, "seed": i} | sampling
    return Request(id=f"r{i}", token_ids=prompt, sampling=SamplingParams(constraint=constraint, **params))


CONSTRAINTS = [
    JSON,
    ConstraintSpec("regex", "[ab]{3}-[0-9]{2}"),
    None,
    ConstraintSpec("choice", json.dumps(["rot", "grün", "blau"])),
    ConstraintSpec("grammar", 'start: "x" ("y" | "z")'),
]


def judge(constraint: ConstraintSpec | None, outputs: list[Output]) -> None:
    if constraint is None:
        return
    assert outputs[-1].finish_reason is FinishReason.STOP, outputs[-1]
    found = text(outputs)
    if constraint.kind == "json_schema":
        jsonschema.validate(json.loads(found), SCHEMA)
    elif constraint.kind == "choice":
        assert found in json.loads(constraint.text)
    else:
        assert re.fullmatch(constraint.text if constraint.kind == "regex" else "x[yz]", found), found


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_every_output_follows_its_grammar_and_not_its_company(setup: dict[str, Any], overlap: bool) -> None:
    requests = [request(i, CONSTRAINTS[i % len(CONSTRAINTS)]) for i in range(15)]
    alone = {}
    quiet = core_with()
    for one in requests:
        alone.update(run(quiet, [one]))
    quiet.close()
    core = core_with(overlap=overlap, **setup)
    for _ in range(2):  # the second time grammars and prefixes are cached
        together = run(core, requests)
        for i, one in enumerate(requests):
            judge(CONSTRAINTS[i % len(CONSTRAINTS)], together[one.id])
            assert ids(together[one.id]) == ids(alone[one.id])
    if setup == SETUPS["preempting"]:
        assert core.scheduler.num_preemptions > 0
    core.close()


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_thinking_is_free_up_to_its_budget(overlap: bool) -> None:
    core = core_with(overlap=overlap)
    head = {"free_until": (UNTHINK,), "free_tokens": 9}
    nudge = {"logit_bias": {UNTHINK: -100.0, EOS: -100.0}}
    regex = ("regex", "[0-9]{4}")
    outputs = run(
        core,
        [
            request(1, ConstraintSpec(*regex, **head), **nudge),
            request(
                2,
                ConstraintSpec(*regex, free_from=THINK, **head),
                logit_bias={THINK: 100.0, UNTHINK: -100.0, EOS: -100.0},
            ),
            request(3, ConstraintSpec(*regex, free_from=THINK, **head), logit_bias={THINK: -100.0}),
            request(4, ConstraintSpec("text", "", **head), **nudge),
            request(5, ConstraintSpec(*regex, free_until=(UNTHINK,)), logit_bias={UNTHINK: 100.0}),
        ],
    )
    core.close()
    one = ids(outputs["r1"])
    assert one[9] == UNTHINK
    assert UNTHINK not in one[:9]
    assert re.fullmatch("[0-9]{4}", bytes(one[10:14]).decode())
    two = ids(outputs["r2"])
    assert (two[0], two[10]) == (THINK, UNTHINK)
    assert re.fullmatch(b"[0-9]{4}", bytes(two[11:15]))
    assert re.fullmatch(b"[0-9]{4}", bytes(t for t in ids(outputs["r3"]) if t < 256))
    assert ids(outputs["r4"])[9] == UNTHINK
    assert outputs["r4"][-1].finish_reason is FinishReason.LENGTH
    assert ids(outputs["r5"])[0] == UNTHINK
    assert re.fullmatch(b"[0-9]{4}", bytes(t for t in ids(outputs["r5"])[1:] if t < 256))


def test_a_head_that_ends_by_several_tokens_is_closed_in_order() -> None:
    core = core_with()
    spec = ConstraintSpec("regex", "z", free_until=(65, 66, 67), free_tokens=4)
    found = ids(run(core, [request(7, spec, logit_bias={66: -100.0})])["r7"])
    core.close()
    assert bytes(found[4:8]) in (b"ABCz", b"BCz", b"Cz"), found
    assert found[-1] == ord("z") or found[-1] == EOS


def test_a_refused_grammar_costs_its_own_request() -> None:
    core = core_with()
    outputs = run(core, [request(0, None), request(1, ConstraintSpec("regex", "(")), request(2, JSON)])
    core.close()
    assert outputs["r1"][-1].finish_reason is FinishReason.ERROR
    assert "regex" in outputs["r1"][-1].error
    judge(JSON, outputs["r2"])
    assert len(ids(outputs["r0"])) >= 1


def test_logprobs_min_tokens_and_stop_ids_beside_a_grammar() -> None:
    core = core_with()
    outputs = run(
        core,
        [
            request(0, ConstraintSpec("regex", "[ab]*"), min_tokens=6, logit_bias={EOS: 100.0}),
            request(1, ConstraintSpec("regex", "[ab]{20}"), stop_token_ids=(97,)),
            request(2, JSON, logprobs=3, temperature=0.0),
        ],
    )
    core.close()
    assert re.fullmatch("[ab]{6}", text(outputs["r0"]))
    assert re.fullmatch("b*a", text(outputs["r1"]))
    assert all(len(output.logprobs) == len(output.token_ids) for output in outputs["r2"])
    judge(JSON, outputs["r2"])


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_slow_grammars_sit_out_and_write_the_same(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(i, CONSTRAINTS[i % len(CONSTRAINTS)]) for i in range(10)]
    quick = core_with(overlap=overlap)
    expected = run(quick, requests)
    quick.close()
    monkeypatch.setattr("headrace.execution.constraints.fill.SLOW_SECONDS", -1.0)
    monkeypatch.setattr("headrace.execution.constraints.compiler.SLOW_SECONDS", -1.0)
    slow = core_with(overlap=overlap, num_blocks=40, max_model_len=64)
    prefetched = []
    prefetch = slow.constraints._filler.prefetch
    monkeypatch.setattr(
        slow.constraints._filler, "prefetch", lambda one: (prefetched.append(one), prefetch(one))
    )
    found = run(slow, requests)
    slow.close()
    assert {name: ids(outputs) for name, outputs in found.items()} == {
        name: ids(outputs) for name, outputs in expected.items()
    }
    assert len(prefetched) >= sum(len(ids(found[f"r{i}"])) - 1 for i in range(10) if i % 5 != 2)


def test_many_sequences_of_one_grammar_share_several_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "_USERS", 0)
    requests = [request(i, CONSTRAINTS[1]) for i in range(16)]
    alone = core_with()
    expected = run(alone, requests[:1])
    alone.close()
    core = core_with()
    compiler = core.constraints.compiler
    assert compiler is not None
    compiler._most_bases = 3
    for _ in range(2):
        found = run(core, requests)
        for one in requests:
            judge(CONSTRAINTS[1], found[one.id])
        assert ids(found["r0"]) == ids(expected["r0"])
        (known,) = compiler._cache.values()
        assert len(known.bases) == 3
        assert [base.num_users for base in known.bases] == [0, 0, 0]
    core.close()


def test_a_compilation_that_does_not_come_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_with()
    compiler = core.constraints.compiler
    assert compiler is not None
    compile_, hangs, hanging = compiler._compile, threading.Event(), threading.Event()

    def sometimes(spec: ConstraintSpec, grammar: str) -> Any:
        if spec.text == "hang":
            hangs.set()
            hanging.wait(100)
        return compile_(spec, grammar)

    monkeypatch.setattr(compiler, "_compile", sometimes)
    compiler._seconds = 0.2
    core.add([request(0, ConstraintSpec("regex", "hang"))])
    assert hangs.wait(60)
    compiler._seconds = 60.0  # the others have time
    good = ConstraintSpec("regex", "[ab]{3}")
    outputs = run(core, [request(1, good), request(2, None)])
    assert outputs["r0"][-1].finish_reason is FinishReason.ERROR
    assert "too long" in outputs["r0"][-1].error
    assert re.fullmatch("[ab]{3}", text(outputs["r1"]))
    assert outputs["r2"][-1].finish_reason is not FinishReason.ERROR
    assert compiler._quick.num_stuck == 1
    hanging.set()
    end = time.monotonic() + 60
    while compiler._quick.num_stuck and time.monotonic() < end:
        time.sleep(0.01)
    assert compiler._quick.num_stuck == 0
    assert re.fullmatch("[ab]{3}", text(run(core, [request(3, good)])["r3"]))
    core.close()


def test_what_no_front_end_judged_is_judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_with()
    compiler = core.constraints.compiler
    assert compiler is not None
    compiler._judge.seconds = 0.3
    compiled = []
    compile_ = compiler._compile
    monkeypatch.setattr(
        compiler, "_compile", lambda spec, text: (compiled.append(spec), compile_(spec, text))[1]
    )
    huge = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9000)}}
    outputs = run(
        core,
        [
            request(0, ConstraintSpec("json_schema", json.dumps(huge))),
            request(1, ConstraintSpec("regex", "[ab]{3}")),
            request(2, ConstraintSpec("regex", "[cd]{3}", judged=Judged(1.0, 0))),
        ],
    )
    core.close()
    assert outputs["r0"][-1].finish_reason is FinishReason.ERROR
    assert "takes over 0.3 s" in outputs["r0"][-1].error
    assert sorted(one.text for one in compiled) == ["[ab]{3}", "[cd]{3}"]
    assert all(one.judged is not None for one in compiled)


def test_a_grammar_too_complex_at_a_token_is_its_authors_error(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = compiler_module.LIMITS | {"step_max_items": 40}
    monkeypatch.setattr(compiler_module, "LIMITS", limits)
    core = core_with()
    hard = ConstraintSpec("grammar", 'start: e\ne: e e | "x" | "y" e')
    outputs = run(
        core, [request(0, hard, logit_bias={EOS: -100.0}), request(1, ConstraintSpec("regex", "[ab]{9}"))]
    )
    core.close()
    last = outputs["r0"][-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error_param == "response_format"
    assert "too many items" in last.error.lower()
    assert len(ids(outputs["r0"])) > 3
    assert re.fullmatch("[ab]{9}", text(outputs["r1"]))
