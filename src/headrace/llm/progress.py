"""Progress bars, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

__all__ = ["LoadingBars", "bar"]


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress on stderr; the value moves it by one and may be called from any thread."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


class LoadingBars:
    """One bar a model whose weights are being loaded; shown only on a terminal, gone when all are there."""

    def __init__(self) -> None:
        self._console = console = Console(stderr=True)
        columns = (
            TextColumn("loading {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def of(self, name: str) -> Callable[[int, int, str], None]:
        """What to tell the bytes of this model's weights in place, and in all; or of compiled kernels, in lines."""

        def show(done: int, total: int, part: str = "weights") -> None:
            if part == "kernels":
                if done == 0:
                    self._console.print(
                        f"  {name}: compiling {total} kernels for this GPU (kept for later starts)"
                    )
                elif done * 4 // total > (done - 1) * 4 // total:
                    self._console.print(f"  {name}: {done} of {total} kernels")
                return
            if not self._tasks:
                self._progress.start()
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total)
            self._progress.update(self._tasks[name], completed=done, total=total)
            if all(task.finished for task in self._progress.tasks):
                self._progress.stop()

        return show
