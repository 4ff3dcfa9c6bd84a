"""Streamed equals whole: for every format, however the text is cut."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from headrace.serving.parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Thought
from headrace.serving.parsers.formats import TOOLS as FORMATS
from headrace.serving.parsers.formats import build
from headrace.serving.parsers.machine import Machine
from support.turns import TOOLS, TURNS, Turn


def read(turn: Turn, pieces: list[str]) -> list[Event]:
    """Events, neighbours of one kind joined."""
    machine = Machine(build(turn.tools, turn.reasoning), TOOLS, turn.thinking)  # type: ignore[arg-type]
    events = [event for piece in pieces for event in machine.feed(piece)] + machine.finish()
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if type(last) is type(event) and isinstance(event, (Content, Thought, CallArguments)):
            joined[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        else:
            joined.append(event)
    return joined


def told(events: list[Event]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Thoughts, content, calls."""
    calls: list[tuple[str, Any]] = []
    texts = {Content: "", Thought: ""}
    for event in events:
        if isinstance(event, CallStart):
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
        elif isinstance(event, CallEnd):
            assert not event.broken
        else:
            texts[type(event)] += event.text
    return texts[Thought], texts[Content], [(name, json.loads(text)) for name, text in calls]


@pytest.mark.parametrize("turn", TURNS, ids=[f"{t.tools}-{i}" for i, t in enumerate(TURNS)])
def test_every_cut_gives_the_same(turn: Turn) -> None:
    whole = read(turn, [turn.text])
    assert told(whole) == (turn.thoughts, turn.content, turn.calls)
    assert read(turn, list(turn.text)) == whole
    for place in range(len(turn.text)):
        assert read(turn, [turn.text[:place], turn.text[place:]]) == whole, place
    rng = random.Random(turn.text)
    for _ in range(25):
        assert read(turn, random_pieces(turn.text, rng)) == whole


def random_pieces(text: str, rng: random.Random) -> list[str]:
    count = min(len(text), rng.choice((2, 3, 5, 8, 20)))
    places = sorted(rng.sample(range(len(text) + 1), count))
    return [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


@pytest.mark.slow
@pytest.mark.parametrize("turn", TURNS, ids=[f"{t.tools}-{i}" for i, t in enumerate(TURNS)])
def test_a_thousand_random_cuts(turn: Turn) -> None:
    whole = read(turn, [turn.text])
    rng = random.Random(turn.text)
    for _ in range(1000):
        assert read(turn, random_pieces(turn.text, rng)) == whole


def test_every_format_has_samples() -> None:
    for name in FORMATS:
        assert any(turn.tools == name and turn.calls for turn in TURNS), name


def test_damaged_turns_read_the_same_in_every_cut() -> None:
    """Cut off, spliced and shuffled samples: nothing is lost, and streamed equals whole."""
    rng = random.Random(5)
    for _ in range(400):
        turn = rng.choice(TURNS)
        text = turn.text
        for _ in range(rng.randint(1, 3)):
            a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
            other = rng.choice(TURNS).text
            text = rng.choice(
                [
                    text[:a],
                    text[:a] + text[b:],
                    text[:a] + other[: rng.randrange(30)] + text[a:],
                    text[:b] + text[a:],
                ]
            )
        if not text:
            continue
        damaged = turn._replace(text=text)
        whole = read(damaged, [text])
        assert read(damaged, list(text)) == whole, (turn.tools, text)
        assert read(damaged, random_pieces(text, rng)) == whole, (turn.tools, text)
        if (
            turn.tools != "harmony"
            and not any(isinstance(e, CallStart) for e in whole)
            and turn.reasoning is None
        ):
            assert told(whole)[1] == text
