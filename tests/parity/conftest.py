"""Where kernels run under Triton's interpreter, every address that they touch is checked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.checked_kernels import Checker


@pytest.fixture(autouse=True)
def kernels_are_checked() -> Iterator[Checker | None]:
    if os.environ.get("TRITON_INTERPRET") != "1" or "triton" not in sys.modules:
        yield None
        return
    from support.checked_kernels import checked_kernels

    with checked_kernels() as checker:
        yield checker
