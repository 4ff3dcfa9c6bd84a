"""The checker of kernels notices what it is there for."""

from __future__ import annotations

import pytest
import torch

from triton_device import ON_GPU

if ON_GPU:
    pytest.skip("checks what Triton's interpreter runs", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from headrace.kernels.launch import launch_options, prefetch_l2
from support.checked_kernels import Checker


def gdc_wait() -> None:
    """Replaced by the test, as the checker replaces it in the package's modules."""


@triton.jit
def _copy(
    x_ptr, out_ptr, w_ptr, N, OFF: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr
):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    w = tl.load(w_ptr + i, mask=i < N, other=0.0)
    if AHEAD > 0:
        prefetch_l2(w_ptr + i * 0 + AHEAD)
    if EARLY == 1:
        tl.store(out_ptr + i, w, mask=i < N)
    if EARLY == 2:
        w += tl.load(x_ptr + i, mask=i < N, other=0.0)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + i + OFF, mask=i < N, other=0.0)
    tl.store(out_ptr + i, x + w, mask=i < N)


@pytest.mark.parametrize(
    ("off", "early", "ahead", "message"),
    [
        (0, 0, 0, ""),
        (1, 0, 0, "load of 1 elements outside all arguments; near .*x_ptr"),
        (-2, 0, 0, "load of 2 elements outside"),
        (0, 0, 37, "prefetch of 16 elements outside"),
        (0, 1, 0, "store before the wait"),
        (0, 2, 0, "x_ptr is read before the wait"),
    ],
)
def test_what_is_noticed(
    off: int,
    early: int,
    ahead: int,
    message: str,
    kernels_are_checked: Checker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = torch.arange(64.0)
    x, w, out = whole[10:47], torch.ones(37), torch.zeros(37)
    monkeypatch.setitem(globals(), "gdc_wait", lambda: setattr(kernels_are_checked, "waited", True))
    options = launch_options(torch.device("cpu"), 4, 1)

    def run() -> None:
        _copy[(3,)](x, out, w, 37, OFF=off, EARLY=early, AHEAD=ahead, **options)

    if message:
        with pytest.raises(InterpreterError, match=message):
            run()
    else:
        run()
        assert torch.equal(out, x + 1)
