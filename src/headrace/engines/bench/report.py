"""One page about a profiled case."""

from __future__ import annotations

from headrace.engines.bench.cases import Measurement
from headrace.engines.bench.floors import Work
from headrace.engines.bench.profile import Window

__all__ = ["summary"]

_TOP = 12


def summary(
    title: str,
    measured: Measurement,
    windows: list[Window],
    work: Work | None,
    rates: tuple[float, float] | None,
) -> str:
    """Text of at most some 60 lines.

    Args:
        title: model, precision, device.
        measured: of a run that was not profiled.
        work, rates: for floors; None: none are known.
    """
    lines = [f"{title}, {measured.case}", *_overview(measured, work, rates)]
    for window in windows:
        lines += ["", *_window(window, work, rates)]
    return "\n".join(lines) + "\n"


def _overview(measured: Measurement, work: Work | None, rates: tuple[float, float] | None) -> list[str]:
    facts = measured.as_dict()
    rate = f"{measured.output_tokens_s:,.0f} output tokens/s in {measured.seconds:.3f} s"
    if work is not None and rates is not None:
        least = work.case_seconds(measured.case, rates)
        rate += f"; the device's floor is {least:.3f} s, so {least / measured.seconds:.0%} of what it allows"
    decode = measured.decode_ms()
    steps = f"{facts['prefill_steps']} steps with prompts took {facts['prefill_seconds']:.3f} s"
    if decode is not None:
        steps += f"; a decode step of all takes {decode:.3f} ms (median)"
    shares = {"prompts": measured.busy(prefill=True), "decoding": measured.busy(prefill=False)}
    known = [f"{share:.1%} of steps with {kind}" for kind, share in shares.items() if share is not None]
    busy = [f"device     has a step for {', '.join(known)}"] if known else []
    host = dict(measured.host)
    total, wait = host.pop("total", 0.0), host.pop("wait", 0.0)
    parts = ", ".join(f"{name} {value:.3f}" for name, value in host.items())
    order = sorted(range(len(measured.steps)), key=lambda i: -measured.steps[i].seconds)[:4]
    slowest = ", ".join(
        f"{measured.steps[i].seconds * 1e3:.2f} ms (number {i}, {measured.steps[i].tokens:,} tokens)"
        for i in order
    )
    return [
        f"rate       {rate}",
        f"steps      {steps}",
        *busy,
        f"slowest    {slowest}",
        f"host       {total:.3f} ms a step ({parts}), and {wait:.3f} ms waiting for the device",
    ]


def _window(window: Window, work: Work | None, rates: tuple[float, float] | None) -> list[str]:
    steps = max(1, window.steps)
    lines = [f"{window.name}: {window.steps} steps of {window.tokens / steps:,.0f} tokens"]
    if window.span:
        idle = window.span - window.busy
        lines.append(
            f"device     busy {window.busy / window.span:.1%} of {window.span / steps * 1e3:.3f} ms a step; idle "
            f"{idle / steps * 1e6:,.0f} us a step, {window.largest_gap * 1e6:,.0f} us at most at once"
        )
    moved: dict[str, float] = {}
    if work is not None and window.keys:
        moved = {
            "linear": work.weights_read(round(window.tokens / steps)),
            "attention": work.key_bytes * window.keys / steps,
        }
        if rates is not None:
            least = sum(moved.values()) / rates[0]
            lines.append(
                f"floor      {least * 1e3:.3f} ms a step: {moved['linear'] / 1e9:.2f} GB of weights and "
                f"{moved['attention'] / 1e9:.2f} GB of keys at {rates[0] / 1e12:.2f} TB/s"
            )
    total = sum(kernel.seconds for kernel in window.kernels) or 1.0
    lines.append("    ms/step  share  calls/step  TB/s of its floor's bytes")
    for kind, kernel in window.by_kind().items():
        size = moved.get(kind) if window.span else None
        rate = f"{size * steps / kernel.seconds / 1e12:5.2f}" if size else "    -"
        lines.append(_row(kernel.seconds, kernel.calls, steps, total) + f"  {rate}  {kind}")
    lines.append("    ms/step  share  calls/step  us each  kernel")
    for kernel in window.kernels[:_TOP]:
        each = f"{kernel.seconds / kernel.calls * 1e6:7.1f}"
        lines.append(_row(kernel.seconds, kernel.calls, steps, total) + f"  {each}  {kernel.name[:70]}")
    return lines


def _row(seconds: float, calls: int, steps: int, total: float) -> str:
    return f"  {seconds / steps * 1e3:9.3f} {seconds / total:6.1%} {calls / steps:11.1f}"
