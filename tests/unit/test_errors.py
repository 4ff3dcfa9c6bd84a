"""Errors that cross a process border as a code and a text."""

from __future__ import annotations

import pytest

from headrace.client.ledger import BadLine
from headrace.errors import EngineError, HeadraceError, InvalidRequest, from_code


def test_a_code_names_the_class_that_declares_it() -> None:
    """Subclasses inherit codes, and some are made of other arguments: whether they are imported must not matter."""
    assert BadLine.code == InvalidRequest.code
    error = from_code(InvalidRequest.code, "too large", "guided_json")
    assert type(error) is not BadLine
    assert (error.message, error.param, error.code) == ("too large", "guided_json", InvalidRequest.code)


def test_every_code_can_be_made_from_a_text() -> None:
    classes: list[type[HeadraceError]] = [HeadraceError]
    for cls in classes:
        classes += cls.__subclasses__()
    for cls in classes:
        if cls.__module__ == "headrace.errors":
            assert from_code(cls.code, "text").code == cls.code


@pytest.mark.parametrize("code", ["", "of another version"])
def test_unknown_codes_are_the_engines(code: str) -> None:
    assert type(from_code(code, "text")) is EngineError
