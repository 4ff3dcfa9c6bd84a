"""Redirects (RFC 9110, 15.4), followed as reqwest and browsers do."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from headrace.client.exceptions import ConnectionFailed, InvalidArgument
from headrace.client.http1 import Reply
from headrace.client.transport import split_url

__all__ = ["SECRETS", "Hop", "follow"]

_MAX_HOPS = 10
_STATUSES = (301, 302, 303, 307, 308)
SECRETS = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key", "api-key"})


class Hop(NamedTuple):
    """Where a redirected request goes.

    Attributes:
        url: absolute, without fragment.
        number: of redirects so far.
        trusted: it has always been the host and port of the first request; another's gets no ``SECRETS``.
        due: when the attempt times out, in the loop's time.
        keeps: the method and body go along (307, 308); otherwise it is a GET without one.
    """

    url: str
    number: int
    trusted: bool
    due: float
    keeps: bool


def follow(reply: Reply, url: str, before: Hop | None, due: float) -> Hop | None:
    """The next hop after a reply from ``url``; None when it is no redirect or names no http address.

    Raises ConnectionFailed after 10 redirects.
    """
    location = reply.headers.get("location") if reply.status in _STATUSES else None
    if location is None:
        return None
    try:
        named = urlsplit(location)
        if named.scheme and not named.hostname:  # urljoin would take it for the same host
            return None
        target = urlsplit(urljoin(url, location))._replace(fragment="").geturl()
        origin, _ = split_url(target)
    except (InvalidArgument, ValueError):
        return None
    number = 1 if before is None else before.number + 1
    if number > _MAX_HOPS:
        raise ConnectionFailed(f"more than {_MAX_HOPS} redirects, the last to {target}")
    here, _ = split_url(url)
    same = (origin.host, origin.port) == (here.host, here.port)
    trusted = same and (before is None or before.trusted)
    keeps = reply.status in (307, 308) and (before is None or before.keeps)
    return Hop(target, number, trusted, due if before is None else before.due, keeps)
