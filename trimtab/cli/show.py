"""What commands share in talking: tables on standard output, progress on standard error, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import TaskID

    from trimtab.compare import Progress

_PLAIN_WIDTH = 160
_PLAIN_LINES = 10
"""Lines of progress where standard error is no terminal."""


class Interrupted(Exception):
    """Ctrl-C, with a line that says what is kept and how to go on."""


def one_line(text: object) -> str:
    r"""Return a text as one printable line.

    Example:
        >>> one_line("first\nsecond\x1b[31m")
        'first second?[31m'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))


def console() -> Console:
    """Return the console for results; a pipe or a file gets lines that are not folded at 80 columns."""
    return _console(sys.stdout)


def _console(stream: Any) -> Console:
    terminal = hasattr(stream, "isatty") and stream.isatty()
    return Console(file=stream, width=None if terminal else _PLAIN_WIDTH, highlight=False, markup=False, emoji=False)


def say(text: str = "", *, style: str = "") -> None:
    """Print a line of results, taken literally."""
    console().print(Text(text, style=style), soft_wrap=True)
    sys.stdout.flush()  # in order with the progress on standard error, where both go to one file


def note(text: str) -> None:
    """Print a line that is no result on standard error."""
    _console(sys.stderr).print(Text(one_line(text), style="dim"), soft_wrap=True)


def print_json(data: Mapping[str, Any] | list[Any]) -> None:
    """Print strict JSON on standard output."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def table(title: str, heads: list[str], rows: list[list[str]], *, left: int = 1) -> Table:
    """Return a table whose first `left` columns are text and whose others are numbers; cells are taken literally."""
    made = Table(title=Text(title), title_justify="left", title_style="bold", header_style="bold")
    for place, head in enumerate(heads):
        made.add_column(Text(head), justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(one_line(cell)) for cell in row))
    return made


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for a table.

    Example:
        >>> number(1.23456), number(None), number(float("nan"))
        ('1.235', '-', 'nan')
    """
    return "-" if value is None else f"{value:.{digits}g}"


def use_threads(threads: int = 1) -> None:
    """Set torch's threads: one is fastest for small models, and on shared machines."""
    import torch

    torch.set_num_threads(threads)


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Turn Ctrl-C into a line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: finished runs are kept in {folder}, the same command goes on from there."
        ) from None


class Meter:
    """A live line of progress on standard error; a few plain lines where that is no terminal.

    Args:
        title: what is going on.
        total: steps in all; may also come with `update`.
    """

    def __init__(self, title: str, total: int = 0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._title = title
        self._console = _console(sys.stderr)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._total = total
        self._printed = -1
        self._began = time.monotonic()
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )

    def __enter__(self) -> Meter:
        if self._live is not None:
            self._live.start()
            self._task = self._live.add_task(self._title, total=self._total or None, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, total: int, text: str = "") -> None:
        """Show how far it is."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=total, text=one_line(text))
            return
        part = done * _PLAIN_LINES // max(1, total)
        if part > self._printed:
            self._printed = part
            seconds = time.monotonic() - self._began
            self._console.print(
                Text(f"{self._title}: {done}/{total} steps {one_line(text)} ({seconds:.0f} s)"), soft_wrap=True
            )

    def jobs(self, progress: Progress) -> None:
        """Show where a set of jobs stands; the callback of `compare`, `sweep` and `reproduce`."""
        if progress.note:
            note(progress.note)
        loss = "" if math.isnan(progress.loss) else f"loss {progress.loss:.3f}"
        if progress.total > 1:
            loss = f"{progress.done}/{progress.total} runs" + (f", {loss} in {progress.job}" if loss else "")
        self.update(progress.steps_done, progress.steps_total, loss)
