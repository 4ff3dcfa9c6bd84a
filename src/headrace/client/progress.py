"""A progress bar with rate and time left, on standard error; silent where that is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

__all__ = ["Progress"]


class Progress:
    """``with Progress("embed", total) as bar: bar.add(8)``.

    Args:
        total: items, if known; without it there is a count and a rate only.
        begun_with: items done by an earlier run; not counted in the rate.
        show: None: only on a terminal.
    """

    def __init__(
        self, title: str, total: int | None, *, begun_with: int = 0, show: bool | None = None
    ) -> None:
        self.title, self.total = title, total
        self.done = self.begun_with = begun_with
        self._show = sys.stderr.isatty() if show is None else show
        self._begun = self._drawn = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self._show and now - self._drawn >= 0.2:
            self._drawn = now
            sys.stderr.write("\r\x1b[K" + self.line(now))
            sys.stderr.flush()

    def line(self, now: float) -> str:
        """Such as ``embed  41% [########------------]  820/2,000  1,612/s  0:00:01 left``."""
        rate = (self.done - self.begun_with) / max(now - self._begun, 1e-9)
        if not self.total:
            return f"{self.title}  {self.done:,}  {rate:,.1f}/s"
        share = min(1.0, self.done / self.total)
        bar = "#" * int(share * 20)
        left = max(0, self.total - self.done)
        eta = _clock(left / rate) if rate > 0 else "-:--:--"
        counts = f"{self.done:,}/{self.total:,}"
        return f"{self.title} {share:4.0%} [{bar:-<20}]  {counts}  {rate:,.1f}/s  {eta} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._show:
            sys.stderr.write("\r\x1b[K" + self.line(time.monotonic()) + "\n")


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
