"""A profile of some steps of a case: a Chrome trace for people to look at, and what it says in numbers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from headrace.engines.bench.cases import Case
from headrace.engines.generate import GenerateCore
from headrace.scheduling.plan import StepPlan

__all__ = ["KINDS", "Kernel", "Window", "WindowProfiler", "kind_of"]

# Kernels by what they are for, first match wins.
KINDS: dict[str, str] = {
    "attention": r"^_(decode|prefill|packed|fresh)|flash|fmha|attention",
    "linear": r"^_(gemv|skinny|stream|ring)|_linear|gemm|nvjet|cutlass|addmm|aten::mm|xmma|^_scaled|splitKreduce",
    "sampling": r"^_best|topk|sort|softmax|argmax|MaxOps|reduce_kernel",
    "norms, rotary, gates, cache write": r"^_(rms_norm|layer_norm|norm_rope|gate_mul|bias_activate|write_cache|begin)",
    "copies": r"^Mem(cpy|set)|copy_",
}
_OTHER = "other"


def kind_of(name: str) -> str:
    """Which of KINDS a kernel or operator is, or ``other``."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), _OTHER)


@dataclass(slots=True)
class Kernel:
    """Calls and seconds of one kernel (an operator on a CPU)."""

    name: str
    calls: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Window:
    """Some steps of one sort.

    Attributes:
        name: ``prefill`` or ``decode``.
        steps: how many; tokens: computed in all of them.
        keys: sum over decode steps and sequences of keys attended to.
        span: seconds from the first kernel's start to the last one's end; 0 on a CPU.
        busy: seconds of it in which some kernel ran.
        largest_gap: seconds.
        kernels: most expensive first.
    """

    name: str
    steps: int = 0
    tokens: int = 0
    keys: int = 0
    span: float = 0.0
    busy: float = 0.0
    largest_gap: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)

    def by_kind(self) -> dict[str, Kernel]:
        """Sums by kind, most expensive first."""
        found: dict[str, Kernel] = {}
        for kernel in self.kernels:
            kind = kind_of(kernel.name)
            total = found.setdefault(kind, Kernel(kind))
            total.calls += kernel.calls
            total.seconds += kernel.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


class WindowProfiler:
    """Profiles the first steps of a case, and some that decode all of its sequences.

    Give ``on_step`` to `cases.measure`, then call ``close``.

    Args:
        folder: where the traces go: prefill.trace.json and decode.trace.json.
        limit: steps of each window.
    """

    def __init__(self, core: GenerateCore, folder: Path, *, limit: int, case: Case) -> None:
        self.core, self.folder, self.limit, self.count = core, folder, limit, case.requests
        self._prefill_steps = -(-case.requests * case.inputs // core.scheduler.max_num_batched_tokens)
        self.windows: list[Window] = []
        self._open: tuple[Window, profile] | None = None
        self._limit = limit
        self._settled = 0  # steps seen that decode everything
        self._cuda = core.runner.device.type == "cuda"

    def on_step(self, plan: StepPlan | None) -> None:
        decodes = plan is not None and plan.num_tokens == len(plan.chunks) == self.count
        if self._open is not None and plan is not None:
            self._count(self._open[0], plan)
        if self._open is None and not self.windows and plan is None:
            self._begin("prefill")
        elif self._open is not None:
            window = self._open[0]
            if window.steps >= self._limit or (window.name == "prefill" and decodes):
                self.close()
        elif decodes and not any(window.name == "decode" for window in self.windows):
            self._settled += 1
            if self._settled > 2:  # the graph is captured, the loop is full
                self._begin("decode")

    def close(self) -> None:
        """End the window that is open, if any."""
        if self._open is None:
            return
        window, profiler = self._open
        self._open = None
        self._synchronize()
        profiler.__exit__(None, None, None)
        profiler.export_chrome_trace(str(self.folder / f"{window.name}.trace.json"))
        _read(window, profiler, self._cuda)
        self.windows.append(window)

    def _begin(self, name: str) -> None:
        self._limit = self.limit if name == "decode" else min(self.limit, self._prefill_steps)
        self._synchronize()
        activity = ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU
        profiler = profile(activities=[activity])
        profiler.__enter__()
        self._open = (Window(name), profiler)

    def _count(self, window: Window, plan: StepPlan) -> None:
        window.steps += plan.repeats
        window.tokens += plan.num_tokens * plan.repeats
        if plan.num_tokens == len(plan.chunks):
            window.keys += sum(chunk.start + chunk.count for chunk in plan.chunks) * plan.repeats

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.core.runner.device)


def _read(window: Window, profiler: profile, cuda: bool) -> None:
    if not cuda:
        events = [e for e in profiler.key_averages() if e.self_cpu_time_total > 0]
        kernels = [Kernel(e.key, e.count, e.self_cpu_time_total / 1e6) for e in events]
        window.kernels = sorted(kernels, key=lambda kernel: -kernel.seconds)
        return
    found = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    calls: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for event in found:
        calls[event.name] += 1
        seconds[event.name] += event.time_range.elapsed_us() / 1e6
    window.kernels = [Kernel(name, calls[name], total) for name, total in seconds.most_common()]
    window.span, window.busy, window.largest_gap = _cover(
        [(e.time_range.start / 1e6, e.time_range.end / 1e6) for e in found]
    )


def _cover(intervals: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(span, covered, largest gap) of intervals, which may overlap: dependents start early."""
    if not intervals:
        return 0.0, 0.0, 0.0
    intervals = sorted(intervals)
    covered = gap = 0.0
    reached = first = intervals[0][0]
    for start, end in intervals:
        gap = max(gap, start - reached)
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return reached - first, covered, gap
