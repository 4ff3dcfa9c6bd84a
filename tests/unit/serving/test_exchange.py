"""What of an exchange goes into headers."""

from __future__ import annotations

from headrace.serving.exchange import Exchange


def test_warnings_quote_the_client_in_printable_ascii() -> None:
    exchange = Exchange("id", warnings=("unknown keyword '\x08\r\nx-evil: 1'", "é 🎉" * 2000))
    value = exchange.headers()["x-headrace-warnings"]
    assert value.isascii()
    assert value.isprintable()
    assert len(value) <= 2000
