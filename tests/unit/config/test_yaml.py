from __future__ import annotations

import random
import string
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config.load import check_file, check_text
from headrace.config.report import Report
from headrace.config.yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, load_text
from headrace.errors import ConfigError
from unit.config.cases import CASES, build


def read(text: str | bytes) -> tuple[Any, list[str]]:
    report = Report()
    node = load_text(text, "c.yaml", report)
    return (None if node is None else node.plain()), [str(problem) for problem in report.problems]


SCALARS = [
    *("1", "-1", "+7", "0", "007", "0o7", "0x1F", "0b101", "1_000", "190:20:30", "12:30", "1.5", "-.5", "1e3"),
    *("1.5e+3", ".inf", "-.inf", "yes", "No", "on", "OFF", "true", "False", "null", "~", "", "text", "a: b", "=", "<<"),
    *("2024-01-01", "1.2.3", "0.0", "08", "1_", "'1'", '"yes"', "1e5", "685.230_15e+03", "y", "n"),
]  # fmt: skip


@pytest.mark.parametrize("text", [text for text in SCALARS if text not in ("a: b", "=", "<<", "2024-01-01")])
def test_scalars_mean_what_pyyaml_says(text: str) -> None:
    ours, problems = read(f"k: {text}")
    assert problems == []
    theirs = yaml.safe_load(f"k: {text}")["k"]
    assert type(ours["k"]) is type(theirs)
    assert ours["k"] == theirs


def test_dates_and_signs_stay_text() -> None:
    assert read("a: 2024-01-01\nb: =\n") == ({"a": "2024-01-01", "b": "="}, [])


def test_structures_aliases_and_merges_as_pyyaml() -> None:
    text = """
base: &b {x: 1, y: 2}
one: {<<: *b, y: 3}
two: {<<: [*b, {z: 4}], w: 5}
list: [*b, &s text, *s]
block: |
  two
  lines
"""
    ours, problems = read(text)
    assert problems == []
    assert ours == yaml.safe_load(text)


NAMES = st.text(string.ascii_letters, min_size=2)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
        max_leaves=20,
    )
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_dumped_data_comes_back(value: Any) -> None:
    text = yaml.safe_dump({"key": value}, allow_unicode=True)
    ours, problems = read(text)
    assert problems == []
    assert ours == yaml.safe_load(text)


def test_places_are_those_of_the_keys() -> None:
    report = Report()
    node = load_text("a: 1\nb:\n  c:\n    - 1\n    - d: 2\n", "c.yaml", report)
    assert node is not None
    inner = node.value["b"]
    assert (node.key_places["b"].line, inner.key_places["c"].line) == (2, 3)
    second = inner.value["c"].value[1]
    assert (second.key_places["d"].line, second.key_places["d"].column) == (5, 7)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "given twice (first on line 1)"),
        ("a:\n\tb: 1\n", 2, "never tabs"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "refused"),
        ("a: !!python/name:os.system\n", 1, "refused"),
        ("a: !!binary aGk=\n", 1, "refused"),
        ("a: !mine 3\n", 1, "refused"),
        ("a: !!set {x}\n", 1, "refused"),
        ("a: !!int x\n", 1, "not a number"),
        ("a: " + "9" * 5000, 1, "not a number"),
        ("a: &x [*x]\n", 1, "inside its own anchor"),
        ("a: *nope\n", 1, "nope"),
        ("? [1, 2]\n: 3\n", 1, "single word"),
        ("<<: 3\n", 1, "merges"),
        ("a: b: c\n", 1, "quote"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 'open\n", 2, "not valid YAML"),
        ("a: @x\n", 1, "quote"),
        (b"a: 1\nb: \xff\xfe\n", 2, "UTF-8"),
        ("a: 1\nb: \0\n", 2, "NUL"),
        ("a: \x07\n", 1, "not valid YAML"),
        ("a: " + "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), 1, "nested deeper"),
        ("- " * 200 + "x", 1, "nested deeper"),
        ("%YAML 9.9\n---\na: 1\n", 1, "not valid YAML"),
    ],
)
def test_what_is_refused_says_where_and_why(text: str | bytes, line: int, says: str) -> None:
    _, problems = read(text)
    assert len(problems) == 1, problems
    assert says in problems[0]
    assert problems[0].startswith(f"c.yaml:{line}: ")


def test_a_billion_laughs_are_counted_not_laughed() -> None:
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi")
    )
    start = time.process_time()
    _, problems = read(text)
    assert time.process_time() - start < 1
    assert [f"more than {MAX_NODES}" in problem for problem in problems] == [True]


def test_size_is_bounded() -> None:
    _, problems = read("a: " + "x" * MAX_BYTES)
    assert "KiB" in problems[0]
    start = time.process_time()
    read("\n".join(f"k{index}: [1, 2, {{a: b}}]" for index in range(MAX_BYTES // 40)))
    assert time.process_time() - start < 5  # 1 s on a quiet machine; this one may be shared


def test_empty_and_marked_files(tmp_path: Path) -> None:
    assert read("") == ({}, [])
    assert read("# only a comment\n") == ({}, [])
    assert read("\ufeffa: 1") == ({"a": 1}, [])
    assert check_text("").report.ok
    assert not check_text("just text").report.ok
    assert not check_text("[]").report.ok
    (tmp_path / "config.yml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"there is config\.yml beside it"):
        check_file(tmp_path / "config.yaml")


class _Guard:
    """Fails the test if anything is imported or run while it is on."""

    def __enter__(self) -> None:
        self.before = set(sys.modules)

    def __exit__(self, *_: object) -> None:
        assert set(sys.modules) == self.before


GARBAGE = "{}[]:,&*!|>%@`'\"-?#\t\n \\~=<.0123456789abcxyzé\u2028\U0001f600\x85\ufeff"


@given(st.text(GARBAGE, max_size=120) | st.binary(max_size=80) | st.text(max_size=80))
@settings(max_examples=400, deadline=None)
def test_garbage_never_crashes(text: str | bytes) -> None:
    with _Guard():
        view = check_text(text)
    assert isinstance(view.report.as_dict()["problems"], list)


def _mutate(text: str, rng: random.Random) -> str:
    values = [
        "",
        "null",
        "[]",
        "{}",
        "-1",
        "1e999",
        ".nan",
        "yes",
        "'x'",
        "&a *a",
        "*a",
        "!!str 1",
        "12:30",
        "\t",
    ]
    values += ["x" * 500, "\u202e", "[[[[", "0x", "9" * 400]
    lines = text.splitlines()
    for _ in range(rng.randint(1, 4)):
        index = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines[index] = lines[index].split(":")[0] + ": " + rng.choice(values)
        elif kind == 1:
            lines.insert(index, lines[rng.randrange(len(lines))])
        elif kind == 2:
            del lines[index]
            lines = lines or ["a: 1"]
        elif kind == 3:
            lines[index] = "  " * rng.randint(0, 3) + lines[index].lstrip()
        elif kind == 4:
            at = rng.randrange(len(lines[index]) + 1)
            lines[index] = lines[index][:at] + rng.choice(GARBAGE) + lines[index][at:]
        else:
            lines[index] = lines[index].replace("a", "&x ", 1)
    return "\n".join(lines)


def test_mutated_configurations_never_crash_and_answer_soon() -> None:
    rng = random.Random(5)
    slowest = 0.0
    for round_ in range(1200):
        case = CASES[round_ % len(CASES)]
        text = _mutate(build(case.base, case.good if round_ % 2 else case.bad), rng)
        start = time.process_time()
        view = check_text(text)
        slowest = max(slowest, time.process_time() - start)
        for problem in view.report.problems:
            assert problem.message
    assert slowest < 1


def test_every_type_takes_every_kind_of_value() -> None:
    """Each field of the schema, given each kind of YAML value, answers with a problem or takes it."""
    kinds = [
        "null",
        "true",
        "3",
        "-3",
        "3.5",
        ".nan",
        "1e400",
        "text",
        "''",
        "[]",
        "[1, null, {a: b}]",
        "{}",
        "{a: {b: [1]}}",
    ]
    kinds += ["[[]]", "{trt_llm: {build: 3}}", "2024-01-01", "H100:2", "s3://b/p"]
    paths = {path for case in CASES for path in (*case.bad, *case.good)}
    for path in sorted(paths):
        for kind in kinds:
            case = next(case for case in CASES if path in case.bad or path in case.good)
            text = build(case.base, {path: "PLACE"}).replace("PLACE", kind, 1)
            check_text(text)


@pytest.mark.parametrize(
    "text",
    [
        f"resources: {{memory: '{'9' * 400}'}}",
        f"resources: {{memory: {'9' * 39}}}",
        f"model_metadata: {{headrace: {{model: m, kv_cache_bytes: '{'9' * 400}'}}}}",
        f"model_metadata: {{headrace: {{model: m, host_kv_bytes: {'9' * 39}}}}}",
    ],
)
def test_sizes_beyond_all_machines_are_problems(text: str) -> None:
    (problem,) = check_text(text).report.problems
    assert "expected bytes" in problem.message
