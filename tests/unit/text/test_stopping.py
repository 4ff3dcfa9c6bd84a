"""Stop strings: the streamed result equals the whole one for every split."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.errors import InvalidRequest
from headrace.text.stopping import StopMatcher

letters = st.text(alphabet="ab🙂", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=5), max_size=4)


def by_definition(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop string that is complete first; of two that end together, the longer."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(data=st.data(), text=letters, stops=stop_lists, include=st.booleans())
@example(data=None, text="aab", stops=["ab"], include=False)
def test_any_split_gives_the_defined_result(
    data: st.DataObject | None, text: str, stops: list[str], include: bool
) -> None:
    matcher = StopMatcher(stops, include_stop=include)
    joined, position = "", 0
    while position < len(text) and matcher.matched is None:
        step = 1 if data is None else data.draw(st.integers(1, 6))
        joined += matcher.push(text[position : position + step])
        position += step
    expected, matched = by_definition(text, stops, include)
    assert matcher.matched == matched
    assert joined + matcher.finish() == expected


@settings(max_examples=300, deadline=None)
@given(text=letters, stops=stop_lists)
def test_holds_back_no_more_than_needed(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    given_out, seen = "", ""
    for char in text:
        given_out += matcher.push(char)
        seen += char
        if matcher.matched is not None:
            return
        held = seen[len(given_out) :]
        starts = {stop[:n] for stop in stops for n in range(len(stop))}
        assert held in starts or not held
        assert not any(held != start and seen.endswith(start) and len(start) > len(held) for start in starts)


def test_a_stop_string_over_token_borders() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert [matcher.push(part) for part in ("Hi", "\n", "Us", "er", ": more")] == ["Hi", "", "", "", ""]
    assert matcher.matched == "\nUser:"
    assert matcher.finish() == ""
    assert matcher.push("nothing comes after") == ""


def test_a_false_start_is_given_out_at_once() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("#") == ""
    assert matcher.push("# title") == "## title"


def test_included_in_the_output() -> None:
    matcher = StopMatcher(["END"], include_stop=True)
    assert matcher.push("x E") == "x "
    assert matcher.push("ND y") == "END"


def test_text_of_the_first_tokens_is_not_searched() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("xab", armed=False) == "xab"
    assert matcher.push("a", armed=False) == "a"
    assert matcher.push("b") == "b"  # begins before min_tokens, so it does not count
    assert matcher.push("ab") == ""
    assert matcher.matched == "ab"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        StopMatcher(["a", ""])
    assert caught.value.param == "stop"
